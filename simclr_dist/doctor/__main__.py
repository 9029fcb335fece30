"""`python -m simclr_dist.doctor`."""

import sys

from simclr_dist.doctor.checks import main

sys.exit(main())
