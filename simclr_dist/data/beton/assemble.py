"""One .beton file from several, several from one, more samples behind those of a file: records are copied as they are.

Nothing is decoded. What is read is compared with what was written where a file says so, and what is written appears
complete or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np

from simclr_dist.data.account import Account, SourceOptions, together
from simclr_dist.data.beton.content import RecordsDigest, content_fingerprint
from simclr_dist.data.beton.encode import Mode
from simclr_dist.data.beton.fit import prepared_for
from simclr_dist.data.beton.out_file import choose_target, commit, publish, unfinished, unfinished_folder
from simclr_dist.data.beton.prepare import OnError, prepare
from simclr_dist.data.beton.reader import JPEG, Beton, account_of, open_beton
from simclr_dist.data.beton.shard_files import SUFFIX, beton_files, names_beton
from simclr_dist.data.beton.shard_set import open_data
from simclr_dist.data.beton.writer import PagedWriter, Record
from simclr_dist.data.classes import check_labels
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import PixelFormat
from simclr_dist.source_text import shown, source_text

Progress = Callable[[int, int], None]
_SETTINGS = ("split", "mode", "quality", "max_side", "for_views", "quality_of_shrunk")


@dataclass(frozen=True)
class Written:
    """A file that was written. sentence: how the classes of its parts fit, where they are not the same."""

    path: Path
    num_samples: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    num_bytes: int
    fingerprint: str
    sentence: str = ""


def merge(
    out: str | Path, sources: Sequence[str | Path], *, overwrite: bool = False, progress: Progress | None = None
) -> Written:
    """Writes the samples of .beton files, folders of them or patterns to one file, in this order.

    Classes are matched by name. Raises DataError; `out` is then as it was before.
    """
    out = Path(out)
    paths = _files_of(sources)
    return _write_together(out, choose_target(out, paths, overwrite), paths, progress, {})


def append(
    file: str | Path,
    source: str | Path,
    *,
    options: SourceOptions | None = None,
    on_error: OnError = "refuse",
    progress: Progress | None = None,
) -> Written:
    """Adds the samples of `source` behind those of a file, which is replaced when all is on disk.

    source: .beton files, or anything that `prepare` takes: images are then stored as those of the file are.
    options, on_error: as of `prepare`. The numbers of samples and classes that are there stay as they are.
    Raises DataError; `file` is then as it was before, as it is after a kill.
    """
    file, options = Path(file), options or SourceOptions()
    with open_beton(file) as beton:
        sidecar, kept = beton.sidecar, beton.kept
    target = Path(os.path.realpath(file))
    if names_beton(source):
        if options != SourceOptions():
            raise DataError(f"{source}: is a .beton file already; how images are read was said when it was prepared")
        return _append(file, target, _files_of([source]), sidecar, progress)
    if kept is not None and not options.keeps_channels:
        options = replace(options, channels="keep")
    with unfinished_folder(target) as folder:
        new = folder / f"new{SUFFIX}"
        settings = _settings_of(sidecar, kept)
        prepare(source, new, options=options, on_error=on_error, progress=progress, **settings)
        return _append(file, target, (new,), sidecar, None, str(source))


def _append(
    file: Path,
    target: Path,
    new: tuple[Path, ...],
    sidecar: dict[str, Any],
    progress: Progress | None,
    source: str | None = None,
) -> Written:
    known = {part["fingerprint"]: part["file"] for part in _parts_of(sidecar)}
    for path in new:
        if os.path.samefile(path, target):
            raise DataError(f"{path}: is the file itself; its samples would be in it twice")
        with open_beton(path) as beton:
            before = known.get(beton.content_fingerprint)
        if before is not None:
            raise DataError(f"{file}: has the samples of {source or path} already: they were added from {before}")
    return _write_together(file, target, (target, *new), progress, {new[0]: source} if source else {})


def _settings_of(sidecar: dict[str, Any], kept: PixelFormat | None) -> dict[str, Any]:
    """Of `prepare`, for images that are stored as those of a file are. A sidecar may be anybody's."""
    settings = {
        key: sidecar.get(key)
        for key in ("quality", "max_side", "for_views")
        if isinstance(sidecar.get(key), int) and not isinstance(sidecar.get(key), bool)
    }
    if kept is not None:  # samples as they are have no quality
        settings.pop("quality", None)
        return dict(settings)
    if sidecar.get("quality_of_shrunk", sidecar.get("quality")) != sidecar.get("quality"):
        settings.pop("quality", None)  # chosen by for_views, as that of shrunk images is
    return {"mode": sidecar["mode"], **settings} if sidecar.get("mode") in get_args(Mode) else dict(settings)


