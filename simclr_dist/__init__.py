"""simclr_dist: SimCLR pretraining that is exact on any number of devices."""

__version__ = "0.1.0"
