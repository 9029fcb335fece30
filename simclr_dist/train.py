"""`python -m simclr_dist.train CONFIG [key=value …]`: pretrains. The work is in simclr_dist/training/main.py."""

from simclr_dist.training.main import main, parser, train

__all__ = ["main", "parser", "train"]

if __name__ == "__main__":
    main()
