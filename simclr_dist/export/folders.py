"""Exports that are folders, as model hubs have them: timm's and transformers'. Each is read back by its library.

config.json         the architecture, and for timm the normalisation
model.safetensors   the encoder's weights under the library's names
preprocessor_config.json   transformers' image processor
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.functional import resized_crop

from simclr_dist import __version__
from simclr_dist.config import ModelConfig
from simclr_dist.data.decode.crops import center_crop_of_share
from simclr_dist.errors import ExportError
from simclr_dist.export.preprocessing import Preprocessing
from simclr_dist.export.self_check import ReadBack, check_same_outputs
from simclr_dist.network.encoders import TIMM, torchvision_names
from simclr_dist.network.names_elsewhere import (
    Table,
    TimmTwin,
    rename,
    timm_to_transformers,
    timm_twin,
    torchvision_to_timm,
)
from simclr_dist.views.augment import normalize

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
TOLERANCE = 1e-5
PROCESSOR_TOLERANCE = 1.0
"""In pixels: transformers resizes before it crops, to whole numbers; a crop lies a part of a pixel elsewhere."""


def possible_formats(config: ModelConfig) -> tuple[str, ...]:
    """The formats that can hold this encoder; hf is tried, where the family is one of transformers'."""
    formats = ["safetensors", "onnx"]
    if config.encoder in torchvision_names():
        formats.insert(0, "torchvision")
    windows_fit = not config.encoder.startswith("swin_") or (config.image_size or 0) % 224 == 0
    if config.encoder.startswith(TIMM) or (config.stem == "imagenet" and timm_twin(config.encoder) and windows_fit):
        formats.insert(0, "timm")
    return tuple(formats)


def refused(config: ModelConfig, library: Literal["timm", "transformers"], why: str) -> ExportError:
    name = config.encoder + (" with the cifar stem" if config.stem == "cifar" else "")
    others = " or ".join(f"--format {name}" for name in possible_formats(config) if name != library)
    return ExportError(f"{library} has no network that computes {name}: {why}; use {others}")


# ---------------------------------------------------------------------------------------------------------------------
# timm


def write_timm(
    encoder: nn.Module, feature_dim: int, config: ModelConfig, license: str, seen: Preprocessing, folder: Path
) -> ReadBack:
    """A folder for `timm.create_model("local-dir:…", pretrained=True)`. Raises ExportError."""
    twin = _twin(config)
    try:
        import timm
    except ImportError:
        raise ExportError("--format timm needs timm: pip install 'simclr-dist[timm]'") from None
    arguments = dict(twin.arguments)
    if seen.pixels.channels != 3:
        arguments["in_chans"] = seen.pixels.channels
    known = timm.get_pretrained_cfg(twin.name)
    if known is not None and known.fixed_input_size:
        arguments["img_size"] = seen.image_size
    try:
        theirs = timm.create_model(twin.name, num_classes=0, **arguments)
        state = rename(encoder.state_dict(), _to_timm(config, encoder, theirs), theirs.state_dict())
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise refused(config, "timm", f"{twin.name} differs for {seen.image_size} px ({_first_line(error)})") from None
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    usual: dict[str, Any] = theirs.pretrained_cfg  # type: ignore[assignment]
    facts: dict[str, Any] = {
        "architecture": twin.name,
        "num_classes": 0,
        "num_features": feature_dim,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [seen.pixels.channels, seen.image_size, seen.image_size],
            "fixed_input_size": "img_size" in arguments,
            "interpolation": "bilinear",
            "crop_pct": seen.crop_share,
            "crop_mode": "center",
            "mean": list(seen.mean),
            "std": list(seen.std),
            "license": license,
            **{key: usual[key] for key in ("first_conv", "classifier") if key in usual},
        },
        "producer": f"simclr_dist {__version__}",
    }
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    read_back = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _same(encoder, read_back, seen, config, "timm")
    return read_back


def _twin(config: ModelConfig) -> TimmTwin:
    if config.encoder.startswith(TIMM):
        return TimmTwin(config.encoder.removeprefix(TIMM))
    if config.stem == "cifar":
        raise refused(config, "timm", "its ResNets begin with 7x7 or deep stems, of stride 2")
    twin = timm_twin(config.encoder)
    if twin is None:
        raise refused(config, "timm", "it is not among timm's models")
    return twin


