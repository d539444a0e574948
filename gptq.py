"""Quantize one weight matrix: the search for scales, rounding to nearest, and GPTQ (Hessian, error feedback).

Knows the algorithm, and imports nothing of this project, so that the file can be copied alone. Refuses to know files,
models and formats.

The algorithm is GPTQ, Frantar et al. 2022 (arXiv 2210.17323), algorithm 1. Three things differ, and each is explained
where it is done: scales have a sign and are searched; without act-order they are computed from the updated weights,
while with it the groups stay in place; and the damping is raised when the Hessian needs it.
"""

import math

import torch
from torch import Tensor

# By bits: the least and the largest value, and the one that the largest weight has without a search of scales.
LIMITS = {4: (-8, 7, 7.5), 8: (-127, 127, 127.0)}


def fit_scale(
    groups: Tensor, dtype: torch.dtype, importance: Tensor | None = None, search: bool = True, bits: int = 4
) -> Tensor:
    """Symmetric scales [...] for groups [..., g] of weights, rounded to dtype, as float32. Without `search` they are
    amax / 7.5, with 8 bits amax / 127. With 8 bits `fit_fine_scale` searches, and with 4 bits this:

    Values are -8..7. A negative scale turns that range into -7..8, so that the largest weight of a group can always lie
    on the longer side. The search tries both signs and 8 ranges. Each range gives the rounded values, for these the
    best scale is known by least squares, and the candidate with the least squared error, weighted by `importance`
    (broadcast to the groups), is kept. Without `importance` a weight counts by its magnitude, because clipping the
    largest weights biases the outputs.
    """
    if not search:
        return (groups.abs().amax(-1) / LIMITS[bits][2]).clamp(min=2.0**-24).to(dtype).float()
    if bits == 8:
        return fit_fine_scale(groups, dtype, importance)
    if importance is None:
        importance = (groups.square() + groups.square().mean(-1, keepdim=True)).sqrt()
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    largest = largest.where(largest != 0, 1.0)
    weighted, gain, best = groups * importance, None, None
    levels = [x * sign for x in torch.linspace(6.5, 10, 8).tolist() for sign in (-1, 1)]
    for level in levels:  # the value to which the largest weight is mapped, before clipping
        q = (groups * (level / largest)).round_().clamp_(-8, 7)
        along = (weighted * q).sum(-1)
        length = (q.square_() * importance).sum(-1).clamp(min=1e-30)
        s, g = along / length, along.square() / length  # error = sum of weighted squares - gain
        best, gain = (s, g) if gain is None or best is None else (s.where(g > gain, best), g.maximum(gain))
    assert best is not None
    best = best.to(dtype).float()
    return best.where(best.abs() >= 2.0**-24, 2.0**-24)


def fit_fine_scale(groups: Tensor, dtype: torch.dtype, importance: Tensor | None) -> Tensor:
    """The 8-bit scale with the least squared error, weighted by `importance`, of the 16 from amax / 127 to amax / 112.

    To cut the largest weight never pays with 8 bits. But how far the weights of a small group are from multiples of a
    scale is chance, and the best of 16 has .8 of the mean squared error for 32 normally distributed weights, and .93
    for 128. The scale is rounded to dtype before it is tried, because 127 times its rounding is a quarter of a step.
    """
    amax, best, least = groups.abs().amax(-1), None, None
    for level in range(127, 111, -1):
        scale = (amax / level).clamp(min=2.0**-24).to(dtype).float()
        q = (groups / scale[..., None]).round_().clamp_(-127, 127)
        squares = q.mul_(scale[..., None]).sub_(groups).square_()
        error = (squares if importance is None else squares.mul_(importance)).sum(-1)
        if best is None or least is None:
            best, least = scale, error
        best, least = scale.where(error < least, best), error.minimum(least)
    assert best is not None
    return best


