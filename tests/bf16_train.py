"""`simclr_dist.train` on a CPU that is said to have bf16, so that precision is measured."""

from simclr_dist import train
from simclr_dist.training import precision

precision.cpu_has_bf16 = lambda: True

if __name__ == "__main__":
    train.main()
