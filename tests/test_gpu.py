"""What only a GPU can show: kernels inside the whole model, captured graphs, long caches, speculation on the device."""

import pytest
import torch

import architectures
import checkpoint
import decode_kernels
from engine import DEFAULT_CHECKPOINT, Engine
from linear import Linear, RMSNorm, from_linear
from model import KVCache
from sampling import SamplingParams
from speculative import Speculation
from tokenizer import Ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GREEDY = SamplingParams(temperature=0.0)
tales = pytest.mark.skipif(not DEFAULT_CHECKPOINT.is_dir(), reason="needs the embedded checkpoint")

KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "norm_topk_prob": True},
    "phi3": {"partial_rotary_factor": 0.75},
    "gemma3_text": {"sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 100},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "granite": {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.22},
}


def config_of(kind: str):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 1000, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    return architectures.config_from_hf({"model_type": kind} | sizes | heads | KINDS[kind])


def run(engine: Engine, prompts, n: int, sampling: SamplingParams = GREEDY) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in prompts]
    for piece in engine.generate(prompts, sampling, max_new_tokens=n, ignore_eos=True):
        ids[piece.row] += piece.ids
    return ids


def same_but_for_rounding(engine: Engine, prompts, a, b) -> None:
    """Rows part, if at all, where the logits of their two tokens are closer than a few roundings of bf16."""
    for prompt, x, y in zip(prompts, a, b):
        assert len(x) == len(y)
        at = next((i for i, (s, t) in enumerate(zip(x, y)) if s != t), None)
        if at is not None:
            ids = engine.encode([prompt])[0] + x[:at]
            engine.reserve(1, len(ids))
            logits = engine.prefill([ids])[0].float()
            assert abs(logits[x[at]] - logits[y[at]]) < 2**-6 * logits.abs().max(), (prompt, at)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_in_the_whole_model(kind, bits):
    """Decode steps of 1..16 rows through the kernels and through plain PyTorch give the same logits.

    Experts in float16: bf16's rounding alone sends one step in eight of such a model to other experts.
    """
    torch.manual_seed(0)
    device, config = torch.device("cuda"), config_of(kind)
    dtype = torch.float16 if config.num_experts else torch.bfloat16
    model = checkpoint.random_model(config, bits=bits, device=device, dtype=dtype)
    for batch, new in ((1, 1), (2, 1), (3, 5), (1, 16)):
        tokens = torch.randint(0, 1000, (batch, 40 + new), device=device)
        positions = torch.arange(40 + new, device=device).repeat(batch, 1)
        logits = []
        for on in (False, True):
            decode_kernels.use_(model, on)
            cache = KVCache(config, batch, 128, device, dtype)
            model(tokens[:, :40], positions[:, :40], cache, end=40)
            logits.append(model(tokens[:, 40:], positions[:, 40:], cache, end=128).float())
        error = (logits[1] - logits[0]).norm() / logits[0].norm()
        assert error < 3e-2, (batch, new, float(error))


SHAPES = {
    "qkv": (4096, 12288),
    "o": (4096, 4096),
    "gate_up": (4096, 22016),
    "down": (11008, 4096),
    "small": (2048, 3072),
}


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 9, 16])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_tiles_of_real_shapes(name, bits, rows):
    """Those of Llama-2-7B: smaller matrices get other tiles."""
    torch.manual_seed(rows)
    cuda, (k, n) = {"device": torch.device("cuda"), "dtype": torch.bfloat16}, SHAPES[name]
    plain, norm = Linear(k, n, **cuda), RMSNorm(k, 1e-5, **cuda)
    plain.weight.normal_(std=0.02)
    norm.weight.uniform_(0.5, 1.5)
    linear, silu_mul = plain if bits == 16 else from_linear(plain, bits), name == "gate_up"
    x, first = torch.randn(rows, k, **cuda), silu_mul or name == "qkv"
    residual = None if first else torch.randn(rows, n, **cuda)
    wanted, norm = Linear(k, n, device=cuda["device"]), norm if first else None
    wanted.weight.copy_(linear.dequantize(torch.float32))
    decode_kernels.use_(linear)
    got = linear.fast(linear, x, norm, residual, silu_mul, None)
    gain = norm and RMSNorm(k, 1e-5, cuda["device"])
    if gain is not None:
        gain.weight.copy_(norm.weight)
    wanted = wanted(x.float(), norm=gain, residual=None if residual is None else residual.float(), silu_mul=silu_mul)
    assert (got - wanted).norm() < 8e-3 * wanted.norm()


@tales
def test_float32_on_the_gpu_says_what_the_cpu_says():
    cpu, gpu = (Engine.load(device=d, dtype="float32", compile=False) for d in ("cpu", "cuda"))
    assert run(gpu, ["Once upon a time"], 80) == run(cpu, ["Once upon a time"], 80)


@tales
def test_a_captured_step_is_the_eager_step():
    prompts = ["Once upon a time", "The old king"]
    eager, captured = (Engine.load(device="cuda", compile=c) for c in (False, True))
    for batch in ([prompts[0]], prompts):
        same_but_for_rounding(eager, batch, run(captured, batch, 60), run(eager, batch, 60))


@tales
def test_a_long_cache_changes_nothing():
    engines = [Engine.load(device="cuda") for _ in range(2)]
    engines[1].reserve(1, 1024, 130_048)
    prompts = ["Once upon a time"]
    same_but_for_rounding(engines[0], prompts, *(run(engine, prompts, 60) for engine in engines))


def engines(draft: str, k: int | None, dtype: str) -> tuple[Engine, Engine]:
    """Without and with speculation."""
    name = str(DEFAULT_CHECKPOINT) + "-draft" if draft == "model" else draft
    fast = Engine.load(device="cuda", dtype=dtype, draft=name, num_draft_tokens=k)
    return Engine.load(device="cuda", dtype=dtype), fast


@tales
def test_greedy_speculation_on_the_gpu():
    """In float32, which has no kernels here and is slow to compile: one case; test_speculative.py has the others."""
    plain, fast = engines("model", 4, "float32")
    prompts = ["Once upon a time", "The old king"]
    assert run(fast, prompts, 120) == run(plain, prompts, 120)
    assert 0 < fast.speculation.acceptance()[1] < 4


@tales
@pytest.mark.parametrize("draft", ["model", "ngram", "self-int4", "self-int8"])
@pytest.mark.parametrize("k", [4, None])
def test_speculation_parts_only_where_rounding_decides(monkeypatch, draft, k):
    def milliseconds(self, programs, position):  # so small a model is so fast here that `auto` would not draft
        drafts = len(programs) - len(self.choices)
        return [0.1 if i < drafts else 1.0 for i in range(len(programs))]

    monkeypatch.setattr(Speculation, "_milliseconds", milliseconds)
    plain, fast = engines(draft, k, "bfloat16")
    prompts = ["Once upon a time", "The old king"]
    ids = run(fast, prompts, 120)
    assert fast.speculation.acceptance()[0], str(fast.speculation.costs)
    same_but_for_rounding(plain, prompts, ids, run(plain, prompts, 120))


def test_quantized_random_model_decodes_through_the_engine():
    config = config_of("llama")
    model = checkpoint.random_model(config, bits=4, device=torch.device("cuda"))
    engine = Engine(model, Ids(config.vocab_size))
    ids = run(engine, [[1, 2, 3]], 50, SamplingParams(0.8, 50))[0]
    assert len(ids) == 50
    assert all(0 <= i < 1000 for i in ids)