def split(
    file: str | Path, num_shards: int, out: str | Path | None = None, *, progress: Progress | None = None
) -> tuple[Path, tuple[Written, ...]]:
    """Writes a file's samples, in their order, to `num_shards` files, which differ by one sample at most.

    out: the folder of the shards, which appears when all are complete; None: `train-shards` for `train.beton`.
    Raises DataError; there is then no folder.
    """
    _refuse_url(file)
    file = Path(file)
    stem = file.name.removesuffix(SUFFIX)
    folder = Path(out) if out is not None else file.with_name(f"{stem}-shards")
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: is there already, and is not overwritten; choose another folder with --out")
    if not folder.parent.is_dir():
        raise DataError(f"{folder}: there is no folder {folder.parent}")
    with open_beton(file) as beton:
        if not 1 <= num_shards <= beton.num_samples:
            raise DataError(f"--shards {num_shards}: {file} holds {beton.num_samples:,} samples; take no more")
        records = _Records(beton)
        try:
            with unfinished_folder(folder) as hidden:
                written = []
                for k, ids in enumerate(np.array_split(np.arange(beton.num_samples), num_shards)):
                    name = f"{stem}-{k:05}-of-{num_shards:05}{SUFFIX}"
                    with unfinished(hidden / name) as new:
                        keeps = beton.kept is not None
                        writer = PagedWriter(new, len(ids), keeps=keeps, page_bytes=beton.page_size)
                        for sample in ids.tolist():
                            writer.add(records.read(sample, int(beton.labels[sample])))
                        if k == num_shards - 1:
                            records.finish()
                        said = _said_of_shard(beton, k, num_shards, len(ids))
                        written.append(_commit(writer, new, hidden / name, beton.class_names, beton.kept, said))
                    if progress is not None:
                        progress(int(ids[-1]) + 1, beton.num_samples)
                publish(hidden, folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return folder, tuple(replace(one, path=folder / one.path.name) for one in written)


# ---------------------------------------------------------------------------------------------------------------------
# Copying


class _Records:
    """The records of a file, each read once and in order."""

    def __init__(self, beton: Beton) -> None:
        if beton.other_fields:
            others = ", ".join(beton.other_fields)
            raise DataError(f"{beton.path}: has fields besides image and label, which would be lost: {others}")
        self._beton = beton
        self._table = beton.records(np.arange(beton.num_samples))
        self._digest = RecordsDigest()

    def read(self, sample: int, label: int) -> Record:
        """label: of the record to write. Raises DataError."""
        offset, size, mode, height, width = self._table[sample].tolist()
        try:
            content = os.pread(self._beton.fd, size, offset)
        except OSError as error:
            raise DataError(f"{self._beton.path}: sample {sample}: cannot be read: {error.strerror}") from None
        if len(content) < size:
            raise DataError(f"{self._beton.path}: sample {sample}: the file ends before it does")
        self._digest.update(content)
        return Record(content, mode, height, width, label)

    def finish(self) -> str:
        """The fingerprint of the content. Raises DataError where it is not what was written."""
        beton = self._beton
        digest = self._digest.finish(beton.images, beton.record_bytes, beton.labels, beton.kept)
        if beton.written_digest not in (None, digest):
            raise DataError(
                f"{beton.path}: its pixels or labels have changed since it was written; "
                f"`simclr-dist inspect {beton.path} --verify` tells more"
            )
        return content_fingerprint(digest, beton.class_names)


def _files_of(sources: Sequence[str | Path]) -> tuple[Path, ...]:
    for source in sources:
        _refuse_url(source)
    files = beton_files(source_text(map(str, sources)))
    if files is None:
        raise DataError(f"{sources[0]}: is no .beton file; make one with `simclr-dist prepare {sources[0]} OUT.beton`")
    return files.paths


def _refuse_url(source: str | Path) -> None:
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(source), re.IGNORECASE):  # a Path has one slash
        raise DataError(f"{source}: lies elsewhere; shards are split and joined on this machine, so fetch it first")


