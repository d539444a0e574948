"""Folders as organisations publish them: the same weights under the configurations that people have written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from formats import QuantConfig, Quantized, Scheme, pack
from linear import Int8Linear, Linear
from model import KVCache
from tp import TensorParallel

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False, "lm_head": False}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True, "data_type": "int", "iters": 200}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"], "config_groups": {
    "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True,
                                                   "strategy": "group", "group_size": 16}}}}  # fmt: skip
BLOCK = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.gate_proj"]]


def logits_of(folder: Path) -> torch.Tensor:
    model = checkpoint.load(str(folder))
    cache = KVCache(model.config, 1, 16, torch.device("cpu"), torch.float32)
    return model(torch.arange(3, 11)[None], torch.arange(8)[None], cache, end=8)


def write(folder: Path, name: str, **changes) -> None:
    path = folder / name
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(config | changes))


def quantized(folder: Path, form: str, plain: tuple[str, ...] = ("lm_head",)) -> torch.Tensor:
    """Round the folder's Linears in place, but for those that end so; logits of the rounded weights as plain ones."""
    rounded, kept, scheme = {}, {}, Scheme(form, 4, 16, True)
    for name, weight in load_file(folder / "model.safetensors").items():
        base = name.removesuffix(".weight")
        if weight.ndim != 2 or base.endswith(("embed_tokens", *plain)):
            rounded[name] = kept[name] = weight
            continue
        scale = weight.unflatten(1, (-1, 16)).abs().amax(-1) / 7.5
        q = (weight / scale.repeat_interleave(16, 1)).round().clamp(-8, 7).to(torch.int8)
        part = Quantized(q, scale)
        rounded |= {f"{base}.{suffix}": tensor.contiguous() for suffix, tensor in pack(part, scheme).items()}
        kept[name] = part.dequantize()
    save_file(kept, folder / "model.safetensors")
    want = logits_of(folder)
    save_file(rounded, folder / "model.safetensors")
    return want


@pytest.mark.parametrize(
    "form, plain, config",
    [
        ("gptq", ("lm_head",), GPTQ | {"dynamic": None, "meta": {"v": 1}}),
        ("gptq", (), GPTQ),  # the head all the same
        ("gptq", ("lm_head", "k_proj"), GPTQ | {"modules_to_not_convert": ["k_proj"]}),
        ("gptq", ("lm_head", "up_proj", "layers.0.mlp.down_proj"), GPTQ),  # plain without a word
        ("gptq", ("lm_head",), GPTQ | {"modules_in_block_to_quantize": BLOCK}),  # which lacks most of them
        ("gptq", ("lm_head",), ROUND | {"packing_format": "auto_round:auto_gptq"}),
        ("gptq", ("lm_head", "q_proj"), ROUND | {
            "quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2",
            "extra_config": {"model.layers.0.self_attn.q_proj": {"bits": 16}, r".*\.1\..*\.q_proj": {"bits": 16}}}),
        ("pack-quantized", ("lm_head",), PACKED),
        ("pack-quantized", ("lm_head", "v_proj"), PACKED),
    ],
)  # fmt: skip
def test_one_set_of_weights_under_many_configurations(tiny, form, plain, config):
    folder = tiny()[0]
    want = quantized(folder, form, plain)
    write(folder, "config.json", quantization_config=config)
    torch.testing.assert_close(logits_of(folder), want, atol=1e-5, rtol=1e-5)


def test_older_places_of_the_configuration(tiny):
    folder = tiny()[0]
    want = quantized(folder, "gptq")
    write(folder, "quantize_config.json", bits=4, group_size=16, sym=True, desc_act=False, model_file_base_name="model")
    torch.testing.assert_close(logits_of(folder), want, atol=1e-5, rtol=1e-5)
    folder = tiny()[0]
    want = quantized(folder, "pack-quantized")
    write(folder, "config.json", compression_config=PACKED | {"sparsity_config": {"format": "dense"}})
    torch.testing.assert_close(logits_of(folder), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("routers", [(), ("mlp.gate",)])
def test_routers_rounded_or_plain_without_a_word(tiny, routers):
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    folder = tiny("qwen3_moe", **experts)[0]
    want = quantized(folder, "gptq", ("lm_head", *routers))
    write(folder, "config.json", quantization_config=GPTQ)
    torch.testing.assert_close(logits_of(folder), want, atol=1e-5, rtol=1e-5)


def test_scales_of_a_quantized_cache_are_left_out_with_a_note(tiny, capsys):
    folder = tiny()[0]
    want = quantized(folder, "pack-quantized")
    scales = {f"model.layers.{i}.self_attn.{s}_scale": torch.tensor([0.05]) for i in range(2) for s in "kv"}
    save_file(load_file(folder / "model.safetensors") | scales, folder / "model.safetensors")
    write(folder, "config.json", quantization_config=PACKED | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    capsys.readouterr()
    torch.testing.assert_close(logits_of(folder), want, atol=1e-5, rtol=1e-5)
    assert (line := capsys.readouterr().err).startswith("note: ") and "KV cache" in line and line.count("\n") == 1


def test_older_files_and_symmetric_awq():
    older = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}  # quant_config.json
    assert QuantConfig.from_hf(None, older).scheme("x") == Scheme("awq", 4, 128, False)
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False, "version": "gemm"}
    assert QuantConfig.from_hf(awq).scheme("x") == Scheme("awq", 4, 128, True)
    with pytest.raises(ValueError, match="None .a folder of MLX names none. is not supported"):
        QuantConfig.from_hf({"group_size": 64, "bits": 4})


