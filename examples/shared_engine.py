"""Two turns with every row, on one engine: the second finds the first one's work in the prefix cache."""

import json
from pathlib import Path
from typing import Any

from headway.batch import EngineProcessorConfig, build_processor

TOPICS = Path(__file__).parent / "data" / "python_topics.jsonl"
TALKS = Path("talks.jsonl")


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Summarise in one sentence:\n\n{row['text']}"}]}


def ask_again(row: dict[str, Any]) -> dict[str, Any]:
    answer = {"role": "assistant", "content": row["generated_text"]}
    question = {"role": "user", "content": "Now give an example."}
    return {"messages": [*row["messages"], answer, question]}


def main() -> None:
    config = EngineProcessorConfig(
        model_source="smollm2-135m-instruct",
        sampling_params={"temperature": 0, "max_tokens": 24},
        shared="the one engine",  # both processors name it, so there is only one
    )
    with build_processor(config, ask) as first, build_processor(config, ask_again) as second:
        first.then(second).run(TOPICS, TALKS)
    rows = [json.loads(line) for line in TALKS.read_text().splitlines()]
    for message in rows[0]["messages"][1:]:
        print(f"{message['role']}: {message['content'].strip()}")
    print(f"assistant: {rows[0]['generated_text'].strip()}")
    cached = sum(row["num_cached_tokens"] for row in rows) / sum(row["num_input_tokens"] for row in rows)
    print(f"{cached:.0%} of the second turns' tokens were in the prefix cache")


if __name__ == "__main__":
    main()
