"""The kernels' dequantisation against the gguf library's."""

import gguf
import gguf.quants
import numpy as np
import pytest
import torch

from headway.ops import get_ops
from headway.ops.cpu import abi

ISAS = [isa for isa in ("avx512bf16", "avx512", "avx2", "portable") if abi.find_kernels(isa) is not None]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q8_0"])
def test_numbers_are_those_of_the_gguf_library(isa: str, dtype: torch.dtype, quantisation: str) -> None:
    kind = gguf.GGMLQuantizationType[quantisation]
    blocks = gguf.quants.quantize(np.random.default_rng(0).standard_normal((300, 64), dtype=np.float32), kind)
    out = torch.empty(300 * 64, dtype=dtype)
    assert get_ops("cpu", threads=2, isa=isa).dequantise(quantisation, blocks.reshape(-1), out)
    assert torch.equal(out, torch.from_numpy(gguf.quants.dequantize(blocks, kind)).reshape(-1).to(dtype))


def test_other_quantisations_are_left_to_the_library() -> None:
    assert not get_ops("reference", threads=1).dequantise("Q4_1", np.zeros(20, np.uint8), torch.empty(32))
    if ISAS:
        assert not get_ops("cpu", threads=1).dequantise("Q6_K", np.zeros(210, np.uint8), torch.empty(256))
