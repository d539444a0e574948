"""The twins of the products against plain formulas; the kernels against their twins, and what they compile to."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, HAS_TRITON, compiled, needs_compiler, needs_kernels, relative_error, unhinted

import decode_kernels
from decode_kernels import INTERPRETED, tiles
from linear import Int4Linear, Int8Linear, Linear, RMSNorm

if HAS_TRITON:
    from decode_kernels import dense, quantized

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install -e '.[interpreter]'")


@needs_triton
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(16, 128), (3, 32, 256), (2, 2, 16, 384)])
def test_packing_round_trip(shape, bits):
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    packed = quantized.pack(q, bits)
    assert packed.dtype == {8: torch.int8, 4: torch.uint8}[bits] and packed.numel() * 8 == q.numel() * bits
    assert torch.equal(quantized.unpack(packed, bits), q)


@needs_triton
@pytest.mark.parametrize("bits", [8, 4])
def test_packing_pads_with_zeros(bits):
    q = torch.randint(-8, 8, (40, 96), dtype=torch.int8)
    wide = quantized.unpack(quantized.pack(q, bits), bits)
    assert wide.shape == (48, 128)
    assert torch.equal(wide[:40, :96], q)
    assert not wide[40:].any() and not wide[:, 96:].any()


def make_linear(fmt, m, n, k, dtype, experts=0, seed=0):
    """(x, a Linear, the [.., N, K] float64 matrix that it stands for); formats: dense, int8 and int4, g<size> = groups,
    z = zero points.
    """
    gen = torch.Generator().manual_seed(seed)
    lead = (experts,) if experts else ()
    x = torch.randn(m, k, generator=gen).to(dtype)
    if fmt == "dense":
        linear = Linear(k, n, num_experts=experts, dtype=dtype)
        linear.weight.copy_(torch.randn(*lead, n, k, generator=gen) / k**0.5)
        return x, linear, linear.weight.double()
    bits, group = int(fmt[3]), int(fmt[4:].strip("gz") or k)
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (*lead, n, k), generator=gen, dtype=torch.int8)
    scale = ((torch.rand(*lead, n, k // group, generator=gen) + 0.5) / (0.6 * half) / k**0.5).to(dtype)
    zero = torch.randint(-half, half, scale.shape, generator=gen).to(dtype) if "z" in fmt else None
    linear = (Int8Linear if bits == 8 else Int4Linear)(k, n, num_experts=experts)
    linear.set_(q, scale, zero)
    centered = q.double().unflatten(-1, (scale.shape[-1], -1)) - (0 if zero is None else zero.double()[..., None])
    return x, linear, (centered * scale.double()[..., None]).flatten(-2)


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


def check_linear(fmt, m, n, k, dtype, bound, norm=False, bias=False, silu_mul=False, residual=False, experts=0):
    """By the kernels, which must serve, and in plain PyTorch."""
    x, linear, w = make_linear(fmt, m, n, k, dtype, experts)
    gain = RMSNorm(k, 1e-5, dtype=dtype) if norm else None
    if gain is not None:
        gain.weight.uniform_(0.5, 1.5)
    linear.bias = torch.nn.Parameter(torch.randn(n).to(dtype), requires_grad=False) if bias else None
    r = torch.randn(m, n // 2 if silu_mul else n).to(dtype) if residual else None
    chosen = torch.randint(0, experts, (m,)) if experts else None
    weights = None if gain is None else gain.weight.clone()
    wanted = expected_linear(x, w, linear.bias, weights, 1e-5, r, silu_mul, chosen)
    x, r, chosen = (t if t is None else t.to(DEVICE) for t in (x, r, chosen))
    linear, gain = linear.to(DEVICE), gain and gain.to(DEVICE)
    plain = linear(x, norm=gain, residual=r, silu_mul=silu_mul, experts=chosen)
    decode_kernels.use_(linear)
    y = linear.fast(linear, x, gain, r, silu_mul, chosen)
    assert relative_error(plain.cpu(), wanted) < 2 * bound
    assert (y is None) == (silu_mul and fmt != "dense" and n % 32 > 0)  # gates and ups would share a tile
    if y is not None:
        assert y.dtype == dtype and relative_error(y.cpu(), wanted) < bound


FORMATS = ["dense", "int8", "int4g32", "int4g64", "int4g128", "int4", "int4g64z", "int4z"]
GROUPS_OF_8 = ["int8g32", "int8g64z", "int8g128", "int8z"]
EXTRAS = [{}, {"norm": True, "silu_mul": True}, {"bias": True, "residual": True}, {"experts": 3, "norm": True}]


SHAPES = [(1, 64, 256), (3, 96, 1152), (9, 32, 640), (16, 64, 2176), (8, 40, 384), (2, 32, 4352)]
CASES = [(fmt, i) for i in range(len(SHAPES)) for fmt in FORMATS + GROUPS_OF_8]
if INTERPRETED:  # slow: half of them, a checkerboard, and half as many columns for sixteen rows
    SHAPES[3] = (16, 64, 1152)
    CASES = [(fmt, i) for fmt, i in CASES if fmt in FORMATS and (FORMATS.index(fmt) + i) % 2]
    CASES += [("int8g32", 0), ("int8g32", 2), ("int8g64z", 1), ("int8g128", 2), ("int8z", 4)]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt, shape", CASES)
def test_linear_equals_twin(dtype, fmt, shape):
    (m, n, k), extra = SHAPES[shape], EXTRAS[(shape // 2 + (FORMATS + GROUPS_OF_8).index(fmt)) % len(EXTRAS)]
    bound = 8e-3 if dtype == torch.bfloat16 else 2e-3
    check_linear(fmt, m, n, k, dtype, bound, **extra)


@needs_kernels
@pytest.mark.parametrize(
    "fmt, k", [("int8g32", 288), ("int4g32z", 224), ("int8g64z", 192), ("int8", 96), ("int4g32", 32)]
)
def test_a_last_chunk_with_fewer_groups_equals_twin(fmt, k):
    check_linear(fmt, 2, 48, k, DTYPES[0], 8e-3)


@needs_kernels
@pytest.mark.parametrize("extra", EXTRAS[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_parts_of_tiles_equals_twin(rows, extra):
    check_linear("dense", rows, 66, 4360, DTYPES[0], 8e-3, **extra)


@needs_kernels
@pytest.mark.parametrize("extra", EXTRAS[1:3], ids=str)
@pytest.mark.parametrize("fmt, rows", [("dense", 17), ("dense", 32), ("int8", 17), ("g128", 32)])
def test_more_rows_than_an_instruction_takes_equal_twin(fmt, rows, extra):
    check_linear(fmt, rows, 32, 384, DTYPES[0], 8e-3, **extra)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["dense", "int8", "int4g128"])
def test_a_large_activation_is_normed_and_equals_twin(fmt, rows, dtype):
    """One channel of a residual stream often holds thousands; times the norm's weight that is too much for float16."""
    x, linear, w = make_linear(fmt, rows, 64, 256, dtype)
    x[:, 200] = 30_000
    gain = RMSNorm(256, 1e-5, dtype=dtype)
    gain.weight.copy_(torch.linspace(1, 8, 256))
    wanted = expected_linear(x, w, None, gain.weight.clone(), 1e-5, None, False, None)
    decode_kernels.use_(linear.to(DEVICE))
    y = linear.fast(linear, x.to(DEVICE), gain.to(DEVICE), None, False, None)
    assert relative_error(y.cpu(), wanted) < 8e-3


