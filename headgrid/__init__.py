"""headgrid: exact attention on any number of GPUs, by n head groups x m slices of every head's channels."""

__version__ = "0.1.0"
