"""From YAML and `key=value` to a checked Config, and back.

    config = load_config("configs/cifar10_resnet18_100ep.yaml", ["train.epochs=5"], world_size=2)
    config = load_config({"name": "mine", "data": {...}, ...}, {"train.epochs": 5})

All problems of a file are reported together, each with its place, so that one look at the message is enough.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from simclr_dist.config.bounded_yaml import BoundedLoader, read_text
from simclr_dist.config.explain import KeyPath, cross_checks, explain, kind_of
from simclr_dist.config.schema import Config, Section
from simclr_dist.errors import ConfigError

_S = TypeVar("_S", bound=Section)


class _Yaml(BoundedLoader):
    """YAML without YAML 1.1's surprises: `no` and `on` are text, 0123 and 12:30 are not numbers."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - the base class declares it so


_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)?\.[0-9_]*(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)

PATHS: tuple[KeyPath, ...] = (
    *(("data", "train"), ("data", "test"), ("evaluation", "train")),
    *(("runs_dir",), ("resume",)),
)
"""Settings in which `~` and environment variables are expanded."""
_PLAIN_TAGS = ("map", "seq", "str", "bool", "int", "float", "null")


@dataclass
class _Reader:
    """Turns YAML into plain values and remembers where each key was written."""

    origins: dict[KeyPath, str]
    problems: list[str]

    def read_file(self, path: Path) -> dict[str, Any]:
        try:
            node = yaml.compose(read_text(path), Loader=_Yaml)
        except FileNotFoundError:
            raise ConfigError([f"{path}: no such file"]) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"{path}: cannot be read: {error}"]) from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise ConfigError([f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}"]) from None
        if node is None and not path.is_file():
            raise ConfigError([f"{path}: empty; a pipe can be read only once, so save the configuration as a file"])
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError([f"{path}: expected `key: value` lines, found {kind_of(node)}"])
        return self._value(node, (), lambda n: f"{path}:{n.start_mark.line + 1}")

    def read_override(self, text: str) -> tuple[KeyPath, Any] | None:
        origin = f"command line `{text}`"
        key, equals, raw = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
            self.problems.append(f"{origin}: expected key=value, for example train.epochs=100")
            return None
        try:
            node = yaml.compose(raw, Loader=_Yaml)
        except yaml.YAMLError as error:
            self.problems.append(f"{origin}: the value is not valid YAML: {getattr(error, 'problem', error)}")
            return None
        path = tuple(key.split("."))
        self.origins[path] = origin
        return path, None if node is None else self._value(node, path, lambda _: origin)

    def read_python(self, values: Mapping[str, Any], place: str, within: KeyPath = ()) -> list[tuple[KeyPath, Any]]:
        """Single values, by their path, of sections in dictionaries or with dotted names."""
        found: list[tuple[KeyPath, Any]] = []
        for name, value in values.items():
            path = (*within, *str(name).split("."))
            self.origins[path] = place
            if isinstance(value, Mapping):
                found += [(path, {}), *self.read_python(value, place, path)]
            else:
                plain = str(value) if isinstance(value, Path) else value
                found.append((path, list(plain) if isinstance(plain, tuple) else plain))
        return found

    def _value(self, node: yaml.Node, path: KeyPath, place: typing.Callable[[yaml.Node], str]) -> Any:
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
            self.problems.append(f"{place(node)}: {'.'.join(path)}: the tag {node.tag} is not allowed")
            return None
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            merged = [value for key, value in node.value if _is_merge(key)]
            own = [(key, value) for key, value in node.value if not _is_merge(key)]
            for key_node, value_node in own:
                key = str(key_node.value)
                here = (*path, key)
                if key in values:
                    self.problems.append(
                        f"{place(key_node)}: {'.'.join(here)}: written twice (first at {self.origins[here]}); keep one"
                    )
                    continue
                self.origins[here] = place(key_node)
                values[key] = self._value(value_node, here, place)
            for value_node in merged:
                values = self._merged(value_node, path, place) | values
            return values
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*path, str(i)), place) for i, child in enumerate(node.value)]
        try:
            return _Yaml("").construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError):  # a tag such as !!bool on a value that is none
            self.problems.append(f"{place(node)}: {'.'.join(path)}: {node.value!r} does not fit its tag {node.tag}")
            return None

    def _merged(self, node: yaml.Node, path: KeyPath, place: typing.Callable[[yaml.Node], str]) -> dict[str, Any]:
        """The keys that `<<: *other` or `<<: [*one, *other]` brings; of two sections the first one's count."""
        sections = node.value if isinstance(node, yaml.SequenceNode) else [node]
        values: dict[str, Any] = {}
        for section in sections:
            if not isinstance(section, yaml.MappingNode):
                self.problems.append(
                    f"{place(section)}: <<: takes a section or a list of them, found {kind_of(section)}"
                )
                continue
            before = dict(self.origins)
            values = self._value(section, path, place) | values
            self.origins |= before  # a key of the section itself keeps its place
        return values