def _to_timm(config: ModelConfig, encoder: nn.Module, theirs: nn.Module | None = None) -> Table:
    ours = encoder.state_dict()
    if config.encoder.startswith(TIMM):
        return {name: (name,) for name in ours}
    return torchvision_to_timm(config.encoder, ours, theirs.state_dict() if theirs is not None else None)


# ---------------------------------------------------------------------------------------------------------------------
# transformers

_FAMILIES = {"ResNet": "resnet", "VisionTransformer": "vit", "ConvNeXt": "convnext", "SwinTransformer": "swin"}
_POINTWISE = ("pwconv1.weight", "pwconv2.weight", "layer_scale_parameter")
_MODELS = {"resnet": "ResNetModel", "vit": "ViTModel", "convnext": "ConvNextModel", "swin": "SwinModel"}


def write_transformers(
    encoder: nn.Module, feature_dim: int, config: ModelConfig, license: str, seen: Preprocessing, folder: Path
) -> ReadBack:
    """A folder for AutoModel and AutoImageProcessor; `pooler_output` is h. Raises ExportError."""
    family = _FAMILIES.get(type(encoder).__name__)
    if family is None or not (config.encoder.startswith(TIMM) or config.encoder in torchvision_names()):
        raise refused(config, "transformers", "its families are ResNet, ViT, ConvNeXt and Swin")
    if not seen.pixels.is_usual:
        raise refused(config, "transformers", f"its image processors take RGB of 8 bits, and these are {seen.pixels}")
    if config.stem == "cifar":
        raise refused(config, "transformers", "its ResNets begin with a 7x7 stem of stride 2")
    transformers = import_transformers()
    try:
        by_timm = rename(encoder.state_dict(), _to_timm(config, encoder))
        state = rename(by_timm, timm_to_transformers(family, by_timm))
        settings = _describe(family, by_timm, encoder, seen.image_size)
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise refused(config, "transformers", f"{_MODELS[family]} has no {_first_line(error)}") from None
    if family == "vit":  # pooler_output is h, whatever reads it
        state |= {"pooler.dense.weight": torch.eye(feature_dim), "pooler.dense.bias": torch.zeros(feature_dim)}
    if family == "convnext":  # without the axes of size 1 that a convolution or a scale of maps has
        state = {name: value.squeeze() if name.endswith(_POINTWISE) else value for name, value in state.items()}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    facts = {"architectures": [_MODELS[family]], "model_type": family, "dtype": "float32", **settings}
    facts["producer"] = f"simclr_dist {__version__}"
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / PROCESSOR).write_text(json.dumps(_processor(seen), indent=2) + "\n", encoding="utf-8")
    with quiet(transformers):
        model, report = transformers.AutoModel.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True
        )
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    wrong = sorted((*report["missing_keys"], *report["unexpected_keys"], *mismatched))
    if wrong:
        raise refused(config, "transformers", f"{_MODELS[family]} differs in {wrong[0]}")
    model.eval()

    def read_back(images: Tensor) -> Tensor:
        return model(pixel_values=images).pooler_output.flatten(1)

    _same(encoder, read_back, seen, config, "transformers")
    _check_processor(transformers.AutoImageProcessor.from_pretrained(folder), seen)
    return read_back


