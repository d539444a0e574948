"""What surrounds the models in a round of speculation, by kernels and by their twins."""

import copy

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, needs_kernels

import architectures
import checkpoint
import decode_kernels
import speculative
from decode_kernels import INTERPRETED
from engine import Engine
from sampling import SamplingParams
from speculative import Speculation
from tokenizer import Ids

PARAMS = {"greedy": SamplingParams(0.0), "top-k": SamplingParams(0.8, 7), "top-p": SamplingParams(1.3, 200, 0.9, 0.02)}
PARAMS["penalty"] = SamplingParams(0.9, 20, 0.9, repetition_penalty=1.3)


def engine_of(vocabulary, dtype):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": vocabulary}
    config = architectures.config_from_hf({"model_type": "llama", "num_attention_heads": 2} | sizes)
    return Engine(checkpoint.random_model(config, device=DEVICE, dtype=dtype), Ids(vocabulary), compile=False)


def speculation_of(rows, vocabulary, dtype, drafts=None):
    """Of a target and, with a vocabulary of its own, a draft; every row at a position of its own."""
    target = engine_of(vocabulary, dtype)
    speculation = Speculation(target, drafts and engine_of(drafts, dtype), 12)
    target.reserve(rows, 200, speculation.margin)
    speculation.reserve()
    state, gen = target.state, torch.Generator().manual_seed(vocabulary)
    state.seeds.copy_(torch.arange(rows) + 5)
    state.position.copy_(torch.randint(10, 100, (rows, 1), generator=gen))
    state.seen.copy_(torch.rand(state.seen.shape, generator=gen) < 0.3)
    speculation.history.copy_(torch.randint(vocabulary, speculation.history.shape, generator=gen))
    return speculation


def plain(speculation):
    """The same, without the kernels."""
    memo = {id(engine): copy.copy(engine) for engine in (speculation.target, speculation.draft) if engine}
    for engine in memo.values():
        engine.model, engine.use_kernels, engine.state = None, False, copy.deepcopy(engine.state)
    return copy.deepcopy(speculation, memo)


def without_ties(logits):
    """Among equal logits the kernels prefer the first; a millionth less for every id says so to the twin."""
    return logits.double() - 1e-9 * torch.arange(logits.shape[-1], device=DEVICE)


def likely(logits, gen):
    """One of the three largest logits of each."""
    best = logits.float().topk(3).indices
    return best.gather(-1, torch.randint(3, (*best.shape[:-1], 1), generator=gen).to(DEVICE)).squeeze(-1)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("params", "drafts"), [("greedy", 300), ("top-k", 300), ("top-p", None), ("penalty", 300)])
def test_the_end_of_a_round_equals_twin(params, drafts, dtype):
    rows, vocabulary, params, gen = 3 if INTERPRETED else 64, 300, PARAMS[params], torch.Generator().manual_seed(1)
    fast, counts = speculation_of(rows, vocabulary, dtype, drafts), set()
    fast.target.state.knobs.copy_(params.knobs(DEVICE))
    slow = plain(fast)
    for K in (3, 0, 1) if INTERPRETED else (3, 7, 12, 3, 0, 1):
        logits = 4 * torch.randn(rows, K + 1, vocabulary, generator=gen).to(dtype).to(DEVICE)
        if params.structure.penalty:  # float32, and so without ties, which `without_ties` does not tell apart there
            order = torch.rand(logits.shape, generator=gen).argsort(-1)
            logits = ((order - 200) / 16).to(dtype).to(DEVICE)
        guesses = likely(logits[:, :K], gen)
        if K == 1:
            logits[1, 0, 7], logits[2, 0, 8] = float("nan"), -float("inf")
        q = torch.softmax(logits[:, :K].float() + torch.randn(rows, K, vocabulary, generator=gen).to(DEVICE), -1)
        results = []
        for speculation, seen in ((fast, logits), (slow, without_ties(logits))):
            state = speculation.target.state
            start = state.position.clone()
            speculation.history.scatter_(1, state.position + torch.arange(1, K + 1, device=DEVICE), guesses)
            if drafts:
                speculation.q[:, :K] = q
            speculation.drafted.fill_(K)
            end = speculation._end_of_round(params.structure)
            end(seen, speculation.offsets[1 : K + 2])
            assert not speculation.drafted.any()
            assert torch.equal(state.position, start + speculation.log[:, :1])
            results.append([what_came_out(speculation, row) for row in range(rows)])
        assert results[0] == results[1], K
        counts |= {len(emitted) for emitted, *_ in results[0]}
        seen, twin = (speculation.target.state.seen for speculation in (fast, slow))
        assert torch.equal(seen[0], twin[0]) and torch.equal(seen[3:], twin[3:])  # of the others some are not finite
        wrong = {row for row, (emitted, *_) in enumerate(results[0]) if -1 in emitted}
        assert wrong == ({1, 2} if K == 1 else set())
    assert len(counts) > 1


