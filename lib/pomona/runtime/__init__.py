"""Where work runs and how it is watched: settings, devices, seeds, progress."""
