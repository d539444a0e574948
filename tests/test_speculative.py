"""Speculation says what the target says: greedily token for token, sampled in distribution, for every drafter."""

import copy
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripted import VOCAB, add_tokenizer, byte_ids, recital, write_json
from test_sampling import p_value

import architectures
import checkpoint
import generate
import speculative
from engine import DEFAULT_CHECKPOINT, Engine
from sampling import SamplingParams, distribution, draw, penalise
from speculative import CHOICES, DRAFT, Chooser, Speculation, accept, look_up_, spread
from tokenizer import Ids

ROOT = Path(__file__).resolve().parent.parent
GREEDY = SamplingParams(temperature=0.0)
OPTIONS = {  # every sampling option, and all at once
    "temperature": SamplingParams(1.3, 0),
    "top-k": SamplingParams(1.0, 5),
    "top-p": SamplingParams(1.0, 0, 0.8),
    "min-p": SamplingParams(1.0, 0, 1.0, 0.2),
    "all": SamplingParams(1.2, 6, 0.9, 0.05),
}
PENALTY = SamplingParams(1.0, 0, repetition_penalty=1.6)
DRAFTERS = ("model", "ngram", "self-int8", "self-int4")
TALES_DRAFT = str(DEFAULT_CHECKPOINT) + "-draft"
tales = pytest.mark.skipif(not DEFAULT_CHECKPOINT.is_dir(), reason="needs the embedded checkpoints")
LINE = re.compile(
    r"rounds (\d+ of K=\d+(?:, )?)+ \| accepted by position (?:[01]\.\d\d ?)* ?\| mean accepted [\d.]+ \| "
    r"draft [\d.]+ \+ verify [\d.]+ \+ overhead -?[\d.]+ ms a round"
)


def config_of(vocab: int = 12, context: int = 4096, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": vocab, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": context}
    return architectures.config_from_hf({"model_type": "llama"} | sizes | heads | changes)


def peaked(seed: int = 0, vocab: int = 12, **changes):
    """A random model whose next token depends on the ones before it."""
    torch.manual_seed(seed)
    model = checkpoint.random_model(config_of(vocab, **changes), dtype=torch.float32)
    model.embed_tokens.weight.mul_(50)
    model.lm_head.weight.mul_(12)
    for layer in model.layers:
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            linear.weight.mul_(8)
    return model


def like(model, noise: float):
    """A draft that mostly agrees."""
    draft, g = copy.deepcopy(model), torch.Generator().manual_seed(7)
    draft.lm_head.weight.add_(noise * torch.randn(draft.lm_head.weight.shape, generator=g))
    return draft


def engine_of(model, drafter: str | None, k: int | None = 3, noise: float = 0.08, **options) -> Engine:
    engine = Engine(model, Ids(model.config.vocab_size), **options)
    if drafter is not None:
        draft = None
        if drafter != "ngram":
            other = like(model, noise) if drafter == "model" else checkpoint.quantized_copy(model, int(drafter[-1]))
            draft = Engine(other, engine.tokenizer, **options)
        engine.speculate(draft, k)
    return engine


def run(engine: Engine, prompts, sampling: SamplingParams = GREEDY, n: int = 60, **options) -> list[list[int]]:
    out = [[] for _ in prompts]
    for piece in engine.generate(prompts, sampling, max_new_tokens=n, ignore_eos=True, **options):
        out[piece.row] += piece.ids
    return out


def both(engine: Engine, least: int = 1) -> bool:
    """The last generation accepted some proposals and rejected some."""
    pairs = [(k, n - 1) for k, emitted in engine.speculation.book for n in emitted if k]
    return sum(n for _, n in pairs) >= least and sum(n < k for k, n in pairs) >= least


# -- the rule ----------------


