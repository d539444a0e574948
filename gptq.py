"""GPTQ on one weight matrix: Hessian, error feedback, clip search.

Knows the algorithm, and nothing of ours: the file can be copied alone. Refuses to know files, models and formats.

Source of the algorithm: GPTQ, Frantar et al. 2022 (arXiv 2210.17323), algorithm 1. Three differences, each with its
reason where it is: scales come from the updated block; act-order keeps groups in place; damping rises by itself.
"""

import math

import torch
from torch import Tensor


def fit_scale(w: Tensor, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """4-bit symmetric scales [N] for groups w [N, g], rounded to dtype, as float32: amax / 7.5.

    importance [g]: search the clipping ratio with the least squared error weighted so.
    """
    full = (w.abs().amax(1) / 7.5).clamp(min=2.0**-24)
    if importance is None:
        return full.to(dtype).float()
    best, least = full, torch.full_like(full, math.inf)
    for ratio in torch.linspace(1.07, 0.5, 20).tolist():  # 1.07: amax / 7, where nothing is clipped
        s = (full * ratio).to(dtype).float()
        error = w - (w / s[:, None]).round().clamp(-8, 7) * s[:, None]
        error = (error.square() * importance).sum(1)
        best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    return best


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float] | None:
    """Upper triangular U with U.T @ U = inverse(hessian + damp * mean * I), and the damping that sufficed, or None.

    With the inputs in reverse, one Cholesky factor gives H = R @ R.T with R upper triangular, and U = inverse(R): one
    factorisation instead of the usual three.
    """
    diagonal = hessian.diagonal()
    for _ in range(6):
        damped = hessian.clone()
        damped.diagonal().add_(damp * diagonal.mean())
        damped.diagonal()[diagonal == 0] = 1.0  # a dead input: nothing propagates from it or to it
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
    act_order: bool = False,
    clip_search: bool = True,
    damp: float = 0.01,
) -> tuple[Tensor, Tensor, float] | None:
    """GPTQ to 4 bits of weight [N, K] for inputs X with hessian = X.T @ X [K, K], both float32.

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
    # What GPTQ's loss charges for an error in each input, in processing order.
    importance = u.diagonal().square().reciprocal() if clip_search else None
    w = weight.t()[order].contiguous()  # a row is an input
    q, scale = torch.empty_like(w, dtype=torch.int8), torch.empty(k // size, n, device=w.device)

    def set_scale(g: int, source: Tensor, rows: Tensor) -> None:
        scale[g] = fit_scale(source[rows].t(), scale_dtype, None if importance is None else importance[rows])

    if act_order:  # the inputs of a group are scattered in the order, so its scale is fixed beforehand
        for g in range(k // size):
            set_scale(g, w, back[g * size : (g + 1) * size])
    block = size if size < k and 128 % size and size % 128 else 128  # a group starts where a block does, or inside
    for start in range(0, k, block):
        stop = min(start + block, k)
        errors = torch.empty(stop - start, n, device=w.device)
        for j in range(start, stop):
            if not act_order and j % size == 0:  # from the block as updated so far
                set_scale(j // size, w, order[j : j + size])
            s = scale[group[j]]
            q[j] = level = (w[j] / s).round_().clamp_(-8, 7)
            errors[j - start] = error = (w[j] - level * s) / u[j, j]
            w[j + 1 : stop].addr_(u[j, j + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(u[start:stop, stop:].t(), errors, alpha=-1)
    return q[back].t().contiguous(), scale.t().to(scale_dtype).contiguous(), damp


def relative_error(weight: Tensor, approximation: Tensor, hessian: Tensor | None = None) -> float:
    """Relative root-mean-square error of the weight, or of the output on inputs with this hessian."""
    d = weight - approximation
    if hessian is None:
        return float(d.norm() / weight.norm().clamp(min=1e-30))
    errors = [float(((m @ hessian) * m).sum().clamp(min=1e-30)) for m in (d, weight)]
    return math.sqrt(errors[0] / errors[1])
