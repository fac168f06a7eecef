"""Answers in any order, rows on disk in the input's: every one once, whenever the process ends."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress

import msgspec

from headway.batch.durable import AppendedFile
from headway.batch.ledger import Answer, HeldRows, Ledger, State, named_error
from headway.batch.sinks import JsonLinesSink, Sink
from headway.errors import ConfigError, HeadwayError, RowFailed

CHUNK_BYTES = 1 << 24
"""How much may be written before it is committed, however soon."""


class Output:
    """One pass: put() answers, commit() from time to time, finish() at the end.

    prepare() says what a commit is to be, make_durable() does the slow part of it, perhaps on another thread: until
    it has returned neither is called again. tally, next_index: of the rows written in order. kept: rows that the ledger
    has, which are not lost if the process ends now. failure: with ``stops``, the first row that failed, as soon as one
    is known: put() raises it once all rows before it are written.
    """

    def __init__(
        self, sink: Sink, ledger: Ledger | None, state: State, *, errors: JsonLinesSink | None, stops: bool
    ) -> None:
        self.sink, self._ledger, self._errors = sink, ledger, errors
        self.tally, self.next_index = state.tally, state.rows
        self.failure: Answer | None = None
        self._state, self._stops = state, stops
        self._held = HeldRows(sink.path, sink, state.held) if sink.partial else None
        self._waiting = {i: a for i, a in (self._held.load() if self._held else {}).items() if i >= state.rows}
        self._ready: list[Answer] = []
        self.kept = self._keeping = self.following + len(self._waiting)
        self._digest = state.digest
        self._begun = bool(state.rows or state.held)
        self._whole = True
        self._dirty = False
        self._uncommitted = 0
        if not state.complete:
            for file, length in self._files(state):
                _restore(file, length)

    def _files(self, state: State) -> list[tuple[AppendedFile, int]]:
        """That rows are appended to, and how long they are."""
        files = [(self.sink.partial, state.output), (self._errors and self._errors.partial, state.errors)]
        return [(file, length) for file, length in files if file]

    @property
    def waiting(self) -> Mapping[int, Answer]:
        """Done, ahead of their turn."""
        return self._waiting

    @property
    def following(self) -> int:
        """The first row that is not done."""
        return self.next_index + len(self._ready)

    @property
    def is_due(self) -> bool:
        return self._uncommitted >= CHUNK_BYTES

    def put(self, answers: Iterable[Answer]) -> None:
        """Raises RowFailed, and ConfigError if the output cannot be written."""
        waiting, ready, following = self._waiting, self._ready, self.following
        for answer in answers:
            if self._stops and answer.error is not None:
                if self.failure is None or answer.index < self.failure.index:
                    self.failure = answer
            elif answer.index == following:
                ready.append(answer)
                following += 1
                while waiting and following in waiting:
                    ready.append(waiting.pop(following))
                    following += 1
            else:
                assert answer.index > following and answer.index not in waiting, f"row {answer.index} came twice"
                waiting[answer.index] = answer
        self._dirty = True
        if len(ready) >= self.sink.chunk:
            self._write()
        if self.failure and self.failure.index == following:
            raise RowFailed(self.failure.error or "")

    def prepare(self) -> State | None:
        """None if there is nothing new, or nothing can be kept."""
        if not self._ledger or not self._held or not self._dirty or not self._whole:
            return None
        self._write()
        with self.disk():
            self._begin()
            held = self._held.add(self._waiting)
        self._dirty, self._uncommitted = False, 0
        self._keeping = self.next_index + len(self._waiting)
        assert self.sink.partial
        self._state = msgspec.structs.replace(
            self._state,
            rows=self.next_index,
            digest=self._digest,
            output=self.sink.partial.length,
            errors=self._errors.partial.length if self._errors else 0,
            tally=msgspec.structs.replace(self.tally),
            held=held,
        )
        return self._state

    def make_durable(self, state: State) -> None:
        assert self._ledger and self._held
        with self.disk():
            for file, _ in self._files(state):
                file.sync()
            self._held.sync()
            self._ledger.save(state)
            self._held.drop_stale()
        self.kept = self._keeping

    def commit(self) -> None:
        state = self.prepare()
        if state:
            self.make_durable(state)

    def finish(self, keep_ledger: bool) -> None:
        """The output appears. Nothing else is left, but a ledger that says so if it is to be kept."""
        self._write()
        assert self._whole and not self._waiting and not self.failure, "a row is missing"
        with self.disk():
            self._begin()
            for file, _ in self._files(self._state):
                file.open()  # there may be no row
        self._dirty, self._state.complete = True, True
        self.commit()
        self.publish(keep_ledger)

    def publish(self, keep_ledger: bool) -> None:
        """Of a state that is complete: what finish() may have left to do."""
        with self.disk():
            self.sink.finish()
            if self._errors:
                self._errors.finish()
            if self._held and self._ledger:
                self._held.remove()
                if not keep_ledger:
                    self._ledger.remove()

    def close(self) -> None:
        """Keeps what is done."""
        with suppress(OSError, HeadwayError):  # what went wrong is being raised already
            self.commit()
        for file, _ in self._files(self._state):
            file.close()
        if self._held:
            self._held.close()

    def _begin(self) -> None:
        """What an earlier job left is there until this one has something to keep."""
        if not self._begun and self._ledger:
            self._begun = True
            self._ledger.save(self._state)

    def _write(self) -> None:
        ready = self._ready
        if not ready:
            return
        content = self._encoded(ready)
        failed = [answer.record for answer in ready if answer.error is not None]
        self._whole = False  # until files and counts agree again
        with self.disk():
            self._begin()
            self.sink.append(content)
            if failed and self._errors:
                self._errors.append(self._errors.encode(failed))
        self._uncommitted += len(content)
        self.next_index, self._digest = ready[-1].index + 1, ready[-1].digest
        for answer in ready:
            self._count(answer)
        self._ready, self._whole = [], True

    def _encoded(self, answers: list[Answer]) -> bytes:
        """A row that cannot be stored fails, alone."""
        try:
            return self.sink.encode([answer.record for answer in answers])
        except Exception:
            for answer in answers:
                self._check(answer)
            return self.sink.encode([answer.record for answer in answers])

    def _check(self, answer: Answer) -> None:
        try:
            self.sink.encode([answer.record])
        except Exception as error:
            if answer.row is None:
                raise
            answer.row.fail(error, "output")
            answer.row.source = {name: value for name, value in answer.row.source.items() if self._stores(name, value)}
            answer.record, answer.error = self.sink.record(answer.row), named_error(answer.row)
            if self._stops:
                self.failure = answer
                del self._ready[answer.index - self.next_index :]
                raise RowFailed(answer.error or "") from None

    def _stores(self, name: str, value: object) -> bool:
        try:
            self.sink.encode([{name: value}])
        except Exception:
            return False
        return True

    def _count(self, answer: Answer) -> None:
        tally = self.tally
        tally.rows += 1
        tally.prompt_tokens += answer.prompt_tokens
        tally.output_tokens += answer.output_tokens
        if answer.error is not None:
            tally.failed += 1
            tally.first_error = tally.first_error or answer.error

    @contextmanager
    def disk(self) -> Generator[None, None, None]:
        """A disk that is full is the user's to mend; a reader that left a pipe is another matter."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ConfigError("output", str(self.sink.path), f"cannot be written: {error.strerror}") from None


def _restore(file: AppendedFile, length: int) -> None:
    there = file.path.stat().st_size if file.path.exists() else 0
    if there < length:
        accepted = f"has {there} bytes, {length} were written; without resume it starts over"
        raise ConfigError("resume", str(file.path), accepted)
    file.length = length
