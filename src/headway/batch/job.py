"""The local runner: rows of a file through a processor into a file, in order, in bounded memory, once each."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.batch import durable
from headway.batch.feed import DirectFeed, ThreadFeed
from headway.batch.flow import Flow
from headway.batch.ledger import Answer, Earlier, Ledger, State, Tally
from headway.batch.openai_file import RequestReader
from headway.batch.output import Output
from headway.batch.progress import Progress
from headway.batch.pump import Item, Pump, changed
from headway.batch.readers import FORMATS, InputRow, Reader, format_of, open_reader
from headway.batch.sinks import JsonLinesSink, Record, Sink, open_sink
from headway.batch.specs import EngineSpec
from headway.errors import ConfigError

if TYPE_CHECKING:
    from headway.batch.processor import Processor

Source = str | Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """resume: go on where an earlier run of this job ended; a note that it is complete stays beside the output.

    retry_failed: as resume, and rows of the earlier output that failed run again. errors: a JSONL file for rows that
    fail. flush_interval_s: work that a kill may cost. progress: show a bar, where there is a terminal. Formats: jsonl,
    csv, parquet, arrow; by default as the file's name says; openai: requests or results of OpenAI's batch files.
    """

    resume: bool = False
    retry_failed: bool = False
    errors: str | Path | None = None
    flush_interval_s: float = 1.0
    progress: bool = True
    input_format: str | None = None
    output_format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """tally: of all rows of the output. elapsed_s: of this run, after startup_s in which engines came up.

    ran: False if the job had been complete.
    """

    tally: Tally
    ran: bool
    startup_s: float
    elapsed_s: float


class Job:
    """Files and an earlier run's ledger are checked when it is built: before a model is loaded. Raises ConfigError.

    fingerprint: what makes the answers what they are: a job with another one cannot be resumed. stops: at the first
    row that fails, in the input's order, with RowFailed. requests: of an OpenAI batch file, reads its lines as rows.
    """

    def __init__(
        self,
        source: Source,
        target: str | Path,
        options: JobOptions,
        fingerprint: Mapping[str, Any],
        stops: bool = False,
        requests: Callable[[Reader], Reader] | None = None,
    ) -> None:
        self._options, self._stops, self._target = options, stops, str(target)
        _check_formats(options)
        self._kind = options.output_format or ("openai" if options.input_format == "openai" else format_of(target))
        self._reader = open_reader(source, options.input_format)
        if options.input_format == "openai":
            if requests is None:
                raise ConfigError("input_format", "openai", "needs an engine that answers the requests")
            self._reader = requests(self._reader)
        self._sink = open_sink(self._target, self._kind, self._reader.types)
        self._errors = _errors_sink(options.errors)
        _check_distinct(source, self._sink, self._errors)
        self._resumes = options.resume or options.retry_failed
        if self._resumes and not self._sink.partial:
            raise ConfigError("resume", self._target, "must be a file: what went through a pipe cannot be continued")
        if options.retry_failed and self._reader.once:
            raise ConfigError("retry_failed", True, "needs an input that can be read twice: a file")
        known = {**fingerprint, "output_format": self._kind, "errors": self._errors and str(self._errors.path)}
        self._ledger = Ledger(self._sink.path, known)
        self._state = self._load()
        self._output = self._open_output()

    @property
    def tally(self) -> Tally:
        """So far; earlier runs of the job included."""
        return self._output.tally

    @property
    def kept(self) -> tuple[int, Path] | None:
        """Rows that the next run need not answer, and where those are that have had their turn."""
        return (self._output.kept, self._sink.partial.path) if self._sink.partial and self._output.kept else None

    async def run(self, flow: Flow) -> Summary:
        """Opens the flow if there is anything to do, and closes it. Raises ConfigError if another job runs."""
        with self._alone():
            return await self._run(flow)

    @contextmanager
    def _alone(self) -> Generator[None]:
        path = self._sink.path
        if not self._sink.partial:
            yield
            return
        with ExitStack() as lock:
            with self._output.disk():
                free = lock.enter_context(durable.locked(path.with_name(path.name + ".lock")))
            if not free or (self._resumes and self._ledger.load() != self._found):
                raise ConfigError("output", str(path), "is being written by another job")
            yield

    async def _run(self, flow: Flow) -> Summary:
        began = started = time.perf_counter()
        state = self._state
        retries = self._options.retry_failed and state.earlier is None and bool(state.rows or state.held)
        if state.complete:
            self._verify_complete()
            self._output.publish(keep_ledger=True)
            retries = self._options.retry_failed
        items = None if state.complete else self._items()
        if items or (retries and self.tally.failed):
            async with flow:
                started = time.perf_counter()
                if items:
                    await self._pass(flow, items)
                if retries and self.tally.failed:
                    self._begin_retry()
                    await self._pass(flow, self._items())
        ran = started > began
        return Summary(tally=self.tally, ran=ran, startup_s=started - began, elapsed_s=time.perf_counter() - started)

    async def _pass(self, flow: Flow, items: Iterator[Item]) -> None:
        feed = ThreadFeed(items) if self._reader.waits else DirectFeed(items)
        progress = Progress(self._reader.count, self.tally, self._options.progress)
        try:
            pump = Pump(flow, feed, self._output, flow.window, progress.update)
            await pump.run(self._options.flush_interval_s)
            self._output.finish(keep_ledger=self._resumes)
        finally:
            progress.close()
            self._output.close()

    def _load(self) -> State:
        """Where to go on: the earlier run's state if there is one that counts."""
        self._found: State | None = None
        state, output, partial = None, self._sink.path, self._sink.partial
        if self._resumes and partial:
            self._found = state = self._ledger.load()
            if state and state.complete and not (output.exists() or partial.path.exists()):
                state = None
            if state is None and self._options.retry_failed and output.exists():
                state = self._ledger.fresh(Earlier.of(output))
        if state and state.earlier and not state.complete:
            if not output.exists() or Earlier.of(output) != state.earlier:
                raise ConfigError("output", str(output), "is not the one whose failed rows were to run again")
            self._sink = self._sink_for_retry()
        return state or self._ledger.fresh()

    def _begin_retry(self) -> None:
        self._state = self._ledger.fresh(Earlier.of(self._sink.path))
        self._sink = self._sink_for_retry()
        self._errors = _errors_sink(self._options.errors)
        self._output = self._open_output()

    def _sink_for_retry(self) -> Sink:
        """Columns keep the types of the output that is there."""
        types = open_reader(self._sink.path, self._kind).types
        return open_sink(str(self._sink.path), self._kind, types)

    def _open_output(self) -> Output:
        ledger = self._ledger if self._sink.partial else None
        return Output(self._sink, ledger, self._state, errors=self._errors, stops=self._stops)

    def _items(self) -> Iterator[Item]:
        """From where the earlier run ended, once what it read has been found to be the same."""
        items = self._continued()
        if not self._reader.waits:
            next(items)
        return (item for item in items if item is not None)

    def _continued(self) -> Iterator[Any]:
        """None, then the items."""
        rows, state = iter(self._reader), self._state
        _skip(rows, state)
        yield None
        if state.earlier is None:
            yield from rows
        else:
            yield from _copied(rows, islice(self._sink.published(), state.rows, None), self._sink.path)

    def _verify_complete(self) -> None:
        rows = iter(self._reader)
        _skip(rows, self._state)
        if next(rows, None) is not None:
            accepted = f"has more than the {self._state.rows} rows of the job that is complete"
            raise ConfigError("input", str(self._sink.path), accepted)


