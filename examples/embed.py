"""Embeds a file of texts, then finds those that are nearest to a question."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from headway.batch import EngineProcessorConfig, build_processor

TOPICS = Path(__file__).parent / "data" / "python_topics.jsonl"
VECTORS = Path("vectors.jsonl")
QUESTION = "How do I leave a loop early?"


def embed(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["text"]}


def keep(row: dict[str, Any]) -> dict[str, Any]:
    return {"title": row["title"], "vector": row["embeddings"]}


def main() -> None:
    texts = [{"title": QUESTION, "text": QUESTION}, *map(json.loads, TOPICS.read_text().splitlines())]
    config = EngineProcessorConfig(model_source="all-minilm-l6-v2", task_type="embed")
    with build_processor(config, embed, keep) as processor:
        processor.run(texts, VECTORS)
    question, *rows = map(json.loads, VECTORS.read_text().splitlines())
    near = {row["title"]: float(np.dot(question["vector"], row["vector"])) for row in rows}
    print(QUESTION)
    for title in sorted(near, key=lambda title: -near[title])[:3]:
        print(f"{near[title]:.3f}  {title}")


if __name__ == "__main__":
    main()
