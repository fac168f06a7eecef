"""Chat template, tokens and text as stages of their own make what the engine's stage would."""

from __future__ import annotations

from typing import Any

import numpy as np

from headway.batch.row import Row
from headway.batch.stages.functions import OnRows
from headway.batch.stages.text import chat_template, detokenize, tokenize

MODEL = "smollm2-135m-instruct"
MESSAGES = [{"role": "user", "content": "Hi"}]


def through(stage: OnRows, *given: dict[str, Any]) -> list[Row]:
    rows = [Row.of(i, row) for i, row in enumerate(given)]
    stage(rows)
    return rows


def test_a_column_that_is_null_is_one_that_is_not_there() -> None:
    bare, null = through(tokenize(MODEL), {"prompt": "One,"}, {"prompt": "One,", "messages": None})
    assert null.data["tokenized_prompt"] == bare.data["tokenized_prompt"]


def test_rows_that_bring_what_a_stage_makes_pass() -> None:
    given: list[dict[str, Any]] = [{"prompt": "One,", "messages": None}, {"tokenized_prompt": [1], "prompt": None}]
    assert [row.record() for row in through(chat_template(MODEL, {}), *given)] == given
    assert through(tokenize(MODEL), given[1])[0].record() == given[1]


def test_a_text_that_cannot_be_encoded_costs_its_row_alone() -> None:
    bad, good = through(tokenize(MODEL), {"prompt": "\ud83d"}, {"prompt": "One,"})
    assert bad.error is not None and "valid Unicode" in bad.error.message and bad.error.stage == "tokenize"
    assert good.data["tokenized_prompt"]


def test_the_template_sees_the_tools() -> None:
    shown = {"chat_template": "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}."}
    tool = {"type": "function", "function": {"name": "weather"}}
    rows = through(chat_template(MODEL, shown), *({"messages": MESSAGES, "tools": t} for t in (np.array([tool]), None)))
    assert [row.data["prompt"] for row in rows] == ["weather.", "."]


def test_a_text_that_was_cut_stays_cut() -> None:
    answer = {"prompt_token_ids": [], "generated_tokens": [28, 827], "generated_text": ",", "stop_reason": " two"}
    cut, whole = through(detokenize(MODEL), answer, {**answer, "stop_reason": None})
    assert (cut.data["generated_text"], whole.data["generated_text"]) == (",", ", two")
