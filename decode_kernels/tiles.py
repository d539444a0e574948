"""Tiles as data: how much of a matrix one program takes, and how early it loads, by format, rows and shape.

Knows numbers and where they were measured. Refuses to know tensors and Triton.

`choose` takes the first entry of a format's table that a product fits. All were measured with the shapes of Llama-2-7B,
Llama-3.1-8B, Llama-3.2-1B, Llama-2-70B, Phi-4-mini and Gemma-3-4B on an H200, or an H100 where it says so, in the step
where a figure is of a step (`benchmarks/NOTES.md` has the sweeps, and says why a tile wins: all programs resident at
once, everything loaded before the wait, few warps). On other GPUs, and for shapes in between, every tile is correct, if
not the best. For another GPU, put entries measured there in front, with what tells it apart, as `shared` does.

Worked example: `down` of Llama-2-7B, K = 11008 and N = 4096, int4, one row. Of the table "int4" three of the first
seven entries want gated weights and four K <= 4096; the eighth fits: 16 rows of the matrix in a program, 8 warps, each
of which has the loads of 4 steps of 128 columns under way. So 256 programs of 8 warps take 86 chunks of 128 columns in
11 steps.
"""

from dataclasses import dataclass

ANY = 1 << 62
ATTENTION_ALONE = 256  # slots of a cache that one program attends to, however many programs there may be
ATTENTION_AHEAD = 4  # steps of the loop over the prefix that the L2 cache is asked for in advance, this one included


@dataclass(frozen=True)
class Tile:
    """What a program does: `rows` rows of the matrix, `columns` at a time (in each warp, but for "16-bit, many rows"),
    in so many warps. The weights of a step are loaded w_ahead steps before they are multiplied, the activations x_ahead
    steps before. With stages, Triton's own pipeline loads that far ahead, and w_ahead counts the steps before the wait.
    """

    rows: int
    columns: int
    warps: int
    w_ahead: int
    x_ahead: int = 0
    stages: int = 1


@dataclass(frozen=True)
class Choice:
    """A tile, what was measured with it at which commit, and which products take it: at most so many rows of
    activations, inputs K and outputs N of the matrix in these bounds, gated (gates and ups) or not, and at least so
    many KB of shared memory for a program.
    """

    tile: Tile
    measured: str
    commit: str
    rows: int = 16
    k: int = ANY
    n: int = ANY
    gated: bool | None = None
    k_from: int = 0
    n_from: int = 0
    shared: int = 0

    def fits(self, k: int, n: int, rows: int, gated: bool, shared: int) -> bool:
        shape = self.k_from <= k <= self.k and self.n_from <= n <= self.n
        return shape and rows <= self.rows and self.gated in (None, gated) and shared >= self.shared * 1024


