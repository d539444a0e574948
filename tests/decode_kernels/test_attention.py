"""Attention of new tokens: the twin against a plain formula, the kernel against the twin, and what it compiles to."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, HAS_TRITON, compiled, needs_compiler, needs_kernels, relative_error, unhinted

import decode_kernels
import linear
import model
from decode_kernels import tiles

if HAS_TRITON:
    import triton

    from decode_kernels import attention

# batch, T, H, Hkv, Dh, slots, first positions, window, q and k norm
ATTENTIONS = [
    (1, 1, 4, 4, 64, 128, [5], 0, False),
    (1, 1, 8, 2, 128, 512, [300], 0, True),
    (2, 3, 6, 2, 64, 640, [0, 500], 0, True),
    (1, 16, 8, 1, 64, 300, [200], 0, False),
    (2, 2, 4, 4, 48, 300, [7, 270], 64, False),
    (1, 5, 4, 2, 8, 128, [100], 0, False),
    (1, 2, 4, 1, 256, 300, [77], 0, True),
    (1, 16, 2, 2, 128, 256, [100], 0, True),  # two programs of eight rows
    (1, 12, 2, 1, 64, 1100, [1040], 700, False),  # two splits, programs of sixteen rows
    (2, 1, 4, 2, 64, 1100, [0, 1040], 0, False),  # one new token: the prefix begins with it; two splits
    (2, 1, 4, 1, 128, 1100, [511, 512], 500, True),  # it is the last slot of a step, and the first
    (2, 1, 16, 1, 256, 300, [63, 64], 0, False),
]


def make_attention(b, t, h, hkv, dim, slots, first, dtype, norm):
    gen = torch.Generator().manual_seed(slots + t)
    qkv = torch.randn(b * t, (h + 2 * hkv) * dim, generator=gen).to(dtype)
    angle = torch.rand(b * t, dim // 2, generator=gen) * 6
    positions = torch.tensor(first)[:, None] + torch.arange(t)
    caches = [torch.randn(b, hkv, slots, dim, generator=gen).to(dtype) for _ in range(2)]
    norms = [(torch.rand(dim, generator=gen) + 0.5).to(dtype) if norm else None for _ in range(2)]
    return qkv, angle.cos(), angle.sin(), positions, *caches, *norms


def naive_attention(qkv, cos, sin, positions, k_cache, v_cache, q_norm, k_norm, eps, window):
    """One token, one head at a time, in float64; caches are changed in place."""
    (b, t), (hkv, _, dim) = positions.shape, k_cache.shape[1:]
    heads = qkv.double().view(b, t, -1, dim)
    h = heads.shape[2] - 2 * hkv
    out = torch.empty(b, t, h, dim, dtype=torch.float64)

    def prepare(x, norm, i):
        x = x if norm is None else x / (x.square().mean() + eps).sqrt() * norm.double()
        x1, x2 = x.chunk(2)
        c, s = cos[i].double(), sin[i].double()
        return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s])

    for i in range(b):
        for j in range(t):
            p = int(positions[i, j])
            for kv in range(hkv):
                k_cache[i, kv, p] = prepare(heads[i, j, h + kv], k_norm, i * t + j)
                v_cache[i, kv, p] = heads[i, j, h + hkv + kv]
            low = max(0, p - window + 1) if window else 0
            for head in range(h):
                kv = head // (h // hkv)
                scores = k_cache[i, kv, low : p + 1] @ prepare(heads[i, j, head], q_norm, i * t + j) / dim**0.5
                out[i, j, head] = scores.softmax(0) @ v_cache[i, kv, low : p + 1]
    return out.view(b * t, h * dim)


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_twin_is_the_formula(case):
    b, t, h, hkv, dim, slots, first, window, norm = case
    args = make_attention(b, t, h, hkv, dim, slots, first, torch.float32, norm)
    wanted_args = [a.double() if i in (4, 5) else a for i, a in enumerate(args)]
    got = model.decode_attention_reference(*args, eps=1e-5, window=window)
    wanted = naive_attention(*wanted_args, eps=1e-5, window=window)
    assert relative_error(got, wanted) < 1e-5
    assert all(relative_error(args[i], wanted_args[i]) < 1e-6 for i in (4, 5))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_equals_twin(dtype, case):
    b, t, h, hkv, dim, slots, first, window, norm = case
    args = [a if a is None else a.to(DEVICE) for a in make_attention(b, t, h, hkv, dim, slots, first, dtype, norm)]
    wanted_args = [a if a is None or not a.is_floating_point() else a.float() for a in args]
    got = decode_kernels.decode_attention(*args, eps=1e-5, window=window)
    wanted = model.decode_attention_reference(*wanted_args, eps=1e-5, window=window)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative_error(got, wanted) < bound
    assert all(relative_error(args[i], wanted_args[i]) < bound for i in (4, 5))
    changed = (
        (args[4] != wanted_args[4].to(dtype)).any(-1).any(1).nonzero()
    )  # rounding may differ, but only in new slots
    assert all(first[i] <= slot < first[i] + t for i, slot in changed.tolist())


@needs_kernels
def test_operators_survive_compilation_and_equals_twin():
    """One graph, no breaks, caches changed in place; shapes and schemas hold for fake tensors."""
    x, w = torch.randn(2, 256, device=DEVICE).half(), torch.randn(32, 256, device=DEVICE).half()
    gain = torch.rand(256, device=DEVICE).half()
    qkv, cos, sin, positions, k_cache, v_cache, _, _ = (
        t if t is None else t.to(DEVICE) for t in make_attention(1, 2, 4, 2, 64, 128, [5], torch.float16, False)
    )

    def step(x, qkv, k_cache, v_cache):
        y = linear.linear(x, w, norm_weight=gain, eps=1e-5)
        return y * 2, decode_kernels.decode_attention(qkv, cos, sin, positions, k_cache, v_cache) + 1

    copies = k_cache.clone(), v_cache.clone()
    wanted = step(x, qkv, *copies)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, qkv, k_cache, v_cache)
    assert all(torch.equal(a, b) for a, b in zip((*got, k_cache, v_cache), (*wanted, *copies)))
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.decode.dense_linear.default, (x, w, None, None, 0.0, None, False, None), test_utils=utils
    )
    args = (qkv, cos, sin, positions, k_cache, v_cache, None, None, 0.0, 0)
    torch.library.opcheck(torch.ops.decode.attention.default, args, test_utils=utils)


@needs_compiler
@pytest.mark.parametrize("sm, case", [*((90, case) for case in ATTENTIONS), (80, ATTENTIONS[1]), (80, ATTENTIONS[2])])
def test_attention_compiles_and_leaves_its_neighbours_their_cache(sm, case):
    """More than 48 KB of shared memory would move the boundary to the L1 cache for the kernels around it. Queries, keys
    and values are operands where they were loaded: a lane asks others for maxima, sums and their like alone.
    """
    b, t, heads, kv_heads, dim, slots, _, window, norm = case
    width, rows = max(64, triton.next_power_of_2(dim)), t * heads // kv_heads
    splits = tiles.splits(b * kv_heads, slots)
    block, warps = tiles.attention_tile(rows, splits, width)
    pointers = {"qkv": "bf16", "cos": "fp32", "sin": "fp32", "pos": "i64", "k": "bf16", "v": "bf16", "out": "bf16"}
    pointers |= {"part": "fp32"} if splits > 1 else {}
    pointers |= {"q_norm": "bf16", "k_norm": "bf16"} if norm else {}
    types = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()} | {"eps": "fp32", "scale": "fp32"}
    types["slots"] = "i32"
    values = dict.fromkeys({"part_ptr", "q_norm_ptr", "k_norm_ptr"} - types.keys())
    values |= {"T": t, "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "WIDTH": width, "WINDOW": window}
    values |= {"SPLITS": splits, "ROWS": -(-rows // block) * block, "BLOCK": block, "WARPS": warps}
    values |= {"AHEAD": tiles.ATTENTION_AHEAD, "PDL": sm >= 90, "ASM": True}
    kernel = compiled(attention._attention_kernel, types, values, sm, warps)
    assert kernel.metadata.shared <= 48 * 1024
    assert kernel.asm["ptx"].count("shfl.sync") <= 24 and not unhinted(kernel)
