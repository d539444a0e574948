"""The engine: one cache and two programs must give what one plain forward pass gives, however they are used."""

import itertools
import sys
import threading
from pathlib import Path

import pytest
import torch
from scripted import VOCAB, add_tokenizer, byte_ids, recital
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import golden

import architectures
import checkpoint
import shapes
from compilation import CompiledModules, kind
from engine import DEFAULT_CHECKPOINT, Engine, EngineOptions, Increment
from inductor import Inductor
from model import Transformer
from sampling import SamplingParams
from speculative import KINDS
from tokenizer import Answer, Ids

STORIES = Path(__file__).resolve().parent.parent.parent / "shared" / "models" / "stories260K"
GOLDEN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" "
    "Lily was sad and didn't know what to do. She said, \"I want to play with your ball, but I can't find it.\"\nLily "
    "was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\nLily didn't want to "
    "help her mom, so"
)
GREEDY = SamplingParams(temperature=0.0)
HOT = SamplingParams(temperature=1.0, top_k=50, top_p=0.95)
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is absent")


def answer(engine: Engine, prompts, sampling=GREEDY, **options):
    """(ids, text) of each row."""
    ids, text = [[] for _ in prompts], [""] * len(prompts)
    for piece in engine.generate(prompts, sampling, **options):
        assert piece.ids or piece.text or piece.stop_reason
        ids[piece.row] += piece.ids
        text[piece.row] += piece.text
    return ids, text


def ids_of(engine: Engine, prompt, sampling=GREEDY, **options):
    return answer(engine, [prompt], sampling, **options)[0][0]


@pytest.fixture(scope="module")
def noise(tiny):
    """noise(kind, **config) -> an eager engine on a random model."""

    def make(kind="llama", options=None, **changes):
        defaults = {"vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_id": None, "bos_token_id": 256}
        folder, _ = tiny(kind, **(defaults | changes))
        return Engine.load(add_tokenizer(folder), device="cpu", **(options or {}))

    return make


