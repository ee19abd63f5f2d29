"""The version, in a room that every other may know."""

__version__ = "0.1.0"