def rows(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    return spread(*distribution(logits, sampling.structure, sampling.knobs(logits.device)), logits.shape[-1])


@pytest.mark.parametrize("drafter", ["model", "ngram"])
@pytest.mark.parametrize("option", OPTIONS)
def test_rule_emits_the_targets_distribution(option, drafter):
    B, K, V = 20_000, 3, 10
    g = torch.Generator().manual_seed(1)
    p = rows(torch.randn(1, K + 1, V, generator=g), OPTIONS[option]).expand(B, -1, -1)
    q = rows(torch.randn(1, K, V, generator=g), OPTIONS[option]).expand(B, -1, -1)
    seeds, positions = torch.arange(B), torch.arange(7, 8 + K).repeat(B, 1)
    if drafter == "model":
        drafted = torch.stack([draw(q[:, i], seeds, positions[:, i], DRAFT) for i in range(K)], 1)
    else:  # a guess without a distribution: all mass on it
        drafted = p[:, :K].topk(2).indices[..., 1]
        q = torch.nn.functional.one_hot(drafted, V).float()
    tokens, count = accept(drafted, q, p, seeds, positions)
    assert len(count.unique()) > 1
    for i in range(K + 1):  # given that the i-th comes out at all, it is the target's
        counts = torch.bincount(tokens[(count > i).squeeze(1), i], minlength=V)
        assert p_value(counts, p[0, i]) > 1e-4
        assert not counts[p[0, i] == 0].any()
    accepted = (count > 1).double().mean()
    expected = torch.minimum(p[0, 0], q[0, 0]).sum()
    assert abs(accepted - expected) < 5 * (0.25 / B) ** 0.5


def test_rule_on_one_hot_distributions_is_comparison():
    p = torch.nn.functional.one_hot(torch.tensor([[3, 1, 4, 1], [3, 1, 4, 1], [0, 1, 4, 1]]), 5).float()
    drafted = torch.tensor([[3, 1, 4], [3, 2, 4], [3, 1, 4]])
    q = torch.nn.functional.one_hot(drafted, 5).float()
    tokens, count = accept(drafted, q, p, torch.arange(3), torch.arange(4).repeat(3, 1))
    assert count.flatten().tolist() == [4, 2, 1]
    assert [row[:n] for row, n in zip(tokens.tolist(), count.flatten().tolist())] == [[3, 1, 4, 1], [3, 1], [0]]


def test_rule_with_equal_distributions_accepts_everything():
    p = torch.softmax(torch.randn(500, 4, 50), -1)
    drafted = draw(p[:, :3], torch.arange(500)[:, None], torch.arange(3).repeat(500, 1), DRAFT)
    _, count = accept(drafted, p[:, :3], p, torch.arange(500), torch.arange(4).repeat(500, 1))
    assert (count == 4).all()


def test_rule_never_emits_what_the_target_excludes_when_only_rounding_separates_p_and_q():
    q = torch.tensor([0.0, 0.5, 0.5]).expand(5000, 1, 3)
    p = (q * 0.9).expand(5000, 2, 3)  # p < q everywhere: nothing is left of max(p - q, 0)
    drafted = torch.ones(5000, 1, dtype=torch.int64)
    tokens, count = accept(drafted, q, p, torch.arange(5000), torch.arange(2).repeat(5000, 1))
    assert (count == 1).any()
    assert (tokens[:, 0] > 0).all()


def test_rule_survives_a_draft_that_is_not_finite():
    B, p = 20_000, torch.tensor([0.1, 0.2, 0.7])
    drafted, q = torch.zeros(B, 2, dtype=torch.int64), torch.full((B, 2, 3), float("nan"))
    tokens, count = accept(drafted, q, p.expand(B, 3, 3), torch.arange(B), torch.arange(3).repeat(B, 1))
    assert (count == 1).all()
    assert p_value(torch.bincount(tokens[:, 0], minlength=3), p) > 1e-4


def test_simulated_acceptance_is_the_rate_that_was_asked_for():
    p = torch.softmax(torch.randn(20_000, 4, 5), -1)
    drafted = torch.zeros(20_000, 3, dtype=torch.int64)
    _, count = accept(drafted, p[:, :3], p, torch.arange(20_000), torch.arange(4).repeat(20_000, 1), torch.tensor(0.7))
    expected = torch.tensor([0.3, 0.3 * 0.7, 0.3 * 0.49, 0.7**3])
    assert p_value(torch.bincount(count.flatten() - 1, minlength=4), expected) > 1e-4


# -- prompt lookup ----------------


def plain_lookup(ids: list[int], k: int) -> list[int]:
    for n in (3, 2, 1):
        for at in range(len(ids) - 2, n - 2, -1):
            if n <= len(ids) and ids[at - n + 1 : at + 1] == ids[len(ids) - n :]:
                copied = ids[at + 1 :]
                return list(itertools.islice(itertools.cycle(copied), k))
    return list(itertools.islice(itertools.cycle(ids[1:] or [0]), k))


def test_lookup_finds_the_latest_longest_match():
    g = torch.Generator().manual_seed(0)
    for length in (1, 2, 3, 4, 5, 9, 20, 33):
        history = torch.full((64, 40), 0)
        history[:, :length] = torch.randint(3, (64, length), generator=g)
        before = history.clone()
        look_up_(history, torch.full((64, 1), length - 1), 6)
        found = history[:, length : length + 6].tolist()
        history[:, length : length + 6] = 0
        assert torch.equal(history, before)
        wanted = [plain_lookup(row[:length], 6) for row in history.tolist()]
        if length == 1:
            wanted = [[0] * 6] * 64
        assert found == wanted


# -- the whole engine ----------------


def exact(model, prompt: list[int], sampling: SamplingParams, depth: int) -> torch.Tensor:
    """P(token 1, ..., token depth | prompt), [V, V, ...]."""
    engine, V = Engine(model, Ids(model.config.vocab_size)), model.config.vocab_size
    joint, rows_ = torch.ones(()), [prompt]
    for _ in range(depth):
        engine.reserve(len(rows_), len(prompt) + depth)
        logits, seen = engine.prefill(rows_), torch.zeros(len(rows_), V, dtype=torch.bool)
        seen.scatter_(1, torch.tensor(rows_), True)
        if sampling.structure.penalty:
            logits = penalise(logits, seen, sampling.knobs(engine.device))
        p = rows(logits, sampling)
        joint = (joint.reshape(-1, 1) * p).flatten()
        rows_ = [[*row, i] for row in rows_ for i in range(V)]
    return joint.view(*[V] * depth)


PAIRS = [*itertools.product(OPTIONS, DRAFTERS), ("all", "auto"), ("penalty", "model"), ("penalty", "ngram")]


@pytest.mark.parametrize(("option", "drafter"), PAIRS)
def test_emitted_distribution_is_the_targets(option, drafter):
    """3,000 answers of 5 tokens: tokens 2 to 4 jointly are distributed as without a draft."""
    sampling, model, B, V = (
        (OPTIONS | {"penalty": PENALTY})[option],
        peaked(5, 8),
        600 if drafter == "auto" else 3000,
        8,
    )
    prompt = [1, 2, 3, 1, 2]
    engine = engine_of(model, *(("model", None) if drafter == "auto" else (drafter, 3)), noise=0.15)
    out = torch.tensor(run(engine, [prompt] * B, sampling, 5, seed=11))
    assert drafter == "auto" or both(engine, 10)
    expected = exact(model, prompt, sampling, 4).sum(0).flatten()
    counts = torch.bincount((out[:, 1] * V + out[:, 2]) * V + out[:, 3], minlength=V**3)
    assert p_value(counts, expected) > 1e-4
    assert not counts[expected == 0].any()


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_penalised_answer_is_the_same_with_drafts(drafter, k):
    """Greedy, in a batch, behind a prefix that is reused, and without the penalty again."""
    model, prompts = peaked(5, 40), [[1, 2, 3, 1, 2, 3], [4, 4]]
    greedy = SamplingParams(0.0, repetition_penalty=1.3)
    plain, fast = Engine(model, Ids(40)), engine_of(model, drafter, k)
    for batch in (prompts[:1], [prompts[0] + [5, 6]], prompts):
        wanted = run(plain, batch, greedy, 40)
        assert run(fast, batch, greedy, 40) == wanted != run(plain, batch, GREEDY, 40)
        assert run(fast, batch, GREEDY, 40) == run(plain, batch, GREEDY, 40)


@tales
@pytest.mark.parametrize(("drafter", "compile"), [*((d, False) for d in DRAFTERS), ("model", True)])
def test_greedy_on_the_demo_pair(drafter, compile, plain_tale):
    k = 2 if drafter == "self-int4" else 4  # plain PyTorch is slow at it
    n = 100 if compile else 200 if drafter == "self-int4" else 510  # programs for 128 slots alone are compiled
    draft = TALES_DRAFT if drafter == "model" else drafter
    engine = Engine.load(draft=draft, num_draft_tokens=k, device="cpu", dtype="float32", compile=compile)
    assert run(engine, [plain_tale[0]], n=n) == [plain_tale[1][:n]]
    assert both(engine)
    assert len(engine.speculation.book) < n


@pytest.fixture(scope="module")
def plain_tale():
    engine = Engine.load(device="cpu", dtype="float32")
    prompt = engine.tokenizer.encode("There was once a king who had three sons")
    return prompt, run(engine, [prompt], n=510)[0]


@pytest.mark.parametrize("k", [1, 2, 15, None])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_for_every_number_of_drafts(drafter, k):
    model, prompts = peaked(1, 40), [[1, 2, 3, 4, 1, 2, 3], [5], [6, 7]]
    plain, fast = Engine(model, Ids(40)), engine_of(model, drafter, k)
    for batch in ([prompts[0]], [prompts[1]], prompts):
        assert run(fast, batch, n=80) == run(plain, batch, n=80)
        assert k is None or both(fast) or drafter != "model"


def test_compiled_is_eager_and_choosing_another_k_compiles_nothing(monkeypatch):
    """On the CPU a layer and what follows the model are compiled, once for every number of drafts."""
    choices = (0, 1, 3)
    monkeypatch.setattr(speculative, "CHOICES", choices)
    model = peaked(4, 40, num_hidden_layers=1)
    wanted = run(Engine(model, Ids(40)), [[1, 2, 3]], n=60)
    engine = engine_of(model, "model", None, compile=True)
    ks = itertools.cycle(choices)
    monkeypatch.setattr(Chooser, "choose", lambda self: next(ks))
    assert run(engine, [[1, 2, 3]], n=60) == wanted
    assert both(engine)
    assert {k for k, _ in engine.speculation.book} == set(choices)
    torch._dynamo.utils.counters.clear()
    assert run(engine, [[1, 2, 3]], n=60) == wanted
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_what_follows_the_model_is_compiled_once_for_all_numbers_of_drafts(monkeypatch):
    """As it is where the model is kernels; here it is only traced."""
    monkeypatch.setattr(Engine, "shared", lambda self, end, _: torch.compile(end, backend="eager", fullgraph=True))
    engine = engine_of(peaked(2, 40), "model", None)
    engine.reserve(2, 60, engine.speculation.margin)
    speculation, structure, gen = engine.speculation, OPTIONS["all"].structure, torch.Generator().manual_seed(0)
    torch._dynamo.utils.counters.clear()
    speculation.compile(structure)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of the target and of the draft
    plain, (traced, _) = speculation._end_of_round(structure), speculation.endings.values()
    for K in (K for K in CHOICES if K > 1):
        logits, found = torch.randn(2, K + 1, 40, generator=gen), []
        speculation.q.copy_(torch.rand(speculation.q.shape, generator=gen))
        drafts = torch.randint(40, speculation.history.shape, generator=gen)
        for end in (plain, traced):
            engine.state.position.fill_(20)
            speculation.history.copy_(drafts)
            end(logits, speculation.offsets[1 : K + 2])
            found.append([t.clone() for t in (speculation.log, speculation.history, engine.state.position)])
        assert all(map(torch.equal, *found)), K
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_programs_are_built_before_the_prefill_and_never_again(monkeypatch):
    model, built, real = peaked(2, 40), [], Engine.program
    monkeypatch.setattr(Engine, "program", lambda self, *args, **rest: built.append(1) or real(self, *args, **rest))
    engine = engine_of(model, "model", None)
    ks = itertools.cycle(CHOICES)
    monkeypatch.setattr(Chooser, "choose", lambda self: next(ks))
    pieces = engine.generate([[1, 2]], GREEDY, max_new_tokens=300)
    next(pieces)
    wanted = 1 + 2 + len(CHOICES)  # a plain step too
    assert len(built) == wanted
    list(pieces)
    assert run(engine, [[1, 2]], n=300)
    assert len(built) == wanted


def test_rows_of_a_batch_are_what_they_are_alone():
    model, prompts = peaked(3, 40), [[1, 2, 3, 4, 5, 6], [7], [8, 9, 1, 2]]
    engine = engine_of(model, "model", 4)
    together = run(engine, prompts)
    lengths = {tuple(emitted) for _, emitted in engine.speculation.book}
    assert any(len(set(row)) > 1 for row in lengths)  # they accept different numbers
    assert together == [run(engine, [prompt])[0] for prompt in prompts]
    sampled = run(engine, prompts, OPTIONS["temperature"], seed=4)
    assert sampled[0] == run(engine, prompts[:1], OPTIONS["temperature"], seed=4)[0]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_seed_repeats_with_a_fixed_k(drafter):
    engine = engine_of(peaked(3, 40), drafter, 3)
    first, other, again = (run(engine, [[1, 2]], OPTIONS["all"], seed=seed) for seed in (1, 2, 1))
    assert first == again != other


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_quantized_targets(bits, drafter):
    model = peaked(4, 40)
    target = checkpoint.quantized_copy(model, bits)
    engine = Engine(target, Ids(40))
    engine.speculate(None if drafter == "ngram" else Engine(checkpoint.quantized_copy(model, 12 - bits), Ids(40)), 3)
    assert run(engine, [[1, 2, 3]]) == run(Engine(target, Ids(40)), [[1, 2, 3]])
    assert both(engine)


@tales
def test_in_bfloat16_tokens_differ_only_between_nearly_equal_logits():
    """K + 1 rows round differently from one. Tolerance: 2% of the largest logit, five steps of bfloat16's 8 bits."""
    engine = Engine.load(draft="self-int8", num_draft_tokens=4, device="cpu", dtype="bfloat16")
    prompt = engine.tokenizer.encode("There was once a king")
    ids = run(engine, [prompt], n=120)[0]
    assert engine.speculation.acceptance()[1] > 0
    tokens = torch.tensor([[*prompt, *ids]])
    T = tokens.shape[1]
    engine.reserve(1, T)
    logits = engine.model(tokens, torch.arange(T)[None], engine.cache, end=T)[0, len(prompt) - 1 : -1]
    top = logits.amax(-1)
    gap = top - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert (gap <= 0.02 * logits.abs().amax(-1)).all()
    assert (gap == 0).double().mean() > 0.9


# -- edges ----------------


def test_memory_of_finished_rows_is_not_outrun(monkeypatch, tmp_path):
    """One row runs 13 tokens a round while the other takes 1: it must stay inside both caches, also when the draft
    catches up.
    """
    folder = recital(tmp_path, "abcdefgh", context=4096)
    target, draft = (Engine.load(folder, device="cpu") for _ in range(2))
    x, a = target.tokenizer.encode("xa")[-2:]
    head = draft.model.lm_head.weight
    head[:, x] = 0.0
    head[a, x] = 1.0  # the draft is wrong about the second row only
    target.speculate(draft, None)
    ks = itertools.chain([12, 0, 12], itertools.cycle([12, 12, 12, 0]))
    monkeypatch.setattr(Chooser, "choose", lambda self: next(ks))
    out = run(target, [[a], [x]], n=150)
    assert target.tokenizer.file.model.decode(out[0]) == ("bcdefgha" * 20)[:150]
    assert out[1] == [x] * 150
    assert sum(emitted[0] for _, emitted in target.speculation.book) > target.state.out.shape[1]


@pytest.mark.parametrize("context", [16, 256])
def test_prompt_close_to_the_context_and_a_draft_with_a_shorter_one(tmp_path, context):
    target = Engine.load(recital(tmp_path / "a", "abcdefgh"), device="cpu")
    draft = Engine.load(recital(tmp_path / "b", "abcdefgh", context=context), device="cpu")
    target.speculate(draft, 15)
    prompt = target.tokenizer.encode("abcdefgh" * 31)
    pieces = list(target.generate([prompt], GREEDY, max_new_tokens=100))
    assert "".join(p.text for p in pieces) == "abcdefgh"[: 256 - len(prompt)]
    assert pieces[-1].stop_reason == "length"


def test_a_broken_draft_changes_nothing(tmp_path):
    target = Engine.load(recital(tmp_path / "a", "abcdefgh"), device="cpu")
    draft = Engine.load(recital(tmp_path / "b", "abcdefgh", poison=0), device="cpu")
    draft.model.embed_tokens.weight.fill_(float("nan"))
    wanted = run(target, [[256]], OPTIONS["temperature"])
    target.speculate(draft, None)
    assert run(target, [[256]], GREEDY)[0][:8] == run(Engine(target.model, target.tokenizer), [[256]])[0][:8]
    assert len(run(target, [[256]], OPTIONS["temperature"])[0]) == len(wanted[0])
    target.speculate(draft, 2)
    assert len(run(target, [[256]], OPTIONS["temperature"])[0]) == len(wanted[0])
    assert target.speculation.acceptance()[1] == 0


@pytest.mark.parametrize(("mine", "theirs"), [(40, 64), (64, 40)])
def test_vocabularies_may_differ_by_padding(mine, theirs):
    """Ids beyond the draft's own vocabulary are never proposed, and may be emitted all the same."""
    target, draft = peaked(6, mine), peaked(6, theirs)
    engine = Engine(target, Ids(40))
    engine.speculate(Engine(draft, Ids(40)), 3)
    prompt = [[1, 2, mine - 1]]
    assert run(engine, prompt) == run(Engine(target, Ids(40)), prompt)
    assert max(max(run(engine, prompt, SamplingParams(5.0, 0), 200)[0]), theirs) >= 40
    sampled = torch.tensor(run(engine, [[1]] * 2000, SamplingParams(2.0, 0), 3))
    expected = exact(target, [1], SamplingParams(2.0, 0), 2).sum(0)
    assert p_value(torch.bincount(sampled[:, 1], minlength=mine), expected) > 1e-4


def test_caches_are_replaced_when_the_batch_or_the_length_changes():
    model = peaked(7, 40)
    engine, plain = engine_of(model, "model", None), Engine(model, Ids(40))
    for prompts, n in (([[1, 2]], 20), ([[1, 2], [3]], 20), ([[1, 2]], 300), ([[1, 2], [3]], 10), ([[1, 2]], 20)):
        for sampling in (GREEDY, OPTIONS["top-k"]):
            out = run(engine, prompts, sampling, n)
            assert [len(row) for row in out] == [n] * len(prompts)
            assert sampling is not GREEDY or out == run(plain, prompts, n=n)


def test_a_chat_prefills_only_the_rest_in_both_caches():
    model = peaked(8, 40)
    engine, calls = engine_of(model, "model", 3), []
    engine.limit(1, 300)
    draft = engine.speculation.draft
    real = draft.prefill
    draft.prefill = lambda rows, start=0: calls.append((len(rows[0]), start)) or real(rows, start)
    ids = [1, 2, 3]
    for _ in range(4):
        answer = run(engine, [ids], n=30)[0]
        assert answer == run(Engine(model, Ids(40)), [ids], n=30)[0]
        assert both(engine)
        ids = [*ids, *answer, 5, 6, 7]
    assert engine.stats.prefill_tokens == 4  # the last answer's last token, whose cache slot nobody filled, and 3 new
    assert [start for _, start in calls][0] == 0
    assert all(length - start <= 12 for length, start in calls[1:])
    other = [1, 2, 9, 9, 9]  # a conversation that was edited
    assert run(engine, [other], n=30) == run(Engine(model, Ids(40)), [other], n=30)
    assert calls[-1] == (5, 2)


GROUP = [("self-int8", 3), ("self-int8", None), ("ngram", 2), ("ngram", None)]


def every_drafter(folder: str) -> list[list[list[int]]]:
    out = []
    for draft, k in GROUP:
        engine = Engine.load(folder, device="cpu", draft=draft, num_draft_tokens=k)
        out.append(run(engine, [[1, 2, 3], [4]], n=40))
        if k:
            out.append(run(engine, [[1, 2, 3], [4]], OPTIONS["all"], n=40, seed=2))
    return out


def test_two_ranks_say_what_one_does(tiny, tmp_path):
    """`auto` included: the ranks choose alike, or the group would hang."""
    folder, _ = tiny("llama", vocab_size=VOCAB + 1, num_attention_heads=8, num_key_value_heads=4)
    add_tokenizer(folder)
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, *launch, __file__, str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    alone = every_drafter(str(folder))
    del first[1], alone[1]  # sampled with self-int8: each rank rounds its own columns, so the draft is another one
    assert first == alone


# -- how many to draft ----------------


def simulate(costs: dict[int, float], accepts, rounds: int = 400, catch_up: float = 0.0):
    """(chooser, milliseconds spent, milliseconds of plain decoding, the Ks) for accepts(token index) -> bool."""
    chooser, spent, token, ks = Chooser(costs, catch_up), 0.0, 0, []
    while len(ks) < rounds:
        k = chooser.choose()
        spent += catch_up * (k > 0 and bool(ks) and not ks[-1])
        for _ in range(1 if k else min(chooser.rest, rounds - len(ks))):
            n = next((i for i in range(k) if not accepts(token + i)), k) + 1
            chooser.observe(k, [n])
            spent, token = spent + costs[k], token + n
            ks.append(k)
    return chooser, spent, token * costs[0], ks


CHEAP = {K: 1 + 0.05 * K for K in CHOICES}
DEAR = {K: 1 + 0.4 * K for K in CHOICES}


def test_auto_drafts_much_where_everything_is_accepted():
    _, spent, plain, ks = simulate(CHEAP, lambda i: True)
    assert ks[-1] == max(CHOICES)
    assert plain / spent > 6


@pytest.mark.parametrize("costs", [CHEAP, DEAR, {0: 1.0, 4: 9.0}, {K: 1 + 3.0 * (K > 0) for K in CHOICES}])
@pytest.mark.parametrize("period", [1, 2, 3, 7, 50])
def test_auto_never_loses_more_than_its_credit(costs, period):
    """Whatever the text does, at most 0.5% and 0.75 plain steps."""
    texts = (lambda i: False, lambda i: i // period % 2 == 0, lambda i: i % (period + 1) == 0)
    for accepts, catch_up in itertools.product(texts, (0.0, 0.7)):
        _, spent, plain, _ = simulate(costs, accepts, catch_up=catch_up)
        assert spent <= 1.005 * plain + 0.75 * costs[0] + 1e-6


def test_auto_stops_where_nothing_is_accepted_and_comes_back_when_it_is():
    _, _, _, ks = simulate(DEAR, lambda i: False)
    assert sum(k > 0 for k in ks[50:]) < 10
    _, spent, plain, ks = simulate(DEAR, lambda i: i > 300, 900)
    assert all(k > 0 for k in ks[-50:])
    assert spent < plain


def test_auto_is_deterministic_and_a_fixed_number_stays():
    noise = torch.rand(5000, generator=torch.Generator().manual_seed(0)).tolist()
    runs = [simulate(CHEAP, lambda i: noise[i] < 0.6)[3] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 2
    chooser = Chooser({5: 3.0})
    for _ in range(50):
        assert chooser.choose() == 5
        chooser.observe(5, [1])


def test_costs_decide_and_are_measured_once():
    engine = engine_of(peaked(9, 40), "model", None)
    run(engine, [[1]])
    [(structure, costs)] = engine.speculation.costs.items()
    assert set(costs) == set(CHOICES)
    assert all(draft > 0 for k, (draft, _) in costs.items() if k) and costs[0][0] == 0
    assert all(verify > 0 for _, verify in costs.values())
    engine.speculation.costs[structure] = {k: (0.1 * k, 1.0) for k in CHOICES}
    run(engine, [[1]])
    assert any(k > 1 for k, _ in engine.speculation.book)
    engine.speculation.costs[structure] = {k: (5.0 * k, 1.0) for k in CHOICES}
    for programs in engine.speculation.programs[structure].values():
        programs.verify[0] = None  # not even called: what rests is plain decoding, at its price
    assert run(engine, [[1]]) == run(Engine(engine.model, Ids(40)), [[1]])
    assert {k for k, _ in engine.speculation.book} == {0}


def test_report_counts_positions():
    speculation = Speculation(Engine(peaked(), Ids(12)), None, 3)
    speculation.book = [(3, [1, 4]), (3, [2, 3]), (0, [1, 1]), (1, [2, 1])]
    rates, mean = speculation.acceptance()
    assert rates == pytest.approx([4 / 6, 2 / 3, 1 / 2])
    assert mean == pytest.approx((0 + 3 + 1 + 2 + 1 + 0) / 6)


# -- the command ----------------


@pytest.fixture
def call(capsys, monkeypatch):
    """call(*argv, stdin=..., status=0) -> (stdout, stderr) of the command."""

    def call(*argv, stdin="", status=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            code = generate.main([str(a) for a in argv])
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        assert code == status, err
        return out, err

    return call


@pytest.fixture(scope="module")
def abc(tmp_path_factory):
    """Says `abcdefghijklmnop`, then EOS."""
    return recital(tmp_path_factory.mktemp("abc"), "abcdefghijklmnop", "<|eos|>")


@pytest.mark.parametrize("k", [1, 3, 15, "auto"])
@pytest.mark.parametrize("drafter", ["model", "ngram", "self-int8"])
def test_command_ends_exactly_where_it_must(call, abc, drafter, k):
    """EOS, a stop string and the last token allowed, inside an accepted run."""
    argv = ("--checkpoint", abc, "--draft", abc if drafter == "model" else drafter, "--num-draft-tokens", k)
    argv = (*argv, "--temperature", 0)
    out, err = call(*argv)
    assert out == "abcdefghijklmnop\n"
    assert LINE.fullmatch(err.splitlines()[1])
    assert call(*argv, "--stop", "efg")[0] == "abcd\n"
    assert call(*argv, "--max-new-tokens", 6)[0] == "abcdef\n"
    assert call(*argv, "--max-new-tokens", 1)[0] == "a\n"
    assert '"stop_reason": "eos"' in call(*argv, "--json")[0]


def test_command_compares(call, abc):
    _, err = call("--checkpoint", abc, "--draft", "ngram", "--temperature", 0, "--compare", "--num-samples", 2)
    assert re.search(r"^plain [\d.]+ tok/s, speculative [\d.]+ tok/s: [\d.]+x$", err, re.MULTILINE)


@tales
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_command_on_the_demo_pair(call, drafter):
    argv = ("--prompt", "Once upon a time", "--temperature", 0, "--max-new-tokens", 30, "--device", "cpu")
    draft = ("--draft", TALES_DRAFT if drafter == "model" else drafter, "--num-draft-tokens", 3)
    assert call(*argv, *draft)[0] == call(*argv)[0]


def test_command_chats_with_a_draft(call, tiny):
    folder, _ = tiny("llama", vocab_size=VOCAB, eos_token_id=257, bos_token_id=256, seed=3)
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|eot|>{% endfor %}a:"
    add_tokenizer(folder, template=template, eos_token_id=[257, 258])
    argv = ("--checkpoint", folder, "--chat", "--temperature", 0, "--max-new-tokens", 9)
    turns = "hello\nwhat is that?\nbye\n"
    plain = call(*argv, stdin=turns)[0]
    for draft in ("self-int8", "ngram"):
        assert call(*argv, "--draft", draft, stdin=turns)[0] == plain


def test_command_refuses_in_one_line(call, abc, tmp_path, tiny):
    other, _ = tiny("llama", vocab_size=VOCAB, bos_token_id=256, eos_token_id=257)
    add_tokenizer(other)
    words = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    write_json(other / "tokenizer.json", words)
    for argv, named in (
        (("--draft", other), "vocabulary"),
        (("--draft", "self-int4"), "self-int8"),  # 259 inputs
        (("--draft", tmp_path / "absent"), "no such folder"),
    ):
        out, err = call("--checkpoint", abc, *argv, status=2)
        assert not out and err.count("\n") == 1 and named in err


def test_command_reports_a_damaged_target_in_one_line(call, tmp_path):
    folder = recital(tmp_path / "a", "abcdefgh", poison=byte_ids()[ord("e")])
    text = recital(tmp_path / "b", "abcdefgh")
    _, err = call("--checkpoint", folder, "--draft", text, "--temperature", 0, status=2)
    assert err.count("\n") == 1 and "not finite" in err


if __name__ == "__main__":
    answers = every_drafter(sys.argv[1])
    write_json(Path(sys.argv[2]) / f"{os.environ['RANK']}.json", answers)