@pytest.fixture(scope="module")
def llama(noise):
    return noise()


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile as far as Dynamo: its graphs, guards and limits, but no code generation."""
    real = torch.compile

    def patched(function, *, fullgraph, dynamic=None, options=None, backend="eager"):
        return real(function, fullgraph=fullgraph, dynamic=dynamic, options=options, backend=backend)

    monkeypatch.setattr(torch, "compile", patched)
    monkeypatch.setattr(Inductor, "build", lambda self, graph, examples: graph.forward)
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# -- golden, compiled and eager ----------------


@pytest.fixture(scope="module")
def compiled():
    """The one engine of this file that Inductor compiles (some seconds a program)."""
    return Engine.load(device="cpu", dtype="float32", compile=True)


@pytest.fixture(scope="module")
def stories():
    return Engine.load(STORIES, device="cpu")


@needs_stories
def test_golden_eager(stories):
    ids, text = answer(stories, [""], max_new_tokens=199)
    assert text == [GOLDEN] and len(ids[0]) == 199


def test_golden_compiled_then_again_without_compiling(compiled, monkeypatch):
    recorded, calls, real = checkpoint.read_json(golden.RECORD)["compiled"], [], Inductor.on_shared_buffers
    monkeypatch.setattr(Inductor, "on_shared_buffers", lambda *args: calls.append(real(*args)) or calls[-1])
    assert golden.answers(compiled) == recorded
    assert compiled.stats.compile_s > 0
    count = len(compiled.model.layers) + 2  # modules of a program: the layers, the head and the draw, which may select
    assert calls and all(call for i, call in enumerate(calls, 1) if i % count)  # nothing but kernels is called
    assert golden.answers(compiled) == recorded
    assert compiled.stats.compile_s == 0


def test_compiled_sampling_draws_what_eager_sampling_draws(compiled):
    options = {"sampling": SamplingParams(0.9, 40, 0.9, 0.02), "max_new_tokens": 60, "seed": 11}
    eager = Engine.load(device="cpu", dtype="float32")
    assert ids_of(compiled, "The old king", **options) == ids_of(eager, "The old king", **options)


def test_compiled_prefill_is_the_eager_one(tmp_path):
    folder = recital(tmp_path, "abcdefghij")
    plain, fast = (Engine.load(folder, device="cpu", compile_prefill=c) for c in (False, True))
    prompt = [64 + i % 10 for i in range(40)]
    assert ids_of(fast, prompt, max_new_tokens=12) == ids_of(plain, prompt, max_new_tokens=12)
    for engine in (plain, fast):
        engine.reserve(1, 64)
    torch.testing.assert_close(fast.prefill([prompt]), plain.prefill([prompt]), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not DEFAULT_CHECKPOINT.is_dir(), reason="the embedded checkpoint is absent")
def test_golden_of_the_embedded_model():
    """Its recorded ids lead by more than float32's rounding, so that any machine repeats them."""
    engine = Engine.load(device="cpu", dtype="float32")
    golden = checkpoint.read_json(DEFAULT_CHECKPOINT / "golden.json")
    prompt, ids = golden["prompt_ids"], golden["ids"]
    assert engine.encode([golden["prompt"]]) == [prompt]
    assert ids_of(engine, prompt, max_new_tokens=len(ids)) == ids
    logits = reference_logits(engine, torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
    first, second = logits.topk(2, -1).values.unbind(-1)
    assert (first - second).min() > 1e-3


# -- the cache ----------------


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_one_layer_is_compiled_and_used_for_all(tiny, kind):
    """Three graphs, of a layer, the head and the draw, however many layers and filled slots there are."""
    folder, _ = tiny(kind, num_hidden_layers=3, **({"num_local_experts": 4} if kind == "mixtral" else {}))
    model, outs = checkpoint.load(str(folder)), []
    for compile in (False, True):
        torch._dynamo.reset()
        counters.clear()
        engine = Engine(model, Ids(model.config.vocab_size), compile=compile)
        outs.append(ids_of(engine, [5, 6, 7], SamplingParams(0.0), max_new_tokens=250))
    assert outs[0] == outs[1] and len(outs[0]) == 250
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize(
    "family, changes",
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        (
            "qwen3_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
        ),
    ],
)
def test_layers_of_two_kinds_are_compiled_apart(tiny, eager_backend, family, changes):
    """A CPU's compiled layers have no guards: what differs in one plain attribute must not share a function."""
    model, outs = checkpoint.load(str(tiny(family, num_hidden_layers=3, **changes)[0]), dtype=torch.float32), []
    for compile in (False, True):
        engine = Engine(model, Ids(model.config.vocab_size), compile=compile)
        outs.append(ids_of(engine, [5, 6, 7], SamplingParams(0.0), max_new_tokens=40))
    assert outs[0] == outs[1] and len(set(outs[0])) > 3
    assert len({kind(layer) for layer in model.layers}) == 2


@pytest.mark.parametrize("chunk", [0, 7, 64])
@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
def test_cached_decode_scores_what_one_pass_scores(noise, kind, chunk):
    """Greedy decoding, each step through the cache, picks what scoring the whole text in one pass finds most likely."""
    changes = {"mistral": {"sliding_window": 17}, "mixtral": {"num_local_experts": 4}}.get(kind, {})
    engine = noise(kind, {"prefill_chunk": chunk}, **changes)
    prompt = prompt_of(45)
    ids = ids_of(engine, prompt, max_new_tokens=150)
    whole = torch.tensor([[*prompt, *ids]])
    one_pass = engine.score(whole, chunk=whole.shape[1])
    for size in (7, 64):
        torch.testing.assert_close(engine.score(whole, chunk=size), one_pass, atol=1e-4, rtol=1e-4)
    logits = reference_logits(engine, whole)
    torch.testing.assert_close(
        one_pass, torch.log_softmax(logits, -1)[:, :-1].gather(-1, whole[:, 1:, None])[..., 0], atol=1e-4, rtol=1e-4
    )
    best = logits[0, len(prompt) - 1 : -1]
    assert (best.amax(-1) - best.gather(-1, torch.tensor(ids)[:, None])[:, 0] < 1e-4).all()


