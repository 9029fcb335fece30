"""The file formats of an export. Each function writes `path` and returns the encoder, read back from the file.

torchvision   a plain state dict (torch.save), for `torchvision.models.<encoder>().load_state_dict(..., strict=True)`.
              The encoder has no classifier, so the class layer is filled with zeros: replace it, or train it.
safetensors   the encoder's weights under the names of its library, without the class layer; configuration, step,
              normalisation and licence are in the file's metadata.
onnx          the encoder as a graph for onnxruntime and others: float32 `images` [n, C, H, W], normalised, to `h`
              [n, D], for any n, and any size where the network allows it. The same metadata. Needs the extra `export`.

Formats that are folders: folders.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr_dist import __version__
from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.config import parse_config
from simclr_dist.errors import ExportError
from simclr_dist.export.self_check import ReadBack, check_same_outputs
from simclr_dist.network.encoders import (
    build_encoder,
    class_layer,
    remove_class_layer,
    torchvision_names,
    torchvision_network,
)
from simclr_dist.network.trial import refuses


def write_torchvision(
    encoder: nn.Module, feature_dim: int, checkpoint: Checkpoint, license: str, path: Path
) -> nn.Module:
    config = checkpoint.config.model
    if config.encoder not in torchvision_names():
        raise ExportError(
            f"{checkpoint.path}: its encoder {config.encoder} is none of torchvision's; use --format safetensors"
        )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    found = torchvision_network(config)
    name = class_layer(found)
    state |= {f"{name}.{key}": torch.zeros_like(value) for key, value in found.get_submodule(name).state_dict().items()}
    torch.save(state, path)
    found.load_state_dict(torch.load(path, weights_only=True), strict=True)
    remove_class_layer(found)
    return found.eval()


def write_safetensors(
    encoder: nn.Module, feature_dim: int, checkpoint: Checkpoint, license: str, path: Path
) -> nn.Module:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(state, path, metadata(checkpoint, feature_dim, license))
    return load_encoder(path)[0]


def load_encoder(path: str | Path) -> tuple[nn.Module, int]:
    """The encoder of an exported safetensors file, on the CPU in evaluation mode, and D, the width of its h."""
    with safe_open(path, framework="pt") as file:
        config = parse_config(file.metadata()["config"])
    encoder, feature_dim = build_encoder(config.model)
    encoder.load_state_dict(load_file(path), strict=True)
    return encoder.eval(), feature_dim


@dataclass(frozen=True)
class OnnxGraph:
    """A graph that was written. one_size: why it takes images of S x S only; empty where any height and width fit."""

    read_back: ReadBack
    one_size: str = ""


def write_onnx(encoder: nn.Module, feature_dim: int, checkpoint: Checkpoint, license: str, path: Path) -> OnnxGraph:
    """Images of any size where the network takes another one and the graph then gives the same; else of S x S."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch writes ONNX with it
    except ImportError as error:
        raise ExportError(f"--format onnx needs {error.name}: pip install 'simclr-dist[export]'") from None
    S, channels = checkpoint.config.evaluation_data.image_size, checkpoint.config.model.channels

    def write(size: tuple[int, int], names: dict[int, Any], free_size: bool) -> ReadBack:
        program = torch.onnx.export(
            encoder,
            (torch.zeros(2, channels, *size),),
            input_names=["images"],
            output_names=["h"],
            dynamic_shapes=({0: torch.export.Dim("n")} | names,),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        graph = program.model_proto
        facts = metadata(checkpoint, feature_dim, license) | {"free_image_size": str(free_size).lower()}
        onnx.helper.set_model_props(graph, facts)
        onnx.checker.check_model(graph, full_check=True)
        path.write_bytes(graph.SerializeToString())
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def read_back(images: Tensor) -> Tensor:
            # One image, then the others: any number of images must work.
            parts = [session.run(["h"], {"images": part.numpy()})[0] for part in (images[:1], images[1:])]
            return torch.cat([torch.from_numpy(part) for part in parts])

        return read_back

    other = (2 * S, 3 * S)  # not square, so that height and width are known to be free of each other
    one_size, ort = refuses(encoder, other, channels), onnxruntime.capi.onnxruntime_pybind11_state
    failures = (RuntimeError, ValueError, ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.RuntimeException)
    if not one_size:
        sides = {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
        try:
            read_back = write((S, 2 * S), sides, free_size=True)
            check_same_outputs(encoder, read_back, other, channels=channels)
        except failures as error:
            one_size = _first_line(error)
        else:
            return OnnxGraph(read_back)
    return OnnxGraph(write((S, S), {}, free_size=False), one_size)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def metadata(checkpoint: Checkpoint, feature_dim: int, license: str) -> dict[str, str]:
    """What the file holds beside the weights; safetensors and ONNX take text only."""
    pixels = checkpoint.config.data.pixel_format
    return {
        "format": "pt",
        "producer": f"simclr_dist {__version__}",
        "config": checkpoint.config.model_dump_json(),
        "encoder": checkpoint.config.model.encoder,
        "stem": checkpoint.config.model.stem,
        "feature_dim": str(feature_dim),
        "image_size": str(checkpoint.config.evaluation_data.image_size),
        "channels": str(pixels.channels),
        "bits": str(pixels.bits),
        "mean": " ".join(map(str, pixels.mean)),
        "std": " ".join(map(str, pixels.std)),
        "step": str(checkpoint.step),
        "samples_seen": str(checkpoint.samples_seen),
        "data_fingerprint": checkpoint.fingerprint,
        "license": license,
    }
