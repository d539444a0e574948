"""scripts/benchmark.py: what it counts, what it writes, and how it refuses."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import benchmark

import checkpoint
import shapes
from engine import DEFAULT_CHECKPOINT, Engine
from tokenizer import Ids
from tp import TensorParallel

QUICK = [
    "--shape",
    "tiny",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--no-compile",
    "--new-tokens",
    "9",
    "--repeats",
    "1",
]
FIELDS = (
    "shape mode batch prompt_len new_tokens cache_len decode_tok_s total_tok_s tpot_ms ttft_ms prefill_tok_s mfu "
    "bytes_per_token read_gb_s bandwidth_gb_s mbu compile_s_cold compile_s_warm first_token_s peak_memory_gb kernels "
    "versions commit"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The memory is not what is tested here."""
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 1e10)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_json_and_rows(tmp_path, capsys):
    path = tmp_path / "new" / "d.csv"
    argv = [*QUICK, "--mode", "int8", "--prefill", "8,24", "--transformers", "--rows-table", "1,3"]
    argv += ["--csv", str(path), "--commit", "abc"]
    assert benchmark.main(argv) == 0
    result = last_line(capsys)
    assert not [name for name in FIELDS.split() if name not in result]
    assert (result["mode"], result["group_size"], result["kernels"], result["commit"]) == ("int8", None, "cpu", "abc")
    assert result["versions"]["torch"] == torch.__version__
    assert result["decode_tok_s"] == pytest.approx(1e3 / result["tpot_ms"], rel=1e-3)
    assert result["read_gb_s"] == pytest.approx(result["bytes_per_token"] * result["decode_tok_s"] / 1e9, rel=1e-3)
    assert result["mbu"] == pytest.approx(result["read_gb_s"] / 10, rel=1e-3)
    assert [row["prompt_len"] for row in result["prefill"]] == [8, 24]
    assert result["mfu"] == result["prefill"][-1]["mfu"] > 0
    assert all(row["transformers_ms"] > 0 for row in result["prefill"])
    assert [row["rows"] for row in result["rows"]] == [1, 3]
    assert result["rows"][0]["ratio"] == 1.0

    assert benchmark.main([*QUICK, "--batch", "2", "--csv", str(path)]) == 0
    for mode, size, found in (("int8", ["--group-size", "32"], 32), ("int4", [], 128)):
        assert benchmark.main([*QUICK, "--mode", mode, *size, "--no-csv"]) == 0
        assert last_line(capsys)["group_size"] == found
    rows = list(csv.DictReader(path.open()))
    assert [(r["mode"], r["batch"]) for r in rows] == [("int8", "1"), ("bf16", "2")]
    assert float(rows[0]["decode_tok_s"]) == result["decode_tok_s"]
    assert rows[0]["commit"] == "abc"
    assert len(list(csv.DictReader((path.parent / "prefill.csv").open()))) == 2
    assert len(list(csv.DictReader((path.parent / "rows.csv").open()))) == 2
    assert not list(path.parent.glob("*.tmp"))


