"""Pomona: ten published machine-learning methods behind one command line."""

__version__ = "0.1.0.dev0"
