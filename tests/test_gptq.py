"""The GPTQ core on random matrices: what the algorithm promises, and what it must survive."""

import pytest
import torch

from formats import Quantized
from gptq import fit_scale, gptq, inverse_factor, relative_error, round_to_nearest
from linear import quantize_rtn


def problem(n=48, k=128, tokens=2000, seed=0):
    """A weight and the hessian of correlated inputs with a few strong channels, as activations have."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g) @ torch.randn(k, k, generator=g) * torch.rand(k, generator=g).pow(3) * 5
    return torch.randn(n, k, generator=g), x.T @ x / tokens


def solve(w, h, **changes):
    options = {"group_size": 32, "clip_search": False, "act_order": False} | changes
    solved = gptq(w, h, options.pop("group_size"), torch.float32, **options)
    assert solved is not None
    return solved


def output_error(w, h, q, scale):
    return relative_error(w, Quantized(q, scale).dequantize(), h)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip_search", [False, True])
def test_beats_round_to_nearest_on_the_output(group_size, act_order, clip_search):
    w, h = problem()
    q, scale, damp = solve(w, h, group_size=group_size, act_order=act_order, clip_search=clip_search)
    nearest = output_error(w, h, *quantize_rtn(w, 4, group_size, torch.float32))
    assert output_error(w, h, q, scale) < 0.9 * nearest
    assert q.dtype == torch.int8 and -8 <= int(q.min()) < 0 < int(q.max()) <= 7
    assert scale.shape == (48, 1 if group_size == -1 else 128 // group_size) and damp == 0.01


def test_each_refinement_pays():
    errors = {}
    for act_order in (False, True):
        for clip_search in (False, True):
            total = 0.0
            for seed in range(4):
                w, h = problem(seed=seed)
                total += output_error(w, h, *solve(w, h, act_order=act_order, clip_search=clip_search)[:2])
            errors[act_order, clip_search] = total
    assert errors[True, False] < errors[False, False] and errors[False, True] < errors[False, False]
    assert errors[True, True] < min(errors[True, False], errors[False, True])


@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_give_round_to_nearest(act_order):
    """With a diagonal hessian no error can be passed on."""
    w, _ = problem()
    q, scale, _ = solve(w, torch.diag(torch.rand(128) + 0.5), act_order=act_order)
    nearest, nearest_scale = quantize_rtn(w, 4, 32, torch.float32)
    assert torch.equal(q, nearest) and torch.equal(scale, nearest_scale)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("clip_search", [False, True])
def test_eight_bits(group_size, act_order, clip_search):
    """Better than plain rounding with the same scales, and 127 on both sides, as int8 Linears hold."""
    w, h = problem()
    options = {"group_size": group_size, "act_order": act_order, "clip_search": clip_search}
    q, scale, _ = solve(w, h, bits=8, **options)
    nearest, nearest_scale = quantize_rtn(w, 8, group_size, torch.float32)
    assert q.dtype == torch.int8 and -127 <= int(q.min()) < -100 and 100 < int(q.max()) <= 127
    if not clip_search:
        assert torch.equal(scale[:, 0], nearest_scale[:, 0])
        assert act_order is False or torch.equal(scale, nearest_scale)
    assert output_error(w, h, q, scale) < 0.9 * output_error(w, h, nearest, nearest_scale) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size, gain", [(32, 0.85), (128, 0.95)])
def test_the_search_of_8_bit_scales(dtype, size, gain):
    """It cuts no weight and loses less in every group, also with scales in 16 bits and by weighted errors."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    w[0] = 0
    importance = torch.linspace(0.1, 2, 512)
    groups, weights = w.view(64, -1, size), importance.view(-1, size)
    errors = []
    for search in (False, True):
        q, scale = round_to_nearest(w, size, dtype, importance, search, bits=8)
        assert q.dtype == torch.int8 and scale.dtype == dtype and (scale > 0).all()
        difference = groups - q.view(groups.shape) * scale.float()[..., None]
        assert (difference.abs() <= scale.float()[..., None] * (0.5001 if search else 0.76)).all()
        errors.append((difference.square() * weights).sum(-1))
    assert (errors[1] <= errors[0] * 1.0001).all() and errors[1].sum() < gain * errors[0].sum()
    assert (q[0] == 0).all()


