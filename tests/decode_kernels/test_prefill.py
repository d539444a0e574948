"""The kernels around a prefill's products equal the plain PyTorch which they stand for."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, needs_kernels, relative_error
from test_attention import attended, attention_of, make_attention

import decode_kernels
import linear
from linear import RMSNorm

# batch, T, H, Hkv, Dh, slots, first positions, window, q and k norm
PREFILLS = [
    (1, 17, 4, 4, 64, 17, [0], 0, False),  # a first prefill that fills its cache
    (2, 33, 6, 2, 128, 64, [0, 0], 0, True),
    (2, 20, 7, 1, 80, 100, [3, 50], 16, True),  # behind a prefix, with a window; neither heads nor dimensions are 2^n
]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PREFILLS, ids=str)
def test_attention_of_many_tokens_equals_twin(dtype, case):
    b, t, h, hkv, dim, slots, first, window, norm = case
    args = [a if a is None else a.to(DEVICE) for a in make_attention(b, t, h, hkv, dim, slots, first, dtype, norm)]
    wanted_args = [a if a is None or not a.is_floating_point() else a.float() for a in args]
    got = attended(attention_of(h, hkv, dim, window, *args[6:]), *args[:6], fast=True)
    wanted = attended(attention_of(h, hkv, dim, window, *wanted_args[6:]), *wanted_args[:6], fast=False)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative_error(got, wanted) < bound
    for new, old in zip(args[4:6], wanted_args[4:6]):
        assert relative_error(new, old) < bound
        kept = torch.ones(b, slots, dtype=torch.bool, device=DEVICE).scatter_(1, args[3], False)
        assert torch.equal(new.transpose(1, 2)[kept], old.to(dtype).transpose(1, 2)[kept])


@needs_kernels
@pytest.mark.parametrize("kind", ["plain", "bias", "int8", "int4", "experts"])
def test_linear_of_many_rows_equals_twin(kind):
    dtype, gen = torch.float16, torch.Generator().manual_seed(0)
    module = linear.Linear(256, 600, kind == "bias", num_experts=2 if kind == "experts" else 0, dtype=dtype)
    module.weight.data.copy_(torch.randn(module.shape, generator=gen) / 16)
    if kind == "bias":
        module.bias.data.copy_(torch.randn(600, generator=gen))
    if kind in ("int8", "int4"):
        module = linear.from_linear(module, int(kind[3:]))
    module, experts = module.to(DEVICE), 1 if kind == "experts" else None
    norm = RMSNorm(256, 1e-5, DEVICE, dtype)
    norm.weight.data.copy_(torch.rand(256, generator=gen))
    x, residual = (torch.randn(40, n, generator=gen).to(DEVICE, dtype) for n in (256, 600))
    kept = residual.clone()
    for extra in ({}, {"norm": norm, "silu_mul": True}, {"residual": residual}):
        decode_kernels.use_(module, False)
        wanted = module(x, experts=experts, **extra)
        decode_kernels.use_(module)
        assert relative_error(module(x, experts=experts, **extra), wanted) < 2e-3
    assert torch.equal(residual, kept)
