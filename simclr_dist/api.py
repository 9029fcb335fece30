"""SimCLR from Python: in a notebook, a script, a thread of another program.

    import simclr_dist

    run = simclr_dist.pretrain("configs/cifar10_demo.yaml", train={"epochs": 5})
    print(run.state, run.step, run.evaluate("knn").top1)

Errors are raised, UserError for whatever the caller can put right, and the process goes on. The commands do the same
work in processes of their own: `simclr_dist.train`, `simclr-dist evaluate`, …
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simclr_dist.config import Config, load_config
from simclr_dist.errors import ConfigError, FailedElsewhereError, UserError
from simclr_dist.run.layout import RunDir
from simclr_dist.run.owner import abandon
from simclr_dist.run.results import require_writable
from simclr_dist.run.status import read_status
from simclr_dist.run.watchdog import ENDS_PROCESS
from simclr_dist.safe_text import message
from simclr_dist.training.main import record_failure

if TYPE_CHECKING:
    import torch

    from simclr_dist.evaluation.embeddings_file import Embeddings
    from simclr_dist.evaluation.offline import Score
    from simclr_dist.export.export import Exported, Format
    from simclr_dist.training.trainer import Trainer

_one_training = threading.Lock()


def pretrain(
    config: str | Path | Mapping[str, Any] | Config, *, trainer_class: type[Trainer] | None = None, **overrides: Any
) -> Run:
    """Trains to the end, or until asked to stop (see `Run.state`); a run that exists is continued.

    config: a YAML file, or the same settings as a dictionary of sections. overrides: settings to change, by section
        (train={"epochs": 5}) or by name (**{"train.epochs": 5}).
    trainer_class: one's own subclass of Trainer.
    Raises UserError: ConfigError, DataError, CheckpointError, OwnershipError, NonFiniteAbortError; and whatever one's
    own code raises. The run can be continued by another call then, unless it is one of several processes that failed.
    Under `accelerate launch` all processes call it together.
    """
    if isinstance(config, Config):
        config = config.model_dump(mode="json")
    loaded = load_config(config, overrides, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    with _training_in_this_process(loaded.name), _recorded(loaded) as progress:
        from simclr_dist.parallel.distributed import barrier
        from simclr_dist.training.trainer import Trainer

        progress.trainer = (trainer_class or Trainer)(loaded)
        progress.trainer.fit()
        barrier()  # the main process has written the state that every process reads
    return Run(loaded.run_dir)


@contextmanager
def _training_in_this_process(name: str) -> Iterator[None]:
    """Leaves torch and accelerate as they were. Raises ConfigError while another thread trains."""
    if not _one_training.acquire(blocking=False):
        raise ConfigError([f"name: {name}: another training runs in this process; wait for it, or use another process"])
    try:
        import torch

        from simclr_dist.parallel import distributed
        from simclr_dist.parallel.accelerator import state_of_one_training

        # Only where a hang cannot be the wait for another rank may the process live on.
        ends_process = ENDS_PROCESS.set(distributed.world().size > 1)
        try:
            with state_of_one_training(), torch.random.fork_rng(devices=[]):
                yield
        finally:
            ENDS_PROCESS.reset(ends_process)
    finally:
        _one_training.release()


@dataclass
class _Progress:
    trainer: Trainer | None = None


@contextmanager
def _recorded(config: Config) -> Iterator[_Progress]:
    """A failure is written into status.json, and the run belongs to nobody afterwards."""
    progress = _Progress()
    try:
        yield progress
    except FailedElsewhereError:
        raise
    except UserError as error:
        record_failure(config, progress.trainer, error.reason, str(error))
        raise
    except BaseException as error:
        record_failure(config, progress.trainer, "crash", "".join(traceback.format_exception(error)))
        raise
    finally:
        abandon(config.run_dir)


@dataclass(frozen=True)
class Evaluation:
    """Shares of the test images, between 0 and 1, for the trained encoder; baselines: by name, if they were asked for.

    record: the settings, as they were added to the run's evaluations.jsonl.
    """

    top1: float
    top5: float
    baselines: dict[str, Score]
    record: dict[str, Any]


class Run:
    """A run's folder, whoever has trained it. Its methods use the newest valid checkpoint and may raise UserError."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConfigError([f"{self.path}: there is no such run"])

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.state}, step {self.step})"

    @property
    def state(self) -> str:
        """finished; stopped or preempted, then another call continues it; failed, running, or unknown."""
        status = read_status(self.path)
        return "unknown" if status is None else status.state

    @property
    def step(self) -> int:
        status = read_status(self.path)
        return 0 if status is None else status.step

    def encoder(self) -> torch.nn.Module:
        """The trained encoder on the CPU, in eval mode: normalised images [n, 3, S, S] to h [n, D]."""
        from simclr_dist.checkpoint.pretrained import load_pretrained

        return load_pretrained(self.path, _say)[0].encoder

    def evaluate(
        self, method: Literal["knn", "linear"] = "knn", *, device: str | None = None, **options: Any
    ) -> Evaluation:
        """As `simclr-dist evaluate` does it; options: those of `simclr_dist.evaluation.offline.evaluate`.

        With several processes all of them call it together.
        """
        from simclr_dist.evaluation.offline import evaluate
        from simclr_dist.parallel.accelerator import choose_device

        scores, record = evaluate(self.path, method=method, device=choose_device(device), say=_say, **options)
        *baselines, trained = scores
        return Evaluation(trained.top1, trained.top5, {score.name: score for score in baselines}, record)

    def embed(
        self, images: str | Path, out: str | Path | None = None, *, device: str | None = None, **options: Any
    ) -> Embeddings:
        """h of all images of a folder, an archive or a .beton file; out: an .npz or .parquet file to keep it in."""
        from simclr_dist.evaluation.embed import embed
        from simclr_dist.evaluation.embeddings_file import check_format, save_embeddings
        from simclr_dist.parallel.accelerator import choose_device

        if out is not None:
            check_format(Path(out))
            require_writable(Path(out).parent, "choose another out")
        found = embed(self.path, str(images), device=choose_device(device), **options)
        if out is not None:
            save_embeddings(Path(out), found)
        return found

    def export(
        self,
        out: str | Path | None = None,
        *,
        format: Format = "torchvision",
        license: str = "unspecified",
        image_size: int | None = None,
        crop_share: float | None = None,
        overwrite: bool = False,
        push_to_hub: str | None = None,
        public: bool = False,
    ) -> Exported:
        """The encoder as others can load it, and a model card; out: by default in RUN/export.

        Options: those of `simclr_dist.export.export.export`; crop_share None: what fits the training images.
        """
        from simclr_dist.checkpoint.lineage import find_checkpoint
        from simclr_dist.evaluation.offline import crop_share_of, known_accuracy
        from simclr_dist.export.export import NAMES, export

        checkpoint = find_checkpoint(self.path, _say)
        return export(
            checkpoint,
            out or RunDir(self.path).export / NAMES[format],
            format=format,
            license=license,
            accuracy=known_accuracy(checkpoint, _say),
            image_size=image_size,
            crop_share=crop_share or crop_share_of(checkpoint, image_size, _say),
            overwrite=overwrite,
            push_to_hub=push_to_hub,
            public=public,
        )

    def report(self, *others: Run, out: str | Path | None = None, device: str | None = None, **options: Any) -> Path:
        """One HTML page about this run and others beside it; options: those of report/write.py."""
        from simclr_dist.parallel.accelerator import choose_device
        from simclr_dist.report import check_requirements

        check_requirements()
        from simclr_dist.report.write import write_report

        page = Path(out or self.path / "report.html")
        runs = [self.path, *(run.path for run in others)]
        write_report(runs, page, device=choose_device(device), say=_say, **options)
        return page


def _say(text: str) -> None:
    print(message(text), file=sys.stderr, flush=True)
