"""Dataclasses of settings as command-line options, and back. No library: a start-up of milliseconds is a feature."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from headway.config.args import Kind, kinds, suggestion
from headway.errors import ConfigError, UserError


class UsageError(UserError):
    """The command line cannot be understood."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError, with the nearest known option where one is misspelt, instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_exactly(self, words: list[str]) -> dict[str, Any]:
        """Name to value, of the options that were given."""
        values, unknown = self.parse_known_args(words)
        if unknown:
            self._check_switch(words, unknown[0])
            word = unknown[0].partition("=")[0]
            near = suggestion(word, [flag for action in self._actions for flag in action.option_strings])
            self.error(f"unknown argument {word}{near}")
        return vars(values)

    def _check_switch(self, words: list[str], unknown: str) -> None:
        """A value that follows an option which is yes or no is called that."""
        before = self._option_string_actions.get(words[words.index(unknown) - 1])
        if isinstance(before, argparse.BooleanOptionalAction) and not unknown.startswith("-"):
            self.error(f"argument {'/'.join(before.option_strings)}: takes no value, but {unknown!r} follows")


def json_object(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r}: must be a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{word!r}: must be a JSON object")
    return value


def read_config(words: list[str]) -> list[str]:
    """The words with those of ``--config FILE`` before them, so that the command line has the last say.

    The file is YAML: options by their names, with or without dashes.
    """
    finder = Parser(prog="headway", add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, rest = finder.parse_known_args(words)
    if found.config is None:
        return words
    import yaml

    try:
        with open(found.config) as file:
            given = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("config", found.config, f"cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError("config", found.config, "must be a mapping of options to values")
    return [word for name, value in given.items() for word in _words(str(name), value)] + rest


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no-{name}")]
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return [] if value is None else [f"{flag(name)}={json.dumps(value) if isinstance(value, dict) else value}"]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, owner: type, title: str, skip: Iterable[str] = ()) -> None:
    """Adds one option for each field; a field with ``positional`` in its metadata is a positional argument."""
    group = parser.add_argument_group(title)
    for f in fields(owner):
        if f.name not in skip:
            _add_option(group.add_argument, f, kinds(owner)[f.name])


def _add_option(add: Callable[..., object], f: Field[Any], kind: Kind) -> None:
    text, short, positional = (f.metadata.get(k) for k in ("text", "short", "positional"))
    settings: dict[str, Any] = {"help": _help(f, kind), "default": argparse.SUPPRESS}
    assert text, f"{f.name} has no help text"
    if positional:
        add(f.name, metavar=f.name.upper(), help=text)
        return
    if kind.type is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["type"] = json_object if kind.type is dict else kind.type
        name = "JSON" if kind.type is dict else kind.type.__name__.upper()
        settings["metavar"] = "{" + ",".join(kind.choices) + "}" if kind.choices else name
    names = [n for n in (short, flag(f.name)) if n]
    add(*names, dest=f.name, required=f.default is MISSING, **settings)


def _help(f: Field[Any], kind: Kind) -> str:
    if f.default is MISSING:
        return f"{f.metadata['text']} (required)"
    if f.default is None:
        return f.metadata["text"]
    default = {True: "yes", False: "no"}.get(f.default, f.default) if kind.type is bool else f.default
    return f"{f.metadata['text']} (default: {default})"


def build(owner: type, values: dict[str, Any]) -> Any:
    """An instance from the values that were given; checks them."""
    return owner(**{f.name: values[f.name] for f in fields(owner) if f.name in values})
