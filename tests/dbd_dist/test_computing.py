"""How a process computes, where it is left to the program."""

from __future__ import annotations

import pytest
import torch

from dbd_dist.config import ComputeConfig
from dbd_dist.runtime.computing import uses_bf16


@pytest.mark.parametrize(
    ("capability", "has_bf16", "expected"),
    [("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False), ("DEFAULT", False, False)],
)
def test_a_cpu_computes_in_bf16_where_torch_uses_its_instructions(monkeypatch, capability, has_bf16, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    cpu = torch.device("cpu")
    assert uses_bf16(ComputeConfig(), cpu) == expected
    assert uses_bf16(ComputeConfig(precision="bf16"), cpu)
    assert not uses_bf16(ComputeConfig(precision="fp32"), cpu)
