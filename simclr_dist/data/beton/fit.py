"""What a file must hold for views of a given side: no more pixels and no finer JPEG than such views show.

Decoding costs as much as there are pixels and coefficients. Views of S x S pixels show crops of any size, so an image
much larger than S loses little when it is stored smaller, and shrinking hides what a coarser quality takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simclr_dist.data.beton.encode import RAW_UP_TO_PIXELS
from simclr_dist.data.beton.shard_files import names_beton
from simclr_dist.errors import DataError

QUALITY = 90
_QUALITY_OF_SHRUNK = 75
_SIDE_FOR_224 = 320
_NO_SMALLER_THAN = round(RAW_UP_TO_PIXELS**0.5)  # such images are raw: a smaller side would save no decoding


@dataclass(frozen=True)
class Fit:
    """How images are stored. max_side: of the longer side, in pixels; None: any.

    quality: of JPEG; of images that are shrunk it is quality_of_shrunk.
    """

    max_side: int | None
    quality: int
    quality_of_shrunk: int

    def sentence(self, for_views: int) -> str:
        coarser = self.quality_of_shrunk != self.quality
        shrunk = f", JPEG quality {self.quality_of_shrunk} where that shrinks them" if coarser else ""
        return (
            f"for views of {for_views} px: longer sides of up to {self.max_side} px{shrunk}; other images as without "
            f"--for-views (quality {self.quality})"
        )


def choose_fit(for_views: int | None, max_side: int | None, quality: int | None) -> Fit:
    """max_side and quality: as the user says; None: 90 and any side, or what views of `for_views` px need."""
    if for_views is None:
        return Fit(max_side, quality or QUALITY, quality or QUALITY)
    needed = max(-(-for_views * _SIDE_FOR_224 // 224), _NO_SMALLER_THAN)
    return Fit(max_side or needed, quality or QUALITY, quality or _QUALITY_OF_SHRUNK)


def prepared_for(sidecar: dict[str, object]) -> int | None:
    """The side of views that a file was prepared for, where its sidecar says so."""
    side = sidecar.get("for_views")
    return side if isinstance(side, int) and not isinstance(side, bool) and side > 0 else None


def remark_on_views(source: str | Path, image_size: int) -> str:
    """A sentence where .beton files were prepared for smaller views; else, and for other data, nothing."""
    from simclr_dist.data.beton.shard_set import open_data

    try:
        if not names_beton(source):
            return ""
        with open_data(source) as beton:
            sides = [prepared_for(sidecar) for sidecar in beton.sidecars if sidecar.get("num_shrunk")]
    except DataError:
        return ""  # found where the images are opened
    side = min((side for side in sides if side is not None), default=image_size)
    if side >= image_size:
        return ""
    return (
        f"{source}: prepared for views of {side} px; this training takes {image_size} px (data.image_size), for which "
        f"its images are small and coarse: prepare again with --for-views {image_size}"
    )
