"""The command line: a recipe, a file or a run, and overrides `--section.field VALUE` → a `Config`."""

import argparse
import ast
import dataclasses
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch import near_misses
from launch.command import Parser
from launch.recipes import RECIPES
from pipeline.config import Config, config_json
from pipeline.config.config_json import foreign_keys
from pipeline.errors import ConfigError
from pipeline.run_dir import run_folder
from pipeline.snn.networks import own_source
from pipeline.snn.networks.archs import ARCHS


@functools.cache
def field_docs(section: type) -> dict[str, str]:
    """The string under each field of a configuration class, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            assert isinstance(following.value, ast.Constant)
            docs[statement.target.id] = str(following.value.value)
    return docs


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise ValueError(text)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


_boolean.__name__ = "true or false"
_numbers.__name__ = "list of numbers"
_CONVERTERS = {int: int, float: float, str: str, bool: _boolean, tuple[float, ...]: _numbers}
_METAVARS = {bool: "true|false", tuple[float, ...]: "number,…"}


def preparation(name: str) -> list[str]:
    """The lines of the command that makes a recipe's shards, from its docstring; empty where that has no command."""
    lines = (inspect.getdoc(RECIPES[name]) or "").splitlines()
    first = next((at for at, line in enumerate(lines) if line.startswith("python -m data_prep ")), len(lines))
    last = next((at for at in range(first, len(lines)) if not lines[at].endswith("\\")), first)
    return lines[first : last + 1]


def _description() -> str:
    """The help text: each recipe, what it trains and the command that makes its data; and the networks."""
    lines = [
        "Trains a recipe on the ranks that the deepspeed launcher starts.",
        "",
        "recipes, and what makes their data:",
    ]
    makers: dict[str, str] = {}
    for name, recipe in RECIPES.items():
        lines += [
            f"  {name}",
            *textwrap.wrap(
                (recipe.__doc__ or "").splitlines()[0], 100, initial_indent=" " * 6, subsequent_indent=" " * 6
            ),
        ]
        maker = makers.setdefault(recipe().data.path, name)
        lines += [f"      {line}" for line in (preparation(name) or [f"the data of {maker}"])]
    networks = textwrap.wrap(", ".join(ARCHS), 100, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*lines, "", "networks (--model.arch):", *networks])


