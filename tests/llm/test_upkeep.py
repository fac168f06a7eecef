"""New weights for a running engine, and its sleep."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.checkpoints import make_checkpoint

from headway import LLM, AsyncLLM, SamplingParams
from headway.errors import ConfigError, EngineError, ModelError

# Large enough for its memory to show, small enough to be made in no time.
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 2048}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (40, 3, 17)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of the same shape."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model, first = make_checkpoint("llama", "ForCausalLM", folder, **SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    model.save_pretrained(folder / "other")
    return first, folder / "other"


@pytest.fixture(scope="module")
def settings(smollm2_gguf: Path) -> dict[str, Any]:
    return {"tokenizer": str(smollm2_gguf), "threads": 1, "max_num_seqs": 8, "kv_cache_memory_bytes": 16 << 20}


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def pairs(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    yield from load_file(path / "model.safetensors").items()


@pytest.fixture(scope="module")
def truth(checkpoints: tuple[Path, Path], settings: dict[str, Any]) -> list[list[list[int]]]:
    """What engines that were started with each checkpoint generate."""
    found: list[list[list[int]]] = []
    for path in checkpoints:
        with LLM(str(path), **settings) as llm:
            found.append(tokens(llm))
    assert found[0] != found[1]
    return found


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("executor", ["uni", "mp"])
@pytest.mark.parametrize("given", [str, pairs], ids=["a path", "tensors"])
def test_an_engine_with_new_weights_generates_what_they_would(
    executor: str, given: Callable[[Path], Any], checkpoints: Any, settings: Any, truth: Any
) -> None:
    with LLM(str(checkpoints[0]), **settings, distributed_executor_backend=executor) as llm:
        assert tokens(llm) == truth[0]
        llm.update_weights(given(checkpoints[1]))
        assert tokens(llm) == truth[1]
        llm.update_weights(given(checkpoints[0]))
        assert tokens(llm) == truth[0]


@pytest.mark.parametrize("changes", [{"quantization": "int8"}, {"ops": "reference"}, {"enforce_eager": True}])
def test_every_layout_takes_new_weights(changes: dict[str, Any], checkpoints: Any, settings: Any) -> None:
    with LLM(str(checkpoints[1]), **settings, **changes) as llm:
        there = tokens(llm)
    with LLM(str(checkpoints[0]), **settings, **changes) as llm:
        assert tokens(llm) != there
        llm.update_weights(pairs(checkpoints[1]))
        assert tokens(llm) == there


def test_updates_take_no_more_memory(checkpoints: Any, settings: Any) -> None:
    with LLM(str(checkpoints[0]), **settings) as llm:
        (pid,) = llm.executor_info.pids
        llm.update_weights(str(checkpoints[1]))
        before = resident(pid)
        for turn in range(6):
            llm.update_weights(str(checkpoints[turn % 2]))
        # A copy kept in each turn would be six times the weights; the process around it, all tests', moves by some MB.
        assert resident(pid) - before < 2 * llm.executor_info.weights_bytes


def test_an_update_lets_go_of_every_tensor(checkpoints: Any, settings: Any) -> None:
    arrays: list[Callable[[], object]] = []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in pairs(checkpoints[1]):
            array = tensor.numpy().copy()
            arrays.append(weakref.ref(array))
            yield name, torch.from_numpy(array)
        assert [alive() is None for alive in arrays[:-1]] == [True] * (len(arrays) - 1)

    with LLM(str(checkpoints[0]), **settings) as llm:
        llm.update_weights(watched())


def test_weights_that_do_not_fit_are_refused_and_so_are_requests_until_others_do(
    checkpoints: Any, settings: Any, truth: Any
) -> None:
    with LLM(str(checkpoints[0]), **settings) as llm:
        half = list(pairs(checkpoints[1]))[:20]
        with pytest.raises(ModelError, match="is not among the weights"):
            llm.update_weights(half)
        with pytest.raises(EngineError, match="update_weights"):
            tokens(llm)
        llm.update_weights(pairs(checkpoints[1]))
        assert tokens(llm) == truth[1]


@pytest.mark.parametrize("executor", ["uni", "mp"])
def test_weights_may_be_a_dict_and_what_is_none_of_all_that_is_told(
    executor: str, checkpoints: Any, settings: Any, truth: Any
) -> None:
    with LLM(str(checkpoints[0]), **settings, distributed_executor_backend=executor) as llm:
        for wrong in (None, 7, [torch.zeros(2)], [("name", "tensor")], {"name": [1.0]}, b"path"):
            with pytest.raises(ConfigError, match=r"weights=.*: must be a checkpoint's path, or the names and tensors"):
                llm.update_weights(wrong)  # type: ignore[arg-type]
        assert tokens(llm) == truth[0]
        llm.update_weights(dict(pairs(checkpoints[1])))
        assert tokens(llm) == truth[1]


def failing() -> Iterator[tuple[str, torch.Tensor]]:
    raise KeyError("nothing")
    yield


@pytest.mark.parametrize("executor", ["uni", "mp"])
def test_weights_that_cannot_be_read_at_all_leave_those_before(
    executor: str, checkpoints: Any, settings: Any, truth: Any, smollm2_gguf: Path
) -> None:
    with LLM(str(checkpoints[0]), **settings, distributed_executor_backend=executor) as llm:
        for path, error in (("./no-such-model", "config.json"), (smollm2_gguf, "another model")):
            with pytest.raises(ModelError, match=error):
                llm.update_weights(path)
        with pytest.raises(KeyError):
            llm.update_weights(failing())
        assert tokens(llm) == truth[0]


@pytest.mark.parametrize("executor", ["uni", "mp"])
def test_sleep_gives_memory_back_and_the_engine_wakes_up_as_it_was(
    executor: str, checkpoints: Any, settings: Any, truth: Any
) -> None:
    with LLM(str(checkpoints[0]), **settings, distributed_executor_backend=executor) as llm:
        (pid,) = llm.executor_info.pids
        long = [{"prompt_token_ids": [n, *range(100)]} for n in range(60)]
        llm.generate(long, GREEDY)  # touches most of the cache
        awake = resident(pid)
        llm.sleep()
        assert awake - resident(pid) > llm.executor_info.kv_bytes // 2
        with pytest.raises(EngineError, match="the engine sleeps"):
            tokens(llm)
        llm.wake_up()
        assert tokens(llm) == truth[0]
        awake = resident(pid)
        llm.sleep(level=2)
        assert awake - resident(pid) > llm.executor_info.weights_bytes * 3 // 4
        llm.wake_up()
        assert tokens(llm) == truth[0]


def test_weights_that_come_while_it_sleeps_are_those_it_wakes_up_with(
    checkpoints: Any, settings: Any, truth: Any
) -> None:
    with LLM(str(checkpoints[0]), **settings) as llm:
        llm.sleep(2)
        llm.update_weights(pairs(checkpoints[1]))
        llm.wake_up()
        assert tokens(llm) == truth[1]
        with pytest.raises(ConfigError, match="level=3"):
            llm.sleep(3)  # type: ignore[arg-type]


def test_an_async_engine_takes_weights_between_requests(checkpoints: Any, settings: Any, truth: Any) -> None:
    async def run() -> None:
        async with AsyncLLM(str(checkpoints[0]), **settings) as llm:
            stream = llm.generate(PROMPTS[0], GREEDY)
            await anext(stream)
            with pytest.raises(EngineError, match="requests are running"):
                await llm.update_weights(str(checkpoints[1]))
            async for _ in stream:
                pass
            await llm.update_weights(str(checkpoints[1]))
            await llm.sleep()
            await llm.wake_up()
            async for output in llm.generate(PROMPTS[0], GREEDY, stream=False):
                assert output.outputs[0].token_ids == truth[1][0]

    asyncio.run(run())