TABLES = {
    # `dense._gemv_kernel`; its results, `rows`, are half as many as its rows of the matrix if these are gated
    "16-bit, few rows": (
        Choice(Tile(4, 512, 2, 2, 2), "7B on two: -17 us", "b846b53", rows=1, k_from=2048, k=2048, n_from=4096, n=4096),
        Choice(Tile(4, 256, 2, 4, 4), "7B on two: -10 us", "b846b53", rows=1, k_from=5504, k=7168, n_from=4096, n=4096),
        Choice(Tile(4, 512, 2, 2, 2), "7B on two: -5 us", "b846b53", rows=1, k_from=4096, k=4096, n=12288, gated=True),
        Choice(Tile(4, 256, 2, 4, 4), "7B: -15 us, 8B: -21 us, Phi-4-mini: -11 us", "3fc8ddf", rows=1, gated=True),
        Choice(Tile(2, 512, 2, 3, 3), "Phi-4-mini: step 1.997 -> 1.912 ms", "3fc8ddf", rows=1, k_from=3072, k=3072),
        Choice(Tile(8, 256, 2, 5, 5), "Gemma-3-4B: step 2.312 -> 2.130 ms", "3fc8ddf", rows=1, k_from=2560, k=2560),
        Choice(Tile(4, 256, 4, 5, 5), "Gemma-3-4B: -9 us", "3fc8ddf", rows=1, k_from=10240, k=10240, n=2560),
        Choice(
            Tile(2, 256, 4, 6, 6), "Phi-4-mini: -26 us", "3fc8ddf", rows=1, k_from=8192, k=8192, n_from=3072, n=3072
        ),
        Choice(Tile(2, 256, 4, 10, 10), "8B: step 3.603 -> 3.531 ms", "3fc8ddf", rows=1, k_from=14336, k=14336, n=4096),
        Choice(
            Tile(4, 512, 4, 2, 2), "8B at 8,192: -9 us", "3fc8ddf", rows=1, k_from=4096, k=4096, n_from=6144, n=6144
        ),
        Choice(Tile(2, 256, 2, 4, 4), "1B: step 0.66 ms", "e50a671", rows=1, k=2048, n=2048),
        Choice(Tile(4, 256, 2, 4, 4), "1B: step 0.66 ms", "e50a671", rows=1, k=2048),
        Choice(Tile(2, 512, 4, 2, 2), "7B: step 3.243 -> 3.138 ms", "e50a671", rows=1, k=4096),
        Choice(Tile(2, 256, 4, 4, 4), "1B: step 0.66 ms", "e50a671", rows=1, k=8192),
        Choice(Tile(2, 256, 8, 6, 6), "7B: step 3.243 -> 3.138 ms", "e50a671", rows=1),
        Choice(Tile(4, 256, 8, 2, 2), "7B, 4 rows: step 3.372 -> 3.205 ms", "e50a671", gated=True),
        Choice(Tile(8, 128, 4, 4, 4), "7B, 4 rows: step 3.372 -> 3.205 ms", "e50a671", k=4096, n=8192),
        Choice(Tile(8, 128, 4, 4, 2), "7B, 4 rows: step 3.372 -> 3.205 ms", "e50a671", n=8192),
        Choice(Tile(8, 128, 8, 4, 4), "7B, 4 rows: step 3.372 -> 3.205 ms", "e50a671", k=4096),
        Choice(Tile(8, 128, 8, 4, 2), "not measured: between the two above", "e50a671"),
    ),
    # `dense._gemm_kernel`; 99 KB of shared memory are enough (sm_86, sm_89) where no entry says otherwise
    "16-bit, many rows": (
        Choice(Tile(32, 128, 1, 3, stages=4), "8B: 4.148 -> 3.951 ms", "eafbd9e", rows=8, n_from=28672, gated=True),
        Choice(Tile(64, 128, 2, 1, stages=3), "8B, 16 rows: 4.334 -> 4.074 ms", "eafbd9e", n_from=28672, gated=True),
        Choice(Tile(16, 256, 2, 3, stages=5), "8B: 4.240 -> 4.146 ms", "eafbd9e", rows=8, k=4096, n_from=6144, n=6144),
        Choice(Tile(64, 128, 4, 2, stages=4), "8B: -107 us", "eafbd9e", k=4096, n_from=6144, n=6144, shared=160),
        Choice(Tile(32, 256, 2, 2, stages=5), "8B, 16 rows: -42 us", "eafbd9e", k_from=14336, n=4096, shared=160),
        Choice(Tile(64, 128, 2, 2, stages=3), "4 rows: step -46 us (H100)", "0511cf9", rows=8, gated=True),
        Choice(Tile(64, 64, 2, 1, stages=6), "16 rows: step 3.92 -> 3.80 ms", "2b26446", gated=True),
        Choice(
            Tile(32, 256, 2, 2, stages=7),
            "4 rows: step -17 us (H100)",
            "0511cf9",
            rows=8,
            k_from=8193,
            n_from=2049,
            n=4096,
            shared=160,
        ),
        Choice(
            Tile(32, 256, 2, 1, stages=6),
            "4 rows: step -0.1% (H100)",
            "4268e2b",
            rows=8,
            k_from=4096,
            n_from=2049,
            n=4096,
            shared=160,
        ),
        Choice(Tile(16, 512, 2, 1, stages=4), "4 rows: 1.11 steps, others to 1.25", "2b26446", rows=8, n=8192),
        Choice(Tile(16, 256, 1, 1, stages=6), "16 rows: step -1%", "536b09e", n=8192),
        Choice(Tile(32, 128, 1, 3, stages=5), "4 rows: step -36 us (H100)", "0511cf9", rows=8),
        Choice(Tile(32, 128, 1, 1, stages=6), "4 rows: 1.11 steps, others to 1.17", "2b26446"),
        Choice(Tile(64, 128, 4, 1, stages=3), "8B, 32 rows: -19 us", "eafbd9e", rows=32, gated=True, shared=160),
        Choice(Tile(32, 256, 2, 2, stages=4), "8B, 32 rows: -6 us", "eafbd9e", rows=32, k_from=8193, shared=160),
        Choice(Tile(64, 128, 4, 2, stages=4), "8B, 32 rows: 5.127 -> 4.497 ms", "eafbd9e", rows=32, shared=160),
        Choice(Tile(32, 128, 2, 2, stages=5), "8B, 32 rows: qkv 3033 GB/s", "eafbd9e", rows=32),
    ),
    "int8": (
        Choice(
            Tile(32, 128, 4, 3, 3),
            "half of 7B: step 1.142 -> 1.098 ms",
            "0ef840e",
            rows=1,
            k=4096,
            n_from=4097,
            n=8192,
            gated=False,
        ),
        Choice(
            Tile(16, 128, 4, 4, 4),
            "half of 7B: step 1.098 -> 1.041 ms",
            "0ef840e",
            rows=1,
            k_from=4097,
            k=8192,
            n=4096,
            gated=False,
        ),
        Choice(Tile(16, 128, 8, 4, 4), "o: 5.4 us, 3107 GB/s", "189752e", rows=4, k=8192, n=8192, gated=False),
        Choice(Tile(16, 128, 4, 6, 6), "down: 12.2 us, 3697 GB/s", "189752e", rows=4, n=8192, gated=False),
        Choice(Tile(32, 128, 4, 2, 2), "qkv: 12.8 us, gate_up: 21.5 us, 4192 GB/s", "189752e", rows=4),
        Choice(Tile(16, 128, 4, 6, 3), "8 rows: o 6.1 us, down 13.8 us", "189752e", rows=8, n=8192, gated=False),
        Choice(Tile(32, 128, 4, 1, 1), "8 rows: step 1.953 -> 1.908 ms", "e50a671", rows=8, k=4096, gated=True),
        Choice(Tile(32, 128, 4, 2, 1), "8 rows: qkv 13.2 us", "189752e", rows=8),
        Choice(Tile(16, 128, 4, 2, 2), "16 rows: o 6.8 us, down 14.0 us", "189752e", n=8192, gated=False),
        Choice(Tile(32, 128, 4, 2, 2), "16 rows: gate_up 25.7 us", "189752e", k=4096, gated=True),
        Choice(Tile(32, 128, 2, 2, 1), "16 rows: step 2.165 -> 2.144 ms", "e50a671"),
    ),
    "int4": (
        Choice(
            Tile(32, 128, 8, 2, 2), "8B on two: -52 us", "b846b53", rows=1, k_from=4096, k=4096, n=14336, gated=True
        ),
        Choice(Tile(16, 128, 8, 4, 4), "8B on two: -7 us", "b846b53", rows=1, k_from=4096, k=4096, n=3072, gated=False),
        Choice(
            Tile(16, 128, 8, 2, 2), "8B on two: -18 us", "b846b53", rows=1, k=2048, n_from=4096, n=4096, gated=False
        ),
        Choice(Tile(32, 128, 4, 2, 2), "Phi-4-mini: -39 us", "3fc8ddf", rows=1, k_from=3072, k=3072, gated=True),
        Choice(
            Tile(16, 128, 4, 4, 4), "8B at 2,048: -31 us", "3fc8ddf", rows=1, k_from=4096, k=4096, n_from=6144, n=6144
        ),
        Choice(Tile(32, 128, 2, 2, 2), "step 1.209 -> 1.198 ms", "e50a671", rows=1, k=4096, gated=True),
        Choice(Tile(16, 128, 4, 8, 4), "o: 4.3 us, 1993 GB/s", "189752e", rows=4, k=4096, n=8192, gated=False),
        Choice(Tile(16, 128, 8, 4, 4), "down: 7.9 us, 2932 GB/s", "189752e", rows=4, n=8192, gated=False),
        Choice(Tile(32, 128, 2, 3, 3), "4 rows: gate_up 12.8 us", "189752e", rows=4, k=4096, gated=True),
        Choice(Tile(32, 128, 4, 3, 3), "qkv: 8.3 us, 3128 GB/s", "189752e", rows=4),
        Choice(Tile(16, 128, 8, 2, 1), "8 rows: o 4.8 us", "189752e", rows=8, k=16384, n=8192, gated=False),
        Choice(Tile(16, 128, 8, 3, 1), "70B, 6 rows: down 34.2 us", "189752e", rows=8, n=8192, gated=False),
        Choice(Tile(32, 128, 2, 2, 1), "8 rows: step 1.514 -> 1.346 ms", "e50a671", rows=8, k=4096, gated=True),
        Choice(Tile(32, 128, 4, 2, 1), "8 rows: qkv 8.7 us", "189752e", rows=8),
        Choice(Tile(16, 128, 4, 2, 2), "16 rows: o 6.0 us", "189752e", k=8192, n=8192, gated=False),
        Choice(Tile(32, 128, 8, 2, 2), "16 rows: step -2%", "e9286a6", n=8192, gated=False),
        Choice(Tile(32, 128, 4, 2, 2), "16 rows: qkv step -2%, gate_up 18.7 us", "e9286a6"),
    ),
}


