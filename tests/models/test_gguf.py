"""GGUF files: names, layouts, quantised types, and the real demo model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headway.errors import ModelError
from headway.gguf import GGUFFile
from headway.models.describe import describe
from headway.models.source import resolve_source

gguf = pytest.importorskip("gguf")

Make = Callable[..., Any]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def write_gguf(
    model: Any,
    arch: str,
    path: Path,
    *,
    kind: str = "F32",
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    without: str = "",
) -> Path:
    """As the usual converter lays a model out: rotated pairs interleaved for llama, no transposed linears."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(config.head_dim if arch != "qwen2" else config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, weight in model.state_dict().items():
        if name == without or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        w = weight.T if name.endswith(CONV1D) else weight
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            w = w.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(w.shape)
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        array = w.contiguous().numpy()
        if w.dim() == 2:
            writer.add_tensor(own, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(own, array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize(
    ("name", "arch"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gpt2", "gpt2")]
)
def test_logits_equal_those_of_the_converted_model(
    name: str, arch: str, checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]], tmp_path: Path
) -> None:
    reference, path = checkpoint(name)
    model = load(write_gguf(reference, arch, tmp_path / "m.gguf"))
    assert model.spec == load(path).spec  # so that it takes the other's weights
    found = paged(model, prompts).logits({0: len(prompts[0])})[0]
    torch.testing.assert_close(found, logits_of(reference, prompts[0]), **TOLERANCE)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_those_the_gguf_package_reads(
    kind: str, checkpoint: Make, load: Make, tmp_path: Path
) -> None:
    reference, _ = checkpoint("llama", hidden_size=64, intermediate_size=96, num_attention_heads=8)
    path = write_gguf(reference, "llama", tmp_path / "m.gguf", kind=kind)
    (stored,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    found = load(path).layers[1].gate_up.rows(torch.arange(96, 192))
    assert torch.equal(found, expected)


def test_long_rope_factors_stored_as_a_tensor(
    checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]], tmp_path: Path
) -> None:
    reference, _ = checkpoint("llama-rope-llama3")
    plain, _ = checkpoint("llama", head_dim=16)
    factors = (plain.model.rotary_emb.inv_freq / reference.model.rotary_emb.inv_freq).numpy()
    path = write_gguf(reference, "llama", tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
    found = paged(load(path), prompts).logits({0: len(prompts[0])})[0]
    torch.testing.assert_close(found, logits_of(reference, prompts[0]), **TOLERANCE)


@pytest.mark.parametrize("lost", ["attn_q.weight", "attn_norm.weight"])
def test_missing_tensor_is_named(lost: str, checkpoint: Make, load: Make, tmp_path: Path) -> None:
    name = {"attn_q.weight": "self_attn.q_proj.weight", "attn_norm.weight": "input_layernorm.weight"}[lost]
    reference, _ = checkpoint("llama")
    path = write_gguf(reference, "llama", tmp_path / "m.gguf", without=f"model.layers.2.{name}")
    with pytest.raises(ModelError, match=rf"m\.gguf: tensor blk\.2\.{lost} is missing"):
        load(path)


def test_tensor_of_another_shape_than_the_metadata_says(checkpoint: Make, load: Make, tmp_path: Path) -> None:
    reference, _ = checkpoint("llama")
    reference.config.intermediate_size = 80
    path = write_gguf(reference, "llama", tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_gate\.weight has shape \(88, 48\)"):
        load(path)


def test_facts_come_from_the_metadata() -> None:
    facts = describe(resolve_source("smollm2-135m-instruct"))
    assert (facts.architecture, facts.kind, facts.vocab_size) == ("LlamaForCausalLM", "decoder", 49152)
    assert (facts.num_layers, facts.num_kv_heads, facts.head_dim, facts.max_positions) == (30, 3, 64, 8192)
    assert (facts.num_parameters, facts.dtype, facts.eos_token_ids) == (134_515_008, "bfloat16", (2,))


def test_container_agrees_with_the_gguf_package() -> None:
    path = resolve_source("smollm2-135m-instruct")
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert {t.name: (t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        t.name: (t.offset, t.nbytes) for t in ours.tensors.values()
    }
    arrays = gguf.GGUFValueType.ARRAY
    scalars = {n: f for n, f in theirs.fields.items() if not n.startswith("GGUF.") and f.types[0] != arrays}
    assert len(scalars) > 20
    for name, field in scalars.items():
        assert ours.metadata[name] == field.contents()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_demo_model_equals_transformers(
    transformers_smollm2: Any, transformers_tokenizer: Any, load: Make, paged: Make
) -> None:
    tokens = transformers_tokenizer.encode("Gravity is the force by which a planet draws objects toward its center.")
    found = paged(load(resolve_source("smollm2-135m-instruct")), [tokens], 16).logits({0: len(tokens)})[0]
    expected = logits_of(transformers_smollm2, tokens)
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


SUBJECTS = ["rivers", "bread", "the number seven", "music", "trains", "bees", "winter", "money", "sleep", "maps"]
QUESTIONS = [
    "Tell me something surprising about {}.",
    "Write a short poem about {}.",
    "Explain {} to a child of five.",
    "List three facts about {}:",
    "Once upon a time, somebody who loved {}",
]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_demo_model_generates_what_transformers_does(
    transformers_smollm2: Any, transformers_tokenizer: Any, load: Make, paged: Make
) -> None:
    texts = [question.format(subject) for question in QUESTIONS for subject in SUBJECTS]
    prompts = [transformers_tokenizer.encode(text) for text in texts]
    model = load(resolve_source("smollm2-135m-instruct"))
    for tokens in prompts:
        expected = transformers_smollm2.generate(
            torch.tensor([tokens]), do_sample=False, min_new_tokens=64, max_new_tokens=64, pad_token_id=2
        )[0, len(tokens) :].tolist()
        # min_new_tokens bars the end token: compare up to where the model would have stopped.
        found = paged(model, [list(tokens)], 16).greedy(64)[0]
        end = found.index(2) if 2 in found else 64
        assert found[:end] == expected[:end]
