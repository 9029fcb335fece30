"""Names are data: what a run, a file or a class is called is shown, and never obeyed. Secrets are not shown at all.

pytest tests/test_safe_text.py
"""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher import show
from launcher.__main__ import main as launcher_main
from simclr_dist import cli
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.evaluation.embeddings_file import Embeddings, save_embeddings
from simclr_dist.monitor.events import Embedding, Message, Neighbours, Pairs, Summary
from simclr_dist.monitor.projector import write_projector
from simclr_dist.monitor.tensorboard import TensorBoard
from simclr_dist.monitor.terminal import Lines, Live, Quiet
from simclr_dist.parallel.environment import found_in, sentence
from simclr_dist.report.figures import confusion_chart, curve_chart, map_chart
from simclr_dist.report.html import element
from simclr_dist.report.insight import Confusion, Insight
from simclr_dist.report.insight import Neighbours as NeighboursOfReport
from simclr_dist.report.page import _neighbours, _pairs
from simclr_dist.report.record import Curve, read_run
from simclr_dist.run import history, provenance
from simclr_dist.run.layout import RunDir, append_record
from simclr_dist.run.status import write_status
from simclr_dist.safe_text import markdown_cell, mask, masked, message, printable
from simclr_dist.streams import escaped_output, print_table

HOSTILE = [
    "cls[",
    "foo].jpg",
    "data/[v2]/x",
    "[red]cat[/red]",
    "[/]",
    "back\\",
    "\\[bold]x",
    ":smile:",
    "a\x1b[2Jb",
    "a\x1b]0;title\x07b",
    "a\nlauncher: all is well",
    "a\rb",
    "a\tb",
    "\u202egnp.exe",
    "a\u2028b",
    "\x9b31mc",
    "a|b",
    "`code`",
    "<script>alert(1)</script>",
    "![x](http://example.org/y)",
    "=HYPERLINK(1)",
    "@SUM(1)",
    "\udcff.jpg",
    "\ud800",
    "$\\frac{1}$",
    "%s{0}",
    "",
    "猫 🐈",
]
CONTROLS = ("\x1b", "\x07", "\x9b", "\u202e", "\u2028", "\r")


def is_safe(text: str) -> bool:
    text.encode("utf-8")
    return not any(letter in text for letter in CONTROLS) and all(c.isprintable() or c in "\n\t" for c in text)


def shown(name: str, text: str) -> bool:
    """Whether the name is there, letter by letter, whatever was folded or padded around it."""
    return printable(name).replace(" ", "") in "".join(text.split()).replace("│", "")


# ---------------------------------------------------------------------------------------------------------------------
# The home of it


@pytest.mark.parametrize("name", HOSTILE)
def test_every_text_becomes_printable_and_none_is_lost(name: str) -> None:
    text = printable(name)
    assert text.isprintable()
    assert is_safe(text)
    if name.isprintable():
        assert text == name
    others = [printable(other) for other in HOSTILE if other != name]
    assert text not in others


def test_undecodable_bytes_are_shown_as_the_bytes_they_are() -> None:
    name = bytes(range(0x80, 0x100)).decode("utf-8", "surrogateescape")
    assert printable(name) == "".join(f"\\x{byte:02x}" for byte in range(0x80, 0x100))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_an_error_begins_no_line_of_its_own(name: str) -> None:
    for error in (DataError(f"{name}: cannot be read"), ConfigError([f"data.train: {name}", "seed: x"])):
        said = message(error)
        assert is_safe(said)
        assert all(line.startswith("  ") for line in said.split("\n")[1:])
        assert "launcher: all is well" not in said.split("\n")


# ---------------------------------------------------------------------------------------------------------------------
# Terminals


def test_tables_show_every_name_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"{name}<", "1") for name in HOSTILE]
    with escaped_output():
        print_table("title [v2]\x1b[2J", ("name [x]", "n"), rows, "caption [/]\x1b", width=400)
    text = capsys.readouterr().out
    assert is_safe(text)
    for name in HOSTILE:
        assert shown(f"{name}<", text), name
    assert "title [v2]\\x1b[2J" in text
    assert "name [x]" in text
    assert len(text.splitlines()) == len(HOSTILE) + 6  # no name makes a line more


