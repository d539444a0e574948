"""PyTorch's own CPU operators against the plain modules on the same weights."""

from dataclasses import replace

import pytest
import torch

import decode_kernels
from checkpoint import quantized_copy, random_model
from decode_kernels import INTERPRETED, cpu, cpu_blocks, cpu_int4, cpu_loops, cpu_products
from engine import Engine
from linear import Int4Linear, Linear, RMSNorm, from_linear, quantize_rtn
from model import Attention, KVCache, angles
from sampling import SamplingParams
from shapes import shape_config
from tokenizer import Ids

pytestmark = pytest.mark.skipif(INTERPRETED, reason="in the interpreter a CPU runs the Triton kernels")
HALVES = [torch.bfloat16, torch.float16]
# relative to the largest output: both sum in float32 and round the result; the plain ones round the matrix first
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5}
SHAPES = [(64, 48), (96, 17), (576, 960), (577, 33), (128, 1)]  # (K, N)


def make(kind: str, k: int, n: int, dtype: torch.dtype, experts: int = 0, bias: bool = False) -> Linear:
    g = torch.Generator().manual_seed(k + n)
    linear = Linear(k, n, bias, num_experts=experts, dtype=dtype)
    linear.weight.copy_(torch.randn(linear.shape, generator=g) * k**-0.5)
    if linear.bias is not None:
        linear.bias.copy_(torch.randn(n, generator=g))
    if kind == "dense":
        return linear
    out = from_linear(linear, int(kind[3]), 32 if k % 32 == 0 and kind != "int8" else k)
    if kind == "int4 zero":
        q, scale = quantize_rtn(linear.weight, 4, 32 if k % 32 == 0 else k, dtype)
        out.set_(q, scale, torch.randint(-8, 8, scale.shape, generator=g, dtype=torch.int8))
    return out


