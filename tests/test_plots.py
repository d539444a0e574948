"""scripts/plots.py: what it draws is what benchmarks/*.csv holds."""

import csv
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import plots

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
REPORT = {
    "layers": [
        {"name": "layers.0.mlp.down_proj", "weight_error": 0.1, "output_error": 0.05},
        {"name": "layers.1.mlp.down_proj", "weight_error": 0.2},
        {"name": "layers.0.self_attn.o_proj", "weight_error": 0.3},
        {"name": "lm_head", "weight_error": 0.4},
    ]
}


@pytest.fixture
def folder(tmp_path):
    """A copy of the measurements, to change."""
    for path in BENCHMARKS.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def read(name):
    return list(csv.DictReader((BENCHMARKS / f"{name}.csv").open()))


def drawn(picture):
    [axes] = picture.axes
    return {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axes.lines}


def test_the_pictures_are_redrawn_from_the_measurements(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report, output = tmp_path / "report.json", tmp_path / "new" / "plots"
    report.write_text(json.dumps(REPORT))
    pictures = plots.pictures(BENCHMARKS, report)

    rows = read("rows")
    last = max(i for i, r in enumerate(rows) if (r["device"], r["mode"], r["rows"]) == ("NVIDIA H200", "int8", "1"))
    run = [(float(r["rows"]), float(r["ratio"])) for r in rows[last:] if r["mode"] == "int8"][:5]
    assert drawn(pictures["rows"])["NVIDIA H200, llama-2-7b, int8, triton"] == run

    found = read("decode")
    for name, points in drawn(pictures["context"]).items():
        assert len(points) > 1 and points == sorted(points)
        for _, rate in points:
            assert any(float(r["decode_tok_s"]) == rate and r["device"] in name and r["shape"] in name for r in found)

    points = [p for line in drawn(pictures["speculation"]).values() for p in line]
    assert set(points) <= {(float(r["mean_accepted"]), float(r["speedup"])) for r in read("speculative")}
    settings = {(r["device"], r["tp"], r["shape"], r["draft"], r["num_draft_tokens"]) for r in read("speculative")}
    assert len(drawn(pictures["speculation"])) == len(settings)

    [axes] = pictures["quantization"].axes
    losses = [float(r["loss_percent"]) for r in read("quantization") if r["mode"] != "unquantized"]
    assert [bar.get_width() for bar in axes.patches] == losses
    [axes] = pictures["beside"].axes
    wanted = [rate for rates in plots.beside(BENCHMARKS).values() for rate in rates.values()]
    assert sorted(bar.get_width() for bar in axes.patches) == sorted(wanted) and len(wanted) > 12
    rungs = [r for r in read("ladder") if (r["model"], r["tp"]) == ("llama-2-7b", "2")]
    [axes] = pictures["ladder-llama-2-7b-2-ranks-on-nvidia-h200"].axes
    assert [bar.get_width() for bar in axes.patches] == [float(r["tok_s"]) for r in rungs] and len(rungs) > 5
    assert axes.lines[0].get_xdata()[0] == pytest.approx(4680e9 / float(rungs[0]["bytes_per_token"]))
    assert drawn(pictures["layers"]) == {"mlp.down_proj": [(0, 0.05), (1, 0.2)], "self_attn.o_proj": [(0, 0.3)]}

    assert plots.main(["--report", str(report), "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {
        f"{name}.{kind}" for name in pictures for kind in ("png", "svg")
    }
    assert capsys.readouterr().out.count("\n") == len(pictures)


def test_the_newest_row_counts(folder):
    rows = read("decode")
    [name] = [name for name in plots.context_series(rows) if name.startswith("NVIDIA H100")]
    newer = next(r for r in rows if r["device"].startswith("NVIDIA H100") and r["prompt_len"] == "32000")
    later = plots.context_series([*rows, newer | {"decode_tok_s": "99"}])
    assert plots.context_series(rows)[name][-1][1] == float(newer["decode_tok_s"]) and later[name][-1][1] == 99
    ratio = [r | {"ratio": "7"} for r in read("rows") if r["device"] == "NVIDIA H200"][-5:]
    assert [y for _, y in plots.rows_series([*read("rows"), *ratio])[f"{plots.start(ratio[0])}, triton"]] == [7] * 5


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda folder: (folder / "rows.csv").unlink(), "rows.csv"),
        (lambda folder: (folder / "rows.csv").write_text("rows,ratio\n1,1\n"), "lacks the column or field 'tp'"),
        (lambda folder: (folder / "speculative.csv").write_text("tp\n"), "nothing to draw of: Speculation"),
        (lambda folder: (folder / "quantization.csv").write_bytes(b"\xff"), "utf-8"),
        (lambda folder: (folder / "report.json").write_text("{"), "report.json"),
        (lambda folder: (folder / "report.json").write_text('{"layers": 3}'), "report.json"),
    ],
)
def test_bad_input_is_one_line(folder, change, needle, capsys):
    pytest.importorskip("matplotlib")
    (folder / "report.json").write_text(json.dumps(REPORT))
    change(folder)
    argv = ["--benchmarks", str(folder), "--report", str(folder / "report.json"), "--output", str(folder / "out")]
    assert plots.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("plots.py: error: ") and err.count("\n") == 1 and needle in err


def test_without_matplotlib_it_is_one_line(monkeypatch, tmp_path, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert plots.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == 'plots.py: error: pictures need matplotlib: pip install -e ".[plot]"\n'
