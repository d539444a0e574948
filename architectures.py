"""config.json of every supported `model_type` -> `ModelConfig`, and the named public shapes.

Knows the dialects of config.json. Refuses to know tensors, files and devices.
"""

from collections.abc import Mapping
from typing import Any

from model import ModelConfig, Rope

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")

# keys of config.json that do not change the mathematics of inference; every other key is either read below or refused
_HARMLESS = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout attn_implementation auto_map
    bos_token_id chunk_size_feed_forward decoder_start_token_id dtype embd_pdrop eos_token_id finetuning_task
    id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id max_new_tokens
    max_sequence_length model_max_length name num_return_sequences output_attentions output_hidden_states
    output_router_logits pad_token_id padding_side prefix pretraining_tp problem_type quantization_config
    resid_pdrop return_dict router_aux_loss_coef router_jitter_noise sep_token_id task_specific_params
    temperature tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16
    use_cache vocab_size_override
    """.split()
)


def rope_from_hf(config: Mapping[str, Any]) -> Rope:
    """Old spelling (rope_theta, rope_scaling with type or rope_type) and new (rope_parameters). ValueError for what
    is unknown.
    """
    raw = {k: v for k, v in (config.get("rope_scaling") or {}).items() if v is not None}
    raw |= {k: v for k, v in (config.get("rope_parameters") or {}).items() if v is not None}
    legacy_type = raw.pop("type", "default")
    raw.setdefault("rope_type", legacy_type)
    raw.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    least = dict.fromkeys(("mscale", "mscale_all_dim"), -1) | {"rope_theta": 1}
    if raw["rope_type"] not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise ValueError(
            f"rope_type {raw['rope_type']!r} is not supported; default, linear, dynamic, llama3 and yarn are"
        )
    scaled = {"linear": ["factor"], "yarn": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
    if absent := [k for k in scaled.get(raw["rope_type"], []) if k not in raw]:
        raise ValueError(f"rope_type {raw['rope_type']!r} needs {', '.join(absent)}, which config.json does not give")
    if raw.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1.0 is not supported")
    if unknown := sorted(set(raw) - set(Rope.__dataclass_fields__)):
        raise ValueError(f"rope_scaling has keys that are not implemented: {', '.join(unknown)}")
    if type(raw.get("truncate", True)) is not bool:
        raise ValueError(f"rope_scaling has truncate = {raw['truncate']!r}; it must be true or false")
    numbers = {k: v for k, v in raw.items() if k not in ("rope_type", "truncate")}
    if wrong := [
        f"{k} = {v!r}"
        for k, v in numbers.items()
        if type(v) not in (int, float) or not least.get(k, 0) < v < float("inf")
    ]:
        raise ValueError(f"config.json has {', '.join(wrong)}; numbers above 0 are needed (rope_theta: above 1)")
    if raw["rope_type"] == "llama3" and raw["low_freq_factor"] >= raw["high_freq_factor"]:
        raise ValueError("rope_scaling has a low_freq_factor that is not below its high_freq_factor")
    return Rope(**raw)


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig. ValueError naming an unsupported architecture, a missing key, or a key that is
    not implemented.
    """
    reader = _Reader(config)
    kind = reader("model_type", "")
    if kind not in SUPPORTED:
        raise ValueError(f"model_type {kind!r} is not supported; supported are {', '.join(SUPPORTED)}")
    moe = kind in ("mixtral", "qwen3_moe")
    hidden, layers, heads = reader("hidden_size"), reader("num_hidden_layers"), reader("num_attention_heads")
    if reader("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; silu is")
    attention_bias = reader("attention_bias", False)
    experts = (
        (reader("num_local_experts", 0, 0) or reader("num_experts", 8 if kind == "mixtral" else 128)) if moe else 0
    )
    intermediate = reader("intermediate_size")
    result = ModelConfig(
        model_type=kind,
        vocab_size=reader("vocab_size"),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=reader("num_key_value_heads", heads),
        head_dim=reader("head_dim", hidden // heads),
        rms_norm_eps=reader("rms_norm_eps", 1e-5 if kind == "mixtral" else 1e-6),
        max_position_embeddings=reader("max_position_embeddings", 2048 if kind == "llama" else 32768),
        rope=rope_from_hf(
            {"rope_theta": reader("rope_theta", 1e6 if kind == "mixtral" else 1e4)}
            | {k: reader(k, None) for k in ("rope_scaling", "rope_parameters")}
        ),
        tie_word_embeddings=reader("tie_word_embeddings", False),
        qkv_bias=True if kind == "qwen2" else attention_bias,
        o_bias=False if kind == "qwen2" else attention_bias,
        mlp_bias=reader("mlp_bias", False),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        windows=_windows(reader, kind, layers),
        sparse=_sparse_layers(reader, layers) if moe else (False,) * layers,
        num_experts=experts,
        num_experts_per_tok=reader("num_experts_per_tok", 2 if kind == "mixtral" else 8) if moe else 0,
        moe_intermediate_size=(intermediate if kind == "mixtral" else reader("moe_intermediate_size")) if moe else 0,
        norm_topk_prob=kind == "mixtral" or (moe and reader("norm_topk_prob", False)),
    )
    reader.finish()
    return result


class _Reader:
    """Reads keys of a config and remembers which, so that a key nobody read can be refused. A value has the type of its
    default, an object where that is None, an integer where there is none.
    """

    KINDS: dict[type, tuple[tuple[type, ...], str]] = {
        int: ((int,), "an integer"),
        float: ((int, float), "a number, 0 or more"),
        bool: ((bool,), "true or false"),
        str: ((str,), "a string"),
        tuple: ((list, tuple), "a list"),
        type(None): ((dict,), "an object"),
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.seen = config, set(_HARMLESS)

    def __call__(self, key: str, default: Any = ..., low: int = 1) -> Any:  # noqa: ANN401
        """An integer is at least `low`; others are positive or, as epsilon may be, 0."""
        self.seen.add(key)
        value = self.config.get(key)
        if value is None and default is ...:
            raise ValueError(f"config.json has no {key!r}")
        if value is None:
            return default
        types, what = self.KINDS[int if default is ... else type(default)]
        if what == "an integer":
            what, ok = f"an integer from {low} to 2147483647", type(value) is int and low <= value < 1 << 31
        else:
            ok = type(value) in types and (float not in types or 0 <= value < float("inf"))
        if not ok:
            raise ValueError(f"config.json has {key} = {value!r}; it must be {what}")
        return value

    def finish(self) -> None:
        unknown = [k for k, v in self.config.items() if k not in self.seen and v not in (None, False)]
        if unknown:
            raise ValueError(
                "config.json has keys that may change the mathematics and are not implemented: "
                f"{', '.join(sorted(unknown))}; "
                "delete them from config.json only if you know they do not matter"
            )


def _windows(reader: _Reader, kind: str, layers: int) -> tuple[int, ...]:
    """Sliding window per layer: Mistral's on all layers; Qwen's only if switched on, by layer_types or from
    max_window_layers up.
    """
    absent = 0 if "sliding_window" in reader.config or kind == "mixtral" else 4096  # null is none; absent, the default
    window = reader("sliding_window", absent, 0)
    first, types = reader("max_window_layers", 28, 0), reader("layer_types", ())
    if not reader("use_sliding_window", kind in ("mistral", "mixtral")) or kind == "llama":
        window = 0
    if unknown := sorted({str(t) for t in types if t not in ("full_attention", "sliding_attention")}):
        raise ValueError(
            f"layer_types {', '.join(unknown)} are not supported; full_attention and sliding_attention are"
        )
    if types and len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries and num_hidden_layers is {layers}")
    if types:
        return tuple(window if t == "sliding_attention" else 0 for t in types)
    return tuple(window if kind not in ("qwen2", "qwen3") or i >= first else 0 for i in range(layers))


def _sparse_layers(reader: _Reader, layers: int) -> tuple[bool, ...]:
    step, dense = reader("decoder_sparse_step", 1), reader("mlp_only_layers", ())
    if wrong := [i for i in dense if type(i) is not int]:
        raise ValueError(f"config.json has mlp_only_layers with {wrong[0]!r}; they must be numbers of layers")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


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
    "tiny": ("llama", 256, 512, 2, 4, 2, 64, 512, 1024, 1e4, False),
}


def shape_json(name: str) -> dict[str, Any]:
    """What config.json says of a named public shape. ValueError lists the names."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is not known; known are {', '.join(SHAPES)}")
    kind, hidden, mlp, layers, heads, kv_heads, head_dim, vocab, context, theta, tied, *moe = SHAPES[name]
    hf: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
    }
    hf |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab}
    hf |= {"max_position_embeddings": context, "rope_theta": theta, "tie_word_embeddings": tied}
    if moe:
        hf |= {"num_local_experts": moe[0], "num_experts_per_tok": moe[1]}
    if kind == "qwen3_moe":
        hf |= {"moe_intermediate_size": mlp, "norm_topk_prob": True}
    return hf


def shape_config(name: str) -> ModelConfig:
    """The config of a named public shape. ValueError lists the names."""
    return config_from_hf(shape_json(name))
