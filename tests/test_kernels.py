"""The twins against plain formulas; every Triton kernel against its twin, on a GPU or in Triton's CPU interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from sampling import SamplingParams, sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not kernels.interpreted() else "cpu")
DTYPES = (
    [torch.float16] if kernels.interpreted() else [torch.bfloat16, torch.float16]
)  # the interpreter truncates to bf16
needs_kernels = pytest.mark.skipif(not kernels.supported(DEVICE), reason="needs a GPU or Triton's interpreter")


def test_kernels_in_the_interpreter():
    """Runs the difference tests of this file in a process of its own: Triton reads the variable when it is imported."""
    if kernels.triton is None:
        pytest.skip("needs Triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", __file__, "-k", "equals_twin", "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


PACK = {8: kernels.pack_int8, 4: kernels.pack_int4}


@pytest.mark.parametrize("bits", PACK)
@pytest.mark.parametrize("shape", [(16, 128), (3, 32, 256), (2, 2, 16, 384)])
def test_packing_round_trip(shape, bits):
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    packed = PACK[bits](q)
    assert packed.dtype == {8: torch.int8, 4: torch.uint8}[bits] and packed.numel() * 8 == q.numel() * bits
    assert torch.equal(kernels.unpack(packed), q)


@pytest.mark.parametrize("bits", PACK)
def test_packing_pads_with_zeros(bits):
    q = torch.randint(-8, 8, (40, 96), dtype=torch.int8)
    wide = kernels.unpack(PACK[bits](q))
    assert wide.shape == (48, 128)
    assert torch.equal(wide[:40, :96], q)
    assert not wide[40:].any() and not wide[:, 96:].any()


def make_linear(fmt, m, n, k, dtype, experts=0, seed=0):
    """Random operands and the [.., N, K] float64 matrix they stand for; formats: dense, int8, g<size>, z = zeros."""
    gen = torch.Generator().manual_seed(seed)
    lead = (experts,) if experts else ()
    x = torch.randn(m, k, generator=gen).to(dtype)
    if fmt == "dense":
        w = torch.randn(*lead, n, k, generator=gen).to(dtype) / k**0.5
        return x, w, None, None, w.double()
    if fmt == "int8":
        w = torch.randint(-128, 128, (*lead, n, k), generator=gen, dtype=torch.int8)
        scale = ((torch.rand(*lead, n, generator=gen) + 0.5) / 80 / k**0.5).to(dtype)
        return x, kernels.pack_int8(w), scale, None, w.double() * scale.double()[..., None]
    group = int(fmt.strip("gz") or k)
    q = torch.randint(-8, 8, (*lead, n, k), generator=gen, dtype=torch.int8)
    scale = ((torch.rand(*lead, n, k // group, generator=gen) + 0.5) / 5 / k**0.5).to(dtype)
    zero = torch.randint(-8, 8, scale.shape, generator=gen).to(dtype) if "z" in fmt else None
    centered = q.double() - (0 if zero is None else zero.double().repeat_interleave(group, -1))
    w = centered * scale.double().repeat_interleave(group, -1)
    return x, kernels.pack_int4(q), scale, zero, w


def expected_linear(x, w, bias, norm_weight, eps, residual, silu_mul, experts):
    x = x.double()
    if norm_weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight.double()
    y = x @ w.T if experts is None else torch.stack([w[e] @ row for e, row in zip(experts.tolist(), x)])
    if bias is not None:
        y = y + bias.double()
    if silu_mul:
        gate, up = y.chunk(2, -1)
        y = gate * gate.sigmoid() * up
    return y if residual is None else y + residual.double()


def check_linear(
    function, fmt, m, n, k, dtype, device, bound, norm=False, bias=False, silu_mul=False, residual=False, experts=0
):
    x, weight, scale, zero, w = make_linear(fmt, m, n, k, dtype, experts)
    norm_weight = (torch.rand(k) + 0.5).to(dtype) if norm else None
    b = torch.randn(n).to(dtype) if bias else None
    r = torch.randn(m, n // 2 if silu_mul else n).to(dtype) if residual else None
    chosen = torch.randint(0, experts, (m,)) if experts else None
    move = [t if t is None else t.to(device) for t in (x, weight, scale, zero, b, norm_weight, r, chosen)]
    y = function(*move[:5], norm_weight=move[5], eps=1e-5, residual=move[6], silu_mul=silu_mul, experts=move[7])
    assert y.dtype == dtype
    assert relative_error(y.cpu(), expected_linear(x, w, b, norm_weight, 1e-5, r, silu_mul, chosen)) < bound


FORMATS = ["dense", "int8", "g32", "g64", "g128", "g", "g64z", "gz"]
EXTRAS = [{}, {"norm": True, "silu_mul": True}, {"bias": True, "residual": True}, {"experts": 3, "norm": True}]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_linear_twin_is_the_formula(fmt, extra):
    check_linear(kernels.linear_reference, fmt, 5, 64, 256, torch.float32, "cpu", 1e-5, **extra)


SHAPES = [(1, 64, 256), (3, 96, 1152), (9, 32, 640), (16, 64, 2176), (8, 40, 384), (2, 32, 4352)]
CASES = [(fmt, i) for i in range(len(SHAPES)) for fmt in FORMATS]
if kernels.interpreted():  # slow: half of them, a checkerboard
    CASES = [(fmt, i) for fmt, i in CASES if (FORMATS.index(fmt) + i) % 2]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt, shape", CASES)
def test_linear_equals_twin(dtype, fmt, shape):
    (m, n, k), extra = SHAPES[shape], EXTRAS[(shape // 2 + FORMATS.index(fmt)) % len(EXTRAS)]
    bound = 8e-3 if dtype == torch.bfloat16 else 2e-3
    check_linear(kernels.linear, fmt, m, n, k, dtype, DEVICE, bound, **extra)


@needs_kernels
@pytest.mark.parametrize("extra", EXTRAS[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_parts_of_tiles_equals_twin(rows, extra):
    check_linear(kernels.linear, "dense", rows, 66, 4360, DTYPES[0], DEVICE, 8e-3, **extra)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["dense", "int8", "g128"])
def test_a_large_activation_is_normed_and_equals_twin(fmt, rows, dtype):
    """One channel of a residual stream often holds thousands; times the norm's weight that is too much for float16."""
    x, weight, scale, zero, _ = make_linear(fmt, rows, 64, 256, dtype)
    x[:, 200] = 30_000
    gain = torch.linspace(1, 8, 256).to(dtype)
    move = [t if t is None else t.to(DEVICE) for t in (x, weight, scale, zero)]
    y = kernels.linear(*move, norm_weight=gain.to(DEVICE), eps=1e-5).cpu().float()
    wide = [t if t is None or t.dtype in (torch.int8, torch.uint8) else t.float() for t in (x, weight, scale, zero)]
    assert relative_error(y, kernels.linear_reference(*wide, norm_weight=gain.float(), eps=1e-5)) < 8e-3


