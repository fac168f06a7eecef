"""What is left of a job that ends early: how far it came, and the rows that were done ahead of their turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from headway import errors
from headway.batch import durable
from headway.batch.readers import InputRow
from headway.batch.sinks import Codec, Record
from headway.errors import ConfigError

VERSION = 1
FRAME = 8  # bytes of a frame's length


class Tally(msgspec.Struct):
    """Of the rows written: how many, how many of them failed, their tokens, and what was wrong with the first."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_error: str | None = None


class Earlier(msgspec.Struct):
    """The output whose failed rows run again: its size in bytes, and when it was written."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Earlier:
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns)


class Held(msgspec.Struct):
    """Which file has the rows done ahead of their turn, and how much of it counts."""

    name: int
    length: int


class State(msgspec.Struct):
    """The input's first ``rows`` rows, whose digest this is, are the first ``output`` bytes of the partial output.

    errors: bytes of the file of failed rows. complete: all rows are there; the output may not have appeared yet.
    """

    fingerprint: dict[str, Any]
    rows: int = 0
    digest: int = 0
    output: int = 0
    errors: int = 0
    tally: Tally = msgspec.field(default_factory=Tally)
    held: Held | None = None
    earlier: Earlier | None = None
    complete: bool = False
    version: int = VERSION


class Ledger:
    """The last committed state, in a file beside the output."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any]) -> None:
        self._path = output.with_name(output.name + ".ledger")
        # As it reads when it comes back.
        self._fingerprint = msgspec.json.decode(msgspec.json.encode(fingerprint, enc_hook=repr))

    def fresh(self, earlier: Earlier | None = None) -> State:
        return State(self._fingerprint, earlier=earlier)

    def load(self) -> State | None:
        """Raises ConfigError if it is of another job: names what is different."""
        try:
            state = msgspec.json.decode(self._path.read_bytes(), type=State)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise ConfigError("resume", str(self._path), f"is no ledger of a job: {error}") from None
        if state.version != VERSION:
            raise ConfigError("resume", str(self._path), f"is of another version of headway: not {VERSION}")
        for name in {**state.fingerprint, **self._fingerprint}:
            before, now = state.fingerprint.get(name), self._fingerprint.get(name)
            if before != now:
                raise ConfigError(
                    name, now, f"must be {before!r}, as when the job began; without resume it starts over"
                )
        return state

    def save(self, state: State) -> None:
        durable.replace(self._path, msgspec.json.encode(state))

    def remove(self) -> None:
        durable.remove(self._path)


@dataclass(slots=True, eq=False)
class Answer:
    """What the output says of a row of the input. error: why it failed, for people.

    row: None if the record was read from an output. copied: it need not be kept, it can be copied again.
    """

    index: int
    digest: int
    record: Record
    error: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    row: InputRow | None = None
    copied: bool = False


class HeldRows:
    """Rows done ahead of their turn, in two files that take turns: appended to one until most of it has gone on."""

    SLACK = 256

    def __init__(self, output: Path, codec: Codec, state: Held | None) -> None:
        self._paths = [output.with_name(f"{output.name}.held-{name}") for name in (0, 1)]
        self._codec = codec
        self._name = state.name if state else 0
        self._file = durable.AppendedFile(self._paths[self._name], state.length if state else 0)
        self._stored: set[int] = set()
        self._stale: Path | None = None

    def load(self) -> dict[int, Answer]:
        """What the state that was given says is there."""
        if not self._file.length:
            return {}
        found: dict[int, Answer] = {}
        for answer in self._read(self._file.path.read_bytes()[: self._file.length]):
            found[answer.index] = answer
        self._stored = set(found)
        return found

    def add(self, waiting: Mapping[int, Answer]) -> Held | None:
        """Those of the rows that wait which are not there yet."""
        kept = {index: answer for index, answer in waiting.items() if not answer.copied}
        if len(self._stored - kept.keys()) > len(kept) + self.SLACK:
            self._turn()
        new = [answer for index, answer in kept.items() if index not in self._stored]
        if new:
            self._file.append(self._frame(new))
            self._stored.update(answer.index for answer in new)
        return Held(self._name, self._file.length) if kept else None

    def sync(self) -> None:
        self._file.sync()

    def drop_stale(self) -> None:
        """Once a state that does not name it is saved."""
        if self._stale:
            durable.remove(self._stale)
            self._stale = None

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        durable.remove(*self._paths)

    def _turn(self) -> None:
        self._file.close()
        self._stale = self._file.path
        self._name = 1 - self._name
        self._file = durable.AppendedFile(self._paths[self._name])
        self._stored = set()

    def _frame(self, answers: list[Answer]) -> bytes:
        about = [(a.index, a.digest, a.error, a.prompt_tokens, a.output_tokens) for a in answers]
        content = msgspec.msgpack.encode((about, self._codec.encode([a.record for a in answers])))
        return len(content).to_bytes(FRAME, "little") + content

    def _read(self, content: bytes) -> Iterator[Answer]:
        at = 0
        while at < len(content):
            size = int.from_bytes(content[at : at + FRAME], "little")
            about, rows = msgspec.msgpack.decode(content[at + FRAME : at + FRAME + size])
            for (index, digest, error, *tokens), record in zip(about, self._codec.decode(rows), strict=True):
                yield Answer(index, digest, record, error, *tokens)
            at += FRAME + size


def answer_of(row: InputRow, record: Record) -> Answer:
    return Answer(row.index, row.digest, record, named_error(row), row.input_tokens, row.output_tokens, row=row)


def named_error(row: InputRow) -> str | None:
    if row.error is None:
        return None
    place, error = row.place + ": ", row.error
    if error.message.startswith(place):
        return error.message
    ours = error.type == "InvalidRow" or hasattr(errors, error.type)  # says what is wrong; a KeyError does not
    return place + (error.message if ours else f"{error.type}: {error.message}")