def agree(linear: Linear, dtype: torch.dtype, rows: int, **options: object) -> None:
    x = torch.randn(rows, linear.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
    state = {name: t.clone() for name, t in linear.state_dict().items()}
    want = linear(x, **options).float()
    decode_kernels.use_(linear)
    got = linear(x, **options).float()
    assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max().clamp(min=1)
    kept = linear.state_dict()
    assert kept.keys() == state.keys() and all(torch.equal(kept[name], t) for name, t in state.items())
    decode_kernels.use_(linear, False)
    assert linear.fast is None and torch.equal(linear(x, **options).float(), want)


@pytest.fixture(params=[True, False])
def able(request, monkeypatch):
    """Whether the processor has instructions for 16 bits."""
    cpu_products.wide.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    yield request.param
    cpu_products.wide.cache_clear()


@pytest.mark.parametrize("kind", ["dense", "int8", "int8 g32", "int4", "int4 zero"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("k, n", SHAPES)
def test_every_format_and_shape_against_the_plain_expression(kind, dtype, k, n):
    linear = make(kind, k, n, dtype, bias=kind == "dense")
    for rows in (1, 2, 3, 8, 16, 17, 40):
        agree(linear, dtype, rows)


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_what_is_fused_around_the_product(kind, rows):
    dtype, linear, norm = torch.bfloat16, make(kind, 128, 96, torch.bfloat16), RMSNorm(128, 1e-5)
    norm.weight.copy_(torch.linspace(0.5, 1.5, 128))
    norm.to(dtype)
    agree(linear, dtype, rows, norm=norm, silu_mul=True, residual=torch.ones(rows, 48, dtype=dtype))


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
def test_experts(kind):
    linear = make(kind, 64, 48, torch.bfloat16, experts=3)
    agree(linear, torch.bfloat16, 4, experts=torch.tensor([2, 0, 2, 1]))
    agree(linear, torch.bfloat16, 2, experts=1)


def test_the_formats_are_served_where_the_processor_has_the_operators():
    """A fast path that silently serves nothing would pass every other test here."""
    for kind, known in (("dense", cpu._knows_gemv()), ("int8", cpu._knows_int8()), ("int4", cpu._knows_int4())):
        linear = make(kind, 64, 48, torch.bfloat16)
        decode_kernels.use_(linear)
        assert (linear.fast is not None) == known
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert cpu._knows_gemv() and cpu._knows_int8() and cpu._knows_int4()


@pytest.mark.parametrize("n", [16, 48, 64, 80, 192, 208])
def test_the_layout_of_int4_is_undone(n):
    """Whole blocks, one that is smaller, and both."""
    q = torch.randint(-8, 8, (n, 96), generator=torch.Generator().manual_seed(n), dtype=torch.int8)
    if cpu._knows_int4():
        assert torch.equal(cpu.INT4.unpack(cpu.INT4.pack(q), n, 96), q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int4", "int4 zero"])
@pytest.mark.parametrize("n", [64, 208])
def test_many_rows_of_int4(kind, dtype, n):
    agree(make(kind, 128, n, dtype), dtype, 65)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "int4 zero"])
@pytest.mark.parametrize("n", [192, 208])
def test_many_rows_of_a_large_matrix_in_pieces(kind, dtype, n, able, monkeypatch):
    """Pieces of 64 rows, the last of which may be shorter; with a gate, which reads columns, and without."""
    monkeypatch.setattr(cpu_products, "PIECE", 64 * 128)
    linear = make(kind, 128, n, dtype)
    for options in ({}, {"silu_mul": True}, {"residual": torch.ones(65, n, dtype=dtype)}):
        agree(linear, dtype, 65, **options)
    if kind == "int4" and n == 192:
        x = torch.randn(65, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
        want, packed = linear(x).float(), cpu_int4.lay(linear.values(linear.weight_packed))
        got = cpu_int4.Int4Product(packed, cpu_int4.ordered(linear.weight_scale, 128, True), None, laid=True)(x).float()
        assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max().clamp(min=1)


def test_onednn_is_as_it_was_after_a_product_and_after_an_error():
    x, w = torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(4, 9, dtype=torch.bfloat16)
    before = torch._C._get_mkldnn_enabled()
    with pytest.raises(RuntimeError):
        cpu.gemv(x, w)
    assert torch._C._get_mkldnn_enabled() == before
    cpu.gemv(x, w[:, :8])
    assert torch._C._get_mkldnn_enabled() == before


def test_new_scales_reach_a_model_that_uses_a_fast_path():
    linear, other = (make("int4", 64, 48, torch.bfloat16) for _ in range(2))
    assert isinstance(linear, Int4Linear) and isinstance(other, Int4Linear)
    other.weight_scale *= 2
    decode_kernels.use_(linear)
    linear.load_state_dict(other.state_dict())
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(linear(x), other(x), atol=2**-6, rtol=2**-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("new, traced", [(1, False), (4, False), (16, False), (40, False), (1, True)])
def test_attention_against_the_plain_one(dtype, window, qk_norm, new, traced):
    """traced: what Inductor is given, without a graph break."""
    torch._dynamo.reset()
    config = shape_config("tiny")
    config = replace(config, windows=(window,) * config.num_hidden_layers, qk_norm=qk_norm)
    attention = random_model(config, dtype=dtype).layers[0].self_attn
    assert isinstance(attention, Attention)
    caches = [KVCache(config, 1, 128, torch.device("cpu"), dtype).layers[0] for _ in range(2)]
    g = torch.Generator().manual_seed(new)
    filled = torch.randn(caches[0].k.shape, generator=g).to(dtype)
    width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    qkv = torch.randn(1, new, width, generator=g).to(dtype)
    positions = torch.arange(20, 20 + new)[None]
    cos, sin = angles(positions, torch.linspace(0.1, 1, config.head_dim // 2))
    for cache in caches:
        cache.k.copy_(filled)
        cache.v.copy_(filled)
    want = attention.attend(qkv, cos, sin, positions, caches[0], 128).float()
    attend = torch.compile(cpu.attend, backend="eager", fullgraph=True, dynamic=False) if traced else cpu.attend
    got = attend(attention, qkv, cos, sin, positions, caches[1], 128)
    assert got is not None and torch.equal(caches[0].k, caches[1].k) and torch.equal(caches[0].v, caches[1].v)
    assert (got.float() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_greedy_ids_in_float32_do_not_depend_on_the_fast_paths(bits):
    torch.manual_seed(0)
    model = random_model(shape_config("tiny"), dtype=torch.float32)
    model = model if bits == 16 else quantized_copy(model, bits)
    found = []
    for kernels in ("auto", "inductor"):
        pieces = Engine(model, Ids(512), kernels=kernels).generate(
            [[1, 2, 3]], SamplingParams(0.0), max_new_tokens=24, ignore_eos=True
        )
        found.append([i for piece in pieces for i in piece.ids])
    assert found[0] == found[1]


@pytest.mark.parametrize("group, zero", [(32, True), (64, False), (128, True), (256, False)])
@pytest.mark.parametrize("half", [16, 32])
def test_the_loops_of_int4_know_both_layouts(group, zero, half):
    g = torch.Generator().manual_seed(group)
    q = torch.randint(-8, 8, (192, 512), generator=g, dtype=torch.int8)
    scale, shift = torch.rand(192, 512 // group, generator=g), torch.randint(-8, 8, (192, 512 // group), generator=g)
    low, high = (q + 8).unflatten(0, (-1, 2, half)).transpose(-1, -2).unbind(1)  # [blocks, K, half]
    x = torch.randn(1, 512, generator=g)
    y = cpu_loops.sums_int4(x, (low | high << 4).view(torch.uint8), scale, shift.float() if zero else None, half)
    shifted = q.double().unflatten(1, (-1, group)) - (shift.double()[..., None] if zero else 0)
    want = x.double() @ (shifted * scale.double()[..., None]).flatten(1).T
    assert (y - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_loops_of_int4_read_eight_digits_from_a_word(group, rows):
    g = torch.Generator().manual_seed(group)
    q = torch.randint(-8, 8, (192, 512), generator=g, dtype=torch.int8)
    q[0], q[31], q[32] = -8, 7, 7
    scale, x = torch.rand(192, 512 // group, generator=g), torch.randn(rows, 512, generator=g)
    packed = cpu_int4.lay(q)
    assert torch.equal(cpu_int4.lifted(packed, 192, 512), q)
    want = x.double() @ (q.double().unflatten(1, (-1, group)) * scale.double()[..., None]).flatten(1).T
    y = cpu_loops.int4_word_sums(x, packed.view(torch.float32), cpu_loops.lanes(scale))
    assert (y - want).abs().max() < 1e-5 * want.abs().max()
    y = cpu_int4.Int4Product(packed, cpu_int4.ordered(scale, 512, True), None, laid=True)(x)
    assert (y - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("n, k", [(7, 32), (192, 576)])
def test_the_loops_of_int8_read_four_integers_from_a_word(n, k):
    g = torch.Generator().manual_seed(k)
    q = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
    q[0], q[1, 0::2], q[1, 1::2] = -128, 127, -128  # also words whose float32 is no number
    q[2], q[3] = -1, 0
    x = torch.randn(1, k, generator=g)
    want = x.double() @ q.double().T
    y = cpu_loops.word_sums(x, q.view(torch.float32))
    assert (y - want).abs().max() < 2e-6 * want.abs().max()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_both_widths_of_vectors_are_served(kind, short, rows, monkeypatch):
    """A compiler gets loops over words, or the operator, where vectors are short, and else loops over bytes."""
    monkeypatch.setattr(cpu_loops, "short", lambda: short)
    linear = make(kind, 576, 192, torch.bfloat16)
    x = torch.randn(rows, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = linear(x).float()
    decode_kernels.use_(linear, compiled=True)
    assert (linear.fast is cpu.WORDS) == (kind == "int4" and short)
    if kind == "int8":
        assert (linear.fast_constants is not None) == short
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="eager", fullgraph=True, dynamic=False)
    for got in (linear(x), compiled(x)):
        assert (got.float() - want).abs().max() <= TOLERANCE[torch.bfloat16] * want.abs().max()


@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "int4 zero"])
def test_many_rows_with_and_without_instructions_for_16_bits(kind, able):
    linear = make(kind, 96, 64, torch.bfloat16)
    for rows in (1, 3, 5, 70):
        agree(linear, torch.bfloat16, rows)
    assert cpu_products.wide(torch.bfloat16) == (torch.bfloat16 if able else torch.float32)


@pytest.mark.parametrize("kind", ["dense", "int8", "int4 zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [48, 192])
def test_a_compiled_layer_takes_the_fast_paths_whole(kind, dtype, n):
    """Traced without a graph break; what Inductor makes of the trace, the compiled engine's tests see."""
    torch._dynamo.reset()  # it counts recompilations per line of source
    linear, norm = make(kind, 64, n, dtype), RMSNorm(64, 1e-5).to(dtype)
    norm.weight.fill_(1.5)
    decode_kernels.use_(linear)
    traced = torch.compile(lambda x: linear(x, norm=norm), backend="eager", fullgraph=True, dynamic=False)
    for rows in (1, 4):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)
        want = linear(x, norm=norm).float()
        assert (traced(x).float() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k, n", [(64, 96), (33, 64), (96, 48), (576, 160)])
def test_blocks_of_rows(dtype, k, n, monkeypatch):
    monkeypatch.setattr(cpu_loops, "short", lambda: True)
    for rows in (1, 2, 4, 5, 70):
        linear = make("dense", k, n, dtype, bias=True)
        agree(linear, dtype, rows)
        decode_kernels.use_(linear)
        assert linear.fast is cpu.BLOCKS and linear.weight.shape == (n // cpu_blocks.size(n), cpu_blocks.size(n), k)
        assert torch.equal(
            from_linear(linear, 8).weight_packed, from_linear(make("dense", k, n, dtype), 8).weight_packed
        )
        linear = make("int8", k, n, dtype, bias=True)
        agree(linear, dtype, rows)
        decode_kernels.use_(linear)
        assert linear.fast is cpu.BYTES
        linear = make("dense", k, n, dtype)
    decode_kernels.use_(linear)
    decode_kernels.use_(linear, compiled=True)
    assert linear.fast is not cpu.BLOCKS and linear.weight.shape == (n, k)


VARIANTS = {
    "llama": {},
    "tied, biased": {"tie_word_embeddings": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "windows, norms of heads": {"windows": (3, 0), "qk_norm": True},
    "norms behind": {"post_norms": True},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_token_through_the_layers_is_what_the_modules_make_of_it(bits, variant, short, monkeypatch):
    monkeypatch.setattr(cpu_loops, "short", lambda: short)
    config = replace(shape_config("tiny"), **VARIANTS[variant])
    torch.manual_seed(0)
    model = random_model(config, dtype=torch.bfloat16)
    model = model if bits == 16 else quantized_copy(model, bits)
    tied = model.embed_tokens.weight is model.lm_head.weight if bits == 16 else None
    state = {name: t.clone() for name, t in model.state_dict().items()}
    logits = []
    for on in (False, True):
        run = decode_kernels.use_(model, on)
        if on and bits == 16 and cpu._knows_bags():
            assert (model.lm_head.fast is cpu.BLOCKS) == short
            assert (model.embed_tokens.weight is model.lm_head.weight) == tied
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        cache = KVCache(config, 1, 64, torch.device("cpu"), torch.bfloat16)
        with torch.inference_mode():
            for i in range(6):
                at = torch.tensor([[i]])
                y = model(at + 7, at, cache, run, end=64)
        logits.append(y.float())
    steps = [run.steps[layer] for layer in model.layers]
    assert all((step is None) == (variant == "norms behind") for step in steps) or not cpu._knows_gemv()
    assert model.lm_head in run.steps or not cpu._knows_gemv()
    assert (logits[1] - logits[0]).abs().max() <= 0.03 * logits[0].abs().max()


@pytest.mark.parametrize("able", [False], indirect=True)
@pytest.mark.parametrize("short, compiled", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("variant", [*VARIANTS, "groups that an order crosses"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_prompt_through_the_layers_is_what_the_modules_make_of_it(bits, variant, short, compiled, able, monkeypatch):
    """A first prefill, whose last token alone is wanted, and one that goes on and wants all, in pieces."""
    monkeypatch.setattr(cpu_loops, "short", lambda: short)
    monkeypatch.setattr(cpu_products, "PIECE", 128 * 256)
    config = replace(shape_config("tiny"), **VARIANTS.get(variant, {"intermediate_size": 544}))
    torch.manual_seed(0)
    model = random_model(config, dtype=torch.bfloat16)
    model = model if bits == 16 else quantized_copy(model, bits)
    logits = []
    for on in (False, True):
        run = decode_kernels.use_(model, on, compiled)
        cache = KVCache(config, 1, 128, torch.device("cpu"), torch.bfloat16)
        with torch.inference_mode():
            ids, at = torch.arange(90)[None] % 60, torch.arange(90)[None]
            y = model(ids[:, :40], at[:, :40], cache, run, end=40, select=torch.tensor([39]))
            logits.append((y, model(ids[:, 40:], at[:, 40:], cache, run, end=90)))
    fused = {prompt.down is not None for prompt in run.prompts.values()}
    in_units_of_64 = compiled or cpu_int4.half_rows() == 32 if bits == 4 else short and not compiled
    unfused = variant in ("gelu", "tied, biased") or (variant not in VARIANTS and in_units_of_64)
    known = cpu._knows_int4() if bits == 4 else cpu._knows_int8() if bits == 8 else cpu._knows_gemv()
    assert fused == (set() if variant == "norms behind" else {not unfused}) or not known
    for plain, fast in zip(*logits):
        assert fast.dtype == plain.dtype and (fast - plain).abs().max() <= 0.03 * plain.abs().max()
