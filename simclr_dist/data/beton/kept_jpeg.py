"""JPEG files that are stored as they came: they are as coarse as wanted, so encoding them again would only lose more.

Only the commonest kind, which every decoder reads fast: baseline, YCbCr with colours at half the size (4:2:0), in one
scan. Only the segments that decoding needs are stored: others may hold places, names and thumbnails.
"""

from __future__ import annotations

import operator
import re

from simclr_dist.data.sources.jpeg_file import BASELINE, JpegFile

_420 = b"\x22\x11\x11"  # samples of Y, Cb and Cr, down and across
_WHOLE_BLOCKS = b"\x00\x3f\x00"  # a scan of all coefficients at once
# What libjpeg writes before the tables; it says that the colours are YCbCr.
_START = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_EOI = b"\xff\xd9"
# Within a scan 0xff is followed by 0, by another 0xff, or by the number of a restart.
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")

Steps = list[bytes]  # of quantisation, 64 each for Y, Cb and Cr


def plain_steps(file: JpegFile) -> Steps | None:
    """None for a file of another kind."""
    if file.frame_marker != BASELINE or file.num_components != 3 or file.frame[7::3] != _420 or not file.is_ycc:
        return None
    if len(file.scan) != 10 or file.scan[1:7:2] != file.component_numbers or file.scan[7:] != _WHOLE_BLOCKS:
        return None
    steps = [file.tables.get(number, b"") for number in file.frame[8::3]]
    return steps if all(steps) else None


def keep(file: JpegFile, wanted: Steps) -> bytes | None:
    """What to store of an undamaged file: it decodes to the same pixels. None when it must be encoded, as `wanted`."""
    steps = plain_steps(file)
    if steps is None or not all(all(map(operator.ge, *pair)) for pair in zip(steps, wanted, strict=True)):
        return None
    end = _MARKER_AFTER_SCAN.search(file.content, file.scan_begin)
    if end is None or end[0] != _EOI:
        return None
    return b"".join(
        [_START, *(file.content[slice(*span)] for span in file.needed), file.content[file.scan_begin : end.end()]]
    )
