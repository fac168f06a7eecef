"""Every row gets one of a few labels: the model can write nothing else. Needs the extra grammar.

A classifier of its own goes with task_type="classify": the row's text is the prompt, its logits come as embeddings.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from headway.batch import EngineProcessorConfig, build_processor

TOPICS = Path(__file__).parent / "data" / "python_topics.jsonl"
LABELS = Path("labels.jsonl")
CHOICES = ["statement", "operator", "data type"]


def ask(row: dict[str, Any]) -> dict[str, Any]:
    question = f"{row['text']}\n\nIs this about a statement, an operator or a data type? Answer with one of them."
    return {"messages": [{"role": "user", "content": question}]}


def keep(row: dict[str, Any]) -> dict[str, Any]:
    return {"title": row["title"], "label": row["generated_text"]}


def main() -> None:
    config = EngineProcessorConfig(
        model_source="smollm2-135m-instruct",
        sampling_params={"temperature": 0, "max_tokens": 8, "structured_outputs": {"choice": CHOICES}},
    )
    with build_processor(config, ask, keep) as processor:
        processor.run(TOPICS, LABELS)
    rows = [json.loads(line) for line in LABELS.read_text().splitlines()]
    for row in rows[:5]:
        print(f"{row['title']}: {row['label']}")
    print(", ".join(f"{count} x {label}" for label, count in Counter(row["label"] for row in rows).most_common()))


if __name__ == "__main__":
    main()
