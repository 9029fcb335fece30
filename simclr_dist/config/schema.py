"""The settings of a run, section by section, and what must fit together.

Each part of the program takes its own section, as plain values or as a model below. Only training, the commands and the
launcher see the whole `Config`; a checkpoint carries it as a record. This package imports neither torch nor numpy: the
launcher reads configurations on login nodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from simclr_dist.pixel_format import MOST_CHANNELS, RGB, PixelFormat
from simclr_dist.safe_text import mask
from simclr_dist.source_text import SourceText, is_url, lines, source_text

BASE = "_base_"
"""The key under which a file names those that it begins from (yaml_source.py)."""
IMAGES = "images"
"""The kind of data that a file without `data.kind` means."""
IMAGE_TEXT = "image_text"
"""Images, each with texts: two encoders."""
WITH_IMAGES = IMAGES, IMAGE_TEXT
OF_TOKENS = "text", "proteins"
"""The kinds whose samples are token folders."""
TEXT_PAIRS = "text_pairs"
"""Pairs of texts: one encoder."""
PAIRS = IMAGE_TEXT, TEXT_PAIRS
"""The kinds whose samples are folders of pairs."""
PIXELS = ("channels", "bits", "rgb", "mean", "std")
"""The settings of `data` that say what pixels are."""
IMAGES_OF_PAIRS = "images.beton"
"""In a folder of images with texts."""
SHARD_SUFFIX = ".beton"
HUGGING_FACE = "hf/"
"""`model.encoder: hf/FOLDER`."""
OURS_OF_TOKENS = "transformer_small", "gated_cnn"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # with 1 an average never takes in anything new
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
SMALLEST_SIDE, LARGEST_SIDE = 8, 1024
Side = Annotated[int, Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)]
Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
Source = Annotated[
    str,
    BeforeValidator(lambda given: source_text(given) if isinstance(given, list | tuple) else given),
    AfterValidator(SourceText),
    PlainSerializer(lambda text: lines(text) if "\n" in text else str(text), return_type=str | list[str]),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
"""A text with a line for each place. Written, and read, as a list where there are several."""
_SIZE = r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B"
Size = Annotated[str, Field(pattern=f"^{_SIZE}$")]
"""`200GB`, `1.5TiB`."""
Precision = Literal["fp32", "bf16", "fp16"]
PrecisionSetting = Literal["auto", "fp32", "bf16", "fp16"]


def num_bytes_of(size: str) -> int:
    """Of a `Size`."""
    found = re.fullmatch(_SIZE, size)
    assert found is not None
    return int(float(found[1]) * (1024 if found[3] else 1000) ** (1 + "KMGT".index(found[2])))


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TokensConfig(Section):
    """How texts and proteins become views. Every draw is a hash of (seed, epoch, sample, view)."""

    max_tokens: Annotated[int, Field(ge=4, le=65_536)] = Field(
        128, description="What an encoder sees of a sample at most, special tokens included; more is cut off."
    )
    views: Literal["whole", "spans"] = Field(
        "whole", description="`whole`: samples as they are, and dropout makes two of one (SimCSE); `spans`: parts."
    )
    span_min: Count = Field(32, description="Tokens of the shortest span.")
    span_max: Count = Field(96, description="Of the longest. Equal to span_min: all spans are so long.")
    spans_touch: bool = Field(
        True, description="Spans of a sample overlap or touch the first (DeCLUTR); false: they lie anywhere in it."
    )
    mask_p: Probability = Field(0.0, description="Share of a view's tokens that the mask token hides.")
    mutate_p: Probability = Field(0.0, description="Share of a view's tokens that another, random one replaces.")
    length_window: Annotated[int, Field(ge=0, le=4096)] = Field(
        16, description="Batches among which samples are sorted by length, so that little is padded; 0: not at all."
    )


class DataConfig(Section):
    """What is trained on, and how it is read."""

    kind: str = Field(
        "images",
        description="What is trained on: `images`, `text`, `proteins`, `image_text`, `text_pairs`, or a kind that a "
        "script of yours registers.",
    )
    train: Source = Field(
        description="A .beton file, several (a list, a folder of them, a pattern), URLs of them, an image folder, or "
        "`synthetic`; of others the folder that `prepare` wrote."
    )
    test: Source | None = Field(None, description="Held-out images for kNN during training; same kinds as `train`.")
    loader: Literal["auto", "ffcv", "folder", "synthetic"] = Field(
        "auto", description="`auto`: by the kind of `train`; a .beton file needs ffcv."
    )
    image_size: Side = Field(
        None, validate_default=True, description="Side of a view in pixels. Other kinds have none: 0."
    )
    num_views: Annotated[int, Field(ge=2, le=64)] = Field(
        2, description="V: random crops of an image, which is decoded once; each pair of them is a positive."
    )
    order: Literal["random", "page_local", "shard_local"] = Field(
        "random",
        description="`page_local`: near places of the file together, for files larger than memory; `shard_local`: a "
        "few of many files together, for more of them than data.cache_size holds.",
    )
    order_window: Count = Field(64, description="Pages or files among which `page_local` and `shard_local` shuffle.")
    mix: tuple[Positive, ...] | None = Field(
        None, description="Weights of the places that `train` lists: shares of the images drawn; null: each image once."
    )
    num_threads: Count | None = Field(None, description="Decoding threads a process; null: its share of the CPUs.")
    batches_ahead: Annotated[int, Field(ge=1, le=16)] = Field(2, description="Batches decoded ahead of the step.")
    cache_dir: str | None = Field(
        None, description="Where .beton files behind URLs are kept: a folder on a disk of each machine."
    )
    cache_size: Size | None = Field(
        None, description="What they may take there, such as 200GB; null: all stay. See docs/data.md."
    )
    fetch_timeout_s: Annotated[float, Field(ge=1)] = Field(
        60.0, description="How long a store may fail before a training that waits for it gives up."
    )
    channels: Channels | None = Field(
        None, description="Of a pixel; null: as data.train says (`prepare --channels keep`), else 3: red, green, blue."
    )
    bits: Literal[8, 16] | None = Field(None, description="Of a channel; null: as data.train says.")
    rgb: bool | None = Field(
        None, description="Three channels are red, green and blue; null: as data.train says. See docs/data.md."
    )
    mean: tuple[float, ...] | None = Field(
        None, description="Of each channel, in units of its largest value; null: as measured by `prepare`."
    )
    std: tuple[Positive, ...] | None = Field(None, description="As `mean`.")
    tokens: TokensConfig = TokensConfig()
    options: dict[str, bool | int | float | str] = Field({}, description="Settings of a kind of your own.")

    @model_validator(mode="after")
    def _settings_of_its_kind(self) -> DataConfig:
        tokens = self.tokens
        if self.kind == IMAGES and tokens != TokensConfig():
            raise ValueError("data.tokens is of texts and proteins, not of data.kind=images: leave it out")
        if self.kind in (IMAGES, *OF_TOKENS, *PAIRS) and self.options:
            raise ValueError(
                f"data.options ({', '.join(self.options)}) is for a kind of your own; {self.kind} "
                f"{'have none' if self.kind == IMAGES else 'has data.tokens'}"
            )
        plain = TokensConfig(max_tokens=tokens.max_tokens, length_window=tokens.length_window)
        if self.kind in PAIRS and tokens != plain:
            raise ValueError(
                f"data.tokens: {self.kind} compares whole texts as they are: leave all but max_tokens and "
                "length_window out"
            )
        if tokens.span_min > tokens.span_max:
            raise ValueError(
                f"data.tokens.span_min ({tokens.span_min}) must not exceed data.tokens.span_max ({tokens.span_max})"
            )
        if tokens.views == "spans" and tokens.span_max > tokens.max_tokens:
            raise ValueError(
                f"data.tokens.span_max ({tokens.span_max}) must not exceed data.tokens.max_tokens "
                f"({tokens.max_tokens}), where spans are cut off"
            )
        if tokens.mask_p + tokens.mutate_p > 1:
            raise ValueError("data.tokens.mask_p and data.tokens.mutate_p are shares of one whole: lower them")
        return self

    @property
    def pixel_format(self) -> PixelFormat:
        """RGB of 8 bits where nothing is said. Raises ValueError where the settings do not fit together."""
        if self.channels is None:
            return RGB
        rgb = self.rgb if self.rgb is not None else self.channels == 3
        zeros, ones = (0.0,) * self.channels, (1.0,) * self.channels
        usual = (RGB.mean, RGB.std) if rgb else (zeros, ones)
        return PixelFormat(self.channels, self.bits or 8, rgb, self.mean or usual[0], self.std or usual[1])

    @field_validator("mix", "mean", "std", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_size is None else num_bytes_of(self.cache_size)

    @model_validator(mode="after")
    def _cache_fits(self) -> DataConfig:
        if self.cache_dir is None and self.cache_size is not None:
            raise ValueError("data.cache_size is that of data.cache_dir: say where shards are kept, or leave it out")
        return self

    @model_validator(mode="after")
    def _mix_fits(self) -> DataConfig:
        places = lines(self.train)
        if self.mix is not None and len(self.mix) != len(places):
            raise ValueError(
                f"data.mix has {len(self.mix)} weights, but data.train lists {len(places)} "
                f"place{'s' if len(places) != 1 else ''}: it takes one weight for each of a list"
            )
        if self.mix is not None and self.order != "random":
            raise ValueError(f"data.mix draws from sources in random order: set data.order to random, not {self.order}")
        return self

    @field_validator("image_size", mode="wrap")
    @classmethod
    def _images_have_a_size(cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> int:
        if info.data.get("kind", IMAGES) in WITH_IMAGES:
            if value is None:
                raise PydanticKnownError("missing")
            return int(check(value))
        if value not in (None, 0):
            raise ValueError(f"is of images, not of data.kind={info.data['kind']}: leave it out")
        return 0


class AugmentConfig(Section):
    """Chen et al. 2020 (SimCLR), appendix A. A field left null takes the preset's value."""

    preset: Literal["simclr_imagenet", "simclr_cifar", "asymmetric", "none"] = "simclr_imagenet"
    crop_scale_min: Probability | None = Field(None, description="Smallest share of the area that a crop keeps.")
    flip_p: Probability | None = None
    jitter_strength: NonNegative | None = None
    jitter_p: Probability | None = None
    grayscale_p: Probability | None = None
    blur_p: Probability | None = Field(None, description="All views; `asymmetric` blurs 1.0 / 0.1, in turn.")
    solarize_p: Probability | None = Field(None, description="All views; `asymmetric` solarises 0.0 / 0.2.")
    implementation: Literal["auto", "numba", "torch", "triton"] = Field(
        "auto", description="`auto`: triton on GPUs, numba on CPUs, where they work; else torch, with a warning."
    )


