"""TensorBoard: curves, histograms, images or texts, and a page that opens in order."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

from simclr_dist.config import flatten
from simclr_dist.health.figures import Histogram
from simclr_dist.monitor.events import Embedding, Event, Figures, Finished, Histograms, Neighbours, Pairs, Sink
from simclr_dist.monitor.projector import write_projector
from simclr_dist.safe_text import markdown_cell, shortened

NO_HPARAMS = ("resume", "runs_dir", "evaluation", "checkpoint", "monitor", "timeout")  # they change no result


def layout(noun: str) -> dict[str, dict[str, list[Any]]]:
    """The tab "Custom Scalars", top to bottom in the order in which one asks. Tags are regular expressions."""
    return {
        "1 Does it learn?": {
            "loss": ["Multiline", ["train/loss$"]],
            "accuracy of kNN and probe": ["Multiline", ["eval/.*top1$", "train/probe_top[15]$"]],
            "the positive is nearest, among the nearest 5": ["Multiline", ["health/contrastive_top[15]$"]],
            "learning rate, learnt temperature": ["Multiline", ["train/lr$", "train/temperature$"]],
        },
        "2 Is what it learns healthy?": {
            "rank of h and z (RankMe)": ["Multiline", ["health/[hz]_rankme$"]],
            "spread over dimensions (0: collapsed)": ["Multiline", ["health/[hz]_std_(mean|min)$"]],
            "similarity of positives and negatives": ["Multiline", ["health/similarity_.*$"]],
            "alignment and uniformity": ["Multiline", ["health/(alignment|uniformity)$"]],
        },
        "3 Are the updates sound?": {
            "gradient norm": ["Multiline", ["train/grad_norm$", "ranks/grad_norm_.*$"]],
            "disagreement of ranks": ["Multiline", ["ranks/grad_disagreement$"]],
            "BatchNorm: batch against running": ["Multiline", ["health/batch_norm_.*$"]],
            "masked duplicates": ["Multiline", ["health/masked_duplicates$"]],
        },
        "4 Is it fast?": {
            f"{noun}s/s": ["Multiline", ["speed/images_per_s.*$"]],
            "model TFLOP/s a device": ["Multiline", ["speed/model_tflops_per_device$"]],
            "share of peak FLOP/s, of time waiting for data": [
                "Multiline",
                ["speed/model_flops_utilization$", "speed/data_wait_share$", "ranks/data_wait_share_max$"],
            ],
            "peak memory, GiB": ["Multiline", ["speed/memory_peak_gib$", "ranks/memory_peak_gib_max$"]],
            "seconds of a checkpoint, of waiting for it, of a health check": [
                "Multiline",
                ["speed/(checkpoint|checkpoint_wait|health_check)_s$"],
            ],
        },
    }


def _cell(text: str) -> str:
    return markdown_cell(shortened(text)).replace("_", "&#95;") or " "


class TensorBoard(Sink):
    """Event files in `folder`. Points after `samples_seen` that an earlier attempt wrote are hidden."""

    name = "TensorBoard"

    def __init__(self, folder: Path, samples_seen: int, noun: str = "image") -> None:
        """noun: what a sample is called."""
        self._folder = folder
        # Its thread's failure is raised at the next write; a traceback in between would only frighten.
        self._excepthook, threading.excepthook = threading.excepthook, self._on_thread_failure
        self._writer = SummaryWriter(str(folder), purge_step=samples_seen + 1)
        self._writer.add_custom_scalars(layout(noun))

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def show(self, event: Event) -> None:
        match event:
            case Figures(values, _, samples_seen):
                for tag, value in values.items():
                    self._writer.add_scalar(tag, value, samples_seen)
            case Histograms(histograms, samples_seen):
                for tag, histogram in histograms.items():
                    self._add_histogram(tag, histogram, samples_seen)
            case Pairs(views, samples_seen):
                self._add_pairs(views, samples_seen)
            case Neighbours(rows, samples_seen):
                self._add_neighbours(rows, samples_seen)
            case Embedding(h, shown, labels, samples_seen):
                write_projector(self._folder, f"h_{samples_seen:010d}", h, shown, labels)
            case Finished(settings, figures):
                self._add_hparams(settings, figures)

    def _on_thread_failure(self, failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.thread, _AsyncWriterThread):
            self._excepthook(failure)

    def _add_histogram(self, tag: str, histogram: Histogram, samples_seen: int) -> None:
        self._writer.add_histogram_raw(
            tag,
            min=histogram.low,
            max=histogram.high,
            num=sum(histogram.counts),
            sum=histogram.total,
            sum_squares=histogram.total_of_squares,
            bucket_limits=histogram.upper_edges,
            bucket_counts=histogram.counts,
            global_step=samples_seen,
        )

    def _add_neighbours(self, rows: Tensor | Sequence[Sequence[str]], samples_seen: int) -> None:
        tag = "eval/nearest_neighbours"
        if not isinstance(rows, Tensor):
            self._add_texts(tag, ["query", "nearest"], rows, samples_seen)
            return
        images = rows.flatten(0, 1).permute(0, 3, 1, 2)  # a line of the grid for each query
        grid = make_grid(images, nrow=rows.shape[1], padding=2, pad_value=255)
        self._writer.add_image(tag, grid, samples_seen)

    def _add_pairs(self, views: Tensor | Sequence[Sequence[str]], samples_seen: int) -> None:
        if not isinstance(views, Tensor):
            samples = list(zip(*views, strict=True))
            self._add_texts("data/augmented_pairs", ["view 0", "view 1"], samples, samples_seen)
            return
        pairs, columns = views.transpose(0, 1).flatten(0, 1).float(), max(8 // len(views), 1) * len(views)
        low, high = pairs.amin(), pairs.amax()
        grid = make_grid((pairs - low) / (high - low).clamp_min(1e-6), nrow=columns, padding=1, pad_value=1.0)
        self._writer.add_image("data/augmented_pairs", grid, samples_seen)

    def _add_texts(self, tag: str, head: list[str], rows: Sequence[Sequence[str]], samples_seen: int) -> None:
        """A table: TensorBoard reads Markdown, and texts are data."""
        head = [*head, *[""] * (max(map(len, rows), default=0) - len(head))]
        lines = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
        self._writer.add_text(tag, "\n".join(f"| {' | '.join(line)} |" for line in lines), samples_seen)

    def _add_hparams(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """A row in the tab HParams: nested settings, flat, and the run's last figures."""
        shown = flatten({key: value for key, value in settings.items() if key not in NO_HPARAMS})
        flat = {key: value for key, value in shown.items() if isinstance(value, (bool, int, float, str))}
        for summary in hparams(flat, dict(figures)):
            # add_hparams would write into a folder of its own, and the run would be listed twice.
            self._writer._get_file_writer().add_summary(summary)
