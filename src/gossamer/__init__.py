"""Make models sparse, and make sparse pay."""

__version__ = "0.1.0"