class ModelConfig(Section):
    """Encoder and projection head."""

    encoder: str = Field(
        description="torchvision's networks by name, timm's as `timm/NAME`, `resnet_small`; of tokens, "
        "`transformer_small`, `gated_cnn`, or a local folder of transformers as `hf/FOLDER`."
    )
    image_size: Count | None = Field(None, description="Side that a ViT is built for; null: data.image_size.")
    channels: Channels = Field(3, description="What the first layer takes; from data.channels: leave it out.")
    stem: Literal["imagenet", "cifar"] = Field("imagenet", description="`cifar`: 3x3 convolution, no pooling (B.9).")
    zero_init_residual: bool = Field(
        True,
        description="Of torchvision's ResNets: every block begins as its shortcut alone; false: better for short "
        "trainings, see docs/guides/choosing_settings.md.",
    )
    width: Count = Field(
        32,
        description="Channels of `resnet_small`'s first stage; D of `gated_cnn` and of `transformer_small`, there a "
        "multiple of 2 x heads.",
    )
    vocabulary: Count | None = Field(
        None, description="Of `transformer_small` and `gated_cnn`: how many tokens there are."
    )
    depth: Count = Field(4, description="Blocks of `transformer_small`, layers of `gated_cnn`.")
    heads: Count = Field(4, description="Attention heads of `transformer_small`.")
    kernel_size: Annotated[int, Field(ge=1, le=255)] = Field(
        5, description="Tokens that a layer of `gated_cnn` sees in a row; odd."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="Of `transformer_small` and `gated_cnn`.")
    pooling: Literal["mean", "first"] = Field(
        "mean", description="How an encoder of tokens makes h: the mean over all tokens, or the first ([CLS])."
    )
    first_layer: Literal["random", "whitened"] = Field(
        "random", description="`whitened`: the first convolution begins with filters from data.train's own patches."
    )
    head_layers: Literal[1, 2, 3] = Field(2, description="1: a linear projection; 2: SimCLR v1; 3: SimCLR v2.")
    head_hidden_dim: Count | None = Field(None, description="null: as wide as h.")
    head_out_dim: Count = Field(128, description="K, the width of z.")
    head_batch_norm: Literal["all", "hidden", "none"] = Field("all", description="Layers followed by BatchNorm.")
    batch_norm: Literal["global", "per_device", "per_shard"] = Field(
        "global", description="Statistics over all devices, of each, or of each of train.virtual_shards."
    )
    weights: str | None = Field(
        None,
        description="Weights to start from: a file, a folder or a run of whatever origin, `pretrained`: those that the "
        "encoder's library publishes, of `hf/FOLDER` the folder's own, where it is the default; null: random ones. See "
        "docs/guides/starting_from_weights.md.",
    )
    weights_partial: bool = Field(False, description="Also start from weights of a part of the encoder only.")
    freeze: tuple[str, ...] = Field((), description="Patterns of parameters that are not trained: `encoder.layer1.*`.")
    text: ModelConfig | None = Field(
        None, description="Of data.kind=image_text: the encoder of texts and its head, with the settings of `model`."
    )

    @model_validator(mode="before")
    @classmethod
    def _a_folder_has_weights(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(values.get("encoder", "")).startswith(HUGGING_FACE):
            return {"weights": "pretrained", **values}
        return values

    @field_validator("freeze", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="before")
    @classmethod
    def _towers_meet(cls, values: Any) -> Any:
        """z is as wide for texts as for images."""
        if not isinstance(values, dict) or not isinstance(values.get("text"), dict) or "head_out_dim" not in values:
            return values
        return {**values, "text": {"head_out_dim": values["head_out_dim"], **values["text"]}}

    @model_validator(mode="after")
    def _text_is_one_tower(self) -> ModelConfig:
        if self.text is None:
            return self
        if self.text.encoder.startswith(HUGGING_FACE):
            raise ValueError(
                f"text.encoder: {HUGGING_FACE}FOLDER is for model.encoder alone: its weights would not be read here; "
                "take transformer_small, gated_cnn or one of your own"
            )
        of_images = ("image_size", "stem", "first_layer", "zero_init_residual", "batch_norm")
        settings = ("text", "weights", "weights_partial", "freeze", *of_images)
        if found := [key for key in settings if getattr(self.text, key) != ModelConfig.model_fields[key].default]:
            raise ValueError(f"text.{found[0]}: is not of the encoder of texts: leave it out, or set model.{found[0]}")
        if self.text.head_out_dim != self.head_out_dim:
            raise ValueError(
                f"text.head_out_dim ({self.text.head_out_dim}) must be model.head_out_dim ({self.head_out_dim}): texts "
                "are compared with images; leave it out"
            )
        return self


class LossConfig(Section):
    """The contrastive loss over the global batch."""

    kind: Literal["nt_xent", "dcl", "supcon"] = Field(
        "nt_xent", description="`dcl`: the positive is not in the denominator; `supcon`: data.train's labels decide."
    )
    pairs: Literal["within", "across"] = Field(
        "within",
        description="`within`: all rows of other images are negatives; `across`: those of the other view only (CLIP).",
    )
    temperature: Positive = Field(0.1, description="Where a learnt one begins.")
    learn_temperature: bool = Field(False, description="Its logarithm is trained like a bias: no weight decay.")
    temperature_min: Positive = Field(0.02, description="A learnt one goes no lower; CLIP's limit is 0.01.")
    temperature_max: Positive = 1.0
    implementation: Literal["auto", "plain", "tiled", "triton"] = Field("auto", description="See docs/loss.md.")
    gather_dtype: Literal["float32", "bfloat16"] = Field("float32", description="What z travels as between ranks.")
    row_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="What unit rows are rounded to; 16 bits: faster on GPUs, less exact (docs/loss.md)."
    )


