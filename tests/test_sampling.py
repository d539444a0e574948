"""Logits to token: the sets that filters keep, the distribution that is drawn, and what a draw depends on."""

import pytest
import torch

from sampling import SamplingParams, distribution, draw, penalise, sample, top, uniform

CPU = torch.device("cpu")
V = 97


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """`distribution` scattered back over the whole vocabulary."""
    probs, ids = distribution(logits, params.structure, params.knobs(CPU))
    return probs if ids is None else torch.zeros_like(logits).scatter(-1, ids, probs)


def draws(logits: torch.Tensor, params: SamplingParams, n: int, *, seed: int = 0, vary: str = "seeds") -> torch.Tensor:
    """n tokens for one row of logits, each of its own seed or its own position."""
    same, each = torch.full((n,), seed), torch.arange(n) + seed
    seeds, positions = (each, same) if vary == "seeds" else (same, each)
    return sample(logits.expand(n, -1), params.structure, params.knobs(CPU), seeds, positions)


def p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's chi-square, cells expecting fewer than 5 pooled."""
    expected, counts = probs.double() * counts.sum(), counts.double()
    rare = expected < 5
    if rare.any():
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected, counts = expected[expected > 0], counts[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(5, V, generator=torch.Generator().manual_seed(0)) * 3


# -- what is kept ----------------


def test_temperature_zero_is_argmax_and_the_first_of_ties():
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1)
    logits = torch.tensor([[0.0, 7.0, 7.0, 7.0], [2.0, 1.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    for rows in (logits, logits.to(torch.bfloat16).float()):
        tokens = sample(rows, params.structure, params.knobs(CPU), torch.arange(3), torch.arange(3))
        assert tokens.tolist() == [1, 0, 0]
    assert torch.equal(probabilities(logits, params), torch.eye(4)[[1, 0, 0]])


@pytest.mark.parametrize("k", [1, 2, 7, V - 1])
def test_top_k_keeps_exactly_k_even_among_ties(logits, k):
    for rows in (logits, torch.zeros(2, V), (logits * 2).round() / 2):
        probs = probabilities(rows, SamplingParams(temperature=1.0, top_k=k))
        assert (probs > 0).sum(-1).tolist() == [k] * len(rows)
        assert probs.sum(-1).sub(1).abs().max() < 1e-5
        kept = torch.where(probs > 0, rows, torch.inf).amin(-1)
        assert (kept >= torch.where(probs > 0, -torch.inf, rows).amax(-1)).all()  # none left out beats one kept


@pytest.mark.parametrize("k", [0, V, V + 1, 10**6])
def test_top_k_off_or_beyond_the_vocabulary_keeps_everything(logits, k):
    probs = probabilities(logits, SamplingParams(temperature=0.7, top_k=k))
    torch.testing.assert_close(probs, torch.softmax(logits / 0.7, -1))


def naive(row: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The definition, in Python's float64: filters in order, each on what the one before left."""
    exps = [2.718281828459045 ** ((x - max(row)) / temperature) for x in row]
    order = sorted(range(len(row)), key=lambda i: -row[i])
    if top_k:
        order = order[:top_k]
    total, mass, kept = sum(exps[i] for i in order), 0.0, []
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += exps[i] / total
    kept = [i for i in kept if exps[i] >= min_p * exps[kept[0]]]
    total = sum(exps[i] for i in kept)
    return [exps[i] / total if i in kept else 0.0 for i in range(len(row))]


FILTERS = [
    (1.0, 0, 0.9, 0.0),
    (0.7, 0, 0.3, 0.0),
    (1.3, 0, 0.999, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.5, 0, 1.0, 0.5),
    (1.0, 0, 1.0, 0.999),
    (0.8, 20, 0.8, 0.0),
    (2.0, 20, 1.0, 0.1),
    (1.1, 40, 0.95, 0.02),
    (1.0, 0, 0.8, 0.1),
]


@pytest.mark.parametrize("filters", FILTERS)
def test_filters_against_a_naive_implementation(logits, filters):
    got = probabilities(logits, SamplingParams(*filters))
    want = torch.tensor([naive(row, *filters) for row in logits.tolist()])
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("filters", FILTERS)
def test_filters_against_transformers(logits, filters):
    from transformers import generation as hf

    temperature, top_k, top_p, min_p = filters
    warpers = [hf.TemperatureLogitsWarper(temperature)]
    warpers += [hf.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [hf.MinPLogitsWarper(min_p)] if min_p else []
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    torch.testing.assert_close(probabilities(logits, SamplingParams(*filters)), torch.softmax(scores, -1))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.77])
def test_top_p_is_the_smallest_set_that_reaches_p(logits, top_p):
    probs = torch.softmax(logits, -1)
    kept = probabilities(logits, SamplingParams(temperature=1.0, top_k=0, top_p=top_p)) > 0
    mass = torch.where(kept, probs, 0).sum(-1)
    least = torch.where(kept, probs, torch.inf).amin(-1)
    assert (mass >= top_p - 1e-6).all() and (mass - least < top_p + 1e-6).all()


def test_any_number_of_leading_dimensions(logits):
    params = SamplingParams(temperature=0.9, top_k=11, top_p=0.9, min_p=0.01)
    stacked = probabilities(torch.stack([logits, logits * 2]), params)
    assert torch.equal(stacked[1, 3], probabilities(logits[3:4] * 2, params)[0])


@pytest.mark.parametrize("temperature", [1e-3, 0.05, 1e4, 1e30])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_temperatures(logits, temperature, scale):
    params = SamplingParams(temperature=temperature, top_k=0)
    probs = probabilities(logits * scale, params)
    assert probs.isfinite().all() and probs.sum(-1).sub(1).abs().max() < 1e-5
    if temperature < 0.01:
        assert torch.equal(probs.argmax(-1), logits.argmax(-1)) and probs.amax(-1).min() > 0.99
        assert (draws(logits[0], params, 500) == logits[0].argmax()).float().mean() > 0.98
    if temperature == 1e30:
        assert (probs - 1 / V).abs().max() < 1e-6
        assert len(draws(logits[0], params, 2000).unique()) == V


@pytest.mark.parametrize(
    "name, bad",
    [("temperature", [-0.1, 1e-4, float("nan"), float("inf")]), ("top_k", [-1]),
     ("top_p", [0.0, 1.1, -1.0, float("nan")]), ("min_p", [-0.1, 1.0, 2.0, float("nan")])],
)  # fmt: skip
def test_parameters_that_are_refused(name, bad):
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name} is {value}"):
            SamplingParams(**{name: value})


# -- what is drawn ----------------


@pytest.mark.parametrize("vary", ["seeds", "positions"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0, 0),
        SamplingParams(0.8, 200),
        SamplingParams(1.7, 20),
        SamplingParams(1.2, 0, 0.9),
        SamplingParams(1.0, 50, 0.95, 0.05),
    ],
)
def test_draws_follow_the_distribution(logits, params, vary):
    n = 20_000
    probs = probabilities(logits[:1], params)[0]
    counts = torch.bincount(draws(logits[0], params, n, seed=123, vary=vary), minlength=V)
    assert counts[probs == 0].sum() == 0
    assert p_value(counts, probs) > 1e-4
    shifted = probs.roll(1) if (probs > 0).all() else torch.softmax(probs.log() * 0.9, -1)
    assert p_value(counts, shifted) < 1e-6  # the test can tell a wrong distribution


def test_rare_tokens_are_neither_lost_nor_favoured():
    """A token of probability 2^-10 among 4,096 others: 20,000 draws should see it 19.5 times."""
    probs = torch.full((4096,), (1 - 2.0**-10) / 4095)
    probs[4000] = 2.0**-10
    hits = sum(
        int((draw(probs.expand(1000, -1), torch.arange(i, i + 1000), torch.zeros(1000).long()) == 4000).sum())
        for i in range(0, 20_000, 1000)
    )
    assert 5 <= hits <= 45


def test_uniform_numbers():
    u = uniform(torch.arange(50)[:, None], torch.arange(40), 64).double()
    assert u.shape == (50, 40, 64) and u.min() > 0 and u.max() < 1
    n = u.numel()
    for moment, mean, variance in ((u, 1 / 2, 1 / 12), (u**2, 1 / 3, 4 / 45)):
        assert abs(moment.mean() - mean) < 4.5 * (variance / n) ** 0.5
    counts = torch.histc(u.float(), 64, 0, 1)
    assert p_value(counts, torch.full((64,), 1 / 64)) > 1e-4
    assert u.float().unique().numel() > 0.98 * n


@pytest.mark.parametrize("what", ["seed", "position", "lane", "stream"])
def test_numbers_of_neighbours_are_independent(what):
    """Seeds, positions, lanes and streams one (or a power of two) apart: correlation and agreement as chance has it."""
    seeds, positions, zero = torch.arange(2000), torch.arange(2000) * 7, torch.zeros(2000).long()
    for step in (1, 2, 1 << 20, 1 << 32):
        if what == "seed":
            a, b = uniform(seeds, zero, 8), uniform(seeds + step, zero, 8)
        elif what == "position":
            a, b = uniform(zero + 5, positions, 8), uniform(zero + 5, positions + step, 8)
        elif what == "lane":
            both = uniform(seeds, positions, 16)
            a, b = both[:, :8], both[:, 8:]
        else:
            a, b = uniform(seeds, positions, 8), uniform(seeds, positions, 8, stream=step)
        a, b = a.flatten().double(), b.flatten().double()
        assert (a == b).sum() <= 2
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4.5 / a.numel() ** 0.5
        assert abs(((a < 0.5) == (b < 0.5)).double().mean() - 0.5) < 4.5 * 0.5 / a.numel() ** 0.5


def test_consecutive_tokens_of_one_row_are_independent(logits):
    tokens = draws(torch.zeros(8), SamplingParams(1.0, 0), 16_000, seed=3, vary="positions")
    pairs = torch.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64)
    assert p_value(pairs, torch.full((64,), 1 / 64)) > 1e-4


