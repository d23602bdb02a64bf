"""The command line: a recipe's name and overrides `--section.field VALUE` → a `Config`."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from launch.command import Parser
from launch.recipes import RECIPES
from pipeline.config import Config
from pipeline.errors import ConfigError


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


def _parser(default: Config) -> Parser:
    recipes = "\n".join(f"  {name:<25}{(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items())
    parser = Parser(
        prog="launch/train.py",
        usage="deepspeed [LAUNCHER'S OPTIONS] launch/train.py --recipe NAME [--section.field VALUE …]",
        description=f"Trains a recipe on the ranks that the deepspeed launcher starts.\n\nrecipes:\n{recipes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, choices=sorted(RECIPES), help="the configuration to start from")
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
    """Only describe the run, on so many ranks; 0 takes those that this machine would start. None trains."""


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
    config = RECIPES.get(name, RECIPES["digits"])()
    parser = _parser(config)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.refuse_unknown(unknown)
    sections: dict[str, dict] = {}
    for option, value in vars(namespace).items():
        section, _, field = option.rpartition(".")
        sections.setdefault(section, {})[field] = value
    top = {k: v for k, v in sections.pop("", {}).items() if k not in ("recipe", "local_rank", "dry_run")}
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    dry_run = namespace.dry_run
    if dry_run is not None and dry_run < 0:
        raise ConfigError(f"--dry-run {dry_run} is not allowed; use a number of ranks, or none for this machine's")
    return Command(dataclasses.replace(config, **top, **changed), dry_run)