def test_rows_do_not_know_each_other():
    w, h = problem()
    q, scale, _ = solve(w, h, clip_search=True, act_order=True)
    part, part_scale, _ = solve(w[7:19], h, clip_search=True, act_order=True)
    # The sums of a matrix product differ in their last bits with its shape; a few values sit on a rounding edge.
    assert (part != q[7:19]).float().mean() < 0.01
    assert torch.equal(part_scale, scale[7:19])


def test_scaling_weights_or_inputs_changes_nothing():
    w, h = problem()
    q, scale, _ = solve(w, h)
    doubled, double_scale, _ = solve(2 * w, 4 * h)
    assert torch.equal(q, doubled) and torch.equal(2 * scale, double_scale)


def test_act_order_ignores_where_inputs_sit_within_a_group():
    w, h = problem()
    order = torch.cat([torch.randperm(32, generator=torch.Generator().manual_seed(i)) + 32 * i for i in range(4)])
    q, scale, _ = solve(w, h, act_order=True)
    shuffled, shuffled_scale, _ = solve(w[:, order], h[order][:, order], act_order=True)
    assert torch.equal(scale, shuffled_scale)
    assert (shuffled != q[:, order]).float().mean() < 0.01


def test_scales_come_from_the_updated_block():
    """The second group's scale must cover what error feedback has made of it, not the weights as they were."""
    w, h = problem()
    _, scale, _ = solve(w, h, group_size=64)
    assert torch.equal(scale[:, 0], fit_scale(w[:, :64], torch.float32, search=False))
    assert not torch.allclose(scale[:, 1], fit_scale(w[:, 64:], torch.float32, search=False))


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_are_rounded_to_nearest_and_disturb_nobody(act_order):
    w, h = problem()
    dead = [3, 40, 41, 127]
    h[dead], h[:, dead] = 0, 0
    w[:, dead] *= 0.1  # so that they set no scale
    q, scale, damp = solve(w, h, act_order=act_order)
    expected = (w[:, dead] / scale[:, [d // 32 for d in dead]]).round().to(torch.int8)
    assert damp == 0.01 and torch.equal(q[:, dead], expected)


def test_all_inputs_dead_is_round_to_nearest():
    w, h = problem()
    q, scale, _ = solve(w, torch.zeros_like(h))
    assert torch.equal(q, quantize_rtn(w, 4, 32, torch.float32)[0])


def test_singular_hessian_is_solved():
    w, h = problem(tokens=20)
    q, scale, damp = solve(w, h)
    assert damp == 0.01
    assert output_error(w, h, q, scale) < 0.7 * output_error(w, h, *quantize_rtn(w, 4, 32, torch.float32))


def test_damping_rises_until_the_factor_exists():
    w, h = problem()
    h = h - 0.3 * float(h.diagonal().mean()) * torch.eye(128)  # indefinite, as sums in low precision can be
    h.diagonal().clamp_(min=1e-3)
    q, scale, damp = solve(w, h)
    assert 0.01 < damp <= 100 and Quantized(q, scale).dequantize().isfinite().all()


def test_what_cannot_be_solved_says_so():
    w, h = problem()
    for bad in (float("nan"), float("inf")):
        broken = h.clone()
        broken[5, 5] = bad
        assert gptq(w, broken, 32, torch.float32) is None
    assert gptq(w, -h, 32, torch.float32) is None


def test_inverse_factor():
    _, h = problem()
    u, damp = inverse_factor(h, 0.01)
    damped = h + damp * h.diagonal().mean() * torch.eye(128)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close((u.T @ u).double(), torch.linalg.inv(damped.double()), rtol=1e-3, atol=1e-6)


def weighted_error(w, scale, importance=1.0):
    error = w - (w / scale[..., None]).round().clamp(-8, 7) * scale[..., None]
    return (error.square() * importance).sum(-1)


@pytest.mark.parametrize("group_size", [32, 128])
def test_the_search_beats_both_simple_rules(group_size):
    """amax / 7.5, and the largest magnitude on -8 (llama.cpp's Q4_0); by the weighted error, in every group."""
    g = torch.Generator().manual_seed(0)
    w, importance = torch.randn(500, group_size, generator=g), torch.rand(group_size, generator=g) + 0.1
    found = weighted_error(w, fit_scale(w, torch.float32, importance), importance)
    simple = fit_scale(w, torch.float32, search=False)
    signed = w.gather(1, w.abs().argmax(1, keepdim=True))[:, 0] / -8
    for other in (weighted_error(w, simple, importance), weighted_error(w, signed, importance)):
        assert (found <= other * 1.02).float().mean() > 0.98 and found.sum() < 0.9 * other.sum()


def test_the_search_comes_near_the_best_scale():
    g = torch.Generator().manual_seed(1)
    w, importance = torch.randn(200, 64, generator=g), torch.rand(64, generator=g) + 0.1
    every = [w.abs().amax(1) / 7.5 * r * sign for r in torch.linspace(0.5, 1.2, 400).tolist() for sign in (1, -1)]
    least = torch.stack([weighted_error(w, scale, importance) for scale in every]).amin(0)
    assert weighted_error(w, fit_scale(w, torch.float32, importance), importance).sum() < 1.03 * least.sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_on_a_grid_of_16_levels_are_found_exactly(sign):
    """Whichever end of the range -8..7 the positive weights lie on."""
    levels = torch.randint(-8, 8, (40, 32), generator=torch.Generator().manual_seed(0))
    levels[:, 0] = -8
    w = levels * 0.03125 * sign
    q, scale = round_to_nearest(w, 32, torch.bfloat16)
    assert torch.equal(q * scale.float(), w) and bool((scale * sign > 0).all())


def test_what_is_searched_is_what_is_stored():
    w = torch.randn(50, 32)
    low = fit_scale(w, torch.bfloat16)
    assert torch.equal(low, low.bfloat16().float())
    q, scale = round_to_nearest(w, -1, torch.bfloat16)
    assert torch.equal(scale[:, 0].float(), low) and torch.equal(q, (w / low[:, None]).round().clamp(-8, 7).char())


def test_rounding_in_parts_changes_nothing():
    w, importance = torch.randn(5000, 64), torch.rand(64)
    for options in ({}, {"importance": importance}, {"search": False}):
        q, scale = round_to_nearest(w, 32, torch.float32, **options)
        part = round_to_nearest(w[4990:], 32, torch.float32, **options)
        assert torch.equal(q[4990:], part[0]) and torch.equal(scale[4990:], part[1])
    assert torch.equal(q, quantize_rtn(w, 4, 32, torch.float32)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-12, 1e30])
def test_scales_of_extreme_weights(dtype, size):
    w = torch.randn(4, 32) * size
    scale = fit_scale(w, dtype)
    assert (scale.abs() >= 2.0**-24).all() and (dtype == torch.float16 or scale.isfinite().all())


def test_zero_weights_stay_zero():
    _, h = problem()
    q, scale, _ = solve(torch.zeros(8, 128), h, clip_search=True)
    assert not q.any() and scale.isfinite().all() and scale.all()


def test_group_size_that_is_no_power_of_two():
    w, h = problem(k=192)
    for size in (96, 48, 64):
        q, scale, _ = solve(w, h, group_size=size)
        assert output_error(w, h, q, scale) < 0.9 * output_error(w, h, *quantize_rtn(w, 4, size, torch.float32))


def test_matches_the_paper_one_column_at_a_time():
    """Algorithm 1 without blocks, in float64, with scales fixed: lazy batches change only rounding noise."""
    w, h = problem(n=16, k=96)
    q, scale, damp = solve(w, h, group_size=-1)
    damped = (h + damp * h.diagonal().mean() * torch.eye(96)).double()
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rest, expected = w.double().clone(), torch.empty_like(q)
    for j in range(96):
        level = (rest[:, j] / scale[:, 0]).round().clamp(-8, 7)
        expected[:, j] = level.to(torch.int8)
        rest[:, j:] -= torch.outer((rest[:, j] - level * scale[:, 0]) / u[j, j], u[j, j:])
    assert (q != expected).float().mean() < 0.01
    assert relative_error(w, w) == 0.0 and relative_error(w, w, h) == pytest.approx(0.0, abs=1e-10)
