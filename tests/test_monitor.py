"""What a training leaves for those who watch it, read back as TensorBoard and other loggers read it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import tracking
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.projector import projector_config_pb2

from simclr_dist.config import MonitorConfig
from simclr_dist.errors import ConfigError
from simclr_dist.monitor.events import Embedding
from simclr_dist.monitor.monitor import Monitor, open_monitor
from tests.training import Training

# Stands for the package of that name, with as much of it as Accelerate touches.
FAKE_WANDB = """
import json, os

def tell(what, content):
    with open(os.environ["FAKE_WANDB_FILE"], "a") as file:
        file.write(json.dumps([what, content]) + "\\n")

class Config:
    def update(self, values, allow_val_change):
        tell("config", values)

class Run:
    def log(self, values, step):
        tell("log", {"at": step, **values})
    def finish(self):
        tell("finish", {})

def init(**options):
    tell("init", options)
    return Run()

config = Config()
"""
SETTINGS = (
    "train.epochs=1",  # 8 steps
    "data.train=synthetic",
    "data.test=synthetic",
)


class Watched:
    """A run of 2 ranks that is watched as closely as can be, and what another logger heard of it."""

    def __init__(self, folder: Path) -> None:
        package = folder / "packages"
        (package / "wandb-0.1.dist-info").mkdir(parents=True)
        (package / "wandb-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.1\n")
        (package / "wandb.py").write_text(FAKE_WANDB)
        self.training = Training(
            Path("synthetic"),
            folder,
            "watched",
            *SETTINGS,
            "monitor.health_every_steps=1",
            "monitor.projector_every_epochs=1",
            "monitor.trackers=[wandb]",
            "evaluation.knn_every_epochs=1",
            "evaluation.online_probe=true",
            world_size=2,
            fresh=True,  # accelerate looks for wandb when it is imported
            PYTHONPATH=str(package),
            FAKE_WANDB_FILE=str(folder / "heard"),
        )
        assert self.training.wait() == [0, 0], self.training.output
        self.run_dir = self.training.run_dir
        self.heard = [json.loads(line) for line in (folder / "heard").read_text().splitlines()]
        self.lines = [json.loads(line) for line in (self.run_dir / "log.jsonl").read_text().splitlines()]
        self.tags = {tag for line in self.lines for tag in line if "/" in tag}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return Watched(tmp_path_factory.mktemp("watched"))


def plugin_content(run_dir: Path, tag: str) -> bytes:
    """What a plugin of TensorBoard finds under `tag`."""
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return events.SummaryMetadata(tag).plugin_data.content


def tensor_of(run_dir: Path, tag: str) -> Any:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return events.Tensors(tag)[-1].tensor_proto


# ---------------------------------------------------------------------------------------------------------------------
# A run, watched


@pytest.mark.distributed
def test_a_watched_run_is_the_run_that_nobody_watches(watched: Watched, tmp_path: Path) -> None:
    unwatched = Training(
        Path("synthetic"),
        tmp_path,
        "unwatched",
        *SETTINGS,
        "monitor.health_every_steps=null",
        "monitor.image_pairs=0",
        world_size=2,
        fresh=True,  # as the watched one: a fork of a process that has imported torch may round differently
    )
    assert unwatched.wait() == [0, 0], unwatched.output
    assert unwatched.final_bytes() == watched.training.final_bytes()
    assert unwatched.losses() == watched.training.losses()
    assert "health" not in (unwatched.run_dir / "log.jsonl").read_text().replace("health/masked_duplicates", "")
    assert sum("health/h_rankme" in line for line in watched.lines) == 8


@pytest.mark.distributed
def test_the_ordered_page_shows_every_curve_and_nothing_else(watched: Watched) -> None:
    layout = layout_pb2.Layout.FromString(tensor_of(watched.run_dir, "custom_scalars__config__").string_val[0])
    titles = [category.title for category in layout.category]
    assert titles == sorted(titles)
    assert [title[0] for title in titles] == ["1", "2", "3", "4"]
    patterns = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    shown = {tag for tag in watched.tags for found in patterns.values() if any(re.match(p, tag) for p in found)}
    assert shown == watched.tags
    unused = {p for found in patterns.values() for p in found if not any(re.match(p, tag) for tag in watched.tags)}
    # Of a CPU the peak is not known; this run learns no temperature.
    assert unused == {"speed/model_flops_utilization$", "train/temperature$"}
    for found in patterns.values():
        assert set(found) - unused, "an empty chart"


@pytest.mark.distributed
def test_curves_are_those_of_the_log_at_images_seen(watched: Watched) -> None:
    events = EventAccumulator(str(watched.run_dir / "tensorboard")).Reload()
    assert watched.tags <= set(events.Tags()["scalars"])
    for tag in watched.tags:
        points = [(line["samples_seen"], line[tag]) for line in watched.lines if tag in line]
        curve = [(e.step, e.value) for e in events.Scalars(tag)]
        assert np.array(curve) == pytest.approx(np.array(points), rel=1e-6)
    assert {"health/similarity_of_positives", "ranks/grad_norm"} <= set(events.Tags()["histograms"])
    assert {"data/augmented_pairs", "eval/nearest_neighbours"} <= set(events.Tags()["images"])


@pytest.mark.distributed
def test_runs_are_compared_by_settings_and_final_accuracies(watched: Watched) -> None:
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        plugin_content(watched.run_dir, "_hparams_/experiment")
    ).experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"eval/knn_top1", "eval/probe_top1", "train/loss"}
    session = plugin_data_pb2.HParamsPluginData.FromString(
        plugin_content(watched.run_dir, "_hparams_/session_start_info")
    ).session_start_info
    assert session.hparams["optim.base_lr"].number_value == 0.001
    assert session.hparams["model.encoder"].string_value == "resnet_small"
    assert session.hparams["train.global_batch_size"].number_value == 64
    assert {"seed", "name"} == {name for name in session.hparams if "." not in name}
    assert not [name for name in session.hparams if name.startswith(("monitor.", "checkpoint.", "timeout."))]
    # The metrics are curves of the same name in the same folder: their last points are the final accuracies.
    last = [line for line in watched.lines if "eval/knn_top1" in line][-1]
    events = EventAccumulator(str(watched.run_dir / "tensorboard")).Reload()
    assert events.Scalars("eval/knn_top1")[-1].value == pytest.approx(last["eval/knn_top1"])
    assert len(list((watched.run_dir / "tensorboard").glob("events.*"))) == 1  # no second run in the list


@pytest.mark.distributed
def test_another_logger_hears_what_the_log_holds(watched: Watched) -> None:
    kinds = [kind for kind, _ in watched.heard]
    assert kinds == ["init", "config", *["log"] * len(watched.lines), "finish"]
    assert watched.heard[0][1]["name"] == "watched"
    assert watched.heard[1][1]["train.global_batch_size"] == 64
    for (_, heard), line in zip(watched.heard[2:-1], watched.lines, strict=True):
        assert heard == {
            "at": line["samples_seen"],
            **{tag: x for tag, x in line.items() if tag == "step" or "/" in tag},
        }


@pytest.mark.distributed
def test_the_projector_of_a_run_has_all_its_images(watched: Watched) -> None:
    config = projector_config_pb2.ProjectorConfig()
    text_format.Parse((watched.run_dir / "tensorboard" / "projector_config.pbtxt").read_text(), config)
    (embedding,) = config.embeddings
    vectors = np.loadtxt(watched.run_dir / "tensorboard" / embedding.tensor_path, delimiter="\t")
    labels = (watched.run_dir / "tensorboard" / embedding.metadata_path).read_text().splitlines()
    assert len(vectors) == len(labels) > 100
    assert len(set(labels)) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Its parts


def monitor(run_dir: Path, samples_seen: int = 0, **settings: Any) -> Monitor:
    return open_monitor(
        run_dir,
        MonitorConfig(terminal="quiet", **settings),
        total_steps=10,
        first_step=samples_seen,
        samples_seen=samples_seen,
        settings_of_run={"optim": {"base_lr": 0.1, "trust": None}},
    )


def test_projector_files_hold_vectors_labels_and_thumbnails(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(5, 3, generator=generator)
    images = torch.randint(0, 256, (5, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = ["cat", "a\tdog", "two\nlines", "", "cat"]
    with monitor(tmp_path) as first:
        first.show(Embedding(h, images, labels, samples_seen=64))
    with monitor(tmp_path, samples_seen=64) as resumed:
        resumed.show(Embedding(h + 1, images, labels, samples_seen=128))

    folder = tmp_path / "tensorboard"
    config = projector_config_pb2.ProjectorConfig()
    text_format.Parse((folder / "projector_config.pbtxt").read_text(), config)
    assert [e.tensor_name for e in config.embeddings] == ["h_0000000128", "h_0000000064"]  # the newest opens first
    newest = config.embeddings[0]
    np.testing.assert_allclose(np.loadtxt(folder / newest.tensor_path, delimiter="\t"), h.numpy() + 1, rtol=1e-4)
    assert (folder / newest.metadata_path).read_text().split("\n") == [
        "cat",
        "a dog",
        "two lines",
        "(no name)",
        "cat",
        "",
    ]
    sprite = np.asarray(Image.open(folder / newest.sprite.image_path))
    assert list(newest.sprite.single_image_dim) == [32, 32]
    assert sprite.shape == (96, 96, 3)  # 5 images in a square of 3 x 3
    for i in range(5):
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(sprite[32 * row : 32 * row + 32, 32 * column : 32 * column + 32], images[i])


class Deaf(tracking.GeneralTracker):
    """A logger that loses its connection after the first figures."""

    name = "wandb"
    requires_logging_directory = False
    starts = True

    def __init__(self, run_name: str, **options: Any) -> None:
        self.heard = 0

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        if not self.starts:
            raise ConnectionError("no key")

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        assert values == {"optim.base_lr": 0.1}

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        self.heard += 1
        if self.heard > 1:
            raise ConnectionError("connection lost")

    def finish(self) -> None:
        raise AssertionError("a tracker that was dropped is left alone")


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> type[Deaf]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Deaf)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    monkeypatch.setattr(Deaf, "starts", True)
    return Deaf


def test_training_outlives_a_logger(tmp_path: Path, deaf: type[Deaf], capsys: pytest.CaptureFixture[str]) -> None:
    with monitor(tmp_path, trackers=("wandb",)) as watching:
        for step in range(4):
            watching.log({"train/loss": 1.0}, step=step, samples_seen=step)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    warnings = capsys.readouterr().err
    assert warnings.count("wandb failed and is left out from now on: connection lost") == 1


def test_a_logger_that_cannot_start_is_a_wrong_configuration(
    tmp_path: Path, deaf: type[Deaf], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deaf, "starts", False)
    with pytest.raises(ConfigError, match=r"wandb does not start: no key"):
        monitor(tmp_path, trackers=("wandb",))
    with pytest.raises(ConfigError, match=r"comet_ml not installed; `pip install comet-ml`"):
        monitor(tmp_path, trackers=("comet_ml",))


def test_a_resumed_run_has_no_point_twice(tmp_path: Path) -> None:
    with monitor(tmp_path) as first:
        for step in range(1, 6):
            first.log({"train/loss": float(step)}, step=step, samples_seen=step)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "sam')  # killed while it wrote
    with monitor(tmp_path, samples_seen=3) as resumed:
        resumed.log({"train/loss": float("nan")}, step=4, samples_seen=4)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, None)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]
