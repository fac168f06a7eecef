"""Streaming for asyncio: several callers share one engine in one process."""

import asyncio

from headway import AsyncLLM, SamplingParams

PROMPTS = {"sea": "The sea in winter", "city": "The city at night"}


async def tell(llm: AsyncLLM, name: str, prompt: str) -> None:
    async for delta in llm.generate(prompt, SamplingParams(temperature=0, max_tokens=24), request_id=name):
        print(f"[{name}]{delta.outputs[0].text}", flush=True)


async def main() -> None:
    llm = AsyncLLM("smollm2-135m-instruct")
    try:
        await asyncio.gather(*(tell(llm, name, prompt) for name, prompt in PROMPTS.items()))
    finally:
        llm.close()


if __name__ == "__main__":
    asyncio.run(main())
