"""Folders as they come: configs of real models, every way a folder can be wrong, and what loading costs in memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import machine
from architectures import config_from_hf, rope_from_hf
from checkpoint import checkpoint_dtype
from engine import Engine
from formats import QuantConfig
from model import KVCache, Rope
from tokenizer import Ids

ROOT = Path(__file__).parent.parent


def logits_of(folder: Path, **options) -> torch.Tensor:
    model = checkpoint.load(str(folder), **options)
    cache = KVCache(model.config, 1, 16, torch.device("cpu"), model.norm.weight.dtype)
    tokens = torch.arange(3, 11)[None]
    return model(tokens, torch.arange(8)[None], cache, end=8)


@pytest.fixture
def folder(tiny) -> Path:
    return tiny()[0]


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path, kind=ValueError, **options) -> str:
    with pytest.raises(kind) as caught:
        checkpoint.load(str(folder), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- config.json of real models ----------------

LLAMA_1 = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_32_1B = LLAMA_31_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_31_8B["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
MISTRAL_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_V03 = MISTRAL_V01 | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    "config, want",
    [
        (
            LLAMA_1,
            {"num_key_value_heads": 32, "ropes": (Rope(1e4),), "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
        ),
        (LLAMA_2_7B, {"head_dim": 128, "rms_norm_eps": 1e-5, "qkv_bias": False, "tie_word_embeddings": False}),
        (
            LLAMA_31_8B,
            {
                "ropes": (Rope(5e5, "llama3", 8.0, 8192, 1.0, 4.0),),
                "num_key_value_heads": 8,
                "intermediate_size": 14336,
                "max_position_embeddings": 131072,
            },
        ),
        (
            LLAMA_32_1B,
            {"head_dim": 64, "tie_word_embeddings": True, "ropes": (Rope(5e5, "llama3", 32.0, 8192, 1.0, 4.0),)},
        ),
        (SMOLLM2, {"ropes": (Rope(1e5),), "head_dim": 64, "num_key_value_heads": 3}),
        (MISTRAL_V01, {"windows": (4096,) * 32, "ropes": (Rope(1e4),), "vocab_size": 32000}),
        (MISTRAL_V03, {"windows": (0,) * 32, "ropes": (Rope(1e6),), "vocab_size": 32768}),
        (QWEN25_7B, {"windows": (0,) * 28, "qkv_bias": True, "o_bias": False, "qk_norm": False, "rms_norm_eps": 1e-6}),
        (QWEN25_7B | {"use_sliding_window": True, "max_window_layers": 20}, {"windows": (0,) * 20 + (131072,) * 8}),
        (
            QWEN25_7B | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            {"ropes": (Rope(1e6, "yarn", 4.0, 32768),)},
        ),
        (QWEN3_8B, {"qk_norm": True, "qkv_bias": False, "head_dim": 128, "windows": (0,) * 36, "ropes": (Rope(1e6),)}),
        (
            MIXTRAL,
            {
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 14336,
                "norm_topk_prob": True,
                "sparse": (True,) * 32,
                "windows": (0,) * 32,
                "rms_norm_eps": 1e-5,
            },
        ),
        (
            QWEN3_30B,
            {
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": True,
                "qk_norm": True,
                "head_dim": 128,
                "sparse": (True,) * 48,
            },
        ),
    ],
)
def test_configs_of_real_models(config, want):
    got = config_from_hf(config)
    assert {name: getattr(got, name) for name in want} == want
    assert got.hidden_size == config["hidden_size"] and got.num_hidden_layers == config["num_hidden_layers"]


@pytest.mark.parametrize("theta", [500_000, 2804339835.0, 45_900_000_000])
def test_rope_theta_of_long_contexts(theta):
    assert config_from_hf(LLAMA_31_8B | {"rope_theta": theta}).ropes[0].rope_theta == theta


@pytest.mark.parametrize(
    "config, absent, want",
    [
        (MISTRAL_V01, "sliding_window", {"windows": (4096,) * 32}),
        (MIXTRAL, "sliding_window", {"windows": (0,) * 32}),
        (MIXTRAL, "rope_theta", {"ropes": (Rope(1e6),)}),
        (QWEN25_7B | {"use_sliding_window": True, "num_hidden_layers": 30}, "max_window_layers",
         {"windows": (0,) * 28 + (131072,) * 2}),
        (LLAMA_31_8B, "rope_scaling", {"ropes": (Rope(5e5),)}),
        (QWEN3_30B, "norm_topk_prob", {"norm_topk_prob": False}),
    ],
)  # fmt: skip
def test_absent_keys_mean_what_transformers_makes_of_them(config, absent, want):
    from transformers import AutoConfig

    config = {k: v for k, v in config.items() if k != absent}
    got = config_from_hf(config)
    assert {name: getattr(got, name) for name in want} == want
    theirs = AutoConfig.for_model(**config)
    assert got.ropes[0].rope_theta == theirs.rope_parameters["rope_theta"]
    assert got.rms_norm_eps == theirs.rms_norm_eps and got.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model_type": "gemma2"},
            ["gemma2", "llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, phi3, gemma3_text, smollm3, olmo2, granite"],
        ),
        ({"model_type": None}, ["model_type", "supported are"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"logit_scale": 0.0625}, ["logit_scale"]),
        ({"final_logit_softcapping": 30.0, "embedding_multiplier": 12.0}, ["embedding_multiplier, final_logit_soft"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ["longrope", "long_factor, original_max"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1, 2]}}, ["mrope_section"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, ["factor = '4'"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor, high_freq_factor"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "4096"}, ["hidden_size", "'4096'"]),
        ({"hidden_size": True}, ["hidden_size = True"]),
        ({"vocab_size": 10**12}, ["vocab_size = 1000000000000"]),
        ({"num_key_value_heads": "1"}, ["num_key_value_heads = '1'"]),
        ({"head_dim": "4"}, ["head_dim = '4'"]),
        ({"head_dim": -4}, ["head_dim = -4"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps = '1e-5'"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps = nan"]),
        ({"max_position_embeddings": "256"}, ["max_position_embeddings = '256'"]),
        ({"mlp_bias": "no"}, ["mlp_bias = 'no'", "true or false"]),
        ({"rope_theta": 1}, ["rope_theta = 1"]),
        ({"rope_scaling": "linear"}, ["rope_scaling = 'linear'"]),
        ({"rope_scaling": [1]}, ["rope_scaling = [1]"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0}}, ["beta_fast = 0"]),
        ({"rope_scaling": {"type": "yarn", "factor": True}}, ["factor = True"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 3}}, ["truncate = 3"]),
        ({"rope_scaling": LLAMA_31_8B["rope_scaling"] | {"low_freq_factor": 4}}, ["low_freq_factor"]),
        ({"layer_types": 5}, ["layer_types = 5"]),
        ({"layer_types": [1] * 32}, ["layer_types 1 are"]),
        ({"model_type": ["llama"]}, ["model_type = ['llama']"]),
        ({"model_type": "mistral", "sliding_window": "x"}, ["sliding_window = 'x'"]),
        ({"model_type": "qwen2", "max_window_layers": "a"}, ["max_window_layers = 'a'"]),
        ({"model_type": "mixtral", "num_local_experts": "8"}, ["num_local_experts = '8'"]),
        (QWEN3_30B | {"decoder_sparse_step": 0}, ["decoder_sparse_step = 0"]),
        (QWEN3_30B | {"mlp_only_layers": 3}, ["mlp_only_layers = 3"]),
        (QWEN3_30B | {"mlp_only_layers": ["0"]}, ["mlp_only_layers", "'0'"]),
        ({"num_attention_heads": 0}, ["num_attention_heads = 0"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "1", "32"]),
        ({"layer_types": ["chunked_attention"] * 32}, ["chunked_attention"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps = 1000"]),
        ({"rope_theta": 1e300}, ["rope_theta = 1e+300"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 5e-324}}, ["beta_fast = 5e-324"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 1e-300}}, ["1e-300"]),
        ({"rope_scaling": {"type": "yarn", "factor": 10**400}}, ["factor = 1000"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "extrapolation_factor": 0.5}}, ["extrapolation_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers = 1000000", "100000"]),
        (MIXTRAL | {"num_experts_per_tok": 9}, ["num_experts_per_tok = 9", "8 experts"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads = 5", "32 heads"]),
        ({"head_dim": 5}, ["head_dim = 5", "odd"]),
        ({"\x1b[2J\x1b[31mPWNED": 1}, ["\\x1b[2J"]),
    ],
)
def test_configs_that_are_refused(changes, words):
    with pytest.raises(ValueError) as caught:
        config_from_hf(LLAMA_2_7B | changes)
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "changes, context, rope",
    [
        # switched on as the model cards say, and with the context that is then true
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 16384, Rope(1e4, "yarn", 4.0, 4096)),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
          "max_position_embeddings": 16384}, 16384, Rope(1e4, "yarn", 4.0, 4096)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
          "max_position_embeddings": 40960}, 131072, Rope(1e4, "yarn", 4.0, 32768)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 1024},
         4096, Rope(1e4, "yarn", 2.0, 1024)),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, 32768, Rope(1e4, "linear", 8.0)),
        ({"rope_scaling": LLAMA_31_8B["rope_scaling"]}, 4096, Rope(1e4, "llama3", 8.0, 8192, 1.0, 4.0)),
        ({"rope_scaling": {"type": "yarn", "factor": 16.0, "finetuned": True, "extrapolation_factor": 1}},
         65536, Rope(1e4, "yarn", 16.0, 4096)),
    ],
)  # fmt: skip
def test_context_of_scaled_positions(changes, context, rope):
    got = config_from_hf(LLAMA_2_7B | changes)
    assert (got.max_position_embeddings, got.ropes[0]) == (context, rope)


def test_attn_factor_multiplies():
    """DeepSeek-R1-0528-Qwen3-8B ships the inverse of what YaRN makes of a factor of 4, so that nothing is scaled."""
    shipped = {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.8782488562869419}
    rope = config_from_hf(QWEN3_8B | {"rope_scaling": shipped | {"original_max_position_embeddings": 32768}}).ropes[0]
    assert rope.frequencies(128, 1)[1] == pytest.approx(1.0, abs=1e-6)
    plain = config_from_hf(QWEN3_8B | {"rope_scaling": shipped | {"attn_factor": 1.0}}).ropes[0]
    assert plain.attention_factor is None and plain.frequencies(128, 1)[1] == pytest.approx(1.138629, abs=1e-6)


BOOKKEEPING = {
    "_attn_implementation": "sdpa", "_flash_attn_2_enabled": True, "_commit_hash": "abc", "add_cross_attention": False,
    "attn_implementation": None, "bad_words_ids": None, "begin_suppress_tokens": None, "device_map": "auto",
    "diversity_penalty": 0.0, "do_sample": True, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "forced_bos_token_id": None, "gradient_checkpointing": True,
    "image_token_id": 32000, "length_penalty": 1.0, "max_length": 4096, "min_length": 0, "model_parallel_size": 1,
    "neftune_noise_alpha": 5, "no_repeat_ngram_size": 0, "num_beams": 1, "output_scores": False, "pruned_heads": {},
    "repetition_penalty": 1.05, "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
    "temperature": 0.6, "tf_legacy_loss": False, "tokenizer_model_max_length": 4096, "top_k": 50, "typical_p": 1.0,
    "unsloth_version": "2024.9", "use_flash_attn": True, "world_size": 8,
}  # fmt: skip


def test_bookkeeping_changes_nothing():
    assert config_from_hf(LLAMA_2_7B | BOOKKEEPING) == config_from_hf(LLAMA_2_7B)
    for kind in ("mistral", "mixtral", "qwen2"):  # whose classes do not read it
        config = {"mistral": MISTRAL_V01, "mixtral": MIXTRAL, "qwen2": QWEN25_7B}[kind]
        assert config_from_hf(config | {"attention_bias": kind != "qwen2", "mlp_bias": True}) == config_from_hf(config)


def test_both_spellings_of_rope_mean_the_same():
    old = rope_from_hf({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0, "rope_type": "linear"}})
    new = rope_from_hf({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}})
    assert old == new == Rope(5e5, "linear", 4.0)


def test_dynamic_rope_beyond_the_context_is_one_clear_line(tiny):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    engine = Engine(checkpoint.load(str(tiny(rope_parameters=rope)[0])), Ids(200))
    engine.reserve(1, 256)
    with pytest.raises(ValueError, match="^257 tokens do not fit the model's context of 256 .*dynamic.*$"):
        engine.reserve(1, 257)


@pytest.mark.parametrize(
    "quantization, word",
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}}}, "nvfp4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}}, "float"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "3-bit"),
    ],
)  # fmt: skip
def test_unsupported_quantization_is_refused_by_name(folder, quantization, word):
    edit_config(folder, quantization_config=quantization)
    assert word in refusal(folder)


# -- folders ----------------


def test_round_trip(tiny, tmp_path):
    """Every loaded weight is the one on disk; q, k, v and gate, up follow each other in the packed ones."""
    folder, reference = tiny()
    model, disk = checkpoint.load(str(folder)), load_file(folder / "model.safetensors")
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for name, parts in (
        ("self_attn.qkv_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        ("mlp.down_proj", ["mlp.down_proj"]),
        ("input_layernorm", ["input_layernorm"]),
    ):
        want = torch.cat([disk[f"model.layers.1.{part}.weight"] for part in parts])
        assert torch.equal(model.get_submodule(f"layers.1.{name}").weight, want)
    assert torch.equal(model.lm_head.weight, disk["lm_head.weight"])
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())


def test_sharded_folder_equals_the_single_file(tiny):
    single, sharded = tiny()[0], tiny(shard="60KB")[0]
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits_of(single), logits_of(sharded))


@pytest.mark.parametrize(
    "name", ["llama-int4-g128-awq-gptq", "model.int8.gguf", "qwen2 pytorch_model.bin", "tp4-draft"]
)
def test_renaming_the_folder_changes_nothing(folder, tmp_path, name):
    want = logits_of(folder)
    shutil.copytree(folder, tmp_path / name)
    assert torch.equal(logits_of(tmp_path / name), want)


def test_the_single_file_is_followed_through_links_as_in_the_hub_cache(folder, tmp_path):
    want = logits_of(folder)
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert torch.equal(logits_of(tmp_path / "snapshot"), want)


def test_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "'model.layers.1.mlp.up_proj.weight'" in refusal(folder)


def test_extra_tensors_are_named(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    assert "model.layers.0.self_attn.q_norm.weight" in refusal(folder)
    edit_tensors(folder, lambda t: t.update({f"x.{i}": torch.ones(1) for i in range(9)}))
    edit_tensors(folder, lambda t: t.update({"a.bias": torch.tensor(0.0)}))
    assert "a.bias" in refusal(folder)
    edit_tensors(folder, lambda t: t.pop("a.bias"))
    assert "x.0" in (line := refusal(folder)) and "more" in line and "x.8" not in line


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.k_proj.weight"],
)
def test_misshaped_tensor_is_named_with_both_shapes(folder, name):
    shapes = []

    def grow(tensors):
        shapes.append(list(tensors[name].shape))
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
        shapes.append(list(tensors[name].shape))

    edit_tensors(folder, grow)
    line = refusal(folder)
    assert f"'{name}'" in line and str(shapes[0]) in line and str(shapes[1]) in line


def test_a_transposed_square_has_the_right_shape_but_a_wrong_rank_does_not(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None].contiguous()}))
    assert "[1, 64]" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_tensors_of_other_dtypes_are_named(folder, dtype):
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].to(dtype)}))
    assert name in (line := refusal(folder)) and "BF16" in line


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_hidden_layers": 90_000}, ["num_hidden_layers = 90000", "the files hold 2"]),
        ({"num_hidden_layers": 1}, ["num_hidden_layers = 1", "the files hold 2"]),
        ({"vocab_size": 2**31 - 1}, ["vocab_size", "[200, 64]"]),
        ({"hidden_size": 2**31 - 1, "head_dim": 16}, ["hidden_size", "[200, 64]"]),
        ({"intermediate_size": 2**31 - 1}, ["[112, 64]", "[2147483647, 64]"]),
        ({"head_dim": 2**31 - 2}, ["q_proj.weight", "[64, 64]"]),
    ],
)
def test_sizes_that_are_not_the_files_are_refused_before_anything_is_made(folder, changes, words):
    edit_config(folder, **changes)
    line = refusal(folder)
    assert all(word in line for word in words), line


def test_dtypes_that_no_library_knows_are_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F9Z"', 1))
    assert "model.safetensors" in refusal(folder)


CUT = """
import os, sys
sys.path.insert(0, {root!r})
import checkpoint
path, linear = {path!r}, checkpoint.Loader.linear