def reference_logits(engine, tokens):
    """All logits of one plain forward pass over a cache of exactly that length."""
    from model import KVCache

    B, T = tokens.shape
    cache = KVCache(engine.model.config, B, T, engine.device, engine.dtype)
    return engine.model(tokens, torch.arange(T).expand(B, -1), cache, end=T)


@pytest.mark.parametrize("chunk", [0, 16])
def test_batch_rows_equal_single_runs(noise, chunk):
    engine = noise("llama", {"prefill_chunk": chunk})
    prompts = [prompt_of(n, seed=n) for n in (3, 40, 1, 17, 16)]
    for sampling in (GREEDY, HOT):
        batch, texts = answer(engine, prompts, sampling, max_new_tokens=40, seed=5)
        single = noise("llama", {"prefill_chunk": chunk})
        first, text = answer(single, prompts[:1], sampling, max_new_tokens=40, seed=5)
        assert (batch[0], texts[0]) == (first[0], text[0])  # row 0 draws with the same seed
        if sampling is GREEDY:
            assert batch == [ids_of(single, p, max_new_tokens=40) for p in prompts]


def test_each_row_stops_for_itself(tmp_path):
    engine = Engine.load(recital(tmp_path, "abcdefgh", "<|eos|>"), device="cpu")
    pieces = list(engine.generate(["a", "abcdef", "abc"], GREEDY, stop=["fg"], max_new_tokens=4))
    ended = {p.row: p.stop_reason for p in pieces if p.stop_reason}
    assert ended == {0: "length", 1: "eos", 2: "stop"}
    text = ["".join(p.text for p in pieces if p.row == row) for row in range(3)]
    assert text == ["bcde", "gh", "de"]
    for row in range(3):  # nothing after the end
        assert [p.stop_reason for p in pieces if p.row == row][:-1] == [None] * (sum(p.row == row for p in pieces) - 1)


def test_several_answers_to_one_prompt_differ_by_row_and_repeat_by_seed(llama):
    first = answer(llama, ["x"] * 3, HOT, max_new_tokens=16, seed=1)[0]
    assert len({tuple(ids) for ids in first}) == 3
    assert answer(llama, ["x"] * 3, HOT, max_new_tokens=16, seed=1)[0] == first
    assert answer(llama, ["x"] * 3, HOT, max_new_tokens=16, seed=2)[0] != first


def test_two_engines_interleaved_do_not_disturb_each_other(noise):
    engines = [noise(seed=1), noise(seed=2, num_hidden_layers=1)]
    alone = [ids_of(e, "hello", max_new_tokens=20) for e in engines]
    streams = [e.generate(["hello"], GREEDY, max_new_tokens=20) for e in engines]
    pieces = [list(itertools.chain.from_iterable(p.ids for p in s)) for s in zip(*streams)]
    both = list(zip(*pieces))
    assert [list(ids) for ids in both] == alone and alone[0] != alone[1]


def test_prefix_reuse_prefills_only_the_rest_and_changes_nothing(noise):
    fresh, llama, prompt = noise(), noise(), prompt_of(50)
    ids = ids_of(llama, prompt, max_new_tokens=10)
    assert llama.stats.prefill_tokens == 50
    longer = [*prompt, *ids, *prompt_of(8, seed=9)]
    assert ids_of(llama, longer, max_new_tokens=10) == ids_of(fresh, longer, max_new_tokens=10)
    assert llama.stats.prefill_tokens == len(longer) - 59  # all but the last id, which was never fed
    edited = [*longer[:20], 7, *longer[21:]]
    assert ids_of(llama, edited, max_new_tokens=10) == ids_of(noise(), edited, max_new_tokens=10)
    assert llama.stats.prefill_tokens == len(edited) - 20
    assert ids_of(llama, edited, max_new_tokens=10) == ids_of(fresh, edited, max_new_tokens=10)
    assert llama.stats.prefill_tokens == 1  # the same prompt again: only the logits of its last id
    shorter = edited[:30]
    assert ids_of(llama, shorter, max_new_tokens=10) == ids_of(noise(), shorter, max_new_tokens=10)
    assert llama.stats.prefill_tokens == 1


