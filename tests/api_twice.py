"""Every rank trains twice in one process, in two precisions; see test_api.py."""

import sys

import simclr_dist
from simclr_dist.config import load_config

if __name__ == "__main__":
    config = load_config(sys.argv[1], sys.argv[2:])
    for name, precision in ((config.name, "fp32"), (f"{config.name}_bf16", "bf16")):
        run = simclr_dist.pretrain(config, name=name, train={"precision": precision})
        assert run.state == "finished"
