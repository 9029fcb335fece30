"""Pairs of texts, and images with texts: joined rightly, never negatives where they are equal, trained exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from simclr_dist.checkpoint.pretrained import load_pretrained
from simclr_dist.cli import main
from simclr_dist.config import AugmentConfig, DataConfig
from simclr_dist.data.beton.reader import open_beton
from simclr_dist.data.pairs.folder import OFFSETS, joined, open_image_text, open_text_pairs
from simclr_dist.data.pairs.prepare import prepare_image_text, prepare_text_pairs
from simclr_dist.data.tokens.texts import Columns
from simclr_dist.data.tokens.tokenizer import load_tokenizer
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.evaluation.comparisons import evaluate_retrieval, evaluate_similarity, evaluate_zero_shot
from simclr_dist.kinds import kind_of
from simclr_dist.loss import NTXentLoss
from simclr_dist.parallel.distributed import World
from tests.pair_files import COLOURS, image_text, text_pairs, write_rows
from tests.training import Training

NAMED = Columns(("name", "text"))
SETTINGS = {"size": 16, "text": {"max_tokens": 16}}


def section(kind: str, folder: Path, **tokens: Any) -> DataConfig:
    size = {"image_size": 16} if kind == "image_text" else {}
    values = {"kind": kind, "train": str(folder), "tokens": {"max_tokens": 32, **tokens}, "num_threads": 1, **size}
    return DataConfig.model_validate(values)


def batches(data: DataConfig, steps: int, world: World | None = None, first: int = 0) -> list[Any]:
    loader = kind_of(data).loader(AugmentConfig(), seed=1, global_batch_size=16, world=world or World(), device="cpu")
    with loader:
        found = loader.batches(first)
        return [next(found) for _ in range(steps)]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_groups_are_those_of_following_every_link() -> None:
    generator = np.random.default_rng(0)
    for n, contents in ((1, 1), (30, 20), (200, 150), (300, 700)):
        samples = np.concatenate([np.arange(n), generator.integers(0, n, n)])
        held = generator.integers(0, contents, 2 * n)
        links: dict[int, set[int]] = {}
        for sample, content in zip(samples.tolist(), held.tolist(), strict=True):
            links.setdefault(content, set()).add(sample)
        want = np.full(n, -1)
        for start in range(n):
            if want[start] < 0:
                waiting = [start]
                while waiting:
                    sample = waiting.pop()
                    if want[sample] < 0:
                        want[sample] = start
                        waiting += [x for held_by in links.values() if sample in held_by for x in held_by]
        assert joined(samples, held).tolist() == want.tolist()
    chain = np.arange(1000)  # each shares a content with the next
    assert not joined(np.repeat(chain, 2), np.stack([chain, chain + 1], axis=1).ravel()).any()


def test_each_image_has_its_own_texts_and_equal_contents_one_group(tmp_path: Path) -> None:
    pairs = open_image_text(image_text(tmp_path))
    tokenizer = load_tokenizer(pairs.texts.path)
    read = [tokenizer.decode(pairs.texts.sample(i).tolist()).strip() for i in range(len(pairs.texts))]
    with open_beton(pairs.images) as beton:
        labels, names = beton.labels, beton.class_names
    assert len(pairs) == len(labels) == 96
    for i in range(96):
        own = read[pairs.offsets[i] : pairs.offsets[i + 1]]
        assert own
        assert all(names[labels[i]] in text or text == "the very same text" for text in own)
    groups = pairs.groups(pairs.texts.content_ids)
    number = {text.split(" ")[1]: i for i, text in zip(pairs.image_of_text, read, strict=True) if "picture" in text}
    assert len(number) == 96
    assert groups[number["1"]] == groups[number["2"]]  # the same picture
    assert groups[number["3"]] == groups[number["4"]]  # the same text
    assert len(np.unique(groups)) == 94


def test_what_does_not_fit_is_one_clear_error_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_text(tmp_path, 8)
    images, out = tmp_path / "images", tmp_path / "out"

    def refuses(message: str, *rows: tuple[str, ...], columns: Columns = NAMED, images: Path = images) -> None:
        table = write_rows(tmp_path / "bad.csv", *rows)
        with pytest.raises(DataError, match=message):
            prepare_image_text(table, out, images=images, columns=columns, vocabulary_size=300, num_workers=1)
        assert not out.exists()

    header = "name", "text"
    refuses("2 of 3 names are not in", header, ("red/0.png", "x"), ("red/nope.png", "y"), ("z.png", "z"))
    refuses("has no column 'text'; it has 'name', 'caption'", ("name", "caption"), ("red/0.png", "x"))
    refuses("line 3: has 1 values for 2 columns", header, ("red/0.png", "x"), ("red/4.png",))
    refuses("holds no text of an image", header, ("red/0.png", " "))
    refuses("images of a .beton file have no names", header, ("0", "x"), images=folder / "images.beton")
    by_number = Columns(("text",))
    refuses(
        "has 2 texts, and .* has 8 images", ("text",), ("x",), ("y",), columns=by_number, images=folder / "images.beton"
    )
    with pytest.raises(DataError, match="name the two columns"):
        prepare_text_pairs(tmp_path / "bad.csv", out, columns=Columns(("text",)))
    (images / "red" / "0.png").write_bytes(b"no picture")
    refuses("0.png", header, ("red/0.png", "x"), ("red/4.png", "y"))

    table = write_rows(tmp_path / "some.csv", header, ("red/4.png", "a"), ("red/4.png", ""), ("green/5.png", "b"))
    with table.open("a") as file:
        file.write("red/0.png,c\n")
    settings = f"--images {images} --workers 1 --column name --column text --vocabulary 300 --on-error skip"
    run("prepare", "--kind", "image_text", str(table), str(out), *settings.split())
    said = capsys.readouterr().out
    assert "2 images, 2 texts" in said
    assert "left out: 1 × an image that cannot be decoded: red/0.png" in said
    assert [len(x) for x in (open_image_text(out), open_image_text(out).texts)] == [2, 2]
    assert "left out: 1 × the text is empty: line 3" in said
    assert "left out: 5 × an image without a text" in said

    np.save(folder / OFFSETS, np.arange(9) * 2)
    with pytest.raises(DataError, match=r"offsets.npy does not fit its 8 images"):
        open_image_text(folder)
    with pytest.raises(DataError, match=r"holds image_text, and data\.kind is text_pairs"):
        open_text_pairs(folder)
    with pytest.raises(DataError, match="is no folder of pairs"):
        open_text_pairs(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(("kind", "write"), [("image_text", image_text), ("text_pairs", text_pairs)])
def test_a_batch_does_not_depend_on_the_number_of_processes(kind: str, write: Any, tmp_path: Path) -> None:
    data = section(kind, write(tmp_path))
    whole = batches(data, 13)
    for rank in (0, 1):
        for step, own in enumerate(batches(data, 5, World(rank=rank, size=2), first=8), start=8):
            part = slice(8 * rank, 8 * rank + 8)
            for name in ("sample_ids", "group_ids", "labels", "texts"):
                x, y = getattr(own, name), getattr(whole[step], name)
                assert (x is None and y is None) or torch.equal(x, y[part])
            assert torch.equal(own.views, whole[step].views[:, part])
    drawn = {}
    for batch in whole:
        tokens = batch.views[1] if batch.texts is None else batch.texts
        for i, row in zip(batch.sample_ids.tolist(), tokens.tolist(), strict=True):
            drawn.setdefault(i, set()).add(tuple(token for token in row if token))
    assert max(map(len, drawn.values())) == (2 if kind == "image_text" else 1)  # texts of an image, by epoch


@pytest.mark.parametrize(("kind", "write"), [("image_text", image_text), ("text_pairs", text_pairs)])
def test_equal_contents_are_never_negatives(kind: str, write: Any, tmp_path: Path) -> None:
    """Written down from the contents themselves: what the two views of two samples hold."""
    folder = write(tmp_path, 32)
    for max_tokens in (32, 4):  # so few that many texts are the same once they are cut
        data = section(kind, folder, max_tokens=max_tokens)
        kind_of(data).describe(str(folder))
        held: dict[int, set[Any]] = {}
        seen = batches(data, 12)
        for batch in seen:
            for i, sample in enumerate(batch.sample_ids.tolist()):
                texts = [batch.texts[i]] if batch.texts is not None else [batch.views[0, i], batch.views[1, i]]
                held.setdefault(sample, set()).update(tuple(t for t in x.tolist() if t) for x in texts)
        z = torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rows = F.normalize(z, dim=1)
        for batch in seen:
            ids, groups = batch.sample_ids.tolist(), batch.group_ids
            for i, a in enumerate(ids):
                for j, b in enumerate(ids):
                    if i != j and held[a] & held[b]:
                        assert groups[i] == groups[j]
            same = (groups[:, None] == groups) & ~torch.eye(16, dtype=torch.bool)
            logits = (rows[:16] @ rows[16:].T / 0.1).masked_fill(same, -torch.inf)
            right = torch.arange(16)
            want = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
            found = NTXentLoss(0.1, pairs="across")(z, groups)
            torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Trainings

TEXT = {"encoder": "transformer_small", "width": 32, "depth": 1, "heads": 2, "head_batch_norm": "none"}
COMMON: dict[str, Any] = {
    "loss": {"pairs": "across", "learn_temperature": True},
    "optim": {"optimizer": "adamw", "base_lr": 0.003, "lr_scaling": "none", "warmup_epochs": 1},
    "train": {"global_batch_size": 32, "epochs": 4, "precision": "fp32"},
    "checkpoint": {"every_steps": 3},
}


def written_config(kind: str, folder: Path) -> Path:
    size = json.loads(next(folder.rglob("MANIFEST.json")).read_text())["vocabulary"]["size"]
    text = {**TEXT, "vocabulary": size}
    images = {"encoder": "resnet_small", "head_batch_norm": "none", "text": text}
    data = section(kind, folder).model_dump(exclude_defaults=True)
    config = {"name": "x", "data": data, "model": images if kind == "image_text" else text, **COMMON}
    path = folder.parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def training(config: Path, name: str, *overrides: str, world_size: int = 1) -> Training:
    data = yaml.safe_load(config.read_text())["data"]["train"]
    settings = "train.epochs=4", "train.global_batch_size=32", "model.width=32", "model.head_hidden_dim=32"
    return Training(Path(data), config.parent, name, *settings, *overrides, world_size=world_size, config=config)


@pytest.fixture(scope="module")
def images_with_texts(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run of image_text on one process, to its end."""
    folder = image_text(tmp_path_factory.mktemp("image_text"))
    alone = training(written_config("image_text", folder), "alone")
    assert alone.wait() == [0], alone.output
    return alone


