"""SimCLR v2 from images to a table (Chen et al. 2020b, arXiv 2006.10029): pretrain, fine-tune with few labels, distil.

    RUN/recipe/linear, labels_0.01, labels_0.01/student_1, …     a folder for each stage:
        asked.json     what was asked for
        result.json    what came out; written last
    RUN/recipe/results.json, results.md                          the table

A stage that is complete and was asked for in the same words is not done again, so that a recipe that was interrupted
goes on when it is started again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from simclr_dist.atomic import replaces
from simclr_dist.checkpoint.files import Checkpoint, find_checkpoint
from simclr_dist.config import Config, Count, ModelConfig, NonNegative, Positive, Section, load_config, load_section
from simclr_dist.errors import ConfigError
from simclr_dist.evaluation.offline import evaluate
from simclr_dist.few_labels.classifier import Start
from simclr_dist.few_labels.train import Settings, distill_classifier, finetune_checkpoint
from simclr_dist.network.simclr import build_model
from simclr_dist.terminal import percent, print_table, say

Share = Annotated[float, Field(gt=0, le=1)]
COLUMNS = ("top1", "top5", "num_parameters")


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
    alpha: Share = Field(1.0, description="Weight of the teacher; the rest goes to the labels it was tuned with.")

    def changes(self) -> dict[str, Any]:
        """To the teacher's model section."""
        return self.model_dump(include={"encoder", "width"}, exclude_none=True)

    def model(self, config: Config) -> ModelConfig:
        """Raises pydantic's ValidationError."""
        return ModelConfig.model_validate({**config.model.model_dump(), **self.changes()})


class Recipe(Section):
    pretrain: Pretraining
    labels: Annotated[tuple[Share, ...], Field(min_length=1, strict=False)] = (0.01, 0.1)
    finetune: FineTuning = FineTuning()
    distill: Annotated[tuple[Student, ...], Field(strict=False)] = (Student(),)


def read_recipe(path: Path, overrides: Sequence[str] = (), *, check_data: bool = False) -> tuple[Recipe, Config]:
    """The checked recipe, and the configuration of its pretraining. Raises ConfigError."""
    recipe = load_section(path, Recipe)
    config = load_config(
        path.parent / recipe.pretrain.config, [*recipe.pretrain.overrides, *overrides], check_data=check_data
    )
    problems = [
        problem for i, student in enumerate(recipe.distill) for problem in _problems_of(i, student, config, path)
    ]
    if len(set(recipe.labels)) < len(recipe.labels):
        problems.append(f"{path}: labels: {list(recipe.labels)} names a share twice")
    if config.data.test is None:
        problems.append(f"{path}: accuracy is measured on data.test: add data.test=FILE to pretrain.overrides")
    if problems:
        raise ConfigError(problems)
    return recipe, config


def _problems_of(number: int, student: Student, config: Config, path: Path) -> list[str]:
    """What building the student would run into, hours later."""
    try:
        with torch.device("meta"):  # neither memory nor time
            build_model(student.model(config))
    except ConfigError as error:
        return [f"{path}: distill.{number}: {problem}" for problem in error.problems]
    except ValidationError as error:
        return [f"{path}: distill.{number}: {detail['msg']}" for detail in error.errors()]
    return []


def run_recipe(
    path: Path,
    overrides: Sequence[str],
    device: torch.device,
    *,
    run: Path | None = None,
    nproc: int | None = None,
    dry_run: bool = False,
) -> int:
    """Does what is left to do and prints the table. run: a pretrained run to take instead of pretraining.

    Returns the exit code: 0, or that of a pretraining that has not come to its end. Raises CheckpointError,
    ConfigError, DataError.
    """
    recipe, config = read_recipe(path, overrides, check_data=run is None)
    words = [str(path.parent / recipe.pretrain.config), *recipe.pretrain.overrides, *overrides]
    run_dir = run or config.run_dir
    if dry_run:
        print(f"pretraining: {shlex.join(words)}" if run is None else f"pretrained: {run}")
        for stage in stages(recipe, run_dir / "recipe", None, device):
            print(f"{stage.title}, {_percent_of_labels(stage.share)} of the labels: {stage.folder}")
        return 0
    if run is None:
        code = _pretrain(words, nproc or torch.cuda.device_count() or 2)
        state = code or json.loads((run_dir / "status.json").read_text(encoding="utf-8"))["state"]
        if state != "finished":
            say("recipe: pretraining has not come to its end; the same command goes on from there")
            return code
    checkpoint = find_checkpoint(run_dir, say)
    rows = []
    for stage in stages(recipe, run_dir / "recipe", checkpoint, device):
        result = _done(stage)
        row = {"result": stage.title, "labels": stage.share, **{key: result.get(key) for key in COLUMNS}}
        rows.append({**row, "folder": str(stage.folder)})
    _show(run_dir / "recipe", checkpoint, rows)
    return 0


