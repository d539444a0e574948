"""The command: every flag, every sentence it says, every way to misuse it. In this process, on the CPU."""

import contextlib
import functools
import io
import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripted import SPECIAL, VOCAB, add_tokenizer, byte_ids, recital, write_json

import checkpoint
import command_line
import generate
import inductor
import machine
from engine import Engine
from inductor import Inductor
from sampling import SamplingParams
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
SUMMARY = re.compile(
    r"(?:compiling the decode step; [^\n]+\n)?"
    r"load [\d.]+ s \| (?:compile [\d.]+ s \| )?TTFT \d+ ms \((\d+) tokens\) \| "
    r"decode [\d.]+ tok/s(?: \(\d+ rows of [\d.]+\))? \| [\d.e+-]+ GB/token \| "
    r"[\d.]+ GB/s(?:, \d+% of the [\d,]+ of a sum)? \| memory [\d.]+ GB \| \w+\n"
)


@pytest.fixture(scope="module")
def abc(tmp_path_factory):
    """Says `abcdefg`, then EOS. No generation_config, so it samples at the default temperature 0.8."""
    return recital(tmp_path_factory.mktemp("abc"), "abcdefg", "<|eos|>")


@pytest.fixture(scope="module")
def dice(tiny):
    """A random model with our byte tokenizer: what it says is noise."""
    folder, _ = tiny("llama", vocab_size=VOCAB, max_position_embeddings=128, eos_token_id=257, bos_token_id=256)
    return add_tokenizer(folder)