@needs_kernels
@pytest.mark.parametrize("fmt", [*FORMATS[1:], "int4g96", "int4g40z", "int8g32", "int8g40z"])
def test_dequantize_equals_its_twin_and_the_formula(fmt):
    sizes = {"int4g96": [(32, 192), (40, 1152)], "int8": [(32, 40), (24, 1152)]}
    sizes |= dict.fromkeys(("int4g40z", "int8g40z"), [(32, 40), (24, 520)])
    for n, k in sizes.get(fmt, [(64, 256), (40, 384), (24, 1152)]):
        _, linear, w = make_linear(fmt, 1, n, k, torch.float16)
        plain = linear.dequantize(torch.float32)
        decode_kernels.use_(linear.to(DEVICE))
        assert torch.equal(linear.dequantize(torch.float32).cpu(), plain)
        assert relative_error(plain, w) < 1e-6
        integers = quantized.dequantize(linear.weight_packed, None, None, n, k, torch.float16, linear.bits)
        assert torch.equal(integers, linear.values(linear.weight_packed).half())


@needs_compiler
@pytest.mark.parametrize("rows", [8, 16, 32])
@pytest.mark.parametrize(
    "k, n, silu_mul", [(4096, 4096, False), (14336, 4096, False), (4096, 6144, False), (4096, 28672, True)]
)
@pytest.mark.parametrize("sm, shared", [(86, 99), (90, 227)])
def test_tiles_fit_shared_memory(rows, k, n, silu_mul, sm, shared):
    types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16", "rows": "i32"}
    tile = tiles.choose("16-bit, many rows", k, n, rows, silu_mul, shared * 1024)
    values = {"bias_ptr": None, "residual_ptr": None, "N": n, "K": k, "SILU": silu_mul, "M": rows}
    values |= {"BLOCK_N": tile.rows, "BLOCK_K": tile.columns, "STAGES": tile.stages, "EARLY": tile.w_ahead}
    kernel = compiled(dense._gemm_kernel, types, values | {"PDL": False, "ASM": True}, sm, tile.warps)
    assert 0 < kernel.metadata.shared <= shared * 1024


