"""From YAML and `key=value` to a checked Config, and back.

    config = load_config("configs/cifar10_resnet18_100ep.yaml", ["train.epochs=5"], world_size=2)
    config = load_config({"name": "mine", "data": {...}, ...}, {"train.epochs": 5})

All problems of a file are reported together, each with its place, so that one look at the message is enough.

A file may begin from others: `_base_: other.yaml`, or a list of them, relative to the file that says so. Sections are
merged key by key; a later base wins over an earlier one, a file over its bases, and `key=value` over all.
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
from simclr_dist.config.schema import BASE, Config, Section
from simclr_dist.errors import ConfigError
from simclr_dist.safe_text import printable

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
    *(("data", "train"), ("data", "test"), ("evaluation", "train"), ("data", "cache_dir")),
    *(("runs_dir",), ("resume",)),
)
"""Settings in which `~` and environment variables are expanded."""
MAX_BASES = 8  # in a row
MAX_FILES = 64  # bases of bases can stand for billions
_PLAIN_TAGS = ("map", "seq", "str", "bool", "int", "float", "null")


@dataclass
class _Reader:
    """Turns YAML into plain values and remembers where each key was written."""

    origins: dict[KeyPath, str]
    problems: list[str]
    _num_files: int = 0

    def read_file(self, path: Path) -> dict[str, Any]:
        """Of this file alone: what it begins from stays in it as `_base_`."""
        self._num_files += 1
        node = _compose(path)
        return self._value(node, (), lambda n: f"{path}:{n.start_mark.line + 1}")

    def read_with_bases(self, path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
        """above: the files that led here, outermost first."""
        return self.add_bases(self.read_file(path), path.parent, (*above, path))

    def add_bases(self, values: dict[str, Any], folder: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
        """`values` over those of the files in its `_base_`; `self.origins` follows. folder: where names begin."""
        if BASE not in values:
            return values
        written, own = values.pop(BASE), self.origins
        place = own.pop((BASE,))
        names = written if isinstance(written, list) else [written]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ConfigError([*self.problems, f"{place}: {BASE}: expected the name of a file, or a list of them"])
        found: dict[str, Any] = {}
        origins: dict[KeyPath, str] = {}
        for name in names:
            self.origins = {}
            _set(found, (), self.read_with_bases(self._base(name, place, folder, above), above))
            origins |= self.origins
        _set(found, (), values)
        self.origins = origins | own
        return found

    def _base(self, name: str, place: str, folder: Path, above: tuple[Path, ...]) -> Path:
        """Raises ConfigError unless the file is there and has not led to itself."""
        try:
            path = folder / _expanded(name)
        except KeyError as error:
            raise ConfigError([*self.problems, f"{place}: {BASE}: {name}: {error.args[0]}"]) from None
        way = " -> ".join(map(str, (*above, path)))
        if not os.path.exists(path):
            problem = f"{path} does not exist; a name is relative to the file that it stands in"
        elif any(path.samefile(before) for before in above):
            problem = f"a file cannot begin from itself: {way}"
        elif len(above) > MAX_BASES:
            problem = f"more than {MAX_BASES} files in a row begin from another: {way}"
        elif self._num_files > MAX_FILES:
            problem = f"more than {MAX_FILES} files, each counted as often as another begins from it"
        else:
            return path
        raise ConfigError([*self.problems, f"{place}: {BASE}: {problem}"])

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
        if BASE in path:
            self.problems.append(f"{origin}: {BASE} can only stand in a file")
            return None
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
                if key == BASE and path:
                    self.problems.append(f"{place(key_node)}: {'.'.join(here)}: can only stand at the top of a file")
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


def _compose(path: Path) -> yaml.MappingNode:
    """The nodes of a file. Raises ConfigError."""
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
    return node


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
        names = written if isinstance(written, list) else [written]
        for i, name in enumerate(names):
            if not isinstance(name, str) or not re.search(r"^~|\$", name):
                continue
            try:
                names[i] = _expanded(name)
            except KeyError as error:
                where = reader.origins.get(key_path, "the configuration")
                reader.problems.append(f"{where}: {'.'.join(key_path)}: {name}: {error.args[0]}")
        if isinstance(written, str):
            section[key_path[-1]] = names[0]


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
    return _load(source, overrides, world_size, check_data)[0]


def _load(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any],
    world_size: int | None = None,
    check_data: bool = False,
) -> tuple[Config, dict[KeyPath, str]]:
    """And where each value was written."""
    reader = _Reader({}, [])
    path = Path("the configuration") if isinstance(source, Mapping) else Path(source)
    values: dict[str, Any] = {}
    if isinstance(source, Mapping):
        for key_path, value in reader.read_python(source, "the dictionary"):
            _set(values, key_path, value)
        values = reader.add_bases(values, Path())
    else:
        values = reader.read_with_bases(path)
    if isinstance(overrides, Mapping):
        changes = reader.read_python(overrides, "the arguments")
    else:
        changes = [parsed for parsed in map(reader.read_override, overrides) if parsed is not None]
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
    return config, reader.origins


def _set(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    """A section is added to, key by key, not replaced."""
    for section in path[:-1]:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    for key, inner in {path[-1]: value}.items() if path else value.items():
        if isinstance(inner, dict) and isinstance(values.get(key), dict):
            _set(values[key], (), inner)
        else:
            values[key] = inner


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


def render_with_origins(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> str:
    """The resolved configuration, with the place that each value comes from behind it; defaults have none."""
    config, origins = _load(source, overrides)
    return _with_origins(config.model_dump(mode="json"), origins)


def compose_config(path: Path) -> str | None:
    """A file and all that it begins from as one, nothing else changed; None if it begins from none.

    The program's settings are not checked: that is for the place where the file is used. Raises ConfigError.
    """
    reader = _Reader({}, [])
    if BASE not in reader.read_file(path):
        return None
    reader = _Reader({}, [])
    values = reader.read_with_bases(path)
    if reader.problems:
        raise ConfigError(reader.problems)
    return f"# {path} and what it begins from, as one file.\n" + _with_origins(values, reader.origins)


def _with_origins(values: dict[str, Any], origins: Mapping[KeyPath, str]) -> str:
    lines = yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, width=2**20, allow_unicode=False).splitlines()

    def mark(node: yaml.MappingNode, path: KeyPath) -> None:
        for key, value in node.value:
            here = (*path, str(key.value))
            if isinstance(value, yaml.MappingNode) and value.value:
                mark(value, here)
            elif here in origins:
                last = value.end_mark.line if isinstance(value, yaml.ScalarNode) else key.start_mark.line
                lines[last] += "  # " + printable(origins[here].partition(" `")[0])

    root = yaml.compose("\n".join(lines), Loader=_Yaml)
    if isinstance(root, yaml.MappingNode):
        mark(root, ())
    return "\n".join(lines) + "\n"


class _PlainDumper(yaml.SafeDumper):
    """Writes floats with a point, so that 1e-06 stays a number for every YAML reader."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "." not in text and "e" in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_PlainDumper.add_representer(float, _float)
for (
    _first_letter,
    _resolvers,
) in _Yaml.yaml_implicit_resolvers.items():  # text that `_Yaml` takes for a number is quoted
    for _tag, _pattern in _resolvers:
        _PlainDumper.add_implicit_resolver(_tag, _pattern, [_first_letter])
