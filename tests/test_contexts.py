"""scripts/contexts.py: a row for every position, and how it refuses."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import benchmark
import contexts

QUICK = ["--shape", "tiny", "--device", "cpu", "--repeats", "1"]


def test_a_row_for_every_position(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 1e10)
    path = tmp_path / "contexts.csv"
    assert contexts.main([*QUICK, "--mode", "int8", "--positions", "5,200", "--csv", str(path)]) == 0
    rows = list(csv.DictReader(path.open()))
    assert [(row["position"], row["mode"], row["cache_len"]) for row in rows] == [
        ("5", "int8", "256"),
        ("200", "int8", "256"),
    ]
    more = int(rows[1]["bytes_per_token"]) - int(rows[0]["bytes_per_token"])
    assert more == 195 * 2 * 2 * 2 * 64 * (2 if rows[0]["dtype"] == "bfloat16" else 4)  # layers, k and v, KV heads
    for row in rows:
        ms = float(row["ms"])
        assert float(row["tok_s"]) == pytest.approx(1e3 / ms)
        assert float(row["mbu"]) == pytest.approx(int(row["bytes_per_token"]) / ms / 1e7)
    assert "position 200" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--shape", "nothing"], [*QUICK, "--positions", "4096"]], ids=str)
def test_bad_input_gets_one_line(argv, capsys):
    assert contexts.main([*argv, "--no-csv"]) == 2
    assert capsys.readouterr().err.startswith("contexts.py: error: ")
