"""The version, in the one place that setup.py reads too."""

__version__ = "0.1.0"
