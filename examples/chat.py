"""Chat messages, through the model's own template; several samples of one prompt, each repeatable."""

from headway import LLM, SamplingParams

MESSAGES = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "Why do cats purr?"},
]


def main() -> None:
    with LLM("smollm2-135m-instruct") as llm:
        (out,) = llm.chat(MESSAGES, SamplingParams(n=3, temperature=0.7, seed=1, max_tokens=48))
        for sample in out.outputs:
            print(f"{sample.index}: {sample.text.strip()}")


if __name__ == "__main__":
    main()
