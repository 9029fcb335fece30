"""What to learn: the configuration of a run, read from YAML and `key=value`, checked before anything starts.

    config = load_config("configs/cifar10_resnet18_100ep.yaml", ["train.epochs=5"], world_size=2)

Every part of the program takes its own section; only the trainer sees the whole. All problems of a file are
reported together, each with its place, so that one look at the message is enough to mend it. This module
imports neither torch nor numpy: the launcher reads it on login nodes.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(Exception):
    """The configuration cannot be used. `problems` holds one line each; str() is the whole message."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"configuration: {head}", *(f"  - {line}" for line in problems)]))


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    train: str = Field(description="A .beton file, an image folder, or `synthetic`.")
    test: str | None = Field(None, description="Held-out images for kNN during training; same kinds as `train`.")
    loader: Literal["auto", "ffcv", "folder", "synthetic"] = Field(
        "auto", description="`auto`: by the kind of `train`; a .beton file needs ffcv."
    )
    image_size: Annotated[int, Field(ge=8, le=1024)] = Field(description="Side of a view in pixels.")
    order: Literal["random", "page_local"] = Field(
        "random", description="`page_local`: near places of the file together, for files larger than memory."
    )
    num_threads: Count | None = Field(None, description="Decoding threads a process; null: its share of the CPUs.")
    batches_ahead: Annotated[int, Field(ge=1, le=16)] = Field(2, description="Batches decoded ahead of the step.")


class AugmentConfig(Section):
    """Chen et al. 2020 (SimCLR), appendix A. A field left null takes the preset's value."""

    preset: Literal["simclr_imagenet", "simclr_cifar", "asymmetric", "none"] = "simclr_imagenet"
    crop_scale_min: Probability | None = Field(None, description="Smallest share of the area that a crop keeps.")
    flip_p: Probability | None = None
    jitter_strength: NonNegative | None = None
    jitter_p: Probability | None = None
    grayscale_p: Probability | None = None
    blur_p: Probability | None = Field(None, description="Both views; `asymmetric` blurs 1.0 / 0.1.")
    solarize_p: Probability | None = Field(None, description="Both views; `asymmetric` solarises 0.0 / 0.2.")


class ModelConfig(Section):
    encoder: str = Field(description="torchvision's networks by name, timm's as `timm/NAME`, or `resnet_small`.")
    image_size: Count | None = Field(None, description="Side that a ViT is built for; null: data.image_size.")
    stem: Literal["imagenet", "cifar"] = Field("imagenet", description="`cifar`: 3x3 convolution, no pooling (B.9).")
    width: Count = Field(32, description="Channels of `resnet_small`'s first stage.")
    head_layers: Literal[2, 3] = Field(2, description="2: SimCLR v1; 3: SimCLR v2.")
    head_hidden_dim: Count | None = Field(None, description="null: as wide as h.")
    head_out_dim: Count = Field(128, description="K, the width of z.")
    head_batch_norm: Literal["all", "hidden", "none"] = Field("all", description="Layers followed by BatchNorm.")
    batch_norm: Literal["global", "per_device"] = Field("global", description="Statistics over all devices, or each.")


class LossConfig(Section):
    temperature: Positive = 0.1
    implementation: Literal["auto", "plain", "tiled", "triton"] = Field("auto", description="See docs/loss.md.")
    gather_dtype: Literal["float32", "bfloat16"] = Field("float32", description="What z travels as between ranks.")


