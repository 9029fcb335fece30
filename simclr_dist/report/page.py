"""The page: a section for each topic, with the runs side by side or in one chart."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from simclr_dist.evaluation.score_record import HEADLINES, name_of
from simclr_dist.monitor.speed import LAST_INTERVAL, SINCE_START
from simclr_dist.report import figures
from simclr_dist.report.html import Html, element, figure, join, table
from simclr_dist.report.insight import Insight
from simclr_dist.report.record import Curve, RunRecord
from simclr_dist.run.layout import is_share
from simclr_dist.safe_text import shortened

# In the order of the questions: does it learn, is it healthy, is it fast?
CHARTS = (
    r"train/loss",
    r"eval/.*top1",
    r"train/lr",
    r"health/contrastive_top1",
    r"health/[hz]_rankme",
    r"health/similarity_.*",
    r"drift/.*",
    r"train/grad_norm",
    r"speed/images_per_s",
    r"speed/data_wait_share",
    r"speed/memory_peak_gib",
)
# Nothing is loaded from anywhere and no script runs, whatever the names and texts of a run contain.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CSS = Html("""
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --mark: #f5b70055 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere }
h2 { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1rem }
nav { display: flex; flex-wrap: wrap; gap: 0 1em }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)) }
.grid > * { min-width: 0 }
.grid.side { grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)) }
figure { margin: 0 0 .75rem }
img { display: block; height: auto; width: 100% }
img.pixels { image-rendering: pixelated }
figcaption, .note { font-size: .875rem; opacity: .8; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top }
tbody th { font-weight: normal; opacity: .8 }
td { min-width: 6rem; overflow-wrap: anywhere }
table.marked td { background: var(--mark) }
summary { cursor: pointer; margin-top: 1rem }
""")


def render(runs: Mapping[str, RunRecord], insights: Mapping[str, Insight | str], written: str) -> str:
    """The whole page. runs: by the name to show. insights: of each, or why it has none. written: date and version."""
    sections = [
        ("Results", _results(runs, insights)),
        ("Curves", _curves(runs)),
        ("Augmented pairs", _side_by_side(insights, _pairs)),
        ("Nearest neighbours", _side_by_side(insights, _neighbours)),
        ("Map of embeddings", _side_by_side(insights, _map)),
        ("Confusion of the probe", _side_by_side(insights, _confusion)),
        ("Similarities", _side_by_side(insights, _similarities)),
        ("Configuration", _comparison({name: run.settings for name, run in runs.items()})),
        ("History", _history(runs)),
        ("Environment", _comparison({name: run.environment for name, run in runs.items()})),
    ]
    title = " · ".join(runs)
    anchors = [title.lower().replace(" ", "-") for title, _ in sections]
    body = [
        element("h1", title),
        element("p", f"Report of {len(runs)} run{'s' if len(runs) > 1 else ''}, {written}", class_="note"),
        element(
            "nav",
            *(element("a", name, href=f"#{anchor}") for (name, _), anchor in zip(sections, anchors, strict=True)),
        ),
    ]
    for (name, content), anchor in zip(sections, anchors, strict=True):
        body.append(element("section", element("h2", name), content, id=anchor))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", CSS),
    )
    return "<!doctype html>\n" + element("html", head, element("body", *body), lang="en") + "\n"


def _results(runs: Mapping[str, RunRecord], insights: Mapping[str, Insight | str]) -> Html:
    rows: dict[str, dict[str, str]] = {}
    for name, run in runs.items():
        facts = {"state": f"{run.status.state} at step {run.status.step}" if run.status else "unknown"}
        for evaluation in run.evaluations:
            key, words = HEADLINES.get(evaluation["method"], ("top1", "top-1"))
            facts[name_of(evaluation, words)] = f"{_share(evaluation.get(key))} (step {evaluation['step']})"
        for folder, found in run.classifiers.items():
            kind = (
                f"to {found.get('student')}"
                if found.get("method") == "distill"
                else f"{found.get('num_labels')} labels"
            )
            facts[f"{found.get('method')} ({kind}) top-1, {folder}"] = _share(found.get("top1"))
        if run.remarks:
            facts["left out"] = "; ".join(run.remarks)
        insight = insights[name]
        if isinstance(insight, Insight) and insight.confusion is not None:
            fitted = f"linear probe fitted for this page, to {insight.confusion.fitted_to:,} {insight.noun}s, top-1"
            facts[fitted] = f"{insight.confusion.top1:.2%} (step {insight.step})"
        last = {tag: curve.values[-1] for tag, curve in run.curves.items() if curve.values}
        for tag, label in (("eval/knn_top1", "kNN while training"), ("eval/probe_top1", "online probe")):
            if tag in last:
                facts[f"{label}, the last top-1"] = f"{last[tag]:.2%}"
        for tag, label, form in (
            (SINCE_START, f"{run.noun}s/s since its last start, evaluations and saves left out", "{:,.0f}"),
            (LAST_INTERVAL, f"{run.noun}s/s between log lines, median", "{:,.0f}"),
            ("speed/data_wait_share", "time waiting for data, median", "{:.1%}"),
            ("speed/memory_peak_gib", "peak memory, GiB", "{:.2f}"),
        ):
            if tag in last:
                pick = max if "peak" in tag else statistics.median
                facts[label] = form.format(last[tag] if tag == SINCE_START else pick(run.curves[tag].values))
        for key, value in facts.items():
            rows.setdefault(key, {})[name] = value
    return table(["", *runs], [[key, *(values.get(name, "–") for name in runs)] for key, values in rows.items()])


def _share(value: Any) -> str:
    return f"{value:.2%}" if is_share(value) else "no accuracy"


def _curves(runs: Mapping[str, RunRecord]) -> Html:
    tags = list(dict.fromkeys(tag for run in runs.values() for tag in run.curves))
    charts = []
    for pattern in CHARTS:
        for tag in sorted(tag for tag in tags if re.fullmatch(pattern, tag)):
            curves = {name: run.curves[tag] for name, run in runs.items() if tag in run.curves}
            last = ", ".join(f"{name} {_end_of(curve)}" for name, curve in curves.items())
            drawn = {name: curve for name, curve in curves.items() if curve.values}
            chart = figures.curve_chart(drawn, tag) if drawn else None
            text = f"at the end: {last}"
            charts.append(figure(chart, tag, text) if chart else element("p", f"{tag}, {text}", class_="note"))
    return element("div", *charts, class_="grid") if charts else element("p", "log.jsonl has no figures.")


def _end_of(curve: Curve) -> str:
    if not curve.values:
        return f"none of {curve.not_finite:,} values is finite"
    return f"{curve.values[-1]:.4g}" + (f" ({curve.not_finite:,} values are not finite)" if curve.not_finite else "")


def _side_by_side(insights: Mapping[str, Insight | str], show: Any) -> Html:
    parts = []
    for name, insight in insights.items():
        content = element("p", insight, class_="note") if isinstance(insight, str) else show(insight)
        parts.append(element("div", *([element("h3", name)] if len(insights) > 1 else []), content))
    return element("div", *parts, class_="grid side") if len(parts) > 1 else join(parts)


def _pairs(insight: Insight) -> Html:
    if insight.pairs is None:
        return _missing(insight, "no pairs")
    if not isinstance(insight.pairs, Tensor):
        return table(
            ["view 0", "view 1"], [[shortened(text) for text in pair] for pair in zip(*insight.pairs, strict=True)]
        )
    caption = "Two views of an image, one above the other, as the network sees them in training."
    return figure(figures.pair_image(insight.pairs), "augmented pairs", caption, "pixels")


def _neighbours(insight: Insight) -> Html:
    if not insight.neighbours:
        return _missing(insight, "no neighbours")
    rows = []
    for row in insight.neighbours:
        query, *others = row.classes
        caption = f"{query}: {others.count(query)} of {len(others)} neighbours share its class"
        if isinstance(row.shown, Tensor):
            rows.append(figure(figures.row_image(row.shown), "query and neighbours", caption, "pixels"))
        else:
            texts = [shortened(text) for text in row.shown]
            head, nearest = [texts[0], query], [list(pair) for pair in zip(texts[1:], others, strict=True)]
            rows.append(element("figure", table(head, nearest), element("figcaption", caption)))
    return join(
        [
            element("p", f"First the query, then the nearest by cosine of h, step {insight.step}.", class_="note"),
            element("div", *rows, class_="grid"),
        ]
    )


def _map(insight: Insight) -> Html:
    found = insight.map
    if found is None:
        return _missing(insight, "no map")
    maps = [
        figure(
            figures.map_chart(points, found.labels, found.class_names, name), name, f"{len(points):,} {insight.noun}s"
        )
        for name, points in (("PCA of h", found.pca), ("t-SNE of h", found.tsne))
    ]
    return element("div", *maps, class_="grid")


def _confusion(insight: Insight) -> Html:
    found = insight.confusion
    if found is None:
        return _missing(insight, "no probe")
    caption = (
        f"Linear probe on h, fitted to {found.fitted_to:,} training {insight.noun}s: top-1 {found.top1:.2%} of "
        f"{int(found.counts.sum()):,} test {insight.noun}s. Cells: % of the true class."
    )
    return element("div", figure(figures.confusion_chart(found), "confusion matrix", caption), class_="grid")


def _similarities(insight: Insight) -> Html:
    n = len(insight.positives)
    of_h = "".join(f" {note}." for note in insight.notes if note.startswith("similarities"))
    caption = (
        f"{n} {insight.noun}s in evaluation mode. Positives: two views of one, mean {insight.positives.mean():.3f}; "
        f"negatives: views of different {insight.noun}s, mean {insight.negatives.mean():.3f}.{of_h}"
    )
    return element("div", figure(figures.similarity_chart(insight), "similarities", caption), class_="grid")


def _missing(insight: Insight, what: str) -> Html:
    return element("p", *(note for note in insight.notes if note.startswith(what)), class_="note")


def _comparison(columns: Mapping[str, Mapping[str, Any]]) -> Html:
    """All settings; with several runs those that differ come first, marked."""
    keys = list(dict.fromkeys(key for settings in columns.values() for key in settings))
    rows = {key: [str(settings.get(key, "–")) for settings in columns.values()] for key in keys}
    everything = table(["", *columns], [[key, *values] for key, values in rows.items()])
    if len(columns) == 1:
        return everything
    different = [[key, *values] for key, values in rows.items() if len(set(values)) > 1]
    first = table(["", *columns], different, class_="marked") if different else element("p", "No difference.")
    return join([first, element("details", element("summary", "everything"), everything)])


def _history(runs: Mapping[str, RunRecord]) -> Html:
    """Where each run started, went back, and changed its settings."""
    return element(
        "div",
        *(
            element(
                "div",
                element("h3", name),
                element("div", element("pre", "\n".join(run.story) or "not recorded"), class_="scroll"),
            )
            for name, run in runs.items()
        ),
    )


def names_of(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Runs by name, or by path where two have the same name."""
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else str(run.path): run for run in runs}
