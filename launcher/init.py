"""`simclr-launch init DIR`: a folder to work in for those who installed the package and have no checkout.

launcher/starter/ holds links to the repository's configs/ and slurm/; in a wheel it holds the files themselves.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import simclr_dist
from launcher.errors import Exit, LaunchError

STARTER = Path(__file__).resolve().parent / "starter"
SCHEMA = "config.schema.json"
README = """\
# {name}

Started with simclr-dist {version}. Run from this folder:

```sh
simclr-launch local configs/smoke.yaml                     # a minute, synthetic images: is everything in place?
simclr-dist prepare PATH/TO/IMAGES data/train.beton        # a folder of class folders, a tar of one, or cifar10
simclr-launch local configs/cifar10_resnet18_100ep.yaml data.train=data/train.beton data.test=null \\
    evaluation.knn_every_epochs=null data.image_size=96 augment.preset=simclr_imagenet
```

`simclr-dist doctor` says what does not work here, and the remedy; `simclr-dist plan CONFIG` what a training will need;
`tensorboard --logdir runs` shows how it goes; `simclr-dist evaluate` and `simclr-dist export` what came out.

- `configs/`: what to learn. Each file opens with its command, hardware, time and expected accuracy. Copy one and change
  it; `{schema}` lets an editor complete the keys, `simclr-dist config show FILE` prints all of them.
- `slurm/`: the same on a cluster, `sbatch slurm/train.sh configs/FILE`. Lines marked EDIT depend on the cluster.
"""


def run(args: argparse.Namespace) -> int:
    folder: Path = args.dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LaunchError(f"{folder}: exists and is not an empty folder; choose another name, nothing was written")
    for source in sorted(STARTER.glob("configs/**/*.yaml")) + sorted(STARTER.glob("slurm/*.sh")):
        copy = folder / source.relative_to(STARTER)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text(encoding="utf-8").replace(f"../simclr_dist/{SCHEMA}", f"../{SCHEMA}"), "utf-8")
        copy.chmod(source.stat().st_mode & 0o777 | 0o600)
    shutil.copyfile(Path(simclr_dist.__file__).parent / SCHEMA, folder / SCHEMA)
    name = folder.resolve().name
    text = README.format(name=name, version=simclr_dist.__version__, schema=SCHEMA)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"{folder}: configurations, SLURM scripts, and README.md with the next commands")
    return Exit.OK
