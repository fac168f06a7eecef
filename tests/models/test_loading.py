"""Directories: sharded, pickled, random; and every way in which a checkpoint can be broken."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.errors import ModelError
from headway.models.describe import describe
from headway.models.source import resolve_source

Make = Callable[..., Any]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def expect_same(reference: Any, model: Any, paged: Make, tokens: list[int]) -> None:
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(paged(model, [tokens]).logits({0: len(tokens)})[0], expected, **TOLERANCE)


def test_sharded_safetensors(checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]) -> None:
    reference, path = checkpoint("llama")
    (path / "model.safetensors").unlink()
    reference.save_pretrained(path, max_shard_size="50KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    expect_same(reference, load(path), paged, prompts[0])


def test_pickled_weights(checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]) -> None:
    reference, path = checkpoint("llama")
    (path / "model.safetensors").unlink()
    torch.save(reference.state_dict(), path / "pytorch_model.bin")
    expect_same(reference, load(path), paged, prompts[0])


def test_pickle_that_runs_code_is_refused(checkpoint: Make, load: Make, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    _, path = checkpoint("llama")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: truncated, corrupt or not plain weights"):
        load(path)
    assert not (tmp_path / "sprung").exists()


def test_checkpoint_of_the_bare_body(checkpoint: Make, load: Make) -> None:
    _, whole = checkpoint("qwen3")
    _, bare = checkpoint("qwen3", "Model")
    assert len(load(bare, runner="pooling").layers) == len(load(whole).layers)


def test_old_names_of_norm_weights(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("bert", "Model")
    file = path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
        for name, tensor in load_file(file).items()
    }
    before = load(path).weights.layers[0].attn_norm.weight.clone()
    save_file(old, file)
    assert torch.equal(load(path).weights.layers[0].attn_norm.weight, before)


def test_random_weights_need_no_files_and_repeat(
    checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]
) -> None:
    _, path = checkpoint("qwen3")
    (path / "model.safetensors").unlink()
    first, second, other = (
        paged(load(path, load_format="dummy", seed=seed), prompts).logits({0: 5})[0] for seed in (1, 1, 2)
    )
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_nothing_keeps_the_files_mapped(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("bert", "Model")
    model = load(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert model.weights_bytes > 0


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
@pytest.mark.parametrize("reader", ["load", "describe"])
def test_truncated_safetensors(kept: float, reader: str, checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("llama")
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated"):
        (load if reader == "load" else describe)(path)


def test_truncated_file_names_the_tensor_cut(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("llama")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"tensor [\w.]+ ends at byte \d+, the file at \d+"):
        load(path)


def test_garbled_safetensors_header(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("llama")
    file = path / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[8:40] = b"\xff" * 32
    file.write_bytes(whole)
    with pytest.raises(ModelError, match=r"model\.safetensors: corrupt safetensors header"):
        load(path)


def test_missing_tensor_is_named(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("llama")
    edit(path, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(path)


def test_misshapen_tensor_is_named(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("llama")
    edit(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(7,\); its configuration asks for \(48,\)"):
        load(path)


def test_integer_tensor_is_refused(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("llama")
    edit(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has type torch\.int8"):
        load(path)


def test_missing_shard_is_named(checkpoint: Make, load: Make) -> None:
    reference, path = checkpoint("llama")
    (path / "model.safetensors").unlink()
    reference.save_pretrained(path, max_shard_size="50KB")
    lost = sorted(path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=f"names files that are not there: {lost.name}"):
        load(path)


def test_corrupt_index(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("llama")
    (path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"index\.json: corrupt index"):
        load(path)


def test_directory_without_weights(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("llama")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has neither model\.safetensors"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"has no config\.json"),
        ("{", "not valid JSON"),
        ("{}", "has no model_type"),
        ('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', "num_attention_heads is missing"),
        ('{"model_type": "bert", "architectures": ["BertForTokenClassification"]}', "must end in ForCausalLM"),
        (
            '{"model_type": "foo", "architectures": ["FooForCausalLM"], "hidden_size": 8}',
            "FooForCausalLM is not among the supported model types llama, .*: num_attention_heads, vocab_size",
        ),
        ('{"model_type": "t5", "architectures": ["T5Model"]}', "T5Model is not supported; supported are the model"),
    ],
)
def test_configuration_that_cannot_be_used(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        describe(tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 30, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("reader", ["load", "describe"])
def test_truncated_gguf(kept: float, reader: str, load: Make, tmp_path: Path) -> None:
    whole = resolve_source("smollm2-135m-instruct").read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(ModelError, match=r"cut\.gguf: (truncated|cannot be read|not a GGUF)"):
        (load if reader == "load" else describe)(file)


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="GGUF architecture 'mamba' is not supported; supported are llama, qwen2"):
        describe(tmp_path / "m.gguf")


def test_something_else_named_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match="not a GGUF file"):
        describe(tmp_path / "m.gguf")


def test_generation_configuration_adds_end_tokens(checkpoint: Make) -> None:
    _, path = checkpoint("llama", eos_token_id=2)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert describe(path).eos_token_ids == (7, 2)