@pytest.fixture
def call(capsys, monkeypatch):
    """call(*argv, stdin=..., status=0) -> (stdout, stderr) of the command, which must end with that status."""

    def call(*argv, stdin="", status=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()  # what fixtures printed
        try:
            code = generate.main([str(a) for a in argv])
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        assert code == status, err
        return out, err

    return call


@pytest.fixture
def fails(call):
    """fails(*argv) -> the message of a refusal: status 2, nothing on stdout, exactly one line on stderr."""

    def fails(*argv, stdin="", printed=""):
        out, err = call(*argv, stdin=stdin, status=2)
        assert out == printed
        assert err.startswith("generate.py: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        return err.removeprefix("generate.py: error: ")

    return fails


@pytest.fixture
def records(call):
    def records(*argv, **options):
        out, err = call(*argv, "--json", **options)
        assert SUMMARY.fullmatch(err)
        assert out.endswith("\n")
        return [json.loads(line) for line in out.splitlines()]

    return records


@pytest.fixture
def eager_compile(monkeypatch):
    """torch.compile without a code generator, so that it takes no time; gives the list of what was compiled."""
    compiled, real = [], torch.compile

    def patched(function, *, fullgraph, dynamic=None, options=None, backend="eager"):
        compiled.append(getattr(function, "__name__", str(function)))
        return real(function, fullgraph=fullgraph, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", patched)
    monkeypatch.setattr(Inductor, "build", lambda self, graph, examples: graph.forward)
    return compiled


# -- output ----------------


def test_streams_the_text_and_sums_up_on_stderr(call, abc):
    out, err = call("--checkpoint", abc, "--prompt", "ab")
    assert out == "cdefg\n"
    assert SUMMARY.fullmatch(err)[1] == "3"  # BOS, a, b


def test_text_is_flushed_as_it_comes(abc, monkeypatch, capsys):
    seen = []

    class Out(io.StringIO):
        def flush(self):
            seen.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Out())
    assert generate.main(["--checkpoint", str(abc)]) == 0
    assert [s for s in seen if s and "\n" not in s][:7] == ["abcdefg"[: n + 1] for n in range(7)]


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is absent")
def test_golden_text_of_stories260k(call):
    out, _ = call("--checkpoint", STORIES, "--temperature", 0, "--max-new-tokens", 199)
    assert out == (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the "
        "park.\" Lily was sad and didn't know what to do. She said, \"I want to play with your ball, but I can't find "
        "it.\"\nLily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
        "Lily didn't want to help her mom, so\n"
    )


def test_json_holds_exactly_the_documented_keys(records, abc):
    (record,) = records("--checkpoint", abc, "--prompt", "ef", "--seed", 1)
    assert record.pop("ttft_ms") > 0 and record.pop("decode_tok_s") > 0
    g, eos = 70, 257
    assert (record.pop("prompt"), record.pop("sample")) == (0, 0)
    assert record == {"text": "g", "ids": [g, eos], "prompt_ids": [256, 68, 69], "stop_reason": "eos"}


def test_json_keeps_every_character(records, tmp_path):
    folder = recital(tmp_path, "é日\n\u2028", "<|eos|>")
    assert [r["text"] for r in records("--checkpoint", folder, "--num-samples", 2)] == ["é日\n\u2028"] * 2


def test_several_samples_are_printed_whole_with_prompt_and_sample(call, records, abc, dice):
    out, _ = call("--checkpoint", abc, "--num-samples", 3, "--stop", "e")
    assert out == "".join(f"[prompt 1, sample {i}]abcd\n\n" for i in (1, 2, 3))
    rows = records("--checkpoint", dice, "--num-samples", 3, "--max-new-tokens", 12, "--seed", 5)
    assert len({tuple(r["ids"]) for r in rows}) == 3


# -- prompts ----------------


def test_prompt_from_text_stdin_and_file(records, abc, tmp_path):
    (tmp_path / "p.txt").write_text("ab\n", "utf-8")
    expected = [256, 64, 65]
    assert records("--checkpoint", abc, "--prompt", "ab")[0]["prompt_ids"] == expected
    assert records("--checkpoint", abc, "--prompt", "-", stdin="ab")[0]["prompt_ids"] == expected
    assert records("--checkpoint", abc, "--prompt", f"@{tmp_path / 'p.txt'}")[0]["prompt_ids"][:3] == expected
    assert records("--checkpoint", abc, "--prompt", "")[0]["prompt_ids"] == [256]
    assert records("--checkpoint", abc)[0]["prompt_ids"] == [256]


def test_prompts_file_is_one_ragged_batch(records, abc, tmp_path):
    (tmp_path / "prompts").write_text("a\n\nabcdef\nde\n", "utf-8")
    rows = records("--checkpoint", abc, "--prompts-file", tmp_path / "prompts", "--num-samples", 2)
    assert [r["text"] for r in rows] == ["bcdefg", "bcdefg", "g", "g", "fg", "fg"]
    assert {r["stop_reason"] for r in rows} == {"eos"}


def test_only_a_new_line_ends_a_prompt_of_a_file(records, abc, tmp_path):
    (tmp_path / "prompts").write_bytes("a\u2028b\fc\x85d\r\nab".encode())
    rows = records("--checkpoint", abc, "--prompts-file", tmp_path / "prompts", "--max-new-tokens", 1)
    assert [len(r["prompt_ids"]) for r in rows] == [1 + len("a\u2028b\fc\x85d".encode()), 3]


def test_prompts_that_cannot_be_read(fails, abc, tmp_path):
    (tmp_path / "empty").write_text("\n  \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "holds no prompt" in fails("--checkpoint", abc, "--prompts-file", tmp_path / "empty")
    assert "UTF-8" in fails("--checkpoint", abc, "--prompts-file", tmp_path / "latin")
    assert "UTF-8" in fails("--checkpoint", abc, "--prompt", f"@{tmp_path / 'latin'}")
    assert "missing" in fails("--checkpoint", abc, "--prompt", f"@{tmp_path / 'missing'}")
    fails("--checkpoint", abc, "--prompt", "caf\udce9")  # what Python makes of an argument that is not UTF-8


def test_empty_prompt_without_bos_is_refused(fails, tmp_path):
    folder = recital(tmp_path, "abc", bos=False)
    assert "no BOS" in fails("--checkpoint", folder, "--prompt", "")


def test_prompt_longer_than_the_context(fails, abc):
    message = fails("--checkpoint", abc, "--prompt", "a" * 300)
    assert "301" in message and "256" in message


def test_tokenizer_beyond_the_vocabulary_warns_and_raises_only_on_use(call, tiny):
    folder, _ = tiny("llama", vocab_size=257, eos_token_id=None)
    add_tokenizer(folder)
    _, err = call("--checkpoint", folder, "--prompt", "a", "--max-new-tokens", 2)
    assert err.startswith("warning: the tokenizer has 259 ids, the model 257") and err.count("\n") == 3
    assert "no id that ends a text" in err.splitlines()[1]
    files = json.loads((folder / "tokenizer.json").read_text())
    files["post_processor"]["special_tokens"]["<|bos|>"]["ids"] = [258]
    write_json(folder / "tokenizer.json", files)
    _, err = call("--checkpoint", folder, "--prompt", "a", status=2)
    assert "token id 258" in err.splitlines()[-1] and "257" in err.splitlines()[-1]


# -- where an answer ends ----------------


def test_max_new_tokens_and_its_default(records, abc, tiny):
    (record,) = records("--checkpoint", abc, "--max-new-tokens", 3)
    assert (record["text"], record["stop_reason"], len(record["ids"])) == ("abc", "length", 3)
    (record,) = records("--checkpoint", abc, "--ignore-eos")
    assert len(record["ids"]) == 200


def test_context_clips_max_new_tokens(records, abc):
    (record,) = records("--checkpoint", abc, "--ignore-eos", "--max-new-tokens", 10**9, "--prompt", "abc")
    assert len(record["ids"]) == 256 - 4 and record["stop_reason"] == "length"


def test_max_seq_len_limits(records, fails, abc):
    (record,) = records("--checkpoint", abc, "--ignore-eos", "--max-seq-len", 20, "--prompt", "abc")
    assert len(record["ids"]) == 20 - 4 and record["stop_reason"] == "length"
    assert "--max-seq-len 4" in fails("--checkpoint", abc, "--max-seq-len", 4, "--prompt", "abc")
    message = fails("--checkpoint", abc, "--max-seq-len", 257)
    assert "257" in message and "256" in message


def test_ignore_eos_goes_on_with_the_same_logits(records, abc):
    (record,) = records("--checkpoint", abc, "--ignore-eos", "--max-new-tokens", 10)
    a, eos = 64, 257
    assert record["ids"] == [*range(a, a + 7), eos, a, a + 1]
    assert (record["text"], record["stop_reason"]) == ("abcdefgab", "length")


@pytest.mark.parametrize(
    "stops, text",
    [(["d"], "abc"), (["cde"], "ab"), (["ef", "bc"], "a"), (["cx", "fgh"], "abcdefg"), (["abcdefg"], ""), (["a"], "")],
)
def test_stop_strings(records, call, abc, stops, text):
    flags = [part for stop in stops for part in ("--stop", stop)]
    (record,) = records("--checkpoint", abc, *flags)
    assert record["text"] == text
    assert record["stop_reason"] == ("eos" if text == "abcdefg" else "stop")
    if record["stop_reason"] == "stop":  # the ids tell what was sampled, up to the stop string's last token
        assert max(record["ids"]) == 63 + min("abcdefg".index(s) + len(s) for s in stops if s in "abcdefg")
    out, _ = call("--checkpoint", abc, *flags)  # streamed: what may begin a stop string is held back, then released
    assert out == text + "\n"


def test_every_stop_id_of_the_configuration_ends(records, tmp_path):
    for end in SPECIAL[1:]:
        folder = recital(tmp_path / end, "abc", end, eos_token_id=[258])
        (record,) = records("--checkpoint", folder)
        assert (record["text"], record["stop_reason"]) == ("abc", "eos")
        assert record["ids"][-1] == 256 + SPECIAL.index(end)


# -- sampling ----------------


def test_seed_repeats_and_its_absence_varies(records, dice):
    def ids(*flags):
        return [r["ids"] for r in records("--checkpoint", dice, "--max-new-tokens", 12, *flags)]

    first = ids("--seed", 3)
    assert ids("--seed", 3) == first
    assert ids("--seed", 4) != first
    assert ids() != ids()
    batch = ids("--seed", 3, "--num-samples", 2)
    assert ids("--seed", 3, "--num-samples", 2) == batch


def test_temperature_zero_is_argmax(records, dice):
    runs = [
        records("--checkpoint", dice, "--temperature", 0, "--seed", s, "--max-new-tokens", 12)[0]["ids"] for s in (1, 2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("flags", [("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 0.999999)])
def test_each_filter_can_leave_the_argmax_alone(records, dice, flags):
    hot = ("--checkpoint", dice, "--temperature", 2, "--seed", 1, "--max-new-tokens", 8)
    greedy = records("--checkpoint", dice, "--temperature", 0, "--max-new-tokens", 8)[0]["ids"]
    assert records(*hot, *flags)[0]["ids"] == greedy != records(*hot)[0]["ids"]


def test_sampling_defaults_come_from_generation_config(monkeypatch, call, tmp_path):
    used, real = [], Engine.generate

    def spy(self, prompts, sampling, **options):
        used.append(sampling)
        return real(self, prompts, sampling, **options)

    monkeypatch.setattr(Engine, "generate", spy)
    bare = recital(tmp_path / "bare", "abc", "<|eos|>")
    call("--checkpoint", bare)
    rich = recital(tmp_path / "rich", "abc", "<|eos|>", temperature=0.6, top_k=20, top_p=0.9, min_p=0.01)
    call("--checkpoint", rich)
    call("--checkpoint", rich, "--top-k", 0, "--temperature", 1.5)
    greedy = recital(tmp_path / "greedy", "abc", "<|eos|>", do_sample=False, temperature=0.6)
    call("--checkpoint", greedy)
    assert [(s.temperature, s.top_k, s.top_p, s.min_p) for s in used[:3]] == [
        (0.8, 200, 1.0, 0.0),
        (0.6, 20, 0.9, 0.01),
        (1.5, 0, 0.9, 0.01),
    ]
    assert used[3].temperature == 0


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": "0.7"}, {"temperature": [1]}, {"top_k": 50.5}, {"top_k": "50"}, {"top_p": 2}, {"min_p": 2}],
)
def test_sampling_defaults_that_are_wrong_are_named_unless_overruled(call, fails, tmp_path, wrong):
    folder, ((name, value),) = recital(tmp_path, "abc", "<|eos|>", **wrong), wrong.items()
    assert f"generation_config.json: {name} is {value!r}" in fails("--checkpoint", folder)
    call("--checkpoint", folder, f"--{name.replace('_', '-')}", 1 - (name == "min_p"))


@pytest.mark.parametrize(
    "name, value", [("do_sample", "no"), ("do_sample", 0), ("eos_token_id", "2"), ("eos_token_id", [2.0])]
)
def test_ill_typed_generation_settings_are_named(fails, tmp_path, name, value):
    folder = recital(tmp_path, "abc", "<|eos|>")
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    assert f"{name} is " in (line := fails("--checkpoint", folder)) and repr(value) in line


# -- how it runs ----------------


def test_prefill_chunk_changes_nothing(records, dice):
    argv = ("--checkpoint", dice, "--prompt", "x" * 40, "--max-new-tokens", 10, "--temperature", 0)
    assert records(*argv)[0]["ids"] == records(*argv, "--prefill-chunk", 7)[0]["ids"]


def test_compile_flags(records, dice, eager_compile):
    argv = ("--checkpoint", dice, "--prompt", "hello", "--max-new-tokens", 8, "--seed", 2)
    eager = records(*argv, "--no-compile")[0]["ids"]
    assert eager_compile == []
    if not torch.cuda.is_available():
        assert records(*argv, "--device", "cpu")[0]["ids"] == eager
        assert eager_compile == []  # the default on a CPU
    assert records(*argv, "--compile", "--device", "cpu")[0]["ids"] == eager
    assert eager_compile == ["layer_128_0", "layer_128_1", "write_128"]  # a layer, the head, the draw
    assert records(*argv, "--no-compile", "--compile-prefill", "--device", "cpu")[0]["ids"] == eager
    assert eager_compile[3:] == ["prefill_0"]


def test_compile_prefill_refuses_a_mixture_of_experts(fails, tiny):
    folder, _ = tiny("mixtral", num_local_experts=4, vocab_size=VOCAB)
    add_tokenizer(folder)
    assert "--compile-prefill" in fails("--checkpoint", folder, "--compile-prefill")


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
@pytest.mark.parametrize("name", ["auto", "float32", "bfloat16", "float16"])
def test_dtype_on_a_cpu(monkeypatch, records, tmp_path, name, capability):
    """auto takes the checkpoint's where PyTorch has fast products for it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    dtype = ("float32" if capability == "DEFAULT" else "bfloat16") if name == "auto" else name
    engines, real = [], Engine.load.__func__
    monkeypatch.setattr(
        Engine, "load", classmethod(lambda cls, *a, **k: engines.append(real(cls, *a, **k)) or engines[-1])
    )
    folder = recital(tmp_path, "abc", "<|eos|>")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"torch_dtype": "bfloat16"})
    assert records("--checkpoint", folder, "--device", "cpu", "--dtype", name)[0]["text"] == "abc"
    assert engines[0].dtype == getattr(torch, dtype) == engines[0].model.lm_head.weight.dtype


@pytest.mark.parametrize("capability, dtype", [("DEFAULT", torch.float32), ("AVX2", torch.bfloat16)])
def test_the_default_dtype_of_random_weights(monkeypatch, capability, dtype):
    """A shape has no checkpoint that declares one; a GPU takes bfloat16 whatever the processor has."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert Engine.load(shape="tiny", device="cpu").dtype == dtype
    assert checkpoint.default_dtype(None, torch.device("cpu")) == dtype
    assert checkpoint.default_dtype(None, torch.device("cuda")) == torch.bfloat16


def test_kernels_flag(records, fails, abc, monkeypatch):
    assert records("--checkpoint", abc, "--kernels", "inductor")[0]["text"] == "abcdefg"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "triton" in fails("--checkpoint", abc, "--kernels", "triton", "--device", "cpu").lower()


def test_shape_needs_no_files(records, fails):
    (record,) = records("--shape", "tiny", "--max-new-tokens", 6, "--prompt", "hi", "--max-seq-len", 64)
    assert len(record["ids"]) == 6 and record["prompt_ids"] == list(b"hi")
    message = fails("--shape", "gpt-5")
    assert "gpt-5" in message and "llama-2-7b" in message and "tiny" in message


def test_profile_replaces_no_device_and_says_when_a_trace_is_cut(call, fails, abc, tmp_path, monkeypatch):
    assert "/dev/null is no regular file" in fails("--checkpoint", abc, "--profile", "/dev/null")
    assert not Path("/dev/null").is_file()
    cut = tmp_path / "trace.json"

    @contextlib.contextmanager
    def profiled(file):
        yield
        Path(file).write_text('{"traceEvents": [{')  # as a full disk leaves it

    monkeypatch.setattr(generate, "profiled", profiled)
    _, message = call("--checkpoint", abc, "--profile", cut, "--max-new-tokens", 2, status=2)
    assert f"--profile {cut} could not be written whole" in message


def test_profile_writes_a_chrome_trace(call, fails, abc, tmp_path):
    call("--checkpoint", abc, "--profile", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::linear" for event in events)
    assert "is no regular file" in fails("--checkpoint", abc, "--profile", tmp_path)
    assert "nowhere" in fails("--checkpoint", abc, "--profile", tmp_path / "nowhere" / "trace.json")


def test_help_names_every_flag(call):
    out, err = call("--help")
    flags = "checkpoint shape prompt prompts-file chat system max-new-tokens temperature top-k top-p min-p seed stop"
    flags += " ignore-eos num-samples max-seq-len prefill-chunk compile no-compile compile-prefill kernels device dtype"
    for flag in (flags + " json profile selftest").split():
        assert f"--{flag}" in out
    assert err == ""


# -- refusals ----------------


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--temp", "0"], "--temp"),  # no abbreviations
        (["stray\nargument"], "stray argument"),
        (["--prompt"], "--prompt"),
        (["--max-new-tokens", "0"], "0"),
        (["--max-new-tokens", "-3"], "-3"),
        (["--max-new-tokens", "many"], "many"),
        (["--max-new-tokens", "9" * 30], "9" * 30),
        (["--num-samples", "0"], "0"),
        (["--num-samples", "10000000"], "10000000"),
        (["--max-seq-len", "-1"], "-1"),
        (["--prefill-chunk", "-1"], "-1"),
        (["--seed", "-1"], "-1"),
        (["--temperature", "-0.5"], "-0.5"),
        (["--temperature", "nan"], "nan"),
        (["--temperature", "inf"], "inf"),
        (["--temperature", "1e-9"], "1e-09"),
        (["--temperature", "warm"], "warm"),
        (["--top-k", "-1"], "-1"),
        (["--top-k", "2.5"], "2.5"),
        (["--top-p", "0"], "0"),
        (["--top-p", "1.1"], "1.1"),
        (["--top-p", "nan"], "nan"),
        (["--min-p", "1"], "1"),
        (["--min-p", "-0.1"], "-0.1"),
        (["--stop", ""], "--stop"),
        (["--dtype", "int8"], "int8"),
        (["--device", "tpu"], "tpu"),
        (["--kernels", "cutlass"], "cutlass"),
        (["--chat", "--json"], "--json"),
        (["--chat", "--num-samples", "2"], "--num-samples"),
        (["--chat", "--prompt", "x"], "--prompt"),
        (["--chat", "--prompts-file", "x"], "--prompts-file"),
        (["--chat", "--shape", "tiny"], "--shape"),
        (["--prompt", "x", "--prompts-file", "x"], "--prompts-file"),
        (["--system", "x"], "--system"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(fails, abc, argv, named, monkeypatch):
    monkeypatch.setattr(Engine, "load", None)
    assert named in fails("--checkpoint", abc, *argv)


def test_a_device_that_is_not_there(fails, abc):
    missing = "mps" if sys.platform != "darwin" else "cuda"
    message = fails("--checkpoint", abc, "--device", missing)
    assert missing in message and "cpu" in message


def damaged(folder, how):
    """abc's folder with one thing wrong."""
    recital(folder, "abc", "<|eos|>")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    head = tensors["lm_head.weight"]
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "architecture":
        write_json(folder / "config.json", config | {"model_type": "mamba"})
    elif how == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])
    elif how == "index leaves the folder":
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "../a.safetensors")}
        write_json(folder / "model.safetensors.index.json", index)
    else:
        changed = {"missing": {}, "extra": {"lm_head.weight": head, "more.weight": head.clone()}}
        changed |= {"mis-shaped": {"lm_head.weight": head[:-1].clone()}, "NaN": {"lm_head.weight": head * float("nan")}}
        del tensors["lm_head.weight"]
        save_file(tensors | changed[how], folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "how, named",
    [
        ("no config", "config.json"),
        ("config is no JSON", "not valid JSON"),
        ("no weights", "model.safetensors"),
        ("no tokenizer", "tokenizer"),
        ("architecture", "mamba"),
        ("truncated", "truncated"),
        ("index leaves the folder", "../a.safetensors"),
        ("missing", "lm_head.weight"),
        ("extra", "more.weight"),
        ("mis-shaped", "lm_head.weight"),
        ("NaN", "not finite"),
    ],
)
def test_damaged_folders(fails, tmp_path, how, named):
    printed = "\n" if how == "NaN" else ""
    assert named in fails("--checkpoint", damaged(tmp_path / "model", how), printed=printed.strip())


def test_neither_a_folder_nor_a_hub_id(fails, tmp_path):
    message = fails("--checkpoint", tmp_path / "not there")
    assert "folder" in message and "org/name" in message


def test_non_finite_logits_while_decoding(call, tmp_path):
    folder = recital(tmp_path, "abcde", poison=66)  # c is said well, but what follows it is NaN
    out, err = call("--checkpoint", folder, status=2)
    assert out.rstrip() == "abc" and "not finite" in err and err.count("\n") == 1


def test_memory_is_estimated_before_allocation(call, fails, abc, monkeypatch):
    slot = 2 * 4 * 4  # K and V of one layer, one head of 4, float32
    weights = sum(tensor.nbytes for tensor in load_file(abc / "model.safetensors").values())
    monkeypatch.setattr(machine, "free_bytes", lambda device: weights - 1)
    message = fails("--checkpoint", abc)
    assert "weights" in message and "--dtype" in message
    sizes = [weights]
    monkeypatch.setattr(machine, "free_bytes", lambda device: sizes.pop(0) if len(sizes) > 1 else sizes[0])
    for free, flags, advice in (
        (3 * 256 * slot + slot, (), (128, 3)),  # a cache holds multiples of 128 slots
        (3 * 256 * slot + slot, ("--draft", "ngram", "--num-draft-tokens", 3), (123, 2)),  # and a few for drafts
        (256 * slot, (), (0, 1)),
        (128 * slot, (), (0, 0)),
    ):
        argv = ("--checkpoint", abc, "--max-new-tokens", 2, *flags)
        sizes[:] = weights, free
        message = fails(*argv, "--num-samples", 4, "--max-seq-len", 256)
        found = [re.search(what, message) for what in (r"--max-seq-len (\d+) at this batch", r"a batch of (\d+)")]
        assert tuple(int(fits[1]) if fits else 0 for fits in found) == advice, message
        assert ("no cache at all" in message) == (advice == (0, 0))
        for length, rows in ((advice[0], 4), (256, advice[1])):  # what is advised works
            sizes[:] = weights, free
            if length and rows:
                call(*argv, "--num-samples", rows, "--max-seq-len", length)


def test_a_shape_too_large_for_memory_is_refused(fails, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 10**6)
    monkeypatch.setattr(checkpoint, "random_model", None)
    message = fails("--shape", "llama-2-7b")
    assert "13.5 GB" in message and "0.0 GB" in message


def test_memory_that_is_refused_is_one_line_and_other_errors_are_not(fails, abc, monkeypatch):
    def refuse(*argv, **options):
        torch.empty(1 << 52)

    def fault(*argv, **options):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(checkpoint, "load", refuse)
    assert "allocate memory" in fails("--checkpoint", abc)
    monkeypatch.setattr(checkpoint, "load", fault)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        generate.main(["--checkpoint", str(abc)])


def test_no_working_compiler_is_one_line(fails, abc, monkeypatch, tmp_path):
    asked = ("--checkpoint", abc, "--prompt", "a", "--max-new-tokens", 2, "--compile")
    inductor.prepare.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "nothing"))}):
        assert "--no-compile --kernels inductor" in fails(*asked)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "CC and CXX name it"),
        (RuntimeError("CppCompileError: C++ compile error\n\nOutput:\nfatal error: a.h\nLater"), "error: a.h"),
        (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), "Python's headers"),
    ],
)
def test_what_a_compiler_says_is_one_line(capsys, error, words):
    assert command_line.refuse("a.py", error) == 2
    line = capsys.readouterr().err
    assert line.startswith("a.py: error: no working compiler") and words in line and "Later" not in line


