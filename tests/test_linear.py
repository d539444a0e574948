"""Linears in every format against dequantize-then-matmul, with everything that is fused into them."""

import pytest
import torch
import torch.nn.functional as F

from linear import Int4Linear, Int8Linear, Linear, RMSNorm, from_linear, quantize_rtn

FORMATS = ["plain", "int8-row", "int8-g32", "int8-zero", "int8-permuted"]
FORMATS += ["int4-g32", "int4-g128", "int4-row", "int4-zero", "int4-permuted"]
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
    bits, size = int(kind[3]), {"g32": 32, "row": -1}.get(kind[5:], 128 if k % 128 == 0 else 64)
    q, scale = quantize_rtn(plain.weight, bits, size, torch.float32)
    cls = Int8Linear if bits == 8 else Int4Linear
    out = cls(k, n, num_experts=experts, device=torch.device("meta"))
    out.bias = plain.bias
    half = 2 ** (bits - 1)
    zero = rand(*scale.shape, seed=2).mul(half / 2).round().clamp(-half, half - 1) if kind.endswith("zero") else None
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3)) if kind.endswith("permuted") else None
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


class Scrambled:
    """A fast path for the tests: rows of the matrix in reverse order, and it serves one row of activations only."""

    calls = 0

    def covers(self, linear):
        return True

    def pack(self, q):
        return q.flip(-2)

    def unpack(self, packed, n, k):
        return packed.flip(-2)

    def constants(self, linear):
        return None

    def matrix(self, linear, experts, dtype):
        return None

    def __call__(self, linear, x, norm, residual, silu_mul, experts):
        if len(x) > 1:
            return None
        self.calls += 1
        return torch.full((1, linear.out_features), 7.0)


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_a_fast_path_serves_what_it_covers_and_can_be_taken_away(kind):
    linear, weight = make(kind, 128, 64, bias=True)
    before, fast = {name: t.clone() for name, t in linear.state_dict().items()}, Scrambled()
    linear.use_(fast)
    assert not torch.equal(linear.weight_packed.flatten()[:64], before["weight_packed"].flatten()[:64])
    assert (linear(rand(1, 128)) == 7).all() and fast.calls == 1
    x = rand(5, 128)
    close(linear(x), direct(x, weight, linear.bias))
    torch.testing.assert_close(linear.dequantize(torch.float32), weight, atol=1e-7, rtol=1e-6)
    after = linear.state_dict()  # holds the plain layout all the same
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    linear.use_(None)
    assert torch.equal(linear.weight_packed, before["weight_packed"])


@pytest.mark.parametrize("fast", [None, Scrambled()])
@pytest.mark.parametrize("kind", FORMATS)
def test_state_dicts_are_loaded_whatever_their_groups(kind, fast):
    for experts in (0, 3):
        linear, weight = make(kind, 128, 48, bias=not experts, experts=experts)
        cls = type(linear)
        fresh = cls(128, 48, not experts, num_experts=experts)
        if kind != "plain":
            fresh.weight_scale, fresh.fast = torch.ones(2, 3), fast
        fresh.load_state_dict(linear.state_dict())
        assert torch.equal(fresh.dequantize(torch.float32), weight) or kind != "plain"
        torch.testing.assert_close(fresh.dequantize(torch.float32), weight, atol=1e-7, rtol=1e-6)
        if not experts:
            x = rand(3, 128)
            close(fresh(x), direct(x, weight, linear.bias))


