"""scripts/ladder.py: its rungs, its files, and how it refuses."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import benchmark
import ladder
import plots

import compilation
import engine

QUICK = ["--device", "cpu", "--new-tokens", "6", "--repeats", "1", "--heldout-tokens", "64"]
DRAFT = f"{engine.DEFAULT_CHECKPOINT}-draft"
RUNGS = [ladder.FIRST, *(rung.name for rung in ladder.RUNGS)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Neither the memory nor the compiler is what is tested here."""
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 1e10)
    for module in (engine, compilation):
        monkeypatch.setattr(module, "compiled", lambda fn, name, **options: fn)
    monkeypatch.setattr(compilation, "prepare", lambda: None)


def climb(folder, *argv):
    assert ladder.main([*QUICK, "--output", str(folder), *argv]) == 0
    found = json.loads((folder / "ladder.json").read_text("utf-8"))
    return found, {row["rung"]: row for row in found["rungs"]}


def test_a_checkpoint_climbs(tmp_path, capsys):
    found, rows = climb(
        tmp_path / "new", "--rows", "1", "--checkpoint", DRAFT, "--draft", DRAFT, "--num-draft-tokens", "2"
    )
    assert [*rows] == RUNGS and not found["skipped"]
    assert {name for name, row in rows.items() if row["kernels"].startswith("cpu")} == {*RUNGS[3:]}
    first = found["rungs"][0]
    for row in rows.values():
        assert row["speedup"] == pytest.approx(row["tok_s"] / first["tok_s"]) and row["ttft_ms"] > 0
        if row["bytes_per_token"]:
            assert row["mbu"] == pytest.approx(row["bytes_per_token"] * row["tok_s"] / 1e10, rel=1e-6)
            assert found["roofline"][row["weights"]] == pytest.approx(1e10 / row["bytes_per_token"])
    assert rows["int4"]["bytes_per_token"] < rows["int8"]["bytes_per_token"] < first["bytes_per_token"]
    assert rows["int4"]["memory_gb"] < rows["int8"]["memory_gb"] < rows["eager, static cache"]["memory_gb"]
    assert rows["speculation"]["memory_gb"] > rows["eager, static cache"]["memory_gb"]  # the draft's too
    plain = rows["eager, static cache"]["perplexity"]
    assert first["perplexity"] == rows["speculation"]["perplexity"] == plain
    assert rows["int4"]["perplexity"] == rows["int4 and speculation"]["perplexity"] != plain
    assert (rows["compiled"]["compiled"], rows["eager, static cache"]["compiled"]) == (True, False)
    assert rows["speculation"]["draft"] == "tales-draft" and rows["int8"]["draft"] is None
    out = capsys.readouterr().out
    assert all(name in out for name in RUNGS) and f"{plain:.3f}" in out
    lines = list(csv.DictReader((tmp_path / "new" / "ladder.csv").open()))
    assert [float(line["tok_s"]) for line in lines] == [row["tok_s"] for row in found["rungs"]]
    assert (tmp_path / "new" / "int4-gptq" / "config.json").is_file()


def test_a_shape_climbs_with_simulated_acceptance(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found, rows = climb(tmp_path, "--shape", "tiny", "--simulated-acceptance", "1", "--num-draft-tokens", "2")
    reasons = {row["rung"]: row["reason"] for row in found["skipped"]}
    assert reasons.keys() == {ladder.FIRST, "int4 and speculation"}
    assert reasons[ladder.FIRST] == "transformers is not installed"
    assert "self-int4" in reasons["int4 and speculation"] and "--draft" in reasons["int4 and speculation"]
    assert rows["speculation"]["mean_accepted"] > 1 and found["simulated_acceptance"] == 1
    assert all(row["perplexity"] is None for row in rows.values())
    assert "simulated acceptance of 1" in capsys.readouterr().out
    assert rows["eager, static cache"]["speedup"] == 1


def test_without_matplotlib_the_rest_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", ladder.RUNGS[:1])
    monkeypatch.setattr(ladder.Ladder, "transformers", lambda self: (_ for _ in ()).throw(ValueError("left out")))
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    climb(tmp_path, "--shape", "tiny")
    assert capsys.readouterr().err == 'no picture: pictures need matplotlib: pip install -e ".[plot]"\n'
    assert {path.name for path in tmp_path.iterdir()} == {"ladder.csv", "ladder.json"}


def test_the_defaults():
    assert ladder.parse([]).checkpoint == str(engine.DEFAULT_CHECKPOINT) and ladder.parse([]).draft == DRAFT
    assert ladder.parse(["--checkpoint", "x"]).draft == "ngram"
    assert ladder.parse(["--shape", "x"]).draft == "self-int4"


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (["--shape", "none"], "shape 'none' is not known"),
        (["--checkpoint", "no-such-folder"], "no-such-folder"),
        (["--draft", "no-such-draft"], "no-such-draft"),
        (["--shape", "tiny", "--draft", "none:int4"], "shape 'none' is not known"),
        (["--shape", "tiny", "--new-tokens", "5000"], "context"),
        (["--simulated-acceptance", "1.5"], "1.5"),
        (["--shape", "tiny", "--checkpoint", "x"], "not allowed"),
        (["--output", __file__], "test_ladder.py"),
    ],
)
def test_bad_input_is_one_line(argv, needle, tmp_path, capsys):
    try:
        status = ladder.main([*QUICK[:2], "--output", str(tmp_path), *argv])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.startswith("ladder.py: error: ") and err.count("\n") == 1 and needle in err


def rung(name, weights, rate):
    return {"rung": name, "weights": weights, "tok_s": rate, "speedup": rate / 10}


def test_the_picture_has_a_bar_a_rung_and_a_line_a_format():
    pytest.importorskip("matplotlib")
    rows = [rung("eager", "float32", 10.0), rung("compiled", "float32", 20.0), rung("int8", "int8", 35.0)]
    found = {"model": "m", "device": "d", "ranks": 2, "rungs": rows, "roofline": {"float32": 40.0, "int8": 80.0}}
    [axes] = plots.ladder(found).axes
    assert [bar.get_width() for bar in axes.patches] == [10.0, 20.0, 35.0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["eager", "compiled", "int8"]
    assert [line.get_xdata()[0] for line in axes.lines] == [40.0, 80.0]
    assert axes.patches[0].get_facecolor() == axes.patches[1].get_facecolor() != axes.patches[2].get_facecolor()
    assert axes.get_xlim()[1] > 80 and axes.get_title() == "m on 2 x d"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.undo()
    found, rows = climb(tmp_path, "--shape", "tiny", "--device", "cuda")
    assert rows["kernels"]["kernels"] == "triton" and rows["kernels"]["memory_gb"] > 0
    assert [row["rung"] for row in found["skipped"]] == ["int4 and speculation"]