def run_job(processor: Processor, source: Source, target: str | Path, options: JobOptions) -> Summary:
    """Ctrl-C keeps what is done, and is a KeyboardInterrupt then."""
    stops = not processor.should_continue_on_error
    job = Job(source, target, options, processor.fingerprint(), stops, request_reader(processor))
    return run(job, processor.flow())


def request_reader(processor: Processor) -> Callable[[Reader], Reader] | None:
    """For the first engine that rows go through."""
    config = next((spec.config for spec in processor.specs if isinstance(spec, EngineSpec)), None)
    if config is None:
        return None
    names = config.model_source, config.engine_kwargs.get("served_model_name")
    return partial(RequestReader, task=config.task_type, models=[name for name in names if name])


def run(job: Job, flow: Flow) -> Summary:
    """Where an event loop runs already, as in a notebook, on a thread of its own."""
    started: Future[Callable[[], object]] = Future()
    ended: Future[Summary] = Future()

    async def interruptible() -> Summary:
        task = asyncio.current_task()
        assert task
        loop = asyncio.get_running_loop()
        interrupts: list[None] = []

        def interrupt() -> None:
            """Further ones do not break into the end of the job."""
            if not interrupts:
                task.cancel()
            interrupts.append(None)

        started.set_result(partial(loop.call_soon_threadsafe, interrupt))
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            return await job.run(flow)
        except asyncio.CancelledError:
            if interrupts:
                raise KeyboardInterrupt from None
            raise

    def work() -> None:
        try:
            ended.set_result(asyncio.run(interruptible()))
        except BaseException as error:
            ended.set_exception(error)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(interruptible())
    try:
        threading.Thread(target=work, name="headway-job").start()
        return ended.result()
    except KeyboardInterrupt:  # perhaps before the thread is known to run
        either: set[Future[Any]] = {started, ended}
        if wait(either, 10, FIRST_COMPLETED).done:
            with suppress(RuntimeError):  # it has just ended
                started.result(0)()
            wait({ended})
        raise