def test_another_command_that_fails_is_told_as_it_is(capsys):
    assert command_line.refuse("a.py", subprocess.CalledProcessError(1, ["/accounts/g++/python", "-m", "pip"])) == 2
    assert "compiler" not in (line := capsys.readouterr().err) and "'-m', 'pip'" in line and line.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_closed_streams(abc):
    command = f"{sys.executable} {ROOT / 'generate.py'} --checkpoint {abc} --prompt - --json <&- 2>&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["text"] == "abcdefg" and not done.stderr


# -- interruption ----------------


def interrupt_after(monkeypatch, count):
    """The next answer ends in Ctrl-C after `count` pieces."""
    real = Engine.generate

    def interrupted(self, *args, **options):
        monkeypatch.setattr(Engine, "generate", real)
        for i, piece in enumerate(real(self, *args, **options)):
            if i == count:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Engine, "generate", interrupted)


def test_interrupt_keeps_what_was_generated(call, abc, monkeypatch):
    interrupt_after(monkeypatch, 3)
    out, err = call("--checkpoint", abc, status=130)
    assert out == "abc\n" and SUMMARY.fullmatch(err)
    interrupt_after(monkeypatch, 4)
    out, err = call("--checkpoint", abc, "--json", "--num-samples", 2, status=130)
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["ab", "ab"]
    assert {json.loads(line)["stop_reason"] for line in out.splitlines()} == {"interrupted"}


