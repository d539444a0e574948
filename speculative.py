"""Speculative decoding: the accept/resample rule, three drafters, and rounds of draft and verify that never wait for
the host.

Knows how to emit several tokens per step of the target without changing what the target says. Refuses to know models,
files and text: it drives two engines (`generate.py`) through their compiled forward passes.

A round: the drafter proposes K tokens; the target scores the last token and the K proposals in one step of K + 1 rows;
the longest accepted run and one more token of the target's own come out. Legend: B rows, K num_draft_tokens, V
vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sampling import Structure, distribution, draw, uniform

ACCEPT, RESAMPLE, DRAFT = 1, 2, 3  # streams of randomness; 0 is plain decoding's
CHOICES = (0, 1, 2, 3, 4, 6, 8, 12)  # what `auto` chooses from: one captured program each


def dense(logits: torch.Tensor, structure: Structure, knobs: torch.Tensor) -> torch.Tensor:
    """What `sampling.sample` would draw from, as probs float32 [..., V] over the whole vocabulary."""
    probs, ids = distribution(logits, structure, knobs)
    return probs if ids is None else torch.zeros_like(logits).scatter_(-1, ids, probs)


def accept(
    drafted: torch.Tensor, q: torch.Tensor, p: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The accept/resample rule (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, theorem 1): what comes out is
    distributed as p.

    drafted int64 [B, K] was drawn from q float32 [B, K, V]; p float32 [B, K + 1, V] is the target's; seeds int64 [B];
    positions int64 [B, K + 1] of the tokens that come out. Returns tokens int64 [B, K + 1] and their count [B], 1..K +
    1: the accepted run, then a draw from max(p - q, 0) at the first rejection or from p behind the last proposal.
    Greedy is the same rule on one-hot distributions.
    """
    B, K = drafted.shape
    index = drafted.unsqueeze(-1)
    u = uniform(seeds[:, None], positions[:, :K], 1, ACCEPT).squeeze(-1)
    ok = u * q.gather(-1, index).squeeze(-1) < p[:, :K].gather(-1, index).squeeze(-1)
    count = ok.long().cumprod(-1).sum(-1)  # [B] accepted
    at = count[:, None, None].expand(-1, 1, p.shape[-1])
    rest = p.gather(1, at)
    if K:
        rejected = (count < K)[:, None, None]
        rest = torch.where(rejected, (rest - q.gather(1, at.clamp(max=K - 1))).clamp(min=0), rest)
    token = draw(rest[:, 0], seeds, positions.gather(1, count[:, None])[:, 0], RESAMPLE)
    tokens = torch.cat((drafted, drafted.new_zeros(B, 1)), 1).scatter(1, count[:, None], token[:, None])
    return tokens, count + 1


def lookup(history: torch.Tensor, position: torch.Tensor, K: int, longest: int = 3) -> torch.Tensor:
    """Prompt lookup (Saxena 2023): the K tokens behind the latest earlier place where the last n ids stand, n = 3, 2,
    1.

    history int64 [B, S], position int64 [B, 1] of its last valid id. Returns int64 [B, K]; without a match, what stands
    behind position 0, which is as good a guess as any. No host synchronisation.
    """
    S = history.shape[1]
    slots = torch.arange(S, device=history.device)
    start = torch.zeros_like(position)
    for n in range(1, longest + 1):  # longer matches are looked for last, and win
        match = (slots >= n - 1) & (slots < position)
        for j in range(n):
            last = history.gather(1, (position - j).clamp(min=0))
            match = match & (history.roll(j, 1) == last)
        found = (slots * match).amax(1, keepdim=True)
        start = torch.where(match.any(1, keepdim=True), found, start)
    at = start + 1 + torch.arange(K, device=history.device)
    # behind the newest id the copy continues from the match itself, as a repeating text does
    period = (position - start).clamp(min=1)
    at = torch.where(at > position, start + 1 + (at - start - 1) % period, at)
    return history.gather(1, at.clamp(max=S - 1))


