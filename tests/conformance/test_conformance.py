"""One suite for every executor: the same requests have the same outcome, wherever the model runs and however ahead
steps are planned.

Every engine runs all its scenarios once (cases.py says which engines, scenarios.py what they do); a test looks at the
outcome of one scenario.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.cases import EXTERNAL, LOCAL, SCENARIOS, Case
from tests.conformance.scenarios import NAME, perform
from tests.executor.torchrun import torchrun
from tests.models.checkpoints import make_checkpoint, make_model

from headway.config import machine_facts
from headway.executor.ray.cluster import connection

pytestmark = pytest.mark.skipif(
    not machine_facts().has_cpu_kernels, reason="torch's own bfloat16 products depend on how many rows there are"
)

ROOT = Path(__file__).parents[2]
VOCAB = 49152  # smollm2's
TOKENS_ALIKE = 2e-3  # how far log probabilities of equal tokens may be apart where sums have another order


# The engines of two tensor ranks that the others are held against
ANCHORS = {(case.model, case.depth): case for case in reversed([*EXTERNAL, *LOCAL]) if case.ranks == "tp2"}
TWO = [c for c in [*LOCAL, *EXTERNAL] if c.ranks == "tp2" and c not in ANCHORS.values()]


class Outcomes:
    """Of every case, by scenario; each engine runs when it is first asked for."""

    def __init__(self, models: dict[str, dict[str, str]], folder: Path) -> None:
        self._models, self._folder = models, folder
        self._local: dict[Case, dict[str, Any]] = {}
        self._launched: list[dict[str, Any]] = []
        self._ray = False

    def __getitem__(self, case: Case) -> dict[str, Any]:
        if case.executor == "external_launcher":
            return self.launched()[0][str(case)]
        if case not in self._local:
            if case.executor == "ray" and not self._ray:
                self._ray = connection.open("local", 2)
            settings = {**self._models[case.model], **case.settings}
            self._local[case] = perform(SCENARIOS[case.model], **settings)
        return self._local[case]

    def launched(self) -> list[dict[str, Any]]:
        """What each rank of external_launcher says of every case."""
        if not self._launched:
            script = ["-m", "tests.conformance.launched", json.dumps(self._models), str(self._folder)]
            torchrun(2, script, timeout_s=110, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
            self._launched = [json.loads((self._folder / f"{rank}.json").read_text()) for rank in range(2)]
        return self._launched

    def close(self) -> None:
        if self._ray:
            connection.close()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[Outcomes]:
    folder = tmp_path_factory.mktemp("conformance")
    first, other = decoders(folder)
    shape: dict[str, Any] = {"num_attention_heads": 3, "vocab_size": VOCAB, "max_position_embeddings": 160}
    encoder = make_checkpoint("bert", "Model", folder, **shape)
    classifier = make_checkpoint("bert", "ForSequenceClassification", folder, num_labels=3, **shape)
    tokenizer = str(smollm2_gguf)
    outcomes = Outcomes(
        {
            "decoder": {"model": first, "other": other, "tokenizer": tokenizer},
            "pooler": {"model": first, "tokenizer": tokenizer},
            "encoder": {"model": str(encoder[1]), "tokenizer": tokenizer},
            "classifier": {"model": str(classifier[1]), "tokenizer": tokenizer},
            "smollm2": {"model": "smollm2-135m-instruct"},
        },
        folder,
    )
    yield outcomes
    outcomes.close()


def decoders(folder: Path) -> tuple[str, str]:
    """Two of the same shape; their tokens' probabilities are as far apart as those of a model that was trained."""
    shape = {"head_dim": 16, "vocab_size": VOCAB, "max_position_embeddings": 256}
    model = make_model("llama", "ForCausalLM", **shape)
    paths = folder / "decoder", folder / "other"
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        model.save_pretrained(paths[0])
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        model.save_pretrained(paths[1])
    return str(paths[0]), str(paths[1])


