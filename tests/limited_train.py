"""`simclr_dist.train` where no file may grow beyond LIMIT_BYTES, as on a disk that is nearly full."""

from __future__ import annotations

import os
import resource
import signal

from simclr_dist import train

if __name__ == "__main__":
    limit = int(os.environ["LIMIT_BYTES"])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    train.main()