@needs_kernels
@pytest.mark.parametrize("fmt", [*FORMATS[1:], "g96", "g40z"])
def test_dequantize_equals_its_twin_and_the_formula(fmt):
    sizes = {"g96": [(32, 192), (40, 1152)], "g40z": [(32, 40), (24, 520)], "int8": [(32, 40), (24, 1152)]}
    for n, k in sizes.get(fmt, [(64, 256), (40, 384), (24, 1152)]):
        _, weight, scale, zero, w = make_linear(fmt, 1, n, k, torch.float16)
        operands = [t if t is None else t.to(DEVICE) for t in (weight, scale, zero)]
        y = kernels.dequantize(*operands, n, k, torch.float32).cpu()
        assert torch.equal(y, kernels.dequantize_reference(weight, scale, zero, n, k, torch.float32))
        assert relative_error(y, w) < 1e-6
        integers = kernels.dequantize(operands[0], None, None, n, k, torch.float16).cpu()
        assert torch.equal(integers, kernels.unpack(weight)[:n, :k].half())


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
    got = kernels.decode_attention_reference(*args, eps=1e-5, window=window)
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
    got = kernels.decode_attention(*args, eps=1e-5, window=window)
    wanted = kernels.decode_attention_reference(*wanted_args, eps=1e-5, window=window)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative_error(got, wanted) < bound
    assert all(relative_error(args[i], wanted_args[i]) < bound for i in (4, 5))
    changed = (
        (args[4] != wanted_args[4].to(dtype)).any(-1).any(1).nonzero()
    )  # rounding may differ, but only in new slots
    assert all(first[i] <= slot < first[i] + t for i, slot in changed.tolist())


