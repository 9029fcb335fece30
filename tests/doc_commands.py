"""Holds commands, settings and paths that the documentation shows to the programs they belong to."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from pydantic import BaseModel

from launcher import arguments as launcher
from simclr_dist import cli, train
from simclr_dist.config import Config, load_config
from simclr_dist.errors import ConfigError
from simclr_dist.network.encoders import torchvision_names
from tests.conftest import REPOSITORY

FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^\n|\A)((?: {4}[^\n]*\n)+)", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
OURS = ("simclr-dist ", "simclr-launch ", "python -m ", "python benchmarks/", "python examples/", "accelerate launch ")
# Programs of others: their words are theirs; only paths of ours among them are looked at.
OTHERS = {
    *(
        ".",
        "apptainer",
        "apt",
        "apt-get",
        "bash",
        "cd",
        "conda",
        "export",
        "git",
        "kill",
        "mkdir",
        "nohup",
        "hf",
        "pip",
        "pytest",
    ),
    *("salloc", "sbatch", "scancel", "scontrol", "ssh", "tail", "tensorboard", "touch"),
}
FOLDERS = ("benchmarks", "configs", "docs", "examples", "launcher", "simclr_dist", "slurm", "tests", "tools")
OVERRIDE = re.compile(r"^(?!key=value)[a-z_]+(\.[a-z_]+)*=")
PLACEHOLDER = re.compile(r"…|\b[A-Z]{2,}[A-Z_.]*\b|\[|\||^[NRnk]$")


class WrongDocumentationError(AssertionError):
    """What a page shows does not exist, or would be refused."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block, and of every indented one as language ''."""
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        yield fence[2].strip(), re.sub(rf"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
    for block in INDENTED.finditer(FENCE.sub("", text)):
        yield "", re.sub(r"^ {4}", "", block[1], flags=re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    return INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a block of shell lines, word by word, without comments and the prose beside them."""
    for line in re.sub(r"\\\n *", " ", block).splitlines():
        shown = re.split(r"(?<=\S) {3,}", line.strip())[0]
        for part in re.split(r"&&|\|(?=\s)|;", shown):
            words = shlex.split(part, comments=True)
            while words and re.match(r"^[A-Z_]+=", words[0]):
                del words[0]
            if words and words[0] == "export":
                continue
            if words:
                yield words


def check(words: list[str]) -> None:
    """Raises WrongDocumentationError. Words that stand for the reader's own are let pass."""
    for word in words:
        check_path(word)
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in rest if "=" not in word and word not in targets]
        if unknown:
            raise WrongDocumentationError(f"make has no {unknown}")
    elif program == "simclr-dist":
        against(cli.parser(), rest)
        if rest[:1] == ["export"]:
            check_export(rest)
    elif program == "simclr-launch":
        against(launcher.parser(), rest)
    elif program == "accelerate" and rest[:1] == ["launch"]:
        launch(rest[1:])
    elif program in ("python", "python3"):
        python(rest)
    elif program.startswith("benchmarks/"):
        pass  # its path was looked at
    elif program not in OTHERS:
        raise WrongDocumentationError(f"nobody knows how to check {program!r}; add it to tests/doc_commands.py")


def python(words: list[str]) -> None:
    if words[:1] == ["-m"] and len(words) > 1:
        module(words[1], words[2:])
    elif words and words[0].endswith(".py"):
        script(words[0], words[1:])
    else:
        raise WrongDocumentationError(f"python {' '.join(words)}: not a module or script")


def module(name: str, rest: list[str]) -> None:
    if name == "launcher":
        against(launcher.parser(), rest)
    elif name == "simclr_dist.train":
        against(train.parser(), rest)
    elif name == "simclr_dist.cli":
        against(cli.parser(), rest)
    elif name.startswith(("benchmarks.", "docs.site.")):
        script(f"{name.replace('.', '/')}.py", rest)
    elif name.partition(".")[0] in FOLDERS:
        raise WrongDocumentationError(f"python -m {name}: not a program of ours")


def script(path: str, rest: list[str]) -> None:
    check_path(path)
    source = (REPOSITORY / path).read_text()
    if path.startswith("examples/"):
        against(train.parser() if rest[:1] == ["train"] else cli.parser(), rest[rest[:1] == ["train"] :])
        return
    for word in rest:
        flag = word.partition("=")[0]
        if flag.startswith("--") and f'"{flag}"' not in source:
            raise WrongDocumentationError(f"{path} has no {flag}")


def launch(words: list[str]) -> None:
    if words[-1:] == ["…"] and not {"-m", "--module"} & set(words):  # half a sentence
        against(launch_command_parser(), words)
        return
    try:
        found = launch_command_parser().parse_args([word for word in words if word != "…"])
    except SystemExit:
        raise WrongDocumentationError(f"accelerate refuses {' '.join(words)}") from None
    if found.module:
        module(found.training_script, found.training_script_args)
    else:
        script(found.training_script, found.training_script_args)


def against(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Walks through subcommands and options as argparse does; parses for good when no word is a placeholder."""
    at, settings, config, complete, skip = parser, [], None, True, False
    for word in (word.strip("[]") for word in words):
        if skip:
            skip = False
            continue
        if PLACEHOLDER.search(word):
            complete = False
        if word.startswith("-"):
            flag, _, value = word.partition("=")
            action = at._option_string_actions.get(flag)
            if action is None:
                raise WrongDocumentationError(f"{at.prog} has no {flag}")
            skip = action.nargs is None and not value and action.const is None
            continue
        choices = next((a for a in at._actions if isinstance(a, argparse._SubParsersAction)), None)
        if choices is not None and not PLACEHOLDER.search(word):
            if word not in choices.choices:
                raise WrongDocumentationError(f"{at.prog} has no {word}")
            at = choices.choices[word]
        elif OVERRIDE.match(word):
            settings.append(word)
        elif word.endswith(".yaml"):
            config = word
    for setting in settings:
        check_key(setting.partition("=")[0])
    if complete and words:
        try:
            parser.parse_known_args(words)
        except SystemExit:
            raise WrongDocumentationError(f"{parser.prog} refuses {' '.join(words)}") from None
    known = [setting for setting in settings if not PLACEHOLDER.search(setting)]
    if known:
        check_settings(config, known)


def help_examples(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """(program, words) of every example in the --help of a parser and of its subcommands."""
    examples = re.sub(r"^examples?:", "", parser.epilog or "", flags=re.MULTILINE)
    shown = "\n".join(line for line in map(str.strip, examples.splitlines()) if line.startswith(OURS))
    for words in commands(shown):
        yield parser.prog, words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                yield from help_examples(inner)


def check_export(words: list[str]) -> None:
    """`export runs/NAME`, where configs/NAME.yaml is ours: its encoder must be in that library."""
    name = next((word.removeprefix("runs/") for word in words if word.startswith("runs/")), "")
    shipped = REPOSITORY / "configs" / f"{name}.yaml"
    chosen = words[words.index("--format") + 1] if "--format" in words[:-1] else "torchvision"
    if shipped.is_file() and chosen == "torchvision":
        encoder = load_config(shipped, check_data=False).model.encoder
        if encoder not in torchvision_names():
            raise WrongDocumentationError(f"{' '.join(words)}: {encoder} is none of torchvision's")


def check_settings(config: str | None, settings: list[str]) -> None:
    shipped = REPOSITORY / (config or "")
    path = shipped if config and shipped.is_file() else REPOSITORY / "configs" / "cifar10_demo.yaml"
    try:
        load_config(path, settings, check_data=False)
    except ConfigError as error:
        raise WrongDocumentationError(f"{path.name} with {settings}: {error}") from None


def check_key(dotted: str) -> None:
    """`train.epochs` must be a setting."""
    section: type[BaseModel] | None = Config
    for name in dotted.split("."):
        if section is None or name not in section.model_fields:
            raise WrongDocumentationError(f"there is no setting {dotted}")
        kind = section.model_fields[name].annotation
        section = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def check_path(word: str) -> None:
    """A word that looks like a file of the repository, or `file::test`, must be one."""
    path, _, test = word.partition("::")
    path = path.rstrip("/")
    if path.partition("/")[0] not in FOLDERS or "/" not in path or re.search(r"[*<>…{}=()]|[A-Z]{3,}", path):
        return
    if not (REPOSITORY / path).exists():
        raise WrongDocumentationError(f"there is no {path}")
    if test and f"def {test}(" not in (REPOSITORY / path).read_text():
        raise WrongDocumentationError(f"{path} has no {test}")
