"""Attention of new tokens: the twin against a plain formula, the kernel against the twin, and what it compiles to."""

from dataclasses import replace

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, HAS_TRITON, compiled, needs_compiler, needs_kernels, relative_error, unhinted

import architectures
import decode_kernels
from checkpoint import random_model
from decode_kernels import INTERPRETED, tiles
from linear import Linear, RMSNorm
from model import Attention, LayerCache
from tp import TensorParallel

if HAS_TRITON:
    import triton
    import triton.language as tl

    from decode_kernels import attention, gpu
    from decode_kernels.digits import empty_digits, fill_digits_

    @triton.jit
    def shares_kernel(out_ptr, first, SPLITS: tl.constexpr):
        begin, end, used = attention._split_of_prefix(first, tl.program_id(0), 1, 0, SPLITS, 128)
        out_ptr += tl.program_id(0) * 3
        tl.store(out_ptr, begin)
        tl.store(out_ptr + 1, end)
        tl.store(out_ptr + 2, used)


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
    (1, 1, 8, 1, 128, 2048, [1500], 0, False),  # twelve of fifteen splits have slots
    (1, 3, 4, 2, 64, 1100, [1024], 100, False),  # of a long prefix a window leaves one split
]


def attention_of(h, hkv, dim, window, q_norm, k_norm):
    """An Attention with these norms, on the device; its projections are not used."""
    sizes = {"hidden_size": 8, "num_attention_heads": h, "num_key_value_heads": hkv, "head_dim": dim, "vocab_size": 8}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 8, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
    config = architectures.config_from_hf({"model_type": "llama" if q_norm is None else "qwen3"} | sizes)
    module = Attention(replace(config, windows=(window,)), 0, TensorParallel())
    if q_norm is not None:
        module.q_norm.weight = torch.nn.Parameter(q_norm, requires_grad=False)
        module.k_norm.weight = torch.nn.Parameter(k_norm, requires_grad=False)
    return module


def cache_of(k, v):
    cache = LayerCache((0,), k.device, k.dtype)
    cache.k, cache.v = k, v
    return cache


def attended(module, qkv, cos, sin, positions, k_cache, v_cache, fast):
    """By the kernel, which must serve, or in plain PyTorch: [B T, H Dh]; caches are changed in place."""
    b, t = positions.shape
    cache = cache_of(k_cache, v_cache)
    qkv, cos, sin = qkv.view(b, t, -1), cos.view(b, t, 1, -1), sin.view(b, t, 1, -1)
    if fast:
        decode_kernels.use_(module.to(DEVICE))
        y = module.fast(module, qkv, cos, sin, positions, cache, k_cache.shape[2])
    else:
        y = module.attend(qkv, cos, sin, positions, cache, k_cache.shape[2])
    return y.reshape(b * t, -1)


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
    got = attended(attention_of(h, hkv, dim, window, *args[6:]), *args[:6], fast=False)
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
    got = attended(attention_of(h, hkv, dim, window, *args[6:]), *args[:6], fast=True)
    wanted = attended(attention_of(h, hkv, dim, window, *wanted_args[6:]), *wanted_args[:6], fast=False)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative_error(got, wanted) < bound
    assert all(relative_error(args[i], wanted_args[i]) < bound for i in (4, 5))
    # rounding may differ, but only in new slots
    changed = (args[4] != wanted_args[4].to(dtype)).any(-1).any(1).nonzero()
    assert all(first[i] <= slot < first[i] + t for i, slot in changed.tolist())


@needs_kernels
@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_the_digits_that_attention_leaves_equals_twin(case):
    """Bit for bit those of its result, and none of them anywhere else."""
    b, t, h, hkv, dim, slots, first, window, norm = case
    args = [a if a is None else a.to(DEVICE) for a in make_attention(b, t, h, hkv, dim, slots, first, DTYPES[0], norm)]
    got, wanted = (empty_digits(args[0], b * t, h * dim, norm=False) for _ in range(2))
    for x in (*got[:2], *wanted[:2]):
        x.zero_()
    y = attention.run(args[0], args[1:3], args[3], args[4:6], (*args[6:], 1e-5), window, got)
    fill_digits_(y, None, wanted)
    assert y.isfinite().all() and torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@needs_kernels
@pytest.mark.parametrize("tokens, bits, slots", [(1, 8, 512), (3, 4, 512)] + [(1, 4, 256)] * (not INTERPRETED))
def test_a_product_of_the_digits_that_attention_leaves_equals_twin(tokens, bits, slots):
    sizes = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"vocab_size": 64, "num_hidden_layers": 1, "intermediate_size": 256, "max_position_embeddings": 2048}
    config = architectures.config_from_hf({"model_type": "llama"} | sizes)
    torch.manual_seed(tokens)
    module = random_model(config, bits=bits, device=DEVICE, dtype=DTYPES[0]).layers[0].self_attn
    decode_kernels.use_(module)
    x = torch.randn(1, tokens, 256, device=DEVICE).to(DTYPES[0])
    angle = torch.rand(1, tokens, 1, 64, device=DEVICE)
    positions = torch.arange(tokens, device=DEVICE)[None] + 250
    cache = cache_of(*(torch.randn(1, 1, slots, 128, device=DEVICE).to(DTYPES[0]) for _ in range(2)))
    left = module.o_proj.fast.left
    got = module(x, None, angle.cos(), angle.sin(), positions, cache, slots)
    assert left.kept is None  # taken
    module.fast(module, module.qkv_proj(x), angle.cos(), angle.sin(), positions, cache, slots)
    assert left.kept is not None
    module.o_proj.fast = gpu.Quantized(bits)
    assert torch.equal(module(x, None, angle.cos(), angle.sin(), positions, cache, slots), got)


