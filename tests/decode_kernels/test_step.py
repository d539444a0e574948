"""The two ends of a step: embedding, sampling and advancing by kernels and by their twins."""

import pytest
import torch
from kernel_checks import DEVICE, HAS_TRITON, needs_kernels

import architectures
import decode_kernels
import engine
from decode_kernels import INTERPRETED
from model import Transformer
from sampling import SamplingParams, Structure, distribution, penalise, sample
from tp import TensorParallel

if HAS_TRITON:
    import triton
    import triton.language as tl

    from decode_kernels import draw


@needs_kernels
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("dim, half, turned, factor", [(64, 32, 32, 1.0), (96, 20, 20, 1.25), (96, 20, 15, 1.25)])
def test_embed_equals_twin(rank, dim, half, turned, factor):
    gen = torch.Generator().manual_seed(dim)
    sizes = {"hidden_size": dim, "head_dim": 2 * half, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 50, "num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 1 << 17}
    config = architectures.config_from_hf({"model_type": "llama"} | sizes)
    model = Transformer(config, TensorParallel(rank or 0, 1 if rank is None else 2)).half().to(DEVICE)
    model.embed_tokens.weight.copy_(torch.randn(model.embed_tokens.weight.shape, generator=gen))
    model.init_rope_(DEVICE)
    model.inv_freq, model.rope_factors = (
        torch.stack([model.inv_freq[0] * 2, model.inv_freq[0]])[:, :turned],
        [1.0, factor],
    )
    tokens = torch.randint(50, (2, 3), generator=gen).to(DEVICE)
    positions = torch.tensor([[0, 1, 2], [131_069, 131_070, 131_071]], device=DEVICE)
    model.tp = TensorParallel()  # no group to sum over here
    decode_kernels.use_(model)
    x, cos, sin = model.fast(model, tokens, positions, 1)
    mine = tokens >= model.first_id
    mine &= tokens < model.first_id + model.vocab_local
    assert mine.any() and mine.all() == (rank is None)
    assert torch.equal(x[mine], model.embed_tokens.weight[(tokens - model.first_id)[mine]]) and not x[~mine].any()
    exact = positions.double()[..., None, None] * model.inv_freq[1].double()
    for got, want, turn in zip((cos, sin), model.rope(positions, 1), (exact.cos(), exact.sin())):
        assert got.shape == (2, 3, 1, half) and (got - want).abs().max() < 1e-6
        assert (got[0, ..., :turned] - factor * turn[0]).abs().max() < 1e-6


SAMPLES = [(1000, 1), (1000, 7), (1024, 200), (4000, 200), (33_000, 200), (300, 256), (70, 50)]


def make_logits(rows, vocabulary, dtype, coarse):
    """coarse: many ties, zeros of both signs among them."""
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits = (logits.round() * 0.5 if coarse else logits).to(dtype)
    return torch.where((logits == 0) & (torch.arange(vocabulary) % 2 == 0), -logits, logits).to(DEVICE)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary, k", SAMPLES)
def test_sample_equals_twin(vocabulary, k, dtype):
    """The same tokens but where two candidates are as good as equal: 16-bit logits tie, and a tie at the threshold of
    top-k is broken by the lowest id here.
    """
    kinds = (0.8, 1.0, 0.0), (1.7, 0.9, 0.0), (1.0, 1.0, 0.05)
    params = [SamplingParams(0.0 if k == 1 else t, k, top_p, min_p) for t, top_p, min_p in kinds]
    rows = 3 if INTERPRETED else 16  # the interpreter takes half a second for a row of 33,000
    for coarse in (False, True):
        logits = make_logits(rows, vocabulary, dtype, coarse)
        seeds, positions = torch.arange(rows, device=DEVICE) << 20, torch.arange(rows, device=DEVICE)[:, None] * 7
        for p in params:
            assert decode_kernels.samples(dtype, vocabulary, rows, p.structure)
            args = logits, p.structure, p.knobs(DEVICE), seeds, positions[:, 0]
            # among equals the first ids stay: a millionth less for every id says so to the twin, in float64
            order = logits.double() - 1e-9 * torch.arange(vocabulary, device=DEVICE)
            got, twin = decode_kernels.sample(*args), sample(order, *args[1:])
            assert torch.equal(got, twin)
            alone = decode_kernels.sample(logits[2:3], *args[1:3], seeds[2:3], positions[2:3, 0])
            assert torch.equal(got[2:3], alone)


@needs_kernels
@pytest.mark.parametrize("ranks, k, top_p, min_p", [(2, 1, 1.0, 0.0), (4, 20, 0.8, 0.0), (2, 5, 1.0, 0.1)])
def test_sample_over_ranks_equals_twin(ranks, k, top_p, min_p):
    """The token that all logits give, ties between ranks included; -1 where those of one rank are not finite."""
    params, rows, vocabulary = SamplingParams(0.0 if k == 1 else 1.2, k, top_p, min_p), 4, 640
    logits = make_logits(rows, vocabulary, torch.float16, False)
    logits[1:3] = make_logits(2, vocabulary, torch.float16, True)  # the largest ones tie
    logits[3, vocabulary - 100] = float("nan")
    seeds, positions = torch.arange(rows, device=DEVICE) << 20, torch.arange(rows, device=DEVICE) * 7
    rest = params.structure, params.knobs(DEVICE), seeds, positions
    shares = [(i * vocabulary // ranks, share) for i, share in enumerate(logits.chunk(ranks, -1))]
    lists = torch.cat([draw.shortlist(share, k, first) for first, share in shares], -1)
    want = decode_kernels.sample(logits, *rest)
    assert want[3] == -1 and (want[:3] >= 0).all() and lists.shape == (rows, ranks * k)
    first, share = shares[-1]
    assert torch.equal(decode_kernels.sample(share, *rest, first=first, gather=lambda _: lists), want)
    missing = torch.cat((lists[:, :k], torch.full_like(lists[:, k:], -1)), -1)  # as `letters.receive` leaves it
    assert (decode_kernels.sample(logits, *rest, gather=lambda _: missing) == -1).all()


if HAS_TRITON:

    @triton.jit
    def candidates_kernel(
        logits_ptr,
        key_ptr,
        chosen_ptr,
        knobs_ptr,
        token_ptr,
        p_ptr,
        N: tl.constexpr,
        K: tl.constexpr,
        TOP_P: tl.constexpr,
    ):
        token, p, _ = draw.candidates(logits_ptr, key_ptr, chosen_ptr, knobs_ptr, 0, N, K, TOP_P)
        i = tl.arange(0, p.shape[0])
        tl.store(token_ptr + i, token.to(tl.int64))
        tl.store(p_ptr + i, p)


def remaining(logits, params):
    """The probabilities [V] of one row's candidates, from its logits and from the lists of two ranks."""
    lists = torch.cat([draw.shortlist(h, params.top_k, 80 * i) for i, h in enumerate(logits.chunk(2, -1))], -1)
    for source in (logits, lists):
        tensors, constants = draw.largest_of_blocks(source, params.top_k, params.top_p < 1)
        token = torch.zeros(1024, dtype=torch.int64, device=DEVICE)
        p = torch.zeros(1024, device=DEVICE)
        candidates_kernel[(1,)](*tensors, params.knobs(DEVICE), token, p, **constants)
        yield torch.zeros(1024, device=DEVICE).scatter_add_(0, token, p / p.sum())[: logits.shape[-1]]


@needs_kernels
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("top_p, min_p", [(0.9, 0.0), (0.6, 0.2), (1e-6, 0.0), (1 - 2.0**-24, 0.0)])
def test_what_top_p_leaves_equals_twin(top_p, min_p, coarse):
    """Ties at the threshold among them, of which the first stay."""
    params, logits = SamplingParams(1.5, 48, top_p, min_p), make_logits(1, 160, torch.float16, coarse)
    order = logits.double() - 1e-9 * torch.arange(160, device=DEVICE)
    probs, ids = distribution(order, params.structure, params.knobs(DEVICE))
    want = torch.zeros(160, device=DEVICE).scatter_(0, ids[0], probs[0])
    for got in remaining(logits, params):
        assert torch.equal(got > 0, want > 0) and (got - want).abs().max() < 1e-6


@needs_kernels
@pytest.mark.parametrize("top_p, stay", [(0.5, 8), (0.5001, 9), (0.4999, 8), (0.0625, 1), (0.01, 1), (0.9999, 16)])
def test_top_p_at_the_edge_of_a_token_equals_twin(top_p, stay):
    """Of 16 equal ones: as many as reach top_p, and no more."""
    logits = torch.zeros(1, 160, dtype=torch.float16, device=DEVICE)
    logits[0, 70:90] = 3
    params = SamplingParams(1.0, 16, top_p)
    probs, _ = distribution(logits, params.structure, params.knobs(DEVICE))
    assert (probs > 0).sum() == stay
    for got in remaining(logits, params):
        assert got.nonzero().flatten().tolist() == list(range(70, 70 + stay))


@needs_kernels
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_a_penalty_equals_twin(penalty):
    """Bit for bit, also of tokens behind some that are drafted; and what is drawn then."""
    rows, vocabulary, gen = 2, 2500, torch.Generator().manual_seed(4)
    logits = make_logits(rows, vocabulary, torch.float16, True)
    seen = (torch.rand(rows, vocabulary, generator=gen) < 0.3).to(DEVICE)
    history = torch.randint(vocabulary, (rows, 30), generator=gen).to(DEVICE)
    position = torch.tensor([[3], [9]], device=DEVICE)
    for temperature in (0.0, 0.9):
        params = SamplingParams(temperature, 50, 0.9, repetition_penalty=penalty)
        knobs = params.knobs(DEVICE)
        got, now = draw.penalise(logits[:, None].expand(-1, 3, -1), seen, knobs, history, position), seen.clone()
        for i in range(3):
            assert torch.equal(got[:, i], penalise(logits, now, knobs))
            now.scatter_(1, history.gather(1, position + 1 + i), True)
        seeds, positions = torch.arange(rows, device=DEVICE), position[:, 0]
        order = penalise(logits, seen, knobs).double() - 1e-9 * torch.arange(vocabulary, device=DEVICE)
        want = sample(order, params.structure._replace(penalty=False), knobs, seeds, positions)
        assert torch.equal(decode_kernels.sample(logits, params.structure, knobs, seeds, positions, seen), want)


@needs_kernels
def test_sample_says_where_logits_are_not_finite_and_equals_twin():
    structure, knobs = Structure(False, 50), SamplingParams(0.8, 50).knobs(DEVICE)
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        logits = make_logits(3, 2000, torch.float16, False)
        logits[1, 1234] = value
        args = structure, knobs, torch.arange(3, device=DEVICE), torch.arange(3, device=DEVICE)
        got = decode_kernels.sample(logits, *args)
        assert got[1] == -1 and (got >= 0).sum() == 2
        assert torch.equal(got, sample(logits, *args))


@needs_kernels
@pytest.mark.parametrize("k, top_p", [(8, 1.0), (20, 0.5)])  # of 20 the 8 with the largest logits stay
def test_sample_draws_what_it_should(k, top_p):
    """20,000 draws of one row, for which the interpreter is too slow: chi-square against the top-k probabilities."""
    n, vocabulary = 20_000, 64
    row, params = torch.linspace(-2, 1, vocabulary).to(torch.float16), SamplingParams(0.9, k, top_p)
    k = 8
    logits = row.to(DEVICE).expand(n, -1)
    seeds, positions = torch.arange(n, device=DEVICE), torch.zeros(n, dtype=torch.int64, device=DEVICE)
    tokens = decode_kernels.sample(logits, params.structure, params.knobs(DEVICE), seeds, positions).cpu()
    expected = torch.softmax(row[-k:].double() / 0.9, -1) * n
    counts = torch.bincount(tokens - (vocabulary - k), minlength=k)
    assert len(counts) == k and counts.sum() == n
    assert ((counts - expected) ** 2 / expected).sum() < 26  # 7 degrees of freedom: one in two thousand


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5])
def test_advance_equals_twin(rows):
    results = []
    for function in (decode_kernels.advance_, engine.advance_):
        tokens = torch.arange(rows, device=DEVICE) * 100 - 1
        state = [torch.full((rows, 1), 9, device=DEVICE), torch.full((rows, 1), 40, device=DEVICE)]
        state += [torch.tensor([2], device=DEVICE), torch.zeros((rows, 6), dtype=torch.int64, device=DEVICE)]
        for _ in range(2):
            function(tokens, *state)
        results.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*results))
