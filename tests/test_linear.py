"""Linears in every format against dequantize-then-matmul, with everything that is fused into them."""

import pytest
import torch
import torch.nn.functional as F

from linear import Int4Linear, Int8Linear, Linear, RMSNorm, from_linear, pack_int4, quantize_rtn, unpack

FORMATS = ["plain", "int8", "int8-packed", "int4-g32", "int4-g128", "int4-row", "int4-zero", "int4-permuted"]
SHAPES = [(128, 64), (256, 48), (384, 130), (640, 16)]  # in, out


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make(kind: str, k: int, n: int, *, bias: bool = False, experts: int = 0) -> tuple[Linear, torch.Tensor]:
    """(a Linear of that format, the float weight it stands for, in the inputs' own order)."""
    plain = Linear(k, n, bias, num_experts=experts)
    plain.weight.copy_(rand(*((experts,) if experts else ()), n, k) / k**0.5)
    if bias:
        assert plain.bias is not None
        plain.bias.copy_(rand(n, seed=1))
    if kind == "plain":
        return plain, plain.weight
    if kind.startswith("int8"):
        plain.use_kernels = kind == "int8-packed"
        out = from_linear(plain, 8)
        out.use_kernels = False
        assert isinstance(out, Int8Linear)
        q, scale = quantize_rtn(plain.weight, 8, -1, torch.float32)
        return out, q.float() * scale
    size = {"int4-g32": 32, "int4-row": -1}.get(kind, 128 if k % 128 == 0 else 64)
    q, scale = quantize_rtn(plain.weight, 4, size, torch.float32)
    out = Int4Linear(k, n, num_experts=experts, device=torch.device("meta"))
    out.bias = plain.bias
    zero = rand(*scale.shape, seed=2).mul(4).round().clamp(-8, 7) if kind == "int4-zero" else None
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3)) if kind == "int4-permuted" else None
    out.set_(q, scale, zero, order)
    grouped = q.float().unflatten(-1, (scale.shape[-1], -1)) - (0 if zero is None else zero.unsqueeze(-1))
    weight = (grouped * scale.unsqueeze(-1)).flatten(-2)
    return out, weight if order is None else weight[..., order.argsort()]


def direct(x, weight, bias=None, norm=None, residual=None, silu_mul=False):
    """The definition, in float64."""
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    y = x @ weight.double().mT + (0 if bias is None else bias.double())
    if silu_mul:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return (y if residual is None else y + residual.double()).float()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape and want.abs().max() > 0.1
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("k, n", SHAPES)
def test_every_format_against_dequantize_then_matmul(kind, k, n):
    linear, weight = make(kind, k, n)
    torch.testing.assert_close(linear.dequantize(torch.float32), weight, atol=1e-7, rtol=1e-6)
    for rows in (*range(1, 17), 40):
        x = rand(rows, k, seed=rows)
        close(linear(x), direct(x, weight))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 16, 33])