def test_bytes_per_token_are_the_weights_and_the_prefix(capsys):
    assert benchmark.main([*QUICK, "--prompt-len", "100", "--cache-len", "512", "--no-csv"]) == 0
    result = last_line(capsys)
    linears = 2 * (256 * (4 + 2 * 2) * 64 + 256 * 256 + 3 * 256 * 512) + 256 * 512
    kv = 2 * 2 * 2 * 64
    assert result["bytes_per_token"] == 4 * (linears + kv * (100 + 8 // 2))
    assert result["cache_len"] == 512


def test_a_batch_reads_the_weights_once(capsys):
    alone, together = [], []
    for batch, out in (("1", alone), ("4", together)):
        assert benchmark.main([*QUICK, "--batch", batch, "--no-csv"]) == 0
        out.append(last_line(capsys))
    assert together[0]["bytes_per_token"] < alone[0]["bytes_per_token"] / 3
    assert together[0]["decode_tok_s"] == pytest.approx(4e3 / together[0]["tpot_ms"], rel=1e-3)


def test_prefill_flops():
    engine = Engine(checkpoint.random_model(shapes.shape_config("tiny")), Ids(512), compile=False)
    linears = 2 * (256 * (4 + 2 * 2) * 64 + 256 * 256 + 3 * 256 * 512)
    attention = 2 * 4 * 4 * 64 * (10 * 11 / 2)  # two layers, two products of two operations, four heads of 64
    assert benchmark.prefill_flops(engine, 10) == 2 * 10 * linears + 2 * 256 * 512 + attention


def test_prompts_never_repeat():
    engine = Engine(checkpoint.random_model(shapes.shape_config("tiny")), Ids(512), compile=False)
    first = [benchmark.random_prompts(engine, 2, 5, seed) for seed in (1, 2)]
    assert first[0][0][0] != first[1][0][0]
    assert first[0] == benchmark.random_prompts(engine, 2, 5, 1)


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (["--shape", "none"], "shape 'none' is not known"),
        ([], "required"),
        (["--checkpoint", "x", "--mode", "int8"], "--mode"),
        (["--checkpoint", "no such folder"], "no such folder"),
        ([*QUICK, "--mode", "int4", "--group-size", "100"], "--group-size 100"),
        ([*QUICK, "--new-tokens", "1"], "--new-tokens"),
        ([*QUICK, "--prompt-len", "1020"], "context"),
        ([*QUICK, "--temperature", "-1"], "temperature is -1"),
        ([*QUICK, "--rows-table", "2,4"], "starts with 1"),
        ([*QUICK, "--simulated-acceptance", "0.5"], "need --draft"),
        ([*QUICK, "--draft", "ngram", "--simulated-acceptance", "0.5,1.5"], "0.5,1.5"),
        (["--checkpoint", "x", "--draft", "ngram", "--simulated-acceptance", "0.5"], "random weights"),
        ([*QUICK, "--draft", "tiny:int3"], "tiny:int3"),
        ([*QUICK, "--draft", "llama-2"], "llama-2"),
        ([*QUICK, "--rows-table", "1,17"], "16 at most"),
        ([*QUICK, "--prefill", "4096", "--no-csv"], "context"),
    ],
)
def test_bad_input_is_one_line(argv, needle, capsys):
    try:
        status = benchmark.main(argv)
    except SystemExit as error:
        status = error.code
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("benchmark.py: error: ") and err.count("\n") == 1 and needle in err


@pytest.mark.parametrize("draft", ["tiny:int8", "self-int8", "ngram"])
def test_simulated_acceptance(draft, capsys, tmp_path):
    """Tokens a round are what the rate says, and the ideal is (tokens a round) x t / (K d + t)."""
    path = tmp_path / "d.csv"
    argv = [*QUICK, "--new-tokens", "200", "--draft", draft, "--num-draft-tokens", "3", "--csv", str(path)]
    assert benchmark.main([*argv, "--simulated-acceptance", "0,0.5,1"]) == 0
    result = last_line(capsys)
    rows = result["speculative"]
    assert [row["acceptance"] for row in rows] == [0, 0.5, 1]
    assert rows[0]["mean_accepted"] == 0
    assert rows[1]["mean_accepted"] == pytest.approx(0.875, abs=0.45)
    assert rows[2]["mean_accepted"] == 3
    for row, tokens in zip(rows, (1, 1.875, 4)):
        assert row["ideal"] == pytest.approx(
            tokens * row["plain_ms"] / (3 * row["draft_ms"] + row["plain_ms"]), rel=1e-3
        )
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["ideal"], rel=1e-3)
        assert row["tok_s"] == pytest.approx(1e3 * row["speedup"] / row["plain_ms"], rel=1e-3)
        assert (row["draft_ms"] == 0) == (draft == "ngram")
        assert row["ideal_bytes"] == pytest.approx(tokens, rel=1e-3) or draft != "ngram"
    assert len(list(csv.DictReader((tmp_path / "speculative.csv").open()))) == 3