class Chooser:
    """`auto`: how many tokens to draft next, from costs measured once and acceptance counts alone, so ranks and runs
    agree.

    costs[K]: milliseconds of a round of K drafts. Acceptance is a moving average over about the last 32 proposals;
    while plain decoding is the better choice, one round in a growing number of them is spent on trying again.
    """

    def __init__(self, costs: dict[int, float]) -> None:
        self.costs, self.accepted, self.tested = costs, 3.0, 4.0
        self.wait, self.patience = 0, 16

    def expected(self, K: int) -> float:
        """Tokens per round at the observed acceptance rate (Leviathan et al. 2023, equation 1)."""
        a = min(self.accepted / self.tested, 0.99)
        return (1 - a ** (K + 1)) / (1 - a)

    def choose(self) -> int:
        best = max(self.costs, key=lambda K: self.expected(K) / self.costs[K])
        if best:
            self.patience = 16
            return best
        self.wait += 1
        if self.wait < self.patience:
            return 0
        self.wait, self.patience = 0, min(self.patience * 2, 1024)
        self.accepted, self.tested = self.accepted + 2.0, self.tested + 2.0  # one hopeful try
        return min(K for K in self.costs if K)

    def observe(self, K: int, emitted: Sequence[int]) -> None:
        """A round of K proposals emitted this many tokens in each row."""
        for n in emitted if K else ():
            tested = min(n, K)
            self.accepted, self.tested = self.accepted + n - 1, self.tested + tested
            keep = min(1.0, 32 / self.tested)
            self.accepted, self.tested = self.accepted * keep, self.tested * keep


