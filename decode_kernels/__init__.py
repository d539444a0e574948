"""Triton kernels for decoding at the speed of the memory bus: the front door.

Knows which devices, shapes and dtypes the kernels serve, and calls them. Each file here holds the kernels of one
subject and the operators that launch them; it is imported, and Triton with it, when the first of them is wanted. The
plain PyTorch that stands beside every kernel is in `linear.py`, `model.py` and `engine.py`. Refuses to know models,
layers, files, and where weights come from.

How they come near the memory's speed (measurements in benchmarks/NOTES.md):

- 16-bit weights and up to four rows: small programs that ask for all their weights at once, in the memory's order. The
  tensor cores multiply, at the price of products that nobody wants: converting and adding took longer than reading.
  More rows: the wanted products alone, the loads of the next steps passing through shared memory meanwhile.
- int8 and int4 weights: a GPU has no time to make floats of them. The activations become integers instead, two int8
  digits of a block floating-point number that is finer than bf16 (`quantized._digits_kernel`), and the tensor cores
  multiply integers exactly. One row uses two of their eight columns, four rows use all: up to eight rows are nearly
  free.
- Registers are operands: weights are packed so that the 16 bytes which a lane loads are what m16n8k32 wants there.
  Lanes are dealt to axis 0 of such pointers, then 1, warps to axis 2, and the last axis is a lane's own. It takes
  `max_contiguous` to say so: of axes without contiguous addresses Triton 3.6 takes the first, later versions the last.
  Only the order of its numbers counts, for the last axis, which a lane loads in one piece, is contiguous or one long.
- The compiler must not move a load down to its use, nor a product up before a load. Nothing says so to it, but a second
  `gdc_wait`, which returns at once, stops the one, and a branch that is always taken the other.
- A kernel is launched while the one before it runs (programmatic dependent launch), asks for what no kernel writes, its
  weights above all, and then waits. A forward pass begins with PyTorch's own kernels, which end before the next starts.
"""

import importlib.util
import os

import torch
from torch import Tensor