def test_state_dicts_of_another_shape_or_format_are_refused():
    state = make("int4-g32", 128, 48)[0].state_dict()
    for other, match in (
        (Int4Linear(256, 48), "size mismatch for weight_packed"),
        (Int4Linear(128, 64), "size mismatch for weight_packed"),
        (Int8Linear(128, 48), "size mismatch for weight_packed"),
    ):
        with pytest.raises(RuntimeError, match=match):
            other.load_state_dict(state)
    for name, wrong in (("weight_scale", torch.ones(48)), ("weight_zero_point", torch.ones(24, 4))):
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            Int4Linear(128, 48).load_state_dict(state | {name: wrong})
    with pytest.raises(RuntimeError, match="Missing key.*weight_scale"):
        Int4Linear(128, 48).load_state_dict({"weight_packed": state["weight_packed"]})


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
    "bits, group_size, worst",
    [(8, None, 0.01), (8, 32, 0.006), (4, 32, 0.10), (4, 64, 0.11), (4, 128, 0.12), (4, -1, 0.16)],
)
def test_round_to_nearest_errors_are_small_and_not_zero(bits, group_size, worst):
    linear, weight = make("plain", 1024, 96, bias=True)
    quantized = from_linear(linear, bits, group_size)
    error = (quantized.dequantize(torch.float32) - weight).norm() / weight.norm()
    assert worst / 3 < error < worst
    x = rand(7, 1024)
    assert (quantized(x) - linear(x)).norm() / linear(x).norm() < worst
    assert torch.equal(quantized.bias, linear.bias)


@pytest.mark.parametrize("bits, group_size", [(8, -1), (8, 64), (4, 32), (4, 128)])
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


def test_experts_are_quantized_one_by_one():
    linear, weight = make("plain", 128, 32, experts=3)
    weight[1] *= 1000  # must not spoil the scales of the others
    for bits, worst in ((8, 0.01), (4, 0.12)):
        got = from_linear(linear, bits, 64).dequantize(torch.float32)
        for e in range(3):
            assert (got[e] - weight[e]).norm() / weight[e].norm() < worst


@pytest.mark.parametrize("kind, per_weight", [("plain", 4), ("int8-row", 1), ("int8-g32", 1), ("int4-g32", 0.5)])
def test_bytes_read(kind, per_weight):
    """Weights in their format, scales on top; one expert's share only."""
    scales = {"plain": 0, "int8-row": 4 * 64}.get(kind, 4 * 64 * 8)
    assert make(kind, 256, 64)[0].bytes_read() == int(256 * 64 * per_weight) + scales
    assert make(kind, 256, 64, experts=4)[0].bytes_read() == int(256 * 64 * per_weight) + scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_computed_in_float32_and_cast_last(dtype):
    """In transformers the cast comes before the scale, which in 16 bits may differ in the last place."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = RMSNorm(64, 1e-5, dtype=dtype), LlamaRMSNorm(64, 1e-5).to(dtype)
    ours.weight.copy_(1 + rand(64))
    theirs.weight.data.copy_(ours.weight)
    x = rand(50, 64).to(dtype)
    h = x.double()
    exact = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.weight.double()
    bits = {torch.float32: 4e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((ours(x).double() - exact).abs() <= bits * exact.abs() * 1.0001).all()
    assert ((ours(x).double() - theirs(x).double()).abs() <= 3 * bits * exact.abs()).all()


def test_nibbles_round_trip_and_lie_as_documented():
    for k in (70, 71, 2):
        q = torch.randint(-8, 8, (3, 21, k), generator=torch.Generator().manual_seed(0)).to(torch.int8)
        linear = Int4Linear(k, 21, num_experts=3)
        packed = linear.lay(q)
        assert packed.shape == (3, 21, -(-k // 2)) and packed.dtype == torch.uint8
        assert torch.equal(linear.lift(packed), q)
    assert Int4Linear(2, 1).lay(torch.tensor([[-8, 7]], dtype=torch.int8)).tolist() == [[0x78]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_linears_of_pytorch_are_quantized(bits, bias):
    theirs = torch.nn.Linear(128, 32, bias)
    ours, x = from_linear(theirs, bits, 32), rand(3, 128)
    assert (ours(x) - theirs(x)).norm() < 0.12 * theirs(x).norm()
    assert not any(t.requires_grad for t in ours.parameters())
    with pytest.raises(ValueError, match="quantized already"):
        from_linear(ours, bits)
    with pytest.raises(ValueError, match="bits is 3"):
        from_linear(theirs, 3)