@pytest.mark.parametrize("params", [SamplingParams(1.0, 0), SamplingParams(0.9, 20, 0.9, 0.01)])
def test_a_draw_does_not_depend_on_the_batch_around_it(logits, params):
    seeds, positions = torch.tensor([3, 1 << 40, 3, 9, 0]), torch.tensor([7, 8, 9, 7, 0])
    together = sample(logits, params.structure, params.knobs(CPU), seeds, positions)
    for b in range(5):
        one = (logits[b : b + 1], params.structure, params.knobs(CPU), seeds[b : b + 1], positions[b : b + 1])
        assert sample(*one) == together[b]
    again = sample(logits, params.structure, params.knobs(CPU), seeds, positions)
    assert torch.equal(again, together)


def test_draws_leave_torchs_random_state_alone(logits):
    state = torch.get_rng_state()
    draws(logits[0], SamplingParams(), 10)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("params", [SamplingParams(0.0), SamplingParams(1.0, 0), SamplingParams(0.8, 5, 0.9, 0.1)])
def test_logits_that_are_not_finite_give_minus_one_in_their_row_alone(logits, params, bad):
    want = sample(logits, params.structure, params.knobs(CPU), torch.arange(5), torch.arange(5))
    logits[2, 31], want[2] = bad, -1
    assert torch.equal(sample(logits, params.structure, params.knobs(CPU), torch.arange(5), torch.arange(5)), want)
    logits[2] = bad
    assert torch.equal(sample(logits, params.structure, params.knobs(CPU), torch.arange(5), torch.arange(5)), want)