@needs_kernels
@pytest.mark.parametrize("first", [None, 40])
@pytest.mark.parametrize("dim, half, factor", [(64, 32, 1.0), (96, 20, 1.25)])
def test_embed_equals_twin(first, dim, half, factor):
    gen = torch.Generator().manual_seed(dim)
    table, frequencies = torch.randn(50, dim, generator=gen).half(), 1e4 ** -(torch.arange(half) / half)
    tokens = torch.randint(50, (2, 3), generator=gen) + (0 if first is None else 20)
    positions = torch.tensor([[0, 1, 2], [131_069, 131_070, 131_071]])
    args = [t.to(DEVICE) for t in (tokens, positions, table, frequencies)]
    x, cos, sin = kernels.embed(*args, factor, first)
    assert torch.equal(x, kernels.embed_reference(*args, factor, first)[0])
    assert (x == 0).all(-1).any() == (first is not None)
    exact = positions.double()[..., None, None] * frequencies.double()
    for got, want, turn in zip((cos, sin), kernels.angles(args[1], args[3], factor), (exact.cos(), exact.sin())):
        assert got.shape == (2, 3, 1, half) and (got - want).abs().max() < 1e-6
        assert (got[0].cpu() - factor * turn[0]).abs().max() < 1e-6


SAMPLES = [(1000, 1), (1000, 7), (1024, 200), (4000, 200), (33_000, 200), (300, 256), (70, 50)]


def make_logits(rows, vocabulary, dtype, coarse):
    """coarse: many ties, zeros of both signs among them."""
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits = (logits.round() * 0.5 if coarse else logits).to(dtype)
    return torch.where((logits == 0) & (torch.arange(vocabulary) % 2 == 0), -logits, logits).to(DEVICE)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary, k", SAMPLES)
def test_sample_equals_twin(vocabulary, k, dtype):
    """The same tokens but where two candidates are as good as equal: 16-bit logits tie, and a tie at the threshold of
    top-k is broken by the lowest id here.
    """
    params = [SamplingParams(0.0 if k == 1 else t, k, min_p=m) for t, m in ((0.8, 0.0), (1.7, 0.0), (1.0, 0.05))]
    rows = 3 if kernels.interpreted() else 16  # the interpreter takes half a second for a row of 33,000
    for coarse in (False, True):
        logits = make_logits(rows, vocabulary, dtype, coarse)
        seeds, positions = torch.arange(rows, device=DEVICE) << 20, torch.arange(rows, device=DEVICE)[:, None] * 7
        for p in params:
            assert kernels.samples(dtype, vocabulary, p.structure)
            args = logits, p.structure, p.knobs(DEVICE), seeds, positions[:, 0]
            # among equals the first ids stay: a millionth less for every id says so to the twin, in float64
            order = logits.double() - 1e-9 * torch.arange(vocabulary, device=DEVICE)
            got, twin = sample(*args, fused=True), sample(order, *args[1:])
            assert torch.equal(got, twin)
            assert torch.equal(got[2:3], sample(logits[2:3], *args[1:3], seeds[2:3], positions[2:3, 0], fused=True))


@needs_kernels
def test_sample_says_where_logits_are_not_finite_and_equals_twin():
    structure, knobs = (False, 50, False, False), SamplingParams(0.8, 50).knobs(DEVICE)
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        logits = make_logits(3, 2000, torch.float16, False)
        logits[1, 1234] = value
        args = structure, knobs, torch.arange(3, device=DEVICE), torch.arange(3, device=DEVICE)
        got = sample(logits, *args, fused=True)
        assert got[1] == -1 and (got >= 0).sum() == 2
        assert torch.equal(got, sample(logits, *args))


