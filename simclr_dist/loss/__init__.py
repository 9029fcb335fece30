"""NT-Xent, the loss of SimCLR: exact over any number of processes, in tiles, without communication in its backward.

    from simclr_dist.loss import NTXentLoss

    nt_xent = NTXentLoss(temperature=0.1)
    for views in loader:                            # [2, B, 3, H, W]; every rank has its own part of the batch
        h, z = model(views.flatten(0, 1))           # z [2B, K]: first all of view 0, then all of view 1
        loss = nt_xent(z)                           # negatives from every rank; the same value on every rank
        loss.backward()                             # under DDP: exactly the gradient of the whole global batch

Works in any PyTorch program, with torch.distributed and without. `docs/loss.md` has the formulas and the choices.

    agreement.py        what all ranks agree on: one check a step, and the code that computes the loss
    batch.py            the global batch: normalised, gathered
    enumeration.py      which pairs of rows are compared, and which rank computes which tiles of them
    plain.py            the definitions, by autograd on all N x N similarities
    tiled.py            sums of exp(similarity) in tiles, each similarity computed once
    triton_kernels.py   the same sums on a GPU
    implementations.py  chooses between these
    memory.py           the bytes that the loss needs
    nt_xent.py          NTXentLoss: NT-Xent and its decoupled form
    supcon.py           SupConLoss: labels make the positives
"""

from simclr_dist.loss.agreement import NonFiniteError, checked_after_the_backward
from simclr_dist.loss.nt_xent import NTXentLoss, nt_xent
from simclr_dist.loss.supcon import SupConLoss

__all__ = ["NTXentLoss", "NonFiniteError", "SupConLoss", "checked_after_the_backward", "nt_xent"]
