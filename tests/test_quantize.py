"""quantize.py as a command: folders that the ecosystem loads, a report that is true, and nothing half-written."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import generate
import gptq
import output_folder
import quantize
from engine import Engine
from formats import QuantConfig, suffixes, unpack
from linear import Int4Linear, Int8Linear, Linear
from model import KVCache

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
FIXTURES = Path(__file__).parent / "fixtures"
STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
TEXT = " ".join(f"The {a} {b} saw {c} {d}s by the {e} river." for a, b, c, d, e in zip(
    *[random.Random(i).choices(words.split(), k=400) for i, words in enumerate(
        ("old young tall red quiet", "fox woman king bear child", "two three seven many no", "stone house bird",
         "long cold silver", ))]))  # fmt: skip
COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 128, "bos_token_id": 256}
COMMON |= {"eos_token_id": 257, "tie_word_embeddings": False, "head_dim": 16}


def save_model(folder, kind="Llama", dtype=torch.float32, **changes):
    """A random model of transformers with a byte-level tokenizer, as a folder from the Hub would be."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(COMMON | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    for weight in model.parameters():
        weight.data.mul_(3)  # logits that mean something
    model.save_pretrained(folder)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.add_special_tokens(["<s>", "</s>"])
    words.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("Do as you like.")
    (folder / "notes.bin").write_text("not for copying")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def arguments(source, output, text, mode="int4", *more):
    common = ["--checkpoint", str(source), "--output", str(output), "--mode", mode, "--calibration", str(text)]
    common += ["--heldout", str(text), "--heldout-tokens", "2048", "--rows", "16"]
    return common + (["--group-size", "32"] if "--group-size" not in more else []) + list(more)


def rounding(source, output):
    """Arguments of a run that reads no text."""
    return ["--checkpoint", str(source), "--output", str(output), "--mode", "int4", "--group-size", "32"]


def run(source, output, text, mode="int4", *more):
    assert quantize.main(arguments(source, output, text, mode, *more)) == 0
    return json.loads((output / "quantization_report.json").read_text())