def _write_together(
    out: Path, target: Path, paths: tuple[Path, ...], progress: Progress | None, sources: dict[Path, str]
) -> Written:
    """sources: what to call files that will be gone."""
    with open_data(source_text(map(str, paths))) as data:
        num_samples, names, maps, sentence = data.num_samples, data.class_names, data.class_maps, data.sentence
        page_bytes, kept = data.page_size, data.kept
    parts: list[tuple[dict[str, Any], float]] = []
    lineage: list[dict[str, Any]] = []
    try:
        with unfinished(target) as new:
            writer = PagedWriter(new, num_samples, keeps=kept is not None, page_bytes=page_bytes)
            for path, to_number in zip(paths, maps, strict=True):
                with open_beton(path) as beton:
                    check_labels(str(path), beton.class_names, beton.labels)
                    records, labels = _Records(beton), to_number(beton.labels)
                    for sample, label in enumerate(labels.tolist()):
                        writer.add(records.read(sample, label))
                        if progress is not None:
                            progress(len(writer.rows), num_samples)
                    fingerprint = records.finish()
                    parts.append((beton.sidecar, _num_pixels_of_statistics(beton)))
                    called = sources.get(path, str(path))
                    own = {"file": called, "num_samples": beton.num_samples, "fingerprint": fingerprint}
                    lineage += _parts_of(beton.sidecar) or [own]
            said = {**_said_together(parts), "source": shown(source_text(part["file"] for part in lineage))}
            account = _account_together(out, [sidecar for sidecar, _ in parts], sentence)
            said |= {**account, **({} if kept is None else kept.to_json()), "parts": lineage}
            return _commit(writer, new, target, names, kept, said, sentence, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None


def _commit(
    writer: PagedWriter,
    file: IO[bytes],
    target: Path,
    class_names: tuple[str, ...],
    kept: PixelFormat | None,
    said: dict[str, Any],
    sentence: str = "",
    out: Path | None = None,
) -> Written:
    """said: of the file, besides what its tables tell. out: what to call it."""
    writer.finish(kept)
    file.flush()
    with open_beton(file.name) as beton:
        table_fingerprint = beton.fingerprint
    labels = writer.labels
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names)).tolist()
    fingerprint = content_fingerprint(writer.records_digest, class_names)
    sidecar = {
        "num_samples": len(writer.rows),
        "class_names": list(class_names),
        "class_counts": counts,
        "fingerprint": table_fingerprint,
        "content_fingerprint": fingerprint,
        "num_jpeg": sum(row.mode == JPEG for row in writer.rows),
        "largest_side": max(max(row.height, row.width) for row in writer.rows),
        **said,
    }
    commit(file, target, sidecar)
    size = target.stat().st_size
    return Written(out or target, len(writer.rows), class_names, tuple(counts), size, fingerprint, sentence)


# ---------------------------------------------------------------------------------------------------------------------
# What the JSON file beside it says


