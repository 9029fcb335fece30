"""`python -m simclr_dist.doctor`: needs the standard library only, so that it starts where `simclr-dist` does not."""

import argparse
import sys

from simclr_dist.doctor import command

parser = argparse.ArgumentParser(
    prog="python -m simclr_dist.doctor", description=command.DESCRIPTION, epilog=command.EPILOG
)
command.add_arguments(parser)
sys.exit(command.run(parser.parse_args()))
