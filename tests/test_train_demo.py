"""The training script on a tiny size, and the committed pair: it loads everywhere with the same logits and ids."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

pytest.importorskip("transformers")
import sentencepiece
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
from model import KVCache
from scripts import train_demo

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "checkpoints"
ODD = [
    "",
    "Hello",
    " Hello",
    "  two  spaces ",
    "\n\nx\n y",
    "tab\tx",
    "Ünï 中文 😀",
    "12 345.6",
    " ",
    "\n",
    "▁x",
    "a\x00é",
]


def documents(count: int, length: int) -> list[torch.Tensor]:
    """Documents whose pieces are all different, so that a label tells where it came from."""
    return [torch.tensor([1, *range(3 + i * length, 3 + (i + 1) * length), 2]) for i in range(count)]


def test_held_out_rows_score_every_token_once_with_context():
    docs = documents(7, 100)
    rows, labels = train_demo.held_out_rows(docs, 64)
    assert sorted(labels[labels != -100].tolist()) == sorted(torch.cat(docs)[1:].tolist())
    assert (rows[:, 0] == 1).all() and (labels[1:, :32] == -100).all()


def test_training_rows_begin_with_bos_and_label_themselves():
    docs = documents(40, 50)
    rows, labels = train_demo.training_rows(docs, 64, seed=3)
    assert (rows[:, 0] == 1).all() and (labels[:, 0] == -100).all()
    assert torch.equal(labels[:, 2:], rows[:, 2:])
    scored = set(labels.flatten().tolist())
    assert len(scored) > 0.95 * 40 * 50  # all but the ends of the stream
    assert not torch.equal(rows, train_demo.training_rows(docs, 64, seed=4)[0])
    with pytest.raises(ValueError, match="longer --text"):
        train_demo.training_rows(docs[:2], 64, seed=0)


def test_tiny_run_writes_folders_that_load_and_resumes(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "data" / "calibration.txt").read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    argv = ["train_demo.py", "--text", text, "--size", "tiny", "--out", tmp_path / "out", "--work", tmp_path / "work"]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    untimed = tuple(replace(recipe, minutes=float("inf")) for recipe in train_demo.recipes("tiny"))
    monkeypatch.setattr(train_demo, "recipes", lambda size: untimed)  # the same steps on a slow machine
    if importlib.util.find_spec("matplotlib") is None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", MagicMock())
    train_demo.main()
    lines = [json.loads(line) for line in (tmp_path / "work/target/log.jsonl").read_text().splitlines()]
    assert 4 < lines[-1]["valid_loss"] < lines[0]["valid_loss"] < 6.24  # log 512: no better than chance
    report = capsys.readouterr().out
    assert 0 < json.loads(report)["greedy_agreement"] <= 1
    for name in ("tales", "tales-draft"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        assert model.dtype == torch.bfloat16
        check_tokenizers(tmp_path / "out" / name, ["One day a little rabbit sat on a bank.\n\nIt was 1 o'clock."])
    train_demo.main()  # finished: trains no more, writes the same
    assert len((tmp_path / "work/target/log.jsonl").read_text().splitlines()) == len(lines)
    assert capsys.readouterr().out == report


def test_a_run_out_of_time_stops_and_stays_stopped(tmp_path):
    recipe = replace(train_demo.recipes("tiny")[0], epochs=3, minutes=1e-9)
    docs, valid = documents(12, 40), train_demo.held_out_rows(documents(2, 40), 64)
    for _ in range(2):
        train_demo.train(tmp_path, recipe, docs, valid)
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    recipe = replace(train_demo.recipes("tiny")[0], epochs=3, minutes=float("inf"))
    docs = documents(12, 40)
    valid = train_demo.held_out_rows(documents(2, 40), 64)
    train_demo.train(tmp_path / "whole", recipe, docs, valid)
    real, calls = train_demo.held_out_loss, []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_demo, "held_out_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_demo.train(tmp_path / "parts", recipe, docs, valid)
    train_demo.train(tmp_path / "parts", recipe, docs, valid)
    whole, parts = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def check_tokenizers(folder: Path, texts: list[str]) -> None:
    """transformers' ids equal sentencepiece's, BOS first."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(folder)
    for text in [*ODD, *texts]:
        assert fast(text).input_ids == [1, *pieces.encode(text)], text
        assert fast.decode(pieces.encode(text)) == pieces.decode(pieces.encode(text))


@pytest.mark.parametrize("name", ["tales", "tales-draft"])
def test_committed_folder_gives_transformers_logits_and_ids(name):
    folder = PAIR / name
    check_tokenizers(folder, (ROOT / "data" / "heldout.txt").read_text(encoding="utf-8").split("\n\n\n\n")[:5])
    tokens = AutoTokenizer.from_pretrained(folder)("Once upon a time there was a king.", return_tensors="pt").input_ids
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = checkpoint.load(str(folder), dtype=torch.float32)
    length = tokens.shape[1]
    cache = KVCache(ours.config, 1, length, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits = ours(tokens, torch.arange(length)[None], cache, end=length)
        torch.testing.assert_close(logits, reference(tokens).logits, rtol=1e-4, atol=1e-4)


def test_committed_pair_is_small_and_the_draft_follows_the_target():
    assert sorted(path.name for path in PAIR.iterdir() if path.is_dir()) == ["tales", "tales-draft"]
    assert sum(path.stat().st_size for path in PAIR.rglob("*")) < 24_000 * 1000
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(PAIR / "tales" / "tokenizer.model"))
    text = (ROOT / "data" / "heldout.txt").read_text(encoding="utf-8")
    ids = [torch.tensor([1, *ids, 2]) for ids in pieces.encode(text.split("\n\n\n\n")[:3])]
    rows, labels = (part[:6] for part in train_demo.held_out_rows(ids, 1024))
    pair = [AutoModelForCausalLM.from_pretrained(PAIR / name, dtype=torch.float32) for name in ("tales", "tales-draft")]
    means = train_demo.compare(*pair, rows, labels)
    assert means["loss"] < means["draft_loss"] - 0.3
    assert means["greedy_agreement"] >= 0.5 and means["expected_acceptance"] > 0.5
