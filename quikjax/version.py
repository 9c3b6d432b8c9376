"""The library's version, for the package, its artifacts and the command line."""

__version__ = "0.1.0"