def what_came_out(speculation, row):
    """Of a row: what the log says, and, unless some logits were not finite, where it stands and what it holds."""
    state, (count, *tokens) = speculation.target.state, speculation.log[row].tolist()
    tokens = tokens[:count]
    if -1 in tokens:
        return (tokens[: tokens.index(-1) + 1],)
    position = state.position[row].item()
    return tokens, state.token[row].item(), position, speculation.history[row, : position + 1].tolist()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("params", "drafts"), [("greedy", 300), ("top-k", 70), ("top-p", 500)])  # fewer or more ids
def test_what_a_draft_proposes_equals_twin(params, drafts, dtype):
    rows, vocabulary, params, gen = 3 if INTERPRETED else 64, 300, PARAMS[params], torch.Generator().manual_seed(2)
    fast = speculation_of(rows, vocabulary, dtype, drafts)
    fast.target.state.knobs.copy_(params.knobs(DEVICE))
    fast.q.fill_(9)  # of the round before
    fast.q[:, :, drafts:] = 0
    slow = plain(fast)
    for step in range(2):
        logits = 4 * torch.randn(rows, drafts, generator=gen).to(dtype).to(DEVICE)
        fast._end_of_draft(params.structure)(logits)
        slow._end_of_draft(params.structure)(without_ties(logits))
        assert torch.equal(fast.history, slow.history)
        assert fast.drafted.item() == slow.drafted.item() == step + 1
        assert torch.equal(fast.q[:, :step] == 0, slow.q[:, :step] == 0)
        assert (fast.q[:, : step + 1] - slow.q[:, : step + 1]).abs().max() < 1e-6


@needs_kernels
def test_a_draft_that_is_not_finite_is_refused_and_equals_twin():
    params, rows = PARAMS["top-k"], 3
    fast = speculation_of(rows, 300, DTYPES[0], 300)
    fast.target.state.knobs.copy_(params.knobs(DEVICE))
    logits = torch.randn(rows, 300, generator=torch.Generator().manual_seed(0)).to(DTYPES[0]).to(DEVICE)
    both, bad = torch.stack((logits, logits), 1), logits.clone()
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        bad[row, 50 * row] = value
    for speculation in (fast, plain(fast)):
        speculation._end_of_draft(params.structure)(bad)
        speculation._end_of_round(params.structure)(both, speculation.offsets[1:3])
        assert (speculation.log[:2, 0] == 1).all() and (speculation.log[:, 1] >= 0).all()


@needs_kernels
def test_lookup_equals_twin():
    gen = torch.Generator().manual_seed(0)
    for lengths, ids in (((1, 2, 3, 4, 5, 9, 20, 33), 3), ((2048, 2049, 5000, 4097), 40), ((5, 5), 1)):
        history = torch.randint(ids, (len(lengths), max(lengths) + 9), generator=gen).to(DEVICE)
        position = torch.tensor(lengths, device=DEVICE)[:, None] - 1
        twin = history.clone()
        fast = decode_kernels.fast_rounds(DTYPES[0], 300, 1, PARAMS["top-k"].structure)
        fast.look_up_(history, position, 7)
        speculative.look_up_(twin, position, 7)
        assert torch.equal(history, twin)


@needs_kernels
@pytest.mark.skipif(INTERPRETED, reason="20,000 programs take the interpreter minutes")
@pytest.mark.parametrize("drafts", [None, 64])
def test_what_comes_out_is_distributed_as_the_target_says(drafts):
    """Of 20,000 rows the first two tokens, given that there is a second: chi-square."""
    rows, vocabulary, params = 20_000, 64, SamplingParams(0.9, 8)
    speculation = speculation_of(rows, vocabulary, DTYPES[0], drafts)
    speculation.target.state.knobs.copy_(params.knobs(DEVICE))
    gen = torch.Generator().manual_seed(3)
    logits = torch.randn(3, vocabulary, generator=gen).to(DTYPES[0]).to(DEVICE)
    other = (logits + torch.randn(3, vocabulary, generator=gen).to(DEVICE)).to(DTYPES[0])
    speculation.target.state.position.fill_(20)
    speculation.history[:, 21:23] = logits[:2].float().topk(2).indices[:, 1]
    for i in range(2 if drafts else 0):
        speculation._end_of_draft(params.structure)(other[i].expand(rows, -1))
    speculation._end_of_round(params.structure)(logits.expand(rows, -1, -1), speculation.offsets[1:4])
    for i in (0, 1):
        tokens = speculation.log[speculation.log[:, 0] > i, 1 + i].cpu()
        best = logits[i].float().topk(8)
        expected = torch.zeros(vocabulary, dtype=torch.float64)
        expected[best.indices.cpu()] = torch.softmax(best.values.double() / 0.9, -1).cpu() * len(tokens)
        counts = torch.bincount(tokens, minlength=vocabulary)
        assert len(tokens) > 2000 and not counts[expected == 0].any()
        some = expected > 0
        assert ((counts - expected)[some] ** 2 / expected[some]).sum() < 26  # 7 degrees of freedom: one in two thousand
