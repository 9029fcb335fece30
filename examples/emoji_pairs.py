"""Emoji and what they are called, as pairs of images and texts: 1,900 pictures with their names and tags.

npm pack emoji-datasource-google@16.0.0 && mkdir -p pictures && tar xzf emoji-datasource-google-16.0.0.tgz -C pictures
npm pack emojibase-data@17.0.0 && mkdir -p names && tar xzf emojibase-data-17.0.0.tgz -C names

python examples/emoji_pairs.py pictures/package names/package data/emoji

Writes data/emoji/images (a folder for each category) and train.csv and test.csv, tables of names and texts; every fifth
emoji is held out. configs/pairs_emoji.yaml says how it goes on.
"""

import csv
import json
import re
import sys
import zlib
from pathlib import Path

from PIL import Image


def write_pairs(pictures: Path, names: Path, out: Path) -> None:
    known = {entry["hexcode"]: entry for entry in json.loads((names / "en/data.json").read_text("utf-8"))}
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for emoji in json.loads((pictures / "emoji.json").read_text("utf-8")):
        code = emoji["unified"]
        entry = known.get(code) or known.get(code.replace("-FE0F", ""))
        if entry is None or not emoji["has_img_google"]:
            continue
        category = re.sub(r"[^a-z]+", "_", emoji["category"].lower().replace("&", "and"))
        name = f"{category}/{emoji['image']}"
        (out / "images" / category).mkdir(parents=True, exist_ok=True)
        picture = Image.open(pictures / "img/google/64" / emoji["image"]).convert("RGBA")
        Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB").save(
            out / "images" / name
        )
        label, tags = entry["label"], ", ".join(entry.get("tags", []))
        split = "test" if zlib.crc32(code.encode()) % 5 == 0 else "train"
        if split == "test":
            rows[split].append((name, f"{label}, {tags}" if tags else label))
        else:  # each epoch draws one of an image's texts
            rows[split] += [(name, text) for text in (label, f"{label}, {tags}", tags) if text.strip(", ")]
    for split, found in rows.items():
        with (out / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("name", "text"), *found])
        print(f"{out / split}.csv: {len({name for name, _ in found}):,} images, {len(found):,} texts")


if __name__ == "__main__":
    write_pairs(*map(Path, sys.argv[1:4]))
