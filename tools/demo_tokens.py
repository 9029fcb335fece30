"""`make demo-text`, `make demo-proteins`: from a package with data to a table of results, in minutes on two cores.

    python tools/demo_tokens.py text|proteins [--data DIR] [--only-data] [key=value …]

The data are fetched as packages, unpacked below `data/`, and never installed: Debian's wordnet-base (117,659 glosses of
WordNet 3.0, in 45 files of its lexicographers) and mmseqs2-examples (20,000 proteins of UniProt). --data: they lie
there already, unpacked.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import re
import subprocess
import sys
import time
from pathlib import Path

import simclr_dist
from simclr_dist.config import load_config
from simclr_dist.data.randomness import permutation
from simclr_dist.errors import DataError, UserError

HERE = Path(__file__).resolve().parent.parent
DATA = Path("data")
SMALLEST_FAMILY = 10
NO_FAMILY = re.compile("ncharacterized|redicted protein|ypothetical|utative unchar|Fragment|Genome polyprotein")


def debian_package(name: str) -> Path:
    """The content of a package of Debian, without installing it. Raises DataError."""
    target = DATA / name
    if not target.exists():
        DATA.mkdir(exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "-qq", name], cwd=DATA, check=True)
            package = next(DATA.glob(f"{name}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", package.name, name], cwd=DATA, check=True)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise DataError(
                f"the Debian package {name} cannot be fetched ({error}); unpack it (dpkg-deb -x) and name that "
                "folder with --data"
            ) from None
    return target


def prepare(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "simclr_dist.cli", "prepare", *map(str, arguments)], check=True)


def glosses(root: Path) -> None:
    """Definitions with their examples; the class is the lexicographers' file: noun.animal, verb.motion, …"""
    rows = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / "usr/share/wordnet" / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                head, _, gloss = line.partition("|")
                rows.append((" ".join(gloss.split()), f"{part}.{head.split()[1]}"))
    order = permutation(0, 0, 0, len(rows))
    parts = {"test": order[:2000], "train": order[2000:], "known": order[2000:22000]}  # among the last kNN looks
    for name, chosen in parts.items():
        table = DATA / f"glosses_{name}.tsv"
        table.write_text("text\tclass\n" + "".join("\t".join(rows[i]) + "\n" for i in chosen), encoding="utf-8")
    for name in ("train", "test", "known"):
        own = ["--vocabulary", 8192] if name == "train" else ["--tokenizer", DATA / "glosses_train.tokens"]
        table, out = DATA / f"glosses_{name}.tsv", DATA / f"glosses_{name}.tokens"
        prepare("--kind", "text", table, out, "--overwrite", "--label-column", "class", *own)


def proteins(root: Path) -> None:
    """The family is a protein's name, where at least ten have it. A fifth of these are for tests."""
    path = root / "usr/share/doc/mmseqs2/example-data/DB.fasta.gz"
    records = gzip.decompress(path.read_bytes()).decode("latin-1").split("\n>")
    records[0] = records[0].removeprefix(">")
    found = [re.match(r"\S+ (.*?) OS=", record) for record in records]
    names = [name[1] if name else "" for name in found]
    sizes = collections.Counter(name for name in names if name and not NO_FAMILY.search(name))
    is_known = [sizes[name] >= SMALLEST_FAMILY for name in names]
    order = permutation(0, 0, 0, len(records))
    known = [i for i in order if is_known[i]]
    test = set(known[: len(known) // 5])
    parts = {
        "test": test,
        "families": set(known) - test,  # among which kNN looks
        "train": set(range(len(records))) - test,
    }
    for part, chosen in parts.items():
        fasta = DATA / f"proteins_{part}.fasta"
        lines = (f">{records[i].split()[0]} family={names[i] if is_known[i] else ''}\n" for i in sorted(chosen))
        sequences = (records[i].partition("\n")[2] for i in sorted(chosen))
        fasta.write_text("".join(f"{a}{b.rstrip()}\n" for a, b in zip(lines, sequences, strict=True)))
        out = DATA / f"proteins_{part}.tokens"
        prepare("--kind", "proteins", fasta, out, "--overwrite", "--label-pattern", "family=(.+)")


DEMOS = {
    "text": ("wordnet-base", glosses, "text_simcse.yaml", "glosses_known.tokens"),
    "proteins": ("mmseqs2-examples", proteins, "proteins.yaml", "proteins_train.tokens"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=DEMOS)
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the package's content lies")
    parser.add_argument("--only-data", action="store_true", help="prepare, and train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    begin = time.monotonic()
    package, write, config, first = DEMOS[args.kind]
    if not (DATA / first / "MANIFEST.json").exists():
        DATA.mkdir(exist_ok=True)
        write(args.data or debian_package(package))
    if args.only_data:
        return
    run = simclr_dist.pretrain(load_config(HERE / "configs" / config, args.overrides))
    if run.state != "finished":
        print(f"{run.state} at step {run.step}; `make demo-{args.kind}` continues from there")
        return
    found = run.evaluate(baselines=True)
    print(f"\n{'kNN top-1 of':<20}")
    for name, score in [*found.baselines.items(), ("trained encoder", found)]:
        print(f"  {name:<20} {score.top1:.1%}")
    print(f"The demo took {time.monotonic() - begin:.0f} s. The run lies in {run.path}.")


if __name__ == "__main__":
    try:
        main()
    except (UserError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