def choose(table: str, k: int, n: int, rows: int, gated: bool, shared: int = 0) -> Tile:
    """The tile for `rows` rows of activations times a matrix of N x K, on a GPU whose programs may have `shared` bytes
    of shared memory.
    """
    return next(choice.tile for choice in TABLES[table] if choice.fits(k, n, rows, gated, shared))


def attention_tile(rows: int, heads: int, slots: int, width: int) -> tuple[int, int, int]:
    """(rows of one program, warps, most splits of a prefix) of `attention._attention_kernel`, for that many KV heads in
    the batch and slots in the cache.

    Rows times warps decide how much shared memory the sum over warps needs, 33 KB for heads of 128; from 48 KB on the
    kernels around it lose their L1 cache. One program of 8 warps fills a multiprocessor of an H200, and so do two of 4.
    """
    if slots <= ATTENTION_ALONE and width <= 128:
        return 8, 8, 1
    if width <= 128 and (rows <= 8 or slots < 1024):
        return 8, 8, _splits(heads * -(-rows // 8), 132, slots // 128)
    block = 8 if rows <= 8 or width > 128 else 16
    return block, 4, _splits(heads * -(-rows // block), 264, slots // 64)


def _splits(programs: int, places: int, most: int) -> int:
    """Into how many parts to cut every program so that they take few rounds in so many places: the first number, `most`
    at most, that is within 7% of the best. So eight programs make 120, not 128, which leaves multiprocessors to the
    kernel that joins them.
    """
    rounds = [-(-programs * s // places) / s for s in range(1, max(1, min(most, places)) + 1)]
    return next(s for s, r in enumerate(rounds, 1) if r <= 1.07 * min(rounds))
