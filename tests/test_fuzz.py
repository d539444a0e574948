"""Folders with one or two things wrong, by the thousand: loading either works or says in one line what is the matter.

Structure-aware: a value anywhere in the JSON files, or in the header of the safetensors file, becomes another. The
tests draw a few hundred; by hand, `FUZZ=100000 python -m pytest tests/test_fuzz.py` draws more, and other ones.
"""

import copy
import json
import os
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripted import add_tokenizer

import checkpoint
from formats import Quantized, Scheme, pack
from input_folder import default_sampling
from sampling import SamplingParams
from tokenizer import Tokenizer

COUNT, SEED = int(os.environ.get("FUZZ", "300")), 0 if "FUZZ" not in os.environ else random.randrange(1 << 32)
WEIRD = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1 << 31, 1 << 63, 10**400, 0.0, 0.5, -0.5, 1e-300, 1e300, float("inf"),
    float("nan"), "", "x", "-1", "7", "re:(", "re:.*", "\x1b[2J", "\ud800", "<s>", [], [0], [1, "x"], [[]], ["x"], {},
    {"a": 1}, {"content": "<s>"}, {"content": 3}, "I64", "F32", "float32", "default", "yarn", "gptq", "dynamic",
]  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False, "dynamic": {"-:.*x": {}}}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*x"],
          "kv_cache_scheme": None, "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None,
          "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                      "group_size": 16}}}}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 32, "beta_slow": 1, "attn_factor": 1.0,
        "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "partial_rotary_factor": 0.75}  # fmt: skip
LOCAL = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}  # fmt: skip
SCALES = {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.2, "logits_scaling": 4.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


def paths(value, at=()):
    """Every place in a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def mutated(value, rng):
    value = copy.deepcopy(value)
    *way, last = rng.choice([path for path in paths(value) if path])
    inner = value
    for key in way:
        inner = inner[key]
    action = rng.randrange(6)
    if action == 0:
        del inner[last]
    elif action == 1 and isinstance(inner, dict):
        inner[rng.choice(["x", "\x1b[31m", "num_experts", "_x", "layer_types", "eos_token", str(last) + "_"])] = (
            inner.pop(last)
        )
    elif action == 2 and isinstance(inner[last], int | float):
        inner[last] = inner[last] * rng.choice([0, -1, 2, 0.5, 1000])
    else:
        inner[last] = rng.choice(WEIRD)
    return value


def rounded(folder: Path, form: str) -> None:
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim != 2 or name.startswith(("lm_head", "model.embed")):
            tensors[name] = weight
            continue
        q, scale = torch.randint(-8, 8, weight.shape, dtype=torch.int8), torch.rand(len(weight), weight.shape[1] // 16)
        parts = pack(Quantized(q, scale), Scheme(form, 4, 16, True))
        tensors |= {f"{name.removesuffix('weight')}{s}": t.contiguous() for s, t in parts.items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def folders(tiny):
    made = []
    for kind, changes, form, config in (
        ("llama", {"rope_parameters": YARN}, None, None),
        ("qwen3_moe", EXPERTS, None, None),
        ("mistral", {"sliding_window": 8}, "gptq", GPTQ),
        ("qwen2", {"tie_word_embeddings": True}, "pack-quantized", PACKED),
        ("phi3", {"rope_parameters": LONGROPE, "partial_rotary_factor": 0.75, "pad_token_id": 0}, "gptq", GPTQ),
        ("gemma3_text", LOCAL, None, None),
        ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": 0}, None, None),
        ("olmo2", {}, "pack-quantized", PACKED),
        ("granite", SCALES, None, None),
    ):
        folder = tiny(kind, vocab_size=259, **changes)[0]
        add_tokenizer(folder, temperature=0.6, top_k=20, top_p=0.9, min_p=0.0, eos_token_id=[257, 258], do_sample=True)
        if form:
            rounded(folder, form)
            hf = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
            (folder / "config.json").write_text(json.dumps(hf))
        made.append(folder)
    return made


def used(folder: Path) -> str:
    """ "" where the folder loads, else the line that says why not."""
    try:
        checkpoint.load(str(folder))
        default_sampling(folder, SamplingParams, None)
        Tokenizer.from_folder(folder).encode("Once upon a time")
    except (ValueError, FileNotFoundError) as error:
        assert str(error).isprintable() and len(str(error)) < 2000
        assert not re.search("(Type|Attribute|Key|Index|Overflow|ZeroDivision)Error", str(error))
        return str(error)
    return ""


def test_json_values(folders, capsys, monkeypatch):
    monkeypatch.setattr("tokenizer.try_tokenizer", lambda path: None)  # which takes a process; the next test has it
    rng, refused = random.Random(SEED), 0
    for _ in range(COUNT):
        folder = rng.choice(folders)
        name = rng.choice(["config.json"] * 5 + ["generation_config.json", "tokenizer_config.json"])
        path = folder / name
        whole = path.read_text()
        value = mutated(json.loads(whole), rng)
        value = mutated(value, rng) if rng.random() < 0.3 and value else value
        try:
            path.write_text(text := json.dumps(value))
            line = used(folder)
            refused += bool(line)
        except BaseException:
            print(folder, name, text)
            raise
        finally:
            path.write_text(whole)
    assert 0.2 * COUNT < refused < 0.95 * COUNT


def test_headers(folders, monkeypatch):
    monkeypatch.setattr("tokenizer.try_tokenizer", lambda path: None)
    rng, refused = random.Random(SEED), 0
    for _ in range(COUNT // 3):
        path = rng.choice(folders) / "model.safetensors"
        whole = path.read_bytes()
        (size,) = struct.unpack("<Q", whole[:8])
        header = json.dumps(mutated(json.loads(whole[8 : 8 + size]), rng)).encode()
        try:
            path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + size :])
            line = used(path.parent)
            refused += bool(line)
        except BaseException:
            print(path, header[:3000])
            raise
        finally:
            path.write_bytes(whole)
    assert refused > 0.5 * (COUNT // 3)


def test_tokenizer_files(folders, capfd):
    rng = random.Random(SEED)
    for _ in range(COUNT // 15):
        path = rng.choice(folders) / "tokenizer.json"
        whole = path.read_text("utf-8")
        value = json.loads(whole)
        try:
            path.write_text(text := json.dumps(mutated(value, rng)), "utf-8")
            used(path.parent)
        except BaseException:
            print(path, text[:3000])
            raise
        finally:
            path.write_text(whole, "utf-8")
    assert capfd.readouterr().err.count("panicked") == 0
