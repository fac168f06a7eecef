"""Embeddings: which sentence is nearest to the question?"""

import numpy as np

from headway import LLM

QUESTION = "How do I keep bread fresh?"
SENTENCES = [
    "Store loaves in a cloth bag, away from the sun.",
    "The train to the coast leaves at noon.",
    "Freezing sliced bread preserves it for weeks.",
]


def main() -> None:
    with LLM("all-minilm-l6-v2") as llm:
        question, *vectors = (np.array(out.data) for out in llm.embed([QUESTION, *SENTENCES]))
    for sentence, vector in sorted(zip(SENTENCES, vectors, strict=True), key=lambda pair: -float(question @ pair[1])):
        print(f"{float(question @ vector):.3f}  {sentence}")


if __name__ == "__main__":
    main()
