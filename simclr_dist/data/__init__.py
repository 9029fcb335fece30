"""Images in, batches of views out.

Importing the package does not import torch: `simclr-dist prepare` and its worker processes start at once.
"""

from simclr_dist.data.batch import Batch, Loader
from simclr_dist.data.order import Order
from simclr_dist.errors import DataError

__all__ = ["Batch", "DataError", "Loader", "Order"]
