"""Charts (SVG) and images (PNG) as data URIs, in greys and colours that show on white and on black."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from simclr_dist.report.insight import Confusion, Insight
from simclr_dist.report.record import Curve
from simclr_dist.safe_text import printable

GREY = "#858585"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": GREY,
    "figure.facecolor": "none",
    "grid.alpha": 0.3,
    "grid.color": GREY,
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "svg.hashsalt": "report",  # the same run, the same page
    "text.parse_math": False,  # a run may be named a$b$
    "xtick.color": GREY,
    "ytick.color": GREY,
}
LONGEST_LABEL = 40
SPARSE_POINTS = 30  # curves of fewer have a mark at each


def curve_chart(curves: Mapping[str, Curve], label: str) -> str:
    """One line a run, over images seen."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(label)
        for curve in curves.values():
            marker = "o" if len(curve.values) < SPARSE_POINTS else None
            axes.plot(curve.samples_seen, curve.values, marker=marker, markersize=3, linewidth=1.4)
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid()
        if len(curves) > 1:
            # A leading underscore would hide a run from the legend.
            axes.legend(axes.get_lines(), list(map(_label, curves)))
        return _svg(figure)


def similarity_chart(insight: Insight) -> str:
    with mpl.rc_context(STYLE):
        figure, axes = _axes("cosine similarity of z")
        edges = np.linspace(-1, 1, 61).tolist()
        for name, values in (("negatives", insight.negatives), ("positives", insight.positives)):
            axes.hist(values, bins=edges, density=True, alpha=0.6, label=name)
        axes.set_yticks([])
        axes.set_xlim(-1, 1)
        axes.legend(loc="upper left")
        return _svg(figure)


def map_chart(points: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], title: str) -> str:
    """points [n, 2], coloured by class; the legend names up to ten classes."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.add_subplot()
        colours = mpl.colormaps["tab10" if len(class_names) <= 10 else "turbo"]
        for label, name in enumerate(class_names):
            colour = colours(label if len(class_names) <= 10 else label / len(class_names))
            mine = points[labels == label]
            axes.scatter(mine[:, 0], mine[:, 1], s=9, color=[colour], linewidths=0, rasterized=True)
            if len(class_names) <= 10:
                axes.scatter([], [], s=20, color=[colour], label=" " + _label(name))
        rest = points[labels < 0]
        axes.scatter(rest[:, 0], rest[:, 1], s=9, color=GREY, linewidths=0, rasterized=True)
        axes.set(xticks=[], yticks=[], title=title)
        if 0 < len(class_names) <= 10:
            figure.legend(loc="outside lower center", ncols=4, handletextpad=0, columnspacing=1, fontsize=9)
        return _svg(figure)


def confusion_chart(confusion: Confusion) -> str:
    """Share of each true class (row) by predicted class (column)."""
    C = len(confusion.class_names)
    share = confusion.counts / np.maximum(confusion.counts.sum(axis=1, keepdims=True), 1)
    with mpl.rc_context({**STYLE, "axes.spines.right": True, "axes.spines.top": True}):
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(share, cmap="viridis", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="true")
        if C <= 20:
            ticks, names = list(range(C)), list(map(_label, confusion.class_names))
            axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(ticks, names)
            for (row, column), value in np.ndenumerate(share):
                colour = "white" if value < 0.6 else "black"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        return _svg(figure)


def pair_image(views: Tensor) -> str:
    """views: float [2, n, 3, H, W], normalised; a column a pair."""
    low, high = views.amin(), views.amax()
    grid = make_grid((views.flatten(0, 1) - low) / (high - low).clamp_min(1e-6), nrow=views.shape[1], padding=1)
    return _png(grid.mul(255).round().to(torch.uint8).permute(1, 2, 0))


def row_image(images: Tensor) -> str:
    """uint8 [n, S, S, 3] in a row, the first set apart."""
    S = images.shape[1]
    gap, line = torch.full((S, 4, 3), 128, dtype=torch.uint8), torch.full((S, 1, 3), 128, dtype=torch.uint8)
    parts = [images[0], gap]
    for image in images[1:]:
        parts += [image, line]
    return _png(torch.cat(parts[:-1], dim=1))


def _label(name: str) -> str:
    return printable(name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…")


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    return figure, axes


def _svg(figure: Figure) -> str:
    out = io.BytesIO()
    with warnings.catch_warnings():
        # A name may be in any script, and many runs or classes may leave no room for the axes.
        warnings.filterwarnings("ignore", message="Glyph .* missing|constrained_layout not applied")
        figure.savefig(out, format="svg", dpi=150, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _png(pixels: Tensor) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
