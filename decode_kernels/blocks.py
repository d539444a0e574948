"""What stands around products where none of them fuses it: a norm behind a block, GELU, the choice of experts.

Knows a few numbers of each row. Refuses to know matrices.

    y = x + norm(total)                      behind a block, of Gemma 3 and OLMo 2
    y = gelu(gate) * up                      gelu(g) = g / (1 + exp(-2 z)), z = sqrt(2 / pi) (g + 0.044715 g^3)
    p = softmax(logits), the k largest p with their experts, and if that is wanted p / sum p of these k

Worked example of GELU: a gate of 1 gives z = 0.797885 * 1.044715 = 0.833562, so 1 / (1 + exp(-1.667124)) = 0.841192.

Worked example of the choice: the logits log 1, log 5, log 2 and log 2 give p = 0.1, 0.5, 0.2 and 0.2. For k = 2
experts 1 and 2, the first among equals, have 0.5 and 0.2, or 0.714 and 0.286. One program a row takes the largest k
times.

A kernel that Inductor makes starts when the one before it has ended, and so does the one after it; these load what no
kernel writes before they wait. PyTorch's softmax, top-k and sort took 10 us of the 115 us of a layer of Mixtral-8x7B in
int8 on an H200 (`benchmarks/NOTES.md`).
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels import launch


@triton.jit
def _add_norm_kernel(
    x_ptr, norm_ptr, residual_ptr, out_ptr, eps, K: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr
):
    """One row. The residual was written by a kernel before the last one, but no kernel says when that has ended."""
    k = tl.arange(0, WIDTH)
    launch.launch_next(PDL)
    gain = tl.load(norm_ptr + k, k < K, 0).to(tl.float32)
    launch.wait_for_previous(PDL)
    at = tl.program_id(0) * K + k
    residual = tl.load(residual_ptr + at, k < K, 0).to(tl.float32)
    x = tl.load(x_ptr + at, k < K, 0).to(tl.float32)
    x *= gain * tl.rsqrt(tl.sum(x * x) / K + eps)
    tl.store(out_ptr + at, residual + x.to(out_ptr.dtype.element_ty).to(tl.float32), k < K)


@triton.jit
def _gelu_kernel(x_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK results of one row."""
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    launch.launch_next(PDL)
    launch.wait_for_previous(PDL)
    gate = tl.load(x_ptr + row * 2 * N + i, i < N, 0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * N + N + i, i < N, 0).to(tl.float32)
    gate = gate / (1 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * N + i, gate * up, i < N)


@triton.jit
def _route_kernel(
    logits_ptr,
    weight_ptr,
    expert_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    NORMALISE: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    e, i = tl.arange(0, WIDTH), tl.arange(0, triton.next_power_of_2(K))
    launch.launch_next(PDL)
    launch.wait_for_previous(PDL)
    x = tl.load(logits_ptr + row * E + e, e < E, float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.max(x))
    total = tl.sum(p)  # NaN if a logit is not finite, and so are all weights
    p = tl.where(e < E, p, -1.0)
    weights, experts = tl.zeros(i.shape, tl.float32), tl.zeros(i.shape, tl.int64)
    for j in tl.static_range(K):
        largest = tl.max(p)
        expert = tl.min(tl.where(p == largest, e, E - 1))
        p = tl.where(e == expert, -1.0, p)
        weights, experts = tl.where(i == j, largest, weights), tl.where(i == j, expert, experts)
    weights /= total
    if NORMALISE:
        weights /= tl.sum(weights)
    tl.store(weight_ptr + row * K + i, weights, i < K)
    tl.store(expert_ptr + row * K + i, experts, i < K)


def _route_shape(logits: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, k, dtype=torch.float32), logits.new_empty(rows, k, dtype=torch.int64)


@launch.operator("route", _route_shape)
def route(logits: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """logits [M, E] -> weights float32 and experts int64, both [M, k], the largest first."""
    (rows, e), logits = logits.shape, logits.contiguous()
    weights, experts = _route_shape(logits, k, normalise)
    width = triton.next_power_of_2(e)
    _route_kernel[(rows,)](logits, weights, experts, E=e, K=k, NORMALISE=normalise, WIDTH=width, **launch.options(1))
    return weights, experts


def add_norm(x: Tensor, gain: Tensor, eps: float, residual: Tensor) -> Tensor:
    """residual + norm(x), of the same shape [..., K]."""
    x, residual, k = x.contiguous(), residual.contiguous(), x.shape[-1]
    out, width = torch.empty_like(x), triton.next_power_of_2(k)
    _add_norm_kernel[(x.numel() // k,)](x, gain, residual, out, eps, K=k, WIDTH=width, **launch.options(8))
    return out


def gelu(x: Tensor) -> Tensor:
    """gelu(gates) * ups of x [..., 2 N], the gates first -> [..., N]."""
    x, n = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], n)
    _gelu_kernel[(out.numel() // n, triton.cdiv(n, 256))](x, out, N=n, BLOCK=256, **launch.options(2))
    return out
