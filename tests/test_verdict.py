"""`simclr-dist verdict`: runs compared without labels; a collapse named while training. pytest tests/test_verdict.py"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_dist import cli
from simclr_dist.config import AugmentConfig, DataConfig
from simclr_dist.data.loading.load_images import fixed_views
from simclr_dist.data.loading.view_loader import build_loader
from simclr_dist.errors import CheckpointError, DataError
from simclr_dist.evaluation.course import Course, course_of, idle_since
from simclr_dist.evaluation.verdict import Figures, _judged, compare
from simclr_dist.health.check import WATCH_PATIENCE
from simclr_dist.parallel.distributed import World
from simclr_dist.run.layout import RunDir
from tests import own_encoder_train
from tests.conftest import REPOSITORY
from tests.training import Training, write_images

assert own_encoder_train  # has registered `flat`
RELEASED = REPOSITORY / "tests" / "golden" / "released_run"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "train.beton")


@pytest.fixture(scope="module")
def flat(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training whose h has one dimension."""
    settings = ("model.encoder=flat", "monitor.health_every_steps=1", "train.epochs=1")
    run = Training(images, tmp_path_factory.mktemp("runs"), "flat", *settings, module="tests.own_encoder_train")
    assert run.wait() == [0]
    return run


def verdict(*arguments: object) -> int:
    args = cli.parser().parse_args(["verdict", *map(str, arguments), "--device", "cpu"])
    return args.run(args)


def test_views_are_those_of_a_training_and_show_the_same_at_any_side(images: Path) -> None:
    """The same crops as the loader of a training draws with this seed in epoch 0, image by image."""
    augment = AugmentConfig(preset="simclr_cifar")
    (batch,) = fixed_views(str(images), 32, augment, num_views=3, seed=5, batch_size=64, ids=np.array([7, 400]))
    data = DataConfig(train=str(images), image_size=32, num_views=3)
    with build_loader(data, augment, seed=5, global_batch_size=512, world=World(), device="cpu") as loader:
        trained = next(iter(loader.batches(0)))
    for at, sample in enumerate((7, 400)):
        row = int((trained.sample_ids == sample).nonzero())
        assert torch.equal(batch.views[:, at], trained.views[:, row])
    (small,) = fixed_views(str(images), 8, augment, num_views=3, seed=5, batch_size=64, ids=np.array([7, 400]))
    means = [views.float().mean((2, 3)) for views in (batch.views, small.views)]
    assert (means[0] - means[1]).abs().max() < 12  # of 255: the same places, resized