def alike(one: Any, other: Any) -> bool:
    """The same but for what float32 rounds away."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOKENS_ALIKE
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return one == other


def each_scenario(cases: list[Case]) -> Any:
    pairs = [(case, scenario) for case in cases for scenario in SCENARIOS[case.model]]
    return pytest.mark.parametrize(("case", "scenario"), pairs, ids=[f"{c}-{s}" for c, s in pairs])


@each_scenario([*LOCAL, *EXTERNAL])
def test_the_outcome_is_that_of_one_process(case: Case, scenario: str, outcomes: Outcomes) -> None:
    found, expected = outcomes[case][scenario], outcomes[case.reference][scenario]
    assert not isinstance(found, str), found  # a traceback
    if scenario == "preempted":
        assert (found, expected) == (True, False)
    elif case.tensor_ranks == 1:
        assert found == expected
    else:
        assert alike(found, expected)


@each_scenario(TWO)
def test_two_tensor_ranks_give_the_same_bits_in_every_executor(case: Case, scenario: str, outcomes: Outcomes) -> None:
    assert outcomes[case][scenario] == outcomes[ANCHORS[case.model, case.depth]][scenario]


@each_scenario(EXTERNAL)
def test_ranks_of_a_launcher_have_the_same_outcome(case: Case, scenario: str, outcomes: Outcomes) -> None:
    first, second = outcomes.launched()
    assert first[str(case)][scenario] == second[str(case)][scenario]


@pytest.mark.parametrize("case", [*LOCAL, *EXTERNAL], ids=str)
def test_a_closed_engine_leaves_nothing(case: Case, outcomes: Outcomes) -> None:
    ranks = outcomes.launched() if case.executor == "external_launcher" else [{str(case): outcomes[case]}]
    assert [rank[str(case)]["left"] for rank in ranks] == [{}] * len(ranks)


@pytest.mark.parametrize("case", [*LOCAL, *EXTERNAL], ids=str)
def test_the_executor_is_the_one_asked_for(case: Case, outcomes: Outcomes) -> None:
    assert outcomes[case]["info"] == [case.executor, case.tensor_ranks * case.stages, case.depth]


def test_classes_depend_on_the_prompt(outcomes: Outcomes) -> None:
    first, *others = outcomes[next(case for case in LOCAL if case.model == "classifier").reference]["classes"]
    assert len(first) == 3 and not any(alike(first, other) for other in others)


# What the scenarios show, in the reference ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(outcomes: Outcomes) -> dict[str, Any]:
    return outcomes[LOCAL[0].reference]


def texts(outcome: Any) -> list[str]:
    return [completion["text"] for completions, _ in outcome for completion in completions]


def test_constrained_texts_are_what_was_asked_for(reference: dict[str, Any]) -> None:
    person, one, two, choice, _ = texts(reference["structured"])
    assert set(json.loads(person)) == {"name", "age"}
    assert re.fullmatch(NAME, one) and re.fullmatch(NAME, two) and one != two
    assert choice in ("red", "green", "blue")


def test_parameters_change_what_is_generated(reference: dict[str, Any]) -> None:
    free = texts(reference["greedy"])
    assert all(one != other for one, other in zip(free, texts(reference["seeded samples"]), strict=True))
    assert len(set(texts(reference["penalties"]))) == 3
    assert len(set(texts(reference["several samples"]))) == 6
    banned, biased, favoured, stopped, put_off = reference["banned and favoured tokens"]
    assert all(text not in free[0] for text in texts([banned, biased, favoured, put_off]))
    assert stopped[0][0]["finish_reason"] == "stop" and len(stopped[0][0]["token_ids"]) == 1
    cut, kept = texts(reference["stop strings"])
    assert kept.startswith(cut) and len(kept) == len(cut) + 4 and free[0].startswith(kept)


def test_blocks_are_reused_and_given_back(reference: dict[str, Any]) -> None:
    again, hits, other, other_hits = reference["known prefixes"]
    assert hits == other_hits == 16 and again and other
    assert reference["abort"] == [0, 0, 0, reference["greedy"]]


def test_new_weights_are_used_and_those_that_do_not_fit_are_refused(reference: dict[str, Any]) -> None:
    changed, back, unfit, not_ready, *slept = reference["new weights"]
    assert changed != back == reference["greedy"]
    assert unfit == ["ModelError"] and not_ready[0] == "EngineError"
    asleep, awake = ["EngineError", "the engine sleeps: wake_up() first"], back
    assert slept == [asleep, awake] * 2


def test_errors_have_the_types_that_say_whose_they_are(reference: dict[str, Any]) -> None:
    *refused, after = reference["refused requests"]
    assert [kind for kind, _ in refused] == ["RequestError"] * 6 + ["ModelError"]
    call, after_the_call, step, *rest = reference["failing workers"]
    assert after == after_the_call == reference["greedy"]
    assert (call[:2], step[:2]) == (["WorkerError", "AttributeError"], ["WorkerError", "AssertionError"])
    assert rest == [["EngineDead"], ["EngineDead"], ["WorkerError"]]