@contextlib.contextmanager
def start(*argv):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "generate.py"), *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a test run in the background of a shell ignores SIGINT, and its children would too
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=env, preexec_fn=listen, **pipes) as program:
        try:
            yield program
        finally:
            program.kill()


def test_sigint_ends_cleanly(tmp_path):
    folder = recital(tmp_path, "abcdefg", context=1 << 20)
    with start("--checkpoint", folder, "--max-new-tokens", 500_000) as program:
        assert select.select([program.stdout], [], [], 120)[0]
        first = program.stdout.read(5)
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=120)
    assert program.returncode == 130
    said = (first + out).decode()
    assert said.endswith("\n") and len(said) > 5 and ("abcdefg" * len(said)).startswith(said[:-1])
    assert SUMMARY.fullmatch(err.decode())


def test_a_reader_that_leaves_is_no_error(tmp_path):
    folder = recital(tmp_path, "abcdefg", context=1 << 20)
    with start("--checkpoint", folder, "--max-new-tokens", 500_000) as program:
        assert program.stdout.read(5) == b"abcde"
        program.stdout.close()
        err = program.stderr.read()
        program.wait(timeout=120)
    assert (err, program.returncode) == (b"", 141)


# -- chat ----------------

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
# what the model said before is cut to its first two characters, as templates drop earlier reasoning
FORGETFUL = PLAIN.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}{{ m.content[:2] }}{% else %}{{ m.content }}{% endif %}"
)


