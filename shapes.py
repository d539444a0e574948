"""Public models by name, for random weights: their sizes, as config.json and as a `ModelConfig`.

Knows sizes. Refuses to know how config.json is read (`architectures.py`).
"""

from typing import Any

from architectures import config_from_hf
from model import ModelConfig

# name -> model_type, hidden, MLP, layers, heads, KV heads, head dim, vocabulary, context, rope_theta, tied, (experts,
# per token)
SHAPES: dict[str, tuple[Any, ...]] = {
    "llama-2-7b": ("llama", 4096, 11008, 32, 32, 32, 128, 32000, 4096, 1e4, False),
    "llama-2-13b": ("llama", 5120, 13824, 40, 40, 40, 128, 32000, 4096, 1e4, False),
    "llama-2-70b": ("llama", 8192, 28672, 80, 64, 8, 128, 32000, 4096, 1e4, False),
    "codellama-34b": ("llama", 8192, 22016, 48, 64, 8, 128, 32000, 16384, 1e6, False),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, 5e5, False),
    "llama-3.1-70b": ("llama", 8192, 28672, 80, 64, 8, 128, 128256, 131072, 5e5, False),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, 5e5, True),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, 131072, 5e5, True),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 32768, 1e6, False),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 131072, 1e6, False),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, 1e6, True),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 40960, 1e6, False),
    "qwen3-32b": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, 40960, 1e6, False),
    "mixtral-8x7b": ("mixtral", 4096, 14336, 32, 32, 8, 128, 32000, 32768, 1e6, False, 8, 2),
    "qwen3-30b-a3b": ("qwen3_moe", 2048, 768, 48, 32, 4, 128, 151936, 40960, 1e6, False, 128, 8),
    "phi-4-mini": ("phi3", 3072, 8192, 32, 24, 8, 128, 200064, 131072, 1e4, True),
    "gemma-3-4b": ("gemma3_text", 2560, 10240, 34, 8, 4, 256, 262208, 131072, 1e6, True),
    "tiny": ("llama", 256, 512, 2, 4, 2, 64, 512, 1024, 1e4, False),
}


def shape_json(name: str) -> dict[str, Any]:
    """What config.json says of a named public shape. ValueError lists the names."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is not known; known are {', '.join(SHAPES)}")
    kind, hidden, mlp, layers, heads, kv_heads, head_dim, vocab, context, theta, tied, *moe = SHAPES[name]
    hf = {"model_type": kind, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    hf |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab}
    hf |= {"max_position_embeddings": context, "rope_theta": theta, "tie_word_embeddings": tied}
    if moe:
        hf |= {"num_local_experts": moe[0], "num_experts_per_tok": moe[1]}
    if kind == "qwen3_moe":
        hf |= {"moe_intermediate_size": mlp, "norm_topk_prob": True}
    if kind == "phi3":
        scaling = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
        hf |= {"partial_rotary_factor": 0.75, "rope_scaling": scaling}
    if kind == "gemma3_text":
        hf |= {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    return hf


def shape_config(name: str) -> ModelConfig:
    """The config of a named public shape. ValueError lists the names."""
    return config_from_hf(shape_json(name))
