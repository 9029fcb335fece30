"""A page of all settings, from simclr_dist/config.schema.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).parents[2] / "simclr_dist" / "config.schema.json"
# As one writes a configuration.
SECTIONS = ("data", "augment", "model", "loss", "optim", "train", "evaluation", "checkpoint", "monitor", "timeout")
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
INTRODUCTION = """# All settings

A configuration is a YAML file with these sections; on a command line a setting is `section.name=value`. `simclr-dist
config show CONFIG` prints all of them with their values, `simclr-dist config schema` prints the schema from which this
page is made, for editors that complete YAML. Null means: the program chooses, or there is none, as the description
says. [Choosing settings](guides/choosing_settings.md) says what to choose.
"""


def page() -> str:
    schema = json.loads(SCHEMA.read_text())
    found = {name for name, value in schema["properties"].items() if "$ref" in value}
    if found != set(SECTIONS):
        raise ValueError(f"SECTIONS does not list {found ^ set(SECTIONS)}, or lists what is gone")
    plain = {name: value for name, value in schema["properties"].items() if "$ref" not in value}
    parts = [INTRODUCTION, "## Outside of sections\n", _table(plain, set(schema["else"]["required"]), "")]
    for name in SECTIONS:
        parts += _section(schema, name, schema["properties"][name], _needed(schema, name))
    return "\n".join(parts)


def _section(schema: Mapping[str, Any], name: str, value: Mapping[str, Any], needed: set[str]) -> list[str]:
    """A section, and after it the sections inside it."""
    about = schema["$defs"][value["$ref"].rpartition("/")[2]]
    settings = {key: inner for key, inner in about["properties"].items() if "$ref" not in inner}
    parts = [f"## {name}\n", about.get("description", "") + "\n", _table(settings, needed, f"{name}.")]
    for key, inner in about["properties"].items():
        if "$ref" in inner:
            parts += _section(schema, f"{name}.{key}", inner, set())
    return parts


def _needed(schema: Mapping[str, Any], section: str) -> set[str]:
    rule = schema["else"]["properties"].get(section, {})
    return {*rule.get("required", ()), *rule.get("then", {}).get("required", ())}


def _table(properties: Mapping[str, Any], needed: set[str], prefix: str) -> str:
    rows = ["| Setting | Type | Default | Allowed | |", "|---|---|---|---|---|"]
    for name, value in sorted(properties.items()):
        default = "needed" if name in needed else f"`{json.dumps(value['default'])}`" if "default" in value else ""
        cells = [f"`{prefix}{name}`", _type(value), default, _allowed(value), value.get("description", "")]
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _forms(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(value.get("anyOf", [value]))


def _type(value: Mapping[str, Any]) -> str:
    names = []
    for form in _forms(value):
        name = "text" if form.get("type") == "string" else form.get("type", "text")
        if name == "array":
            items = form.get("items") or {}
            name = f"list of {_type(items)}" if items else "list"
        names.append({"object": "mapping"}.get(name, name))
    return " or ".join(dict.fromkeys(names))


def _allowed(value: Mapping[str, Any]) -> str:
    found = []
    for form in _forms(value):
        found += [f"`{choice}`" for choice in form.get("enum", ())]
        found += [f"{sign} {form[key]}" for key, sign in BOUNDS.items() if key in form]
        found += [f"`{form['pattern']}`"] if "pattern" in form else []
    return ", ".join(found)