@pytest.fixture
def turns(monkeypatch):
    """What each turn of a chat passed to the engine: [prompt ids, ids answered, tokens prefilled]."""
    seen, real = [], Engine.generate

    def spy(self, prompts, *args, **options):
        ids = []
        seen.append([list(prompts[0]), ids, -1])
        for piece in real(self, prompts, *args, **options):
            ids.extend(piece.ids)
            seen[-1][2] = self.stats.prefill_tokens
            yield piece

    monkeypatch.setattr(Engine, "generate", spy)
    return seen


def chat_folder(tiny, template, **changes):
    folder, _ = tiny("llama", vocab_size=VOCAB, eos_token_id=257, bos_token_id=256, seed=3, **changes)
    return add_tokenizer(folder, template=template, eos_token_id=[257, 258])


@pytest.mark.parametrize("template", [PLAIN, FORGETFUL], ids=["appends", "edits history"])
def test_chat_reuses_the_common_prefix_and_answers_as_a_fresh_prefill(call, tiny, turns, template):
    folder = chat_folder(tiny, template)
    argv = ("--checkpoint", folder, "--temperature", 0, "--max-new-tokens", 9)
    out, _ = call(*argv, "--chat", "--system", "Be brief.", stdin="hello\nwhat is that?\n\nbye\n")
    assert out.count("> ") == 5 and len(turns) == 3  # an empty line is no question
    engine, said, cached = Engine.load(folder), list(turns), []
    for prompt, answer, prefilled in said:
        fresh = [i for p in engine.generate([prompt], SamplingParams(0.0), max_new_tokens=9) for i in p.ids]
        engine._cached = []
        assert answer == fresh
        common = next((i for i, (a, b) in enumerate(zip(prompt, cached)) if a != b), min(len(prompt) - 1, len(cached)))
        assert prefilled == len(prompt) - common
        cached = [*prompt, *answer[:-1]]
    rendered = engine.tokenizer.encode_chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    )
    assert said[0][0] == rendered and rendered.count(256) == 1
    assert all(prefilled < len(prompt) / 1.5 for prompt, _, prefilled in said[1:])