def _parts_of(sidecar: dict[str, Any]) -> list[dict[str, Any]]:
    """The files that one was merged from, as its sidecar tells; a sidecar may be anybody's."""
    found = sidecar.get("parts")
    parts = found if isinstance(found, list) else []
    return [
        part
        for part in parts
        if isinstance(part, dict) and isinstance(part.get("file"), str) and isinstance(part.get("fingerprint"), str)
    ]


def _said_together(parts: list[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    """Settings that are the same in all sidecars, what was counted added up, and mean and deviation of all pixels."""
    sidecars = [sidecar for sidecar, _ in parts]
    said = {key: sidecars[0][key] for key in _SETTINGS if _is_same(key, sidecars)}
    sides = [side for sidecar in sidecars if sidecar.get("num_shrunk") and (side := prepared_for(sidecar)) is not None]
    if sides:
        said["for_views"] = min(sides)  # larger views find some of its images small
    for key in ("num_shrunk", "num_kept_jpeg"):
        said[key] = sum(n for n in (sidecar.get(key) for sidecar in sidecars) if isinstance(n, int))
    for key in ("skipped", "damaged"):
        said[key] = [line for sidecar in sidecars if isinstance(sidecar.get(key), list) for line in sidecar[key]]
    return said | _statistics_together(parts)


def _is_same(key: str, sidecars: Sequence[dict[str, Any]]) -> bool:
    return all(key in sidecar and sidecar[key] == sidecars[0][key] for sidecar in sidecars)


def _num_pixels_of_statistics(beton: Beton) -> float:
    """How many pixels `prepare` has looked at for mean and deviation (see `Encoded`)."""
    rows, width = beton.images["height"].astype(np.int64), beton.images["width"].astype(np.int64)
    return float((np.where(beton.images["mode"] == JPEG, -(-rows // 16), rows) * width).sum())


def _statistics_together(parts: list[tuple[dict[str, Any], float]]) -> dict[str, list[float]]:
    """Of all pixels, from those of the parts; empty where one does not tell."""
    try:
        mean, std = (np.array([sidecar[key] for sidecar, _ in parts], np.float64) for key in ("mean", "std"))
        share = np.array([count for _, count in parts])[:, None] / sum(count for _, count in parts)
        if mean.shape != std.shape or mean.ndim != 2 or not np.isfinite([mean, std]).all():
            return {}
    except (KeyError, TypeError, ValueError):
        return {}
    together = (share * mean).sum(0)
    deviation = np.sqrt(np.maximum((share * (std**2 + mean**2)).sum(0) - together**2, 0))
    return {"mean": together.round(6).tolist(), "std": deviation.round(6).tolist()}


def _account_together(out: Path, sidecars: Sequence[dict[str, Any]], sentence: str) -> dict[str, Any]:
    accounts = [account_of(sidecar) for sidecar in sidecars]
    known = [account for account in accounts if account is not None]
    if len(known) < len(accounts):
        return {}
    layout = f"{len(known):,} .beton files in one" + (f"; {sentence}" if sentence else "")
    return {"account": together(known, str(out), layout).to_json()}


def _said_of_shard(beton: Beton, k: int, num_shards: int, num_samples: int) -> dict[str, Any]:
    """Mean, deviation and settings are those of the whole file. So are other counts, which the first shard has."""
    whole = beton.sidecar
    said = {key: whole[key] for key in (*_SETTINGS, "channels", "bits", "rgb", "mean", "std") if key in whole}
    if k == 0:
        said |= {key: whole[key] for key in ("num_shrunk", "num_kept_jpeg", "skipped", "damaged") if key in whole}
    split_from = {"file": beton.path.name, "fingerprint": beton.content_fingerprint, "shard": k, "shards": num_shards}
    account = beton.account
    if account is not None:
        layout = f"shard {k + 1:,} of {num_shards:,} of {beton.path.name}: {account.layout}"
        others = (account.left_out, account.notes) if k == 0 else ((), ())
        said["account"] = Account(str(beton.path), layout, num_samples, *others).to_json()
    return {**said, "source": whole.get("source", str(beton.path)), "split_from": split_from}