def has_one_curve_and_the_same_bytes(alone: Training, config: Path) -> None:
    """On two processes as on one; and, killed after the sixth step, as if nothing had been."""
    killed = training(config, "killed", world_size=2)
    killed.wait_until(lambda: killed.has_logged(6))
    killed.kill()
    resumed = training(config, "killed", world_size=2)
    assert resumed.wait() == [0, 0], resumed.output
    whole = training(config, "whole", world_size=2)
    assert whole.wait() == [0, 0], whole.output
    assert resumed.final_bytes() == whole.final_bytes()
    np.testing.assert_allclose(whole.losses(), alone.losses(), rtol=1e-4)
    assert len(set(whole.losses())) == 12


@pytest.mark.distributed
def test_images_with_texts_train_alike_on_two_processes_and_after_a_kill(images_with_texts: Training) -> None:
    config = images_with_texts.run_dir.parent / "config.yaml"
    has_one_curve_and_the_same_bytes(images_with_texts, config)
    with_more = training(config, "whole", "data.tokens.max_tokens=8")
    assert with_more.wait() == [2]
    assert "data.tokens.max_tokens: 32 then, 8 now" in with_more.output[0]


@pytest.mark.distributed
def test_pairs_of_texts_train_alike_on_two_processes_and_after_a_kill(tmp_path: Path) -> None:
    config = written_config("text_pairs", text_pairs(tmp_path))
    alone = training(config, "alone")
    assert alone.wait() == [0], alone.output
    has_one_curve_and_the_same_bytes(alone, config)
    assert "96 pairs, 2 views of" in alone.output[0]
    found = evaluate_retrieval(alone.run_dir, str(tmp_path / "pairs"), baselines=True, device=CPU, say=print)
    assert list(found.figures) == [
        "TF-IDF of words",
        "TF-IDF of 3 to 5 letters",
        "untrained network",
        "trained network",
    ]
    network, _ = load_pretrained(alone.run_dir)
    pairs = open_text_pairs(tmp_path / "pairs")
    h = [network.encoder(torch.from_numpy(pairs.texts.sample(i) + 1)[None]).detach() for i in range(192)]
    assert found.record["r1_to_second"] == pytest.approx(
        recall_at_1(h[::2], h[1::2], pairs.groups(pairs.texts.content_ids))
    )
    with pytest.raises(
        ConfigError, match="zero-shot says nothing of pairs; they are evaluated by similarity, retrieval"
    ):
        evaluate_zero_shot(alone.run_dir, "x", device=CPU, say=print)