def test_figures_of_crafted_views() -> None:
    """A perfect encoder finds every view, one that has collapsed none, and neither depends on the scale of h."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(60, 16, generator=generator)
    perfect = Figures.of(100 * image.repeat(4, 1, 1), None)
    assert (perfect.contrastive_top1, perfect.neighbours_shared, perfect.z_spread) == (1, 1, None)
    assert perfect.alignment == pytest.approx(0, abs=1e-5)
    flat = Figures.of(torch.ones(4, 60, 16), torch.ones(4, 60, 8))
    assert (flat.contrastive_top1, flat.z_spread) == (0, pytest.approx(0, abs=1e-5))
    assert flat.rankme == pytest.approx(1, abs=0.01)


FINE = Figures(0.3, 0.01, 0.2, 0.4, -1.4, 30.0, 35.0, 1.8, 0.9)


@pytest.mark.parametrize(
    ("figures", "before", "course", "state", "words"),
    [
        (
            FINE,
            0.1,
            Course(),
            "learning",
            "share 30.0% of their nearest neighbours, before training 10.0%; h uses 30 of 64",
        ),
        (FINE, 0.1, Course(900, idle_since=400), "learning", "has stopped improving since step 400"),
        (FINE, 0.29, Course(), "not learning", "no better than before"),
        (FINE, 0.5, Course(), "not learning", "worse than before training"),
        (replace(FINE, rankme=2.9), 0.1, Course(), "collapsed", "collapsed: h lies in 2.9 of 64 dimensions"),
        (replace(FINE, z_spread=0.01), 0.1, Course(9, collapsed_since=3), "collapsed", "collapsed, since step 3: z is"),
        (replace(FINE, z_spread=None), 0.1, Course(), "learning", "learning"),
    ],
)
def test_the_sentence_says_what_the_figures_show(
    figures: Figures, before: float, course: Course, state: str, words: str
) -> None:
    found = _judged(figures, before, 0.01, 64, course)
    assert found[0] == state
    assert words in found[1]


def test_a_standstill_is_told_only_where_the_records_show_it() -> None:
    noise = np.random.default_rng(0).normal(size=400) * 0.1
    steps = list(range(1, 401))
    falling = 4 - np.arange(400) / 200
    assert idle_since(steps, list(falling + noise)) is None
    assert idle_since(steps, list(np.maximum(falling, 3.2) + noise)) == pytest.approx(160, abs=40)
    assert idle_since(steps, list(4 + noise)) in (40, None)
    assert idle_since(steps, list(np.where(np.arange(400) < 200, falling, 9) + noise)) == 200  # it diverged
    assert idle_since(steps[:40], list(falling[:40])) is None  # too few to say


def test_a_collapse_in_the_log_is_dated_unless_it_has_passed(tmp_path: Path) -> None:
    def course(*ranks: float) -> Course:
        lines = [{"step": 10 * i, "health/h_rankme": r, "health/z_std_mean": 0.9} for i, r in enumerate(ranks, 1)]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken")
        return course_of(RunDir(tmp_path))

    assert course(9.0, 1.5, 8.0, 1.2, 1.1) == Course(50, collapsed_since=40)
    assert course(9.0, 1.5, 8.0).collapsed_since is None
    assert course_of(RunDir(tmp_path / "none")) == Course()


def test_a_collapse_is_named_while_it_trains_and_by_the_verdict(
    flat: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside it a run of release 0.1, of which nobody has the images any more, and a folder that is no run."""
    assert f"step {WATCH_PATIENCE}: the representation has collapsed: h lies in 1.0 of 32" in flat.output[0]
    elsewhere = flat.run_dir.parent / "nothing"
    elsewhere.mkdir()
    assert verdict(flat.run_dir, elsewhere, RELEASED, "--images", 200, "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["count"] == 200
    released, collapsed, unknown = found["runs"]
    assert (released["name"], released["step"], released["compared_step"]) == (str(RELEASED), 6, 3)
    assert 0 < released["neighbours_kept"] < 1
    assert not released["trained_on_images"]
    assert released["figures"]["neighbours_shared"] > collapsed["figures"]["neighbours_shared"]
    assert (collapsed["state"], collapsed["trained_on_images"]) == ("collapsed", True)
    assert collapsed["sentence"] == "collapsed, since step 1: h lies in 1.0 of 32 dimensions"
    assert unknown["state"] == "not known"
    assert "no checkpoint in it" in unknown["sentence"]


def test_the_table_has_a_sentence_for_each_run(flat: Training, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(flat.run_dir, RELEASED, "--images", 100) == 0
    out = capsys.readouterr().out
    assert f"100 images of {flat.run_dir}" not in out
    assert f"\n{RELEASED}: " in out
    assert f"\n{flat.run_dir}: collapsed, since step 1: h lies in 1.0 of 32 dimensions" in out


def test_what_cannot_be_compared_is_refused_with_a_reason(flat: Training, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        verdict(tmp_path / "none")
    with pytest.raises(DataError, match="where the images are elsewhere, name them with --data"):
        verdict(flat.run_dir, "--data", tmp_path / "gone.beton")
    with pytest.raises(DataError, match="20 images are too few for a verdict"):
        verdict(flat.run_dir, "--images", 20)


def test_runs_are_shown_the_same_views_in_any_company(flat: Training, images: Path) -> None:
    shown = {"data": str(images), "images": 60, "device": torch.device("cpu"), "say": lambda _: None}
    alone = compare([RELEASED], **shown)  # type: ignore[arg-type]
    together = compare([flat.run_dir, RELEASED], batch_size=7, **shown)  # type: ignore[arg-type]
    (other,) = [found for found in together.verdicts if found.name == str(RELEASED)]
    assert alone.verdicts[0].figures is not None
    assert asdict(alone.verdicts[0].figures) == pytest.approx(asdict(other.figures), rel=1e-3)  # type: ignore[arg-type]
