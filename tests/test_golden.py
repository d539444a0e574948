"""Golden ids of the embedded pair: the same tokens in every mode as when they were recorded (`scripts/golden.py`)."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import golden  # noqa: E402

RECORD = json.loads(golden.RECORD.read_text())
MODES = [*golden.MODES, golden.RANKS]


def test_every_mode_is_recorded():
    assert list(RECORD) == MODES == list(golden.NAMES)
    assert all(len(ids) == golden.TOKENS for ways in RECORD.values() for ids in ways.values())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "compiled"])  # that one is in test_generate.py
def test_golden_ids(mode):
    assert golden.golden(mode) == RECORD[mode]


def test_a_changed_id_is_told(tmp_path, monkeypatch, capsys):
    changed = {"plain": {way: [*ids[:-1], 0] for way, ids in RECORD["plain"].items()}}
    monkeypatch.setattr(golden, "RECORD", tmp_path / "golden.json")
    golden.RECORD.write_text(json.dumps(changed))
    assert golden.main(["plain"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == "plain, greedy: 1 of 64 ids differ"
    assert golden.main(["plain", "--write"]) == 0 and golden.main(["plain"]) == 0
    assert json.loads(golden.RECORD.read_text())["plain"] == RECORD["plain"]
