"""Bytes that NT-Xent holds above its input z, computed without holding them. tests/test_plan.py compares."""

from __future__ import annotations

from simclr_dist.loss.enumeration import Pairs
from simclr_dist.loss.tiled import tile_bytes

PLAIN_MATRICES = 6  # N x N at once, masks among them
NUMBERS_PER_ROW = 8
NUMBERS_PER_PAIR = 2  # of a row and a positive beyond the first
KERNEL_PARTS = 2  # of float16, for a float32 row


def workspace_bytes(
    num_rows: int,
    width: int,
    *,
    world_size: int,
    device_type: str,
    implementation: str = "auto",
    gather_dtype: str = "float32",
    num_views: int = 2,
    supervised: bool = False,
    pairs: Pairs = "within",
) -> int:
    """Of one of `world_size` ranks with z float32 [num_rows, width]: O(N K), tiles or kernels, a few numbers a row.

    gather_dtype: what the rows are rounded to and sent as. supervised: SupCon, which adds up the rows of each class; of
    at most as many classes as half of the rows.
    """
    n, N, K = num_rows, num_rows * world_size, width
    if implementation == "plain":
        return PLAIN_MATRICES * 4 * N * N + 3 * N * K * 4
    gathered = 4 * N * K if world_size > 1 else 0
    if world_size > 1 and gather_dtype != "float32":
        gathered += 2 * (N + n) * K
    by_tiles = device_type == "cpu" or implementation == "tiled"
    tiles = tile_bytes(n, device_type, pairs) if by_tiles else 2 * KERNEL_PARTS * N * K + 4 * n * K
    numbers = NUMBERS_PER_ROW + NUMBERS_PER_PAIR * (num_views - 2)
    of_classes = 4 * (N // 2) * K if supervised else 0
    # Unit rows, and two products of all rows with their positives while the value is computed.
    return (n + 2 * N) * K * 4 + gathered + tiles + of_classes + numbers * 4 * N