def import_transformers() -> Any:
    """Raises ExportError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ExportError("--format hf needs transformers: pip install 'simclr-dist[hf]'") from None
    return transformers


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without its bar and its table of what does not fit, which a message of ours says."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _describe(family: str, state: Mapping[str, Tensor], encoder: Any, image_size: int) -> dict[str, Any]:
    """The architecture as transformers' configuration says it, read from timm's names and the module."""
    if family == "resnet":
        bottleneck = "layer1.0.conv3.weight" in state
        last = "conv3" if bottleneck else "conv2"
        stages = range(1, 1 + _count(state, "layer"))
        return {
            "embedding_size": len(state["conv1.weight"]),
            "layer_type": "bottleneck" if bottleneck else "basic",
            "depths": [_count(state, f"layer{i}.") for i in stages],
            "hidden_sizes": [len(state[f"layer{i}.0.{last}.weight"]) for i in stages],
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
        }
    sizes: dict[str, Any] = {"hidden_act": "gelu", "num_channels": 3}
    if family == "vit":
        blocks = encoder.blocks if hasattr(encoder, "blocks") else encoder.encoder.layers
        attention = blocks[0].attn if hasattr(blocks[0], "attn") else blocks[0].self_attention
        norm = encoder.norm if hasattr(encoder, "norm") else encoder.encoder.ln
        return sizes | {
            "image_size": image_size,
            "patch_size": state["patch_embed.proj.weight"].shape[-1],
            "hidden_size": state["pos_embed"].shape[-1],
            "num_hidden_layers": _count(state, "blocks."),
            "num_attention_heads": attention.num_heads,
            "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]),
            "layer_norm_eps": norm.eps,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
            "pooler_act": "linear",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    if family == "convnext":
        stages = range(_count(state, "stages."))
        return sizes | {
            "image_size": image_size,
            "patch_size": state["stem.0.weight"].shape[-1],
            "num_stages": len(stages),
            "depths": [_count(state, f"stages.{i}.blocks.") for i in stages],
            "hidden_sizes": [len(state[f"stages.{i}.blocks.0.conv_dw.weight"]) for i in stages],
            "layer_norm_eps": 1e-6,
            "drop_path_rate": 0.0,
        }
    stages = range(_count(state, "layers."))
    tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in stages]
    width = len(state["patch_embed.proj.weight"])
    return sizes | {
        "image_size": image_size,
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "embed_dim": width,
        "depths": [_count(state, f"layers.{i}.blocks.") for i in stages],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": (round(len(tables[0]) ** 0.5) + 1) // 2,
        "mlp_ratio": len(state["layers.0.blocks.0.mlp.fc1.weight"]) / width,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "use_absolute_embeddings": "absolute_pos_embed" in state,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state,
    }


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow the prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def _processor(seen: Preprocessing) -> dict[str, Any]:
    """`preprocessor_config.json`. BiT's processor is the plain one: shorter side, central crop, normalised."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": seen.resize_to},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": seen.image_size, "width": seen.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(seen.mean),
        "image_std": list(seen.std),
    }


def _check_processor(processor: Any, seen: Preprocessing) -> None:
    """RuntimeError unless it gives what our evaluation would: exactly for S x S that stay whole, else nearly."""
    S = seen.image_size
    shapes = [(2 * S, 3 * S), (5 * S // 2, 2 * S)] + ([(S, S)] if seen.crop_share == 1 else [])
    for height, width in shapes:
        picture = _smooth(height, width)
        top, left, side = center_crop_of_share(height, width, seen.crop_share)
        ours = resized_crop(picture, top, left, side, side, [S, S], antialias=True) if side != S else picture
        expected = normalize(ours.permute(1, 2, 0)[None], seen.pixels)
        found = processor(images=picture.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
        difference = float((expected - found).abs().mean()) if expected.shape == found.shape else float("inf")
        by_a_pixel = float((expected[..., 1:, 1:] - expected[..., :-1, :-1]).abs().mean())
        if not difference <= (1e-5 if side == S else PROCESSOR_TOLERANCE * by_a_pixel):
            raise RuntimeError(
                f"self-check failed: the image processor differs by {difference:g} for {height} x {width} pixels, "
                f"where a shift by a pixel makes {by_a_pixel:g}; nothing was written"
            )


def _smooth(height: int, width: int) -> Tensor:
    """A picture uint8 [3, height, width] without edges."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    waves = [torch.sin(3 * x + 2 * y), torch.cos(4 * y - x), torch.sin(5 * x * y)]
    return (127.5 + 127.5 * torch.stack(waves)).byte()


def _same(encoder: nn.Module, read_back: ReadBack, seen: Preprocessing, config: ModelConfig, library: Any) -> None:
    """What loads but computes something else is not this encoder. Raises ExportError."""
    try:
        channels = seen.pixels.channels
        check_same_outputs(encoder, read_back, seen.image_size, tolerance=TOLERANCE, channels=channels)
    except RuntimeError as error:
        raise refused(config, library, f"at {seen.image_size} px {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]