def test_early_awq_beside_the_weights(tiny):
    folder = tiny()[0]
    write(folder, "quant_config.json", zero_point=True, q_group_size=16, w_bit=4, version="gemm")
    logits_of(folder)  # the weights are plain, which the file decides
    write(folder, "quant_config.json", version="gemv")
    with pytest.raises(ValueError, match="awq version 'gemv'"):
        checkpoint.load(str(folder))


def test_json_with_a_byte_order_mark(tiny):
    folder = tiny()[0]
    want = logits_of(folder)
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert torch.equal(logits_of(folder), want)


def test_one_file_of_one_without_its_index(tiny):
    folder = tiny()[0]
    want = logits_of(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert torch.equal(logits_of(folder), want)
    shutil.copy(folder / "model-00001-of-00001.safetensors", folder / "other-00001-of-00001.safetensors")
    with pytest.raises(FileNotFoundError, match="model-00001-of-00001.safetensors, other-00001"):
        checkpoint.load(str(folder))


def words(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Signed bytes, four to an int32 along `dim`, the first in the lowest bits; each is stored + 128."""
    x = (x.to(torch.int16) + 128).to(torch.uint8).transpose(dim, -1)
    return x.contiguous().view(torch.int32).transpose(dim, -1).contiguous()


def of_8_bits(form: str, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, index: torch.Tensor | None):
    """A Linear as that format holds it: q [N, K], scale and zero [N, G], index: the group of each column."""
    group = torch.arange(q.shape[1]) // (q.shape[1] // scale.shape[1]) if index is None else index
    if form.startswith("gptq"):
        stored = zero if form == "gptq_v2" else (zero.to(torch.int16) - 1 + 128) % 256 - 128  # v1: zero - 1
        tensors = {"qweight": words(q.t(), 0), "qzeros": words(stored.t(), 1)}
        return tensors | {"scales": scale.t().contiguous(), "g_idx": group.int()}
    if form == "int-quantized":
        return {"weight": q, "weight_scale": scale, "weight_zero_point": zero}
    tensors = {"weight_packed": words(q, 1), "weight_scale": scale, "weight_shape": torch.tensor(q.shape)}
    tensors |= {"weight_zero_point": words(zero, 0)}
    return tensors | ({} if index is None else {"weight_g_idx": index.int()})


EIGHT = [("gptq", False, True), ("gptq", True, False), ("gptq_v2", True, True), ("pack-quantized", True, False)]
EIGHT += [("pack-quantized", False, True), ("int-quantized", True, False), ("int-quantized", False, False)]


@pytest.mark.parametrize("form, asymmetric, act_order", EIGHT)
def test_eight_bits_in_groups(form, asymmetric, act_order, tiny, monkeypatch):
    """As 8-bit weights where there are kernels for them, as plain ones where not; whole, and a rank's share."""
    folder, generator = tiny(intermediate_size=128)[0], torch.Generator().manual_seed(0)
    rounded, kept = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim != 2 or "embed" in name or "lm_head" in name:
            rounded[name] = kept[name] = weight
            continue
        n, k = weight.shape
        index = torch.randperm(k, generator=generator) // 32 if act_order else torch.arange(k) // 32
        scale = torch.rand(n, k // 32, generator=generator) / 1000 + 5e-4
        zero = torch.randint(-128, 128, scale.shape, generator=generator, dtype=torch.int8) * asymmetric
        q = (weight / scale[:, index] + zero[:, index]).round().clamp(-128, 127).to(torch.int8)
        parts = of_8_bits(form, q, scale, zero.to(torch.int8), index if act_order else None)
        rounded |= {f"{name.removesuffix('.weight')}.{suffix}": t.contiguous() for suffix, t in parts.items()}
        kept[name] = (q - zero[:, index].float()) * scale[:, index]
    config = {"quant_method": "gptq", "checkpoint_format": form} | {"bits": 8, "group_size": 32, "sym": not asymmetric}
    config |= {"desc_act": act_order}
    if "quantized" in form:
        weights = {"num_bits": 8, "type": "int", "symmetric": not asymmetric, "strategy": "group", "group_size": 32}
        weights |= {"actorder": "group" if act_order else None}
        config = PACKED | {"format": form, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    save_file(kept, folder / "model.safetensors")
    want = logits_of(folder)
    save_file(rounded, folder / "model.safetensors")
    write(folder, "config.json", quantization_config=config)
    for plain, cls in ((("cpu",), Linear), ((), Int8Linear)):
        monkeypatch.setattr(checkpoint, "PLAIN", plain)
        torch.testing.assert_close(logits_of(folder), want, atol=1e-4, rtol=1e-4)
        whole = checkpoint.load(str(folder)).layers[1]
        # q, k and v of one order each are one matrix only if the orders are the same
        assert type(whole.mlp.down_proj) is cls and (act_order or type(whole.self_attn.qkv_proj) is cls)
        if cls is Int8Linear:
            assert whole.mlp.down_proj.weight_scale.shape[-1] == whole.mlp.down_proj.in_features // 32
        ranks = [checkpoint.load(str(folder), tp=TensorParallel(r, 2)).layers[1].self_attn.o_proj for r in range(2)]
        # a rank has one whole group, so a scale a row; of an ordered matrix it has parts of groups, and a plain one
        share = Linear if act_order else cls if asymmetric else Int8Linear
        assert all(type(part) is share for part in ranks)
        shares = torch.cat([part.dequantize(torch.float32) for part in ranks], -1)
        torch.testing.assert_close(shares, kept["model.layers.1.self_attn.o_proj.weight"], atol=1e-6, rtol=1e-6)
