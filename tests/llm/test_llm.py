"""LLM over the fake executor: order, interrupts, errors, progress."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from tests.llm.conftest import FACTS, FakeFrontends

from headway.errors import EngineDead, RequestError
from headway.executor.fake import FakeModel
from headway.llm import LLM
from headway.messages import PoolingParams, RequestOutput, SamplingParams, StructuredOutput

SEEDED = SamplingParams(seed=7, max_tokens=12, ignore_eos=True)


def prompts(count: int) -> list[list[int]]:
    return [[40 + i % 60, 41 + i % 7, i % 256] for i in range(count)]


def test_outputs_come_in_the_order_of_the_prompts(fake: FakeFrontends) -> None:
    params = [SamplingParams(seed=i, max_tokens=1 + i % 5, ignore_eos=True) for i in range(40)]
    with LLM.over(*fake()) as llm:
        outputs = llm.generate(prompts(40), params)
        assert [o.prompt_token_ids for o in outputs] == prompts(40)
        assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]
        assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
        alone = llm.generate(prompts(40)[17], params[17])
        assert alone[0].outputs == outputs[17].outputs


def test_samples_of_one_prompt_differ_and_equal_single_requests_with_their_seeds(fake: FakeFrontends) -> None:
    with LLM.over(*fake()) as llm:
        (output,) = llm.generate([50, 51], SamplingParams(n=3, seed=5, max_tokens=6))
        singles = llm.generate([[50, 51]] * 3, [SamplingParams(seed=5 + i, max_tokens=6) for i in range(3)])
    assert [c.token_ids for c in output.outputs] == [s.outputs[0].token_ids for s in singles]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3


def test_a_stop_string_ends_a_request_and_leaves_the_engine_idle(fake: FakeFrontends) -> None:
    with LLM.over(*fake()) as llm:
        (free,) = llm.generate([50], SEEDED)
        stop = free.outputs[0].text[5:7]
        (stopped,) = llm.generate([50], replaced(SEEDED, stop=stop))
        assert stopped.outputs[0].text == free.outputs[0].text.partition(stop)[0]
        assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
        assert llm.metrics().running == llm.metrics().waiting == llm.metrics().blocks_used == 0


def replaced(params: SamplingParams, **changes: Any) -> SamplingParams:
    return msgspec.structs.replace(params, **changes)


@pytest.mark.parametrize("bad", [[], [1] * 600, {"prompt_token_ids": [999]}, "漢字" * 1000])
def test_one_bad_prompt_is_refused_before_any_runs(fake: FakeFrontends, bad: Any) -> None:
    with LLM.over(*fake()) as llm:
        with pytest.raises(RequestError, match=r"prompts\[2\]"):
            llm.generate([[1], [2], bad, [3]], SEEDED)
        assert llm.metrics().steps == 0


def test_a_bad_constraint_is_refused_before_any_runs(fake: FakeFrontends) -> None:
    params = SamplingParams(structured=StructuredOutput(json={"type": "wat"}))
    with LLM.over(*fake(facts=replace(FACTS, vocab_size=49152))) as llm:
        with pytest.raises(RequestError, match=r"structured\.json"):
            llm.generate([[1], [2]], [SEEDED, params])
        assert llm.metrics().steps == 0


def test_as_many_params_as_prompts_are_needed(fake: FakeFrontends) -> None:
    with LLM.over(*fake()) as llm, pytest.raises(RequestError, match="one for each of 3 prompts"):
        llm.generate(prompts(3), [SEEDED] * 2)


def test_no_prompts_give_no_outputs(fake: FakeFrontends) -> None:
    with LLM.over(*fake()) as llm:
        assert llm.generate([], SEEDED) == []


def test_chat_renders_one_conversation_or_several(fake: FakeFrontends) -> None:
    hi = [{"role": "user", "content": "hi"}]
    facts = replace(FACTS, vocab_size=49152)
    with LLM.over(*fake(facts=facts)) as llm:
        (one,) = llm.chat(hi, SEEDED)
        two = llm.chat([hi, hi], SEEDED)
        assert one.prompt is not None and one.prompt.endswith("user\nhi<|im_end|>\n<|im_start|>assistant\n")
        assert [o.outputs for o in two] == [one.outputs] * 2
        assert one.prompt_token_ids == llm.tokenizer.encode(one.prompt)
        bare = llm.chat(hi, SEEDED, chat_template="{{ messages[0].content }}")
        assert bare[0].prompt == "hi"


def test_interrupt_ends_the_requests_and_leaves_the_engine_usable(fake: FakeFrontends) -> None:
    with LLM.over(*fake(FakeModel(latency_s=0.002))) as llm:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts(20), SamplingParams(max_tokens=500))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert llm.metrics().running == llm.metrics().waiting == llm.metrics().blocks_used == 0
        assert len(llm.generate(prompts(3), SEEDED)) == 3


def test_an_exception_of_the_callers_leaves_the_engine_usable(fake: FakeFrontends) -> None:
    def fail(output: RequestOutput) -> None:
        raise ZeroDivisionError

    with LLM.over(*fake()) as llm:
        with pytest.raises(ZeroDivisionError):
            llm.generate(prompts(20), SEEDED, on_output=fail)
        assert llm.metrics().running == llm.metrics().waiting == 0
        assert len(llm.generate(prompts(3), SEEDED)) == 3


def test_on_output_sees_every_output_as_it_finishes(fake: FakeFrontends) -> None:
    seen: list[RequestOutput] = []
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (30, 1, 10)]
    with LLM.over(*fake()) as llm:
        outputs = llm.generate(prompts(3), params, on_output=seen.append)
    assert seen == [outputs[1], outputs[2], outputs[0]]


def test_a_progress_bar_counts_prompts_and_tokens(fake: FakeFrontends, capsys: pytest.CaptureFixture[str]) -> None:
    with LLM.over(*fake()) as llm:
        llm.generate(prompts(3), SEEDED, use_tqdm=True)
        shown = capsys.readouterr().err
        assert "3/3" in shown and "tokens/s" in shown
        llm.generate(prompts(3), SEEDED)
        assert capsys.readouterr().err == ""


def test_a_failure_of_the_executor_reaches_the_caller(fake: FakeFrontends) -> None:
    with LLM.over(*fake(FakeModel(fail_at_step=3))) as llm:
        with pytest.raises(Exception, match="injected at step 3"):
            llm.generate(prompts(3), SamplingParams(max_tokens=50))
        with pytest.raises(EngineDead):
            llm.generate(prompts(3), SEEDED)


def test_a_closed_engine_says_so(fake: FakeFrontends) -> None:
    llm = LLM.over(*fake())
    llm.close()
    llm.close()
    with pytest.raises(EngineDead):
        llm.generate(prompts(1), SEEDED)


def test_threads_take_turns(fake: FakeFrontends) -> None:
    with LLM.over(*fake()) as llm:
        expected = llm.generate(prompts(6), SEEDED)
        found: list[list[RequestOutput]] = []
        threads = [threading.Thread(target=lambda: found.append(llm.generate(prompts(6), SEEDED))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [[o.outputs for o in run] for run in found] == [[o.outputs for o in expected]] * 4


def test_structured_output_follows_the_constraint(fake: FakeFrontends) -> None:
    facts = replace(FACTS, vocab_size=49152)
    params = SamplingParams(structured=StructuredOutput(choice=["yes", "no"]), max_tokens=20)
    for depth in (0, 1):
        with LLM.over(*fake(FakeModel(vocab_size=49152), facts, depth=depth)) as llm:
            outputs = llm.generate(prompts(6), params)
        assert {o.outputs[0].text for o in outputs} <= {"yes", "no"}
        assert {o.outputs[0].finish_reason for o in outputs} == {"stop"}


def test_embeddings_come_one_per_prompt(fake: FakeFrontends) -> None:
    encoder = replace(FACTS, kind="encoder", num_kv_heads=0)
    with LLM.over(*fake(facts=encoder)) as llm:
        outputs = llm.embed(prompts(5))
        again = llm.embed(prompts(5)[3])
        assert [o.prompt_token_ids for o in outputs] == prompts(5)
        assert again[0].data == outputs[3].data and len(again[0].data) == 4
        with pytest.raises(RequestError, match="no classification head"):
            llm.classify("x")
        with pytest.raises(RequestError, match="cannot generate"):
            llm.generate([1])


def test_scores_without_a_cross_encoder_are_cosines(fake: FakeFrontends) -> None:
    encoder = replace(FACTS, kind="encoder", num_kv_heads=0, vocab_size=49152)
    with LLM.over(*fake(facts=encoder)) as llm:
        vectors = [o.data for o in llm.embed(["a", "b", "c"], PoolingParams())]
        scores = [o.data[0] for o in llm.score("a", ["a", "b", "c"])]
        with pytest.raises(RequestError, match="text_2"):
            llm.score(["a", "b"], ["c"] * 3)

    def cosine(x: list[float], y: list[float]) -> float:
        def dot(u: list[float], v: list[float]) -> float:
            return sum(a * b for a, b in zip(u, v, strict=True))

        return dot(x, y) / (dot(x, x) * dot(y, y)) ** 0.5

    assert scores == pytest.approx([cosine(vectors[0], v) for v in vectors])
    assert scores[0] == pytest.approx(1.0)


def test_a_one_label_model_scores_pairs_in_one_prompt(fake: FakeFrontends) -> None:
    cross = replace(FACTS, kind="classifier", num_kv_heads=0, vocab_size=49152, num_labels=1)
    with LLM.over(*fake(facts=cross)) as llm:
        outputs = llm.score("query", ["one", "two"])
        pairs = [llm.tokenizer.encode_pair("query", text)[0] for text in ("one", "two")]
        assert [o.prompt_token_ids for o in outputs] == pairs


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, headway.llm; print({'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