def test_compiled_equals_eager():
    """The same tokens over a vocabulary of a real size: the noise must be the same 64-bit numbers."""
    plain, filtered = SamplingParams(1.0, 0), SamplingParams(0.9, 50, 0.9, 0.02)
    logits = torch.randn(8, 32_000, generator=torch.Generator().manual_seed(1)) * 2

    def step(seeds: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        return [sample(logits, p.structure, p.knobs(CPU), seeds, positions) for p in (plain, filtered)]

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    for seed in (0, 1 << 33):
        arguments = torch.arange(8) + seed, torch.arange(8) * 1000
        want = step(*arguments)
        assert all(map(torch.equal, compiled(*arguments), want))
        assert all(len(tokens.unique()) > 4 for tokens in want)


def test_other_numbers_recompile_nothing():
    compilations = []

    def count(graph, inputs):
        compilations.append(1)
        return graph.forward

    compiled = torch.compile(sample, backend=count, fullgraph=True, dynamic=False)
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    for temperature, top_p, min_p in ((0.5, 0.9, 0.1), (1.5, 0.3, 0.2), (0.9, 0.99, 0.01)):
        params = SamplingParams(temperature, 20, top_p, min_p)
        compiled(logits, params.structure, params.knobs(CPU), torch.arange(2), torch.arange(2))
    assert len(compilations) == 1


def test_the_order_of_the_candidates_does_not_matter():
    gen = torch.Generator().manual_seed(0)
    probs, ids = torch.rand(64, 50, generator=gen), torch.randperm(1000, generator=gen)[:50].expand(64, -1)
    order, seeds, positions = torch.randperm(50, generator=gen), torch.arange(64), torch.arange(64) * 3
    token = ids.gather(1, draw(probs, seeds, positions, ids=ids)[:, None])
    again = ids[:, order].gather(1, draw(probs[:, order], seeds, positions, ids=ids[:, order])[:, None])
    assert torch.equal(token, again) and len(token.unique()) > 10


@pytest.mark.parametrize(("size", "k"), [(32_000, 200), (32_000, 1), (32_003, 7), (4096, 64), (4096, 65)])
def test_top_in_two_selections_is_topk(size, k):
    x = torch.randn(3, size)
    x[1, :k] = 9.0  # all of the largest in a few blocks
    x[2] = x[2].round()  # ties
    values, ids = top(x, k, sorted=True)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(x.gather(-1, ids), values)
    assert all(row.unique().numel() == k for row in ids)
    assert torch.equal(top(x[:2], k, sorted=False)[1].sort().values[0], x[0].topk(k).indices.sort().values)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_penalty_is_that_of_transformers(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(4, V, generator=g), torch.randint(V, (4, 30), generator=g)
    seen = torch.zeros(4, V, dtype=torch.bool).scatter_(1, ids, True)
    params = SamplingParams(0.0, repetition_penalty=penalty)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalise(logits, seen, params.knobs(CPU)), wanted)
    seeds = positions = torch.arange(4)
    token = sample(logits, params.structure, params.knobs(CPU), seeds, positions, seen)
    assert torch.equal(token, wanted.argmax(-1)) and not torch.equal(token, logits.argmax(-1)) or penalty < 1


def test_a_penalty_of_one_is_another_program_than_none():
    off, on = SamplingParams(0.8, 50), SamplingParams(0.8, 50, repetition_penalty=1.1)
    assert not off.structure.penalty and on.structure.penalty and on.structure == off.structure._replace(penalty=True)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="repetition_penalty is .*; it must be 0.01 to 100"):
            SamplingParams(repetition_penalty=bad)
