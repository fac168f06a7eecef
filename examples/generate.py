"""Offline generation: all prompts at once, results in their order."""

from headway import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "The largest planet of the solar system is"]


def main() -> None:
    with LLM("smollm2-135m-instruct") as llm:
        for out in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16)):
            print(f"{out.prompt!r} -> {out.outputs[0].text!r} ({out.outputs[0].finish_reason}, {out.usage})")


if __name__ == "__main__":
    main()
