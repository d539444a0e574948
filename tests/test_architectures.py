"""Families beyond Llama's: what transformers says of a folder that it wrote, in every way that a model is run here."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantize import agreed, logits, run, text  # noqa: F401 (a fixture)
from test_real_folders import GPTQ, logits_of, quantized, write
from test_tp import add_tokenizer, launch, results

import checkpoint
from architectures import config_from_hf, text_part
from engine import Engine
from model import KVCache, Rope
from sampling import SamplingParams
from tokenizer import Ids
from tp import TensorParallel

GREEDY = SamplingParams(temperature=0.0)
RANKS = Path(__file__).parent / "test_tp.py"
# what is particular to each family, in a small model: model_type -> changes of the config
SMALL: dict[str, dict] = {
    "phi3": {"sliding_window": 20, "partial_rotary_factor": 0.75},
    "gemma3_text": {"head_dim": 16, "sliding_window": 13, "query_pre_attn_scalar": 40, "sliding_window_pattern": 2},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "granite": {"embedding_multiplier": 9.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}
    | {"logits_scaling": 2.0},
}
SMALL = {kind: changes | {"pad_token_id": 0, "intermediate_size": 96} for kind, changes in SMALL.items()}


def greedy(engine: Engine, prompt: list[int], n: int) -> list[int]:
    return [i for piece in engine.generate([prompt], GREEDY, max_new_tokens=n, ignore_eos=True) for i in piece.ids]


@pytest.mark.parametrize("kind", SMALL)
def test_greedy_ids_are_those_of_transformers(tiny, kind):
    """Plain, and by speculation with a draft that is wrong now and then."""
    folder, theirs = tiny(kind, **SMALL[kind], tie_word_embeddings=False)  # a tied random head repeats its token
    prompt = torch.randint(3, 200, (1, 17), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(prompt, **options)[0, 17:].tolist()
    assert len(set(wanted)) > 5
    model = checkpoint.load(str(folder))
    engine = Engine(model, Ids(200))
    assert greedy(engine, prompt[0].tolist(), 40) == wanted
    engine.speculate(Engine(checkpoint.quantized_copy(model, 8), engine.tokenizer), 3)
    assert greedy(engine, prompt[0].tolist(), 40) == wanted


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("kind", SMALL)
def test_a_quantized_folder_is_read_by_transformers(kind, mode, tiny, text, tmp_path):  # noqa: F811
    """What `quantize.py` writes: the same logits here and there, near those of the whole model."""
    pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    source = tiny(kind, vocab_size=260, **SMALL[kind])[0]
    add_tokenizer(source)
    run(source, tmp_path / "out", text, mode)
    tokens, expected = agreed(tmp_path / "out")
    loss = (logits(source, tokens) - expected).norm() / expected.norm()
    assert 1e-4 < loss < (0.1 if mode == "int8" else 0.9)


@pytest.mark.parametrize("kind", SMALL)
def test_packed_as_gptq_does(kind, tiny):
    """Also of modules that are joined on disk."""
    folder = tiny(kind, **SMALL[kind], tie_word_embeddings=False)[0]
    want = quantized(folder, "gptq")
    write(folder, "config.json", quantization_config=GPTQ)
    torch.testing.assert_close(logits_of(folder), want, atol=1e-5, rtol=1e-5)


def test_two_ranks_compute_what_one_does(tiny, tmp_path):
    folders = {kind: tiny(kind, **changes)[0] for kind, changes in SMALL.items()}
    done = launch(2, str(RANKS), str(tmp_path), *map(str, folders.values()))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for kind, folder in folders.items():
        for what, want in results(folder, TensorParallel()).items():
            for got in ranks:
                assert (got[f"{folder} {what}"] - want).abs().max() <= (1e-4 if "logits" in what else 0), (kind, what)


@pytest.mark.parametrize("kind", SMALL)
def test_the_compiled_step_is_whole(tiny, kind):
    """Dynamo takes the model without a break, and it computes the same."""
    model = checkpoint.load(str(tiny(kind, **SMALL[kind])[0]))
    cache, twin = (KVCache(model.config, 2, 32, torch.device("cpu"), torch.float32) for _ in range(2))
    step = torch.compile(lambda t, p, c: model(t, p, c, end=32), backend="eager", fullgraph=True)
    for position in (20, 21):
        where = torch.tensor([[position], [position - 9]])
        assert torch.allclose(step(where + 50, where, cache), model(where + 50, where, twin, end=32), atol=1e-5)


# -- Gemma 3 with images ----------------


@pytest.mark.parametrize("spelling", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_model(tiny, tmp_path, spelling, capsys, text):  # noqa: F811
    """Its tensors are found under both names that folders have; those for images are left out with a note."""
    plain, theirs = tiny("gemma3_text", vocab_size=260, **SMALL["gemma3_text"])
    add_tokenizer(plain)
    whole = tmp_path / "whole"
    shutil.copytree(plain, whole)
    config = json.loads((plain / "config.json").read_text())
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256}
    outer |= {"image_token_index": 262144, "text_config": config, "vision_config": {"hidden_size": 8}}
    (whole / "config.json").write_text(json.dumps(outer | {"torch_dtype": config.pop("dtype")}))
    tensors = {n.replace("model.", spelling, 1): t for n, t in load_file(plain / "model.safetensors").items()}
    for name in ("vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.mm_soft_emb_norm.weight"):
        tensors["model." * (spelling[0] == "m") + name] = torch.ones(8)
    save_file(tensors, whole / "model.safetensors")
    tokens = torch.randint(0, 260, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = theirs(tokens).logits
    capsys.readouterr()
    assert (logits(whole, tokens) - wanted).abs().max() <= 1e-4
    assert (line := capsys.readouterr().err).startswith("note: ") and "2 tensors for images" in line
    run(whole, tmp_path / "out", text, "int8")  # becomes a folder of the text model
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3_text"
    run(plain, tmp_path / "same", text, "int8")
    assert torch.equal(logits(tmp_path / "out", tokens), logits(tmp_path / "same", tokens))


def test_tensors_for_images_belong_to_a_multimodal_model(tiny):
    folder = tiny()[0]
    save_file(load_file(folder / "model.safetensors") | {"vision_tower.x": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not call for: vision_tower.x"):
        checkpoint.load(str(folder))


# -- LongRoPE ----------------


def test_the_cache_decides_between_short_and_long_factors():
    """One rule for every token of a sequence: a cache of more slots than the original context takes the long ones."""
    assert torch.allclose(Rope(1e4, "longrope", factors=(1.0, 2.0)).frequencies(4, 64)[0], torch.tensor([1.0, 0.005]))
    config = config_from_hf(PHI_4_MINI | {"num_hidden_layers": 1})
    caches = [KVCache(config, 1, n, torch.device("meta"), torch.float32) for n in (4096, 4097)]
    assert [cache.long for cache in caches] == [False, True] and not config_from_hf(PHI_4).long(1 << 20)


def test_an_engine_keeps_a_cache_for_sequences_of_its_kind(tiny):
    """What a long sequence leaves behind changes nothing for a short one, with the room for drafts or without."""
    lists = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rope = lists | {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128}
    folder, _ = tiny("phi3", rope_parameters=rope, **SMALL["phi3"] | {"original_max_position_embeddings": 128})
    engine, prompt = Engine(checkpoint.load(str(folder)), Ids(200)), list(range(3, 40))
    short = greedy(engine, prompt, 91)  # 128 in all
    assert engine.cache.long is False
    greedy(engine, prompt, 92)
    assert engine.cache.long is True
    assert greedy(engine, prompt, 91) == short
    engine.speculate(None, 3)
    assert greedy(engine, prompt, 91) == short and engine.cache.max_seq_len > 128


# -- config.json of real models ----------------

PHI_3_MINI_4K = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "vocab_size": 32064,
}
LONG = {"short_factor": [1.0] * 48, "long_factor": [1.08 + i for i in range(48)]}  # as long as the published ones
PHI_3_MINI_128K = PHI_3_MINI_4K | {"max_position_embeddings": 131072, "sliding_window": 262144}
PHI_3_MINI_128K |= {"rope_scaling": LONG | {"type": "su"}}  # as first published; later longrope
PHI_35_MINI = PHI_3_MINI_128K | {"rope_scaling": LONG | {"type": "longrope"}}
PHI_4 = PHI_3_MINI_4K | {"hidden_size": 5120, "intermediate_size": 17920, "num_attention_heads": 40}
PHI_4 |= {"num_hidden_layers": 40, "num_key_value_heads": 10, "vocab_size": 100352, "rope_theta": 250000}
PHI_4 |= {"max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "sliding_window": None}
PHI_4 |= {"auto_map": {}, "bos_token_id": 100257, "eos_token_id": 100257, "pad_token_id": 100257}
PHI_4_MINI = PHI_35_MINI | {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064}
PHI_4_MINI |= {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
PHI_4_MINI |= {"partial_rotary_factor": 0.75, "tie_word_embeddings": True, "bos_token_id": 199999}

GEMMA_3_270M = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False,
    "use_cache": True,
    "vocab_size": 262144,
}
GEMMA_3_1B = {k: v for k, v in GEMMA_3_270M.items() if k not in ("layer_types", "_sliding_window_pattern", "dtype")}
GEMMA_3_1B |= {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "sliding_window_pattern": 6}
GEMMA_3_1B |= {"cache_implementation": "hybrid", "torch_dtype": "bfloat16", "eos_token_id": [1, 106]}
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
}
TEXT_12B = {"hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48}
GEMMA_3_12B = GEMMA_3_4B | {"text_config": GEMMA_3_4B["text_config"] | TEXT_12B | {"num_key_value_heads": 8}}
# as transformers 5 writes it
TRANSLATEGEMMA_4B = GEMMA_3_4B | {"dtype": "bfloat16", "text_config": GEMMA_3_4B["text_config"] | {
    "_sliding_window_pattern": 6, "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16",
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072,
    "layer_types": [*(["sliding_attention"] * 5 + ["full_attention"]) * 5, *["sliding_attention"] * 4],
    "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0, "rope_scaling": None,
    "rope_parameters": {"full_attention": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_attention": {"rope_type": "default"}},
    "use_bidirectional_attention": False, "vocab_size": 262208}}  # fmt: skip
TEXT_27B = {"head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32}
TEXT_27B |= {"num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168}
GEMMA_3_27B = GEMMA_3_4B | {"text_config": GEMMA_3_4B["text_config"] | TEXT_27B}
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
OLMO_2_13B = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0",
    "use_cache": True,
    "vocab_size": 100352,
}
GRANITE_31_2B = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "logits_scaling": 8.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0",
    "use_cache": True,
    "vocab_size": 49152,
}
GRANITE_33_8B = GRANITE_31_2B | {"attention_dropout": 0.0, "attention_multiplier": 0.0078125, "hidden_size": 4096}
GRANITE_33_8B |= {"intermediate_size": 12800, "logits_scaling": 16.0, "rope_theta": 1e7, "vocab_size": 49159}
GLOBAL, LOCAL, STILL = Rope(1e6, "linear", 8.0), Rope(1e4), Rope(1.0, "linear", math.inf)


@pytest.mark.parametrize(
    "config, want",
    [
        (
            PHI_3_MINI_4K,
            {"windows": (2047,) * 32, "ropes": (Rope(1e4),), "head_dim": 96, "max_position_embeddings": 4096},
        ),
        (PHI_3_MINI_128K, {"windows": (262144,) * 32, "rotary_dim": 96, "max_position_embeddings": 131072}),
        (PHI_35_MINI, {"rms_norm_eps": 1e-5, "num_key_value_heads": 32}),
        (PHI_4, {"windows": (0,) * 40, "ropes": (Rope(250000),), "head_dim": 128}),
        (
            GEMMA_3_270M,
            {
                "windows": (512,) * 5 + (0,) + (512,) * 5 + (0,) + (512,) * 5 + (0,),
                "ropes": (Rope(1e6), LOCAL),
                "tie_word_embeddings": True,
                "hidden_act": "gelu_pytorch_tanh",
                "query_scale": 1.0,
            },
        ),
        (
            GEMMA_3_1B,
            {
                "windows": ((512,) * 5 + (0,)) * 4 + (512,) * 2,
                "layer_ropes": ((1,) * 5 + (0,)) * 4 + (1,) * 2,
                "embedding_multiplier": 1152**0.5,
                "max_position_embeddings": 32768,
            },
        ),
        (
            GEMMA_3_4B,
            {
                "layer_ropes": ((1,) * 5 + (0,)) * 5 + (1,) * 4,
                "num_attention_heads": 8,
                "head_dim": 256,
                "num_key_value_heads": 4,
                "vocab_size": 262208,
                "max_position_embeddings": 131072,
                "ropes": (GLOBAL, LOCAL),
            },
        ),
        (TRANSLATEGEMMA_4B, {"ropes": (GLOBAL, LOCAL), "layer_ropes": ((1,) * 5 + (0,)) * 5 + (1,) * 4}),
        (GEMMA_3_12B, {"num_key_value_heads": 8, "num_hidden_layers": 48, "post_norms": True}),
        (GEMMA_3_27B, {"head_dim": 128, "query_scale": (128 / 168) ** 0.5, "qk_norm": True}),
        (SMOLLM3_3B, {"windows": (0,) * 36, "layer_ropes": (0, 0, 0, 1) * 9, "ropes": (Rope(5e6), STILL)}),
        (
            {k: v for k, v in SMOLLM3_3B.items() if k not in ("no_rope_layers", "rope_theta")},
            {"layer_ropes": (0, 0, 0, 1) * 9, "ropes": (Rope(2e6), STILL), "tie_word_embeddings": True},
        ),
        (OLMO_2_13B, {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}),
        (GRANITE_31_2B, {"query_scale": 0.125, "logits_scaling": 8.0, "embedding_multiplier": 12 / 0.22}),
        (GRANITE_33_8B, {"query_scale": 0.0078125 * 128**0.5, "logits_scaling": 16.0, "rms_norm_eps": 1e-5 / 0.22**2}),
        (PHI_4_MINI, {"head_dim": 128, "rotary_dim": 96, "tie_word_embeddings": True, "num_key_value_heads": 8}),
    ],
)
def test_configs_of_real_models(config, want):
    got = config_from_hf(text_part(config))
    assert {name: getattr(got, name) for name in want} == want


@pytest.mark.parametrize("config", [PHI_3_MINI_128K, PHI_35_MINI, PHI_4_MINI])
def test_longrope_of_real_models(config):
    for rope, factors in zip(config_from_hf(config).ropes, LONG.values(), strict=True):
        assert (rope.rope_type, rope.original_max_position_embeddings, rope.factors) == (
            "longrope",
            4096,
            tuple(factors),
        )
        assert rope.frequencies(96, 131072)[1] == pytest.approx(1.190238)  # sqrt(1 + ln 32 / ln 4096)


@pytest.mark.parametrize(
    "config, changes, words",
    [
        (PHI_4_MINI, {"interpolate_factor": 2}, ["interpolate_factor = 2"]),
        (PHI_4_MINI, {"lm_head_bias": True}, ["lm_head_bias"]),
        (PHI_4_MINI, {"partial_rotary_factor": 0.5}, ["short_factor with 48 numbers", "32"]),
        (PHI_4_MINI, {"partial_rotary_factor": 1.5}, ["partial_rotary_factor = 1.5"]),
        (PHI_4, {"rope_parameters": {"partial_rotary_factor": "x"}}, ["partial_rotary_factor = 'x'"]),
        (PHI_4, {"rope_parameters": {"partial_rotary_factor": 1e9}}, ["partial_rotary_factor = 1000000000.0"]),
        (PHI_4, {"partial_rotary_factor": 0.0}, ["partial_rotary_factor = 0.0"]),
        (PHI_4, {"partial_rotary_factor": 0.54}, ["partial_rotary_factor = 0.54", "69 of the 128", "even"]),
        (PHI_4_MINI, {"rope_scaling": LONG | {"type": "longrope", "long_factor": [1.0] * 47}}, ["long_factor", "47"]),
        (PHI_4_MINI, {"rope_scaling": LONG | {"type": "longrope", "long_factor": [0.0] * 48}}, ["long_factor[0] = 0"]),
        (PHI_4_MINI, {"rope_scaling": LONG | {"type": "longrope", "long_factor": 2.0}}, ["long_factor"]),
        (PHI_4_MINI, {"rope_scaling": {"type": "longrope"}}, ["short_factor, long_factor"]),
        (GEMMA_3_1B, {"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
        (GEMMA_3_1B, {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        (GEMMA_3_1B, {"hidden_activation": "silu"}, ["hidden_activation 'silu'"]),
        (GEMMA_3_1B, {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar = 0"]),
        (GEMMA_3_1B, {"sliding_window": None}, ["sliding_window"]),
        (GEMMA_3_1B, {"sliding_window_pattern": 0}, ["sliding_window_pattern = 0"]),
        (GEMMA_3_1B, {"rope_parameters": {"sliding_attention": 5}}, ["sliding_attention = 5"]),
        (GEMMA_3_4B, {"text_config": 5}, ["text_config = 5"]),
        (SMOLLM3_3B, {"no_rope_layers": [1, 0]}, ["no_rope_layers = [1, 0]", "36"]),
        (SMOLLM3_3B, {"no_rope_layers": [2] * 36}, ["no_rope_layers", "0 or 1"]),
        (SMOLLM3_3B, {"no_rope_layer_interval": 0}, ["no_rope_layer_interval = 0"]),
        (OLMO_2_13B, {"clip_qkv": 8.0}, ["clip_qkv"]),
        (GRANITE_31_2B, {"residual_multiplier": 0.0}, ["residual_multiplier = 0.0"]),
        (GRANITE_31_2B, {"logits_scaling": "8"}, ["logits_scaling = '8'"]),
    ],
)
def test_what_does_not_fit_is_refused(config, changes, words):
    with pytest.raises(ValueError) as caught:
        config_from_hf(text_part(config | changes))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
