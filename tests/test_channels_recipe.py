"""The recipe of docs/guides/many_channels.md, command by command, on a folder as a microscope leaves it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from simclr_dist import cli
from tests.conftest import REPOSITORY
from tests.doc_commands import blocks, commands
from tests.tiff_files import tiff_bytes

PAGE = REPOSITORY / "docs" / "guides" / "many_channels.md"
SMALL = """_base_: of_the_page.yaml
data: {image_size: 16}
model: {encoder: resnet_small, width: 8}
optim: {warmup_epochs: 0}
train: {global_batch_size: 16, epochs: 2}
evaluation: {knn_every_epochs: 1, knn_k: 5}
monitor: {projector_every_epochs: 2}
"""


def write_cells(folder: Path, count: int, seed: int) -> None:
    """Two pages of 16 bits, of which 12 are used. Infected cells are bright in the second channel."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        name = ("healthy", "infected")[i % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pages = generator.integers(100, 1500, (2, 20, 24, 1), dtype=np.uint16)
        pages[1, 5:15, 5:15] += 2000 * (i % 2)
        (folder / name / f"{i:04}.tif").write_bytes(tiff_bytes(*pages))


@pytest.mark.slow
def test_every_command_runs_and_says_what_it_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Training starts processes of its own, and each command is the user's: a minute where nothing else runs."""
    monkeypatch.chdir(tmp_path)
    write_cells(Path("cells/train"), 48, 0)
    write_cells(Path("cells/test"), 16, 1)
    shown = [text for language, text in blocks(PAGE) if language == "yaml"]
    Path("of_the_page.yaml").write_text(shown[0])
    Path("cells.yaml").write_text(SMALL)
    recipe = next(text for language, text in blocks(PAGE) if language == "sh")
    said: dict[str, str] = {}
    for words in commands(recipe):
        assert words[0] == "simclr-dist"
        with pytest.raises(SystemExit) as end:
            cli.main(words[1:])
        out, err = capfd.readouterr()
        assert not end.value.code, (words, out, err)
        said[" ".join(words[1:3])] = out + err
    assert "2 channels of 16 bits, as they were" in said["prepare cells/test"]
    assert re.search(r"pixels +2 channels of 16 bits", said["inspect train.beton"])
    start = said["train cells.yaml"]
    assert re.search(r"pixels +2 channels of 16 bits, normalised by mean 0\.0\d+ 0\.0\d+ and std", start)
    assert "left out, because these are not RGB: saturation, hue, grayscale" in start
    assert re.search(r"pictures +channels 1 and 2 as red and green", start)
    records = [json.loads(line) for line in Path("runs/cells/evaluations.jsonl").read_text().splitlines()]
    (linear,) = (record for record in records if record["method"] == "linear")
    assert linear["top1"] > 0.8
    assert linear["pixels"]["channels"] == 2
    card = Path("runs/cells/export/encoder.onnx.md").read_text()
    assert "| Input | 2 channels of 16 bits, 16 px" in card
    check_card(card, monkeypatch)


def check_card(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines load the graph, and give the h that `embed` gave."""
    pytest.importorskip("onnxruntime")
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir("runs/cells/export")
    names: dict[str, object] = {}
    exec("\n".join(code[:2]), names)
    features = names["features"]
    image = np.random.default_rng(0).integers(0, 4096, (20, 24, 2), dtype=np.uint16)
    h = features([image, image[::-1]])  # type: ignore[operator]
    assert h.shape == (2, 32)
    assert np.isfinite(h).all()
