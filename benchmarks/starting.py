"""Is a start from weights that saw other pictures better than a start from random ones, after the same steps?

    python -m benchmarks.starting --archive cifar10-jpeg.tar.xz

"Other pictures" are those of five classes of CIFAR-10: torchvision's resnet18 learns to tell them apart, in plain
PyTorch, and is saved as torchvision saves it. Then two trainings on the five *other* classes, one of them with
`model.weights`, the same otherwise: a step costs both the same. kNN is measured on those classes' test images.
Afterwards the better one is exported for torchvision, timm, transformers and onnxruntime, and each gives its h.
Writes a table to --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.views.augment import normalize

SIDE = 32
SETTINGS = (
    "model={encoder: resnet18, stem: imagenet}",
    "data.image_size=32",
    "augment={preset: simclr_cifar, crop_scale_min: 0.2}",
    "optim={optimizer: adamw, base_lr: 1.0e-3, lr_scaling: none, warmup_epochs: 0.2, weight_decay: 1.0e-4}",
    "train={global_batch_size: 256, epochs: 100, precision: fp32}",
    "evaluation={knn_every_epochs: null, online_probe: false, knn_k: 20}",
    "checkpoint.every_min=2",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="CIFAR-10 as JPEG: a tar of SPLIT/CLASS/*.jpg")
    parser.add_argument(
        "--other-images", type=int, default=10_000, help="that the training on other pictures sees once"
    )
    parser.add_argument("--minutes", type=float, default=5, help="of the start from random weights")
    parser.add_argument("--work", type=Path, default=Path("runs/starting"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    when = circumstances(vars(options) | {"archive": options.archive.name})
    other, own = split(options.archive, options.work)
    file = options.work / "resnet18.pth"
    train_on_others(other / "train.beton", file, options.other_images)
    rows: list[dict[str, Any]] = []
    steps = steps_within(own, options.work, options.minutes)
    for name, weights in (("random weights", "null"), ("weights of other pictures", str(file))):
        rows.append({"start": name, **trained(own, options.work, name.split()[0], weights, steps)})
    rows[-1]["before the first step"] = knn(options.work, str(file), own)
    differences = elsewhere(options.work / "weights", options.work, own / "test.beton")
    lines = [
        f"kNN (k 20, among 5,000) of five classes after {steps} steps of 256 images, resnet18, {SIDE} px, two",
        f"processes on {when['device']}, commit {when['commit']}. The weights saw the other five classes only.",
        "",
        "| start | kNN before | kNN after | seconds |",
        "|---|---:|---:|---:|",
        *(
            f"| {row['start']} | {row.get('before the first step', float('nan')):.2%} | {row['knn']:.2%} "
            f"| {row['seconds']:.0f} |".replace("nan%", "")
            for row in rows
        ),
        "",
        "Largest difference of h to that of the run, in units of h's largest entry: "
        + ", ".join(f"{library} {value:.1e}" for library, value in differences.items()),
    ]
    print("\n".join(lines))
    write("starting", options.out, {**when, "steps": steps, "rows": rows, "differences": differences}, lines)


def command(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, "-m", *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def split(archive: Path, work: Path) -> tuple[Path, Path]:
    """Folders with train.beton and test.beton of the first and of the last five classes."""
    parts = work / "others", work / "own"
    if all((part / f"{which}.beton").exists() for part in parts for which in ("train", "test")):
        return parts
    with tarfile.open(archive) as tar:
        tar.extractall(work / "files", filter="data")
    (root,) = {path.parent for path in (work / "files").rglob("train") if path.is_dir()}
    classes = sorted(path.name for path in (root / "train").iterdir())
    for part, names in zip(parts, (classes[:5], classes[5:]), strict=True):
        for which in ("train", "test"):
            folder = part / which
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).symlink_to((root / which / name).resolve())
            command("simclr_dist.cli", "prepare", folder, part / f"{which}.beton", "--overwrite")
    return parts


def train_on_others(source: Path, file: Path, num_images: int) -> None:
    """Supervised, in plain PyTorch: somebody else's training, one pass."""
    if file.exists():
        return
    ids = np.random.default_rng(0).permutation(25_000)[:num_images]
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for images, labels, _ in load_images(str(source), SIDE, batch_size=100, ids=ids):
        F.cross_entropy(network(normalize(images)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(network.state_dict(), file)


def train_command(own: Path, work: Path, name: str, weights: str, *more: str) -> tuple[str, ...]:
    data = f"data={{train: {own / 'train.beton'}, test: {own / 'test.beton'}}}"
    words = (f"name={name}", f"runs_dir={work}", data, *SETTINGS, f"model.weights={weights}", *more)
    return ("launcher", "local", "configs/smoke.yaml", "--nproc", "2", *words)


def steps_within(own: Path, work: Path, minutes: float) -> int:
    """How many steps the start from random weights takes in this time, by its own speed over a few."""
    command(*train_command(own, work, "clock", "null", "train.max_steps=8", "monitor.log_every_steps=4"))
    lines = [json.loads(line) for line in (work / "clock" / "log.jsonl").read_text().splitlines()]
    speed = [line["speed/images_per_s"] for line in lines if "speed/images_per_s" in line][-1]
    return int(60 * minutes * speed / 256)


def trained(own: Path, work: Path, name: str, weights: str, steps: int) -> dict[str, float]:
    begin = time.monotonic()
    command(*train_command(own, work, name, weights, f"train.max_steps={steps}"))
    return {"seconds": time.monotonic() - begin, "knn": knn(work, str(work / name), own)}


def knn(work: Path, source: str, own: Path) -> float:
    of = ("--encoder", "resnet18", "--image-size", str(SIDE)) if source.endswith(".pth") else ()
    images = ("--train", own / "train.beton", "--test", own / "test.beton", "--k", "20", "--max-train", "5000")
    said = command("simclr_dist.cli", "evaluate", "knn", source, *of, *images, "--json", "--out", work / "evaluations")
    return float(json.loads(said)["top1"])


def elsewhere(run: Path, work: Path, source: Path) -> dict[str, float]:
    """By library: the largest difference of its h from that of the run, as a share of the largest entry."""
    import onnxruntime
    import timm
    import transformers

    from simclr_dist.checkpoint.pretrained import load_pretrained

    files = {format: work / "exports" / format for format in ("torchvision", "timm", "hf", "onnx")}
    for format, file in files.items():
        command("simclr_dist.cli", "export", run, "--format", format, "--out", file, "--overwrite")
    images = normalize(next(iter(load_images(str(source), SIDE, batch_size=64)))[0]).contiguous()
    model, _ = load_pretrained(run)
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load(files["torchvision"], weights_only=True))
    network.fc = nn.Identity()  # type: ignore[assignment]
    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        h = model.encoder(images)
        found: dict[str, Tensor] = {
            "torchvision": network.eval()(images),
            "timm": timm.create_model(f"local-dir:{files['timm']}", pretrained=True).eval()(images),
            "transformers": transformers.AutoModel.from_pretrained(files["hf"]).eval()(images).pooler_output.flatten(1),
            "onnxruntime": torch.from_numpy(np.asarray(session.run(["h"], {"images": images.numpy()})[0])),
        }
    return {library: float((x - h).abs().max() / h.abs().max()) for library, x in found.items()}


if __name__ == "__main__":
    main()
