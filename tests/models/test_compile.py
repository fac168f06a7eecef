"""A decoder's program computes what its operations do, whatever the family and however the prompt is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.models.checkpoints import PAGED

from headway.config.settings import ModelConfig
from headway.models.compile import compile_decoder
from headway.models.registry import load_model
from headway.ops import get_ops
from headway.ops.cpu import abi
from headway.ops.cpu.program import ARGMAX, LOGITS, SAMPLE
from headway.worker.batch import Batch

pytestmark = pytest.mark.skipif(abi.library() is None, reason="the kernels were not built on this machine")

BLOCK = 16


class ProgramRun:
    """Sequences in slots of a batch, their blocks scattered; step() returns the logits after the runs' last tokens."""

    def __init__(self, model, sequences: list[list[int]]) -> None:
        kv = model.allocate_kv(64, BLOCK)
        self.batch = Batch(len(sequences), 128, BLOCK, model.vocab_size)
        builder = model.ops.program_builder(kv)
        self.program = compile_decoder(model, builder, max_tokens=64, max_runs=len(sequences))
        for slot, tokens in enumerate(sequences):
            self.batch.tokens[slot, : len(tokens)] = tokens
            self.batch.length[slot] = self.batch.prompt_len[slot] = len(tokens)
            self.batch.block_table[slot] = np.arange(9) * len(sequences) + slot + 1

    def step(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        slots, tokens = (np.array(list(x), np.int32) for x in (counts, counts.values()))
        rows = np.arange(len(slots), dtype=np.int32)
        self.program.run(self.batch, slots, tokens, rows, np.full(len(slots), LOGITS, np.int32))
        self.batch.computed[slots] += tokens
        return {slot: torch.tensor(self.program.logits(row)) for row, slot in enumerate(counts)}


@pytest.mark.parametrize("isa", [s for s in ("avx512bf16", "avx2") if abi.library() and abi.find_kernels(s)])
@pytest.mark.parametrize("name", PAGED)
def test_program_equals_the_reference(name, isa, checkpoint, load, paged, prompts):
    _, path = checkpoint(name, **PAGED[name])
    reference = load(path)
    config = ModelConfig(path=str(path), served_model_name="m", dtype="float32")
    run = ProgramRun(load_model(config, get_ops("cpu", threads=2, isa=isa)), prompts)
    expected = {i: paged(reference, [tokens]).logits({0: len(tokens)})[0] for i, tokens in enumerate(prompts)}
    done = dict.fromkeys(range(len(prompts)), 0)
    for counts in ({0: 9, 3: 5}, {2: 3, 0: 13}, {1: 1, 0: 1, 2: 11}):
        for slot, logits in run.step(counts).items():
            done[slot] += counts[slot]
            torch.testing.assert_close(logits, expected[slot][done[slot] - 1], atol=1e-4, rtol=1e-4)


def test_rows_are_the_same_bits_whatever_else_is_in_the_step(checkpoint, prompts):
    """Seeded sampling, preemption and chunking rest on this."""
    _, path = checkpoint("llama", head_dim=16)
    config = ModelConfig(path=str(path), served_model_name="m", dtype="bfloat16")
    model = load_model(config, get_ops("cpu", threads=2))
    together, alone = ProgramRun(model, prompts), ProgramRun(model, prompts)
    batched = together.step({i: len(tokens) for i, tokens in enumerate(prompts)})
    for slot, tokens in enumerate(prompts):
        whole = alone.step({slot: len(tokens)})[slot]
        assert torch.equal(batched[slot], whole)
    pieces = ProgramRun(model, prompts)
    for count in (7, 1, 15):
        last = pieces.step({0: count})[0]
    assert torch.equal(last, batched[0])


def test_a_model_of_nothing_but_nan_still_yields_token_ids(checkpoint, prompts):
    """The next step looks its embedding up: an id outside the vocabulary would read foreign memory."""
    model_hf, path = checkpoint("llama", head_dim=16)
    with torch.no_grad():
        model_hf.model.norm.weight.fill_(float("nan"))
    model_hf.save_pretrained(path)
    config = ModelConfig(path=str(path), served_model_name="m", dtype="float32")
    run = ProgramRun(load_model(config, get_ops("cpu", threads=2)), prompts)
    one = np.zeros(1, np.int32)
    for want in (ARGMAX, SAMPLE):
        run.batch.temperature[0] = run.batch.top_p[0] = 1.0
        token = run.program.run(run.batch, one, one + 1, one, np.full(1, want, np.int32))
        assert 0 <= token[0] < model_hf.config.vocab_size