@pytest.mark.slow
@pytest.mark.distributed
def test_pairs_train_alike_on_four_processes(images_with_texts: Training, tmp_path: Path) -> None:
    of_texts = written_config("text_pairs", text_pairs(tmp_path))
    alone = training(of_texts, "alone")
    assert alone.wait() == [0], alone.output
    with_images = images_with_texts.run_dir.parent / "config.yaml"
    for config, one in ((with_images, images_with_texts), (of_texts, alone)):
        on_four = training(config, "on_four", world_size=4)
        assert on_four.wait() == [0] * 4, on_four.output
        np.testing.assert_allclose(on_four.losses(), one.losses(), rtol=1e-4)


CPU = torch.device("cpu")


def recall_at_1(queries: list[torch.Tensor], gallery: list[torch.Tensor], groups: np.ndarray) -> float:
    found = []
    for i, query in enumerate(queries):
        nearest = max(range(len(gallery)), key=lambda j: float(F.cosine_similarity(query, gallery[j])))
        found.append(groups[nearest] == groups[i])
    return float(np.mean(found))


def test_images_with_texts_are_evaluated_in_every_way(images_with_texts: Training, tmp_path: Path) -> None:
    done, folder = images_with_texts.run_dir, images_with_texts.run_dir.parent / "pairs"
    pairs, kind = open_image_text(folder), kind_of(section("image_text", folder))
    network, _ = load_pretrained(done)
    ids = np.arange(96)
    images = torch.cat(
        [network.encoder(kind.to_input(read)) for read, _, _ in kind.evaluation_batches(str(folder), ids, 7)]
    )
    texts = [torch.from_numpy(pairs.texts.sample(i) + 1)[None] for i in range(len(pairs.texts))]
    h = torch.cat([network.text.encoder(tokens) for tokens in texts]).detach()
    z_images = network.projection_head(images).detach()
    z_texts = network.text.projection_head(h).detach()
    groups = pairs.groups(pairs.texts.content_ids)

    found = evaluate_retrieval(done, str(folder), baselines=True, batch_size=5, device=CPU, say=print)
    assert list(found.figures) == ["untrained network", "trained network"]
    nearest = (F.normalize(z_texts, dim=1) @ F.normalize(z_images, dim=1).T).argmax(dim=1)
    hits = groups[nearest.numpy()] == groups[pairs.image_of_text]
    assert found.record["r1_to_first"] == pytest.approx(hits.mean(), abs=1e-6)
    assert found.record["r1"] > found.figures["untrained network"]["r1"]

    template = "picture 5 is all {}"
    found = evaluate_zero_shot(done, str(folder), templates=[template], device=CPU, say=print)
    tokenizer = load_tokenizer(pairs.texts.path)
    names = kind.describe(str(folder)).class_names
    assert sorted(names) == sorted(COLOURS)
    prompts = [tokenizer.encode(template.format(name), add_special_tokens=False).ids for name in names]
    z = torch.cat([network.text(torch.tensor([ids]) + 1)[1] for ids in prompts]).detach()
    guesses = (F.normalize(z_images, dim=1) @ F.normalize(z, dim=1).T).argmax(dim=1).numpy()
    assert found.record["top1"] == pytest.approx((guesses == kind.describe(str(folder)).labels).mean())
    with pytest.raises(ConfigError, match=r"needs \{\} once"):
        evaluate_zero_shot(done, str(folder), templates=["a photo"], device=CPU, say=print)

    table = write_rows(
        tmp_path / "scored.csv",
        ("sentence1", "sentence2", "score"),
        ("all red", "red noise", "5"),
        ("all red", "", "1"),
        ("number 8", "picture 3", "2.5"),
        ("green noise", "noise", "4"),
    )
    said: list[str] = []
    similar = evaluate_similarity(done, table, out=tmp_path / "out", device=CPU, say=said.append)
    assert similar.record["pairs"] == 3
    assert any("1 of 4 pairs" in line for line in said)
    assert json.loads((tmp_path / "out" / "evaluations.jsonl").read_text())["spearman"] == similar.record["spearman"]
    write_rows(table, ("sentence1", "sentence2", "score"), ("a", "b", "much"))
    with pytest.raises(DataError, match="the score 'much' is no number"):
        evaluate_similarity(done, table, device=CPU, say=print)

    # To evaluations of images these are images.
    run("evaluate", "knn", str(done), "--test", str(folder.parent / "images"), "--k", "5", "--device", "cpu")
    methods = [json.loads(line)["method"] for line in (done / "evaluations.jsonl").read_text().splitlines()]
    assert methods == ["retrieval", "zero-shot", "knn"]
    export = tmp_path / "encoder.safetensors"
    run("export", str(done), "--format", "safetensors", "--out", str(export))
    exported, _ = load_pretrained(str(export))
    read = next(kind.evaluation_batches(str(folder), ids, 96))[0]
    torch.testing.assert_close(exported.encoder(kind.to_input(read)), images)


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
