"""`model.weights: pretrained`: the weights that torchvision or timm publish for an encoder, or those of `hf/FOLDER`.

The libraries name the file, fetch it into their own caches and check it; nothing else is downloaded, ever. Without
network the message says what to bring, and where to put it.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from simclr_dist.config import HUGGING_FACE
from simclr_dist.errors import CheckpointError, ConfigError
from simclr_dist.network.encoders import TIMM, timm_network, torchvision_names
from simclr_dist.network.weight_files import Weights, read_weights

PRETRAINED = "pretrained"
NETWORK_TIMEOUT_S = 20.0


def library_weights(encoder: str, image_size: int | None, say: Callable[[str], None]) -> Weights:
    """Raises ConfigError for an encoder that has none, CheckpointError where they cannot be fetched."""
    if encoder.startswith(TIMM):
        return _timm(encoder.removeprefix(TIMM), image_size, say)
    if encoder.startswith(HUGGING_FACE):
        from simclr_dist.network.hugging_face import folder_of

        return read_weights(folder_of(encoder), only_safetensors=True)
    if encoder in torchvision_names():
        return _torchvision(encoder, say)
    raise ConfigError(
        [f"model.weights: pretrained: nobody publishes weights of {encoder}; give the path of a file, or null"]
    )


def _torchs_cache() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


def _torchvision(name: str, say: Callable[[str], None]) -> Weights:
    published = torchvision.models.get_model_weights(name).DEFAULT
    folder = _torchs_cache()
    file = folder / published.url.rpartition("/")[2]
    if not file.exists():
        say(f"downloading {published.url} to {folder}")
        with _explained(f"{published}", published.url, f"{file} ({published.meta.get('_file_size', '?')} MB)"):
            published.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    found = read_weights(file)
    transforms = published.transforms()
    return Weights(
        f"{published} of torchvision",
        found.sha256,
        found.tensors,
        str(file),
        encoder=name,
        mean=tuple(getattr(transforms, "mean", ())) or None,
        std=tuple(getattr(transforms, "std", ())) or None,
    )


def _timm(name: str, image_size: int | None, say: Callable[[str], None]) -> Weights:
    import timm

    known = timm.get_pretrained_cfg(name)
    where = None if known is None else known.hf_hub_id or known.url
    if known is None or not where:
        raise ConfigError(
            [f"model.weights: pretrained: timm publishes no weights of {name}; give the path of a file, or null"]
        )
    source = f"https://huggingface.co/{known.hf_hub_id}" if known.hf_hub_id else str(known.url)
    cache = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    cache = Path(cache if known.hf_hub_id else _torchs_cache()).expanduser()
    say(f"{name}: weights of {source}, from {cache} or the network")
    with _explained(f"timm/{name}", source, str(cache)):
        network = timm_network(name, image_size, pretrained=True)
    tensors = network.state_dict()
    return Weights(
        source,
        _digest(tensors),
        tensors,
        f"timm's weights of {known.architecture}{'.' + known.tag if known.tag else ''}",
        encoder=f"{TIMM}{name}",
        mean=tuple(known.mean),
        std=tuple(known.std),
    )


@contextmanager
def _explained(what: str, url: str, place: str) -> Iterator[None]:
    """No wait without end, and a message for whoever has no network here."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        yield
    except Exception as error:  # of urllib, of huggingface_hub and its clients: they have no common base
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"model.weights: pretrained: {what} cannot be downloaded ({type(error).__name__}: {line}).\n"
            f"  from: {url}\n"
            f"  to:   {place}\n"
            "Where there is no network: download it elsewhere and put it there, or give its path as model.weights"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _digest(tensors: dict[str, Tensor]) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(name.encode())
        state.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
