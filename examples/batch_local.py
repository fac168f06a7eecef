"""A file of rows through a model into another file, on this machine. Run again after a Ctrl-C, it goes on."""

import json
from pathlib import Path
from typing import Any

from headway.batch import EngineProcessorConfig, JobOptions, build_processor

TOPICS = Path(__file__).parent / "data" / "python_topics.jsonl"
ANSWERS = Path("answers.jsonl")


def ask(row: dict[str, Any]) -> dict[str, Any]:
    """What is returned is added to the row."""
    return {"messages": [{"role": "user", "content": f"Summarise in one sentence:\n\n{row['text']}"}]}


def keep(row: dict[str, Any]) -> dict[str, Any]:
    """What is returned is the output row."""
    return {"topic": row["topic"], "summary": row["generated_text"], "finish_reason": row["finish_reason"]}


def main() -> None:
    config = EngineProcessorConfig(
        model_source="smollm2-135m-instruct",
        sampling_params={"temperature": 0, "max_tokens": 32},
        should_continue_on_error=True,
    )
    with build_processor(config, ask, keep) as processor:
        summary = processor.run(TOPICS, ANSWERS, JobOptions(resume=True))
    for line in ANSWERS.read_text().splitlines()[:3]:
        row = json.loads(line)
        print(f"{row['topic']}: {row['summary'].strip()}")
    print(f"{summary.tally.rows} rows in {ANSWERS}, {summary.tally.failed} failed")


if __name__ == "__main__":
    main()