def test_prefix_reuse_after_an_answer_that_was_cut_short(llama, noise):
    prompt = prompt_of(30, seed=4)
    stream = llama.generate([prompt], GREEDY, max_new_tokens=50)
    said = list(itertools.chain.from_iterable(next(stream).ids for _ in range(6)))
    stream.close()  # as Ctrl-C does
    assert llama.stats.bytes_per_step > 0  # what the summary needs is there
    follow = [*prompt, *said, *prompt_of(5, seed=5)]
    assert ids_of(llama, follow, max_new_tokens=10) == ids_of(noise(), follow, max_new_tokens=10)
    assert llama.stats.prefill_tokens <= 5 + 2


def test_scoring_and_batches_between_turns_do_not_leave_a_stale_prefix(llama, noise):
    prompt = prompt_of(30, seed=6)
    expected = ids_of(noise(), [*prompt, 5], max_new_tokens=10)
    for disturb in (
        lambda: llama.score(torch.tensor([prompt_of(40, seed=7)])),
        lambda: answer(llama, [prompt_of(9, seed=8), prompt_of(40, seed=7)], max_new_tokens=3),
        lambda: llama.reserve(1, 512),
    ):
        ids_of(llama, prompt, max_new_tokens=4)
        disturb()
        assert ids_of(llama, [*prompt, 5], max_new_tokens=10) == expected


def test_growing_the_cache_changes_nothing(noise):
    engine = noise()
    short = ids_of(engine, "ab", max_new_tokens=5)
    assert engine.cache.max_seq_len == 128
    long = ids_of(engine, "ab", max_new_tokens=300)
    assert engine.cache.max_seq_len == 384 and long[:5] == short
    assert ids_of(engine, "ab", max_new_tokens=5) == short and engine.cache.max_seq_len == 384


def test_not_finite_logits_raise_and_do_not_poison_the_next_answer(tmp_path):
    z = byte_ids()[ord("z")]
    engine = Engine.load(recital(tmp_path, "abcdef", poison=z), device="cpu")
    engine.limit(1, 64)
    with pytest.raises(ValueError, match="row 0.*not finite"):
        ids_of(engine, "aaazaaa")
    assert answer(engine, ["ab"], max_new_tokens=3)[1] == ["cde"]
    with pytest.raises(ValueError, match="row 1"):
        answer(engine, ["ab", "az"])


# -- compilation ----------------


def random_engine(i: int, **options) -> Engine:
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 8 + i, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 30 + i}
    config = architectures.config_from_hf(config | {"max_position_embeddings": 2048})
    model = checkpoint.random_model(config, dtype=torch.float32, device=torch.device("cpu"))
    return Engine(model, Ids(30 + i), compile=True, **options)


def test_twelve_engines_of_different_shapes_in_one_process(eager_backend):
    """Dynamo allows eight variants of a code object; each engine brings its own."""
    for i in range(12):
        engine = random_engine(i)
        assert len(ids_of(engine, [1, 2, 3], max_new_tokens=4)) == 4
    assert graphs() == 36  # a layer, the head and the draw each


def test_a_second_pass_over_mixed_lengths_compiles_nothing(eager_backend):
    engine = random_engine(0)
    engine.limit(1, 2048)

    def serve():
        for length in (5, 100, 250, 1, 600, 1500, 120, 2000):
            ids_of(engine, [1] * length, max_new_tokens=40)
            ids_of(engine, [2] * length, HOT, max_new_tokens=40, seed=length)

    serve()
    first = graphs()
    assert 3 * sum(map(len, engine._programs.values())) == first  # a layer, the head and the draw
    for structure in (GREEDY.structure, HOT.structure):
        assert len(engine._programs[structure]) == 1  # for any number of slots
    serve()
    assert graphs() == first
    for temperature in (0.3, 1.7):  # numbers, not programs
        ids_of(engine, [1] * 9, SamplingParams(temperature, 50, 0.5), max_new_tokens=5)
    assert graphs() == first


