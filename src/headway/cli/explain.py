"""headway config explain: every resolved setting, its value, its reason."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

from headway.config import Choice, EngineArgs, machine_facts, resolve
from headway.executor import executor_of
from headway.models.describe import describe
from headway.models.source import resolve_source

if TYPE_CHECKING:
    from headway.cli.commands import ExplainOptions

NAME_WIDTH, VALUE_WIDTH, REASON_WIDTH = 30, 24, 66


def run(options: ExplainOptions, args: EngineArgs) -> int:
    path = resolve_source(args.model, args.revision, load_format=args.load_format)
    config = resolve(args, describe(path), machine_facts(), str(path))
    if ":" in config.parallel.executor:
        executor_of(config.parallel.executor)
    print(as_json(config.choices) if options.json else as_table(config.choices))
    return 0


def as_json(choices: tuple[Choice, ...]) -> str:
    return json.dumps({c.name: {"value": c.value, "reason": c.reason} for c in choices}, indent=2)


def as_table(choices: tuple[Choice, ...]) -> str:
    rows = [("setting", "value", "reason"), *((c.name, _shown(c.value), c.reason) for c in choices)]
    return "\n".join(line for row in rows for line in _lines(*row))


def _lines(name: str, value: str, reason: str) -> list[str]:
    """One row; a value or reason too long for its column goes on below."""
    reasons = textwrap.wrap(reason, REASON_WIDTH)
    first = f"{name:<{NAME_WIDTH}}{value:<{VALUE_WIDTH}}"
    indent = " " * (NAME_WIDTH + VALUE_WIDTH)
    if len(value) < VALUE_WIDTH:
        return [(first + reasons[0]).rstrip(), *(indent + r for r in reasons[1:])]
    return [first.rstrip(), *(indent + r for r in reasons)]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
