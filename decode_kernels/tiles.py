"""Tiles: which part of the work one program takes, by shape, rows and format.

What was fastest for Llama shapes on one H200 (`benchmarks/NOTES.md` has the sweeps); elsewhere they are right, if not
best. Knows numbers. Refuses to know tensors and Triton.
"""

ATTENTION_AHEAD = 4  # steps of the loop over the prefix that the L2 cache is asked for in advance, this one included


def row_tile(k: int, n: int, rows: int, silu_mul: bool) -> tuple[int, int, int, int, int]:
    """(results, warps, k of a warp's step, and how many steps ahead weights and activations are asked for) of
    `dense._row_kernel`.
    """
    if rows > 1:
        if silu_mul:
            return 4, 8, 256, 2, 2
        return 8, (4 if n <= 8192 else 8), 128, 4, (4 if k <= 4096 else 2)
    if silu_mul:
        return 4, (2 if k <= 2048 else 4), 256, 4, 4
    if k <= 2048:
        return (2 if n <= 2048 else 4), 2, 256, 4, 4
    if k <= 4096:
        return 2, 4, 512, 2, 2
    return 2, *((4, 256, 4, 4) if k <= 8192 else (8, 256, 6, 6))


def rows_tile(k: int, n: int, rows: int, silu_mul: bool, shared: int) -> tuple[int, int, int, int, int]:
    """(rows of the matrix, k at a time, warps, stages, early steps) of `dense._rows_kernel`; sm86's 99 KB of shared
    memory are enough.
    """
    if silu_mul:
        return (64, 128, 2, 3, 2) if rows <= 8 else (64, 64, 2, 6, 1)
    if k >= 4096 and 2048 < n <= 4096 and rows <= 8 and shared >= 160 * 1024:  # one program a multiprocessor
        return (32, 256, 2, 7, 2) if k > 8192 else (32, 256, 2, 6, 1)
    if n <= 8192:
        return (16, 512, 2, 4, 1) if rows <= 8 else (16, 256, 1, 6, 1)
    return (32, 128, 1, 5, 3) if rows <= 8 else (32, 128, 1, 6, 1)


def quantized_tile(bits: int, k: int, n: int, rows: int, silu_mul: bool) -> tuple[int, int, int, int]:
    """(16-row tiles, warps, and how many steps ahead weights and digits are asked for) of
    `quantized._quantized_kernel`: best is what lets all programs be resident at once.
    """
    narrow, short = n <= 8192 and not silu_mul, k <= 4096 and silu_mul
    if rows > 8:
        if narrow:
            return (2, 8, 2, 2) if k > 8192 and bits == 4 else (1, 4, 2, 2)
        return (2, 4, 2, 2) if short or bits == 4 else (2, 2, 2, 1)
    if bits == 8:
        if rows > 4:
            return (1, 4, 6, 3) if narrow else (2, 4, 1, 1) if short else (2, 4, 2, 1)
        return (2, 4, 2, 2) if not narrow else (1, 8, 4, 4) if k <= 8192 else (1, 4, 6, 6)
    if rows > 4:
        return (1, 8, 2 if k <= 16384 else 3, 1) if narrow else (2, 2, 2, 1) if short else (2, 4, 2, 1)
    if narrow:
        return (1, 4, 8, 4) if k <= 4096 else (1, 8, 4, 4)
    if short:
        return (2, 2, 2, 2) if rows == 1 else (2, 2, 3, 3)
    return 2, 4, 3, 3


def splits(heads: int, slots: int) -> int:
    """Into how many programs the prefix of every KV head is split: a choice, measured on one H200 (NOTES.md)."""
    return max(1, min(-(-264 // heads), slots // 512))


def attention_tile(rows: int, splits: int, width: int) -> tuple[int, int]:
    """(rows of one program, warps) of `attention._attention_kernel`: their product is what the sum over warps needs of
    shared memory, 33 KB for heads of 128.
    """
    warps = 8 if splits == 1 and width <= 128 else 4
    return (8 if rows <= 8 or warps == 8 else 16), warps
