"""The CPU time that an engine without work takes, its workers included, as a share of one core.

python benchmarks/idle.py [--seconds 20] [ENGINE OPTIONS, such as --model M -tp 2]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from headway import LLM, SamplingParams
from headway.cli.options import Parser, add_options, build
from headway.config import EngineArgs


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to look (default: 20)")
    add_options(parser, EngineArgs, "engine")
    options = parser.parse_exactly(["--model", "smollm2-135m-instruct", *sys.argv[1:]])
    seconds = options["seconds"]
    with LLM(**asdict(build(EngineArgs, options))) as llm:
        llm.generate("Once upon a time", SamplingParams(max_tokens=8))
        processes = {os.getpid(), *llm.executor_info.pids}
        before = sum(map(cpu_seconds, processes))
        time.sleep(seconds)
        share = (sum(map(cpu_seconds, processes)) - before) / seconds
        print(f"{llm.executor_info.executor}, {len(processes)} processes: {share:.2%} of a core while idle")


if __name__ == "__main__":
    main()
