"""Speculative decoding: the accept/resample rule, three drafters, and rounds of draft and verify that never wait for
the host.

Knows how to emit several tokens per step of the target without changing what the target says. Refuses to know models,
files and text: it drives two engines through the interface `Stepper`.

A round: the drafter proposes K tokens; the target scores the last token and the K proposals in one step of K + 1 rows;
the longest accepted run and one more token of the target's own come out. Legend: B rows, S cache slots, K
num_draft_tokens, V vocabulary.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling import Structure, distribution, draw, penalise, sample, uniform

Program = Callable[[], None]  # one step on static tensors
Built = TypeVar("Built")
Read = Callable[[], tuple[Tensor, Tensor]]  # -> the tokens and positions int64 [B, T] of a step
Ending = Callable[..., None]  # what follows the model in a step
Write = Callable[[Tensor], None]  # logits [B, T, V] -> where they are wanted
ACCEPT, RESAMPLE, DRAFT = 1, 2, 3  # streams of randomness; 0 is plain decoding's
EARNED = 0.005  # of a plain step, by every token, to be spent on drafts that may not pay
REST = 512  # plain steps at most before another choice
KINDS = 4  # of sampling, for which programs are kept
RESUMED = 129  # ids that a draft reads, to measure what resuming costs
CHOICES = (0, 1, 2, 3, 4, 6, 8, 12)  # what `auto` chooses from: one captured verification each
LOOKED_UP = (0, 3, 7, 12)  # and where drafts cost nothing, and 2 to 4 rows as much as each other, as 5 to 8 and 9 to 16


def spread(probs: Tensor, ids: Tensor | None, V: int) -> Tensor:
    """What `sampling.distribution` returns, as probs float32 [..., V] over the target's vocabulary."""
    if ids is None:
        return F.pad(probs, (0, V - probs.shape[-1]))
    return probs.new_zeros((*probs.shape[:-1], V)).scatter_(-1, ids, probs)