def test_settled_modules_are_called_without_dynamo_each_with_its_own_weights(eager_backend):
    modules = [torch.nn.Linear(3, 3, bias=bias) for bias in (True, True, False)]
    other = torch.nn.Tanh()
    run, x, found = CompiledModules(modules, "module", guards=False), torch.randn(2, 3), []

    def step():
        found[:] = [run(module, x + 1) for module in (*modules, other)]

    with torch.inference_mode():
        step()
        run.settle(lambda: x.add_(0), step)
        given = [run.backends[module].given for module in modules]
        x += 1
        step()
        assert all(run.backends[module].given is before for module, before in zip(modules, given))
        want = [torch.nn.functional.linear(x + 1, m.weight, m.bias) for m in modules] + [(x + 1).tanh()]
    assert all(map(torch.equal, found, want)) and graphs() == 2


def test_compiled_prefill_serves_many_lengths(eager_backend):
    engine = random_engine(0, compile_prefill=True)
    for length in (1, 2, 5, 16, 17, 20, 33, 64, 100, 101, 250, 600, 1000):
        ids_of(engine, [length % 30] * length, max_new_tokens=2)
    engine.limit(1, 2048)
    for length in (1, 2, 5, 16, 17, 20, 33, 64, 100, 101, 250, 600, 1000):
        ids_of(engine, [length % 30] * length, max_new_tokens=2)
    chat = [3] * 40
    for turn in range(12):  # each turn prefills another number of tokens behind another prefix
        chat += [turn] * (3 * turn + 1)
        ids_of(engine, chat, max_new_tokens=2)


# -- what a caller sees ----------------


def test_engine_as_a_library(tmp_path):
    engine = Engine.load(recital(tmp_path, "abcdefg", "<|eos|>"), device="cpu")
    pieces = list(engine.generate(["ab"], max_new_tokens=100))
    assert "".join(piece.text for piece in pieces) == "cdefg"
    assert pieces[-1] == Increment(0, [257], "", "eos")
    assert engine.stats.decode_steps == 5 and engine.stats.prefill_tokens == 3
    assert engine.stats.load_s > 0 and engine.stats.decode_tok_s > 0