def test_chat_without_a_template_is_one_line(fails, abc):
    assert "chat template" in fails("--checkpoint", abc, "--chat")


def test_chat_interrupt_stops_the_answer_and_not_the_program(call, tmp_path, turns, monkeypatch):
    folder = recital(tmp_path, "abcdefg", "<|eos|>", template=PLAIN)
    interrupt_after(monkeypatch, 2)
    out, _ = call(
        "--checkpoint", folder, "--chat", "--temperature", 0, "--ignore-eos", "--max-new-tokens", 4, stdin="a\nb\n"
    )
    decode = Engine.load(folder).tokenizer.file.model.decode
    second = decode(turns[-1][0], skip_special_tokens=False)
    assert out.count("> ") == 3
    assert second.startswith("<|bos|>u:a<|eot|>a:") and second.endswith("<|eot|>u:b<|eot|>a:")
    assert len(second) == len("<|bos|>u:a<|eot|>a:??<|eot|>u:b<|eot|>a:")  # the two pieces before Ctrl-C are kept


def test_chat_ctrl_c_before_the_answer_forgets_the_question(call, tmp_path, turns, monkeypatch):
    folder, real, asked = recital(tmp_path, ":abc", "<|eos|>", template=PLAIN), Tokenizer.encode_chat, []

    def interrupted(self, messages):
        asked.append([m["content"] for m in messages])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(self, messages)

    monkeypatch.setattr(Tokenizer, "encode_chat", interrupted)
    out, _ = call("--checkpoint", folder, "--chat", "--temperature", 0, stdin="x\ny\nz\n")
    assert out == "> abc\n> \n> abc\n> \n" and asked == [["x"], ["x", "abc", "y"], ["x", "abc", "z"]]


