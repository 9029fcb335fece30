"""The pictures of docs/how_it_works.md, drawn by the code that they are about: python -m docs.site.pictures"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from simclr_dist.data.order import Order
from simclr_dist.loss.enumeration import enumerate_tiles

FOLDER = Path(__file__).parents[1] / "pictures"
RANKS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1")  # told apart by the colour-blind too
INK, PAPER, GREY = "#1f2328", "#ffffff", "#8b949e"


class Drawing:
    """An SVG, on white so that it reads on dark pages too. Sizes in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="sans-serif" font-size="13"><title>{escape(title)}</title>',
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, fill: str, *, opacity: float = 1, edge: str = PAPER) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" fill-opacity="{opacity:g}" '
            f'stroke="{edge}"/>'
        )

    def text(self, x: float, y: float, text: str, *, fill: str = INK, anchor: str = "start", size: int = 13) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
        )

    def line(self, x0: float, y0: float, x1: float, y1: float, *, dashed: bool = False, colour: str = INK) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{colour}" stroke-width="2"{dash}/>'
        )

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def order() -> str:
    """18 images, G = 8, over 1, 2 and 4 processes."""
    drawing = Drawing(720, 222, "The order of an epoch, shared out to 1, 2 and 4 processes")
    the_order, G, cell = Order(18, 8, seed=0), 8, 30
    for row, W in enumerate((1, 2, 4)):
        y = 40 + 56 * row
        drawing.text(10, y + 20, f"{W} process{'es' if W > 1 else ''}")
        for step in range(the_order.steps_per_epoch):
            for rank in range(W):
                for i, sample in enumerate(the_order.sample_ids(0, step, rank, W)):
                    x = 110 + cell * (step * G + rank * G // W + i) + 12 * step
                    drawing.box(x, y, cell - 2, cell, RANKS[rank])
                    drawing.text(x + cell / 2 - 1, y + 20, str(sample), fill=PAPER, anchor="middle")
        left = the_order.permutation(0)[the_order.steps_per_epoch * G :]
        for i, sample in enumerate(left):
            x = 110 + cell * (the_order.steps_per_epoch * G + i) + 24
            drawing.box(x, y, cell - 2, cell, PAPER, edge=GREY)
            drawing.text(x + cell / 2 - 1, y + 20, str(sample), fill=GREY, anchor="middle")
    for step, name in enumerate(("step 0", "step 1")):
        drawing.text(110 + cell * G * (step + 0.5) + 12 * step, 26, name, anchor="middle")
    drawing.text(110 + cell * 17 + 24, 26, "left out", fill=GREY, anchor="middle")
    for rank, colour in enumerate(RANKS):
        drawing.box(110 + 110 * rank, 198, 14, 14, colour)
        drawing.text(130 + 110 * rank, 210, f"rank {rank}")
    return drawing.svg()


def tiles() -> str:
    """Who sums which tile of the similarities of 4 ranks, 4 rows each, in tiles of 2."""
    W, n, size, cell = 4, 4, 2, 18
    drawing = Drawing(720, 348, "The tiles of the matrix of similarities, coloured by the rank that computes them")
    x0, y0 = 90, 40
    for rank in range(W):
        drawing.text(x0 + cell * n * (rank + 0.5), y0 - 10, f"rank {rank}", anchor="middle")
        drawing.text(x0 - 10, y0 + cell * n * (rank + 0.5) + 4, f"rank {rank}", anchor="end")
        there = enumerate_tiles("within", rank, W, n, size)
        own = [(i, slice(rank * n + j.start, rank * n + j.stop)) for i, j in there.own()]
        for rows, columns in [*own, *there.shared()]:
            y, height = rank * n + rows.start, rows.stop - rows.start
            x, width = columns.start, columns.stop - columns.start
            drawing.box(x0 + cell * x, y0 + cell * y, cell * width, cell * height, RANKS[rank])
            if x != y:  # the same numbers serve the other side of the diagonal
                drawing.box(x0 + cell * y, y0 + cell * x, cell * height, cell * width, RANKS[rank], opacity=0.25)
    drawing.line(x0, y0, x0 + cell * n * W, y0 + cell * n * W, dashed=True)
    lines = (
        "16 rows of z, 4 of each of 4 ranks,",
        "compared with one another.",
        "",
        "Strong: the rank of this colour computes",
        "the tile, 2 x 2 similarities here.",
        "Pale: its mirror image. The same numbers,",
        "summed along the other side, not computed.",
        "",
        "Every rank has the same number of tiles.",
    )
    for i, line in enumerate(lines):
        drawing.text(x0 + cell * n * W + 28, y0 + 40 + 22 * i, line)
    return drawing.svg()


def lineage() -> str:
    """A run that was killed and resumed; then taken back to an earlier step and trained on with other settings."""
    drawing = Drawing(720, 236, "The checkpoints of a run: one line, and what was set aside beside it")
    at = {step: 145 + 0.95 * step for step in (0, 100, 200, 300, 400)}

    def line(y: float, steps: tuple[int, ...], colour: str, *, aside: bool = False) -> None:
        drawing.line(at[steps[0]], y, at[steps[-1]], y, colour=colour, dashed=aside)
        for step in steps:
            drawing.box(at[step] - 8, y - 8, 16, 16, PAPER if aside else colour, edge=colour)

    drawing.text(10, 64, "killed, resumed")
    line(60, (0, 100, 200, 300, 400), RANKS[0])
    for step, x in at.items():
        drawing.text(x, 40, f"step {step}", anchor="middle", size=12)
    drawing.text(at[200] + 68, 90, "✕ killed here", anchor="middle")
    drawing.text(at[400] + 20, 64, "goes on from 200:")
    drawing.text(at[400] + 20, 84, "no byte differs")
    drawing.text(10, 154, "taken back to 200")
    line(150, (0, 100, 200), RANKS[0])
    drawing.line(at[200], 150, at[300], 190, colour=GREY, dashed=True)
    line(190, (300, 400), GREY, aside=True)
    line(150, (200, 300), RANKS[1])
    drawing.box(at[200] - 8, 142, 16, 16, RANKS[0])
    drawing.text(at[300] + 20, 154, "other settings, from 200 on")
    drawing.text(at[400] + 20, 194, "set aside, not deleted")
    drawing.text(10, 222, "simclr-dist runs rewind RUN 200", fill=GREY)
    return drawing.svg()


PICTURES: dict[str, Callable[[], str]] = {"order.svg": order, "tiles.svg": tiles, "lineage.svg": lineage}


def stale() -> Iterator[str]:
    """Names of pictures that are not as the code draws them now."""
    for name, draw in PICTURES.items():
        file = FOLDER / name
        if not file.is_file() or file.read_text(encoding="utf-8") != draw():
            yield name


def check() -> None:
    if names := list(stale()):
        sys.exit(f"docs/pictures: {', '.join(names)} not as the code draws them; run python -m docs.site.pictures")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