def cut(self, name, module):
    if name.endswith("layers.1.mlp.down_proj"):
        {how}
    return linear(self, name, module)

checkpoint.Loader.linear = cut
checkpoint.load(os.path.dirname(path))
"""


def test_files_that_change_while_they_are_read(tiny, tmp_path):
    """One that becomes shorter ends the run with one line; one that is replaced is read to its end."""
    path = tiny("llama", hidden_size=128, intermediate_size=256, vocab_size=1024)[0] / "model.safetensors"
    shutil.copyfile(path, tmp_path / "other")
    for how, code in (("os.replace({!r}, path)", 0), ("os.truncate(path, 4096)", 2)):
        text = CUT.format(root=str(ROOT), path=str(path), how=how.format(str(tmp_path / "other")))
        (tmp_path / "cut.py").write_text(text)
        done = subprocess.run([sys.executable, str(tmp_path / "cut.py")], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert done.stderr == "" or ("became shorter" in done.stderr and done.stderr.count("\n") == 1)


def test_truncated_and_corrupt_files(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-100], whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 64, b"<html>sorry</html>" * 9):
        file.write_bytes(broken)
        assert "model.safetensors cannot be read" in refusal(folder)


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{}")
    assert "model_type ''" in refusal(folder)
    for text in ("{", "[]", '"llama"', "\x00", "[" * 100_000):
        (folder / "config.json").write_text(text)
        assert "config.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder, FileNotFoundError)


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", "..", "", "/x.safetensors", 7, None],
)
def test_index_entries_that_leave_the_folder(tiny, file):
    folder = tiny(shard="60KB")[0]
    shutil.copy(next(folder.glob("model-*")), folder.parent / "outside.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    assert repr(file) in refusal(folder)


def test_index_that_is_wrong(tiny):
    """The headers are the truth: an index only names files, and these the others that belong to them."""
    folder = tiny(shard="60KB")[0]
    path, want = folder / "model.safetensors.index.json", logits_of(folder)
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    for stale in (
        dict.fromkeys(index["weight_map"], files[0]),
        {k: v for k, v in index["weight_map"].items() if "norm" not in k},
        {k: v for k, v in index["weight_map"].items() if v == files[1]},
        index["weight_map"] | {"model.layers.0.self_attn.rotary_emb.inv_freq": files[1], "gone.weight": files[2]},
    ):
        path.write_text(json.dumps({"weight_map": stale}))
        assert torch.equal(logits_of(folder), want)
    for bad in ([], "x", None, 3):
        path.write_text(json.dumps({"weight_map": bad}))
        assert "index.json" in refusal(folder)
    path.write_text(json.dumps(index))
    (folder / files[1]).rename(folder / "away")
    assert f"{files[1]} is missing" in refusal(folder, FileNotFoundError)
    path.unlink()
    assert "download the rest" in refusal(folder, FileNotFoundError)
    (folder / "away").rename(folder / files[1])
    assert torch.equal(logits_of(folder), want)  # a whole set of files needs no index


def test_a_tensor_in_two_files_is_where_the_index_says(tiny):
    folder = tiny(shard="60KB")[0]
    path, want = folder / "model.safetensors.index.json", logits_of(folder)
    where = json.loads(path.read_text())["weight_map"]
    for other in sorted(set(where.values()) - {where["model.norm.weight"]}):
        tensors = load_file(folder / other)
        save_file(tensors | {"model.norm.weight": torch.zeros(64)}, folder / other)
    assert torch.equal(logits_of(folder), want)


def renamed(change):
    return lambda tensors: tensors.update({change(name): tensors.pop(name) for name in list(tensors)})


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: name.removeprefix("model."),
    ],
)
def test_names_of_wrapped_and_of_bare_models(folder, change):
    want = logits_of(folder)
    edit_tensors(folder, renamed(change))
    assert torch.equal(logits_of(folder), want)


def test_a_tensor_under_two_names_is_named(folder):
    edit_tensors(folder, lambda t: t.update({"norm.weight": t["model.norm.weight"] + 1}))
    assert "holds 'model.norm.weight' twice" in refusal(folder)


def test_tolerated_leftovers(folder):
    want = logits_of(folder)
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    edit_tensors(folder, lambda t: t.update({"model.layers.1.self_attn.o_proj.bias": torch.zeros(64)}))
    assert torch.equal(logits_of(folder), want)
    edit_tensors(folder, lambda t: t["model.layers.1.self_attn.o_proj.bias"].fill_(1e-3))
    assert "model.layers.1.self_attn.o_proj.bias" in refusal(folder)


def test_tied_head(tiny):
    folder, reference = tiny(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = checkpoint.load(str(folder))
    assert model.lm_head.weight is model.embed_tokens.weight
    want = logits_of(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits_of(folder), want)
    edit_tensors(folder, lambda t: t.pop("model.embed_tokens.weight"))  # as safetensors.torch.save_model writes it
    assert torch.equal(logits_of(folder), want)


def test_a_head_that_differs_is_used(tiny, capsys):
    """As transformers does: what is stored says that the two are not tied."""
    from transformers import AutoModelForCausalLM

    folder, _ = tiny(tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0).contiguous()}))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    capsys.readouterr()
    torch.testing.assert_close(logits_of(folder), theirs(torch.arange(3, 11)[None]).logits, atol=1e-4, rtol=1e-4)
    assert "lm_head.weight differs" in (line := capsys.readouterr().err) and line.startswith("note: ")


def test_a_model_without_a_head_that_is_not_tied_is_refused(tiny):
    folder = tiny(tie_word_embeddings=True)[0]
    for config in ({"tie_word_embeddings": False}, {"tie_word_embeddings": None}):
        edit_config(folder, **config)
        assert "has no lm_head.weight, and config.json has no tie_word_embeddings that is true" in refusal(folder)


@pytest.mark.parametrize(
    "name, what",
    [
        ("pytorch_model.bin", "from_pretrained(FOLDER).save_pretrained"),
        ("weights.pt", "from_pretrained(FOLDER).save_pretrained"),
        ("consolidated.00.pth", "convert_llama_weights_to_hf.py"),
        ("model.Q4_K_M.gguf", "gguf_file="),
        ("adapter_model.safetensors", "merge_and_unload"),
        ("model-00001-of-00002.safetensors", "download the rest of them"),
        ("consolidated.safetensors", "must be called model.safetensors"),
    ],
)
def test_folder_with_other_weights_says_what_to_do(folder, name, what):
    (folder / "model.safetensors").rename(folder / name)
    assert name in (line := refusal(folder, FileNotFoundError)) and what in line
    assert ("only safetensors are read" in line) == (not name.endswith("safetensors"))


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder, FileNotFoundError)


def test_names_that_are_neither_folder_nor_hub_id(folder, tmp_path):
    for name in (str(tmp_path / "none"), "../none", "a/b/c", "", "x"):
        with pytest.raises(FileNotFoundError, match="no such folder, and no Hub id"):
            checkpoint.resolve(name)
    with pytest.raises(FileNotFoundError, match="is a file"):
        checkpoint.resolve(str(folder / "config.json"))


# -- dtype and memory ----------------


def test_dtypes(tiny):
    folder, _ = tiny(dtype=torch.bfloat16)
    disk = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert disk.dtype == torch.bfloat16
    default = checkpoint.default_dtype(folder, torch.device("cpu"))
    for dtype, want in ((None, default), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)):
        model = checkpoint.load(str(folder), dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {want} and model.inv_freq.dtype == torch.float32
        assert torch.equal(model.norm.weight, disk.to(want))


def test_quantized_weights_run_in_bfloat16_on_a_cpu(tiny, monkeypatch):
    """GPTQ's folders declare float16, for which PyTorch's operators are slow there; a GPU takes what is declared."""
    folder, _ = tiny(dtype=torch.float16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert checkpoint.default_dtype(folder, torch.device("cpu")) == torch.float16
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "quant_method": "gptq"}')
    assert checkpoint.default_dtype(folder, torch.device("cpu")) == torch.bfloat16
    assert checkpoint.default_dtype(folder, torch.device("cuda")) == torch.float16
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert checkpoint.default_dtype(folder, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    "config, want",
    [
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float32", "torch_dtype": "float16"}, torch.float32),
        ({"dtype": "torch.bfloat16"}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_declared_dtype(config, want):
    assert checkpoint_dtype(config) == want


def test_undeclarable_dtype():
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        checkpoint_dtype({"dtype": "float8_e4m3fn"})


MEMORY = """
import sys, threading
import torch, checkpoint

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

