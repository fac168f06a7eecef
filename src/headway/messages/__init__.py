"""What crosses a boundary: msgspec structs, array-like and tagged on the wire. Knows no torch."""

from headway.messages.group import RankGroup
from headway.messages.outputs import Completion, EngineOutput, Logprob, PooledOutput, RequestOutput
from headway.messages.params import PoolingParams, SamplingParams, StructuredOutput
from headway.messages.request import Request
from headway.messages.step import RowLogprobs, SlotStart, StepPlan, StepResult
from headway.messages.worker import WorkerInfo

__all__ = [
    "Completion",
    "EngineOutput",
    "Logprob",
    "PooledOutput",
    "PoolingParams",
    "RankGroup",
    "Request",
    "RequestOutput",
    "RowLogprobs",
    "SamplingParams",
    "SlotStart",
    "StepPlan",
    "StepResult",
    "StructuredOutput",
    "WorkerInfo",
]
