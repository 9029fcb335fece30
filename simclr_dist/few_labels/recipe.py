"""SimCLR v2 from images to a table (Chen et al. 2020b, arXiv 2006.10029): pretrain, fine-tune with few labels, distil.

    RUN/recipe/linear, labels_0.01, labels_0.01/student_1, …     a folder for each stage:
        asked.json     the settings of the stage
        result.json    what came out; written last
    RUN/recipe/results.json, results.md                          the table

A stage that is complete and has the same settings is not done again: an interrupted recipe continues when it is started
again, and a stopped or killed training within it where it was (unfinished.py). Several ranks share every stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from simclr_dist.atomic import replace_text
from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.config import Count, ModelConfig, NonNegative, Positive, Section, flatten
from simclr_dist.errors import ConfigError
from simclr_dist.evaluation.offline import Say, evaluate
from simclr_dist.few_labels.classifier import HEAD_IS_LINEAR, Start
from simclr_dist.few_labels.train import Settings, distill_classifier, finetune_checkpoint
from simclr_dist.few_labels.unfinished import differences
from simclr_dist.network.shape import shape_of_model
from simclr_dist.parallel.run_on_all_ranks import run_on_main
from simclr_dist.run.layout import is_a, is_share, read_record
from simclr_dist.run.results import require_writable
from simclr_dist.safe_text import markdown_cell

Share = Annotated[float, Field(gt=0, le=1)]


class Pretraining(Section):
    config: str = Field(description="A configuration, relative to the recipe.")
    overrides: tuple[str, ...] = Field((), strict=False, description="key=value, as on the command line.")


class Schedule(Section):
    """A supervised training. null: the paper's value, see docs/evaluation.md."""

    epochs: Count | None = None
    base_lr: Positive | None = Field(None, description="For a batch of 256.")
    weight_decay: NonNegative = 0.0
    batch_size: Count = 256
    seed: Annotated[int, Field(ge=0)] = 0

    def settings(self, device: torch.device) -> Settings:
        return Settings(device, self.epochs, self.base_lr, self.weight_decay, self.batch_size, self.seed)


class FineTuning(Schedule):
    start: Start = Field("head", description="head: keep the projection head's first layer, as SimCLR v2 does.")


class Student(Schedule):
    encoder: str | None = Field(None, description="Of the student; null: the teacher's.")
    width: Count | None = Field(None, description="Of a resnet_small.")
    temperature: Positive = 1.0
    alpha: Share = Field(
        1.0, description="Weight of the teacher; the rest goes to the labels that it was fine-tuned with."
    )

    def changes(self) -> dict[str, Any]:
        """To the section `model` of the teacher."""
        return self.model_dump(include={"encoder", "width"}, exclude_none=True)


class Recipe(Section):
    pretrain: Pretraining
    labels: Annotated[tuple[Share, ...], Field(min_length=1, strict=False)] = (0.01, 0.1)
    finetune: FineTuning = FineTuning()
    distill: Annotated[tuple[Student, ...], Field(strict=False)] = (Student(),)


def check_recipe(recipe: Recipe, path: Path, model: ModelConfig, test: str | None) -> None:
    """Raises ConfigError with what would stop the recipe hours later. model, test: of the pretraining's configuration.

    path: of the recipe, for the message.
    """
    problems = []
    if len(set(recipe.labels)) < len(recipe.labels):
        problems.append(f"{path}: labels: {list(recipe.labels)} names a share twice")
    if test is None:
        problems.append(f"{path}: accuracy is measured on data.test: add data.test=FILE to pretrain.overrides")
    if recipe.finetune.start == "head" and model.head_layers == 1:
        problems.append(f"{path}: finetune.start: {HEAD_IS_LINEAR}")
    for i, student in enumerate(recipe.distill):
        try:
            shape_of_model(ModelConfig.model_validate({**model.model_dump(), **student.changes()}))
        except ConfigError as error:
            problems += [f"{path}: distill.{i}: {problem}" for problem in error.problems]
        except ValidationError as error:
            problems += [f"{path}: distill.{i}: {detail['msg']}" for detail in error.errors()]
    if problems:
        raise ConfigError(problems)


# ---------------------------------------------------------------------------------------------------------------------
# Stages


@dataclass(frozen=True)
class Stage:
    """asked: all settings that its result depends on, as plain values. share: of the labels.

    make: does the stage and leaves result.json in `folder`.
    """

    title: str
    share: float
    folder: Path
    asked: dict[str, Any]
    make: Callable[[], Any]

    @property
    def name(self) -> str:
        return f"{self.title}, {_percent_of_labels(self.share)} of the labels"


