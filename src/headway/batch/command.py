"""headway batch: a file of rows in, a file of answered rows out."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headway.batch.options import BatchOptions
from headway.batch.rows import count_lines, read_rows, sampling_params
from headway.batch.runner import BatchRun, Tally
from headway.batch.writer import OrderedWriter
from headway.config import EngineArgs
from headway.errors import ConfigError
from headway.llm import AsyncLLM


def run(options: BatchOptions, args: EngineArgs) -> int:
    """Exit status 0, or 1 if no row could be answered. An interrupt keeps what is done.

    Only rows go to the standard output, if they are to go there: the rest is for people.
    """
    began = time.perf_counter()
    defaults = {"max_tokens": options.max_tokens, "temperature": options.temperature, "top_p": options.top_p}
    sampling_params(None, defaults)  # what no row can use is refused before anything starts
    source, target = _paths(options)
    writer = OrderedWriter(target)
    try:
        with writer:
            llm = AsyncLLM(**asdict(args))
            tally, said = asyncio.run(_answer(llm, source, writer, defaults, began))
    except BaseException as error:
        if writer.written and not writer.direct:
            print(f"headway: {writer.written} answered rows are kept in {writer.partial}", file=sys.stderr)
        if isinstance(error, asyncio.CancelledError):
            raise KeyboardInterrupt from None
        raise
    print(said, file=sys.stderr)
    if tally.first_error is not None:
        print(f"headway: the first that failed: {' '.join(tally.first_error.split())}", file=sys.stderr)
    return 1 if tally.rows and tally.failed == tally.rows else 0


def _paths(options: BatchOptions) -> tuple[Path, Path]:
    """Of input and output; "-" is the standard one."""
    source = Path("/dev/stdin" if options.input == "-" else options.input)
    target = Path("/dev/stdout" if options.output == "-" else options.output)
    if not source.exists() or source.is_dir():
        raise ConfigError("input", options.input, "no such file" if not source.exists() else "is a directory")
    if not os.access(source, os.R_OK):
        raise ConfigError("input", options.input, "cannot be read: permission denied")
    if target.is_file() and target.samefile(source):
        raise ConfigError("output", options.output, "must be another file than the input")
    return source, target


async def _answer(
    llm: AsyncLLM, source: Path, writer: OrderedWriter, defaults: dict[str, Any], began: float
) -> tuple[Tally, str]:
    """Cancelled by Ctrl-C; further ones do not break into the engine's end."""
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    async with llm:
        started = time.perf_counter()
        with Progress(count_lines(source)) as progress:
            tally = await BatchRun(llm, writer, progress.update).run(read_rows(source, defaults))
        elapsed = time.perf_counter() - started
        return tally, summary(llm, tally, started - began, elapsed)


def summary(llm: AsyncLLM, tally: Tally, startup_s: float, elapsed_s: float) -> str:
    """One line: what was done, how fast, and what ran."""
    info, isa = llm.executor_info, llm.config.device.isa
    kernels = f"{info.kernels} ({isa})" if info.kernels == "cpu" else info.kernels
    why = next(c.reason for c in llm.config.choices if c.name == "distributed_executor_backend")
    return (
        f"{tally.rows - tally.failed} rows answered, {tally.failed} failed: {tally.output_tokens} tokens in "
        f"{elapsed_s:.1f} s ({tally.output_tokens / elapsed_s:.0f} tokens/s) after {startup_s:.1f} s of start-up; "
        f"threads {info.threads}, kernels {kernels}, executor {info.executor}: {why}"
    )


class Progress:
    """Rows, tokens a second and the time left, on a terminal; nothing elsewhere."""

    def __init__(self, total: int | None) -> None:
        self._bar = tqdm(total=total, unit="row", dynamic_ncols=True, disable=None)
        self._began = time.perf_counter()

    def update(self, tally: Tally) -> None:
        rate = tally.output_tokens / (time.perf_counter() - self._began)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