def round_to_nearest(
    weight: Tensor,
    group_size: int,
    dtype: torch.dtype,
    importance: Tensor | None = None,
    search: bool = True,
    bits: int = 4,
) -> tuple[Tensor, Tensor]:
    """Round weight [N, K] float32 to 4 or 8 bits: returns q int8 [N, K] and scale [N, G] in dtype.

    group_size -1 is one group per row; importance is [K]. A few rows are done at a time, so that what the search reads
    again and again stays in a processor's cache.
    """
    size = weight.shape[1] if group_size == -1 else group_size
    weights = None if importance is None else importance.view(-1, size)
    low, high, _ = LIMITS[bits]
    done = []
    for groups in weight.unflatten(1, (-1, size)).split(max(1, (1 << 18) // weight.shape[1])):
        scale = fit_scale(groups, dtype, weights, search, bits)
        q = (groups / scale[..., None]).round_().clamp_(low, high)
        done.append((q.flatten(1).to(torch.int8), scale.to(dtype)))
    q, scale = (torch.cat(parts) for parts in zip(*done))
    return q, scale


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float] | None:
    """The upper triangular U with U.T @ U = inverse(hessian + damp * mean * I), and the damping that was enough; None
    when none is.

    For the inputs in reverse order, the Cholesky factor gives H = R @ R.T with R upper triangular, and U = inverse(R).
    So one factorisation is enough, where the usual way takes three.
    """
    diagonal = hessian.diagonal()
    for _ in range(6):
        damped = hessian.clone()
        damped.diagonal().add_(damp * diagonal.mean())
        damped.diagonal()[diagonal == 0] = 1.0  # a dead input: no error is passed on from it or to it
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        u = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(lower), device=lower.device), upper=True)
        if not int(failed) and bool(u.isfinite().all()):
            return u, damp
        damp *= 10
    return None


def gptq(
    weight: Tensor,
    hessian: Tensor,
    group_size: int,
    scale_dtype: torch.dtype,
    *,
    bits: int = 4,
    act_order: bool = True,
    clip_search: bool = True,
    damp: float = 0.01,
) -> tuple[Tensor, Tensor, float] | None:
    """GPTQ to 4 or 8 bits of weight [N, K] for inputs X with hessian = X.T @ X [K, K], both float32.

    Returns q int8 [N, K], scale [N, G] in scale_dtype and the damping used; None when no damping makes it solvable.
    An input that calibration never activated (dead) is rounded to nearest: unseen is not unused.
    """
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    order = torch.arange(k, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damp) if bool(hessian.isfinite().all()) else None
    if factor is None:
        return None
    u, damp = factor
    back, group = order.argsort(), (order // size).tolist()
    importance = hessian.diagonal() + damp * hessian.diagonal().mean() + 1e-12
    w = weight.t()[order].contiguous()  # [K, N]: each row belongs to one input
    q, scale = torch.empty_like(w, dtype=torch.int8), torch.empty(k // size, n, device=w.device)
    low, high, _ = LIMITS[bits]
    if act_order:  # the inputs of a group come at different times, so its scale is fixed beforehand
        scale.copy_(round_to_nearest(weight, size, scale_dtype, importance, clip_search, bits)[1].t())
    block = size if size < k and 128 % size and size % 128 else 128  # a group starts where a block does, or inside
    for start in range(0, k, block):
        stop = min(start + block, k)
        errors = torch.empty(stop - start, n, device=w.device)
        for j in range(start, stop):
            if not act_order and j % size == 0:  # from the block as updated so far
                group_weights = w[j : j + size].t()
                scale[j // size] = fit_scale(group_weights, scale_dtype, importance[j : j + size], clip_search, bits)
            s = scale[group[j]]
            q[j] = level = (w[j] / s).round_().clamp_(low, high)
            errors[j - start] = error = (w[j] - level * s) / u[j, j]
            w[j + 1 : stop].addr_(u[j, j + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(u[start:stop, stop:].t(), errors, alpha=-1)
    return q[back].t().contiguous(), scale.t().to(scale_dtype).contiguous(), damp


def relative_error(weight: Tensor, approximation: Tensor, hessian: Tensor | None = None) -> float:
    """The relative root-mean-square error of the weight, or with a hessian of the outputs on its inputs."""
    d = weight - approximation
    if hessian is None:
        return float(d.norm() / weight.norm().clamp(min=1e-30))
    errors = [float(((m @ hessian) * m).sum().clamp(min=1e-30)) for m in (d, weight)]
    return math.sqrt(errors[0] / errors[1])
