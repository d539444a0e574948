"""formats.py against files that the real libraries wrote, and decoders written from the descriptions alone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from formats import LAYOUTS, QuantConfig, Quantized, Scheme, merge, pack, suffixes, unpack

FIXTURES = Path(__file__).parent / "fixtures"
SINGLE = sorted(p.stem for p in FIXTURES.glob("*.safetensors"))


def read_fixture(case):
    with safe_open(FIXTURES / f"{case}.safetensors", "pt") as file:
        tensors = {name.removeprefix("linear."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    return tensors, tensors.pop("expected"), json.loads(metadata["config"]), json.loads(metadata["versions"])


def random_part(bits, group_size, n=24, k=96, zero=False):
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    groups = 1 if group_size == -1 else k // group_size
    q = torch.randint(low, high, (n, k), dtype=torch.int8)
    zeros = torch.randint(low, high, (n, groups), dtype=torch.int8) if zero else None
    return Quantized(q, torch.rand(n, groups) + 0.1, zeros, None, bits)


def test_fixtures_cover_every_library():
    libraries = {"auto-gptq", "autoawq", "compressed-tensors", "gptqmodel"}
    assert {next(lib for lib in libraries if case.startswith(lib)) for case in SINGLE} == libraries
    assert all(p.stat().st_size < 200_000 for p in FIXTURES.rglob("*") if p.is_file())


@pytest.mark.parametrize("case", SINGLE)
def test_reads_what_the_libraries_write(case):
    tensors, expected, config, versions = read_fixture(case)
    assert versions
    scheme = QuantConfig.from_hf(config).scheme("model.layers.0.self_attn.q_proj")
    assert set(tensors) - {"bias"} <= set(suffixes(scheme))
    n, k = expected.shape
    part = unpack("linear", tensors, scheme, (n, k))
    assert part.q.dtype == torch.int8 and part.bits == scheme.bits
    assert (part.permutation is not None) == ("act-order" in case)
    # The libraries dequantize in their scale's precision; half a unit in its last place is all that may differ.
    tolerance = 1e-3 if part.scale.dtype == torch.float16 else 1e-6
    assert (part.dequantize() - expected).abs().max() <= tolerance * expected.abs().max()
    if part.permutation is not None:
        x = torch.randn(3, k)
        w = Quantized(part.q, part.scale, part.zero, None, part.bits).dequantize()
        torch.testing.assert_close(x[:, part.permutation] @ w.T, x @ part.dequantize().T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", SINGLE)
@pytest.mark.parametrize(
    "rows,columns", [((0, 32), (0, 128)), ((5, 17), (0, 128)), ((0, 64), (64, 128)), ((3, 4), (16, 80))]
)
def test_slices_of_a_file_are_slices_of_the_weight(case, rows, columns):
    tensors, expected, config, _ = read_fixture(case)
    scheme, shape = QuantConfig.from_hf(config).scheme("x"), tuple(expected.shape)
    with safe_open(FIXTURES / f"{case}.safetensors", "pt") as file:
        lazy = {name: file.get_slice(f"linear.{name}") for name in tensors if name in suffixes(scheme)}
        part = unpack("linear", lazy, scheme, shape, rows=rows, columns=columns)
    whole = unpack("linear", tensors, scheme, shape).dequantize()
    assert torch.equal(part.dequantize(), whole[slice(*rows), slice(*columns)])


# A decoder that shares no code with formats.py: one value at a time, from the tables of the format description.


def nibble(word, i, bits):
    return (int(word) & 0xFFFFFFFF) >> (bits * i) & (2**bits - 1)


def decode_gptq_v1(tensors, bits):
    qweight, qzeros, scales, g_idx = (tensors[s].numpy() for s in ("qweight", "qzeros", "scales", "g_idx"))
    per, k, n = 32 // bits, len(g_idx), scales.shape[1]
    out = np.zeros((n, k), dtype=np.float32)
    for i in range(n):
        for j in range(k):
            g = g_idx[j]
            zero = nibble(qzeros[g, i // per], i % per, bits) + 1
            out[i, j] = (nibble(qweight[j // per, i], j % per, bits) - zero) * np.float32(scales[g, i])
    return torch.from_numpy(out)


def decode_pack_quantized(tensors, bits):
    packed, scale = tensors["weight_packed"].numpy(), tensors["weight_scale"].numpy()
    (n, k), per = tensors["weight_shape"].tolist(), 32 // bits
    out = np.zeros((n, k), dtype=np.float32)
    for i in range(n):
        for j in range(k):
            q = nibble(packed[i, j // per], j % per, bits) - 2 ** (bits - 1)
            out[i, j] = q * np.float32(scale[i, j // (k // scale.shape[1])])
    return torch.from_numpy(out)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("form,decode", [("gptq", decode_gptq_v1), ("pack-quantized", decode_pack_quantized)])
def test_packs_what_the_description_says_and_unpacks_it(form, decode, group_size, bits):
    part, scheme = random_part(bits, group_size), Scheme(form, bits, group_size, True)
    tensors = pack(part, scheme)
    assert set(tensors) <= set(LAYOUTS[form]) and all(t.is_contiguous() for t in tensors.values())
    assert torch.equal(decode(tensors, bits), part.dequantize())
    again = unpack("x", tensors, scheme, (24, 96))
    assert torch.equal(again.q, part.q) and torch.equal(again.scale, part.scale) and again.zero is None


def test_gptq_v1_constants_of_a_symmetric_file():
    tensors = pack(random_part(4, 32), Scheme("gptq", 4, 32, True))
    assert (tensors["qzeros"] == 0x77777777).all()
    assert tensors["g_idx"].tolist() == [k // 32 for k in range(96)]
    fixture, _, _, _ = read_fixture("auto-gptq-v1-sym")
    assert {k: v.dtype for k, v in tensors.items() if k != "scales"} == {
        k: v.dtype for k, v in fixture.items() if k not in ("scales", "bias")
    }


def test_gptq_v1_zero_of_zero_is_stored_as_fifteen():
    tensors = pack(random_part(4, 32), Scheme("gptq", 4, 32, True)) | {
        "qzeros": torch.full((3, 3), -1, dtype=torch.int32)
    }
    assert (unpack("x", tensors, Scheme("gptq", 4, 32, False), (24, 96)).zero == -8).all()
    assert (unpack("x", tensors, Scheme("gptq_v2", 4, 32, False), (24, 96)).zero == 7).all()
    with pytest.raises(ValueError, match="x: the config says symmetric"):
        unpack("x", tensors, Scheme("gptq", 4, 32, True), (24, 96))


def test_group_size_that_does_not_divide_reads_right():
    scheme, k, groups = Scheme("gptq", 4, 64, True), 96, 2  # the last group has 32 columns
    tensors = pack(random_part(4, 32, k=k), Scheme("gptq", 4, 32, True))
    tensors["scales"] = tensors["scales"][:groups].clone()
    tensors["qzeros"] = tensors["qzeros"][:groups].clone()
    tensors["g_idx"] = (torch.arange(k) // 64).to(torch.int32)
    part = unpack("x", tensors, scheme, (24, k))
    assert part.group_size == 32
    assert torch.equal(part.dequantize(), decode_gptq_v1(tensors, 4))


def test_irregular_g_idx_reads_right():
    tensors = pack(random_part(4, 32), Scheme("gptq", 4, 32, True))
    tensors["g_idx"] = torch.tensor([0] * 10 + [1] * 60 + [2] * 26, dtype=torch.int32)
    part = unpack("x", tensors, Scheme("gptq", 4, 32, True), (24, 96))
    assert part.group_size == 1 and torch.equal(part.dequantize(), decode_gptq_v1(tensors, 4))
    tensors["g_idx"][5] = 3
    with pytest.raises(ValueError, match=r"x.g_idx names groups outside 0..2"):
        unpack("x", tensors, Scheme("gptq", 4, 32, True), (24, 96))


def test_int_quantized():
    part = random_part(8, -1)
    plain = {"weight": part.q, "weight_scale": part.scale}
    for scale in (part.scale, part.scale[:, 0]):
        got = unpack("x", plain | {"weight_scale": scale}, Scheme("int-quantized", 8, -1, True), (24, 96), (3, 9))
        assert torch.equal(got.dequantize(), part.dequantize()[3:9])
    got = unpack("x", plain | {"weight_scale": torch.tensor([0.5])}, Scheme("int-quantized", 8, -1, True), (24, 96))
    assert torch.equal(got.dequantize(), part.q * 0.5)
    zero = torch.randint(-9, 9, (24, 1), dtype=torch.int8)
    got = unpack("x", plain | {"weight_zero_point": zero}, Scheme("int-quantized", 8, -1, False), (24, 96))
    assert torch.equal(got.dequantize(), (part.q.float() - zero) * part.scale)


def test_missing_and_misshaped_tensors_are_named():
    scheme = Scheme("pack-quantized", 4, 32, True)
    tensors = pack(random_part(4, 32), scheme)
    with pytest.raises(ValueError, match="m.q_proj is stored as pack-quantized but has no weight_scale"):
        unpack("m.q_proj", {k: v for k, v in tensors.items() if k != "weight_scale"}, scheme, (24, 96))
    with pytest.raises(ValueError, match=r"m.weight_packed has shape \[24, 12\], expected \[24, 16\]"):
        unpack("m", {k: v for k, v in tensors.items() if k != "weight_shape"}, scheme, (24, 128))
    with pytest.raises(ValueError, match=r"m.weight_shape is \[24, 96\], expected \[24, 128\]"):
        unpack("m", tensors, scheme, (24, 128))
    with pytest.raises(ValueError, match="has no g_idx"):
        unpack("m", {k: v for k, v in pack(random_part(4, 32), Scheme("gptq", 4, 32, True)).items() if k != "g_idx"},
               Scheme("gptq", 4, 32, True, act_order=True), (24, 96))  # fmt: skip


def test_merge():
    a, b, c = random_part(4, 32), random_part(4, 32, n=8), random_part(4, 48)
    whole = merge([a, b])
    assert torch.equal(whole.dequantize(), torch.cat((a.dequantize(), b.dequantize())))
    assert torch.equal(merge([a, a], stack=True).dequantize(), torch.stack((a.dequantize(), a.dequantize())))
    assert merge([a, c]) is None and merge([a, random_part(4, 32, zero=True)]) is None
    order = torch.randperm(96)
    d, e = (Quantized(p.q, p.scale, None, order) for p in (a, b))
    assert torch.equal(merge([d, e]).dequantize(), torch.cat((d.dequantize(), e.dequantize())))
    assert merge([a, d]) is None and merge([d, Quantized(b.q, b.scale, None, order.flip(0))]) is None


def compressed(form="pack-quantized", top=None, **changes):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "weights": weights | changes.pop("weights", {})} | changes.pop("group", {})
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return config | (top or {})


def test_no_quantization():
    assert QuantConfig.from_hf(None, None) is None and QuantConfig.from_hf({}) is None


def test_compressed_tensors_config():
    config = QuantConfig.from_hf(compressed(top={"ignore": ["lm_head", r"re:.*\.mlp\.gate$"]}))
    assert config.scheme("model.layers.3.self_attn.o_proj") == Scheme("pack-quantized", 4, 128, True)
    assert config.scheme("lm_head") is None and config.scheme("model.layers.0.mlp.gate") is None
    assert config.scheme("model.layers.0.mlp.gate_proj") is not None
    groups = compressed()["config_groups"] | {
        "group_1": {
            "targets": ["re:.*down_proj"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "format": "int-quantized",
        }
    }
    mixed = QuantConfig.from_hf(compressed(top={"config_groups": groups}))
    assert mixed.scheme("model.layers.0.mlp.down_proj") == Scheme("int-quantized", 8, -1, True)
    assert mixed.scheme("model.layers.0.mlp.up_proj").bits == 4


def test_gptq_config():
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
    read = QuantConfig.from_hf(config)
    assert read.scheme("model.layers.0.mlp.up_proj") == Scheme("gptq", 4, 128, True, act_order=True)
    assert read.scheme("lm_head") is None and QuantConfig.from_hf(config | {"lm_head": True}).scheme("lm_head")
    assert read.scheme("model.layers.0.block_sparse_moe.gate") is None
    assert QuantConfig.from_hf(config | {"checkpoint_format": "gptq_v2"}).scheme("x").format == "gptq_v2"
    dynamic = {r"+:.*\.layers\.0\..*": {"bits": 8, "group_size": 64}, r"-:.*down_proj.*": {}}
    overridden = QuantConfig.from_hf(config | {"dynamic": dynamic})
    assert overridden.scheme("model.layers.0.mlp.up_proj") == Scheme("gptq", 8, 64, True, act_order=True)
    assert overridden.scheme("model.layers.1.mlp.down_proj") is None
    blocks = QuantConfig.from_hf(config | {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"]]})
    assert blocks.scheme("model.layers.0.self_attn.k_proj") and blocks.scheme("model.layers.0.mlp.up_proj") is None
    legacy = QuantConfig.from_hf(None, {"bits": 4, "group_size": 32, "desc_act": False})
    assert legacy.scheme("x") == Scheme("gptq", 4, 32, False)
    synonyms = QuantConfig.from_hf({"quant_method": "gptq", "w_bit": 4, "q_group_size": 64, "sym": True})
    assert synonyms.scheme("x") == Scheme("gptq", 4, 64, True)


def test_awq_config():
    read = QuantConfig.from_hf({"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"})
    assert read.scheme("model.layers.0.mlp.up_proj") == Scheme("awq", 4, 128, False)
    assert read.scheme("lm_head") is None
    some = QuantConfig.from_hf(
        {"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": ["vision"]}
    )
    assert some.scheme("model.vision.up_proj") is None


REFUSED = {
    "fp8": {"quant_method": "fp8"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "marlin": {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
    "nvfp4-pack-quantized": compressed("nvfp4-pack-quantized", weights={"type": "float"}),
    "float-quantized": compressed("float-quantized", weights={"num_bits": 8, "type": "float"}),
    "marlin-24": compressed("marlin-24"),
    "gptq_p": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_p"},
    "int16": {"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"},
    "3-bit": {"quant_method": "gptq", "bits": 3, "group_size": 128},
    "gemv": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "block": compressed(weights={"strategy": "block"}),
    "static": compressed(group={"input_activations": {"num_bits": 8, "dynamic": False}}),
    "transform_config": compressed(top={"transform_config": {"config_groups": {}}}),
    "sparsity_config": compressed(top={"sparsity_config": {"format": "sparse-24-bitmask"}}),
    "None": {"load_in_8bit": True},
    "'fp8'; it must be an object": "fp8",
    "['x']; it must be an object": ["x"],
    "method ['gptq']": {"quant_method": ["gptq"]},
    "config_groups = None": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "config_groups = [1]": compressed(top={"config_groups": [1]}),
    "'group_0': 'W4A16'": compressed(top={"config_groups": {"group_0": "W4A16"}}),
    "'ignore': [7]": compressed(top={"ignore": [7]}),
    "'ignore': ['re:*']": compressed(top={"ignore": ["re:*"]}),
    "bits = '4'": {"quant_method": "gptq", "bits": "4", "group_size": 128},
    "group_size = '128'": {"quant_method": "gptq", "bits": 4, "group_size": "128"},
    "group_size = 128.0": {"quant_method": "gptq", "bits": 4, "group_size": 128.0},
    "symmetric = {}": compressed(weights={"symmetric": {}}),
    "symmetric = 1": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": 1},
    "act_order = [1]": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": [1]},
    "auto_round:marlin": {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 128,
        "packing_format": "auto_round:marlin",
    },
    "(fp)": {"quant_method": "auto-round", "bits": 4, "group_size": 128, "data_type": "fp"},
    "'extra_config': [1]": {"quant_method": "auto-round", "bits": 4, "group_size": 128, "extra_config": [1]},
    "'+:x': [1]": {"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": [1]}},
    "'version': 4": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": 4},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    with pytest.raises(ValueError, match=re.escape(name)):
        QuantConfig.from_hf(REFUSED[name])


@pytest.mark.parametrize("scheme", [Scheme("pack-quantized", 4, 128, True), Scheme("pack-quantized", 8, -1, True),
                                    Scheme("gptq", 4, 32, True), Scheme("gptq", 8, -1, True)])  # fmt: skip
def test_written_config_reads_back(scheme):
    ignored = ("lm_head", "model.layers.0.mlp.down_proj", r"re:.*\.q_proj$")
    written = json.loads(json.dumps(QuantConfig(((ignored, None), (("Linear",), scheme))).to_hf()))
    read = QuantConfig.from_hf(written)
    for name in ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.7.self_attn.q_proj"):
        assert read.scheme(name) is None
    assert read.scheme("model.layers.1.mlp.down_proj") == scheme
    assert scheme.format == "gptq" or (
        written["format"] == written["config_groups"]["group_0"]["format"] == scheme.format
    )


def test_groups_that_overlap_in_the_librarys_order():
    """Exact names before expressions, expressions in alphabetical order, the class last."""

    def group(bits, *targets):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
        return {"targets": list(targets), "weights": weights}

    groups = [group(4, "Linear"), group(8, "re:.*mlp.*"), group(4, "model.layers.1.mlp.down_proj", "re:.*layers.0.*")]
    for order in (groups, groups[::-1]):
        top = {"config_groups": {f"group_{i}": g for i, g in enumerate(order)}}
        names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("up", "down")] + ["lm_head"]
        found = QuantConfig.from_hf(compressed(top=top)).schemes(names)
        assert [found[name].bits for name in names] == [4, 4, 8, 4, 4]  # "re:.*l" sorts before "re:.*m"


def test_a_kv_cache_scheme_is_a_note():
    top = {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}}
    read = QuantConfig.from_hf(compressed(top=top))
    assert read.rules == QuantConfig.from_hf(compressed()).rules
    assert len(read.notes) == 1 and "KV cache" in read.notes[0]


def test_what_a_file_holds_decides():
    read = QuantConfig.from_hf({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True})
    scheme = Scheme("gptq", 4, 32, True)
    tensors = {f"{m}.{s}" for m in ("q", "b.gate", "lm_head") for s in ("qweight", "qzeros", "scales", "g_idx")}
    tensors |= {"k.weight", "a.gate.weight", "o.scales", "both.qweight", "both.scales", "both.weight"}
    names = ["q", "k", "a.gate", "b.gate", "lm_head", "o", "both", "absent"]
    assert read.schemes(names) == {n: None if n in ("a.gate", "b.gate", "lm_head") else scheme for n in names}
    plain = ("k", "a.gate")  # of the others something is missing or left over, which the loader names
    assert read.schemes(names, tensors) == {n: None if n in plain else scheme for n in names}
    ints = QuantConfig.from_hf(
        compressed("int-quantized", weights={"num_bits": 8, "strategy": "channel", "group_size": None})
    )
    assert ints.schemes(["a", "b"], {"a.weight", "a.weight_scale", "b.weight"}) == {"a": ints.scheme("a"), "b": None}


def test_auto_round_config():
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int",
              "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers",
              "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 16, "data_type": "fp"},
                               r".*\.down_proj": {"bits": 8, "group_size": 32}}}  # fmt: skip
    read, form = QuantConfig.from_hf(config), "gptq"
    assert read.scheme("model.layers.1.mlp.up_proj") == Scheme(form, 4, 128, True)
    assert read.scheme("model.layers.0.mlp.up_proj") is None and read.scheme("lm_head") is None
    assert read.scheme("model.layers.0.mlp.down_proj") == Scheme(form, 8, 32, True)
    assert read.scheme("visual.layers.0.mlp.up_proj") is None and read.scheme("model.layers.1.mlp.gate") is None
    awq = config | {"packing_format": "auto_round:auto_awq", "block_name_to_quantize": [["model.layers"]], "sym": False}
    assert QuantConfig.from_hf(awq | {"extra_config": None}).scheme("model.layers.9.x") == Scheme("awq", 4, 128, False)


WRONG_DTYPES = [
    ("gptq", "qweight", torch.int64), ("gptq", "qzeros", torch.uint8), ("gptq", "scales", torch.int32),
    ("gptq", "g_idx", torch.float32), ("pack-quantized", "weight_packed", torch.int64),
    ("pack-quantized", "weight_packed", torch.float32), ("pack-quantized", "weight_scale", torch.int8),
    ("pack-quantized", "weight_scale", torch.float64), ("pack-quantized", "weight_shape", torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("form, suffix, dtype", WRONG_DTYPES)
def test_tensors_of_another_dtype_are_named(form, suffix, dtype, tmp_path):
    """They were read as raw bits, and the text was noise."""
    scheme = Scheme(form, 4, 32, True)
    tensors = pack(random_part(4, 32), scheme)
    tensors[suffix] = tensors[suffix].to(dtype)
    save_file({f"m.{k}": v for k, v in tensors.items()}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        for given in (tensors, {k: file.get_slice(f"m.{k}") for k in tensors}):
            with pytest.raises(ValueError, match=f"^m.{suffix} has dtype .*; it must be [IF]"):
                unpack("m", given, scheme, (24, 96))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8])
def test_int_quantized_weights_of_another_dtype_are_named(dtype):
    tensors = {"weight": torch.ones(4, 8).to(dtype), "weight_scale": torch.ones(4, 1)}
    with pytest.raises(ValueError, match="^m.weight has dtype .*; it must be I8"):
        unpack("m", tensors, Scheme("int-quantized", 8, -1, True), (4, 8))
    zero = {"weight": torch.ones(4, 8, dtype=torch.int8), "weight_zero_point": torch.ones(4, 1)}
    with pytest.raises(ValueError, match="^m.weight_zero_point has dtype F32"):
        unpack("m", tensors | zero, Scheme("int-quantized", 8, -1, False), (4, 8))


def test_another_group_size_than_the_files_is_named():
    for form in ("gptq", "pack-quantized"):
        tensors = pack(random_part(4, 32), Scheme(form, 4, 32, True))
        with pytest.raises(ValueError, match=r"holds 3 groups, but the quantization's group_size 48 makes 2 of 96 col"):
            unpack("m", tensors, Scheme(form, 4, 48, True), (24, 96))


def test_expressions_that_never_end_are_ended():
    config = QuantConfig.from_hf(compressed(top={"ignore": [r"re:.*\.gate$", "re:(x+x+)+y"]}))
    with pytest.raises(ValueError, match="expressions that take too long to match"):
        config.schemes(["x" * 40])


def test_expressions_are_matched_whatever_lies_in_the_current_folder(tmp_path, monkeypatch):
    """A child that looked for its modules there would run a download's."""
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    (tmp_path / "re.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert QuantConfig.from_hf(compressed(top={"ignore": [r"re:.*\.gate$"]})).scheme("a.gate") is None