def logits(folder, tokens):
    model = checkpoint.load(str(folder))
    B, T = tokens.shape
    cache = KVCache(model.config, B, T, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        return model(tokens, torch.arange(T).expand(B, T), cache, end=T)


def fails(capsys, argv, *words):
    """The command ends with exit status 2 and one line on standard error that holds the words."""
    try:
        status = quantize.main(argv)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.startswith("quantize.py: error: "), error
    for word in words:
        assert word in error
    return error


def leftovers(folder):
    return [p.name for p in folder.iterdir()]


MODES = [("int8", ()), ("int8", ("--group-size", "-1")), ("int8-gptq", ()), ("int4", ()), ("int4-gptq", ())]
MODES += [("int4-gptq", ("--act-order", "--no-clip-search"))]


@pytest.mark.parametrize("mode,more", MODES)
def test_transformers_loads_what_is_written(mode, more, tiny, text, tmp_path):
    pytest.importorskip("compressed_tensors")
    run(tiny, tmp_path / "out", text, mode, *more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    got = logits(tmp_path / "out", tokens)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    unquantized = logits(tiny, tokens)
    assert 1e-4 < (got - unquantized).norm() / unquantized.norm() < 0.7  # it is quantized, and still this model


KINDS = [
    ("Llama", {}, ["--quantize-head"]),
    ("Llama", {"tie_word_embeddings": True}, ["--quantize-head"]),
    ("Llama", {"tie_word_embeddings": True}, ["--quantize-head", "8"]),
    ("Llama", {}, ["--skip", "*.1.*", "*.k_proj"]),
    ("Qwen2", {}, []),
    ("Qwen3", {}, []),
    ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, []),
    ("Qwen3Moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, []),
]


def agreed(folder):
    """Tokens, and transformers' logits of them from this folder, which must be this project's too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert (logits(folder, tokens) - expected).abs().max() <= 1e-4 * expected.abs().max()
    return tokens, expected


@pytest.mark.parametrize("kind,changes,more", KINDS)
def test_transformers_loads_every_architecture(kind, changes, more, text, tmp_path):
    pytest.importorskip("compressed_tensors")
    source = save_model(tmp_path / "source", kind, **changes)
    run(source, tmp_path / "out", text, "int4", *more)
    tokens, expected = agreed(tmp_path / "out")
    assert (logits(source, tokens) - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("mode", ["int8", "int8-gptq", "int4", "int4-gptq"])
def test_both_formats_hold_the_same_weights(mode, tiny, text, tmp_path):
    for form in ("compressed-tensors", "gptq"):
        run(tiny, tmp_path / form, text, mode, "--format", form)
    tokens = torch.randint(0, 256, (1, 30))
    assert torch.equal(logits(tmp_path / "gptq", tokens), logits(tmp_path / "compressed-tensors", tokens))
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == config["checkpoint_format"] == "gptq" and config["sym"] is True


@pytest.mark.parametrize("case", ["llm-compressor-w4a16", "llm-compressor-w4a16-act-order"])
def test_reads_folders_of_llm_compressor(case):
    expected = load_file(FIXTURES / case / "expected.safetensors")
    got = logits(FIXTURES / case, expected["tokens"])
    assert (got - expected["logits"]).abs().max() <= 1e-4 * expected["logits"].abs().max()


def test_folder_is_complete_and_runs(tiny, text, tmp_path, capsys):
    run(tiny, tmp_path / "out", text)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "quantization_report.json",
    }  # fmt: skip
    assert leftovers(tmp_path) == ["out"]
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in (tmp_path / "out").iterdir())
    capsys.readouterr()
    argv = ["--checkpoint", str(tmp_path / "out"), "--prompt", "The old fox", "--max-new-tokens", "4", "--no-compile"]
    assert generate.main(argv) == 0 and capsys.readouterr().out


def test_report_is_true(tiny, text, tmp_path, capsys):
    report = run(tiny, tmp_path / "out", text, "int4-gptq")
    rows = {row["name"]: row for row in report["layers"]}
    assert list(rows)[:4] == [f"layers.0.{m}_proj" for m in ("self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down")]
    assert len(rows) == 8 and report["calibration_tokens"] == 16 * 128 == rows["layers.1.mlp.down_proj"]["tokens"]
    assert sum(row["output_error"] < row["output_error_rtn"] for row in rows.values()) >= 7
    # The errors, again from the files: the first Linear's input is not changed by any quantization.
    weights, names = load_file(tiny / "model.safetensors"), ("q_proj", "k_proj", "v_proj")
    before = torch.cat([weights[f"model.layers.0.self_attn.{n}.weight"] for n in names])
    after = checkpoint.load(str(tmp_path / "out")).layers[0].self_attn.qkv_proj.dequantize(torch.float32)
    first = rows["layers.0.self_attn.qkv_proj"]
    assert first["weight_error"] == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-4)
    assert first["shape"] == [128, 64] and first["seconds"] > 0 and first["notes"] == []
    assert report["bytes_after"] == (tmp_path / "out" / "model.safetensors").stat().st_size < report["bytes_before"]
    shown = capsys.readouterr().out
    assert "2048 tokens in 16 rows of 128" in shown and "layers.1.mlp.down_proj" in shown and "perplexity" in shown


@pytest.mark.parametrize("mode", ["int8", "int4-gptq"])
def test_streamed_perplexity_is_that_of_the_whole_model(mode, tiny, text, tmp_path):
    report = run(tiny, tmp_path / "out", text, mode, "--heldout-tokens", "1024")
    tokenizer = quantize.Tokenizer.from_folder(tiny)
    rows = quantize.text_rows(text, tokenizer, checkpoint.load(str(tiny)).config, 8, 128)
    for folder, when in ((tiny, "before"), (tmp_path / "out", "after")):
        engine = Engine.load(str(folder), device="cpu", compile=False)
        whole = float(engine.score(rows).mean().neg().exp())
        assert report[f"perplexity_{when}"] == pytest.approx(whole, rel=1e-4)
    p, q = (logits(folder, rows)[:, :-1].flatten(0, 1).log_softmax(-1) for folder in (tiny, tmp_path / "out"))
    kl = (p.exp() * (p - q)).sum(-1)
    assert report["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert report["kl_99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert report["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=0.002)


@pytest.mark.parametrize("inputs", [1, 3, 10, 64])
def test_hessians(inputs):
    linear, x = Linear(inputs, 3), torch.randn(2, 7, inputs)
    linear.weight.data.zero_()

    def run():
        for row in x:
            with contextlib.suppress(quantize.Enough):
                linear(row)

    (found,), counts = quantize.hessians(linear, run, [])
    rows = x.flatten(0, 1)
    assert counts == [14] and torch.allclose(found, rows.T @ rows / 14, atol=1e-5) and torch.equal(found, found.T)


def test_the_last_linear_of_a_half_is_computed_from_what_it_saw(tiny, text, tmp_path, monkeypatch):
    """That saves a pass over the half, and changes no byte. What follows a Linear that is left out is computed anew."""
    names, files, passes = ("kept", "anew"), {}, {}
    hessians, run_half = quantize.hessians, quantize.Streams.run

    def counted(self, half, xs, keep=True):
        passes[name] = passes.get(name, 0) + keep
        run_half(self, half, xs, keep)

    def forgotten(linear, run, last):
        return hessians(linear, run, [])

    monkeypatch.setattr(quantize.Streams, "run", counted)
    for name in names:
        run(tiny, tmp_path / name, text, "int4-gptq")
        files[name] = (tmp_path / name / "model.safetensors").read_bytes()
        monkeypatch.setattr(quantize, "hessians", forgotten)
    assert files["kept"] == files["anew"] and passes == {"kept": 8, "anew": 12}  # of two blocks; 8 for held-out text


def test_heldout_may_be_one_row_but_not_none(tiny, text, tmp_path, capsys):
    report = run(tiny, tmp_path / "out", text, "int8", "--heldout-tokens", "100")
    assert report["heldout_tokens"] == 128 and report["perplexity_after"] > 1
    (tmp_path / "short.txt").write_text("Once")
    capsys.readouterr()
    argv = arguments(tiny, tmp_path / "no", text, "int8", "--heldout", str(tmp_path / "short.txt"))
    fails(capsys, argv, "short.txt gives 4 tokens", "at least 1 are needed")


def test_heldout_can_be_left_out(tiny, text, tmp_path, capsys):
    report = run(tiny, tmp_path / "out", text, "int8", "--heldout-tokens", "0")
    assert report["perplexity_before"] is report["kl_mean"] is None
    assert capsys.readouterr().out.endswith("what it loses was not measured; --heldout-tokens 8192 does\n")


def test_the_head_before_and_after(tiny, text, tmp_path):
    """A quantized head is measured against the plain one."""
    report = run(tiny, tmp_path / "out", text, "int4", "--quantize-head", "--skip", "model.*")
    assert [row["name"] for row in report["layers"]] == ["lm_head"]
    assert report["kl_mean"] > 1e-3 and report["perplexity_before"] != report["perplexity_after"]


def test_a_model_can_write_its_own_calibration(tiny, text, tmp_path, capsys):
    """The default, and the same byte for byte each time; also for a tokenizer without BOS."""
    nameless = tmp_path / "nameless"
    shutil.copytree(tiny, nameless)
    (nameless / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": None}))
    files = []
    for source, name in ((tiny, "a"), (tiny, "b"), (nameless, "c")):
        argv = rounding(source, tmp_path / name) + ["--mode", "int4-gptq", "--rows", "17", "--row-length", "64"]
        assert quantize.main([*argv, "--heldout", str(text), "--heldout-tokens", "512"]) == 0
        files.append((tmp_path / name / "model.safetensors").read_bytes())
        report = json.loads((tmp_path / name / "quantization_report.json").read_text())
        assert report["calibration_tokens"] == 17 * 64
        assert sum(row["output_error"] < row["output_error_rtn"] for row in report["layers"]) >= 7
    assert files[0] == files[1] != files[2] and "its own text" in capsys.readouterr().out
    argv = rounding(tiny, tmp_path / "d") + ["--mode", "int4-gptq", "--rows", "2", "--row-length", "64"]
    fails(capsys, argv, "2 rows of 64 tokens", "at least 512")


def test_its_own_text_is_neither_cut_nor_ended(tiny):
    """Whatever generation_config.json says; a row does not depend on how many are written."""
    rows = quantize.own_rows(tiny, 18, 32, torch.device("cpu"), torch.float32)
    assert rows.shape == (18, 32) and bool((rows[:, 0] == 256).all()) and len(rows.unique(dim=0)) == 18
    assert torch.equal(rows[:17], quantize.own_rows(tiny, 17, 32, torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("mode,size,words", [
    ("int4", 128, "--mode int4-gptq (as many bits), or --group-size 64 (4.25 bits a weight), "
     "or --group-size 32 (4.5 bits a weight), or --mode int8 (8 bits a weight)"),
    ("int4-gptq", 64, "--group-size 32 (4.5 bits a weight), or --mode int8 (8 bits a weight)"),
    ("int4-gptq", 32, "--mode int8 (8 bits a weight)"),
    ("int4-gptq", -1, "--group-size 64 (4.25 bits a weight), or --group-size 32 (4.5 bits a weight), "
     "or --mode int8 (8 bits a weight)"),  # 128 divides not every layer
    ("int8", -1, "--mode int8-gptq (as many bits), or --group-size 64 (8.25 bits a weight), "
     "or --group-size 32 (8.5 bits a weight), or --skip the Linears with the largest errors (16 bits a weight)"),
    ("int8-gptq", 32, "--skip the Linears with the largest errors (16 bits a weight)"),
])  # fmt: skip
def test_advice(mode, size, words):
    layers = [{"shape": [8, 192 if size == -1 else 256]}, {"shape": [4, 8, 256]}]
    assert quantize.advice({"mode": mode, "group_size": size, "scale_bits": 16, "layers": layers}) == words


@pytest.mark.parametrize(
    "mode, loss, kl, begins",
    [
        ("int4", 1.06, 0.1, "That is more than 5%; try --mode int4-gptq (as many bits), or"),
        ("int8", 1.06, 0.1, "That is more than 5%; try --mode int8-gptq (as many bits), or"),
        ("int8", 1.04, 0.002, "To lose less, try --mode int8-gptq (as many bits), or"),
        ("int8", 1.04, 0.0005, "KL divergence: mean 0.0005"),
        ("int4", 1.04, 0.01, "KL divergence: mean 0.0100"),
    ],
)
def test_a_loss_is_answered(mode, loss, kl, begins, tiny, text, tmp_path, monkeypatch, capsys):
    """One of more than five percent, and with 8 bits one that groups take away."""
    measured = {"perplexity_before": 10.0, "perplexity_after": 10.0 * loss, "kl_mean": kl, "kl_99": 0.1}
    monkeypatch.setattr(quantize.Streams, "loss", lambda *_: measured | {"top1_agreement": 0.9})
    run(tiny, tmp_path / "out", text, mode)
    assert capsys.readouterr().out.splitlines()[-1].startswith(begins)


def test_bfloat16_stays_bfloat16(text, tmp_path):
    source = save_model(tmp_path / "bf16", dtype=torch.bfloat16)
    run(source, tmp_path / "out", text, "int4")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    floating = {t.dtype for t in tensors.values() if t.is_floating_point()}
    assert floating == {torch.bfloat16}
    source = load_file(source / "model.safetensors")
    assert torch.equal(tensors["model.norm.weight"], source["model.norm.weight"])
    assert torch.equal(tensors["lm_head.weight"], source["lm_head.weight"])


def test_shards_and_index(tiny, text, tmp_path, monkeypatch):
    run(tiny, tmp_path / "one", text)
    monkeypatch.setattr(output_folder, "SHARD_BYTES", 20_000)
    run(tiny, tmp_path / "many", text)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert set(index["weight_map"]) == set(load_file(tmp_path / "one" / "model.safetensors"))
    tokens = torch.randint(0, 256, (1, 20))
    assert torch.equal(logits(tmp_path / "one", tokens), logits(tmp_path / "many", tokens))


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_a_head_of_eight_bits_in_a_model_of_four(form, tiny, text, tmp_path):
    report = run(tiny, tmp_path / "out", text, "int4", "--quantize-head", "8", "--format", form)
    errors = {row["name"]: row["weight_error"] for row in report["layers"]}
    assert errors["lm_head"] < 0.02 < 0.05 < min(error for name, error in errors.items() if name != "lm_head")
    assert report["quantize_head"] == 8
    model = checkpoint.load(str(tmp_path / "out"))
    assert isinstance(model.lm_head, Int8Linear) and isinstance(model.layers[0].mlp.down_proj, Int4Linear)


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_head(tied, text, tmp_path):
    source = save_model(tmp_path / "source", tie_word_embeddings=tied)
    report = run(source, tmp_path / "out", text, "int4-gptq", "--quantize-head")
    assert report["layers"][-1]["name"] == "lm_head"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight_packed" in tensors and "lm_head.weight" not in tensors
    original = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], original)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tokens = torch.randint(0, 256, (1, 20))
    error = (logits(tmp_path / "out", tokens) - logits(source, tokens)).norm() / logits(source, tokens).norm()
    assert error < 0.7


def test_skip(tiny, text, tmp_path, capsys):
    run(tiny, tmp_path / "out", text, "int4", "--skip", "*.1.mlp.*", "*.k_proj")
    tensors = set(load_file(tmp_path / "out" / "model.safetensors"))
    for name in ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        assert f"{name}.weight" in tensors and f"{name}.weight_packed" not in tensors
    assert "model.layers.0.self_attn.q_proj.weight_packed" in tensors
    assert logits(tmp_path / "out", torch.randint(0, 256, (1, 20))).isfinite().all()
    capsys.readouterr()
    fails(
        capsys,
        arguments(tiny, tmp_path / "no", text, "int4", "--skip", "*.qproj"),
        "--skip *.qproj",
        "matches no Linear",
    )
    fails(capsys, arguments(tiny, tmp_path / "no", text, "int4", "--skip", "*"), "nothing is left")
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("kind,changes", [
    ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Qwen3Moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
])  # fmt: skip
def test_experts(kind, changes, text, tmp_path):
    source = save_model(tmp_path / "source", kind, **changes)
    report = run(source, tmp_path / "out", text, "int4-gptq")
    tensors = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert sum(".experts." in name and name.endswith("weight_packed") for name in tensors) == 2 * 3 * len(
        {name.split(".experts.")[1].split(".")[0] for name in tensors if ".experts." in name}
    )
    assert any(name.endswith(".gate.weight") for name in tensors)
    rows = [row for row in report["layers"] if ".experts." in row["name"]]
    assert len(rows) == 4 and all(row["tokens"] == 2 * report["calibration_tokens"] for row in rows)
    assert all(row["output_error"] < row["output_error_rtn"] for row in rows)
    # What the quantized folder computes is what its dequantized weights compute.
    plain, config = load_file(tmp_path / "out" / "model.safetensors"), (tmp_path / "out" / "config.json").read_text()
    scheme = QuantConfig.from_hf(json.loads(config)["quantization_config"]).scheme("x")
    for name in [n.removesuffix(".weight_packed") for n in plain if n.endswith(".weight_packed")]:
        parts = {suffix: plain.pop(f"{name}.{suffix}") for suffix in suffixes(scheme) if f"{name}.{suffix}" in plain}
        plain[f"{name}.weight"] = unpack(name, parts, scheme, tuple(parts["weight_shape"].tolist())).dequantize()
    save_file(plain, source / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(0, 256, (1, 24))
    torch.testing.assert_close(logits(tmp_path / "out", tokens), logits(source, tokens), rtol=1e-4, atol=1e-4)


def test_starved_expert_is_reported(text, tmp_path):
    source = save_model(tmp_path / "source", "Mixtral", num_local_experts=4, num_experts_per_tok=1)
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if n.endswith("block_sparse_moe.gate.weight")]:
        tensors[name][2] = 0  # against the others' large logits of either sign, the softmax never picks it first
        tensors[name][3] = -tensors[name][1]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = run(source, tmp_path / "out", text, "int4-gptq", "--rows", "5")
    notes = [note for row in report["layers"] for note in row["notes"]]
    assert any("expert 2: only" in note and "calibration tokens" in note for note in notes)


def test_unsolvable_layer_is_rounded_and_reported(tiny, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gptq, "inverse_factor", lambda hessian, damp: None)
    report = run(tiny, tmp_path / "out", text, "int4-gptq")
    assert all(row["notes"] == ["not solvable, rounded to nearest"] for row in report["layers"])
    assert all(row["output_error"] == row["output_error_rtn"] for row in report["layers"])
    assert "not solvable, rounded to nearest" in capsys.readouterr().out


def test_group_size_that_does_not_divide(tiny, text, tmp_path, capsys):
    for size in ("64", "128"):
        argv = arguments(tiny, tmp_path / "out", text, "int4", "--group-size", size)
        name = "model.layers.0.mlp.down_proj" if size == "64" else "model.layers.0.self_attn.q_proj"
        words = (
            f"{name}: in_features {96 if size == '64' else 64} ",
            f"--group-size {size}",
            "--group-size 32, the largest",
        )
        fails(capsys, argv, *words)
    assert leftovers(tmp_path) == []
    assert run(tiny, tmp_path / "auto", text, "int4", "--group-size", "auto")["group_size"] == 32
    more = "--group-size", "auto", "--skip", "*.down_proj"
    assert run(tiny, tmp_path / "skip", text, "int4", *more)["group_size"] == 64
    run(tiny, tmp_path / "out", text, "int4", "--group-size", "-1")


def test_the_usual_group_size(text, tmp_path):
    source = save_model(tmp_path / "wide", hidden_size=128, intermediate_size=128, head_dim=32)
    for mode, size, groups in (("int8", -1, 1), ("int4", 128, 1), ("int8-gptq", 32, 4)):
        argv = arguments(source, tmp_path / mode, text, mode, "--group-size", "32")
        assert quantize.main(argv if size == 32 else argv[: argv.index("--group-size")]) == 0
        report = json.loads((tmp_path / mode / "quantization_report.json").read_text())
        scale = load_file(tmp_path / mode / "model.safetensors")["model.layers.0.mlp.down_proj.weight_scale"]
        assert report["group_size"] == size and scale.shape == (128, groups)


def test_no_group_size_divides(text, tmp_path, capsys):
    source = save_model(tmp_path / "odd", intermediate_size=84)
    capsys.readouterr()
    for size in ("auto", "32"):
        argv = arguments(source, tmp_path / "out", text, "int4-gptq", "--group-size", size)
        fails(
            capsys, argv, "down_proj: in_features 84 is not a multiple", "use --group-size -1, or --skip '*.down_proj'"
        )
    run(source, tmp_path / "row", text, "int4-gptq", "--group-size", "-1")


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_rounding_reads_no_text(mode, tiny, tmp_path, capsys):
    """Not its default texts either; what it writes is the same as with them."""
    argv = rounding(tiny, tmp_path / "out") + ["--mode", mode, "--calibration", "nowhere", "--heldout", "nowhere"]
    assert quantize.main(argv) == 0
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["calibration_tokens"] == report["heldout_tokens"] == 0 and report["perplexity_after"] is None
    assert all(0 < row["weight_error"] < 0.2 and "output_error" not in row for row in report["layers"])
    shown = capsys.readouterr().out
    assert "layers.1.mlp.down_proj" in shown and "output" not in shown and "perplexity" not in shown
    (tmp_path / "text").write_text(TEXT)
    measured = run(tiny, tmp_path / "measured", tmp_path / "text", mode)
    assert all(0 < row["output_error"] < 0.2 for row in measured["layers"])
    assert [row["weight_error"] for row in measured["layers"]] == [row["weight_error"] for row in report["layers"]]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "measured")]
    assert files[0] == files[1]


def test_bad_arguments_are_one_line(tiny, text, tmp_path, capsys):
    out = tmp_path / "out"
    fails(capsys, ["--mode", "int3"], "int3")
    fails(capsys, arguments(tiny, out, text, "int4", "--group-size", "100"), "100")
    fails(capsys, arguments(tmp_path / "nowhere", out, text), "nowhere")
    fails(capsys, arguments(tiny, out, tmp_path / "no.txt"), "no.txt")
    fails(
        capsys, arguments(tiny, out, text, "int4", "--device", "cuda"), "cuda"
    ) if not torch.cuda.is_available() else None
    short = tmp_path / "short.txt"
    short.write_text("Too short to mean anything.")
    fails(capsys, arguments(tiny, out, short, "int4-gptq"), "short.txt", "27 tokens", "at least 512")
    fails(capsys, arguments(tiny, out, text, "int4-gptq", "--rows", "1"), "1 rows", "at least 512")
    fails(capsys, arguments(tiny, out, short), "short.txt", "27 tokens", "at least 1 ")
    short.write_bytes(b"\xff\xfe\xfd")
    fails(capsys, arguments(tiny, out, short), "utf-8")
    assert leftovers(tmp_path) == ["short.txt"]


def test_quantized_input_is_refused(tiny, text, tmp_path, capsys):
    run(tiny, tmp_path / "out", text)
    capsys.readouterr()
    fails(capsys, arguments(tmp_path / "out", tmp_path / "twice", text), "quantized already")


def damaged(tiny, folder, change):
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights(name, value, tiny, text, tmp_path, capsys):
    source = damaged(tiny, tmp_path / "bad", lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
    error = fails(capsys, arguments(source, tmp_path / "out", text, "int4-gptq"), "NaN")
    assert name in error or "mlp.gate_proj" in error  # a fused Linear is named by its first part
    assert leftovers(tmp_path) == ["bad"]


def test_corrupt_inputs(tiny, text, tmp_path, capsys):
    cases = {
        "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
        "extra": (lambda t: t.update(surprise=torch.zeros(3)), "surprise"),
        "shape": (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "model.norm.weight"),
    }
    for case, (change, word) in cases.items():
        fails(capsys, arguments(damaged(tiny, tmp_path / case, change), tmp_path / "out", text), word)
    shutil.copytree(tiny, tmp_path / "cut")
    whole = (tiny / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    fails(capsys, arguments(tmp_path / "cut", tmp_path / "out", text), "truncated or corrupt")
    assert sorted(leftovers(tmp_path)) == ["cut", "extra", "missing", "shape"]


def test_force_replaces_only_what_quantize_wrote(tiny, text, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    fails(capsys, rounding(tiny, out), str(out), "exists", "--force")
    assert quantize.main([*rounding(tiny, out), "--force"]) == 0  # an empty folder
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["files"] == sorted(leftovers(out))
    assert quantize.main([*rounding(tiny, out), "--force"]) == 0  # its own
    (out / "precious").write_text("x")
    before = (out / "model.safetensors").stat()
    fails(capsys, [*rounding(tiny, out), "--force"], "holds precious", "did not write")
    assert (out / "precious").read_text() == "x" and (out / "model.safetensors").stat() == before
    other = tmp_path / "theirs"
    other.mkdir()
    (other / "quantization_report.json").write_text("{}")
    fails(capsys, [*rounding(tiny, other), "--force"], "holds quantization_report.json", "did not write")
    (tmp_path / "file").write_text("x")
    fails(capsys, [*rounding(tiny, tmp_path / "file"), "--force"], "is no folder")
    assert sorted(leftovers(tmp_path)) == ["file", "out", "theirs"]


def test_a_failed_run_keeps_what_was_there(tiny, text, tmp_path, capsys):
    out = tmp_path / "out"
    run(tiny, out, text)
    capsys.readouterr()
    bad = damaged(tiny, tmp_path / "bad", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    before = (out / "model.safetensors").read_bytes()
    fails(capsys, arguments(bad, out, text, "int4", "--force"), "NaN")
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("place", [".", "..", "link", "sub/.."])
def test_the_input_is_never_replaced(place, tiny, tmp_path, capsys):
    """Whatever name is given to the input's folder, or to one that holds it, and whatever wrote that folder."""
    source = tmp_path / "parent" / "source"
    shutil.copytree(tiny, source)
    (source / "link").symlink_to(source, target_is_directory=True)
    (source / "sub").mkdir()
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    for folder in (source, source.parent):
        (folder / "quantization_report.json").write_text(json.dumps({"files": names}))
    for force in ([], ["--force"]):
        fails(capsys, [*rounding(source, source / place), *force], "is or holds the checkpoint")
    assert (source / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_a_link_is_followed(tiny, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real", target_is_directory=True)
    assert quantize.main([*rounding(tiny, tmp_path / "out"), "--force"]) == 0
    assert (tmp_path / "out").is_symlink() and is_whole(tmp_path / "real")
    assert sorted(leftovers(tmp_path)) == ["out", "real"]


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_appears_during_the_run_stays(force, tiny, tmp_path, capsys, monkeypatch):
    """And the result is not lost: it takes a name beside it, which the error gives."""
    out, finish = tmp_path / "out", quantize.Writer.finish

    def appear(writer):
        out.mkdir()
        (out / "precious").write_text("x")
        return finish(writer)

    monkeypatch.setattr(quantize.Writer, "finish", appear)
    fails(capsys, [*rounding(tiny, out), *force], "during the run", str(tmp_path / "out.1"))
    assert leftovers(out) == ["precious"] and is_whole(tmp_path / "out.1")
    assert sorted(leftovers(tmp_path)) == ["out", "out.1"]


def test_output_may_lie_in_the_input(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    assert quantize.main(rounding(source, source / "token-int4")) == 0
    assert is_whole(source / "token-int4") and not (source / "token-int4" / "token-int4").exists()


def test_what_only_bears_the_name_of_a_small_file_is_left_out(tiny, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    for name in ("tokenizer", "LICENSES", "additional_chat_templates"):
        (source / name).mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    os.mkfifo(source / "merges.txt")
    (source / "vocabulary").symlink_to("tokenizer")
    assert quantize.main([*rounding(source, tmp_path / "out")]) == 0
    assert set(leftovers(tmp_path / "out")) & {"tokenizer", "LICENSES", "merges.txt", "vocabulary"} == set()
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "x"
    assert quantize.main([*rounding(source, tmp_path / "out"), "--force"]) == 0  # folders in it are its own too
    (source / "vocab.json").symlink_to("nowhere")
    capsys.readouterr()
    fails(capsys, rounding(source, tmp_path / "no"), "vocab.json is a link to nowhere")
    assert sorted(leftovers(tmp_path)) == ["out", "source"]


def is_whole(folder):
    return logits(folder, torch.arange(20)[None]).isfinite().all() and (folder / "quantization_report.json").exists()


@pytest.fixture(scope="module")
def starter():
    """Starts processes that have imported everything and, unlike forks of the test process, hold no thread's lock."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["quantize"])
    return context


def test_kill_at_any_moment(tiny, text, tmp_path, starter):
    """Twenty runs over one folder, killed at random moments: what bears the final name is always whole."""
    out, rng = tmp_path / "out", random.Random(0)
    argv = arguments(tiny, out, text, "int4", "--heldout-tokens", "0", "--force")
    killed, seconds = 0, 60.0
    for i in range(22):  # the first two are left alone: one starts the server, one tells how long a run takes
        started, process = time.perf_counter(), starter.Process(target=quantize.main, args=(argv,))
        process.start()
        process.join(rng.uniform(0.0, seconds) if i > 1 else 60.0)
        seconds = seconds if i > 1 else time.perf_counter() - started
        if process.exitcode is None:
            process.kill()  # nothing, should it have ended just now
            killed += 1
        process.join()
        assert not out.exists() or is_whole(out), f"run {i}"
    assert killed >= 5
    run(tiny, out, text, "int4", "--force")
    assert is_whole(out) and leftovers(tmp_path) == ["out"]


def test_kill_between_the_two_renames_is_repaired(tiny, text, tmp_path, capsys):
    assert quantize.main(rounding(tiny, tmp_path / "out")) == 0
    hidden = tmp_path / ".out.quantize.partial"
    (hidden / "new").mkdir(parents=True)
    (hidden / "lock").touch()
    (tmp_path / "out").rename(hidden / "old")
    capsys.readouterr()
    fails(capsys, rounding(tiny, tmp_path / "out"), "--force")
    assert is_whole(tmp_path / "out") and leftovers(tmp_path) == ["out"]


def test_kill_after_the_two_renames_is_tidied(tiny, tmp_path):
    for name in ("old", "new"):
        (tmp_path / ".out.quantize.partial" / name / "token").mkdir(parents=True)
        (tmp_path / ".out.quantize.partial" / "lock").touch()
        if name == "old":
            assert quantize.main(rounding(tiny, tmp_path / "out")) == 0
        else:
            assert quantize.main([*rounding(tiny, tmp_path / "out"), "--force"]) == 0
        assert is_whole(tmp_path / "out") and leftovers(tmp_path) == ["out"]


def test_an_earlier_folder_is_not_lost_to_one_that_took_its_name(tiny, tmp_path, capsys):
    hidden = tmp_path / ".out.quantize.partial"
    for folder in (hidden / "new", hidden / "old", tmp_path / "out"):
        folder.mkdir(parents=True)
        (folder / "precious").write_text(folder.name)
    (hidden / "lock").touch()
    fails(capsys, [*rounding(tiny, tmp_path / "out"), "--force"], "not empty")
    assert (hidden / "old" / "precious").read_text() == "old"
    assert (tmp_path / "out" / "precious").read_text() == "out"


def test_the_hidden_folder_is_held_by_one_run(tiny, tmp_path, capsys):
    """A second run is refused while the first is at work, also one of another process, and leaves nothing."""
    with quantize.complete_folder(tmp_path / "out", tiny, False) as work:
        (work / "half").write_text("x")
        fails(capsys, rounding(tiny, tmp_path / "out"), "another run is at work")
        argv = [sys.executable, quantize.__file__, *rounding(tiny, tmp_path / "out")]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 2 and "another run is at work" in done.stderr
        assert quantize.main(rounding(tiny, tmp_path / "out.quantize")) == 0  # its neighbour is no hindrance
        assert (work / "half").read_text() == "x"
    assert sorted(leftovers(tmp_path)) == ["out", "out.quantize"]


def test_the_hidden_folder_is_never_another_ones(tiny, tmp_path, capsys):
    (tmp_path / ".out.quantize.partial").mkdir()
    (tmp_path / ".out.quantize.partial" / "new").write_text("precious")
    fails(capsys, rounding(tiny, tmp_path / "out"), ".out.quantize.partial is in the way")
    assert (tmp_path / ".out.quantize.partial" / "new").read_text() == "precious"
    (tmp_path / ".model.v1.999999.old").mkdir()
    (tmp_path / ".model.v1.999999.partial").mkdir()
    assert quantize.main(rounding(tiny, tmp_path / "model")) == 0
    assert len(leftovers(tmp_path)) == 4


def test_full_disk(tiny, text, tmp_path, capsys, monkeypatch):
    """What cannot fit is refused before the work; what runs full nevertheless leaves nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        fails(capsys, arguments(tiny, disk / "out", text), "the result needs 0.2 MB", "0.1 MB free")
        monkeypatch.setattr(quantize, "check_room", lambda *_: None)
        fails(capsys, arguments(tiny, disk / "out", text), "No space left")
        assert leftovers(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 6 bytes"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("unable to mmap 6 bytes from file </x/model.safetensors>: Cannot allocate memory (12)"),
])  # fmt: skip
def test_refused_memory(error, tiny, tmp_path, capsys, monkeypatch):
    def refuse(writer):
        raise error

    monkeypatch.setattr(quantize.Writer, "finish", refuse)
    assert "emory" in fails(capsys, rounding(tiny, tmp_path / "out"))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("factor", [3e38, 3e5])
def test_no_perplexity_is_no_result(factor, tiny, text, tmp_path, capsys):
    """NaN where the logits overflow, a perplexity that no float holds where they are merely absurd."""
    bad = damaged(tiny, tmp_path / "bad", lambda tensors: tensors["lm_head.weight"].mul_(factor))
    fails(capsys, arguments(bad, tmp_path / "out", text), "the loss of the held-out text is", "--heldout-tokens 0")
    assert leftovers(tmp_path) == ["bad"]


@pytest.mark.parametrize("which", [0, 1])
def test_neither_loss_may_be_nan(which, tiny, text, tmp_path, capsys, monkeypatch):
    """That of the plain model or that of the quantized one."""
    head, calls = quantize.Streams.head, []

    def broken(*args):
        factor = float("nan") if len(calls) == which else 1.0
        calls.append(args)
        return (logits * factor for logits in head(*args))

    monkeypatch.setattr(quantize.Streams, "head", broken)
    monkeypatch.setattr(quantize, "hessians", lambda linear, run, last: (torch.eye(linear.in_features)[None], [1]))
    fails(capsys, arguments(tiny, tmp_path / "out", text), "the loss of the held-out text is")
    assert leftovers(tmp_path) == []


def anonymous_peak(argv):
    """Run the command; the most anonymous memory that it had, in bytes."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # freed tensors leave at once, as large ones always do
    process = subprocess.Popen([sys.executable, quantize.__file__, *argv], stdout=subprocess.DEVNULL, env=environment)
    peak = 0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))])
    assert process.returncode == 0
    return peak


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_does_not_grow_with_depth(text, tmp_path):
    peaks = []
    for layers in (2, 12):
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": layers, "head_dim": 64}
        source = save_model(tmp_path / f"deep{layers}", **sizes)
        argv = arguments(source, tmp_path / f"out{layers}", text, "int4", "--heldout-tokens", "0", "--rows", "5")
        peaks.append(anonymous_peak(argv))
    layer = (4 * 256 * 256 * 0.75 + 3 * 256 * 1024) * 4  # bytes of one block in float32
    assert peaks[1] - peaks[0] < 4 * layer, peaks  # ten more blocks would be 40 MB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["int8", "int4", "int4-gptq"])
def test_gpu_gives_what_the_cpu_gives(mode, tiny, text, tmp_path):
    reports = [
        run(tiny, tmp_path / d, text, mode, "--device", d, "--dtype", "float32", "--act-order") for d in ("cpu", "cuda")
    ]
    for a, b in zip(*(report["layers"] for report in reports)):
        assert a["name"] == b["name"] and a["output_error"] == pytest.approx(b["output_error"], rel=0.05)
    assert reports[0]["perplexity_after"] == pytest.approx(reports[1]["perplexity_after"], rel=0.01)
    assert reports[0]["perplexity_before"] == pytest.approx(reports[1]["perplexity_before"], rel=1e-4)
    run(tiny, tmp_path / "auto", text, mode, "--device", "cuda")  # in the checkpoint's dtype


@pytest.mark.skipif(not STORIES.exists(), reason="the shared model is not here")
def test_int8_costs_stories260k_nothing(text, tmp_path):
    more = "--group-size", "-1", "--heldout-tokens", "16384", "--row-length", "512", "--rows", "2"
    report = run(STORIES, tmp_path / "out", text, "int8", *more)
    assert abs(report["perplexity_after"] / report["perplexity_before"] - 1) < 0.003
