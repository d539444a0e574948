"""Folders as organisations publish them: the same weights under the configurations that people have written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from formats import QuantConfig, Quantized, Scheme, pack
from model import KVCache

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
