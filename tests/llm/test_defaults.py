"""What a caller who passes no SamplingParams gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.llm.conftest import FakeFrontends

from headway.errors import ModelError
from headway.llm import LLM
from headway.llm.defaults import default_sampling
from headway.messages import SamplingParams


def declare(folder: Path, **values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_the_generation_configuration_is_the_default(tmp_path: Path) -> None:
    path = declare(tmp_path, temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=32, eos_token_id=2, do_sample=True)
    assert default_sampling(path) == SamplingParams(temperature=0.6, top_p=0.9, top_k=20, max_tokens=32)


def test_a_checkpoint_without_one_has_the_usual_defaults(tmp_path: Path, smollm2_gguf: Path) -> None:
    assert default_sampling(tmp_path) == default_sampling(smollm2_gguf) == SamplingParams()


def test_a_value_no_request_may_have_is_the_checkpoints_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p=7"):
        default_sampling(declare(tmp_path, top_p=7))


def test_the_default_holds_only_where_the_caller_gives_none(fake: FakeFrontends) -> None:
    frontend, core = fake()
    frontend = replace(frontend, sampling=SamplingParams(max_tokens=3, ignore_eos=True))
    with LLM.over(frontend, core) as llm:
        assert llm.get_default_sampling_params().max_tokens == 3
        assert len(llm.generate([1])[0].outputs[0].token_ids) == 3
        assert len(llm.generate([1], SamplingParams(max_tokens=5))[0].outputs[0].token_ids) == 5