@needs_kernels
def test_sample_draws_what_it_should():
    """20,000 draws of one row, for which the interpreter is too slow: chi-square against the top-k probabilities."""
    n, k, vocabulary = 20_000, 8, 64
    row, params = torch.linspace(-2, 1, vocabulary).to(torch.float16), SamplingParams(0.9, k)
    logits = row.to(DEVICE).expand(n, -1)
    seeds, positions = torch.arange(n, device=DEVICE), torch.zeros(n, dtype=torch.int64, device=DEVICE)
    tokens = sample(logits, params.structure, params.knobs(DEVICE), seeds, positions, fused=True).cpu()
    expected = torch.softmax(row[-k:].double() / 0.9, -1) * n
    counts = torch.bincount(tokens - (vocabulary - k), minlength=k)
    assert len(counts) == k and counts.sum() == n
    assert ((counts - expected) ** 2 / expected).sum() < 26  # 7 degrees of freedom: one in two thousand


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5])
def test_advance_equals_twin(rows):
    results = []
    for function in (kernels.advance_, kernels.advance_reference_):
        tokens = torch.arange(rows, device=DEVICE) * 100 - 1
        state = [torch.full((rows, 1), 9, device=DEVICE), torch.full((rows, 1), 40, device=DEVICE)]
        state += [torch.tensor([2], device=DEVICE), torch.zeros((rows, 6), dtype=torch.int64, device=DEVICE)]
        for _ in range(2):
            function(tokens, *state)
        results.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_kernels
def test_operators_survive_compilation_and_equals_twin():
    """One graph, no breaks, caches changed in place; shapes and schemas hold for fake tensors."""
    x, w = torch.randn(2, 256, device=DEVICE).half(), torch.randn(32, 256, device=DEVICE).half()
    gain = torch.rand(256, device=DEVICE).half()
    qkv, cos, sin, positions, k_cache, v_cache, _, _ = (
        t if t is None else t.to(DEVICE) for t in make_attention(1, 2, 4, 2, 64, 128, [5], torch.float16, False)
    )

    def step(x, qkv, k_cache, v_cache):
        y = kernels.linear(x, w, norm_weight=gain, eps=1e-5)
        return y * 2, kernels.decode_attention(qkv, cos, sin, positions, k_cache, v_cache) + 1

    copies = k_cache.clone(), v_cache.clone()
    wanted = step(x, qkv, *copies)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, qkv, k_cache, v_cache)
    assert all(torch.equal(a, b) for a, b in zip((*got, k_cache, v_cache), (*wanted, *copies)))
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.decode.linear.default, (x, w, *[None] * 4, 0.0, None, False, None), test_utils=utils
    )
    args = (qkv, cos, sin, positions, k_cache, v_cache, None, None, 0.0, 0)
    torch.library.opcheck(torch.ops.decode.attention.default, args, test_utils=utils)