def stages(recipe: Recipe, root: Path, checkpoint: Checkpoint | None, device: torch.device, say: Say) -> list[Stage]:
    """In the order in which they are done, with folders under `root`. Without a checkpoint they can only be listed."""
    source = checkpoint or root.parent  # read once: a training beside may remove its directory
    name = checkpoint.path.name if checkpoint else root.parent.name
    pretrained = {"checkpoint": name, **(_identity(checkpoint) if checkpoint else {})}
    linear = root / "linear"
    found = [Stage("linear probe", 1.0, linear, pretrained, partial(_probe, source, linear, device, say))]
    for share in recipe.labels:
        folder, tuning = root / f"labels_{share:g}", recipe.finetune
        tuned = {**pretrained, "labels": share, **tuning.model_dump()}
        make = partial(
            finetune_checkpoint, source, folder, tuning.settings(device), share=share, start=tuning.start, say=say
        )
        found.append(Stage(f"fine-tuned from the {tuning.start}", share, folder, tuned, make))
        for number, student in enumerate(recipe.distill, 1):
            make = partial(
                distill_classifier,
                folder / "classifier.safetensors",
                folder / f"student_{number}",
                student.settings(device),
                student=student.changes(),
                temperature=student.temperature,
                alpha=student.alpha,
                subset_file=folder / "subset.json" if student.alpha < 1 else None,
                say=say,
            )
            words = [student.encoder, f"width {student.width}" if student.width else None]
            title = f"distilled into {' '.join(filter(None, words))}" if any(words) else "self-distilled"
            asked = {**student.model_dump(), "teacher": tuned}
            found.append(Stage(title, share, folder / f"student_{number}", asked, make))
    return found


def _identity(checkpoint: Checkpoint) -> dict[str, str]:
    """Its images and its weights: a run that was trained again under its old name has others."""
    manifest = _read(checkpoint.path / "MANIFEST.json")
    return {"images": checkpoint.fingerprint, "weights": manifest["files"]["model.safetensors"]["sha256"][:16]}


def _probe(source: Path | Checkpoint, folder: Path, device: torch.device, say: Say) -> None:
    (score,), _ = evaluate(source, method="linear", device=device, say=say)
    text = json.dumps({"top1": score.top1, "top5": score.top5}) + "\n"
    run_on_main(lambda: replace_text(folder / "result.json", text), device)


def complete(stage: Stage, device: torch.device, say: Say) -> dict[str, Any]:
    """The stage's result, from disk if it has been done. Raises ConfigError if it was done with other settings."""
    if done := run_on_main(lambda: _begin(stage), device):
        say(f"recipe: {stage.name}: done already")
        return done
    say(f"recipe: {stage.name}")
    try:
        stage.make()
    except FloatingPointError as error:
        raise ConfigError([f"{stage.name}: {error}"]) from None
    return run_on_main(lambda: _read(stage.folder / "result.json"), device)


def _begin(stage: Stage) -> dict[str, Any] | None:
    """The stage's result; None if it is to be done."""
    asked, result = stage.folder / "asked.json", stage.folder / "result.json"
    if result.exists():
        if changes := differences(flatten(_read(asked)), flatten(stage.asked)):
            raise ConfigError(
                [
                    f"{stage.folder} holds another result ({'; '.join(changes)}): undo the change, remove the folder "
                    "to do the stage again, or choose another name=… for the run"
                ]
            )
        return _read(result)
    require_writable(stage.folder)
    (stage.folder / "classifier.safetensors").unlink(missing_ok=True)  # of an interrupted start
    replace_text(asked, json.dumps(stage.asked) + "\n")
    return None


def _percent_of_labels(share: float) -> str:
    return f"{100 * share:g} %"


def _read(path: Path) -> dict[str, Any]:
    values = read_record(path)
    if values is None:
        raise ConfigError([f"{path}: cannot be read; remove {path.parent} to do the stage again"])
    return values


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Table:
    """What results.md shows."""

    path: Path
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def run_stages(recipe: Recipe, checkpoint: Checkpoint, root: Path, device: torch.device, say: Say) -> Table:
    """Does what is left to do, writes results.json and results.md into `root`; all ranks together.

    Raises ConfigError, DataError, StoppedError.
    """
    rows: list[dict[str, Any]] = []
    for stage in stages(recipe, root, checkpoint, device, say):
        result = complete(stage, device, say)
        figures = {key: result.get(key) for key in ("top1", "top5", "num_parameters")}
        if not all(is_share(figures[key]) for key in ("top1", "top5")):
            raise ConfigError([f"{stage.folder}: its result has no accuracy; remove it to do the stage again"])
        rows.append({"result": stage.title, "labels": stage.share, **figures, "folder": str(stage.folder)})
    name, step = checkpoint.config.name, checkpoint.step
    cells = [
        (
            row["result"],
            _percent_of_labels(row["labels"]),
            *(f"{100 * row[key]:.2f} %" for key in ("top1", "top5")),
            f"{row['num_parameters']:,}" if is_a(row["num_parameters"], int) else "",
        )
        for row in rows
    ]
    table = Table(root / "results.md", f"{name}, step {step}", ("", "labels", "top-1", "top-5", "parameters"), cells)
    lines = [f"{markdown_cell(table.title)}\n", f"| {' | '.join(table.columns)} |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {' | '.join(map(markdown_cell, row))} |" for row in cells]
    written = json.dumps({"run": name, "step": step, "rows": rows}, indent=1) + "\n"
    run_on_main(lambda: replace_text(root / "results.json", written), device)
    run_on_main(lambda: replace_text(table.path, "\n".join(lines) + "\n"), device)
    return table