def test_bytes_per_step_counts_every_weight_once_and_the_prefix(tmp_path):
    engine = Engine.load(recital(tmp_path, "abcdefg"), device="cpu")
    ids_of(engine, "abc", max_new_tokens=9)
    linear = sum(p.numel() for name, p in engine.model.named_parameters() if "proj" in name or "lm_head" in name)
    kv = 2 * 1 * 4 * (4 + 8 // 2)  # K and V, one head of 4, the average prefix
    assert engine.stats.bytes_per_step == 4 * (linear + kv)


def test_prompts_may_be_text_or_ids(llama):
    assert llama.encode(["ab", [1, 2]]) == [[256, 64, 65], [1, 2]]
    with pytest.raises(ValueError, match=f"{VOCAB}.*{VOCAB}"):
        llama.encode([[1, VOCAB]])
    with pytest.raises(ValueError, match="empty"):
        llama.encode([[]])


def test_prompt_that_fills_the_context(llama):
    assert len(ids_of(llama, prompt_of(511), max_new_tokens=9)) == 1
    with pytest.raises(ValueError, match="512"):
        ids_of(llama, prompt_of(512))


def test_a_ragged_batch_ends_with_the_longest_prompts_context(noise):
    engine, prompts = noise(), [prompt_of(505), prompt_of(480, seed=1)]
    batch = answer(engine, prompts, max_new_tokens=40)[0]
    assert batch == [ids_of(noise(), p, max_new_tokens=7) for p in prompts]


def test_no_limit_beyond_the_context(noise):
    engine = noise(max_position_embeddings=200)
    ids_of(engine, "a", max_new_tokens=150)  # the cache has 256 slots now
    with pytest.raises(ValueError, match="201.*200"):
        engine.limit(1, 201)


class Letters:
    """A decoder for `Answer`: id n is the n-th of the given pieces."""

    def __init__(self, *pieces: str, rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def add(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)

    def flush(self) -> str:
        return self.rest


def feed(pieces: list[str], stop: list[str], limit: int = 99, stop_ids=(), rest: str = "", step: int = 1):
    made = Answer(0, Letters(*pieces, rest=rest), frozenset(stop_ids), stop, limit)
    texts = [made.add(list(range(i, min(i + step, len(pieces))))).text for i in range(0, len(pieces), step)]
    return texts, made


def test_text_that_may_begin_a_stop_string_is_held_back():
    texts, made = feed(["Hel", "lo\n", "\nU", "se", "x"], ["\n\nUser:"])
    assert texts == ["Hel", "lo", "", "", "\n\nUsex"] and made.stop_reason is None
    texts, made = feed(["Hel", "lo\n", "\nU", "ser: hi", "x"], ["\n\nUser:"])
    assert texts == ["Hel", "lo", "", "", ""] and made.stop_reason == "stop" and made.ids == [0, 1, 2, 3]


@pytest.mark.parametrize("step", [1, 2, 3, 8])
def test_stop_strings_do_not_depend_on_how_ids_arrive(step):
    texts, made = feed(["ab", "ca", "bd", "ef", "gh"], ["abde", "zz", "dx"], step=step)
    assert "".join(texts) == "abc" and made.stop_reason == "stop" and made.ids == [0, 1, 2, 3]
    texts, made = feed(["aa", "aa", "ab"], ["aaab"], step=step)  # overlapping beginnings
    assert "".join(texts) == "aa" and made.stop_reason == "stop"


def test_the_earliest_stop_string_wins():
    texts, made = feed(["one two three"], ["three", "two", "tw"])
    assert texts == ["one "] and made.stop_reason == "stop"


@pytest.mark.parametrize("end", [{"limit": 3}, {"stop_ids": [2]}])
def test_held_text_is_released_at_the_end(end):
    texts, made = feed(["a", "b", "x" if "limit" in end else "", "never"], ["bc", "bxc"], **end, rest="\ufffd")
    assert "".join(texts) == ("abx" if "limit" in end else "ab") + "\ufffd"
    assert made.stop_reason == ("length" if "limit" in end else "eos") and made.ids == [0, 1, 2]


def test_a_stop_string_in_the_last_token_is_a_stop():
    assert feed(["a", "b"], ["b"], limit=2)[1].stop_reason == "stop"


def test_engine_and_model_agree_on_what_is_one_pass(llama):
    assert isinstance(llama.model, Transformer)
    scores = llama.score(torch.tensor([prompt_of(20), prompt_of(20, seed=1)]))
    assert scores.shape == (2, 19) and scores.dtype == torch.float32 and (scores < 0).all()


@pytest.mark.parametrize("compile", [False, True])
def test_a_penalised_answer_is_that_of_transformers(tiny, eager_backend, compile):
    folder, theirs = tiny("llama")
    engine = Engine(checkpoint.load(str(folder)), Ids(theirs.config.vocab_size), compile=compile)
    prompt = torch.tensor([[1, 5, 5, 9]])
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for penalty in (1.0, 1.2, 5.0):
        wanted = theirs.generate(prompt, repetition_penalty=penalty, **options)[0, 4:].tolist()
        assert ids_of(engine, prompt[0], SamplingParams(0.0, repetition_penalty=penalty), max_new_tokens=30) == wanted


# -- misuse ----------------


@pytest.mark.parametrize(
    "prompts, options, match",
    [
        ("The old king", {}, "prompts is the string 'The old king'; give a list"),
        (["a"], {"stop": "the"}, "stop is the string 'the'; give a list"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer"),
        (["a"], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be an integer"),
        (["a"], {"max_new_tokens": -3}, "max_new_tokens is -3"),
        ([[1, 2.0]], {}, "integer ids"),
        ([[1, "2"]], {}, "integer ids"),
        ([7], {}, "integer ids"),
        ([[1, -1]], {}, "token id -1; the model's vocabulary has"),
        ([[1, 10**6]], {}, "token id 1000000; the model's vocabulary has"),
        ([], {}, "there is no prompt"),
        ([[]], {}, "the prompt is empty"),
    ],
)
def test_misuse_is_an_error_at_the_call(llama, prompts, options, match):
    with pytest.raises(ValueError, match=match):
        llama.generate(prompts, **options)


def test_ids_of_other_integer_types_are_ids(llama):
    wanted = ids_of(llama, [3, 4, 5], max_new_tokens=4)
    assert ids_of(llama, torch.tensor([3, 4, 5]), max_new_tokens=4) == wanted


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "bf16"}, "dtype is 'bf16'; it must be one of auto, float32"),
        ({"kernels": "cuda"}, "kernels is 'cuda'; it must be auto, triton or inductor"),
        ({"prefill_chunk": -1}, "prefill_chunk is -1"),
        ({"prefill_chunk": 0.5}, "prefill_chunk is 0.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ({"num_draft_tokens": 3.0}, "num_draft_tokens is 3.0"),
        ({"num_draft_tokens": 16}, "num_draft_tokens is 16"),
    ],
)
def test_options_that_make_no_sense(options, match):
    with pytest.raises(ValueError, match=match):
        EngineOptions(**options)


def test_options_may_be_integers_of_other_kinds():
    three = torch.tensor(3).numpy()[()]  # numpy's int64
    options = EngineOptions(batch_size=three, prefill_chunk=three, num_draft_tokens=three)
    assert options.batch_size == options.prefill_chunk == options.num_draft_tokens == 3


def test_a_busy_engine_refuses_a_second_generation_and_is_free_again_after(llama):
    wanted = ids_of(llama, [3, 4, 5], max_new_tokens=6)
    first = llama.generate([[3, 4, 5]], GREEDY, max_new_tokens=6)
    begun = list(next(first).ids)
    second = llama.generate([[6, 7]], GREEDY, max_new_tokens=6)
    errors = []

    def elsewhere():
        try:
            next(llama.generate([[6, 7]], GREEDY))
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "generating already" in errors[0]
    with pytest.raises(RuntimeError, match="generating already"):
        next(second)
    assert begun + [i for piece in first for i in piece.ids] == wanted
    assert ids_of(llama, [3, 4, 5], max_new_tokens=6) == wanted
    abandoned = llama.generate([[3, 4, 5]], GREEDY)
    next(abandoned)
    del abandoned
    assert ids_of(llama, [3, 4, 5], max_new_tokens=6) == wanted


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_programs_of_many_kinds_of_sampling_are_forgotten(llama, draft):
    engine = Engine(llama.model, llama.tokenizer)
    if draft:
        engine.speculate(None, 2)
    wanted = {}
    for again in range(2):
        for top_k in range(1, 12):
            ids = ids_of(engine, [3, 4, 5], SamplingParams(1.0, top_k), max_new_tokens=5)
            assert wanted.setdefault(top_k, ids) == ids, again
    assert len(engine._programs) <= KINDS
    assert not draft or len(engine.speculation.programs) <= KINDS


# -- on a GPU ----------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_stories
def test_golden_on_a_gpu_with_captured_graphs():
    engine = Engine.load(STORIES, device="cuda", dtype="float32")
    assert engine.compile and answer(engine, [""], max_new_tokens=199)[1] == [GOLDEN]
    assert answer(engine, [""], max_new_tokens=199)[1] == [GOLDEN] and engine.stats.compile_s == 0


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_quantized_weights_without_a_kernel_are_announced_once(bits, capsys):
    """int4 is right everywhere; where it is slow, one line says so. int8 is nowhere slower than what it came from."""
    config = shapes.shape_config("tiny")
    model = checkpoint.random_model(config, bits=bits, dtype=torch.float32)
    Engine(model, Ids(config.vocab_size)).warn()
    err = capsys.readouterr().err
    assert err.count("\n") == (bits == 4)
    assert ("no fast path for some quantized weights" in err) == (bits == 4)