@needs_kernels
def test_operators_survive_compilation_and_equals_twin():
    """One graph, no breaks, caches changed in place; shapes and schemas hold for fake tensors."""
    x, linear = torch.randn(2, 256, device=DEVICE).half(), Linear(256, 32, dtype=torch.float16).to(DEVICE)
    w, norm = linear.weight.normal_(), RMSNorm(256, 1e-5, dtype=torch.float16).to(DEVICE)
    norm.weight.uniform_()
    decode_kernels.use_(linear)
    module = attention_of(4, 2, 64, 0, None, None).to(DEVICE)
    qkv, cos, sin, positions, k_cache, v_cache, _, _ = (
        t if t is None else t.to(DEVICE) for t in make_attention(1, 2, 4, 2, 64, 128, [5], torch.float16, False)
    )

    caches = [cache_of(k_cache.clone(), v_cache.clone()) for _ in range(2)]
    operands = [t.view(1, 2, -1) for t in (qkv, cos, sin)]
    decode_kernels.use_(module)

    def step(x, qkv, cos, sin, cache):
        return linear(x, norm=norm) * 2, module.fast(module, qkv, cos, sin, positions, cache, 128) + 1

    wanted = step(x, *operands, caches[0])
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, *operands, caches[1])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    assert torch.equal(caches[0].k, caches[1].k) and not torch.equal(caches[0].k, k_cache)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.decode.dense_linear.default, (x, w, None, None, 0.0, None, False, None), test_utils=utils
    )
    args = (qkv, cos, sin, positions, k_cache, v_cache, None, None, 0.0, 0)
    torch.library.opcheck(torch.ops.decode.attention.default, args, test_utils=utils)


@needs_kernels
@pytest.mark.parametrize("splits", [1, 4, 15, 31])
def test_splits_share_every_slot(splits):
    used_by = {}
    for first in (0, 127, 128, 2048, 24_575, 24_576, 131_071):
        out = torch.zeros(splits, 3, dtype=torch.int32, device=DEVICE)
        shares_kernel[(splits,)](out, first, SPLITS=splits)
        shares = [(begin, end) for begin, end, _ in out.tolist() if begin < end]
        assert [begin for begin, _ in shares] == [0, *(end for _, end in shares)][:-1] and shares[-1][1] == first + 1
        assert set(out[:, 2].tolist()) == {len(shares)}
        used_by[first] = len(shares)
    assert used_by[127] == 1 and used_by[24_575] == splits - splits // 8 and used_by[24_576] == splits


@needs_compiler
@pytest.mark.parametrize("sm, case", [*((90, case) for case in ATTENTIONS), (80, ATTENTIONS[1]), (80, ATTENTIONS[2])])
def test_attention_compiles_and_leaves_its_neighbours_their_cache(sm, case):
    """More than 48 KB of shared memory would move the boundary to the L1 cache for the kernels around it. Old keys and
    values are operands where they were loaded: a lane asks others for maxima, sums and their like alone. One
    instruction asks for the next matrix.
    """
    b, t, heads, kv_heads, dim, slots, _, window, norm = case
    width, rows = max(64, triton.next_power_of_2(dim)), t * heads // kv_heads
    block, warps, splits = tiles.attention_tile(rows, b * kv_heads, slots, width)
    pointers = {"qkv": "bf16", "cos": "fp32", "sin": "fp32", "pos": "i64", "k": "bf16", "v": "bf16", "out": "bf16"}
    pointers |= {"part": "fp32"} if splits > 1 else {"digits": "i8", "unit": "fp32"} if dim == 128 else {}
    pointers |= {"q_norm": "bf16", "k_norm": "bf16"} if norm else {}
    asks = sm >= 90 and b * t == 1
    pointers |= {"next": "u8"} if asks else {}
    types = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()} | {"eps": "fp32", "scale": "fp32"}
    types["slots"] = "i32"
    optional = {"part_ptr", "digits_ptr", "unit_ptr", "q_norm_ptr", "k_norm_ptr", "next_ptr"}
    values = dict.fromkeys(optional - types.keys())
    values |= {"T": t, "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "WIDTH": width, "WINDOW": window}
    values |= {"SPLITS": splits, "ROWS": -(-rows // block) * block, "BLOCK": block, "WARPS": warps}
    values |= {"COLUMNS": min(block, triton.next_power_of_2(rows))}
    values |= {"AHEAD": tiles.ATTENTION_AHEAD, "ALONE": True, "PDL": sm >= 90, "ASM": True, "NEXT": asks * 32768}
    kernel = compiled(attention._attention_kernel, types, values, sm, warps)
    assert kernel.metadata.shared <= 48 * 1024
    assert kernel.asm["ptx"].count("shfl.sync") <= 44 and not unhinted(kernel)
    assert kernel.asm["ptx"].count("cp.async.bulk.prefetch.L2") == asks