@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_fused_around_the_matmul(kind, rows, silu_mul, bias):
    k, n = 256, 96
    linear, weight = make(kind, k, n, bias=bias)
    norm = RMSNorm(k, 1e-3)
    norm.weight.copy_(1 + 0.3 * rand(k))
    x, residual = rand(rows, k) * 0.05, rand(rows, n // 2 if silu_mul else n, seed=5)
    for chosen_norm in (None, norm):
        for added in (None, residual):
            got = linear(x, norm=chosen_norm, residual=added, silu_mul=silu_mul)
            want = direct(x, weight, linear.bias, chosen_norm, added, silu_mul)
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
            assert want.shape == got.shape


@pytest.mark.parametrize("kind", FORMATS)
def test_three_dimensional_inputs(kind):
    linear, weight = make(kind, 128, 64, bias=True)
    norm = RMSNorm(128, 1e-5)
    norm.weight.copy_(1 + 0.3 * rand(128))
    x, residual = rand(2, 5, 128), rand(2, 5, 32)
    got = linear(x, norm=norm, residual=residual, silu_mul=True)
    assert got.shape == (2, 5, 32)
    close(got, direct(x, weight, linear.bias, norm, residual, True))
    close(linear(x.transpose(0, 1)), direct(x.transpose(0, 1), weight, linear.bias))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("silu_mul", [False, True])
def test_experts(kind, silu_mul):
    linear, weight = make(kind, 128, 64, experts=5)
    x, chosen = rand(20, 128), torch.randint(0, 5, (20,), generator=torch.Generator().manual_seed(1))
    each = torch.cat([direct(x[m : m + 1], weight[e], silu_mul=silu_mul) for m, e in enumerate(chosen.tolist())])
    for rows in (1, 2, 16, 20):
        close(linear(x[:rows], silu_mul=silu_mul, experts=chosen[:rows]), each[:rows])
    for e in range(5):
        close(linear(x, silu_mul=silu_mul, experts=e), direct(x, weight[e], silu_mul=silu_mul))


def test_kernels_flag_without_a_kernel_is_the_same():
    """On a device that the kernels do not serve, the fused call falls back to its twin, in chunks for many experts."""
    for kind in FORMATS:
        linear, _ = make(kind, 128, 64, experts=3)
        x, chosen = rand(37, 128), torch.arange(37) % 3
        want = linear(x, silu_mul=True, experts=chosen)
        linear.use_kernels = True
        torch.testing.assert_close(linear(x, silu_mul=True, experts=chosen), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_half_precision(bits, dtype):
    plain = Linear(256, 64, dtype=dtype)
    plain.weight.copy_(rand(64, 256) / 16)
    linear = plain if bits == 16 else from_linear(plain, bits)
    assert linear.dequantize().dtype == dtype
    x = rand(4, 256).to(dtype)
    got, want = linear(x), direct(x, linear.dequantize(torch.float32))
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() < 0.02 * want.abs().max()


# -- from_linear ----------------


@pytest.mark.parametrize(
    "bits, group_size, worst", [(8, 128, 0.01), (4, 32, 0.10), (4, 64, 0.11), (4, 128, 0.12), (4, -1, 0.16)]
)
def test_round_to_nearest_errors_are_small_and_not_zero(bits, group_size, worst):
    linear, weight = make("plain", 1024, 96, bias=True)
    quantized = from_linear(linear, bits, group_size)
    error = (quantized.dequantize(torch.float32) - weight).norm() / weight.norm()
    assert worst / 3 < error < worst
    x = rand(7, 1024)
    assert (quantized(x) - linear(x)).norm() / linear(x).norm() < worst
    assert quantized.bias is linear.bias


@pytest.mark.parametrize("bits, group_size", [(8, -1), (4, 32), (4, 128)])
def test_round_to_nearest_is_within_half_a_step(bits, group_size):
    weight = rand(16, 256)
    q, scale = quantize_rtn(weight, bits, group_size, torch.float32)
    size = 256 if group_size == -1 else group_size
    assert q.dtype == torch.int8 and scale.shape == (16, 256 // size)
    assert q.min() >= (-8 if bits == 4 else -127) and q.max() <= (7 if bits == 4 else 127)
    error = ((q.float().unflatten(-1, (-1, size)) * scale[..., None]).flatten(-2) - weight).abs()
    assert (error <= scale.repeat_interleave(size, -1) * 0.5001).all()  # 7.5 steps to the largest: it rounds to 7


def test_groups_of_zeros_and_the_dtype_of_scales():
    weight = torch.zeros(4, 64)
    weight[1, :32] = 1e-30
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, scale = quantize_rtn(weight, 4, 32, dtype)
        assert scale.dtype == dtype and (scale > 0).all() and (q == 0).all()


def test_group_size_that_does_not_divide():
    with pytest.raises(ValueError, match="in_features 96 is not a multiple of group size 64"):
        quantize_rtn(rand(4, 96), 4, 64, torch.float32)
    with pytest.raises(ValueError, match="zero points"):
        Int8Linear(8, 4).set_(torch.zeros(4, 8).to(torch.int8), torch.ones(4, 1), torch.ones(4, 1))


def test_experts_are_quantized_one_by_one():
    linear, weight = make("plain", 128, 32, experts=3)
    weight[1] *= 1000  # must not spoil the scales of the others
    for bits, worst in ((8, 0.01), (4, 0.12)):
        got = from_linear(linear, bits, 64).dequantize(torch.float32)
        for e in range(3):
            assert (got[e] - weight[e]).norm() / weight[e].norm() < worst


@pytest.mark.parametrize("kind, per_weight", [("plain", 4), ("int8", 1), ("int4-g32", 0.5)])
def test_bytes_read(kind, per_weight):
    """Weights in their format, scales on top; one expert's share only."""
    scales = {"plain": 0, "int8": 4 * 64, "int4-g32": 4 * 64 * 8}[kind]
    assert make(kind, 256, 64)[0].bytes_read() == int(256 * 64 * per_weight) + scales
    assert make(kind, 256, 64, experts=4)[0].bytes_read() == int(256 * 64 * per_weight) + scales


def test_rms_norm_casts_before_it_scales():
    """As transformers does; in bfloat16 the order is visible in the last bit."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = RMSNorm(64, 1e-5, dtype=dtype), LlamaRMSNorm(64, 1e-5).to(dtype)
        ours.weight.copy_(1 + rand(64))
        theirs.weight.data.copy_(ours.weight)
        x = rand(50, 64).to(dtype)
        assert torch.equal(ours(x), theirs(x))


def test_int4_packing_round_trip_with_padding():
    q = torch.randint(-8, 8, (3, 21, 70), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(unpack(pack_int4(q))[:, :21, :70], q)