def accept(
    drafted: Tensor, q: Tensor, p: Tensor, seeds: Tensor, positions: Tensor, rate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The accept/resample rule (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, theorem 1): what comes out is
    distributed as p.

    drafted int64 [B, K] was drawn from q float32 [B, K, V]; p float32 [B, K + 1, V] is the target's; seeds int64 [B];
    positions int64 [B, K + 1] of the tokens that come out. Returns tokens int64 [B, K + 1] and how many of them count,
    int64 [B, 1], 1..K + 1: the accepted run, then a draw from max(p - q, 0) at the first rejection or from p behind the
    last proposal. Greedy is the same rule on one-hot distributions. rate: accept at random, for measuring costs.
    """
    K, chosen = drafted.shape[1], drafted.unsqueeze(-1)
    u = uniform(seeds[:, None], positions[:, :K], 1, ACCEPT)
    ok = u * q.gather(-1, chosen) < p[:, :K].gather(-1, chosen) if rate is None else u < rate  # NaN rejects
    count = ok.squeeze(-1).long().cumprod(-1).sum(-1, keepdim=True)
    at = count.unsqueeze(-1).expand(-1, 1, p.shape[-1])
    own = p.gather(1, at)
    refused = q.gather(1, at.clamp(max=K - 1)).masked_fill((count == K).unsqueeze(-1), 0).nan_to_num(0)
    rest = (own - refused).clamp(min=0)
    rest = torch.where(rest.amax(-1, keepdim=True) > 0, rest, own)  # p < q by rounding alone
    token = draw(rest[:, 0], seeds, positions.gather(1, count)[:, 0], RESAMPLE)
    return F.pad(drafted, (0, 1)).scatter(1, count, token[:, None]), count + 1


def look_up_(history: Tensor, position: Tensor, K: int, longest: int = 3) -> None:
    """Prompt lookup (Saxena 2023): the K tokens behind the latest earlier place where the last n ids stand, n = 3, 2,
    1.

    history int64 [B, S], position int64 [B, 1] of its last valid id, behind which the tokens are written; without a
    match, what stands behind position 0, which is as good a guess as any. No host synchronisation.
    """
    slots = torch.arange(history.shape[1], device=history.device)
    start = torch.zeros_like(position)
    match = slots < position
    for n in range(longest):  # longer matches are looked for last, and win
        match = match & (slots >= n) & (history.roll(n, 1) == history.gather(1, (position - n).clamp(min=0)))
        start = torch.where(match.any(1, keepdim=True), (slots * match).amax(1, keepdim=True), start)
    # behind the newest id the copy continues from the match itself, as a repeating text does
    ahead = torch.arange(K, device=history.device)
    found = history.gather(1, start + 1 + ahead % (position - start).clamp(min=1))
    history.scatter_(1, position + 1 + ahead, found)


class Chooser:
    """`auto`: how many tokens to draft next, from costs measured once and acceptance counts alone, so that ranks agree.

    costs[K]: milliseconds of a round of K drafts; catch_up: of resuming after rounds without. Acceptance is a moving
    average over about the last 24 proposals. Drafting spends a credit, counted in plain steps: a round costs what it
    takes and earns what it emits, and every token adds EARNED. So whatever the text, decoding takes at most
    0.5% and 0.75 steps longer than without drafts, and while drafting does not pay, what the credit allows is spent on
    finding out whether it does again.
    """

    def __init__(self, costs: dict[int, float], catch_up: float = 0.0) -> None:
        self.least = min(costs)
        self.catch_up = catch_up / costs[self.least]
        self.ratio = {K: cost / costs[self.least] for K, cost in costs.items()}
        self.accepted, self.tested, self.credit, self.last = 3.0, 4.0, 0.75, max(costs)
        self.rest = 1  # after a choice of 0: plain steps until the credit allows another one

    def choose(self) -> int:
        a = min(self.accepted / self.tested, 0.99)
        resume = 0.0 if self.last else self.catch_up
        able = {K: r for K, r in self.ratio.items() if not K or r - 1 + resume <= self.credit}
        # tokens per round: Leviathan et al. 2023, equation 1
        best = max(able, key=lambda K: (1 - a ** (K + 1)) / (1 - a) / able[K], default=self.least)
        if not best and len(able) > 1:
            best = min(K for K in able if K)
        self.credit -= resume if best else 0.0
        if not best and len(self.ratio) > 1:
            missing = min(r for K, r in self.ratio.items() if K) - 1 + self.catch_up - self.credit
            self.rest = min(max(math.ceil(missing / EARNED), 1), REST)
        self.last = best
        return best

    def observe(self, K: int, emitted: Sequence[int]) -> None:
        """A round of K proposals emitted this many tokens in each row."""
        mean = sum(emitted) / len(emitted)
        self.credit = min(self.credit + mean - self.ratio[K] + EARNED * mean, 4.0 + self.catch_up)
        if K:
            self.accepted += sum(emitted) - len(emitted)
            self.tested += sum(min(n, K) for n in emitted)
            keep = min(1.0, 24 * len(emitted) / self.tested)
            self.accepted, self.tested = self.accepted * keep, self.tested * keep


class Rows(Protocol):
    """The static tensors of an engine that a step reads and writes."""

    token: Tensor  # int64 [B, 1], the newest token of each row
    position: Tensor  # int64 [B, 1], its position
    seeds: Tensor  # int64 [B]
    knobs: Tensor  # float32 [4], see `SamplingParams.knobs`
    seen: Tensor  # bool [B, V], the ids of prompt and answer, see `sampling.penalise`
    out: Tensor  # int64 [B, S], what plain steps emit
    step: Tensor  # int64 [1], the column of `out` that comes next


class FastRounds(Protocol):
    """Kernels for what surrounds the models in a round; `decode_kernels/rounds.py` says what each takes."""

    look_up_: Ending  # the function of that name
    propose_: Ending  # the end of a draft's step
    verify: Callable[..., Tensor]  # `accept`, at every position by itself
    settle_: Ending  # the end of a round: what of that comes out


class Stepper(Protocol):
    """What speculation needs of an engine."""

    device: torch.device
    dtype: torch.dtype  # of its logits
    vocab_size: int
    context: int  # positions that the model can tell apart

    @property
    def state(self) -> Rows:
        """Of the rows that are decoded now."""

    def reserve(self, batch_size: int, max_seq_len: int, slack: int = 0) -> None:
        """Make room for batch_size rows of max_seq_len + slack slots."""

    def prefill(self, prompts: Sequence[Sequence[int]], start: int = 0) -> Tensor:
        """Fill the cache behind `start` slots that are right."""

    def attended(self, position: int) -> int:
        """How many slots a program for rows at `position` looks at."""

    def program(self, read: Read, write: Write, end: int, park: Program, fused: bool = False) -> Program:
        """One step that reads, runs the model over `end` slots, and writes. park: see `park`, called before trials."""

    def shared(self, ending: Ending, structure: Structure) -> Ending:
        """What several programs end with, as fast as it can be."""

    def small_program(self, fn: Program, park: Program, fused: bool = False) -> Program:
        """A step that does not run the model."""

    def fused(self, structure: Structure) -> FastRounds | None:
        """Kernels for this kind of sampling, where the model's are used."""

    def decode(self, position: int, structure: Structure) -> Program:
        """A plain step for rows at `position`."""

    def steps(self, count: int, position: int, structure: Structure) -> Iterator[list[list[int]]]:
        """`count` plain steps; yields ids [B][n], a few steps at a time."""

    def park(self, margin: int = 1) -> None:
        """Let every row stand at the last `margin` slots, where trial steps do no harm."""

    def static(self, *tensors: Tensor) -> None:
        """Say that programs will find these tensors where they are now."""

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank."""


def recent(programs: dict[Structure, dict[int, Built]], structure: Structure) -> dict[int, Built]:
    """What was built for one kind of sampling, by the slots attended to; what was built for the oldest kinds goes."""
    mine = programs[structure] = programs.pop(structure, {})
    while len(programs) > KINDS:
        del programs[next(iter(programs))]
    return mine


@dataclass
class Programs:
    """What a round runs, for one kind of sampling and one number of slots."""

    drafts: list[Program]  # of a model: for its first token, and for each later one; of lookup: one for all
    verify: dict[int, Program]  # by K


class Speculation:
    """Rounds of draft and verify for one target engine, with a draft engine that shares its ids, or None for prompt
    lookup. `simulated`: accept each proposal at this rate, to measure costs on random weights.
    """

    def __init__(self, target: Stepper, draft: Stepper | None, num_draft_tokens: int | None) -> None:
        self.target, self.draft, self.vocab = target, draft, target.vocab_size
        self.simulated: Tensor | None = None  # float32 scalar on the device
        self.choices: tuple[int, ...] = CHOICES if draft is not None or target.device.type != "cuda" else LOOKED_UP
        if num_draft_tokens is not None:
            self.choices = (num_draft_tokens,)
        self.rests = 0 in self.choices  # by running the target's own plain programs
        self.tokens = [K + 1 for K in self.choices]  # of a row, in the target's steps
        self.margin = max(self.choices) + 2  # slots behind the last token kept that rounds may write to
        self.owner: tuple[Rows | Tensor | None, ...] = ()  # what the programs were built for
        self.programs: dict[Structure, dict[int, Programs]] = {}
        self.endings: dict[tuple[Stepper, Structure], Ending] = {}
        self.costs: dict[Structure, dict[int, tuple[float, float]]] = {}  # K -> milliseconds of draft and of verify
        self.resume_ms = 0.0  # of reading what plain steps have emitted
        self.ids: list[list[int]] = []  # per row: prompt and everything emitted
        self.draft_knows = 0  # slots of the draft's cache, and ids of the history, that are right in every row
        self.book: list[tuple[int, list[int]]] = []  # every round of the last generation: K, tokens emitted by row

    # -- before a generation ----------------

    def prepare(self, longest: int, limit: int, structure: Structure) -> None:
        """Before a prefill, for `limit` new tokens behind prompts of at most `longest`: buffers, programs, costs."""
        self.reserve()
        self.last = longest + limit - 1
        for position in range(longest, longest + limit):
            self._programs(position, structure)
            if self.rests:
                self.target.decode(position, structure)
        if structure not in self.costs:
            self._measure(longest, min(RESUMED, self._draft_context() - 1), structure)

    def reserve(self) -> None:
        """Buffers for as many rows and slots as the target has."""
        target, draft = self.target, self.draft
        if draft is not None:
            (rows, slots), context = target.state.out.shape, self._draft_context()
            draft.reserve(rows, context, slots - context)
        owner = (target.state, draft and draft.state, self.simulated)
        if owner != self.owner:
            self._allocate()
            self.owner, self.programs, self.endings, self.costs, self.draft_knows = owner, {}, {}, {}, 0

    def _draft_context(self) -> int:
        """How many tokens the draft reads at most: beyond its context it guesses badly, and that is all."""
        slots = self.target.state.out.shape[1]
        return slots if self.draft is None else min(slots, self.draft.context)

    def compile(self, structure: Structure) -> None:
        """What torch.compile makes of the programs, run on zeros: it needs nothing that a model computes."""
        self.reserve()
        self._park()
        if self.target.fused(structure) is None:
            offsets = self.offsets[1:].clone()
            logits = self.q.new_zeros(len(self.log), len(offsets), self.vocab, dtype=self.target.dtype)
            if self.rests:  # for any K
                torch._dynamo.maybe_mark_dynamic(logits, 1)
                torch._dynamo.maybe_mark_dynamic(offsets, 0)
            self._ending(self.target, structure, self._end_of_round)(logits, offsets)
        if self.draft is not None and self.draft.fused(structure) is None:
            guess = self._ending(self.draft, structure, self._end_of_draft)
            guess(self.q.new_zeros(len(self.log), self.draft.vocab_size, dtype=self.draft.dtype))

    def _shares(self, K: int) -> bool:
        """Whether K's end is compiled with those of others. 1 would be a special case, which takes 5 s to compile for
        the 60 us of a round that it saves, and 0 serves rows alone that have fallen behind at the end.
        """
        return K > 1 or not self.rests

    def _allocate(self) -> None:
        (B, S), device, most = self.target.state.out.shape, self.target.device, max(self.choices)
        self.history = torch.zeros((B, S), dtype=torch.int64, device=device)  # of every row: what it holds, and drafts
        # of a round: how many tokens, which; and what drafts were drawn from. Both have a column more than the longest
        # round uses, for a slice that takes all is a special case to torch.compile.
        self.log = torch.zeros((B, most + 3), dtype=torch.int64, device=device)
        self.q = torch.zeros((B, most + 1 if self.draft else 0, self.vocab), device=device)
        self.drafted = torch.zeros(1, dtype=torch.int64, device=device)  # how many tokens this round has drafted
        self.offsets = torch.arange(-1, most + 1, device=device)
        self.target.static(self.history, self.log, self.q, self.drafted)

    def _measure(self, position: int, prompt: int, structure: Structure) -> None:
        """Milliseconds of each choice of K at `position`, and of resuming behind `prompt` ids; rank 0's count."""
        target, programs = self.target, self._programs(position, structure)
        verify = list(programs.verify.values())
        if self.rests:
            verify[0] = target.decode(position, structure)
        times = self._milliseconds([*programs.drafts, *verify], position + 1)
        first, later = times[0], sum(times[1 : len(programs.drafts)])
        drafts = [first * (K > 0) + later * max(K - 1, 0) for K in programs.verify]
        resume = 0.0
        if self.rests:
            self.ids = [[0] * prompt] * len(self.history)
            (resume,) = self._milliseconds([lambda: self.catch_up(0)], position + 1)
            self.draft_knows = 0
        measured = [drafts, times[len(programs.drafts) :], [resume] * len(drafts)]
        *agreed, resumes = target.broadcast(torch.tensor(measured, device=target.device)).tolist()
        self.costs[structure], self.resume_ms = dict(zip(programs.verify, zip(*agreed))), resumes[0]

    def _milliseconds(self, programs: Sequence[Program], position: int) -> list[float]:
        """Of a run of each at `position`, behind every slot that is kept: the best of four, one after the other as in
        use, the first being a warm-up.
        """
        times, wait = [], getattr(torch, self.target.device.type).synchronize  # a device's name is its module's
        for program in (*programs, *programs, *programs, *programs):
            self.target.state.position.fill_(position)
            self.target.state.step.zero_()
            self.drafted.zero_()
            wait()
            began = time.perf_counter()
            program()
            wait()
            times.append(1e3 * (time.perf_counter() - began))
        return [min(times[i :: len(programs)]) for i in range(len(programs))]

    def _park(self) -> None:
        self.target.park(self.margin)
        self.drafted.zero_()

    # -- the programs ----------------

    def _programs(self, position: int, structure: Structure) -> Programs:
        """For rows at `position` at most; built on first use."""
        end, built = self.target.attended(position), recent(self.programs, structure)
        if end not in built:
            draft, offsets = self.draft, self.offsets
            if draft is None:
                drafts = [self._lookup(structure)]
            else:  # two rows first: after a run accepted to its end, the draft has not seen the last token but one
                drafts = [self._propose(draft, shift, end, structure) for shift in (offsets[:2], offsets[1:2])]
            verify = {K: self._verify(offsets[1 : K + 2], end, structure) for K in self.choices}
            built[end] = Programs(drafts, verify)
        return built[end]

    def _lookup(self, structure: Structure) -> Program:
        state, history, most = self.target.state, self.history, len(self.offsets) - 2
        guess = fast.look_up_ if (fast := self.target.fused(structure)) else look_up_
        return self.target.small_program(lambda: guess(history, state.position, most), self._park, bool(fast))

    def _propose(self, draft: Stepper, shift: Tensor, end: int, structure: Structure) -> Program:
        """The tokens at `shift` [1 or 2] from the newest one -> the next into history, its distribution into q."""
        state, history, drafted = self.target.state, self.history, self.drafted
        most, guess = draft.vocab_size - 1, self._ending(draft, structure, self._end_of_draft)

        def read() -> tuple[Tensor, Tensor]:
            positions = state.position + drafted + shift
            return history.gather(1, positions).clamp(max=most), positions

        return draft.program(read, lambda logits: guess(logits[:, -1].contiguous()), end, self._park, fused=True)

    def _end_of_draft(self, structure: Structure) -> Callable[[Tensor], None]:
        """What follows the draft model, for logits [B, V] of its last token."""
        state, history, q, drafted, V = self.target.state, self.history, self.q, self.drafted, self.vocab
        if self.draft is not None and (fast := self.draft.fused(structure)):
            rest = structure.top_k or 1, structure.top_p, state.knobs, state.seeds, state.position, drafted, history, q
            return lambda logits: fast.propose_(logits, *rest)

        def guess(logits: Tensor) -> None:
            probs, ids = distribution(logits[:, :V], structure, state.knobs)
            position = state.position + drafted + 1
            token = draw(probs, state.seeds, position[:, 0], DRAFT, ids)[:, None]
            history.scatter_(1, position, token if ids is None else ids.gather(1, token))
            q.index_copy_(1, drafted, spread(probs, ids, V)[:, None])
            drafted.add_(1)

        return guess

    def _ending(self, engine: Stepper, structure: Structure, make: Callable[[Structure], Ending]) -> Ending:
        """What `make` makes, shared by all programs of that engine."""
        key = engine, structure
        if key not in self.endings:
            self.endings[key] = engine.shared(make(structure), structure)
        return self.endings[key]

    def _verify(self, offsets: Tensor, end: int, structure: Structure) -> Program:
        """offsets 0..K: one step of K + 1 rows; what comes out of it goes into the log, and the state moves on."""
        target, state, history = self.target, self.target.state, self.history
        settle = self._end_of_round(structure)
        if self._shares(len(offsets) - 1):
            settle = self._ending(target, structure, self._end_of_round)

        def read() -> tuple[Tensor, Tensor]:
            positions = state.position + offsets
            drafted = target.broadcast(history.gather(1, positions[:, 1:]))
            return torch.cat((state.token, drafted), 1), positions

        return target.program(read, lambda logits: settle(logits, offsets), end, self._park, fused=True)

    def _end_of_round(self, structure: Structure) -> Callable[[Tensor, Tensor], None]:
        """What follows the model in a verification of any number of drafts: a function of its logits and offsets."""
        target, state, history, log = self.target, self.target.state, self.history, self.log
        V, last, q = self.vocab, self.history.shape[1] - self.margin, self.q if self.draft else None
        rate, done, k = self.simulated, self.drafted, structure.top_k or 1
        if fast := target.fused(structure):
            seen = state.seen if structure.penalty else None
            given = k, structure.top_p, state.knobs, state.seeds, state.position, history, seen, q, rate
            then = last, state.token, state.position, history, done, log, seen
            return lambda logits, _: fast.settle_(target.broadcast(fast.verify(logits, *given)), *then)

        def settle(logits: Tensor, offsets: Tensor) -> None:
            K, positions = len(offsets) - 1, state.position + offsets + 1  # of the tokens that come out
            if K:
                drafted = history.gather(1, positions[:, :-1])
                if structure.penalty:  # at every position, what is drafted before it counts as seen
                    before = F.pad(F.one_hot(drafted, V), (0, 0, 1, 0)).cumsum(1) > 0
                    logits = penalise(logits, state.seen[:, None] | before, state.knobs)
                given = F.one_hot(drafted, V).float() if q is None else q[:, :K]
                p = spread(*distribution(logits, structure, state.knobs), V)
                tokens, count = accept(drafted, given, p, state.seeds, positions, rate)
            else:  # a plain step, draw for draw
                tokens = sample(logits[:, 0], structure, state.knobs, state.seeds, state.position[:, 0], state.seen)
                tokens = tokens[:, None]
                count = torch.ones_like(tokens)
            finite = logits.abs().amax(-1) < float("inf")
            result = target.broadcast(torch.cat((count, torch.where(finite, tokens, -1)), 1))
            log[:, : K + 2].copy_(result)
            count, tokens = result[:, :1], result[:, 1:].clamp(min=0)
            if structure.penalty:
                state.seen.scatter_(1, torch.where(offsets < count, tokens, tokens[:, :1]), True)
            history.scatter_(1, positions, tokens)
            state.token.copy_(tokens.gather(1, count - 1))
            state.position.copy_((state.position + count).clamp(max=last))  # rows that have ended stay there
            done.zero_()

        return settle

    # -- a generation ----------------

    def begin(self, rows: Sequence[Sequence[int]], first: Tensor) -> None:
        """The target has prefilled `rows` and sampled `first` int64 [B]: the draft reads them too."""
        self.book, known, before = [], 0, self.ids
        self.ids = [[*ids, token] for ids, token in zip(rows, first.tolist())]
        if len(rows) == len(before) == 1:  # a chat: the draft keeps the common prefix too
            same = [a == b for a, b in zip(rows[0], before[0][: self.draft_knows])]
            known = [*same, False].index(False)
        self.catch_up(known)

    def catch_up(self, known: int) -> None:
        """Bring the history up to the last token and the draft's cache up to the last but one, in one chunk; `known`
        ids of every row stay.
        """
        shortest = min(map(len, self.ids))
        start = min(known, shortest - 2)
        for row, ids in zip(self.history, self.ids):
            row[start : len(ids)] = torch.tensor(ids[start:], device=row.device)
        if self.draft is not None:
            top = self.draft.vocab_size - 1
            self.draft.prefill([[min(i, top) for i in row[:-1]] for row in self.ids], start)
        self.draft_knows = shortest - 1

    def steps(self, structure: Structure) -> Iterator[list[list[int]]]:
        """Rounds without end: yields the ids [B][1..K + 1] of each. On a GPU the host reads one behind the queue. While
        drafting is off, the target's own plain steps, several at a time.
        """
        target, cuda, drafting = self.target, self.target.device.type == "cuda", True
        costs = self.costs[structure]
        chooser = Chooser({K: sum(ms) for K, ms in costs.items()}, self.resume_ms)
        pending: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

        def take() -> list[list[int]]:
            """Wait for the oldest round and book it."""
            K, host, event = pending.pop(0)
            if event is not None:
                event.synchronize()
            block = [row[1 : 1 + row[0]] for row in host.tolist()]
            if K:
                self.draft_knows = min(map(len, self.ids))
            for ids, new in zip(self.ids, block):
                ids.extend(new)
                del ids[self.history.shape[1] - self.margin + 1 :]  # a row that has ended
            self.book.append((K, [len(new) for new in block]))
            chooser.observe(*self.book[-1])
            return block

        while True:
            K = chooser.choose()
            while pending and drafting != (K > 0):
                yield take()
            if K and not drafting:
                self.catch_up(self.draft_knows)
            drafting = K > 0
            if not K and not pending:
                position = max(map(len, self.ids)) - 1
                target.state.step.zero_()
                for block in target.steps(min(chooser.rest, self.last - position), position, structure):
                    for ids, new in zip(self.ids, block):
                        ids.extend(new)
                    for _ in block[0]:
                        self.book.append((0, [1] * len(block)))
                        chooser.observe(*self.book[-1])
                    yield block
                target.state.step.zero_()
                if position < self.last:
                    continue
            position = max(map(len, self.ids)) - 1 + K + sum(k + 1 for k, _, _ in pending)
            programs = self._programs(min(position, self.last), structure)
            for i in range(K if self.draft else min(K, 1)):
                programs.drafts[min(i, 1)]()
            programs.verify[K]()
            host = torch.empty_like(self.log, device="cpu", pin_memory=cuda).copy_(self.log, non_blocking=True)
            event = torch.cuda.Event() if cuda else None
            if event is not None:
                event.record()
            pending.append((K, host, event))
            if len(pending) > cuda:
                yield take()

    def acceptance(self) -> tuple[list[float], float]:
        """Of the last generation: how often the i-th proposal was accepted once reached; accepted by drafting round."""
        runs = [(K, n - 1) for K, emitted in self.book for n in emitted if K]
        depth = range(max((K for K, _ in runs), default=0))
        reached = [sum(n >= i for K, n in runs if i < K) for i in depth]
        rates = [sum(n > i for _, n in runs) / max(reached[i], 1) for i in depth]
        return rates, sum(n for _, n in runs) / max(len(runs), 1)

    def round_ms(self, decode_s: float) -> tuple[float, float, float]:
        """Of a mean round of the last generation, which took decode_s seconds: draft and verify, as measured before it,
        and all the rest.
        """
        n, costs = max(len(self.book), 1), next(reversed(self.costs.values()), {})
        draft, verify = (sum(costs[K][i] for K, _ in self.book) / n for i in (0, 1))
        return draft, verify, 1e3 * decode_s / n - draft - verify

    def summary(self, decode_s: float) -> str:
        """The last generation's acceptance, and where a round's time goes, in one line."""
        rates, mean = self.acceptance()
        rounds = ", ".join(f"{n} of K={K}" for K, n in sorted(Counter(K for K, _ in self.book).items()))
        draft, verify, overhead = self.round_ms(decode_s)
        return (
            f"rounds {rounds} | accepted by position {' '.join(f'{rate:.2f}' for rate in rates)} | mean accepted "
            f"{mean:.2f} | draft {draft:.2f} + verify {verify:.2f} + overhead {overhead:.2f} ms a round"
        )