def _skip(rows: Iterator[InputRow], state: State) -> None:
    """The rows that are done. Raises ConfigError if they are others."""
    last = deque(islice(rows, state.rows), maxlen=1)
    done = last[0].index + 1 if last else 0
    if done < state.rows:
        raise ConfigError("input", f"{done} rows", f"must have the {state.rows} rows that were answered")
    if last and last[0].digest != state.digest:
        raise changed(state.rows)


def _copied(rows: Iterator[InputRow], records: Iterator[Record], path: Path) -> Iterator[Item]:
    """Rows that failed, or that the earlier output lacks; the others as they are there."""
    for row in rows:
        record = next(records, None)
        if record is None or record.get("error") is not None:
            yield row
        else:
            tokens = (record.get(name) for name in ("num_input_tokens", "num_generated_tokens"))
            given, generated = (count if isinstance(count, int) else 0 for count in tokens)
            yield Answer(row.index, row.digest, record, None, given, generated, copied=True)
    if next(records, None) is not None:
        raise ConfigError("output", str(path), "has more rows than the input: it is of another one")


def _errors_sink(path: str | Path | None) -> JsonLinesSink | None:
    if path is None:
        return None
    sink = open_sink(str(path), "jsonl")
    if not isinstance(sink, JsonLinesSink):
        raise ConfigError("errors", str(path), "must be a file")
    return sink


def _check_distinct(source: object, sink: Sink, errors: JsonLinesSink | None) -> None:
    """A file of rows that are on their way is one of the job's, too."""
    taken = [Path(str(source)).resolve()] if isinstance(source, (str, Path)) and Path(source).is_file() else []
    for name, one in (("output", sink), ("errors", errors)):
        if one and one.partial:
            if one.path in taken or one.partial.path in taken:
                others = "the input" if name == "output" else "the input and the output"
                raise ConfigError(name, str(one.path), f"must be another file than {others}")
            taken += one.path, one.partial.path


def _check_formats(options: JobOptions) -> None:
    known = sorted({"openai", *FORMATS.values()})
    for name, given in (("input_format", options.input_format), ("output_format", options.output_format)):
        if given is not None and given not in known:
            raise ConfigError(name, given, f"must be one of {', '.join(known)}")
    if options.output_format == "openai" != options.input_format:
        raise ConfigError("output_format", "openai", "is for input_format openai")
