"""Prints a few question and answer pairs of a file that ``headway batch`` wrote: show_answers.py FILE [COUNT]"""

from __future__ import annotations

import json
import sys
import textwrap
from typing import Any


def question(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"] if "messages" in row else row["prompt"]


def main(path: str, count: int) -> None:
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    answered = [row for row in rows if row.get("error") is None]
    for row in answered[:: max(1, len(answered) // count)][:count]:
        print(textwrap.fill(f"Q: {question(row)}", 100, subsequent_indent="   "))
        print(textwrap.fill(f"A: {row['generated_text'].strip()}", 100, subsequent_indent="   "), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4)