class OptimConfig(Section):
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    base_lr: Positive = 0.3
    lr_scaling: Literal["linear", "sqrt", "none"] = Field(
        "linear", description="linear: base_lr x G/256; sqrt: base_lr x sqrt(G); none: base_lr."
    )
    warmup_epochs: NonNegative = 10.0
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: NonNegative = 1e-6
    momentum: Probability = 0.9
    trust_coefficient: Positive = 0.001
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    max_grad_norm: Positive | None = None

    @field_validator("betas", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class TrainConfig(Section):
    global_batch_size: Annotated[int, Field(ge=2)] = Field(description="G: images a step, over all devices.")
    micro_batch_size: Count | None = Field(
        None, description="Images a device holds activations of at once; null: all of its share (see docs)."
    )
    epochs: Count
    max_steps: Count | None = Field(None, description="Stop early, without changing the learning rate's course.")
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool = False
    channels_last: bool = True
    on_non_finite: Literal["stop", "skip"] = Field("stop", description="What a NaN or infinite loss does.")
    max_skipped_steps: Count = Field(3, description="Non-finite steps in a row that `skip` forgives.")


class EvaluationConfig(Section):
    knn_every_epochs: Count | None = Field(None, description="Online kNN on data.test; null: never.")
    knn_k: Count = 200
    knn_temperature: Positive = 0.1
    knn_max_train: Count | None = Field(None, description="Images of the online kNN's bank; null: all.")
    online_probe: bool = Field(False, description="A linear classifier learns beside the encoder; needs labels.")
    batch_size: Count = 512


class CheckpointConfig(Section):
    every_steps: Count | None = Field(None, description="Save at every n-th step.")
    every_epochs: Count | None = Field(None, description="Save at every n-th epoch's end.")
    every_min: Positive | None = Field(10.0, description="Save when this many minutes have passed.")
    keep: Annotated[int, Field(ge=2)] = Field(3, description="The newest that stay.")
    milestone_epochs: Count | None = Field(None, description="Save at every n-th epoch's end, and keep it for ever.")
    keep_best: bool = Field(False, description="Save and keep the one with the best kNN accuracy of the run.")


class MonitorConfig(Section):
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


class Config(Section):
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

    @model_validator(mode="before")
    @classmethod
    def _model_knows_its_images(cls, values: Any) -> Any:
        """A ViT is built for one size of image; the other encoders do not care."""
        if not isinstance(values, dict) or not all(isinstance(values.get(key), dict) for key in ("data", "model")):
            return values
        if isinstance(size := values["data"].get("image_size"), int) and values["model"].get("image_size") is None:
            return {**values, "model": {**values["model"], "image_size": size}}
        return values

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        if self.model.image_size != self.data.image_size:
            raise ValueError(
                f"model.image_size ({self.model.image_size}) must be data.image_size ({self.data.image_size}); "
                "leave it out"
            )
        if self.evaluation.knn_every_epochs and not self.data.test:
            raise ValueError("evaluation.knn_every_epochs needs data.test: set it, or set knn_every_epochs to null")
        if self.optim.warmup_epochs >= self.train.epochs and self.optim.schedule == "cosine":
            raise ValueError(
                f"optim.warmup_epochs ({self.optim.warmup_epochs:g}) must be shorter than "
                f"train.epochs ({self.train.epochs})"
            )
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class _Yaml(yaml.SafeLoader):
    """YAML without YAML 1.1's surprises: `no` and `on` are text, 0123 and 12:30 are not numbers."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - the base class declares it so


_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)?\.[0-9_]*(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)
_SCIENTIFIC = re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$")

_PLAIN_TAGS = ("map", "seq", "str", "bool", "int", "float", "null")

KeyPath = tuple[str, ...]
_S = TypeVar("_S", bound=Section)


@dataclass
class _Reader:
    """Turns YAML into plain values and remembers where each key was written."""

    origins: dict[KeyPath, str]
    problems: list[str]

    def read_file(self, path: Path) -> dict[str, Any]:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError([f"{path}: no such file"]) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"{path}: cannot be read: {error}"]) from None
        try:
            node = yaml.compose(text, Loader=_Yaml)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise ConfigError([f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}"]) from None
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError([f"{path}: expected `key: value` lines, found {_kind_of(node)}"])
        return self._value(node, (), lambda n: f"{path}:{n.start_mark.line + 1}")

    def read_override(self, text: str) -> tuple[KeyPath, Any] | None:
        origin = f"command line `{text}`"
        key, equals, raw = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
            self.problems.append(f"{origin}: expected key=value, for example train.epochs=100")
            return None
        try:
            node = yaml.compose(raw, Loader=_Yaml)
        except yaml.YAMLError as error:
            self.problems.append(f"{origin}: the value is not valid YAML: {getattr(error, 'problem', error)}")
            return None
        path = tuple(key.split("."))
        self.origins[path] = origin
        return path, None if node is None else self._value(node, path, lambda _: origin)

    def _value(self, node: yaml.Node, path: KeyPath, place: typing.Callable[[yaml.Node], str]) -> Any:
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
            self.problems.append(f"{place(node)}: {'.'.join(path)}: the tag {node.tag} is not allowed")
            return None
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value)
                here = (*path, key)
                if key in values:
                    self.problems.append(
                        f"{place(key_node)}: {'.'.join(here)}: written twice (first at {self.origins[here]}); keep one"
                    )
                    continue
                self.origins[here] = place(key_node)
                values[key] = self._value(value_node, here, place)
            return values
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*path, str(i)), place) for i, child in enumerate(node.value)]
        try:
            return _Yaml("").construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError):  # a tag such as !!bool on a value that is none
            self.problems.append(f"{place(node)}: {'.'.join(path)}: {node.value!r} does not fit its tag {node.tag}")
            return None


def load_config(
    path: str | Path, overrides: typing.Sequence[str] = (), *, world_size: int | None = None, check_data: bool = True
) -> Config:
    """The checked configuration of `path` with `key=value` overrides applied in order.

    world_size: number of processes that will train; the global batch must divide over them.
    check_data: refuse data files that do not exist.
    Raises ConfigError with all problems at once.
    """
    reader = _Reader({}, [])
    values = reader.read_file(Path(path))
    for text in overrides:
        parsed = reader.read_override(text)
        if parsed is None:
            continue
        key_path, value = parsed
        target = values
        for key in key_path[:-1]:
            if not isinstance(target.get(key), dict):
                target[key] = {}
            target = target[key]
        target[key_path[-1]] = value
    problems = reader.problems
    config: Config | None = None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [_explain(detail, reader.origins, Path(path)) for detail in error.errors()]
    problems += _cross_checks(values, reader.origins, Path(path), world_size, check_data)
    if problems or config is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def load_section(path: Path, kind: type[_S]) -> _S:
    """Another YAML file of the project, read as strictly. Raises ConfigError with all problems at once."""
    reader = _Reader({}, [])
    values = reader.read_file(path)
    problems, found = reader.problems, None
    try:
        found = kind.model_validate(values)
    except ValidationError as error:
        problems += [_explain(detail, reader.origins, path, kind) for detail in error.errors()]
    if problems or found is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found


def _cross_checks(
    values: dict[str, Any], origins: dict[KeyPath, str], path: Path, world_size: int | None, check_data: bool
) -> list[str]:
    """Checks of single values that need the world: made on the raw values, so that they are reported with the rest."""
    problems = []

    def get(*keys: str) -> Any:
        found: Any = values
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    global_batch, micro_batch = get("train", "global_batch_size"), get("train", "micro_batch_size")
    if world_size and isinstance(global_batch, int) and global_batch > 0:
        where = _place(("train", "global_batch_size"), origins, path)
        if global_batch % world_size:
            lower, upper = global_batch // world_size * world_size, -(-global_batch // world_size) * world_size
            near = f"{lower} or {upper}" if lower else f"{upper}"
            problems.append(
                f"{where}: train.global_batch_size: {global_batch} does not divide over {world_size} processes; "
                f"use {near}"
            )
        elif isinstance(micro_batch, int) and micro_batch > 0 and (global_batch // world_size) % micro_batch:
            where = _place(("train", "micro_batch_size"), origins, path)
            problems.append(
                f"{where}: train.micro_batch_size: {micro_batch} does not divide the "
                f"{global_batch // world_size} images of each process"
            )
    if check_data:
        for key in ("train", "test"):
            source = get("data", key)
            if isinstance(source, str) and source != "synthetic" and not Path(source).exists():
                problems.append(
                    f"{_place(('data', key), origins, path)}: data.{key}: {source} does not exist; "
                    f"make it with `simclr-dist prepare SOURCE {source}`"
                )
    return problems


def _place(key_path: KeyPath, origins: dict[KeyPath, str], path: Path) -> str:
    while key_path:
        if key_path in origins:
            return origins[key_path]
        key_path = key_path[:-1]
    return str(path)


def _explain(detail: typing.Any, origins: dict[KeyPath, str], path: Path, kind_of_file: type[Section] = Config) -> str:
    """One problem found by pydantic, as a line for people."""
    # Union members appear in pydantic's location; they are no keys of ours.
    keys: list[str] = []
    model: Any = kind_of_file
    for part in detail["loc"]:
        if fields := getattr(model, "model_fields", None):
            names = list(fields)
        if fields is not None and part in fields:
            keys.append(str(part))
            model = fields[part].annotation
        elif fields is not None:
            keys.append(str(part))
            break
        elif isinstance(part, int):
            keys.append(str(part))
            model = (*typing.get_args(model), None)[0]  # of tuple[Section, ...]
    key_path = tuple(keys)
    key = ".".join(key_path)
    where = _place(key_path, origins, path)
    prefix = f"{where}: {key}: " if key else f"{where}: "
    value, kind = detail["input"], detail["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key_path[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else "known keys: " + ", ".join(names)
        return f"{prefix}unknown key; {hint}"
    if kind == "missing":
        return f"{prefix}is missing and has no default"
    if kind == "value_error":
        return f"{prefix}{detail['ctx']['error']}"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if isinstance(value, str) and _SCIENTIFIC.match(value):
        mantissa, exponent = re.split("[eE]", value)
        return f"{prefix}YAML reads {value} as text, not as a number; write {mantissa}.0e{exponent} or {float(value):g}"
    if isinstance(value, (dict, list)):
        return f"{prefix}{message}, found {_kind_of(value)}"
    return f"{prefix}{message}, found {json.dumps(value, default=str)}"


def _kind_of(value: Any) -> str:
    kinds: dict[Any, str] = {dict: "a section", list: "a list", type(None): "nothing"}
    kinds |= {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}
    return kinds.get(type(value), f"a {type(value).__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def render_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_PlainDumper, sort_keys=False, width=110)


class _PlainDumper(yaml.SafeDumper):
    """Writes floats with a point, so that 1e-06 stays a number for every YAML reader."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "." not in text and "e" in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_PlainDumper.add_representer(float, _float)


def json_schema() -> str:
    """The JSON schema that ships as `simclr_dist/config.schema.json`, for editors that complete YAML."""
    return json.dumps(Config.model_json_schema(), indent=1, sort_keys=True) + "\n"
