"""Alternates headway and another engine on one workload and prints the ratios.

    python benchmarks/compare.py [--rounds N] --peer "COMMAND" [--peer "COMMAND"] -- HEADWAY BENCH THROUGHPUT OPTIONS

Each command gets --input-len, --output-len, --num-prompts, --repeats and --seed, and ends with a line of JSON that has
output_tokens_per_s and rows_per_s.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from statistics import median
from typing import Any

SHARED = {"--input-len": "64", "--output-len": "64", "--num-prompts": "64", "--repeats": "3", "--seed": "0"}
RATES = ("output_tokens_per_s", "rows_per_s")


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The workload every engine gets, and what is headway's alone."""
    workload, own, rest = dict(SHARED), list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if word in workload:
            workload[word] = rest.pop(0)
        else:
            own.append(word)
    return [part for pair in workload.items() for part in pair], own


def measure(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", required=True, help="a command line")
    parser.add_argument("headway", nargs="*", help="options of headway bench throughput, after --")
    options = parser.parse_args()
    workload, own = split(options.headway)
    commands = {"headway": [sys.executable, "-m", "headway", "bench", "throughput", *own, *workload]}
    commands |= {peer: [*shlex.split(peer), *workload] for peer in options.peer}
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(options.rounds):
        for name, command in commands.items():
            report = measure(command)
            reports[name].append(report)
            print(
                f"round {turn + 1}: {name}: {report[RATES[0]]} output tokens/s, {report[RATES[1]]} rows/s", flush=True
            )
    for peer in options.peer:
        for rate in RATES:
            ratios = [ours[rate] / theirs[rate] for ours, theirs in zip(reports["headway"], reports[peer], strict=True)]
            print(
                f"{rate}: headway / {peer}: median {median(ratios):.2f} (each: {', '.join(f'{r:.2f}' for r in ratios)})"
            )


if __name__ == "__main__":
    main()
