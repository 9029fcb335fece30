"""The limit on the size of an image: a header of a few bytes declares how much memory decoding takes."""

from __future__ import annotations

import os

from simclr_dist.errors import DataError

MAX_PIXELS = 1 << 29  # 2 GiB in Pillow
VARIABLE = "SIMCLR_MAX_PIXELS"


def check_num_pixels(width: int, height: int, limit: int | None = None, *, num_bands: int = 1) -> None:
    """Raises DataError, without the image's name, for more pixels than are decoded here.

    limit: None is what the environment variable says, else 2**29.
    """
    most = _usual_limit() if limit is None else limit
    needed = width * height * num_bands
    if needed > most:
        bands = "" if num_bands == 1 else f" of {num_bands} bands"
        elsewhere = f" to `prepare`, or set {VARIABLE}={needed}" if limit is None else ""
        raise DataError(f"{width} x {height} pixels{bands} are more than {most}: say --max-pixels {needed}{elsewhere}")


def _usual_limit() -> int:
    text = os.environ.get(VARIABLE, "")
    if not text:
        return MAX_PIXELS
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise DataError(f"the environment variable {VARIABLE} is {text!r}; expected a number of pixels, at least 1")
    return int(text)
