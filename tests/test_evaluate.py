"""scripts/evaluate.py and scripts/harness.py: windows, numbers against plain arithmetic, and how they refuse."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import evaluate

import compilation
from engine import Engine
from quantize import text_rows
from sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
TALES = str(ROOT / "checkpoints" / "tales")
DRAFT = f"{TALES}-draft"
TEXT = "Once upon a time there was a king who had three sons, and the youngest was called Simpleton. " * 3
GREEDY = SamplingParams(temperature=0.0)
QUICK = ["--device", "cpu", "--dtype", "float32", "--row-length", "32"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT + "Äpfel und Öl.\n", "utf-8")
    return path


def run(capsys, *argv):
    assert evaluate.main([*argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # a progress bar is for a terminal
    return out, json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("bos", [[], [99]])
@pytest.mark.parametrize("count", [2, 7, 8, 9, 30])
@pytest.mark.parametrize("stride", [1, 3, 7])
def test_windows_score_every_id_once(bos, count, stride):
    ids = list(range(100, 100 + count))
    tokens, index = evaluate.windows(ids, bos, 8 if bos else 7, stride)
    scored = index[index >= 0].tolist()
    assert (tokens[index >= 0] - 100).tolist() == scored  # what it says it scores stands there
    lost = [] if bos else [i for i in range(0, count, stride) if stride == 7 or not i]  # nothing stands before them
    assert scored == [i for i in range(count) if i not in lost]
    assert not bos or (tokens[:, 0] == 99).all()


def test_perplexity_is_that_of_the_engine(text, capsys):
    """Without overlap, the rows of quantize.py; bytes are those of the text."""
    engine = Engine.load(device="cpu", dtype="float32", compile=False)
    out, found = run(capsys, TALES, "--text", str(text), *QUICK)
    ids = engine.tokenizer.encode(text.read_text("utf-8"), bos=False)
    bos = engine.tokenizer.encode("")[:1]
    rows = [[*bos, *ids[a : a + 32 - len(bos)]] for a in range(0, len(ids), 32 - len(bos))]
    scores = torch.cat([engine.score(torch.tensor([row]))[0] for row in rows if len(row) > 1]).double()
    assert found["tokens"] == len(scores) and found["bytes"] == len(text.read_bytes())
    assert found["perplexity"] == pytest.approx(float(scores.mean().neg().exp()), rel=1e-5)
    bits = -float(scores.sum()) / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"], rel=1e-5)
    assert f"{found['perplexity']:.4f}" in out
    whole = text_rows(text, engine.tokenizer, engine.model.config, 1000, 32)
    assert found["tokens"] >= whole[:, len(bos) :].numel()


def test_a_stride_of_one_is_every_id_behind_all_that_fits(text, capsys):
    engine = Engine.load(DRAFT, device="cpu", dtype="float32", compile=False)
    _, found = run(capsys, DRAFT, "--text", str(text), "--tokens", "40", "--stride", "1", *QUICK)
    bos, ids = engine.tokenizer.encode("")[:1], engine.tokenizer.encode(TEXT, bos=False)[:40]
    room, losses = 32 - len(bos), []
    for i in range(len(ids)):
        row = torch.tensor([[*bos, *ids[max(0, i + 1 - room) : i + 1]]])
        losses.append(-float(engine.score(row)[0, -1]))
    assert found["tokens"] == 40 and found["stride"] == 1
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_against_another(text, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 24)  # several chunks, several rows at a time
    argv = [DRAFT, "--against", TALES, "--text", str(text), *QUICK, "--stride", "20"]
    out, found = run(capsys, *argv)
    models = {name: Engine.load(name, device="cpu", dtype="float32", compile=False) for name in (DRAFT, TALES)}
    tokenizer = models[TALES].tokenizer
    ids = tokenizer.encode(text.read_text("utf-8"), bos=False)
    tokens, index = evaluate.windows(ids, tokenizer.encode("")[:1], 32, 20)
    logs = []
    for engine in models.values():
        engine.reserve(*tokens.shape)
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        logits = engine.model(tokens, positions, engine.cache, end=tokens.shape[1])
        logs.append(logits[:, :-1][index[:, 1:] >= 0].double().log_softmax(-1))
    q, p = logs
    kl = (p.exp() * (p - q)).sum(-1)
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found["kl_p99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    right = tokens[:, 1:][index[:, 1:] >= 0][:, None]
    for key, log in (("perplexity", q), ("perplexity_against", p)):
        assert found[key] == pytest.approx(float(log.gather(1, right).mean().neg().exp()), rel=1e-4)
    assert [w["kl"] for w in found["worst"]] == pytest.approx(kl.sort(descending=True)[0][:10].tolist(), rel=1e-3)
    for w in found["worst"]:
        assert w["token"] == tokenizer.piece(ids[w["position"]]).decode(errors="replace")
        assert repr(w["before"]) in out
    _, same = run(capsys, TALES, "--against", TALES, "--text", str(text), *QUICK)
    assert (same["kl_mean"], same["kl_p99"], same["top1_agreement"]) == (0, 0, 1)


def test_several_checkpoints(text, capsys):
    out, found = run(capsys, DRAFT, TALES, "--text", str(text), "--tokens", "50", *QUICK)
    assert [r["checkpoint"] for r in found["checkpoints"]] == [DRAFT, TALES]
    assert found["perplexity"] == found["checkpoints"][0]["perplexity"] > found["checkpoints"][1]["perplexity"]
    assert DRAFT in out and f"{TALES} (float32)" in out


def test_dtype(text, capsys):
    _, exact = run(capsys, DRAFT, "--text", str(text), *QUICK)
    _, found = run(capsys, DRAFT, "--text", str(text), *QUICK, "--dtype", "bfloat16")
    assert found["dtype"] == "bfloat16" and found["perplexity"] != exact["perplexity"]
    assert found["perplexity"] == pytest.approx(exact["perplexity"], rel=0.03)


def test_compile_calls_the_compiled_layers(text, capsys, monkeypatch):
    calls = []

    def stand_in(fn, name, **options):  # test_generate.py compiles this very function
        assert options == {"dynamic": True}
        return lambda *args: calls.append(1) or fn(*args)

    monkeypatch.setattr(compilation, "compiled", stand_in)
    _, plain = run(capsys, DRAFT, "--text", str(text), *QUICK, "--no-compile")
    assert not calls and plain["compiled"] is False
    _, found = run(capsys, DRAFT, "--text", str(text), *QUICK, "--compile")
    assert calls and found["compiled"] is True and found["perplexity"] == plain["perplexity"]


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (["--text", "no-such-file"], "no-such-file"),
        (["--text", "LATIN"], "latin.txt cannot be read"),
        (["--text", "SHORT"], "short.txt gives 0 tokens"),
        (["--row-length", "32", "--stride", "32"], "--stride 32"),
        (["--stride", "1500"], "--stride 1500"),
        (["no-such-folder"], "no-such-folder"),
        (["--tasks", "a,,b"], "--tasks"),
        (["--task-folder", "x"], "--task-folder goes with --tasks"),
        (["--table", "x.csv", "--tasks", "a"], "--table"),
        (["--tokens", "1"], "--tokens"),
    ],
)
def test_bad_input_is_one_line(argv, needle, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("")
    files = {"LATIN": str(tmp_path / "latin.txt"), "SHORT": str(tmp_path / "short.txt")}
    try:
        status = evaluate.main([files.get(word, word) for word in argv])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.startswith("evaluate.py: error: ") and err.count("\n") == 1 and needle in err


def test_another_vocabulary_cannot_be_compared(tiny, capsys):
    folder, _ = tiny(vocab_size=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(TALES) / name).read_bytes())
    assert evaluate.main([TALES, "--against", str(folder), "--device", "cpu"]) == 2
    assert "vocabularies differ" in capsys.readouterr().err


def test_tasks_without_the_package_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert evaluate.main(["--tasks", "hellaswag"]) == 2
    line = 'evaluate.py: error: --tasks needs lm-evaluation-harness: pip install -e ".[evaluate]"\n'
    assert capsys.readouterr() == ("", line)


@pytest.fixture
def harness(monkeypatch):
    """scripts/harness.py over the embedded draft; the names that it takes from lm_eval are stand-ins."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.instance", "lm_eval.api.model", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval.api.instance"].Instance = object
    sys.modules["lm_eval.api.model"].LM = type("LM", (), {})
    sys.modules["lm_eval.tasks"].TaskManager = object
    monkeypatch.delitem(sys.modules, "harness", raising=False)
    import harness as module

    yield module.Harness(evaluate.Scorer(DRAFT, Engine.load(DRAFT, device="cpu", dtype="float32")))
    sys.modules.pop("harness")


