"""What a busy Python thread costs the model beside it, against the same load in another process.

    python benchmarks/neighbour.py [--rows 1,64] [--repeats 7] [ENGINE OPTIONS, such as --model M --threads 2]

The neighbour parses and writes JSON for a quarter of the time, in slices of a millisecond. Passes without it, with it
as a thread and with it as a process alternate; the last column is what sharing the process costs beyond the core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from statistics import median

from headway import LLM, SamplingParams
from headway.bench.workload import random_prompts, sampling
from headway.cli.options import Parser, add_options, build
from headway.config import EngineArgs

PERIOD_S, SHARE = 0.004, 0.25
DOCUMENT = {"messages": [{"role": "user", "content": "word " * 40, "n": list(range(30))} for _ in range(3)]}


def calls_a_slice() -> int:
    """How many round trips of the document fill a slice on this machine."""
    times: list[float] = []
    for _ in range(300):
        began = time.perf_counter()
        json.loads(json.dumps(DOCUMENT))
        times.append(time.perf_counter() - began)
    return max(1, round(PERIOD_S * SHARE / median(times)))


def work(calls: int, stop: threading.Event) -> None:
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:
        began = time.perf_counter()
        for _ in range(calls):
            json.loads(json.dumps(DOCUMENT))
        time.sleep(max(0.0, PERIOD_S - (time.perf_counter() - began)))


@contextmanager
def process(calls: int) -> Generator[None, None, None]:
    with subprocess.Popen([sys.executable, __file__, "--neighbour", str(calls)]) as child:
        time.sleep(0.5)  # its start-up is not what is measured
        try:
            yield
        finally:
            child.kill()


@contextmanager
def thread(calls: int) -> Generator[None, None, None]:
    stop = threading.Event()
    neighbour = threading.Thread(target=work, args=(calls, stop))
    neighbour.start()
    try:
        yield
    finally:
        stop.set()
        neighbour.join()


NEIGHBOURS: dict[str, Callable[[int], AbstractContextManager[None]]] = {
    "none": lambda calls: nullcontext(),
    "process": process,
    "thread": thread,
}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--neighbour", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rows", default="1,64")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output-len", type=int, default=64)
    add_options(parser, EngineArgs, "engine")
    values = parser.parse_exactly(
        sys.argv[1:] if "--model" in sys.argv else [*sys.argv[1:], "--model", "smollm2-135m-instruct"]
    )
    if values["neighbour"] is not None:
        work(values["neighbour"], threading.Event())
    calls = calls_a_slice()
    with LLM(**asdict(build(EngineArgs, {"enable_prefix_caching": False, **values}))) as llm:
        for rows in map(int, values["rows"].split(",")):
            prompts = random_prompts(32, rows, 0)
            params = SamplingParams(**sampling(values["output_len"]))
            llm.generate(prompts, params)
            rates: dict[str, list[float]] = {kind: [] for kind in NEIGHBOURS}
            for _ in range(values["repeats"]):
                for kind, found in rates.items():
                    with NEIGHBOURS[kind](calls):
                        began = time.perf_counter()
                        llm.generate(prompts, params)
                        found.append(rows * values["output_len"] / (time.perf_counter() - began))
            cost = median(t / p for t, p in zip(rates["thread"], rates["process"])) - 1
            shown = ", ".join(f"{kind} {median(found):.1f}" for kind, found in rates.items())
            print(f"{rows} rows, tokens/s by neighbour: {shown}; thread against process {cost:+.1%}", flush=True)


if __name__ == "__main__":
    main()