def _pretrain(words: Sequence[str], nproc: int) -> int:
    """The launcher's exit code."""
    command = [sys.executable, "-m", "launcher", "local", words[0], "--nproc", str(nproc), *words[1:]]
    return subprocess.run(command, check=False).returncode


# ---------------------------------------------------------------------------------------------------------------------
# Stages


@dataclass(frozen=True)
class Stage:
    """asked: all that makes its result what it is, as plain values; share: of the labels.

    make: does it and leaves result.json in `folder`.
    """

    title: str
    share: float
    folder: Path
    asked: dict[str, Any]
    make: Callable[[], Any]


def stages(recipe: Recipe, root: Path, checkpoint: Checkpoint | None, device: torch.device) -> list[Stage]:
    """In the order in which they are done. Without a checkpoint they can be looked at, not done."""
    source = checkpoint.path if checkpoint else root.parent
    pretrained = {"checkpoint": source.name, **(_identity(checkpoint) if checkpoint else {})}
    linear = root / "linear"
    found = [Stage("linear probe", 1.0, linear, {**pretrained}, partial(_probe, source, linear, device))]
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
    """Its images, and its weights: a run that was trained anew under its old name is another one."""
    manifest = _read(checkpoint.path / "MANIFEST.json")
    return {"images": checkpoint.fingerprint, "weights": manifest["files"]["model.safetensors"]["sha256"][:16]}


def _probe(source: Path, folder: Path, device: torch.device) -> None:
    (score,), _ = evaluate(source, method="linear", device=device, say=say)
    with replaces(folder / "result.json") as temporary:
        temporary.write_text(json.dumps({"top1": score.top1, "top5": score.top5}) + "\n", encoding="utf-8")


def _done(stage: Stage) -> dict[str, Any]:
    """The stage's result, from disk if there is one. Raises ConfigError if it was asked for in other words."""
    asked, result = stage.folder / "asked.json", stage.folder / "result.json"
    name = f"{stage.title}, {_percent_of_labels(stage.share)} of the labels"
    if result.exists():
        before, now = _flat(_read(asked)), _flat(stage.asked)
        changes = [
            f"{key}: {before.get(key)} then, {now.get(key)} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changes:
            raise ConfigError(
                [
                    f"{stage.folder} holds another result ({'; '.join(changes)}): put that back, remove the folder to "
                    "do it anew, or choose another name=… for the run"
                ]
            )
        say(f"recipe: {name}: done already")
        return _read(result)
    say(f"recipe: {name}")
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / "classifier.safetensors").unlink(missing_ok=True)  # of a start that was cut off
    with replaces(asked) as temporary:
        temporary.write_text(json.dumps(stage.asked) + "\n", encoding="utf-8")
    try:
        stage.make()
    except FloatingPointError as error:
        raise ConfigError([f"{name}: {error}"]) from None
    return _read(result)


def _percent_of_labels(share: float) -> str:
    return f"{100 * share:g} %"


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read ({error}); remove {path.parent} to do it anew"]) from None
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"teacher": {"seed": 0}} -> {"teacher.seed": 0}"""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The table


def _show(folder: Path, checkpoint: Checkpoint, rows: list[dict[str, Any]]) -> None:
    title = f"{checkpoint.config.name}, step {checkpoint.step}"
    head = ("", "labels", "top-1", "top-5", "parameters")
    cells = [
        (
            row["result"],
            _percent_of_labels(row["labels"]),
            percent(row["top1"]),
            percent(row["top5"]),
            f"{row['num_parameters']:,}" if row["num_parameters"] else "",
        )
        for row in rows
    ]
    lines = [f"{title}\n", f"| {' | '.join(head)} |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    for name, text in (
        ("results.json", json.dumps({"run": checkpoint.config.name, "step": checkpoint.step, "rows": rows}, indent=1)),
        ("results.md", "\n".join(lines)),
    ):
        with replaces(folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    print_table(title, head, cells)
    print(folder / "results.md")