def test_chat_ctrl_c_at_the_prompt_leaves(call, tmp_path, monkeypatch):
    folder = recital(tmp_path, "abc", "<|eos|>", template=PLAIN)

    def ctrl_c(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", ctrl_c)
    assert call("--checkpoint", folder, "--chat") == ("\n", "")


def test_a_full_conversation_loses_its_oldest_turns_and_goes_on(call, tiny, turns):
    folder = chat_folder(tiny, PLAIN)
    argv = ("--checkpoint", folder, "--chat", "--max-seq-len", 60, "--ignore-eos", "--temperature", 0)
    out, err = call(*argv, "--system", "be kind", stdin="hello\nagain\nonce more\n")
    assert len(turns) == 3 and len(turns[0][0]) + len(turns[0][1]) == 60  # the first answer fills it
    assert [line for line in err.splitlines() if "full" in line] == [
        "the conversation is full: its oldest turn went"
    ] * 2
    bytes_ = byte_ids()
    for (ids, _, _), said in zip(turns, ("hello", "again", "once more")):
        text = "".join(chr(b) for i in ids for b in range(128) if bytes_[b] == i)
        assert said in text and "be kind" in text and sum(w in text for w in ("hello", "again", "once more")) == 1


def test_a_question_that_does_not_fit_at_all_is_refused(call, tiny):
    folder = chat_folder(tiny, PLAIN)
    out, err = call("--checkpoint", folder, "--chat", "--max-seq-len", 60, stdin="x" * 70 + "\n", status=2)
    assert err.count("\n") == 1 and "the question has" in err and "--max-seq-len is 60" in err


def test_an_empty_line_is_no_question(call, tiny, turns):
    call("--checkpoint", chat_folder(tiny, PLAIN), "--chat", "--max-new-tokens", 2, stdin="\n  \nhello\n\n")
    assert len(turns) == 1


def test_chat_context_is_the_models_or_8192(call, tmp_path, monkeypatch):
    sizes, real = [], Engine.limit
    monkeypatch.setattr(Engine, "limit", lambda self, b, s: sizes.append(s) or real(self, b, s))
    for context in (512, 20_000):
        folder = recital(tmp_path / str(context), "abc", "<|eos|>", template=PLAIN, context=context)
        call("--checkpoint", folder, "--chat", stdin="a\n")
    assert sizes == [512, 8192]


def test_chat_seed_repeats_the_conversation(call, tiny):
    argv = ("--checkpoint", chat_folder(tiny, PLAIN), "--chat", "--max-new-tokens", 8)
    run = functools.partial(call, *argv, stdin="a\nb\n")
    assert run("--seed", 1)[0] == run("--seed", 1)[0] != run("--seed", 2)[0]


# -- selftest ----------------


def test_selftest_passes_its_arguments_and_its_status_on(monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "call", lambda command: ran.append(command) or 1)
    assert generate.main(["--checkpoint", "x", "--selftest"]) == 1
    assert ran[0][1:] == [str(ROOT / "scripts" / "selftest.py"), "--checkpoint", "x", "--selftest"]


def test_selftest_interrupted(selftest, monkeypatch):
    def ctrl_c(*argv, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "call", ctrl_c)
    monkeypatch.setattr(Engine, "load", ctrl_c)
    assert generate.main(["--selftest"]) == 130
    assert selftest() == (130, [])


@pytest.fixture
def selftest(capsys, monkeypatch):
    """selftest(*argv) -> (exit status, lines); the leaf program, in this process."""
    path = list(sys.path)
    module = runpy.run_path(str(ROOT / "scripts" / "selftest.py"))
    monkeypatch.setattr(sys, "path", path)

    def selftest(*argv):
        capsys.readouterr()
        status = module["main"]([str(a) for a in argv])
        out, err = capsys.readouterr()
        return status, (out + err).splitlines()

    return selftest


def test_selftest_says_a_line_per_check(selftest, dice):
    status, lines = selftest("--checkpoint", dice, "--device", "cpu")
    assert status == 0 and f"torch {torch.__version__}" in lines[0] and "float32" in lines[0]
    assert len(lines) == 19 and all(line.startswith("ok   ") for line in lines[1:])
    assert "fast CPU operators" in lines[0] and any("kernel (dense) of lm_head, 1 rows" in line for line in lines)
    status, lines = selftest("--checkpoint", dice, "--device", "cpu", "--kernels", "inductor")
    assert status == 0 and "CPU operators" not in lines[0] and len(lines) == 7


def test_selftest_compares_a_recorded_answer(selftest, call, tmp_path):
    """golden.json is what --json printed, on whatever machine."""
    folder = recital(tmp_path, "abcdefg", "<|eos|>")
    out, _ = call("--checkpoint", folder, "--prompt", "ab", "--temperature", 0, "--json")
    (folder / "golden.json").write_text(out)
    status, lines = selftest("--checkpoint", folder, "--device", "cpu")
    assert status == 0 and lines[-1].startswith("ok   golden tokens")
    record = json.loads(out)
    write_json(folder / "golden.json", record | {"ids": record["ids"][:-1] + [0]})
    status, lines = selftest("--checkpoint", folder, "--device", "cpu")
    assert status == 1 and lines[-1].startswith("FAIL golden tokens that differ: 1 ")


def test_selftest_notices_an_engine_that_is_wrong(selftest, dice, monkeypatch):
    real, made = Engine.load.__func__, []

    def load(cls, *args, **options):
        made.append(real(cls, *args, **options))
        if len(made) == 1:  # the engine under test, not its twin
            made[0].model.layers[1].mlp.down_proj.weight[3, 5] += 0.3
        return made[-1]

    monkeypatch.setattr(Engine, "load", classmethod(load))
    status, lines = selftest("--checkpoint", dice, "--device", "cpu")
    assert status == 1 and sum(line.startswith("FAIL ") for line in lines) >= 4


def test_selftest_refuses_what_it_cannot_compare(selftest):
    status, lines = selftest("--shape", "tiny")
    assert status == 2 and len(lines) == 1 and lines[0].startswith("generate.py: error: ") and "--shape" in lines[0]
