"""The two ends of a decode step: a token's embedding and angles, and moving on.

Knows vocabularies and the state of a step. Refuses to know what lies between: layers, caches, and the choice of the
next token (`draw.py`).

**Beginning.** Of a token at position p: its row of the embedding table, and factor * cos(p f), factor * sin(p f) for
the inverse frequencies f of RoPE. One kernel of 1.6 us instead of PyTorch's 6.1.

Worked example: at position 3 the frequency 0.5 and the factor 1 give cos 1.5 = 0.0707 and sin 1.5 = 0.9975.

**End.** The token goes into the output, and position and step advance by one. One kernel of 1.1 us instead of 6.4 us.
The times are of one H200 (`benchmarks/NOTES.md`).
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from decode_kernels import launch

# -- beginning ----------------


@triton.jit
def _embed_kernel(
    tokens_ptr,
    pos_ptr,
    table_ptr,
    freq_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    factor,
    first,
    ids,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    ANGLES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token: its row of the embedding, and the angles of its position."""
    row = tl.program_id(0)
    launch.launch_next(PDL)
    token = tl.load(tokens_ptr + row) - first
    d = tl.arange(0, WIDTH)
    x = tl.load(table_ptr + token * D + d, (token >= 0) & (token < ids) & (d < D), 0)
    i = tl.arange(0, ANGLES)
    angle = tl.load(pos_ptr + row).to(tl.float32) * tl.load(freq_ptr + i, i < TURNED, 0)
    tl.store(x_ptr + row * D + d, x, d < D)
    tl.store(cos_ptr + row * HALF + i, tl.where(i < TURNED, tl.cos(angle) * factor, 1.0), i < HALF)
    tl.store(sin_ptr + row * HALF + i, tl.sin(angle) * factor, i < HALF)


def _embed_shape(
    tokens: Tensor, positions: Tensor, table: Tensor, inv_freq: Tensor, factor: float, first: int, half: int
) -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = (inv_freq.new_empty(*tokens.shape, 1, half) for _ in range(2))
    return table.new_empty(*tokens.shape, table.shape[1]), cos, sin


@launch.operator("embed", _embed_shape)
def embed(
    tokens: Tensor, positions: Tensor, table: Tensor, inv_freq: Tensor, factor: float, first: int, half: int
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, positions int64 [B, T], table [V, D], inv_freq float32 [H] -> (rows of the table [B, T, D], cos and sin
    float32 [B, T, 1, half], times factor; behind the first H 1 and 0). The table may be a slice of a larger one that
    begins with the id `first`: ids outside get zeros.
    """
    x, cos, sin = _embed_shape(tokens, positions, table, inv_freq, factor, first, half)
    options = launch.options(4)
    options.pop("launch_pdl", None)  # it begins when all before it has ended, so that no kernel waits for positions
    _embed_kernel[(tokens.numel(),)](
        tokens.contiguous(),
        positions.contiguous(),
        table,
        inv_freq,
        x,
        cos,
        sin,
        factor,
        first,
        table.shape[0],
        D=table.shape[1],
        TURNED=inv_freq.shape[0],
        HALF=half,
        WIDTH=triton.next_power_of_2(table.shape[1]),
        ANGLES=triton.next_power_of_2(half),
        **options,
    )
    return x, cos, sin


# -- end ----------------


@triton.jit
def _advance_kernel(
    tokens_ptr, token_ptr, pos_ptr, step_ptr, out_ptr, rows, columns, WIDTH: tl.constexpr, PDL: tl.constexpr
):
    """All rows at once."""
    row = tl.arange(0, WIDTH)
    here = row < rows
    step = tl.load(step_ptr)
    launch.wait_for_previous(PDL)
    token = tl.load(tokens_ptr + row, here, 0)
    tl.store(out_ptr + row.to(tl.int64) * columns + step, token, here)
    tl.store(token_ptr + row, tl.maximum(token, 0), here)
    tl.store(pos_ptr + row, tl.load(pos_ptr + row, here, 0) + 1, here)
    tl.debug_barrier()  # every lane has read the step
    tl.store(step_ptr, step + 1)


def _advance_shape(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    """There is no result."""


@launch.operator("advance_", _advance_shape, ("token", "position", "step", "out"))
def advance_(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    """tokens int64 [B] go into column step [1] of out [B, S] and, -1 as 0, into token [B, 1]; position [B, 1] and step
    advance by one. B is at most 1,024.
    """
    width = triton.next_power_of_2(len(tokens))
    _advance_kernel[(1,)](tokens, token, position, step, out, *out.shape, WIDTH=width, **launch.options(1))
