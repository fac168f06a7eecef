"""Which engines run the scenarios, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tests.conformance.scenarios import GENERATING

Ranks = Literal["tp1", "tp2", "pp2", "tp2pp2"]

# Some prompts are longer than a step takes, and the requests of more_than_fits() need more blocks than there are.
TIGHT: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 24, "max_model_len": 160}
ROOMY: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": 160}
BLOCKS = {"tight": 17, "roomy": 200}
TOKEN_BYTES = {"tp1": 384, "tp2": 384, "pp2": 256, "tp2pp2": 256}  # of the tiny decoder; tp2: half the heads in float32

SCENARIOS: dict[str, list[str]] = {
    "decoder": GENERATING,
    "pooler": ["embeddings"],
    "encoder": ["embeddings"],
    "classifier": ["classes"],
    "smollm2": ["greedy", "structured"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An engine. model: "decoder", "encoder" and "classifier" are tiny; "pooler" is that decoder for embeddings.

    On one rank and in a pipeline the tiny decoder computes in bfloat16 and must give the very same bits everywhere;
    two tensor ranks add in another order, so they compute in float32, whose tokens are the same.
    """

    executor: str
    ranks: Ranks = "tp1"
    depth: int = 1
    model: str = "decoder"
    dtype: str = "bfloat16"
    roomy: bool = False

    def __str__(self) -> str:
        return " ".join((self.executor, self.ranks, f"depth {self.depth}", *[self.model] * (self.model != "decoder")))

    @property
    def tensor_ranks(self) -> int:
        return 2 if "tp2" in self.ranks else 1

    @property
    def stages(self) -> int:
        return 2 if "pp2" in self.ranks else 1

    @property
    def settings(self) -> dict[str, Any]:
        settings = {
            "distributed_executor_backend": self.executor,
            "tensor_parallel_size": self.tensor_ranks,
            "pipeline_parallel_size": self.stages,
            "async_scheduling": self.depth == 1,
            "dtype": self.dtype,
            "threads": 1,
        }
        if self.model == "smollm2":
            return {**settings, "max_model_len": 160, "max_num_seqs": 8}
        if self.model in ("encoder", "classifier", "pooler"):  # which take whole prompts
            return {**settings, "max_model_len": 160, "max_num_seqs": 8, "runner": "pooling"}
        block = 16 * TOKEN_BYTES[self.ranks] * (2 if self.dtype == "float32" and self.tensor_ranks == 1 else 1)
        settings |= {"kv_cache_memory_bytes": block * BLOCKS["roomy" if self.roomy else "tight"]}
        return {**settings, **(ROOMY if self.roomy else TIGHT)}

    @property
    def reference(self) -> Case:
        """What must give the same: one process, every step planned after the one before, and room for everything."""
        return Case(executor="uni", depth=0, model=self.model, dtype=self.dtype, roomy=True)


def _dtype(ranks: Ranks, model: str) -> str:
    return "float32" if model in ("encoder", "classifier") or "tp2" in ranks else "bfloat16"


def _case(executor: str, ranks: Ranks, depth: int = 1, model: str = "decoder") -> Case:
    return Case(executor=executor, ranks=ranks, depth=depth, model=model, dtype=_dtype(ranks, model))


RANKS: list[Ranks] = ["tp1", "tp2", "pp2"]
EXTERNAL = [
    *[_case("external_launcher", ranks, depth) for ranks in RANKS for depth in (0, 1)],
    *[_case("external_launcher", ranks, model="pooler") for ranks in RANKS],
    _case("external_launcher", "tp2", model="encoder"),
    _case("external_launcher", "tp2", model="smollm2"),
]
LOCAL = [
    *[_case("uni", "tp1", depth) for depth in (0, 1)],
    *[_case(executor, ranks, depth) for executor in ("mp", "ray") for ranks in RANKS for depth in (0, 1)],
    _case("mp", "tp2pp2"),
    _case("mp", "pp2", model="pooler"),
    _case("ray", "tp2", model="pooler"),
    _case("mp", "tp2", model="encoder"),
    _case("mp", "tp2", depth=0, model="encoder"),
    _case("mp", "tp2", model="classifier"),
    _case("ray", "tp1", model="encoder"),
    *[_case("mp", ranks, model="smollm2") for ranks in RANKS],
]
