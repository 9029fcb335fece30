"""The page of `simclr-dist report`. pytest tests/test_report.py"""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_dist import cli
from simclr_dist.checkpoint.files import read_checkpoint
from simclr_dist.config import render_config
from simclr_dist.evaluation.features import Features
from simclr_dist.monitor.events import Figures
from simclr_dist.monitor.log_file import LogFile
from simclr_dist.report.html import Html, element
from simclr_dist.report.insight import confusion, similarities
from simclr_dist.report.page import POLICY, render
from simclr_dist.report.record import Curve, curves_of, read_run
from simclr_dist.run.layout import read_records
from tests.test_evaluate import make_run

EVIL = "<script>alert('x')</script>\"><img src=http://example.org/x>$\\frac{1}$"


class Page(HTMLParser):
    """Tags with their attributes, and the text of everything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], "a tag was left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with every record of a training, and hostile texts in them."""
    run = make_run(tmp_path_factory.mktemp("recorded"))
    checkpoint = read_checkpoint(next((run / "checkpoints").iterdir()))
    (run / "config.yaml").write_text(render_config(checkpoint.config))
    (run / "environment.jsonl").write_text(json.dumps({"git": EVIL, "versions": {"torch": "2.11"}}) + "\n{half")
    (run / "status.json").write_text(json.dumps({"state": EVIL, "step": 7}))
    line = {"step": 7, "method": "linear", "solver": EVIL, "test": "t", "top1": 0.625}
    knn = {"step": 7, "method": "knn", "k": 5, "temperature": 0.1, "train": "d", "test": "t", "train_images": 1200}
    knn["top1"] = 0.5
    lines = [{**knn, "step": 3, "top1": 0.25}, knn, line]  # as a training and a command leave them
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "met')
    for folder, found in (
        ("finetune/0.1_head_seed0", {"method": "finetune", "num_labels": 5000, "top1": 0.375}),
        ("recipe/labels_0.1/student_1", {"method": "distill", "student": EVIL, "top1": 0.3125}),
    ):
        (run / folder).mkdir(parents=True)
        (run / folder / "result.json").write_text(json.dumps(found))
    log = LogFile(run / "log.jsonl", 0)
    for samples_seen in range(8, 64, 8):
        figures = {"train/loss": 3.0 - samples_seen / 64, "speed/images_per_s": 10.0}
        figures |= {"eval/knn_top1": samples_seen / 64, "eval/probe_top1": samples_seen / 128}
        log.show(Figures(figures, samples_seen // 8, samples_seen))
    log.show(Figures({"speed/images_per_s_since_start": 8.0}, 7, 56))
    log.close()
    return run


def report(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *map(str, arguments), "--device", "cpu"])
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def text(recorded: Path) -> str:
    report(recorded)
    return (recorded / "report.html").read_text()


def test_the_page_has_every_section_and_loads_nothing(text: str) -> None:
    page = Page(text)
    headings = {tag["id"] for name, tag in page.tags if name == "section"}
    assert headings >= {"results", "curves", "augmented-pairs", "nearest-neighbours", "map-of-embeddings"}
    assert headings >= {"confusion-of-the-probe", "similarities", "configuration", "environment"}
    sources = [tag["src"] or "" for name, tag in page.tags if name == "img"]
    assert len(sources) >= 2 + 1 + 8 + 2 + 1 + 1  # curves, pairs, neighbours, two maps, confusion, similarities
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", source) for source in sources)
    assert not {"script", "link", "iframe", "object", "base"} & {name for name, _ in page.tags}
    assert POLICY in {tag.get("content") for _, tag in page.tags}
    assert "62.50%" in page.text
    assert "finetune (5000 labels) top-1, finetune/0.1_head_seed037.50%" in page.text
    assert "top-1, recipe/labels_0.1/student_131.25%" in page.text
    assert "resnet_small" in page.text
    assert "no probe" not in page.text


def test_the_results_have_the_last_figures_of_the_training_beside_their_settings(text: str) -> None:
    results = Page(text).text.partition("Results")[2]
    assert "knn (k=5) top-1 on t; T=0.1, 1,200 training images of d50.00% (step 7)" in results
    assert "kNN while training, the last top-187.50%" in results
    assert "online probe, the last top-143.75%" in results
    assert re.search(r"linear probe fitted for this page, to 60 images, top-1[0-9.]+% \(step 7\)", results)
    assert "images/s since its last start, evaluations and saves left out8" in results
    assert "images/s between log lines, median10" in results
    assert "probe of this page" not in text


def test_every_entry_of_the_contents_leads_to_a_section(text: str) -> None:
    tags = Page(text).tags
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    assert links == [f"#{attributes['id']}" for tag, attributes in tags if tag == "section"]
    assert len(links) == 10


def test_what_a_run_says_is_shown_as_text(text: str) -> None:
    assert "<script" not in text
    assert "<img src=http" not in text
    assert Page(text).text.count(EVIL) == 4  # the git id, the state, the solver, the student


def test_runs_stand_side_by_side_and_differences_come_first(recorded: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "$weird_name"
    other.mkdir(parents=True)
    settings = (recorded / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"temperature: [0-9.]+", "temperature: 0.25", settings))
    (other / "log.jsonl").symlink_to(recorded / "log.jsonl")
    out = tmp_path / "both.html"
    report(recorded, other, "--out", out)
    page = Page(out.read_text())
    assert "$weird_name: the page" not in page.text
    assert "no checkpoint in it" in page.text  # why there are no images of the second run
    marked = out.read_text().split('class="marked"')[1].split("</table>")[0]
    assert "loss.temperature" in marked
    assert "model.encoder" not in marked


def test_a_run_without_labels_says_why_there_is_no_probe(recorded: Path) -> None:
    folder = Path(read_checkpoint(next((recorded / "checkpoints").iterdir())).config.data.train)
    report(recorded, "--test", folder / "nowhere", "--out", recorded / "a.html")
    assert "nowhere" in Page((recorded / "a.html").read_text()).text


def test_a_missing_package_is_named(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(recorded)])
    assert ended.value.code == 2
    assert "pip install 'simclr_dist[eval]'" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert f"{tmp_path}: is no run's folder" in capsys.readouterr().err


