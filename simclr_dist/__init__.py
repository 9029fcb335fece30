"""simclr_dist: SimCLR pretraining that is exact on any number of devices."""

from simclr_dist import renamed

__version__ = "0.1.0"

renamed.install()
