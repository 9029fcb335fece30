"""Has the representation collapsed? One rule, for a training while it runs and for the verdict afterwards."""

from __future__ import annotations

LEAST_SPREAD = 0.1
LEAST_RANK = 3.0  # an encoder may be in use with h in few dimensions, but not in so few


def collapse(h_rank: float, h_width: int, z_spread: float | None) -> str:
    """What has collapsed, with its figures; empty: nothing has.

    h_rank: RankMe of h. z_spread: the mean of `figures.spread` of z; None: there is no trained projection head.
    """
    if h_rank < LEAST_RANK:
        return f"h lies in {h_rank:.1f} of {h_width} dimensions"
    if z_spread is not None and z_spread < LEAST_SPREAD:
        return f"z is nearly the same for different images, its spread is {z_spread:.2f} of 1"
    return ""