def asked(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


def test_harness_loglikelihood(harness):
    engine, tokenizer = harness.engine, harness.scorer.tokenizer
    pairs = [("The old king ", "was"), ("Once upon a", " time"), ("", "Once upon"), ("x " * 600, "king")]
    found = harness.loglikelihood(asked(*pairs))
    bos = tokenizer.encode("")[:1]
    for (context, continuation), (value, greedy) in zip(pairs, found):
        start = [*bos, *tokenizer.encode(context.rstrip(), bos=False)]
        ids = [*bos, *tokenizer.encode(context + continuation, bos=False)]
        count = min(len(ids) - len(start), len(ids) - 1)
        ids = ids[-engine.context :]
        scores = engine.score(torch.tensor([ids]))[0, -count:]
        assert value == pytest.approx(float(scores.sum()), rel=1e-4)
        own = [i for p in engine.generate([ids[:-count]], GREEDY, max_new_tokens=count) for i in p.ids]
        assert greedy == (own == ids[-count:])


def test_harness_rolling(harness):
    engine, tokenizer = harness.engine, harness.scorer.tokenizer
    bos, texts = tokenizer.encode("")[:1], ["The king had a daughter.", TEXT * 22]
    short, long = harness.loglikelihood_rolling(asked(*((text,) for text in texts)))
    ids = torch.tensor([[*bos, *tokenizer.encode(texts[0], bos=False)]])
    assert short == pytest.approx(float(engine.score(ids).sum()), rel=1e-4)
    ids, context = [*bos, *tokenizer.encode(texts[1], bos=False)], engine.context
    assert context < len(ids) < 2 * context
    first = engine.score(torch.tensor([ids[:context]])).sum()
    last = engine.score(torch.tensor([ids[-context:]]))[0, context - len(ids) :].sum()
    assert long == pytest.approx(float(first + last), rel=1e-4)


def test_harness_generates_until(harness):
    asks = [("Once upon a time", {"until": ["."], "max_gen_toks": 60}), ("The king", {"until": [], "max_gen_toks": 5})]
    first, second = harness.generate_until(asked(*asks))
    assert first and "." not in first
    pieces = harness.engine.generate(["The king"], GREEDY, max_new_tokens=5)
    assert second == "".join(piece.text for piece in pieces)
