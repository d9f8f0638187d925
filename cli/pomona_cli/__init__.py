"""The command line of Pomona: options, streams, signals and exit codes; no mathematics."""