def _is_merge(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.style is None


def _expand_paths(values: dict[str, Any], reader: _Reader) -> None:
    """In place: `~` or `~user` at the start of a path, and `$NAME` or `${NAME}` as a whole part of it.

    Elsewhere in a name a dollar is a dollar. Only settings that are paths are looked at.
    """
    for key_path in PATHS:
        section: Any = values
        for key in key_path[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        written = section.get(key_path[-1]) if isinstance(section, dict) else None
        if not isinstance(written, str) or not re.search(r"^~|\$", written):
            continue
        try:
            section[key_path[-1]] = _expanded(written)
        except KeyError as error:
            where = reader.origins.get(key_path, "the configuration")
            reader.problems.append(f"{where}: {'.'.join(key_path)}: {written}: {error.args[0]}")


def _expanded(written: str) -> str:
    """Raises KeyError with a sentence."""

    def value_of(part: str) -> str:
        name = re.fullmatch(r"\$(?:(\w+)|\{(\w+)\})", part)
        if name is None:
            return part
        value = os.environ.get(name[1] or name[2])
        if not value:
            raise KeyError(f"the environment variable {name[1] or name[2]} is not set")
        return value

    home = os.path.expanduser(written)
    if written.startswith("~") and home == written:
        raise KeyError(f"there is no user {written.partition('/')[0][1:]!r} whose home directory that could be")
    return "/".join(value_of(part) for part in home.split("/"))


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    world_size: int | None = None,
    check_data: bool = True,
) -> Config:
    """The checked configuration of a file, or of values by section, with overrides applied in order.

    overrides: `key=value` as on the command line, or values by name: {"train.epochs": 5} or {"train": {"epochs": 5}}.
    world_size: number of processes that will train; the global batch must divide over them.
    check_data: refuse data files that do not exist.
    Raises ConfigError with all problems at once.
    """
    reader = _Reader({}, [])
    path = Path("the configuration") if isinstance(source, Mapping) else Path(source)
    if isinstance(source, Mapping):
        values: dict[str, Any] = {}
        changes = reader.read_python(source, "the dictionary")
    else:
        values, changes = reader.read_file(path), []
    if isinstance(overrides, Mapping):
        changes += reader.read_python(overrides, "the arguments")
    else:
        changes += [parsed for parsed in map(reader.read_override, overrides) if parsed is not None]
    for key_path, value in changes:
        _set(values, key_path, value)
    _expand_paths(values, reader)
    problems = reader.problems
    config: Config | None = None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [explain(detail, reader.origins, path) for detail in error.errors()]
    problems += cross_checks(values, reader.origins, path, world_size, check_data)
    if problems or config is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def _set(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    """A section is added to, not replaced."""
    *sections, key = path
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    if value != {} or not isinstance(values.get(key), dict):
        values[key] = value


def load_section(path: Path, kind: type[_S]) -> _S:
    """Another YAML file of the project, read as strictly. Raises ConfigError with all problems at once."""
    reader = _Reader({}, [])
    values = reader.read_file(path)
    problems, found = reader.problems, None
    try:
        found = kind.model_validate(values)
    except ValidationError as error:
        problems += [explain(detail, reader.origins, path, kind) for detail in error.errors()]
    if problems or found is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found


def render_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_PlainDumper, sort_keys=False, width=110)


class _PlainDumper(yaml.SafeDumper):
    """Writes floats with a point, so that 1e-06 stays a number for every YAML reader."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "." not in text and "e" in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_PlainDumper.add_representer(float, _float)
