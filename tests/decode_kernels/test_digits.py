"""The digits that gates and ups leave for the product behind them, whose largest is not known."""

import dataclasses

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, HAS_TRITON, needs_kernels, relative_error
from test_reduce import ranks, send

import architectures
import decode_kernels
from checkpoint import random_model
from decode_kernels import INTERPRETED
from linear import from_linear
from tp import TensorParallel

if HAS_TRITON:
    from decode_kernels import gpu, reduce, sums

DTYPE, NEAR = DTYPES[0], 2e-3 if INTERPRETED else 1e-2


def config_of(width, hidden):
    sizes = {"hidden_size": hidden, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": width, "max_position_embeddings": 2048}
    return architectures.config_from_hf({"model_type": "llama"} | sizes)


def build(bits, width, group=None, hidden=128, seed=0):
    """(an MLP, the norm before it, x), without kernels."""
    torch.manual_seed(seed)
    layer = random_model(config_of(width, hidden), device=DEVICE, dtype=DTYPE).layers[0]
    layer.post_attention_layernorm.weight.uniform_(0.5, 1.5)
    for name in ("gate_up_proj", "down_proj"):
        linear = getattr(layer.mlp, name)
        linear.weight.normal_(std=linear.in_features**-0.5)
        setattr(layer.mlp, name, from_linear(linear, bits, group))
    return layer.mlp, layer.post_attention_layernorm, torch.randn(1, 1, hidden, device=DEVICE).to(DTYPE)


def value(digits, k):
    """The activations that four digits stand for, float64 [K]."""
    d = digits.digits.view(-1, 2, 8, 4, 2, 8).permute(2, 0, 4, 1, 3, 5).reshape(8, -1)[:4].double()
    unit = digits.units.view(-1, 1).expand(-1, 16).reshape(-1).double()
    return (((d[0] * 256 + d[1]) * 256 + d[2]) * 256 + d[3])[:k] * unit[:k]


@needs_kernels
@pytest.mark.parametrize("bits, group, width, outlier", [(4, 128, 384, 1), (4, 32, 128, 30), (8, -1, 256, 30)])
def test_four_digits_equals_twin(bits, group, width, outlier):
    """They are as near as two whose largest is known, and so is what is made of them."""
    mlp, norm, x = build(bits, width, group, hidden=512 if width == 128 else 128)
    norm.weight[7] *= outlier
    wanted = mlp(x, norm)
    decode_kernels.use_(mlp)
    h = mlp.gate_up_proj(x, norm=norm, silu_mul=True)
    digits = mlp.gate_up_proj.fast.leave.kept[1]
    largest = h.double().view(-1, 128).abs().amax(1)
    assert ((value(digits, width) - h.double().flatten()).view(-1, 128).abs().amax(1) < largest / 65024).all()
    got = mlp(x, norm)
    assert mlp.gate_up_proj.fast.leave.kept is None and digits.halves  # taken
    assert relative_error(got, wanted) < NEAR
    mlp.down_proj.fast = gpu.Quantized(bits)
    assert relative_error(got, mlp.down_proj(h, residual=x)) < NEAR / 4


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_the_bound_holds_and_equals_twin(bits):
    """With zero points and biases, and of the worst x, which a row of the matrix itself is."""
    mlp, norm, x = build(bits, 128, 32)
    gate_up = mlp.gate_up_proj
    q, scale = gate_up.values(gate_up.weight_packed), gate_up.weight_scale
    gate_up.set_(q, scale, torch.randint(-8, 8, scale.shape, device=DEVICE).to(DTYPE))
    gate_up.bias = torch.nn.Parameter(torch.full((256,), 0.5, device=DEVICE, dtype=DTYPE), requires_grad=False)
    gate_up.bias.normal_()
    w = gate_up.dequantize(torch.float64) * norm.weight.double()
    worst = w / w.square().mean(1, keepdim=True).sqrt()
    results = worst @ w.T + gate_up.bias.double()
    gate, up = results.abs().chunk(2, 1)
    largest = (gate * up).amax()
    wanted = mlp(x, norm)
    decode_kernels.use_(mlp)
    units = gpu.bounds.known_units(gate_up.operands(None), gate_up.bias, norm.weight, bits)
    assert units.shape == (1,) and largest / 2**30 <= units.item() < largest / 2**30 * 20
    assert relative_error(mlp(x, norm), wanted) < NEAR


@needs_kernels
def test_what_has_no_digits_is_not_finite_and_equals_twin():
    """NaN, an overflow, and what a gain that has changed since makes larger than the bound. The step after is well."""
    mlp, norm, x = build(4, 128)
    decode_kernels.use_(mlp)
    wanted, gain = mlp(x, norm), norm.weight.clone()
    bad = x.clone()
    bad[0, 0, 3] = float("nan")
    assert mlp(bad, norm).isnan().any()
    for factor in (100, 20000):  # 20000: infinite in float16
        norm.weight.copy_(gain * factor)
        assert mlp(x, norm).isnan().any()
        norm.weight.copy_(gain)
        assert torch.equal(mlp(x, norm), wanted)


@needs_kernels
@pytest.mark.parametrize("width, rows", [(320, 1), (264, 1), (256, 2)])
def test_other_shapes_leave_no_digits_and_equals_twin(width, rows):
    """Widths of part of a chunk or part of a tile, and two rows."""
    mlp, norm, x = build(8, width)
    x = x * torch.arange(1, rows + 1, device=DEVICE)[:, None].to(DTYPE)
    wanted = mlp(x, norm)
    decode_kernels.use_(mlp)
    assert relative_error(mlp(x, norm), wanted) < NEAR
    assert mlp.gate_up_proj.fast_constants is None and (mlp.gate_up_proj.fast.leave is None) == (width % 128 > 0)


@needs_kernels
def test_new_weights_have_new_units_and_equals_twin():
    (mlp, norm, x), (other, _, _) = build(4, 128), build(4, 128, seed=1)
    other.gate_up_proj.weight_scale *= 20
    wanted = other(x, norm)
    for module in (mlp, other):
        decode_kernels.use_(module)
        module(x, norm)
    mlp.load_state_dict(other.state_dict())
    assert "gate_up_proj.fast_constants" not in other.state_dict()
    assert relative_error(mlp(x, norm), wanted) < NEAR


@needs_kernels
def test_four_digits_of_a_product_that_sends_equals_twin():
    boxes, parts = ranks(2), [build(4, 128, seed=seed) for seed in range(2)]
    x, totals = parts[0][2], [sums.Sum(box) for box in boxes]
    wanted = sum(mlp(x, norm).float() for mlp, norm, _ in parts) - x.float()  # the residual comes from one
    halves = []
    for (mlp, norm, _), total in zip(parts, totals):
        decode_kernels.use_(mlp)
        h = mlp.gate_up_proj(x, norm=norm, silu_mul=True)
        halves.append(send(total, mlp.down_proj, h[0], x[0] if total is totals[0] else None))
        assert mlp.down_proj.fast.left.kept is None
    tries = 1 if INTERPRETED else reduce.TRIES
    got = [total.receive_(half, tries=tries) for total, half in zip(totals, halves)]
    assert torch.equal(got[0], got[1]) and relative_error(got[0], wanted[0]) < NEAR


def linked(bits, group, residual):
    """(o_proj, gate_up_proj, the norm between them, attention's results, the residual) of a layer with kernels."""
    torch.manual_seed(bits)
    layer = random_model(config_of(128, 256), bits=bits, group_size=group, device=DEVICE, dtype=DTYPE).layers[0]
    norm = layer.post_attention_layernorm
    norm.weight.uniform_(0.5, 1.5)
    norm.weight[7] *= 30
    decode_kernels.use_(layer)
    y, x = (torch.randn(1, 1, 256, device=DEVICE).to(DTYPE) for _ in range(2))
    return layer.self_attn.o_proj, layer.mlp.gate_up_proj, norm, y, x * residual


@needs_kernels
@pytest.mark.parametrize("bits, group, residual", [(4, 128, 0), (4, 32, 1), (8, -1, 300)])
def test_digits_of_a_residual_stream_equals_twin(bits, group, residual):
    """As near as two digits, whichever of product and residual is larger."""
    o, gate_up, norm, y, x = linked(bits, group, residual)
    out = o(y, residual=x)
    o.fast, known = gpu.Quantized(bits), o.fast
    assert relative_error(o(y, residual=x), out) < NEAR / 4
    digits, wanted = known.leave.kept[1], (out.double() * norm.weight.double()).view(-1, 128)
    error = (value(digits, 256).view(-1, 128) - wanted).abs().amax(1)
    assert (error < wanted.abs().amax(1) / 65024).all()
    assert digits.squares.sum().item() == pytest.approx(out.double().square().sum().item(), rel=1e-5)
    h = gate_up(out, norm=norm, silu_mul=True)
    assert known.leave.kept is None  # taken
    gate_up.fast = gpu.Quantized(bits)
    assert relative_error(h, gate_up(out, norm=norm, silu_mul=True)) < NEAR / 4


@needs_kernels
def test_a_residual_stream_that_is_not_finite_equals_twin():
    o, gate_up, norm, y, x = linked(4, 128, 1)
    bad = x.clone()
    bad[0, 0, 200] = float("inf")
    for args in ((y * float("nan"), x), (y, bad)):
        h = gate_up(o(args[0], residual=args[1]), norm=norm, silu_mul=True)
        assert h.isnan().any()
    assert gate_up(o(y, residual=x), norm=norm, silu_mul=True).isfinite().all()


@needs_kernels
@pytest.mark.parametrize("hidden, ranks, norms", [(192, 1, False), (256, 2, False), (256, 1, True)])
def test_what_is_no_residual_stream_is_not_linked(hidden, ranks, norms):
    """Parts of a chunk, a share that is summed over ranks, and a norm behind the block."""
    config = dataclasses.replace(config_of(128, hidden), num_key_value_heads=2, post_norms=norms)
    layer = random_model(config, bits=8, tp=TensorParallel(0, ranks), device=DEVICE, dtype=DTYPE).layers[0]
    decode_kernels.use_(layer)
    assert layer.self_attn.o_proj.fast.leave is None and layer.mlp.gate_up_proj.fast.left is None