@pytest.mark.parametrize("kind", ["quiet", "lines", "live"])
def test_log_lines_warnings_and_summaries_show_every_name_as_it_is(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made: dict[str, Callable[[], Quiet]] = {
        "quiet": Quiet,
        "lines": lambda: Lines(total_steps=4, first_step=0, steps_per_epoch=2),
        "live": lambda: Live(total_steps=4, first_step=0, steps_per_epoch=2),
    }
    sink = made[kind]()
    for name in HOSTILE:
        sink.show(Message(f"{name}<", is_warning=True))
        sink.show(Message(f"{name}<"))
        sink.show(Summary("end", f"{name}: ends", {f"{name}.": f"{name}<"}))
    sink.close()
    out, err = capsys.readouterr()
    assert is_safe(out + err)
    assert err.splitlines() == [f"warning: {printable(name)}<" for name in HOSTILE]
    if kind != "quiet":
        for name in HOSTILE:
            assert shown(f"{name}<", out), name


def test_what_print_writes_is_safe_and_a_bar_still_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    plain = sys.stdout
    with escaped_output():
        print("a\x1b[2J\tb", "\u202e", file=sys.stdout)
        sys.stdout.writelines(["x\r", "y\n"])
    assert sys.stdout is plain
    assert plain.getvalue() == "a\\x1b[2J\tb \\u202e\nx\\ry\n"


@pytest.mark.parametrize("name", [name for name in HOSTILE if name and "\ud800" not in name])
def test_commands_refuse_odd_arguments_and_paths_in_safe_words(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["config", "show", f"{tmp_path}/{name}.yaml"],
        ["config", "show", "configs/smoke.yaml", f"seed={name}x", f"{name}=1"],
        ["runs", "show", f"{tmp_path}/{name}"],
        ["runs", "list", f"{tmp_path}/{name}"],
        ["evaluate", f"{name}q"],
        [f"{name}q"],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2, arguments
    assert launcher_main(["status", f"{tmp_path}/{name}"]) == 2
    assert launcher_main(["local", f"{tmp_path}/{name}.yaml", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert is_safe(out + err)
    assert "Traceback" not in out + err


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.isprintable() and "/" not in name and name])
def test_runs_of_any_name_are_listed_and_shown(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path / name)
    run.checkpoint(3).mkdir(parents=True)
    run.config.write_text("seed: 0\n")
    write_status(
        run.path, "failed", step=3, reason="crash", message="\n".join(HOSTILE).encode("utf-8", "replace").decode()
    )
    history.record_start(run.path, step=0, changed={"x": ["\x1b[2J", "[red]"]}, world_size=1, **{"from": None})
    for arguments in (["runs", "list", str(tmp_path)], ["runs", "show", str(run.path)]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
    assert launcher_main(["status", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert is_safe(text)
    assert shown(name, text)


# ---------------------------------------------------------------------------------------------------------------------
# Files that others open: the card, the page, TensorBoard, embeddings


@pytest.mark.parametrize("name", HOSTILE)
def test_a_cell_of_markdown_stays_one(name: str) -> None:
    cell = markdown_cell(name)
    assert is_safe(cell)
    assert not set("|<`[]\n") & set(cell)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_page_shows_names_as_text(name: str) -> None:
    made = element("p", name, title=name)
    assert is_safe(made)
    assert "<script" not in made
    assert made.count("<") == 2


def test_charts_take_any_name() -> None:
    curves = {name: Curve((1, 2), (0.5, 1.0)) for name in ("x" * 2_000, *HOSTILE)}
    assert curve_chart(curves, "\x1b[2J$x$").startswith("data:image/svg+xml")
    few = tuple(HOSTILE[8:18])
    points, labels = np.zeros((10, 2)), np.arange(10)
    assert map_chart(points, labels, few, "map")
    assert confusion_chart(Confusion(np.eye(10, dtype=np.int64), few, 1.0, 10))


def test_labels_of_the_projector_are_a_line_each_and_none_is_empty(tmp_path: Path) -> None:
    labels = [*HOSTILE, "   ", "\t", "\ufeff", "a\x85b", "Name\tcount"]
    n = len(labels)
    write_projector(tmp_path, "h", torch.zeros(n, 2), torch.zeros(n, 4, 4, 3, dtype=torch.uint8), labels)
    content = (tmp_path / "projector" / "h" / "labels.tsv").read_text(encoding="utf-8")
    lines = content.split("\n")
    assert lines.pop() == ""
    assert len(lines) == n
    assert "\t" not in content  # a second column would make the first line a header
    assert all(line.strip() for line in lines)
    assert is_safe(content)


def test_texts_in_tensorboard_and_report_are_cells_of_a_table_and_no_markup(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # of a library inside it
        from tensorboard.plugin_util import markdown_to_safe_html
    texts = [*HOSTILE, "<script>alert(1)</script>", "a | b", "[a](http://b)", "_a_ *b* `c`", "# a", "", "long " * 999]
    rows = [texts, texts[::-1]]
    sink = TensorBoard(tmp_path, 0, "text")
    sink.show(Pairs(rows, 8))
    sink.show(Neighbours(rows, 8))
    sink.show(Embedding(torch.zeros(len(texts), 2), texts, texts, 8))
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag, shape in (("data/augmented_pairs", (len(texts), 2)), ("eval/nearest_neighbours", (2, len(texts)))):
        (summary,) = events.Tensors(f"{tag}/text_summary")
        markdown = summary.tensor_proto.string_val[0].decode()
        page = markdown_to_safe_html(markdown)
        assert (page.count("<tr>") - 1, page.count("<td>")) == (shape[0], shape[0] * shape[1])
        assert set(re.findall(r"</?(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td"}
        assert is_safe(markdown)
        assert len(markdown) < 20_000
    head, *lines = (tmp_path / "projector" / "h_0000000008" / "labels.tsv").read_text(encoding="utf-8").splitlines()
    assert head == "label\ttext"
    assert len(lines) == len(texts)
    assert all(line.count("\t") == 1 for line in lines)

    insight = Insight(1, "text", rows, np.ones(2), np.ones(2), [NeighboursOfReport(texts, ("a",) * len(texts))])
    for part in (_pairs(insight), _neighbours(insight)):
        assert set(re.findall(r"</?(\w+)", part)) <= {
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "div",
            "p",
            "figure",
            "figcaption",
        }
        assert is_safe(part)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_embeddings_keep_any_name(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("pyarrow")
    from simclr_dist.evaluation.embeddings_file import load_embeddings

    names = tuple(HOSTILE)
    n = len(names)
    made = Embeddings(np.zeros((n, 2), np.float32), np.zeros(n, np.int64), names, names, "c", "d", "s", "f")
    save_embeddings(tmp_path / f"x{suffix}", made)
    found = load_embeddings(tmp_path / f"x{suffix}")
    if suffix == ".npz":
        assert found.names == names
    else:  # UTF-8, which has no lone surrogates
        assert [name for name in found.names if name in names] == [name for name in names if is_utf8(name)]
        assert len(found.names) == n


def is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Secrets

SECRETS = {
    "HTTPS_PROXY": "http://me:hunter2@proxy:3128",
    "DATABASE_URL": "postgres://me:hunter2@db/x",
    "GITHUB_PAT": "hunter2",
    "REGISTRY_AUTH": "hunter2",
    "SLACK_WEBHOOK": "https://hooks.example.org/hunter2",
    "SLACK_WEBHOOK_URL": "https://hooks.example.org/hunter2",
    "AWS_CREDENTIAL": "hunter2",
    "AWS_CREDENTIALS": "hunter2",
    "SENTRY_DSN": "hunter2",
    "WANDB_API_KEY": "hunter2",
    "HF_TOKEN": "hunter2",
    "MY_PASSWORD": "hunter2",
    "INNOCENT": "Bearer hunter2",
}
PLAIN = {
    "PATH": "/bin:/usr/bin",
    "AUTHOR": "me",
    "NCCL_DEBUG": "INFO",
    "OMP_NUM_THREADS": "4",
    "A": "a@b",
    "PATIENCE": "3",
}


def test_secrets_are_masked_in_variables_command_lines_and_urls() -> None:
    assert "hunter2" not in json.dumps(masked(SECRETS))
    assert masked(PLAIN) == dict(sorted(PLAIN.items()))
    line = " ".join(f"--env {name}={value.replace(' ', '_')}" for name, value in SECRETS.items() if name != "INNOCENT")
    assert "hunter2" not in mask(line)
    plain = (
        " ".join(f"--env {name}={value}" for name, value in PLAIN.items()) + " optim.base_lr=0.3 data.train=a@b.beton"
    )
    assert mask(plain) == plain


def test_the_environment_is_recorded_and_said_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    provenance.record(tmp_path, 0, {})
    assert "ACCELERATE_HF_TOKEN" in (tmp_path / "environment.jsonl").read_text()
    import os

    said = [sentence(os.environ) or "", *map(str, found_in(os.environ))]
    for text in ((tmp_path / "environment.jsonl").read_text(), *said):
        assert "hunter2" not in text
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    append_record(tmp_path / "environment.jsonl", {"environment": SECRETS, "git": "abc"})  # as an older version did
    assert "hunter2" not in str(read_run(tmp_path).environment)


def test_errors_states_and_histories_have_no_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in SECRETS.items():
        error = f"cannot be reached: {name}={value.replace(' ', '_') if name != 'INNOCENT' else value}"
        assert "hunter2" not in message(DataError(error))
        write_status(tmp_path, "failed", step=0, message=error)
        assert "hunter2" not in (tmp_path / "status.json").read_text()
    history.record_start(tmp_path, step=0, changed={"x": [None, SECRETS["DATABASE_URL"]]}, world_size=1)
    assert not [line for line in history.tell(tmp_path) if "hunter2" in line]
    assert "hunter2" not in element("p", SECRETS["DATABASE_URL"])
    assert launcher_main(["status", str(tmp_path)]) == 0
    assert "hunter2" not in capsys.readouterr().out


def test_a_launch_is_shown_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    shown_plan = {
        "start": [["python", "--env=HF_TOKEN=hunter2", f"data.train={SECRETS['HTTPS_PROXY']}"]],
        "agents": [["x", "SENTRY_DSN=hunter2"]],
        "plan": {"setup": ["export GITHUB_PAT=hunter2"]},
    }
    show.print_shown(shown_plan, as_json=True)
    assert "hunter2" not in capsys.readouterr().out
