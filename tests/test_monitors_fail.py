"""No monitor ends a training, and none changes it: kNN, probe, gallery, health, curves, on any rank, whatever it is.

Only checkpoints and the training itself may end a run (tests/test_faults.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from simclr_dist import cli
from simclr_dist.errors import DataError, FailedElsewhereError
from simclr_dist.monitor.events import Event, Message, Sink
from simclr_dist.monitor.monitor import Monitor
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from tests.distributed.spawn import run_ranks
from tests.failing_monitors import EXCEPTIONS, failing
from tests.training import Training

WATCHED = (
    "train.epochs=2",  # 16 steps
    "evaluation.knn_every_epochs=1",
    "evaluation.knn_k=5",
    "evaluation.online_probe=true",
    "monitor.health_every_steps=4",
    "monitor.projector_every_epochs=1",
    "monitor.log_every_steps=4",
)
# What ends up on the terminal of the main process, once each: the monitor, where it failed, and its setting.
NAMED = {
    "the evaluation": r"evaluating failed{on} after step 8 .*evaluation.knn_every_epochs switches it off",
    "the gallery": r"showing neighbours failed{on} after step 8 .*monitor.projector_every_epochs switches it off",
    "the health check": r"the health check failed{on} after step 4 .*monitor.health_every_steps switches it off",
    "the probe": r"the online probe failed after step 4 .*evaluation.online_probe switches it off",
    "pairs": r"showing augmented pairs failed after step 1 .*monitor.image_pairs switches it off",
    "TensorBoard": r"TensorBoard cannot be written to .*training goes on without it",
    "the log": r"log.jsonl cannot be written to .*training goes on without it",
    "the record": r"evaluations.jsonl cannot be written to",
}


def watch(images: Path, folder: Path, faults: str, world_size: int, *more: str) -> Training:
    training = Training(
        images,
        folder,
        "watched",
        *WATCHED,
        f"data.test={images}",
        *more,
        world_size=world_size,
        module="tests.failing_monitors",
        FAULTS=faults,
    )
    assert training.wait() == [0] * world_size, training.output
    assert training.status()["state"] == "finished"
    return training


@pytest.fixture(scope="module")
def sound(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """The final bytes of a run in which every monitor works, by the number of processes."""
    return {
        world_size: watch(images, tmp_path_factory.mktemp("sound"), "", world_size).final_bytes()
        for world_size in (1, 2)
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("faults", "world_size", "named"),
    [
        (
            "reading images disk *; probe gpu *; rank of h value *; pairs full *; curves tensorboard *; log disk *",
            1,
            {"the evaluation", "the gallery", "the health check", "the probe", "pairs", "TensorBoard", "the log"},
        ),
        ("nearest assert *; histograms value *", 1, {"the evaluation", "TensorBoard"}),
        (
            "extracting memory 1; probe value 1; sampling gpu 1; projector disk 0",
            2,
            {"the evaluation", "the gallery", "the health check", "the probe"},
        ),
        ("projector disk 0; gradient norm tensorboard 1; record disk 0", 2, {"TensorBoard", "the record"}),
        (
            "probe's accuracy assert 1; neighbours value 0; recording exit 1",
            2,
            {"the evaluation", "the gallery", "the health check"},
        ),
    ],
)
def test_a_training_whose_monitors_fail_ends_as_one_whose_monitors_work(
    images: Path, tmp_path: Path, sound: dict[int, dict[str, str]], faults: str, world_size: int, named: set[str]
) -> None:
    training = watch(images, tmp_path, faults, world_size)
    assert training.final_bytes() == sound[world_size]
    warnings = [line for line in training.output[0].splitlines() if line.startswith("warning")]
    for what in named:
        pattern = NAMED[what].replace("{on}", r"( on rank \d)?")
        assert sum(bool(re.search(pattern, line)) for line in warnings) == 1, (what, training.output)
    assert not any("Traceback" in output for output in training.output)


def test_a_rank_that_fails_says_why_on_the_main_process(images: Path, tmp_path: Path) -> None:
    training = watch(images, tmp_path, "extracting gpu 1", 2)
    assert re.search(
        r"evaluating failed on rank 1 after step 8 and is left out from now on: .*CUDA out of memory",
        training.output[0],
    )


class Broken(Sink):
    name = "broken"

    def __init__(self, kind: str) -> None:
        self.start = self.show = self.close = failing(kind)  # type: ignore[method-assign]


class Heard(Sink):
    name = "heard"

    def __init__(self) -> None:
        self.events: list[Event] = []

    def show(self, event: Event) -> None:
        self.events.append(event)


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_a_sink_may_raise_anything_and_is_named_once(kind: str) -> None:
    heard = Heard()
    with Monitor([Broken(kind), heard]) as monitor:
        for step in range(3):
            monitor.log({"train/loss": 1.0}, step=step, samples_seen=step)
    (warning,) = [event.text for event in heard.events if isinstance(event, Message)]
    assert warning.startswith("broken cannot be written to (")
    assert len(heard.events) == 1 + 3


def fail_in_turn(rank: int, world_size: int) -> list[str]:
    """Each rank fails once, alone, with another kind of exception; in between all compute together."""
    heard = []
    for turn, kind in enumerate(EXCEPTIONS):
        try:
            run_on_all_ranks(failing(kind) if turn % world_size == rank else lambda: None, "cpu", catch=Exception)
        except Exception as error:
            heard.append(type(error).__name__)
        assert int(distributed.all_reduce_sum_(torch.ones(1))) == world_size
    assert distributed.first_text("é" * 2000 if rank == 1 else None, "cpu") == (1, "é" * 512)
    assert distributed.first_text(None, "cpu") is None
    return heard


@pytest.mark.distributed
def test_ranks_agree_before_they_meet_again() -> None:
    first, second = run_ranks(2, fail_in_turn)
    kinds = [type(make()).__name__ for make in EXCEPTIONS.values()]
    assert first == [kind if turn % 2 == 0 else "FailedElsewhereError" for turn, kind in enumerate(kinds)]
    assert second == [kind if turn % 2 == 1 else "FailedElsewhereError" for turn, kind in enumerate(kinds)]


def test_only_the_kinds_that_were_named_are_caught() -> None:
    with pytest.raises(DataError):
        run_on_all_ranks(failing_with(DataError("bad")), "cpu")
    with pytest.raises(ZeroDivisionError):
        run_on_all_ranks(lambda: 1 // 0, "cpu")
    assert issubclass(FailedElsewhereError, Exception)


def failing_with(error: Exception):
    def fail() -> None:
        raise error

    return fail


# ---------------------------------------------------------------------------------------------------------------------
# Images that cannot be read


def copy_some(source: Path, folder: Path, per_class: int) -> Path:
    for place in sorted(source.iterdir()):
        (folder / place.name).mkdir(parents=True)
        for path in sorted(place.iterdir())[:per_class]:
            (folder / place.name / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_unreadable_test_images_are_named_once_and_left_out(
    images: Path, tmp_path: Path, world_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    test = copy_some(images.with_suffix(""), tmp_path / "test", 12)
    broken = sorted(test.rglob("*.png"))[-1]
    broken.write_bytes(broken.read_bytes()[:200])
    empty = sorted(test.rglob("*.png"))[3]
    empty.write_bytes(b"")
    training = watch(images, tmp_path, "", world_size, f"data.test={test}")
    said = [line for line in training.output[0].splitlines() if "cannot be read and are left out" in line]
    assert len(said) == 1
    assert (
        f"2 of 48 images of {test} cannot be read and are left out of the evaluation; the first, number 3: " in said[0]
    )
    assert empty.name in said[0]
    records = [json.loads(line) for line in (training.run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [(record["step"], record["test_images"]) for record in records] == [(8, 46), (16, 46)]

    assert evaluated(training.run_dir, capsys) == without_time(records[-1])
    for path in (broken, empty):
        path.unlink()
    assert evaluated(training.run_dir, capsys)["top1"] == records[-1]["top1"]


def evaluated(run_dir: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `simclr-dist evaluate knn RUN` records."""
    args = cli.parser().parse_args(["evaluate", "knn", str(run_dir), "--json", "--device", "cpu", *arguments])
    assert args.run(args) == 0
    record = json.loads(capsys.readouterr().out)
    del record["scores"]
    return without_time(record)


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("time", "test_fingerprint")}


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "max_train", "image_size"), [(1, None, None), (2, 40, 24)])
def test_while_training_and_afterwards_a_checkpoint_has_one_figure(
    images: Path,
    tmp_path: Path,
    world_size: int,
    max_train: int | None,
    image_size: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside the same settings: k, temperature, the bank, the size of images, the precision."""
    settings = (f"evaluation.knn_max_train={max_train or 'null'}", f"evaluation.image_size={image_size or 'null'}")
    training = watch(images, tmp_path, "", world_size, *settings)
    online = json.loads((training.run_dir / "evaluations.jsonl").read_text().splitlines()[-1])
    assert online["train_images"] == (max_train or 512)
    assert online["image_size"] == (image_size or 32)
    assert {"k", "temperature", "train_images", "test_images", "image_size", "precision"} <= online.keys()
    logged = [json.loads(line) for line in (training.run_dir / "log.jsonl").read_text().splitlines()]
    assert online["top1"] == [line["eval/knn_top1"] for line in logged if "eval/knn_top1" in line][-1]
    beside = f"{online['top1']:.2%} (k=5, T=0.1, {max_train or 512} training images, {image_size or 32} px)"
    assert re.search(rf"kNN top-1 +{re.escape(beside)}", training.output[0])
    more = ("--max-train", str(max_train)) if max_train else ()
    assert evaluated(training.run_dir, capsys, *more) == without_time(online)


def test_where_no_test_image_can_be_read_the_evaluation_is_left_out(images: Path, tmp_path: Path) -> None:
    test = copy_some(images.with_suffix(""), tmp_path / "test", 3)
    for path in test.rglob("*.png"):
        Image.new("RGB", (8, 8)).save(path)
        path.write_bytes(path.read_bytes()[:30])
    training = watch(images, tmp_path, "", 1, f"data.test={test}")
    assert (
        "evaluating failed after step 8 and is left out from now on: none of 12 images can be read"
        in (training.output[0])
    )
