"""Embeddings in a file, and nearest neighbours in it. pytest tests/test_embed.py"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr_dist.cli import main
from simclr_dist.errors import CheckpointError, DataError
from simclr_dist.evaluation.embed import embed, neighbours_of, query_embedding
from simclr_dist.evaluation.embeddings_file import Embeddings, load_embeddings, save_embeddings
from tests.conftest import REPOSITORY
from tests.doc_commands import blocks
from tests.test_evaluate import save_images
from tests.test_export import save_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path, encoder="resnet_small", image_size=16)[0]


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_embeddings_come_back_with_names_and_classes(run: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("pyarrow" if ending == "parquet" else "numpy")
    folder = save_images(tmp_path / "images", 3, seed=0)
    embeddings = embed(run, str(folder), device="cpu", precision="fp32")
    save_embeddings(tmp_path / f"out.{ending}", embeddings)
    found = load_embeddings(tmp_path / f"out.{ending}")
    for name, value in vars(embeddings).items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert found.h.shape == (9, 32)
    assert found.class_names == ("blue", "green", "red")
    assert [found.class_names[label] for label in found.labels] == [Path(name).parent.name for name in found.names]


def test_the_guides_lines_for_scikit_learn_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_images(tmp_path / "images", 3, seed=0)
    save_embeddings(tmp_path / "embeddings.npz", embed(run, str(folder), device="cpu", precision="fp32"))
    guide = REPOSITORY / "docs" / "guides" / "evaluating_and_exporting.md"
    (lines,) = [text for language, text in blocks(guide) if language == "python" and "sklearn" in text]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(lines, str(guide), "exec"), names)
    assert names["classifier"].score(names["found"]["h"], names["found"]["labels"]) == 1  # three colours


def test_a_flat_folder_of_any_sizes_needs_no_labels(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i, size in enumerate([(40, 60, 3), (16, 16, 3), (200, 30, 3)]):
        Image.fromarray(generator.integers(0, 255, size).astype(np.uint8)).save(folder / f"{i}.jpg")
    embeddings = embed(run, str(folder), device="cpu")
    assert embeddings.labels.tolist() == [-1, -1, -1]
    assert neighbours_of(embeddings, embeddings.h[1], 2)[0].class_name is None


def test_neighbours_equal_a_loop_over_cosines() -> None:
    generator = np.random.default_rng(0)
    h = generator.normal(size=(30, 8)).astype(np.float32)
    names = tuple(f"{i}.jpg" for i in range(30))
    embeddings = Embeddings(h, np.arange(30) % 2, names, ("even", "odd"), "", "", "", "")
    cosines = [float(h[4] @ row / np.linalg.norm(h[4]) / np.linalg.norm(row)) for row in h]
    expected = sorted(range(30), key=lambda i: -cosines[i])[:5]
    found = neighbours_of(embeddings, h[4], 5)
    assert [neighbour.name for neighbour in found] == [f"{i}.jpg" for i in expected]
    assert found[0].name == "4.jpg"
    assert [neighbour.similarity for neighbour in found] == pytest.approx([cosines[i] for i in expected], abs=1e-5)
    assert [neighbour.class_name for neighbour in found] == [("even", "odd")[i % 2] for i in expected]
    assert len(neighbours_of(embeddings, h[4], 100)) == 30


def test_a_picture_file_finds_itself(run: Path, tmp_path: Path) -> None:
    folder = save_images(tmp_path / "images", 3, seed=0)
    embeddings = embed(run, str(folder), device="cpu", precision="fp32")
    copy = tmp_path / "copy.png"
    shutil.copy(folder / "green" / "001.png", copy)
    found = neighbours_of(embeddings, query_embedding(embeddings, str(copy)), 1)[0]
    assert found.name.endswith("green/001.png")
    assert found.similarity == pytest.approx(1.0, abs=1e-5)
    by_name = neighbours_of(embeddings, query_embedding(embeddings, embeddings.names[2]), 1)[0]
    assert by_name.name == embeddings.names[2]


def test_large_pictures_are_cropped_as_in_the_embedding(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(4):
        pixels = generator.integers(0, 255, (50 + i, 70, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    embeddings = embed(run, str(folder), device="cpu", precision="fp32")
    copy = tmp_path / "copy.png"
    shutil.copy(folder / "2.png", copy)
    np.testing.assert_allclose(query_embedding(embeddings, str(copy)), embeddings.h[2], rtol=1e-3, atol=1e-4)


def test_bad_input_is_named(run: Path, tmp_path: Path) -> None:
    folder = save_images(tmp_path / "images", 2, seed=0)
    embeddings = embed(run, str(folder), device="cpu")
    with pytest.raises(DataError, match=r"nothing.jpg: neither the name of what was embedded nor a readable image"):
        query_embedding(embeddings, "nothing.jpg")
    for name in ("bad.npz", "bad.parquet"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not really")
        with pytest.raises(DataError, match="is no file of `simclr-dist embed`"):
            load_embeddings(tmp_path / name)
    other, _ = save_run(tmp_path / "other", encoder="resnet_small", image_size=16)
    image = shutil.copy(folder / "red" / "000.png", tmp_path / "copy.png")
    moved = Embeddings(**{**vars(embeddings), "encoder_digest": "another"})
    with pytest.raises(CheckpointError, match="not the one that made these embeddings"):
        query_embedding(moved, str(image), checkpoint=other)


def test_a_file_that_could_not_be_written_is_refused_before_anything_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for out, said in (("x.parquet", "pip install 'simclr-dist[eval]'"), ("x.csv", "embeddings are .npz or .parquet")):
        with pytest.raises(SystemExit) as caught:
            main(["embed", str(tmp_path / "no_run"), str(tmp_path / "no_images"), out])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


def test_other_programs_read_the_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    h = np.arange(6, dtype=np.float32).reshape(3, 2)
    names = ("a.jpg", "b.jpg", "c.jpg")
    save_embeddings(tmp_path / "x.parquet", Embeddings(h, np.array([0, -1, 0]), names, ("cat",), "", "", "", ""))
    assert parquet.read_table(tmp_path / "x.parquet").to_pydict() == {
        "name": list(names),
        "label": [0, -1, 0],
        "h": h.tolist(),
    }
