"""Other weights for a running engine, and its sleep: what reinforcement learning does between rollouts."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headway.errors import ConfigError, EngineError
from headway.executor import Executor
from headway.scheduler import Scheduler

if TYPE_CHECKING:
    from torch import Tensor

    Weights = str | PathLike[str] | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Upkeep:
    """Of an engine without requests: it may sleep, and its weights may be unfit; ``check`` raises while they are."""

    def __init__(self, executor: Executor, scheduler: Scheduler) -> None:
        self._executor, self._scheduler = executor, scheduler
        self._level = 0
        self._lacks = ""  # why the weights cannot be used

    @property
    def asleep(self) -> bool:
        return self._level > 0

    def check(self) -> None:
        """Raises EngineError where requests cannot run."""
        if self._level:
            raise EngineError("the engine sleeps: wake_up() first")
        if self._lacks:
            raise EngineError(f"{self._lacks}: update_weights() first")

    def update_weights(self, weights: Weights) -> None:
        """See LLM.update_weights."""
        self._check_idle()
        if isinstance(weights, (str, PathLike)):
            self._replace(fspath(weights))
        elif self._executor.in_process:
            coming = _pairs(weights)
            first = list(islice(coming, 1))  # an iterable that fails at once leaves the weights as they are
            self._replace(chain((first.pop() for _ in range(len(first))), coming))  # and is not held on to
        else:
            with as_file(weights) as path:
                self._replace(path)

    def _replace(self, weights: str | Iterable[tuple[str, Tensor]]) -> None:
        self._executor.call("check_weights", weights if isinstance(weights, str) else None)
        self._scheduler.drop_prefix_cache()
        self._lacks = "the last update of the weights failed, they may be a mixture"
        self._executor.call("update_weights", weights)
        self._lacks = ""

    def sleep(self, level: Literal[1, 2]) -> None:
        """See LLM.sleep."""
        if level not in (1, 2):
            raise ConfigError("level", level, "must be 1 (the KV cache) or 2 (the weights too)")
        self._check_idle()
        if level == 2:
            self._executor.call("check_weights", None)
        self._scheduler.drop_prefix_cache()
        self._level = max(self._level, level)
        if level == 2:
            self._lacks = "the weights are asleep"
        self._executor.call("sleep", level)

    def wake_up(self) -> None:
        """See LLM.wake_up."""
        if self._level == 2 and self._lacks:
            self._executor.call("reload_weights")
            self._lacks = ""
        self._level = 0

    def _check_idle(self) -> None:
        if self._scheduler.has_requests:
            raise EngineError("requests are running: wait for their end, or abort them")


@contextmanager
def as_file(weights: Weights) -> Generator[str]:
    """A checkpoint's path, for other processes: tensors are there as long as this is entered."""
    if isinstance(weights, (str, PathLike)):
        yield fspath(weights)
    else:
        with tempfile.TemporaryDirectory(prefix="headway-") as folder:
            yield _save(_pairs(weights), Path(folder))


def _pairs(weights: Any) -> Iterator[tuple[str, Tensor]]:
    """As they come, none held on to. Raises ConfigError for what is no pair."""
    from torch import Tensor

    accepted = "must be a checkpoint's path, or the names and tensors of one: pairs or a dict"
    if not isinstance(weights, Iterable):
        raise ConfigError("weights", weights, accepted)
    for pair in weights.items() if isinstance(weights, Mapping) else weights:
        match pair:
            case (str() as name, Tensor() as tensor):
                yield name, tensor
                del name, tensor, pair
            case _:
                raise ConfigError("weights", pair, accepted)


def _save(weights: Iterable[tuple[str, Tensor]], folder: Path) -> str:
    """Returns the file's path."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    seen: set[int] = set()
    for name, tensor in weights:
        plain = tensor.detach().cpu().contiguous()
        shared = plain.data_ptr() in seen  # which the format does not have
        seen.add(plain.data_ptr())
        tensors[name] = plain.clone() if shared else plain
    file = folder / "model.safetensors"
    save_file(tensors, file)
    return str(file)
