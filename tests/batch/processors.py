"""A processor of the demo model, at a size of seconds."""

from __future__ import annotations

from typing import Any

from headway.batch import EngineProcessorConfig, Processor, build_processor

MODEL = "smollm2-135m-instruct"
SMALL: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": 256, "threads": 1}
FAKE = {**SMALL, "distributed_executor_backend": "headway.executor.fake:FakeExecutor"}  # for what no model says
SAMPLING: dict[str, Any] = {"max_tokens": 6, "temperature": 0}


def processor(preprocess: Any = None, postprocess: Any = None, **settings: Any) -> Processor:
    settings = {"model_source": MODEL, "engine_kwargs": SMALL, "sampling_params": SAMPLING, **settings}
    return build_processor(EngineProcessorConfig(**settings), preprocess, postprocess)
