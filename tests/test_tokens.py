"""Texts and proteins: token folders, length buckets, views, the encoder. Trainings on them: test_token_training.py."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simclr_dist.config import OURS_OF_TOKENS, AugmentConfig, DataConfig, ModelConfig, TokensConfig, load_config
from simclr_dist.data.order import Order
from simclr_dist.data.randomness import keys
from simclr_dist.data.tokens import alphabet
from simclr_dist.data.tokens.folder import open_tokens
from simclr_dist.data.tokens.prepare import prepare_proteins, prepare_texts
from simclr_dist.data.tokens.texts import Columns
from simclr_dist.data.tokens.tokenizer import load_tokenizer, train_tokenizer
from simclr_dist.data.tokens.views import beginnings, spans, written
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.kinds import kind_of
from simclr_dist.kinds.tokens import Tokens
from simclr_dist.network.encoders import build_encoder
from simclr_dist.parallel.distributed import World
from tests.token_data import write_protein_folder, write_text_folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("texts") / "train.tokens", 300, seed=1)


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_protein_folder(tmp_path_factory.mktemp("proteins") / "train.tokens", 200, seed=1)


def of(folder: Path, kind: str = "text", **tokens: object) -> Tokens:
    found = kind_of(DataConfig.model_validate({"kind": kind, "train": str(folder), "tokens": tokens}))
    assert isinstance(found, Tokens)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Preparing


def test_texts_of_every_format_become_the_same_tokens(tmp_path: Path) -> None:
    rows = [("first, with a comma", "a"), ("second ä", ""), ("third", "b"), ("first, with a comma", "a")]
    table = [{"text": text, "kind": label, "other": i} for i, (text, label) in enumerate(rows)]
    (tmp_path / "x.txt").write_bytes("\r\n".join(text for text, _ in rows).encode())
    (tmp_path / "x.tsv").write_text("text\tkind\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    (tmp_path / "x.csv").write_text("﻿text,kind\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, table)).encode()))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(table), tmp_path / "x.parquet")
    prepare_texts(tmp_path / "x.txt", tmp_path / "txt", vocabulary_size=300)
    plain = open_tokens(tmp_path / "txt")
    assert plain.labels.tolist() == [-1] * 4
    assert plain.content_ids.tolist() == [0, 1, 2, 0]
    for name in ("x.tsv", "x.csv", "x.jsonl.gz", "x.parquet"):
        out = tmp_path / f"{name}.tokens"
        prepare_texts(tmp_path / name, out, tokenizer_at=tmp_path / "txt", columns=Columns(label="kind"))
        found = open_tokens(out)
        assert np.array_equal(found.tokens, plain.tokens), name
        assert (found.class_names, found.labels.tolist()) == (("a", "b"), [0, -1, 1, 0])
        assert found.vocabulary == plain.vocabulary
        assert found.verified_fingerprint() != plain.verified_fingerprint()  # labels are content
    decoded = load_tokenizer(tmp_path / "txt").decode(plain.sample(1).tolist())
    assert decoded.strip() == "second ä"


def test_columns_are_named_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a\tb\none\ttwo\nthree\tfour\n")
    with pytest.raises(DataError, match=r"which column holds the texts.*'a', 'b'"):
        prepare_texts(tmp_path / "x.tsv", tmp_path / "out")
    with pytest.raises(DataError, match="has no column 'c'; it has 'a', 'b'"):
        prepare_texts(tmp_path / "x.tsv", tmp_path / "out", columns=Columns(("c",)))
    with pytest.raises(DataError, match="--label-column: has no column 'c'"):
        prepare_texts(tmp_path / "x.tsv", tmp_path / "out", columns=Columns(("a",), label="c"))
    both = prepare_texts(tmp_path / "x.tsv", tmp_path / "out", columns=Columns(("a", "b")))
    assert both.account.taken == 4
    numbered = prepare_texts(tmp_path / "x.tsv", tmp_path / "out2", columns=Columns(("2",), header=False))
    assert numbered.account.taken == 3


def _no_text_in_parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = pa.py_buffer(np.array([0, 2], np.int32))
    texts = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"text": texts}), file := io.BytesIO())
    return file.getvalue()


BAD_TEXTS = {
    "x.tsv": (b"text\tb\none\n", "line 2: has 1 values for 2 columns"),
    "x.csv": (b'text\n"open\n', "line 2: unexpected end"),
    "a.csv": (b"text,text\n1,2\n", "two of its columns have the same name"),
    "x.jsonl": (b'{"text": "a"}\n{"tex', "line 2: is no JSON"),
    "a.jsonl": (b'{"text": "a"}\n{"other": "b"}\n', "line 2: has no 'text'"),
    "b.jsonl": (b'{"text": 3}\n', "'text' is no text but 3"),
    "c.jsonl": (b"[1]\n", "is no JSON object"),
    "x.txt": (b"fine\nna\xefve\n", "line 2: is not utf-8 .byte 3 is 0xef.; name another with --encoding"),
    "a.txt": (b"\n  \n", "holds nothing to train on"),
    "b.txt": (b"PK\x00\x01", "zero byte"),
    "x.txt.gz": (b"no gzip", "cannot be read"),
    "x.parquet": (b"PAR1 no more", "cannot be read"),
    "a.parquet": (_no_text_in_parquet(), "cannot be read: .*can't decode byte 0xff"),
    "x.docx": (b"", "texts are read from .txt"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_broken_texts_are_one_clear_error_and_leave_nothing_behind(name: str, tmp_path: Path) -> None:
    content, message = BAD_TEXTS[name]
    (tmp_path / name).write_bytes(content)
    tokenizer = train_tokenizer(["a word"], 300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    with pytest.raises(DataError, match=message):
        prepare_texts(tmp_path / name, tmp_path / "out", tokenizer_at=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name, "tokenizer.json"}


def test_what_is_left_out_or_cut_is_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n\n   \n" + "long " * 50 + "\none\n")
    found = prepare_texts(tmp_path / "x.txt", tmp_path / "out", vocabulary_size=300, max_tokens=8)
    lines = "\n".join(found.account.lines())
    assert "taken: 3 texts" in lines
    assert "left out: 2 × empty: line 2, line 3" in lines
    assert "note: 1 × cut to 8 tokens: line 4" in lines
    assert "1 have the tokens of another" in lines
    assert found.longest > open_tokens(tmp_path / "out").lengths.max() == 8
    with pytest.raises(DataError, match="2 are left out, and --strict"):
        prepare_texts(tmp_path / "x.txt", tmp_path / "other", strict=True)
    with pytest.raises(DataError, match="exists already"):
        prepare_texts(tmp_path / "x.txt", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="is no token folder, so it is not replaced"):
        prepare_texts(tmp_path / "x.txt", tmp_path / "mine", overwrite=True)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, texts: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))  # type: ignore[call-arg]
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    (tmp_path / "tokenizer.json").write_text(words.to_str())
    (tmp_path / "x.txt").write_text("quite other things\nword\n")
    with pytest.raises(DataError, match="75% of its tokens are unknown"):
        prepare_texts(tmp_path / "x.txt", tmp_path / "out", tokenizer_at=tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer"):
        prepare_texts(tmp_path / "x.txt", tmp_path / "out", tokenizer_at=tmp_path / "broken.json")
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        prepare_texts(tmp_path / "x.txt", tmp_path / "out", tokenizer_at=tmp_path / "nowhere")
    other = write_text_folder(tmp_path / "other.tokens", 100, seed=9)
    with pytest.raises(DataError, match=r"another tokenizer than .*train.tokens; prepare it again with --tokenizer"):
        of(texts).describe(str(other))
    same = write_text_folder(tmp_path / "same.tokens", 100, seed=9, tokenizer=texts)
    assert of(texts).describe(str(same)).num_samples == 100


def test_special_tokens_of_a_tokenizer_stand_around_every_view(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = train_tokenizer(["some words"], 300)
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    cls, sep = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "x.txt").write_text("words\nsome words and others that are cut\n")
    prepare_texts(tmp_path / "x.txt", tmp_path / "out", tokenizer_at=tmp_path)
    kind = of(tmp_path / "out", max_tokens=8)
    tokens, _, _ = next(kind.evaluation_batches(str(tmp_path / "out"), np.arange(2), 2))
    short = tokenizer.encode("words").ids
    assert (tokens[0] - 1).tolist() == short + [-1] * (8 - len(short))
    assert (tokens[1] - 1).tolist() == [cls, *tokenizer.encode("some words and others that are cut").ids[1:7], sep]


def test_proteins_are_letters_and_unknown_residues_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text(
        "; a comment\n>one OS=A\nMKV\nla-X.*\n>two\n\n>three bad\nMK1\n>four OS=B\nMKVLA\n\n>five\nmkvlau*\n"
    )
    found = prepare_proteins(tmp_path / "x.fasta", tmp_path / "out", label_pattern=r"OS=(\w)")
    lines = "\n".join(found.account.lines())
    assert "taken: 3 proteins" in lines
    assert "1 × has no residues: two" in lines
    assert "1 × '1' is no residue: three" in lines
    assert "2 × unknown residues (B, J, O, U, X or Z) in it: one, five" in lines
    folder = open_tokens(tmp_path / "out")
    assert [alphabet.decode(folder.sample(i)) for i in range(3)] == ["MKVLAX", "MKVLA", "MKVLAX"]
    assert folder.content_ids.tolist() == [0, 1, 0]
    assert folder.labels.tolist() == [0, 1, -1]


BAD_FASTA = {
    "no name": ("MKVLA\n", "line 1: is no FASTA: a sequence begins with a line >NAME"),
    "empty": ("", "it has no line >NAME"),
    "nothing in it": (">one\n>two\n", "holds nothing to train on"),
    "nucleotides": (f">gene\n{'ACGT' * 20}\n>gene2\n{'ACGTN' * 20}\n", "looks like nucleotides .gene"),
}


@pytest.mark.parametrize("name", BAD_FASTA)
def test_broken_fasta_is_one_clear_error(name: str, tmp_path: Path) -> None:
    content, message = BAD_FASTA[name]
    (tmp_path / "x.fasta").write_text(content)
    with pytest.raises(DataError, match=message):
        prepare_proteins(tmp_path / "x.fasta", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_a_folder_that_was_changed_is_found_out(tmp_path: Path, texts: Path) -> None:
    def broken(name: str, change: Any) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(texts, copy)
        if name == "MANIFEST.json":
            manifest = json.loads((copy / name).read_text())
            change(manifest)
            (copy / name).write_text(json.dumps(manifest))
        else:
            array = np.load(copy / name)
            np.save(copy / name, change(array))
        with pytest.raises(DataError) as error:
            open_tokens(copy).verified_fingerprint()
        return str(error.value)

    def set_first(value: int) -> Any:
        return lambda array: np.concatenate([np.array([value], array.dtype), array[1:]])

    assert "has id 65535" in broken("tokens.npy", set_first(65535))
    assert "not what was written" in broken("tokens.npy", lambda array: array[::-1])
    assert "does not divide" in broken("offsets.npy", set_first(5))
    assert "does not divide" in broken("tokens.npy", lambda array: array[:-1])
    assert "names class 99 of 4" in broken("labels.npy", set_first(99))
    assert "is float64" in broken("labels.npy", lambda array: array.astype(float))
    assert "not int64" in broken("content_ids.npy", lambda array: array[:-1])
    assert "cannot be read" in broken("labels.npy", lambda array: np.array([{"a": 1}], object))
    assert "incomplete" in broken("MANIFEST.json", lambda manifest: manifest.pop("sha256"))
    assert "incomplete" in broken("MANIFEST.json", lambda manifest: manifest["vocabulary"].update(mask=10**9))
    assert "its format is 7" in broken("MANIFEST.json", lambda manifest: manifest.update(format=7))
    with pytest.raises(DataError, match="no token folder"):
        open_tokens(tmp_path)
    with pytest.raises(DataError, match=r"holds text, and data\.kind is proteins"):
        of(texts, "proteins").describe(str(texts))


# ---------------------------------------------------------------------------------------------------------------------
# Length buckets


def test_buckets_take_every_sample_once_and_pad_little() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.7, 0.6, 20_003), 20, 1022).astype(np.int64)

    def padding(order: Order) -> float:
        batches = [order.sample_ids(0, step) for step in range(order.steps_per_epoch)]
        assert len(np.unique(np.concatenate(batches))) == len(np.concatenate(batches))
        return sum(256 * lengths[ids].max() for ids in batches) / sum(lengths[ids].sum() for ids in batches)

    plain, sorted_ = Order(20_003, 256, 3), Order(20_003, 256, 3, lengths=lengths)
    assert padding(plain) > 2.5
    assert padding(sorted_) < 1.15
    assert set(plain.permutation(0)[-35:]) == set(sorted_.permutation(0)[-35:])  # the same are left out
    means = [lengths[sorted_.sample_ids(0, step)].mean() for step in range(70)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # short and long batches come in no order
    one = Order(20_003, 256, 3, lengths=lengths, length_window=1)
    assert np.array_equal(one.permutation(0), plain.permutation(0))
    ids = sorted_.sample_ids(0, 5)
    assert not (np.diff(lengths[ids]) >= 0).all()  # within a batch, a rank's share is as long as another's
    for rank in range(8):
        assert np.array_equal(sorted_.sample_ids(0, 5, rank, 8), ids[32 * rank : 32 * rank + 32])


def test_all_ranks_pad_a_batch_to_the_same_length_and_resume_anywhere(texts: Path, proteins: Path) -> None:
    """So no result depends on how many there are, whatever an encoder does with padding."""
    for kind in (
        of(texts, max_tokens=12, mutate_p=0.1),
        of(proteins, "proteins", views="spans", span_min=20, span_max=50, mask_p=0.1, mutate_p=0.1),
    ):

        def batches(world: World, step: int, kind: Tokens = kind) -> list:
            loader = kind.loader(AugmentConfig(), seed=3, global_batch_size=16, world=world, device="cpu")
            found = loader.batches(step)
            return [next(found) for _ in range(14)]

        whole = batches(World(), 0)
        for size in (2, 4):
            ranks = [batches(World(rank=rank, size=size), 3) for rank in range(size)]
            for i, expected in enumerate(whole[3:]):
                parts = [rank[i] for rank in ranks]
                assert torch.equal(torch.cat([part.views for part in parts], 1), expected.views)
                assert torch.equal(torch.cat([part.group_ids for part in parts]), expected.group_ids)
        assert not torch.equal(whole[0].views[0], whole[0].views[1])


def test_equal_contents_share_a_group_also_where_the_cut_makes_them_equal(tmp_path: Path) -> None:
    """The loss makes no negatives of samples that share a group."""
    (tmp_path / "x.txt").write_text("the same and more\nthe same and less\nother\nthe same and more\n")
    prepare_texts(tmp_path / "x.txt", tmp_path / "out", vocabulary_size=257)  # a token a byte
    for max_tokens, groups in ((128, {0: 0, 1: 1, 2: 2, 3: 0}), (6, {0: 0, 1: 0, 2: 2, 3: 0})):
        kind = of(tmp_path / "out", max_tokens=max_tokens)
        loader = kind.loader(AugmentConfig(), seed=0, global_batch_size=4, world=World(), device="cpu")
        batch = next(iter(loader.batches(0)))
        assert batch.group_ids is not None
        assert dict(zip(batch.sample_ids.tolist(), batch.group_ids.tolist(), strict=True)) == groups
        loader.close()


def test_a_folder_is_shown_and_verified(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from simclr_dist.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(texts), "--verify"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for words in ("taken: 300 texts", "300 in 4 classes, 0 without one", "every file is what was written"):
        assert words in shown


# ---------------------------------------------------------------------------------------------------------------------
# Views


def test_spans_have_declutrs_lengths_and_touch(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n".join(" ".join(f"w{i}{j}" for j in range(400)) for i in range(20)))
    prepare_texts(tmp_path / "x.txt", tmp_path / "out", vocabulary_size=300, max_tokens=1000)
    folder = open_tokens(tmp_path / "out")
    config = TokensConfig(views="spans", span_min=20, span_max=119, max_tokens=128)
    ids = np.arange(20).repeat(200)
    view_keys = keys(0, 0, np.arange(len(ids))[None], np.arange(4)[:, None])
    parts = spans(folder, ids, view_keys, config)
    starts, lengths = parts.starts - folder.offsets[ids], parts.lengths
    assert starts.min() >= 0
    assert (starts + lengths <= folder.lengths[ids]).all()
    assert lengths.min() >= 20
    assert lengths.max() <= 119
    # Beta(4, 2) has mean 2/3 and Beta(2, 4) has mean 1/3; both have variance 2/63
    np.testing.assert_allclose((lengths.mean(1) - 20) / 100, [2 / 3, 1 / 3, 2 / 3, 1 / 3], atol=0.015)
    np.testing.assert_allclose(lengths.var(1) / 100**2, 2 / 63, rtol=0.1)
    assert (starts[1:] <= starts[0] + lengths[0]).all()
    assert (starts[1:] + lengths[1:] >= starts[0]).all()
    free = spans(folder, ids, view_keys, config.model_copy(update={"spans_touch": False}))
    away = free.starts[1] > free.starts[0] + free.lengths[0]
    assert 0.2 < away.mean() < 0.5
    places = free.starts - folder.offsets[ids]
    assert abs(np.corrcoef(places[0], places[1])[0, 1]) < 0.05
    again = spans(folder, ids[5:9], view_keys[:, 5:9], config)
    assert np.array_equal(again.starts, parts.starts[:, 5:9])


def test_masks_and_mutations_are_as_many_as_asked_and_do_not_see_the_padding(proteins: Path) -> None:
    folder = open_tokens(proteins)
    ids = np.arange(200)
    config = TokensConfig(mask_p=0.2, mutate_p=0.1, max_tokens=256)
    view_keys = keys(0, 0, ids[None], np.arange(2)[:, None])
    whole = beginnings(folder, ids, config)
    plain = written(folder, whole, 200)
    views = np.stack([written(folder, whole, 200, view_keys[v], config) for v in range(2)])
    assert np.array_equal((views != 0), np.broadcast_to(plain != 0, views.shape))
    real = plain != 0
    masked, changed = views[:, real] == alphabet.MASK + 1, views[:, real] != plain[real]
    assert masked.mean() == pytest.approx(0.2, abs=0.01)
    assert (changed & ~masked).mean() == pytest.approx(0.1 * 0.95, abs=0.01)  # 1 in 20 becomes what it was
    assert abs(np.corrcoef(changed[0], changed[1])[0, 1]) < 0.02
    longer = written(folder, whole, 264, view_keys[0], config)
    assert np.array_equal(longer[:, :200], views[0])
    assert not longer[:, 200:].any()


# ---------------------------------------------------------------------------------------------------------------------
# The encoder


@pytest.mark.parametrize("encoder_name", OURS_OF_TOKENS)
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_changes_nothing(texts: Path, pooling: str, encoder_name: str) -> None:
    config = ModelConfig(encoder=encoder_name, vocabulary=400, width=32, depth=2, pooling=pooling)
    encoder, width = build_encoder(config)
    encoder.eval()
    kind = of(texts)
    tokens, _, _ = next(kind.evaluation_batches(str(texts), np.arange(32), 32))
    with torch.no_grad():
        together = encoder(torch.nn.functional.pad(tokens, (0, 24)))
        alone = torch.cat([encoder(row[row != 0][None]) for row in tokens])
    assert together.shape == (32, width)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    assert together.std(0).mean() > 1e-3  # h says something


def test_encoders_that_do_not_fit_tokens_are_refused(texts: Path) -> None:
    class OverTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(401, 8), nn.BatchNorm1d(8)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.norm(self.embedding(tokens).transpose(1, 2)).mean(2)

    class OverRows(OverTokens):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.norm(self.embedding(tokens).mean(1))

    kind = of(texts)
    own = ModelConfig(encoder="own")
    with pytest.raises(ConfigError, match=r"own has BatchNorm over tokens .norm., .*use LayerNorm"):
        kind.check_encoder(OverTokens(), own)
    kind.check_encoder(OverRows(), own)
    with torch.device("meta"), pytest.raises(ConfigError, match="BatchNorm over tokens"):
        kind.check_encoder(OverTokens(), own)
    size = kind.train.vocabulary.size
    ours = ModelConfig(encoder="transformer_small", vocabulary=500, width=32)
    with pytest.raises(ConfigError, match=f"model.vocabulary: is 500, but .* has {size} tokens; set it to {size}"):
        kind.check_encoder(build_encoder(ours)[0], ours)
    first = ours.model_copy(update={"vocabulary": size, "pooling": "first"})
    with pytest.raises(ConfigError, match="puts none before a text; set it to mean"):
        kind.check_encoder(build_encoder(first)[0], first)
    for name, wrong, message in (
        ("transformer_small", {"vocabulary": None}, "is missing; transformer_small"),
        ("transformer_small", {"width": 30}, "no multiple of 2 x model.heads"),
        ("gated_cnn", {"vocabulary": None}, "is missing; gated_cnn"),
        ("gated_cnn", {"kernel_size": 4}, "4 has no middle: take an odd number"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_encoder(ours.model_copy(update={"encoder": name, **wrong}))
    cnn = ours.model_copy(update={"encoder": "gated_cnn"})
    with pytest.raises(ConfigError, match=r"model\.vocabulary: is 500"):
        kind.check_encoder(build_encoder(cnn)[0], cnn)


def test_a_gated_cnn_of_one_layer_is_a_mean_over_k_mers() -> None:
    """Of what torch's own layers make of each window by itself."""
    encoder, width = build_encoder(ModelConfig(encoder="gated_cnn", vocabulary=22, width=16, depth=1, kernel_size=3))
    encoder.eval()
    tokens = torch.randint(1, 23, (2, 11))
    layer = encoder.layers[0].convolution
    beyond = torch.zeros(2, 1, encoder.embedding.embedding_dim)
    x = torch.cat([beyond, encoder.embedding(tokens), beyond], dim=1)
    rows = [x[:, t : t + 3].transpose(1, 2).flatten(1) @ layer.weight.flatten(1).T + layer.bias for t in range(11)]
    wanted = torch.stack([a * torch.sigmoid(b) for a, b in (row.chunk(2, dim=1) for row in rows)]).mean(0)
    assert width == 16
    torch.testing.assert_close(encoder(tokens), wanted, atol=1e-5, rtol=1e-5)


def test_settings_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    def refused(*overrides: str) -> str:
        path = tmp_path / "x.yaml"
        path.write_text(
            "name: x\ndata: {kind: text, train: none}\nmodel: {encoder: transformer_small, vocabulary: 400}\n"
            "train: {global_batch_size: 8, epochs: 20}\n"
        )
        with pytest.raises(ConfigError) as error:
            load_config(path, list(overrides))
        return str(error.value)

    for encoder in OURS_OF_TOKENS:
        assert "views of a sample would be the same" in refused("model.dropout=0.0", f"model.encoder={encoder}")
    assert "span_min (99) must not exceed data.tokens.span_max (96)" in refused("data.tokens.span_min=99")
    assert "must not exceed data.tokens.max_tokens" in refused("data.tokens.views=spans", "data.tokens.max_tokens=50")
    assert "lower them" in refused("data.tokens.mask_p=0.6", "data.tokens.mutate_p=0.6")
    assert "text has data.tokens" in refused("data.options={a: 1}")
    assert "augment: only images have it" in refused("augment.blur_p=0.5")
    assert "data.tokens is of texts and proteins" in refused(
        "data.kind=images", "data.image_size=32", "data.tokens.mask_p=0.1"
    )