def curves_of_file(path: Path) -> dict[str, Curve]:
    return curves_of(read_records(path, samples_seen=int))


def test_curves_forget_what_a_resume_took_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for after, losses in ((0, {8: 1.0, 16: 1.0, 24: 1.0}), (8, {16: 2.0})):
        log = LogFile(path, after)
        for samples_seen, loss in losses.items():
            log.show(Figures({"train/loss": loss}, samples_seen // 8, samples_seen))
        log.close()
    assert curves_of_file(path)["train/loss"] == Curve((8, 16), (1.0, 2.0))


def test_curves_come_from_the_log_whatever_the_clock_did_and_without_event_files(tmp_path: Path) -> None:
    lines = [{"samples_seen": 8 * i, "time": 2e9 - i, "train/loss": float(i)} for i in (1, 2, 3)]  # the clock runs back
    lines += [{"samples_seen": 16, "time": 0, "eval/knn_top1": 0.5}, {"samples_seen": 16, "eval/knn_top1": 0.75}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves_of_file(tmp_path / "log.jsonl") == {
        "train/loss": Curve((8, 16, 24), (1.0, 2.0, 3.0)),
        "eval/knn_top1": Curve((16,), (0.75,)),
    }


def test_what_is_not_finite_spoils_no_curve_and_no_median_and_is_said(tmp_path: Path) -> None:
    run = tmp_path / "odd"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    lines = [
        {"samples_seen": i, "speed/images_per_s": speed, "train/loss": None, "speed/memory_peak_gib": odd}
        for i, speed, odd in ((1, 10.0, "x"), (2, None, True), (3, 30.0, [1]), (4, 1e999, {}), (5, 20.0, "y"))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines).replace("Infinity", "1e999")
    text += '{"samples_seen": 6, "train/loss": NaN}\n{"samples_seen": "7", "train/loss": 1}\n{"samp'
    (run / "log.jsonl").write_text(text)
    page = render({"odd": read_run(run)}, {"odd": "no images"}, "")
    assert "images/s between log lines, median20" in Page(page).text
    assert "train/loss, at the end: odd none of 6 values is finite" in Page(page).text
    assert "odd 20 (2 values are not finite)" in Page(page).text
    assert "log.jsonl: 2 damaged lines are left out (lines 7, 8)" in Page(page).text


def test_similarities_separate_pairs_from_the_rest() -> None:
    z = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    positives, negatives = similarities(z)
    unit = (z / z.norm(dim=2, keepdim=True)).numpy()
    expected = [float(unit[0, i] @ unit[1, i]) for i in range(5)]
    np.testing.assert_allclose(positives, expected, atol=1e-6)
    others = [float(unit[0, i] @ unit[1, j]) for i in range(5) for j in range(5) if i != j]
    np.testing.assert_allclose(np.sort(negatives), np.sort(others), atol=1e-6)


def test_confusion_has_true_classes_in_rows() -> None:
    labels = torch.arange(90) % 3
    h = torch.nn.functional.one_hot(labels, 3).float() + 0.01 * torch.randn(90, 3)
    test_labels = torch.tensor([0, 1, 2, 2])
    seen_as = torch.tensor([0, 1, 2, 1])  # the last image of class 2 looks like class 1
    test = Features(torch.nn.functional.one_hot(seen_as, 3).float(), test_labels, torch.arange(4))
    found = confusion(Features(h, labels, torch.arange(90)), test, ("a", "b", "c"), torch.device("cpu"))
    assert found.counts.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert found.top1 == 0.75


def test_elements_escape_texts_and_attributes() -> None:
    made = element("p", "<b>", element("i", "&"), title='"x"')
    assert made == Html('<p title="&quot;x&quot;">&lt;b&gt;<i>&amp;</i></p>')