@pytest.mark.skipif(not DEFAULT_CHECKPOINT.is_dir(), reason="needs the embedded checkpoints")
def test_speculation_on_held_out_text(capsys):
    argv = ["--checkpoint", str(DEFAULT_CHECKPOINT), "--device", "cpu", "--no-compile", "--no-csv", "--repeats", "2"]
    assert benchmark.main([*argv, "--new-tokens", "40", "--draft", f"{DEFAULT_CHECKPOINT}-draft"]) == 0
    [row] = last_line(capsys)["speculative"]
    assert (row["acceptance"], row["num_draft_tokens"], row["ideal"]) == ("real", "auto", None)
    engine = Engine.load(device="cpu")
    prompts = [benchmark.heldout_prompts(engine, 2, 20, seed) for seed in (1, 2)]
    assert len({tuple(row) for batch in prompts for row in batch}) == 4
    assert all(len(row) == 20 for batch in prompts for row in batch)


def test_missing_transformers_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert benchmark.main([*QUICK, "--prefill", "8", "--transformers", "--no-csv"]) == 2
    assert "transformers" in capsys.readouterr().err


def test_the_step_of_several_ranks_is_bytes_and_sums():
    """Two H200s gave 524 tok/s, 1.909 ms, for Llama-2-7B in bf16."""
    one = {"batch": 1, "tpot_ms": 3.15, "bytes_per_token": 13268680704, "bandwidth_gb_s": 4680.0}
    model = SimpleNamespace(tp=TensorParallel(), config=shapes.shape_config("llama-2-7b"))
    told = benchmark.step_of_ranks(SimpleNamespace(model=model), 2, one)
    assert "0.315 + 2.835 / 2 to read + 65 sums of 2.4 us = 1.888 ms, 529.5 tok/s (1.67 times)" in told
    assert "= 3.150 ms" in benchmark.step_of_ranks(SimpleNamespace(model=model), 1, one)


def test_another_header_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "decode.csv"
    path.write_text("a,b\n1,2\n")
    assert benchmark.main([*QUICK, "--csv", str(path)]) == 2
    assert "another header" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"


def test_known_device_bounds_the_denominator(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "KNOWN_READ", {benchmark.device_name(torch.device("cpu")): 5e12})
    assert benchmark.main([*QUICK, "--no-csv"]) == 0
    assert last_line(capsys)["bandwidth_gb_s"] == 5000


def test_a_cpu_is_measured_by_its_fastest_product(monkeypatch):
    """Without instructions for bfloat16 a product in it takes a hundred times as long, and MFU came out at 50."""
    took = {torch.bfloat16: 0.2, torch.float32: 0.002}

    def seconds(run, device, times):
        return took[run.__closure__[0].cell_contents.dtype]

    monkeypatch.setattr(benchmark, "seconds", seconds)
    rates = [benchmark.matmul_rate(torch.device("cpu"), dtype) for dtype in took]
    assert rates == [2 * 512**3 / 0.002] * 2
    assert torch.backends.cpu.get_cpu_capability() in benchmark.device_name(torch.device("cpu"))


def test_bandwidth_is_measured(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < benchmark.read_bandwidth(torch.device("cpu")) < 1e13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_on_a_gpu(mode, capsys):
    argv = ["--shape", "tiny", "--mode", mode, "--new-tokens", "20", "--repeats", "1", "--no-csv"]
    assert benchmark.main([*argv, "--rows-table", "1,4", "--prefill", "64"]) == 0
    result = last_line(capsys)
    assert result["mbu"] < 1
    assert result["compiled"] is True
    assert (result["compile_s_cold"] is None) != (result["compile_s_warm"] is None)