class Speculation:
    """Rounds of draft and verify for one target engine, with a draft engine that shares its ids, or None for prompt
    lookup.
    """

    def __init__(self, target: Any, draft: Any | None, num_draft_tokens: int | None) -> None:  # noqa: ANN401
        self.target, self.draft, self.fixed = target, draft, num_draft_tokens
        self.choices = CHOICES if num_draft_tokens is None else (num_draft_tokens,)
        self.vocab = target.model.config.vocab_size
        self.programs: dict[tuple[Any, ...], Callable[[], None]] = {}
        self.compiled: dict[tuple[Any, ...], tuple[Callable[..., None], Callable[..., Any]]] = {}
        self.costs: dict[Structure, dict[int, float]] = {}
        self.verify_ms: dict[int, float] = {}
        self.report = Report()
        self.owner: Any = None  # the engine state that the programs were built for
        self.ids: list[list[int]] = []  # per row: prompt and everything emitted
        self.draft_knows = 0  # slots of the draft's cache that are right in every row

    @property
    def margin(self) -> int:
        """Cache slots behind the last token kept that rounds already queued may write to."""
        return 3 * (1 + max(self.choices))

    def prepare(self, longest: int, structure: Structure) -> None:
        """Before a generation whose prompts have at most `longest` ids: buffers, compiled rounds, their costs."""
        target = self.target
        if self.owner is not target.state:  # the engine has a new cache
            self.owner = target.state
            B, S = target.state.out.shape
            self.programs.clear()
            self.compiled.clear()
            self.costs.clear()
            self.history = torch.zeros((B, S), dtype=torch.int64, device=target.device)
            self.log = torch.zeros((B, max(self.choices) + 2), dtype=torch.int64, device=target.device)
            self.draft_knows = 0
            if self.draft is not None:
                context = min(S, self.draft.model.config.max_position_embeddings)
                self.draft.reserve(B, context, S - context)
        end = target.attended(longest + max(self.choices))
        if structure not in self.costs:
            programs = {K: self.program(K, end, structure) for K in self.choices}
            self.costs[structure] = {K: self._timed(program) for K, program in programs.items()}
            for K in self.choices if self.draft else ():
                self.verify_ms[K] = self._timed(self.program(K, end, structure, drafting=False))

    def _timed(self, program: Callable[[], None]) -> float:
        """Milliseconds of one run, the best of three, on scratch slots; the state is put back."""
        state, cuda = self.target.state, self.target.device.type == "cuda"
        saved = [(t, t.clone()) for t in (state.token, state.position, self.history, self.log)]
        times = []
        for _ in range(3):
            state.position.fill_(self.history.shape[1] - max(self.choices) - 2)
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            program()
            if cuda:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
        for tensor, value in saved:
            tensor.copy_(value)
        return min(times)

    def begin(self, rows: Sequence[Sequence[int]], first: torch.Tensor) -> None:
        """The target has prefilled `rows` and sampled `first` int64 [B]."""
        for row, ids, token in zip(self.history, rows, first.clamp(min=0)):
            row[: len(ids)] = torch.tensor(ids, device=row.device)
            row[len(ids)] = token
        same = 0
        if len(rows) == 1 and len(self.ids) == 1:  # a chat: the draft keeps the common prefix too
            pairs = zip(rows[0], self.ids[0][: self.draft_knows])
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(rows[0]), self.draft_knows))
        self.ids = [[*ids, int(token)] for ids, token in zip(rows, first)]
        self.draft_knows, self.report = same, Report()

    def catch_up(self) -> None:
        """Bring the draft's cache up to the last token but one, in one chunk; what it knows already stays."""
        if self.draft is not None:
            shortest = min(map(len, self.ids))
            self.draft.prefill([row[:-1] for row in self.ids], min(self.draft_knows, shortest - 2))

    def program(self, K: int, end: int, structure: Structure, drafting: bool = True) -> Callable[[], None]:
        """One round of K drafts over `end` slots. drafting False: proposals are looked up whatever the drafter (for
        timing).
        """
        key = (K, end, structure, drafting)
        if key not in self.programs:
            verify, propose = self._parts(end, structure)
            drafts = self.draft is not None and drafting and K > 0
            state, history, V = self.target.state, self.history, self.vocab

            def round_() -> None:
                position = state.position
                if not drafts:
                    tokens = lookup(history, position, K)
                    verify(tokens, torch.nn.functional.one_hot(tokens, V).float())
                    return
                # two tokens first: after a run accepted to its end the draft has not seen the last but one
                positions = torch.cat((position - 1, position), 1)
                token, q = propose(history.gather(1, positions), positions)
                tokens_, qs = [token], [q]
                for i in range(1, K):
                    token, q = propose(token, position + i)
                    tokens_, qs = [*tokens_, token], [*qs, q]
                verify(torch.cat(tokens_, 1), torch.stack(qs, 1))

            restored = [state.token, state.position, history, self.log]
            self.programs[key] = self.target.captured(round_, restored, margin=K + 2)
        return self.programs[key]

    def _parts(self, end: int, structure: Structure) -> tuple[Callable[..., None], Callable[..., Any]]:
        """verify and propose, compiled once for every K; with kernels of our own a captured graph needs no compiler."""
        parts = (self._verify(end, structure), self._propose(end, structure))
        if self.target.use_kernels:
            return parts
        if (end, structure) not in self.compiled:
            verify, propose = (self.target.compiled(fn, f"{fn.__name__}_{end}", dynamic=True) for fn in parts)
            self.compiled[end, structure] = verify, propose
        return self.compiled[end, structure]

    def _propose(self, end: int, structure: Structure) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        draft, state, V = self.draft, self.target.state, self.vocab

        def propose(tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """tokens, positions [B, 1 or 2] -> the next token [B, 1] and the distribution it was drawn from [B, V]."""
            assert draft is not None
            logits = draft.model(tokens, positions, draft.cache, end=end)[:, -1, :V]
            q = torch.nn.functional.pad(dense(logits, structure, state.knobs), (0, V - logits.shape[-1]))
            return draw(q, state.seeds, positions[:, -1] + 1, DRAFT)[:, None], q

        return propose

    def _verify(self, end: int, structure: Structure) -> Callable[[torch.Tensor, torch.Tensor], None]:
        target, state, history, log = self.target, self.target.state, self.history, self.log
        last_start = history.shape[1] - max(self.choices) - 2  # rows that have ended stay here

        def verify(drafted: torch.Tensor, q: torch.Tensor) -> None:
            """drafted [B, K], q [B, K, V]: one step of K + 1 rows, then `accept`; everything stays on the device."""
            K = drafted.shape[1]
            positions = state.position + torch.arange(K + 1, device=drafted.device)
            logits = target.model(torch.cat((state.token, drafted), 1), positions, target.cache, end=end)
            p = dense(logits, structure, state.knobs)
            tokens, count = accept(drafted, q, p, state.seeds, positions + 1)
            tokens, count = target.model.tp.broadcast(tokens), target.model.tp.broadcast(count)
            history.scatter_(1, positions + 1, tokens)
            finite = logits.abs().amax((1, 2)) < float("inf")
            log[:, : K + 1].copy_(torch.where(finite[:, None], tokens, -1))
            log[:, -1].copy_(count)
            state.token.copy_(tokens.gather(1, count[:, None] - 1))
            state.position.copy_((state.position + count[:, None]).clamp(max=last_start))

        return verify

    def summary(self) -> str:
        """The last generation's acceptance and where a round's time goes (measured once, before it), in one line."""
        r = self.report
        rates = " ".join(f"{a / max(n, 1):.2f}" for a, n in zip(r.accepted, r.reached))
        rounds = ", ".join(f"{n} of K={K}" for K, n in sorted(r.rounds.items()))
        K = max(r.rounds, key=lambda k: r.rounds[k], default=0)
        whole = next((c[K] for c in self.costs.values() if K in c), 0.0)
        verify = self.verify_ms.get(K, whole)
        return (
            f"rounds {rounds} | accepted by position {rates} | mean accepted {r.mean_accepted:.2f} | "
            f"K={K}: draft {max(whole - verify, 0):.2f} ms + verify {verify:.2f} ms"
        )

    def steps(
        self, rows: Sequence[Sequence[int]], first: torch.Tensor, structure: Structure
    ) -> Iterator[list[list[int]]]:
        """Rounds without end: yields the ids [B][1..K + 1] of each. On a GPU the host reads one behind the queue."""
        self.begin(rows, first)
        target, cuda = self.target, self.target.device.type == "cuda"
        pending: list[tuple[int, torch.Tensor, torch.cuda.Event | None]] = []
        chooser = Chooser(self.costs[structure]) if self.fixed is None else None
        drafting = False
        while True:
            K = chooser.choose() if chooser else self.choices[0]
            if K and not drafting:
                while pending:
                    yield self._take(*pending.pop(0), chooser)
                self.catch_up()
            drafting = K > 0
            position = max(map(len, self.ids)) - 1 + sum(k + 1 for k, _, _ in pending)
            self.program(K, target.attended(position + K), structure)()
            host = torch.empty_like(self.log, device="cpu", pin_memory=cuda)
            host.copy_(self.log, non_blocking=True)
            event = torch.cuda.Event() if cuda else None
            if event is not None:
                event.record()
            pending.append((K, host, event))
            if len(pending) > cuda:
                yield self._take(*pending.pop(0), chooser)

    def _take(
        self, K: int, host: torch.Tensor, event: torch.cuda.Event | None, chooser: Chooser | None
    ) -> list[list[int]]:
        """Wait for a round and book it."""
        if event is not None:
            event.synchronize()
        block = [row[: row[-1]] for row in host.tolist()]
        if K:
            self.draft_knows = min(map(len, self.ids))
        for ids, new in zip(self.ids, block):
            ids.extend(new)
        self.report.book(K, [len(new) - 1 for new in block])
        if chooser:
            chooser.observe(K, [len(new) for new in block])
        return block


class Report:
    """Counts of one generation: rounds by K, and how often the i-th proposal was reached and accepted."""

    def __init__(self) -> None:
        self.rounds: dict[int, int] = {}
        self.reached: list[int] = []
        self.accepted: list[int] = []

    def book(self, K: int, accepted: Sequence[int]) -> None:
        self.rounds[K] = self.rounds.get(K, 0) + 1
        for counts in (self.reached, self.accepted):
            counts.extend([0] * (K - len(counts)))
        for n in accepted:
            for i in range(K):
                self.reached[i] += i <= n
                self.accepted[i] += i < n

    @property
    def mean_accepted(self) -> float:
        """Accepted proposals per row and round that drafted."""
        return sum(self.accepted) / max(self.reached[0] if self.reached else 0, 1)