def _parser(default: Config) -> Parser:
    parser = Parser(
        prog="launch/train.py",
        usage="deepspeed [LAUNCHER'S OPTIONS] launch/train.py (--recipe NAME | --config FILE | --resume RUN)\n"
        "           [--section.field VALUE …]",
        description=_description(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", choices=sorted(RECIPES), metavar="NAME", help="the configuration to start from")
    parser.add_argument(
        "--config", metavar="FILE", help="start from a configuration in a file instead: the config.json of a run"
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this folder, with its own configuration; the folder may have been moved",
    )
    parser.add_argument(
        "--dry-run",
        type=int,
        nargs="?",
        const=0,
        metavar="RANKS",
        help="only show configuration, steps, parameters and memory for so many ranks [those of this machine]",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    for field in dataclasses.fields(Config):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            group = parser.add_argument_group(field.name)
            docs = field_docs(type(value))
            for inner in dataclasses.fields(value):
                _add(group, f"{field.name}.{inner.name}", inner.type, getattr(value, inner.name), docs[inner.name])
        elif field.name != "recipe":
            _add(parser, field.name, field.type, value, field_docs(Config)[field.name])
    return parser


def _add(group, name: str, kind, default: object, doc: str) -> None:
    metavar = _METAVARS.get(kind, kind.__name__)
    text = f"{doc} [{default}]".replace("%", "%%")
    names = [f"--{name}"] if "." in name else sorted({f"--{name.replace('_', '-')}", f"--{name}"})
    group.add_argument(*names, dest=name, type=_CONVERTERS[kind], default=argparse.SUPPRESS, metavar=metavar, help=text)


class Command(NamedTuple):
    config: Config
    dry_run: int | None
    """Ranks to describe the run for, without training; 0: as many as this machine would start. None: train."""


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that `arguments` ask for; raises as `command` does."""
    return command(arguments).config


def command(arguments: Sequence[str]) -> Command:
    """What `arguments` ask for.

    Raises:
        ConfigError: an unknown option or recipe, or an impossible value; the message is one line.
        SystemExit: after `--help`.
    """
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="digits")
    name = first.parse_known_args(arguments)[0].recipe
    namespace, unknown = _parser(RECIPES.get(name, RECIPES["digits"])()).parse_known_args(arguments)
    if unknown:
        raise ConfigError(_unknown(unknown))
    given = vars(namespace)
    dry_run, _ = given.pop("dry_run"), given.pop("local_rank")
    if dry_run is not None and dry_run < 0:
        raise ConfigError(f"--dry-run {dry_run} is not allowed; use a number of ranks, or none for this machine's")
    sources = {name: source for name in SOURCES if (source := given.pop(name)) is not None}
    if len(sources) != 1:
        found = " and ".join(f"--{name}" for name in sources)
        why = f"{found} exclude each other" if sources else "nothing to train"
        recipes = ", ".join(sorted(RECIPES))
        raise ConfigError(f"{why}; give one of --recipe NAME, --config FILE and --resume RUN (recipes: {recipes})")
    (kind, source), *_ = sources.items()
    config = _configured(*SOURCES[kind](source, given), given)
    if kind == "resume":
        run_folder.refuse_differences(config, run_folder.read_config(Path(config.run_dir)) or {})
    return Command(config, dry_run)


def option_names() -> list[str]:
    """Names of all options, without the leading dashes."""
    return [*SOURCES, "dry-run", *sorted(config_json.names() - {"recipe"})]


def _unknown(words: Sequence[str]) -> str:
    """The message for unknown options: each with the option that was probably meant."""
    options = [word.partition("=")[0] for word in words if re.match(r"--?[^\W\d]", word)]
    if not options:
        is_recipe = words[0] in RECIPES
        hint = (
            f"did you mean --recipe {words[0]}?" if is_recipe else "a value follows an option, as in --train.epochs 2"
        )
        return f"{words[0]!r} stands alone; {hint}"
    said = []
    for option in dict.fromkeys(options):
        meant = near_misses.answer(option, option_names())
        hint = (
            f"did you mean {meant}?" if meant.startswith("--") else meant or "nothing is like it; -h lists all options"
        )
        said.append(f"{option} is not an option; {hint}")
    return " · ".join(said)


def _of_recipe(name: str, given: dict[str, object]) -> tuple[dict, str]:
    return RECIPES[name]().to_dict(), ""


def _of_file(name: str, given: dict[str, object]) -> tuple[dict, str]:
    path = Path(name) / "config.json" if os.path.isdir(name) else Path(name)
    document = config_json.read(path, "name the config.json of a run")
    if document is None:
        raise ConfigError(f"--config {name}: there is no such file; name the config.json of a run")
    unknown, missing = foreign_keys(document)
    missing = [name for name in missing if name not in given]
    if unknown or missing:
        mend = ["remove what is not known"] if unknown else []
        mend += [f"add what is missing, in the file or as options, as in --{missing[-1]} VALUE"] if missing else []
        raise ConfigError(
            f"{path} is not a configuration of this version: {config_json.said(unknown, missing)}; "
            + " and ".join(mend)
        )
    return document, f"{path}: "


def _of_run(name: str, given: dict[str, object]) -> tuple[dict, str]:
    run = Path(name)
    if "run_dir" in given:
        raise ConfigError(
            f"--resume {name} names the run's folder: leave --run_dir out, or start another run there with --config "
            f"{run}/config.json"
        )
    document = run_folder.read_config(run)
    if document is None:
        above = next((folder for folder in run.parents if os.path.isfile(folder / "config.json")), None)
        instead = f"did you mean --resume {above}?" if above else "name a run's folder, as runs/digits"
        raise ConfigError(f"--resume {name}: there is no run (no config.json in it); {instead}")
    unknown, missing = foreign_keys(document)
    if unknown or any(name not in given for name in missing):
        raise run_folder.of_another_version(run, unknown, missing)
    return {**document, "run_dir": str(run)}, f"{run}/config.json: "


SOURCES = {"recipe": _of_recipe, "config": _of_file, "resume": _of_run}
"""What a configuration starts from: by option, the function that reads it, given the option's value and the overrides.
It returns the configuration as a dict, and the file to name in errors."""


def _configured(document: dict, where: str, given: dict[str, object]) -> Config:
    """The configuration in `document` with the overrides `given`. Errors in other fields begin with `where`."""
    for option, value in given.items():
        section, _, field = option.rpartition(".")
        if section:
            document = {**document, section: {**document.get(section, {}), field: value}}
        else:
            document = {**document, field: value}
    try:
        config = config_json.config_of(document)
        own_source.check(config.model.arch)
        return config
    except ConfigError as error:
        own = str(error).partition("=")[0] in given
        raise ConfigError(str(error) if own else f"{where}{error}") from None