MAX_ROWS = 16
# Triton runs its kernels in its CPU interpreter (for tests); it reads the variable when it is imported, as this does
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def supported(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device; elsewhere plain PyTorch serves."""
    if importlib.util.find_spec("triton") is None:
        return False
    if INTERPRETED:
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def reaches(x: Tensor) -> bool:
    """Whether a kernel can take this tensor, on a machine whose device is `supported`. Unlike that, it asks nobody, so
    that a compiled graph may contain it.
    """
    return INTERPRETED or x.is_cuda


def lies_plain(weight: Tensor, scale: Tensor | None) -> bool:
    """Whether these are int8 weights that are not packed."""
    return scale is not None and weight.dtype == torch.int8 and weight.dim() == scale.dim() + 1


def out_features(weight: Tensor, scale: Tensor | None) -> int:
    return weight.shape[-2] if scale is None else scale.shape[-1 if weight.dtype == torch.int8 else -2]


def group_size(weight: Tensor, scale: Tensor | None, k: int) -> int:
    return k if scale is None or weight.dtype == torch.int8 else k // scale.shape[-1]


def fits_linear(x: Tensor, weight: Tensor, scale: Tensor | None, silu_mul: bool, bias: Tensor | None) -> bool:
    """Whether the kernels cover these formats and shapes; plain PyTorch takes the rest."""
    k = x.shape[-1]
    if not reaches(x):
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[0] > MAX_ROWS or (bias is not None and bias.dim() > 1):
        return False
    if scale is None:
        return k % 8 == 0 and weight.dtype == x.dtype
    group = group_size(weight, scale, k)
    fits = group >= 32 and (group == k or group & (group - 1) == 0) and not lies_plain(weight, scale)
    return fits and (not silu_mul or out_features(weight, scale) % 32 == 0)


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    experts: Tensor | None = None,
) -> Tensor:
    """y = epilogue(norm(x) @ dequantized(weight).T), one pass over the weights: [M, K], M <= 16 -> [M, N or N/2].

    weight: [N, K] in x's dtype; `linear.pack_int8`'s with scale [N]; or `linear.pack_int4`'s with scale [N, G], G =
    K / group, and zero [N, G] (float; None when symmetric): w = (q - zero) * scale. With experts (int64 [M]) weight,
    scale and zero have a leading E, and row m uses matrix experts[m].
    norm_weight [K]: RMSNorm of x first. bias [N] is added; silu_mul: rows [0, N/2) are gates, the rest ups, and the
    result is silu(gate) * up; residual [M, N or N/2] is added last. Accumulates in float32. `fits_linear` says
    which dtypes, shapes and devices have a kernel.
    """
    from decode_kernels import dense, quantized

    if scale is None:
        return dense.linear(x, weight, bias, norm_weight, eps, residual, silu_mul, experts)
    return quantized.linear(x, weight, scale, zero, bias, norm_weight, eps, residual, silu_mul, experts)


def fits_dequantize(weight: Tensor, scale: Tensor | None) -> bool:
    """Whether `dequantize` covers this weight."""
    return reaches(weight) and weight.dim() == 3 and not lies_plain(weight, scale)


def dequantize(weight: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The [..., N, K] matrix in `dtype` that a packed weight of `linear` stands for; scale None: its integers.

    What prefill multiplies by: one pass over the weights, little beside a product with many rows.
    """
    from decode_kernels import quantized

    return quantized.dequantize(weight, scale, zero, n, k, dtype)


def fits_attention(qkv: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether `decode_attention` covers these dtypes and shapes; plain PyTorch takes the rest."""
    t, dim = positions.shape[1], k_cache.shape[3]
    fits = t <= 16 and dim % 8 == 0 and dim <= 256 and qkv.dtype in (torch.bfloat16, torch.float16)
    return fits and k_cache.dtype == v_cache.dtype == qkv.dtype and reaches(qkv)


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Attention of T <= 16 new tokens to a cache: qkv [B T, (H + 2 Hkv) Dh] (q, k, v heads) -> [B T, H Dh].

    Per head: optional RMSNorm of q and k by q_norm, k_norm [Dh]; half-split rotary embedding by cos, sin float32
    [B T, Dh/2]; k and v are written in place into k_cache, v_cache [B, Hkv, S, Dh] at positions int64 [B, T], which
    must be consecutive in each row; then softmax(q k / sqrt(Dh)) v over the slots <= position (and > position - window,
    if window > 0). The length is read on the device, so one captured graph serves every position, and slots behind it
    cost nothing. The prefix is split over the multiprocessors and read once for all query heads of a group.
    """
    from decode_kernels import attention

    qkv, cos, sin, positions = (x.contiguous() for x in (qkv, cos, sin, positions))
    return attention.attention(qkv, cos, sin, positions, k_cache, v_cache, q_norm, k_norm, eps, window)


def embed(
    tokens: Tensor, positions: Tensor, table: Tensor, inv_freq: Tensor, factor: float = 1.0, first: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """How a step begins, in one kernel: tokens, positions int64 [B, T] -> rows of table [V, D], and `model.angles`.

    first: of a slice of a larger table that begins with this id; ids outside get zeros.
    """
    from decode_kernels import step

    return step.embed(tokens, positions, table, inv_freq, factor, first or 0)


def samples(dtype: torch.dtype, vocabulary: int, structure: tuple[bool, int, bool, bool]) -> bool:
    """Whether `sample` can for logits of a model that runs by kernels. structure: `sampling.Structure`."""
    greedy, top_k, use_top_p, _ = structure
    few = greedy or (not use_top_p and 0 < top_k <= 256)
    return few and top_k < vocabulary <= 1 << 18 and dtype in (torch.bfloat16, torch.float16)


def sample(logits: Tensor, knobs: Tensor, seeds: Tensor, positions: Tensor, top_k: int) -> Tensor:
    """`sampling.sample`, its twin, with top-k (1 is greedy) and min-p, in two kernels: logits [B, V] -> int64 [B].

    knobs float32 [3] as `SamplingParams.knobs`; seeds int64 [B] or [1], positions int64 [B].
    """
    from decode_kernels import step

    return step.sample(logits, knobs, seeds, positions, top_k)


def fits_advance(out: Tensor) -> bool:
    """Whether `advance_` covers that many rows."""
    return reaches(out) and len(out) <= 1024


def advance_(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    """How a step ends, in place: tokens int64 [B] go into column step [1] of out [B, S] and, -1 as 0, into token
    [B, 1]; position [B, 1] and step advance by one.
    """
    from decode_kernels import step as ends

    ends.advance_(tokens, token, position, step, out)