@needs_compiler
@pytest.mark.parametrize("bits, group", [(4, 128), (8, 2048), (8, 32)])
def test_weights_go_straight_to_the_tensor_cores(bits, group):
    """Only the sums over warps are exchanged through shared memory."""
    types = {"rows": "i32", "eps": "fp32", "unit_ptr": "*fp32", "digits_ptr": "*i8"}
    types |= {"w_ptr": "*u8" if bits == 4 else "*i8", "scale_ptr": "*bf16", "out_ptr": "*bf16"}
    values = dict.fromkeys(("squares_ptr", "zero_ptr", "bias_ptr", "residual_ptr", "experts_ptr"))
    values |= {"N": 4096, "K": 2048, "GROUP": group, "BITS": bits, "SILU": False, "COLUMNS": 8}
    values |= {"TILES": 1, "WARPS": 4, "W_AHEAD": 4, "X_AHEAD": 4, "PDL": True, "ASM": True}
    kernel = compiled(quantized._quantized_kernel, types, values, 90, 4)
    ptx = kernel.asm["ptx"]
    assert not unhinted(kernel)
    assert ptx.count("mma.sync") == 16 * 4 / 4  # 16 chunks, four products each, shared by four warps
    assert ptx.count("ld.global") >= 16 and ptx.count("bar.sync") < 8


@needs_compiler
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("k, n, silu_mul", [(4096, 4096, False), (4096, 22016, True), (11008, 4096, False)])
def test_rows_are_multiplied_where_they_were_loaded(rows, k, n, silu_mul):
    """Neither operand passes through shared memory or another lane."""
    types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16", "rows": "i32", "eps": "fp32"}
    tile = tiles.choose("16-bit, few rows", k, n, rows, silu_mul)
    values = dict.fromkeys(("bias_ptr", "norm_ptr", "residual_ptr", "experts_ptr"))
    values |= {"N": n, "K": k, "SILU": silu_mul, "M": rows, "BLOCK_N": tile.rows}
    values |= {"WARPS": tile.warps, "BLOCK_K": tile.columns, "W_AHEAD": tile.w_ahead, "X_AHEAD": tile.x_ahead}
    kernel = compiled(dense._gemv_kernel, types, values | {"PDL": True, "ASM": True}, 90, tile.warps)
    assert not unhinted(kernel)
    ptx = kernel.asm["ptx"]
    steps = -(-k // (tile.warps * tile.columns))
    loads = tile.rows * (1 + silu_mul) * tile.columns // 256  # of weights, 512 bytes a warp
    assert ptx.count("ld.global") == steps * (loads + rows * tile.columns // 256)
    assert ptx.count("mma.sync") == steps * loads and ptx.count("bar.sync") <= 4
    # what is stored there are the sums of warps: fewer than the operands, which would take one for each load
    assert ptx.count("st.shared") < ptx.count("ld.global") and "ldmatrix" not in ptx


@needs_kernels
@pytest.mark.parametrize("fmt", ["int8", "int4g64z"])
def test_operators_tell_shapes_and_equals_twin(fmt):
    """Schemas hold and fake tensors get the shapes of real ones."""
    x, linear, _ = make_linear(fmt, 2, 64, 256, DTYPES[0])
    decode_kernels.use_(linear.to(DEVICE))
    x, operands, bits = x.to(DEVICE), linear.operands(None), linear.bits
    gain, residual = torch.ones(256, device=DEVICE, dtype=x.dtype), torch.zeros(2, 32, device=DEVICE, dtype=x.dtype)
    for operator, args in (
        ("quantized", (x, *operands, None, gain, 1e-5, residual, True, None, bits)),
        ("dequantize", (*operands, 64, 256, torch.float16, bits)),
    ):
        utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.decode, operator).default, args, test_utils=utils)
