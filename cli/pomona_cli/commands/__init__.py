"""One thin file per command, found by the root app; each defines ``COMMAND``."""