def compiled(kernel, types, values, sm, warps):
    """A kernel for that architecture, with or without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in values.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name.endswith("ptr")}
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})


def unhinted(kernel):
    """Loads and stores of many axes whose pointers do not say to which of them lanes are dealt: Triton 3.6 is right,
    later versions guess the other way round, and then everything passes through shared memory.
    """
    text = kernel.asm["ttir"]
    hinted = set(re.findall(r"(%\S+) = .*tt\.contiguity", text))
    used = re.findall(r"tt\.(?:load|store) (%[^ ,]+),? .*tensor<(?:\d+x){5,}!tt", text)
    assert used
    return [name for name in used if name not in hinted]


needs_compiler = pytest.mark.skipif(kernels.triton is None or kernels.interpreted(), reason="needs Triton's compiler")


@needs_compiler
@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize(
    "k, n, silu_mul", [(4096, 4096, False), (11008, 4096, False), (4096, 12288, False), (4096, 22016, True)]
)
@pytest.mark.parametrize("sm, shared", [(86, 99), (90, 227)])
def test_tiles_fit_shared_memory(rows, k, n, silu_mul, sm, shared):
    types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16", "rows": "i32"}
    block, span, warps, stages, early = kernels._rows_tile(k, n, rows, silu_mul, shared * 1024)
    values = {"bias_ptr": None, "residual_ptr": None, "N": n, "K": k, "SILU": silu_mul, "M": rows}
    values |= {"BLOCK": block, "SPAN": span, "STAGES": stages, "EARLY": early, "PDL": False, "ASM": True}
    kernel = compiled(kernels._rows_kernel, types, values, sm, warps)
    assert 0 < kernel.metadata.shared <= shared * 1024


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_go_straight_to_the_tensor_cores(bits):
    """Only the sums over warps are exchanged through shared memory."""
    kernel, types = kernels._quantized_kernel, {"rows": "i32", "eps": "fp32", "step_ptr": "*fp32", "digits_ptr": "*i8"}
    types |= {"w_ptr": "*u8" if bits == 4 else "*i8", "scale_ptr": "*bf16", "out_ptr": "*bf16"}
    values = dict.fromkeys(("squares_ptr", "zero_ptr", "bias_ptr", "residual_ptr", "experts_ptr"))
    values |= {"N": 4096, "K": 2048, "GROUP": 128 if bits == 4 else 2048, "BITS": bits, "SILU": False, "COLUMNS": 8}
    values |= {"TILES": 1, "WARPS": 4, "AHEAD": 4, "NEAR": 4, "PDL": True, "ASM": True}
    kernel = compiled(kernel, types, values, 90, 4)
    ptx = kernel.asm["ptx"]
    assert not unhinted(kernel)
    assert ptx.count("mma.sync") == 16 * 4 / 4  # 16 chunks, four products each, shared by four warps
    assert ptx.count("ld.global") >= 16 and ptx.count("bar.sync") < 8


@needs_compiler
@pytest.mark.parametrize("sm, case", [*((90, case) for case in ATTENTIONS), (80, ATTENTIONS[1]), (80, ATTENTIONS[2])])
def test_attention_compiles_and_leaves_its_neighbours_their_cache(sm, case):
    """More than 48 KB of shared memory would move the boundary to the L1 cache for the kernels around it. Queries, keys
    and values are operands where they were loaded: a lane asks others for maxima, sums and their like alone.
    """
    b, t, heads, kv_heads, dim, slots, _, window, norm = case
    width, rows = max(64, kernels.triton.next_power_of_2(dim)), t * heads // kv_heads
    splits = kernels._splits(b * kv_heads, slots)
    block, warps = kernels._attention_tile(rows, splits, width)
    pointers = {"qkv": "bf16", "cos": "fp32", "sin": "fp32", "pos": "i64", "k": "bf16", "v": "bf16", "out": "bf16"}
    pointers |= {"part": "fp32"} if splits > 1 else {}
    pointers |= {"q_norm": "bf16", "k_norm": "bf16"} if norm else {}
    types = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()} | {"eps": "fp32", "scale": "fp32"}
    types["slots"] = "i32"
    values = dict.fromkeys({"part_ptr", "q_norm_ptr", "k_norm_ptr"} - types.keys())
    values |= {"T": t, "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "WIDTH": width, "WINDOW": window}
    values |= {"SPLITS": splits, "ROWS": -(-rows // block) * block, "BLOCK": block, "WARPS": warps}
    values |= {"AHEAD": kernels.ATTENTION_AHEAD, "PDL": sm >= 90, "ASM": True}
    kernel = compiled(kernels._attention_kernel, types, values, sm, warps)
    assert kernel.metadata.shared <= 48 * 1024
    assert kernel.asm["ptx"].count("shfl.sync") <= 24 and not unhinted(kernel)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("k, n, silu_mul", [(4096, 4096, False), (4096, 22016, True), (11008, 4096, False)])
def test_rows_are_multiplied_where_they_were_loaded(rows, k, n, silu_mul):
    """Neither operand passes through shared memory or another lane."""
    types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16", "rows": "i32", "eps": "fp32"}
    block, warps, each, ahead, near = kernels._row_tile(k, n, rows, silu_mul)
    values = dict.fromkeys(("bias_ptr", "norm_ptr", "residual_ptr", "experts_ptr"))
    values |= {"N": n, "K": k, "SILU": silu_mul, "M": rows, "BLOCK": block, "WARPS": warps, "EACH": each}
    values |= {"AHEAD": ahead, "NEAR": near, "PDL": True, "ASM": True}
    kernel = compiled(kernels._row_kernel, types, values, 90, warps)
    assert not unhinted(kernel)
    ptx = kernel.asm["ptx"]
    steps = -(-k // (warps * each))
    loads = block * (1 + silu_mul) * each // 256  # of weights, 512 bytes a warp
    assert ptx.count("ld.global") == steps * (loads + rows * each // 256)
    assert ptx.count("mma.sync") == steps * loads and ptx.count("bar.sync") <= 4
    assert "ld.shared.v4" not in ptx and "ldmatrix" not in ptx
