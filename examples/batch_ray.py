"""The same on Ray Data: a dataset in, a lazy dataset out, an engine in each worker."""

import logging
from pathlib import Path
from typing import Any

import ray

from headway.batch import EngineProcessorConfig, build_processor

TOPICS = Path(__file__).parent / "data" / "python_topics.jsonl"


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Summarise in one sentence:\n\n{row['text']}"}]}


def keep(row: dict[str, Any]) -> dict[str, Any]:
    return {"topic": row["topic"], "summary": row["generated_text"]}


def main() -> None:
    ray.init(logging_level=logging.WARNING)
    config = EngineProcessorConfig(
        model_source="smollm2-135m-instruct",
        sampling_params={"temperature": 0, "max_tokens": 32},
        concurrency=1,  # engines
    )
    answers = build_processor(config, ask, keep)(ray.data.read_json(str(TOPICS))).materialize()
    for row in answers.take(3):
        print(f"{row['topic']}: {row['summary'].strip()}")
    print(f"{answers.count()} rows")  # or answers.write_parquet(...)


if __name__ == "__main__":
    main()
