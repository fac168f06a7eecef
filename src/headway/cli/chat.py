"""headway chat: a conversation in the terminal. Ctrl-C ends an answer, Ctrl-D the conversation."""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any

from headway.config import EngineArgs
from headway.errors import RequestError
from headway.llm import AsyncLLM
from headway.messages import SamplingParams

if TYPE_CHECKING:
    from headway.cli.commands import ChatOptions

Messages = list[dict[str, Any]]


def run(options: ChatOptions, args: EngineArgs) -> int:
    params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p)
    llm = AsyncLLM(**asdict(args))
    try:
        _converse(llm, options.system, params)
    finally:
        llm.close()
    return 0


def _converse(llm: AsyncLLM, system: str | None, params: SamplingParams) -> None:
    """No event loop runs while the user types: asyncio's would take Ctrl-C, and input() not notice."""
    messages: Messages = [{"role": "system", "content": system}] if system is not None else []
    if sys.stdin.isatty():
        import_module("readline")  # input() edits lines and remembers them from now on

        print(f"{llm.config.model.served_model_name}: Ctrl-C ends an answer, Ctrl-D the conversation.")
    while (words := _ask()) is not None:
        if not words.strip():
            continue
        messages.append({"role": "user", "content": words})
        try:
            answer = asyncio.run(_answer(llm, messages, params))
        except RequestError as error:
            print(f"headway: {error}", file=sys.stderr)
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    """What the user says; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print("\nCtrl-D leaves.")
        return ""


async def _answer(llm: AsyncLLM, messages: Messages, params: SamplingParams) -> str:
    """Prints the answer as it comes; its text, up to where it was interrupted."""
    pieces: list[str] = []

    async def stream() -> None:
        async for delta in llm.chat(messages, params):
            pieces.append(delta.outputs[0].text)
            print(pieces[-1], end="", flush=True)

    loop, task = asyncio.get_running_loop(), asyncio.create_task(stream())
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        print(" ...", end="")
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    print(flush=True)
    return "".join(pieces)
