"""Draws over ranks: what is sent, and that the token is the one that a draw from all logits gives."""

import pytest
import torch

import shortlist
from sampling import SamplingParams, sample

CPU = torch.device("cpu")


def over_ranks(logits, params, seeds, positions, ranks):
    """(the token that each rank draws, what each rank sends), the ranks one after the other."""
    sent: list[torch.Tensor] = []
    arguments = params.structure, params.knobs(CPU), seeds, positions
    shares = logits.chunk(ranks, -1)

    def send(message: torch.Tensor) -> torch.Tensor:
        sent.append(message)
        return message.repeat(1, 1, ranks)

    for gather in (send, lambda _: torch.cat(sent, -1)):
        firsts = range(0, logits.shape[-1], shares[0].shape[-1])
        tokens = [shortlist.sample(s, *arguments, first=f, gather=gather) for s, f in zip(shares, firsts)]
    return tokens, sent


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(0.0), SamplingParams(0.8, 20), SamplingParams(1.2, 16, 0.9), SamplingParams(1, 20, 1, 0.1)],
)
def test_every_rank_draws_what_one_process_would(params, ranks):
    logits = 2 * torch.randn(300, 640, generator=torch.Generator().manual_seed(1))
    seeds, positions = torch.arange(300), 7 * torch.arange(300)
    assert shortlist.serves(params.structure, 640, ranks)
    tokens, sent = over_ranks(logits, params, seeds, positions, ranks)
    want = sample(logits, params.structure, params.knobs(CPU), seeds, positions)
    assert len(want.unique()) > 100 and all(torch.equal(token, want) for token in tokens)
    assert all(message.shape == (2, 300, params.structure.top_k or 1) for message in sent)


def test_greedy_takes_the_first_of_equal_words():
    logits = torch.zeros(3, 64, dtype=torch.bfloat16)
    logits[1, [40, 50]], logits[2, [10, 40]] = 5.0, 5.0
    tokens, _ = over_ranks(logits, SamplingParams(0.0), torch.zeros(3).long(), torch.zeros(3).long(), 2)
    assert [token.tolist() for token in tokens] == 2 * [[0, 40, 10]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [3, 60])
@pytest.mark.parametrize("params", [SamplingParams(0.0), SamplingParams(1.0, 4)])
def test_logits_that_are_not_finite_give_minus_one_on_every_rank(bad, at, params):
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    logits[1, at] = bad
    tokens, _ = over_ranks(logits, params, torch.arange(2), torch.arange(2), 2)
    assert all((token == -1).tolist() == [False, True] for token in tokens)


@pytest.mark.parametrize(
    ("params", "V", "ranks", "served"),
    [
        (SamplingParams(0.0), 32_000, 1, False),
        (SamplingParams(0.0), 32_001, 2, False),  # padded: the last rank has rows of no word
        (SamplingParams(0.8, 0), 32_000, 2, False),
        (SamplingParams(0.8, 200), 32_000, 8, True),
        (SamplingParams(0.8, 200), 3_200, 8, False),  # half of the words
        (SamplingParams(0.8, 200, repetition_penalty=1.1), 32_000, 2, False),
    ],
)
def test_what_is_served(params, V, ranks, served):
    assert shortlist.serves(params.structure, V, ranks) is served
