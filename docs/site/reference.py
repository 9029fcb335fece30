"""A page of the public names, from their signatures and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from pydantic import BaseModel

# What guides and examples import, and what comes with it; tests/test_site.py compares.
NAMES = {
    "Training": "pretrain Run api.Evaluation trainer.Trainer train.main cli.main errors.UserError errors.ConfigError "
    "errors.DataError errors.CheckpointError",
    "Views in a loop of your own": "load_views data.loading.ready_views.Views data.loading.view_loader.build_loader "
    "data.Batch views.augment.Augment data.randomness.keys data.randomness.uniform data.randomness.permutation",
    "Loss": "loss.NTXentLoss loss.nt_xent loss.SupConLoss loss.contrastive.ContrastiveLoss loss.NonFiniteError "
    "optim.micro_batch.backward_in_micro_batches",
    "Network": "network.simclr.build_model network.simclr.SimCLR network.encoders.register "
    "network.batchnorm.convert_to_global_batch_norm",
    "Kinds of data": "kinds.register kinds.Kind kinds.arrays.ArrayKind kinds.arrays.Rows",
    "Processes": "parallel.distributed.world parallel.distributed.World parallel.distributed.all_gather "
    "parallel.distributed.all_reduce_sum_ parallel.distributed.all_reduce_max_ parallel.distributed.barrier",
    "Evaluation": "evaluation.knn.knn_top1 evaluation.linear.linear_probe evaluation.features.Features",
    "Configuration": "config.load_config config.Config config.DataConfig config.AugmentConfig config.ModelConfig "
    "config.LossConfig config.OptimConfig config.TrainConfig config.EvaluationConfig",
}
INTRODUCTION = """# Python reference

The names on which your code may build. [From Python](guides/python.md), [Loss and loader in your
loop](guides/your_own_loop.md) and [Extending](guides/extending.md) show them at work; other names may change.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for heading, names in NAMES.items():
        parts += [f"## {heading}\n", *(_entry(f"simclr_dist.{name}") for name in names.split())]
    return "\n".join(parts)


def public_names() -> set[str]:
    return {f"simclr_dist.{name}" for names in NAMES.values() for name in names.split()}


def _entry(name: str) -> str:
    module, _, short = name.rpartition(".")
    found = getattr(import_module(module), short)
    if not inspect.isclass(found):
        return _directive("function", name + _signature(found), _text(found), 4)
    if issubclass(found, BaseModel):
        return _directive("class", name, f"{_text(found)}\n\nIts fields: [all settings](settings.md).", 4)
    heading = "exception" if issubclass(found, BaseException) else "class"
    members = "\n".join(_members(found))
    signature = "" if heading == "exception" else _signature(found)
    return _directive(heading, name + signature, f"{_text(found)}\n\n{members}", 4)


def _members(owner: type) -> Iterator[str]:
    """Public methods and properties of `owner` that have a docstring, those of its bases in this package included."""
    seen: set[str] = set()
    for base in owner.__mro__:
        if not base.__module__.startswith("simclr_dist"):
            continue
        for name, member in vars(base).items():
            if name.startswith("_") or name in seen or not getattr(member, "__doc__", None):
                continue
            seen.add(name)
            if isinstance(member, property):
                yield _directive("property", name, _text(member), 3)
            elif inspect.isfunction(member):
                yield _directive("method", name + _signature(member, leave_out=("self",)), _text(member), 3)


def _directive(kind: str, signature: str, text: str, fence: int) -> str:
    return f"{'`' * fence}{{py:{kind}}} {signature}\n\n{text}\n{'`' * fence}\n"


class _AsWritten:
    """An annotation that is shown as it stands in the source."""

    def __init__(self, annotation: Any) -> None:
        self._text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    def __repr__(self) -> str:
        return self._text


def _signature(found: Any, leave_out: Iterable[str] = ()) -> str:
    def shown(annotation: Any) -> Any:
        return annotation if annotation is inspect.Parameter.empty else _AsWritten(annotation)

    signature = inspect.signature(found)
    parameters = [
        parameter.replace(annotation=shown(parameter.annotation))
        for parameter in signature.parameters.values()
        if parameter.name not in leave_out
    ]
    returned = inspect.Signature.empty if inspect.isclass(found) else shown(signature.return_annotation)
    return str(signature.replace(parameters=parameters, return_annotation=returned))


def _text(found: Any) -> str:
    """A docstring as Markdown: a line that explains parameters becomes an item, blocks of code stay."""
    own = found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__
    docstring = inspect.cleandoc(own or "")
    if isinstance(found, type) and docstring.startswith(f"{found.__name__}("):  # made by dataclass
        return ""
    lines = []
    for line in docstring.splitlines():
        if line.startswith("    "):  # code, or an item that goes on
            lines.append(line)
        elif explained := re.match(r"([a-z]\w*(?:, \w+)*): (?=\S)", line):
            lines += ["", f"- **{explained[1]}**: {_escaped(line[explained.end() :])}"]
        elif re.match(r"(Raises|Returns|Yields) ", line):
            lines += ["", _escaped(line)]
        else:
            lines.append(_escaped(line))
    return "\n".join(lines).strip("\n")


def _escaped(line: str) -> str:
    """Stars outside of code are multiplications, not emphasis."""
    return "".join(
        part if i % 2 else re.sub(r"([*<])", r"\\\1", part) for i, part in enumerate(re.split(r"(`[^`]*`)", line))
    )
