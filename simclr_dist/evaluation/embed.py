"""Embeddings of any images, and nearest neighbours among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_dist.checkpoint.pretrained import Source, load_pretrained
from simclr_dist.config import IMAGES, Precision
from simclr_dist.data.decode.channel_crops import crop_and_resize
from simclr_dist.data.decode.crops import center_crops
from simclr_dist.data.sources.channel_files import read_kept
from simclr_dist.data.sources.decoding import decode
from simclr_dist.data.sources.sample_values import Decoding
from simclr_dist.errors import CheckpointError, ConfigError, DataError
from simclr_dist.evaluation.embeddings_file import Embeddings
from simclr_dist.evaluation.features import digest, extract_features
from simclr_dist.evaluation.knn import nearest
from simclr_dist.kinds import kind_of
from simclr_dist.network.precision import assumed_precision
from simclr_dist.pixel_format import PixelFormat


@dataclass(frozen=True)
class Neighbour:
    name: str
    similarity: float  # cosine
    class_name: str | None


def embed(
    checkpoint: Source,
    source: str,
    *,
    device: torch.device | str,
    precision: Precision | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Embeddings:
    """h of every sample of `source`; of images a folder with or without class folders, an archive, a .beton file.

    image_size: side at which the encoder sees them; None: as evaluations of its run do.
    """
    model, loaded = load_pretrained(checkpoint, say, image_size)
    config, kind = loaded.config, kind_of(loaded.config.evaluation_data)
    info = kind.describe(source)
    features = extract_features(
        model.encoder.to(device),
        kind.evaluation_batches(source, np.arange(info.num_samples), batch_size or config.evaluation.batch_size),
        device=device,
        precision=precision or assumed_precision(config.train.precision, torch.device(device).type),
        normalize=kind.to_input,
    )
    return Embeddings(
        features.h.numpy(),
        features.labels.numpy(),
        kind.names(source, info.num_samples),
        info.class_names,
        str(loaded.path.resolve()),
        digest(model.encoder),
        source,
        info.content_fingerprint,
        kind.data.image_size or None,
    )


def neighbours_of(embeddings: Embeddings, h: NDArray[np.float32], k: int) -> list[Neighbour]:
    """The k samples whose h is most similar to `h` [D] by cosine, most similar first; all if there are fewer."""
    similarity, rows = nearest(torch.from_numpy(h)[None], torch.from_numpy(embeddings.h), min(k, len(embeddings.h)))
    return [
        Neighbour(embeddings.names[row], value, embeddings.class_names[label] if label >= 0 else None)
        for row, value in zip(rows[0].tolist(), similarity[0].tolist(), strict=True)
        for label in [int(embeddings.labels[row])]
    ]


def query_embedding(
    embeddings: Embeddings,
    query: str,
    *,
    checkpoint: Source | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """h [D] of `query`: one of the embedded images by its name, or any image file, embedded now.

    checkpoint: where the encoder is now, if it has moved. image_size: for embeddings that do not say at which side
    images were seen. Raises DataError; CheckpointError when the encoder is not the one that made the embeddings;
    ConfigError when image_size is not theirs.
    """
    if image_size and embeddings.image_size and image_size != embeddings.image_size:
        seen = f"the embeddings are of images of {embeddings.image_size} px"
        raise ConfigError([f"--image-size: {image_size}, but {seen}: leave it out"])
    if query in embeddings.names:
        return embeddings.h[embeddings.names.index(query)]
    model, loaded = load_pretrained(checkpoint or embeddings.checkpoint, image_size=embeddings.image_size or image_size)
    if loaded.config.data.kind != IMAGES:
        raise DataError(f"{query}: is no embedded {kind_of(loaded.config.data).noun}, and no other can be read here")
    if digest(model.encoder) != embeddings.encoder_digest:
        raise CheckpointError(f"{loaded.path}: its encoder is not the one that made these embeddings; embed again")
    data = loaded.config.evaluation_data
    try:
        with open(query, "rb") as file:
            image = _read(file, data.pixel_format, data.image_size)
    except (OSError, DataError) as error:
        raise DataError(f"{query}: neither the name of what was embedded nor a readable image: {error}") from None
    batch = (image[None], torch.tensor([-1]), torch.tensor([0]))
    to_input = kind_of(data).to_input
    features = extract_features(model.encoder.to(device), [batch], device=device, normalize=to_input)
    return features.h[0].numpy()


def _read(file: IO[bytes], pixels: PixelFormat, size: int) -> torch.Tensor:
    """[S, S, C], cropped as evaluations do it. Raises DataError."""
    if pixels.is_usual:
        return _center_crop(decode(file).pixels, size)
    samples = read_kept(file, Decoding(channels="keep", pages="channels")).samples
    channels, bits = samples.shape[2], 8 * samples.dtype.itemsize
    if (channels, bits) != (pixels.channels, pixels.bits):
        raise DataError(f"it has {channels} channels of {bits} bits, and the encoder takes {pixels}")
    height, width = (np.array([side]) for side in samples.shape[:2])
    crop = center_crops(height, width, size)
    out = np.empty((1, size, size, channels), samples.dtype)
    crop_and_resize(samples, crop, out)
    return torch.from_numpy(out[0])


def _center_crop(pixels: NDArray[np.uint8], size: int) -> torch.Tensor:
    """uint8 [S, S, 3], as `load_images` crops the image uint8 [H, W, 3]."""
    from torchvision.transforms.functional import resized_crop

    height, width = pixels.shape[:2]
    top, left, crop_height, crop_width, _ = center_crops(np.array([height]), np.array([width]), size)[0].tolist()
    planar = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    if (height, width) == (size, size):
        return planar.permute(1, 2, 0)
    return resized_crop(planar, top, left, crop_height, crop_width, [size, size], antialias=True).permute(1, 2, 0)