folder, warm, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
checkpoint.load(warm, dtype=dtype)  # the libraries' own memory
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = checkpoint.load(folder, dtype=dtype)
done.set()
thread.join()
sizes = [p.numel() * p.element_size() for p in model.parameters()]
print(max(peak, anonymous()) - before, anonymous() - before, sum(sizes), max(sizes))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """About 100 MB of bfloat16 in two files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 5, "vocab_size": 12000}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=6, num_key_value_heads=3)
    folder = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {k: torch.full(v.shape, 0.01, dtype=torch.bfloat16) for k, v in model.state_dict().items()}
    config.save_pretrained(folder)
    names = sorted(tensors)
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({k: tensors[k] for k in part}, folder / file)
    index = {k: "a.safetensors" if i % 2 == 0 else "b.safetensors" for i, k in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_memory_while_loading(large, folder, dtype):
    """At most the model in its target dtype and two tensors; the file itself stays on disk, mapped."""
    command = [sys.executable, "-c", MEMORY, str(large), str(folder), dtype]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    peak, after, model, tensor = map(int, done.stdout.split())
    assert model > (90 << 20) and after > 0.9 * model  # that it is really there
    assert peak <= model + 2 * tensor + (24 << 20)


def test_estimate_of_what_a_folder_needs(tiny):
    folder, reference = tiny(dtype=torch.bfloat16)
    count = sum(p.numel() for p in reference.parameters())
    assert machine.stored_bytes(folder, torch.float32) == 4 * count
    assert machine.stored_bytes(folder, torch.bfloat16) == 2 * count
    assert QuantConfig.from_hf(None) is None
