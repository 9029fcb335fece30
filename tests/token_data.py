"""Small texts and proteins, drawn here, of classes that an encoder can tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simclr_dist.data.tokens.prepare import prepare_proteins, prepare_texts
from simclr_dist.data.tokens.texts import Columns


def write_table(path: Path, n: int, seed: int, classes: int = 4) -> Path:
    """A .tsv file of n texts: words of their class, and words of all. Some texts stand there twice."""
    generator = np.random.default_rng(seed)
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "el")]
    lines = ["text\tclass"]
    for i in range(n):
        label = i % classes
        own = generator.choice(words[label * 20 : label * 20 + 20], generator.integers(2, 9))
        shared = generator.choice(words[80:], generator.integers(1, 5))
        text = " ".join(generator.permutation([*own, *shared]))
        lines.append(lines[-classes] if i % 50 == 49 else f"{text}\tclass{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_text_folder(path: Path, n: int, seed: int, tokenizer: Path | None = None) -> Path:
    table = write_table(path.with_suffix(".tsv"), n, seed)
    prepare_texts(table, path, tokenizer_at=tokenizer, vocabulary_size=400, columns=Columns(label="class"))
    return path


def write_fasta(path: Path, n: int, seed: int, families: int = 4) -> Path:
    """n proteins: mutated copies of the sequences of some families, each with other ends."""
    generator, letters = np.random.default_rng(seed), np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    cores = np.random.default_rng(0).choice(letters, (families, 60))
    with path.open("w") as file:
        for i in range(n):
            core = np.where(generator.random(60) < 0.2, generator.choice(letters, 60), cores[i % families])
            ends = (generator.choice(letters, generator.integers(5, 60)) for _ in range(2))
            sequence = "".join(np.concatenate([next(ends), core, next(ends)]))
            file.write(f">protein{i} family={i % families} from nowhere\n{sequence[:50]}\n{sequence[50:]}\n")
    return path


def write_protein_folder(path: Path, n: int, seed: int) -> Path:
    prepare_proteins(write_fasta(path.with_suffix(".fasta"), n, seed), path, label_pattern=r"family=(\d)")
    return path
