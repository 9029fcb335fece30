"""Kinds of data: images are the first, not the only one. See kind.py; docs/guides/extending.md has one of your own.

Importing the package does not import torch.
"""

from simclr_dist.kinds.kind import Kind
from simclr_dist.kinds.registry import is_built_in, kind_of, noun_of, register

__all__ = ["Kind", "is_built_in", "kind_of", "noun_of", "register"]
