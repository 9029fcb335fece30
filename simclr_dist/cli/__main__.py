"""`python -m simclr_dist.cli`: the same as `simclr-dist`."""

from simclr_dist.cli import main

main()
