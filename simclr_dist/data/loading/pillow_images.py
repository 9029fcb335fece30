"""Images of any source, decoded by Pillow and cropped by torchvision: slower than ffcv, but always available."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from simclr_dist.data.beton.reader import RAW
from simclr_dist.data.beton.shard_set import open_data
from simclr_dist.data.loading.decode_pool import CropRule
from simclr_dist.data.sources.decoding import Pixels, decode_jpeg
from simclr_dist.data.sources.images import LabelledImages
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import RGB


class SourceImages:
    """The same crops as `BetonImages` for the same keys; pixels differ a little, because the resizing does."""

    pixel_format = RGB

    def __init__(self, source: LabelledImages) -> None:
        self.source = source
        self.class_names = source.class_names
        self.labels = source.labels
        self.account = source.account

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def content_fingerprint(self) -> str:
        return self.source.content_fingerprint

    def fill(self, ids: NDArray[np.int64], crop: CropRule, out: NDArray[np.uint8]) -> None:
        """Writes the V crops of each image to out [V, b, S, S, 3]."""
        images = [self.source.read(int(i)) for i in ids]
        heights, widths = (np.array([image.shape[axis] for image in images], np.int64) for axis in (0, 1))
        crops = crop(heights, widths)
        for k, image in enumerate(images):
            for v in range(len(out)):
                out[v, k] = _cropped(image, crops[v, k].tolist(), out.shape[2])

    def close(self) -> None:
        pass


def _cropped(image: Pixels, crop: list[int], size: int) -> Pixels:
    top, left, height, width, flip = crop
    if (height, width) == (size, size):
        view = image[top : top + size, left : left + size]
    else:
        planar = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        resized = resized_crop(
            planar, top, left, height, width, [size, size], InterpolationMode.BILINEAR, antialias=True
        )
        view = resized.permute(1, 2, 0).numpy()
    return view[:, ::-1] if flip else view


class BetonSource:
    """A .beton file, or several, read without ffcv: records are raw pixels or JPEG, which Pillow can decode."""

    def __init__(self, path: str | Path) -> None:
        self._beton = open_data(path)
        self.class_names = self._beton.class_names
        self.labels = self._beton.labels
        self.fingerprint = self._beton.fingerprint
        self.account = self._beton.account

    @property
    def content_fingerprint(self) -> str:
        return self._beton.content_fingerprint

    def read(self, index: int) -> Pixels:
        sample = np.array([index])
        offset, size, mode, height, width = self._beton.records(sample)[0].tolist()
        [content] = [os.pread(fd, size, offset) for _, fd in self._beton.reading(sample)]
        if mode == RAW:
            return np.frombuffer(content, np.uint8).reshape(height, width, 3)
        try:
            return decode_jpeg(content, height, width)
        except DataError as error:
            path, number = self._beton.place(index)
            raise DataError(f"{path}: sample {number}: {error}") from None