class OptimConfig(Section):
    """Optimiser, learning rate and weight decay."""

    optimizer: Literal["lars", "sgd", "adam", "adamw", "muon"] = Field(
        "lars", description="`muon`: for the weights of linear layers and convolutions; AdamW for the rest."
    )
    base_lr: Positive = 0.3
    lr_scaling: Literal["linear", "sqrt", "none"] = Field(
        "linear", description="linear: base_lr x G/256; sqrt: base_lr x sqrt(G); none: base_lr."
    )
    warmup_epochs: NonNegative = 10.0
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: NonNegative = 1e-6
    momentum: Decay = Field(0.9, description="Of lars and sgd.")
    nesterov: bool = Field(False, description="Of sgd: look ahead along the momentum.")
    trust_coefficient: Positive = Field(0.001, description="Of lars.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="Of adam, adamw, and muon's AdamW.")
    muon_momentum: Decay = Field(0.95, description="Of muon, Nesterov's; less for short trainings.")
    muon_ns_steps: Annotated[int, Field(ge=1, le=20)] = Field(
        5, description="Newton-Schulz steps that make muon's update orthogonal; 3 do for short trainings."
    )
    adamw_base_lr: Positive = Field(
        2.0e-3, description="base_lr of what muon leaves to AdamW: biases, norms, tables of positions."
    )
    encoder_lr_scale: Positive = Field(
        1.0, description="The encoder's learning rate as a multiple of the projection head's."
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Each layer of the encoder learns this much more slowly than the one above it; 1: all alike."
    )
    max_grad_norm: Positive | None = None

    @field_validator("betas", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class TrainConfig(Section):
    """How much is trained, and how a step is computed."""

    global_batch_size: Annotated[int, Field(ge=2)] = Field(description="G: images a step, over all devices.")
    micro_batch_size: Count | None = Field(
        None, description="Images a device holds activations of at once; null: all of its share (see docs)."
    )
    virtual_shards: Count | None = Field(
        None,
        description="The same bytes on any number of processes up to this power of two; see docs/reliability.md.",
    )
    epochs: Count
    max_steps: Count | None = Field(None, description="Stop early, without changing the learning rate's course.")
    precision: PrecisionSetting = Field(
        "auto", description="`auto`: bf16 on GPUs; on a CPU, the faster of fp32 and bf16. Decided once a run."
    )
    compile: bool = False
    channels_last: bool = True
    on_non_finite: Literal["stop", "skip"] = Field("stop", description="What a NaN or infinite loss does.")
    max_skipped_steps: Count = Field(3, description="Non-finite steps in a row that `skip` forgives.")

    @property
    def images_of_shard(self) -> int | None:
        return self.global_batch_size // self.virtual_shards if self.virtual_shards else None

    @property
    def images_of_part(self) -> int | None:
        """How many images a device computes at once: a shard or a micro-batch; None: all of its share."""
        return self.images_of_shard or self.micro_batch_size


class EvaluationConfig(Section):
    """How good the encoder is: while training, and by `simclr-dist evaluate` afterwards."""

    train: Source | None = Field(
        None, description="Labelled images for kNN's bank and `evaluate`, where data.train has none; null: data.train."
    )
    image_size: Side | None = Field(
        None, description="Side at which evaluations and exports see whole images; null: data.image_size."
    )
    knn_every_epochs: Count | None = Field(None, description="Online kNN on data.test; null: never.")
    knn_k: Count = 200
    knn_temperature: Positive = 0.1
    knn_max_train: Count | None = Field(None, description="Images of the online kNN's bank, of every class; null: all.")
    online_probe: bool = Field(
        False, description="A linear classifier learns beside the encoder, from data.train's labels."
    )
    batch_size: Count = 512
    drift_every_epochs: Count | None = Field(
        1, description="With model.weights: compare h with that of the start at every n-th epoch's end; null: never."
    )


class CheckpointConfig(Section):
    """When a run is saved, and which checkpoints stay."""

    every_steps: Count | None = Field(None, description="Save at every n-th step.")
    every_epochs: Count | None = Field(None, description="Save at every n-th epoch's end.")
    every_min: Positive | None = Field(10.0, description="Save when this many minutes have passed.")
    keep: Annotated[int, Field(ge=2)] = Field(3, description="The newest that stay.")
    in_background: bool = Field(
        True, description="Train on while a copy of the state is written; it takes as much memory of the host."
    )
    milestone_epochs: Count | None = Field(None, description="Save at every n-th epoch's end, and keep it for ever.")
    keep_best: bool = Field(False, description="Save and keep the one with the best kNN accuracy of the run.")


class MonitorConfig(Section):
    """What is shown and written down of a run."""

    log_every_steps: Count = 10
    image_pairs: Annotated[int, Field(ge=0, le=64)] = Field(16, description="Augmented pairs shown; 0: none.")
    health_every_steps: Count | None = Field(
        100, description="Steps between health checks, see docs/monitoring.md; null: none."
    )
    projector_every_epochs: Count | None = Field(
        None, description="Embedding projector and nearest neighbours at every n-th epoch's end; null: never."
    )
    terminal: Literal["auto", "plain", "quiet", "json"] = Field(
        "auto", description="auto: a live bar on a terminal, else lines; quiet: warnings only; json: JSON lines."
    )
    trackers: tuple[Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb"], ...] = (
        Field((), description="Other loggers beside TensorBoard; each must be installed.")
    )

    @field_validator("trackers", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class TimeoutConfig(Section):
    """How long a rank may be busy with one thing before all give up: something hangs."""

    first_step_s: Positive = Field(300.0, description="compiles, and meets cold caches")
    step_s: Positive = Field(120.0, description="a step, or waiting for its images")
    evaluation_s: Positive = Field(1800.0, description="what is done between two epochs")
    save_s: Positive = 900.0
    stop_s: Positive = Field(60.0, description="a step that began before a stop signal")

    def longest_s(self) -> float:
        return max(self.first_step_s, self.step_s, self.evaluation_s, self.save_s)


class Config(Section):
    """Everything about a run."""

    name: Annotated[str, Field(pattern=NAME_PATTERN, description="The run's folder under `runs_dir`.")]
    runs_dir: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    resume: str = Field(
        "auto", description="`auto`: the newest checkpoint, if any; `none`: refuse to continue; or a path."
    )
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    timeout: TimeoutConfig = TimeoutConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def evaluation_data(self) -> DataConfig:
        """`data` as evaluations and exports see it: its image_size is theirs, not that of the views."""
        return self.data.model_copy(update={"image_size": self.evaluation.image_size or self.data.image_size})

    def with_data(self, data: DataConfig) -> Config:
        """With another section `data`, whose channels the first layer takes."""
        model = self.model.model_copy(update={"channels": data.pixel_format.channels})
        return self.model_copy(update={"data": data, "model": model})

    @model_validator(mode="before")
    @classmethod
    def _model_knows_its_images(cls, values: Any) -> Any:
        """Its first layer takes their channels. A ViT is built for one size of image; other encoders do not care."""
        if not isinstance(values, dict) or not all(isinstance(values.get(key), dict) for key in ("data", "model")):
            return values
        size, channels = (values["data"].get(name) for name in ("image_size", "channels"))
        known = {}
        if isinstance(size, int) and size and values["model"].get("image_size") is None:
            known["image_size"] = size
        if isinstance(channels, int) and "channels" not in values["model"]:
            known["channels"] = channels
        return {**values, "model": {**values["model"], **known}} if known else values

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        self._towers_fit()
        if self.data.kind not in WITH_IMAGES:
            self._refuse_what_only_images_have()
        elif self.model.image_size != self.data.image_size:
            raise ValueError(
                f"model.image_size ({self.model.image_size}) must be data.image_size ({self.data.image_size}); "
                "leave it out"
            )
        self._channels_fit()
        if self.model.weights is not None and self.model.first_layer != "random":
            raise ValueError(
                f"model.first_layer={self.model.first_layer} is for a start from random weights: leave it out, or set "
                "model.weights to null"
            )
        if self.evaluation.knn_every_epochs and not self.data.test:
            raise ValueError("evaluation.knn_every_epochs needs data.test: set it, or set knn_every_epochs to null")
        self._urls_have_a_cache()
        loss = self.loss
        if loss.learn_temperature and not loss.temperature_min <= loss.temperature <= loss.temperature_max:
            raise ValueError(
                f"loss.temperature ({loss.temperature:g}) must lie between loss.temperature_min "
                f"({loss.temperature_min:g}) and loss.temperature_max ({loss.temperature_max:g}): a learnt one stays so"
            )
        if loss.pairs == "across" and (loss.kind == "supcon" or self.data.num_views != 2):
            what = f"data.num_views is {self.data.num_views}" if loss.kind != "supcon" else "loss.kind is supcon"
            raise ValueError(
                f"loss.pairs=across compares the two views of nt_xent or dcl with each other, but {what}: set it back, "
                "or set loss.pairs to within"
            )
        self._views_differ()
        self._shards_fit()
        if self.optim.optimizer == "sgd" and self.optim.nesterov and not self.optim.momentum:
            raise ValueError("optim.nesterov looks ahead along the momentum: set optim.momentum above 0")
        if self.optim.warmup_epochs >= self.train.epochs and self.optim.schedule == "cosine":
            raise ValueError(
                f"optim.warmup_epochs ({self.optim.warmup_epochs:g}) must be shorter than "
                f"train.epochs ({self.train.epochs})"
            )
        return self

    def _urls_have_a_cache(self) -> None:
        """Of .beton files: their samples are read in another order than they lie in."""
        data = self.data
        sources = {"data.train": data.train, "data.test": data.test, "evaluation.train": self.evaluation.train}
        urls = [
            (key, place)
            for key, text in sources.items()
            if text
            for place in lines(text)
            if is_url(place, SHARD_SUFFIX)
        ]
        if urls and data.cache_dir is None:
            key, place = urls[0]
            raise ValueError(
                f"{key}: {mask(place)} is a URL: set data.cache_dir to a folder on a local disk, where its shards are "
                "kept, and data.cache_size to what they may take there"
            )
        if urls and 1.5 * data.fetch_timeout_s > self.timeout.step_s:
            raise ValueError(
                f"data.fetch_timeout_s: {data.fetch_timeout_s:g} s, but a step ends after timeout.step_s = "
                f"{self.timeout.step_s:g} s, and would hide why: set timeout.step_s to "
                f"{1.5 * data.fetch_timeout_s:g} or more"
            )

    def _channels_fit(self) -> None:
        data = self.data
        if data.channels is None:  # the file says them, and what does not fit it is found when it is opened
            return
        if self.model.channels != data.channels:
            raise ValueError(
                f"model.channels ({self.model.channels}) must be data.channels ({data.channels}); leave it out"
            )
        for name in ("mean", "std"):
            values = getattr(data, name)
            if values is not None and len(values) != data.channels:
                raise ValueError(f"data.{name} has {len(values)} numbers, data.channels is {data.channels}")
        if data.rgb and data.channels != 3:
            raise ValueError(f"data.rgb: red, green and blue are three, and data.channels is {data.channels}")

    def _shards_fit(self) -> None:
        shards, train, batch_norm = self.train.virtual_shards, self.train, self.model.batch_norm
        if shards is None:
            if batch_norm == "per_shard":
                raise ValueError("model.batch_norm=per_shard needs train.virtual_shards: how many shards a batch has")
            return
        if shards & (shards - 1):
            raise ValueError(f"train.virtual_shards ({shards}) must be a power of two")
        if train.global_batch_size % shards:
            raise ValueError(
                f"train.global_batch_size ({train.global_batch_size}) does not divide into {shards} "
                "train.virtual_shards of equal size"
            )
        if batch_norm != "per_shard":
            raise ValueError(
                f"train.virtual_shards computes each shard alone, BatchNorm too: set model.batch_norm=per_shard, found "
                f"{batch_norm}"
            )
        if train.micro_batch_size is not None:
            raise ValueError("train.virtual_shards: shards are micro-batches: leave train.micro_batch_size out")
        if train.precision == "auto":
            raise ValueError(
                "train.virtual_shards: train.precision=auto is decided by a measurement: set fp32, bf16 or fp16"
            )

    def _views_differ(self) -> None:
        tokens = self.data.tokens
        same = self.data.kind in OF_TOKENS and tokens.views == "whole" and not (tokens.mask_p or tokens.mutate_p)
        if same and self.model.encoder in OURS_OF_TOKENS and not self.model.dropout:
            raise ValueError(
                "the views of a sample would be the same: data.tokens.views is whole and model.dropout 0; set "
                "model.dropout above 0 (0.1 in SimCSE), or data.tokens.views to spans"
            )

    def _towers_fit(self) -> None:
        """Images with texts have two encoders, and other data have one."""
        if self.data.kind in PAIRS and self.data.num_views != 2:
            raise ValueError(f"data.num_views ({self.data.num_views}): a pair has two sides; leave it out")
        if self.data.kind != IMAGE_TEXT:
            if self.model.text is not None:
                raise ValueError(
                    f"model.text: data.kind is {self.data.kind}, and only {IMAGE_TEXT} has a second encoder"
                )
            return
        if self.model.text is None:
            raise ValueError(f"data.kind={IMAGE_TEXT} needs model.text: the encoder of texts")
        if self.loss.pairs != "across":
            raise ValueError(f"data.kind={IMAGE_TEXT} compares images with texts: set loss.pairs=across")
        if self.model.first_layer != "random":
            raise ValueError(f"model.first_layer={self.model.first_layer} is for data.kind={IMAGES}: leave it out")
        if self.evaluation.online_probe:
            raise ValueError(
                f"evaluation.online_probe learns from one encoder's views, and data.kind={IMAGE_TEXT} has two: leave "
                "it out"
            )

    def _refuse_what_only_images_have(self) -> None:
        settings: dict[str, tuple[Any, Any]] = {
            "augment": (self.augment, AugmentConfig()),
            "data.loader": (self.data.loader, "auto"),
            "data.order": (self.data.order, "random"),
            "data.cache_dir": (self.data.cache_dir, None),
            "data.mix": (self.data.mix, None),
            "model.image_size": (self.model.image_size, None),
            "evaluation.image_size": (self.evaluation.image_size, None),
            "model.first_layer": (self.model.first_layer, "random"),
            "model.channels": (self.model.channels, 3),
            **{f"data.{name}": (getattr(self.data, name), None) for name in PIXELS},
        }
        if found := [key for key, (value, default) in settings.items() if value != default]:
            raise ValueError(
                f"{', '.join(found)}: only images have it, and data.kind is {self.data.kind}; leave it out"
            )


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def parse_config(text: str) -> Config:
    """The configuration that a checkpoint or an exported file contains as JSON. Raises ValueError."""
    return Config.model_validate_json(text)


def json_schema() -> str:
    """The JSON schema that ships as `simclr_dist/config.schema.json`, for editors that complete YAML.

    What a file that begins from others leaves out may stand in them: only one without `_base_` needs every key.
    """
    schema = Config.model_json_schema()
    needed = {name: part.pop("required") for name, part in schema["$defs"].items() if "required" in part}
    sections = {
        name: {"required": needed[part["$ref"].rpartition("/")[2]]}
        for name, part in schema["properties"].items()
        if part.get("$ref", "").rpartition("/")[2] in needed
    }
    names = {"type": "string"}
    schema["properties"][BASE] = {
        "anyOf": [names, {"type": "array", "items": names, "minItems": 1}],
        "description": "Files that this one begins from, relative to it; what stands here wins.",
    }
    del schema["$defs"]["DataConfig"]["properties"]["image_size"]["default"]
    images = {"properties": {"kind": {"enum": list(WITH_IMAGES)}}}
    sections["data"] |= {"if": images, "then": {"required": ["image_size"]}}
    whole = {"required": schema.pop("required"), "properties": sections}
    schema |= {"if": {"required": [BASE]}, "else": whole}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"
