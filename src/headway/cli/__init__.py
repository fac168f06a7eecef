"""The command line. ``headway --help`` imports neither torch nor a tokenizer."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING

from headway.errors import HeadwayError, MissingDependencyError, UserError

if TYPE_CHECKING:
    from headway.cli.commands import Command

INTERRUPTED = 130
READER_LEFT = 141


def main(words: list[str] | None = None) -> int:
    """Runs one command.

    Exit status: 0, 1 the engine failed, 2 the user can mend it; as shells say it of signals, 130 interrupted, 141
    nobody reads the output any more.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = _dispatch(sys.argv[1:] if words is None else words)
            sys.stdout.flush()
            return status
    except (UserError, MissingDependencyError) as error:
        print(f"headway: {_one_line(error)}", file=sys.stderr)
        return 2
    except HeadwayError as error:
        print(f"headway: {_one_line(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered goes nowhere, in silence
        return READER_LEFT
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only break into the end of the process
        print("headway: interrupted", file=sys.stderr)
        return INTERRUPTED


def _dispatch(words: list[str]) -> int:
    # Imported where Ctrl-C is heard.
    from headway.cli.commands import COMMANDS
    from headway.cli.options import UsageError
    from headway.config.args import suggestion

    if words[:1] == ["--version"]:
        words = ["version"]
    if not words or words[0] in ("-h", "--help"):
        print(_help(COMMANDS))
        return 0
    command = next((c for c in COMMANDS if words[: len(c.words.split())] == c.words.split()), None)
    if command:
        return command.call(words[len(command.words.split()) :])
    group = [c for c in COMMANDS if c.words.split()[0] == words[0]]
    if group and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(_help(group))
        return 0
    asked = " ".join(words[:2] if group else words[:1])
    near = suggestion(asked, [c.words for c in COMMANDS] + [c.words.split()[0] for c in COMMANDS])
    raise UsageError(f"unknown command {asked}{near} (see headway --help)")


def _help(commands: list[Command] | tuple[Command, ...]) -> str:
    lines = [f"  headway {c.words:<18} {c.text}" for c in commands]
    return "\n".join(["usage:", *lines, "", "headway COMMAND --help shows a command's options."])


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"headway: {message}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


__all__ = ["main"]
