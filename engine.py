"""The `Engine`: a model, one static cache and the two programs that run it; `generate()` and `score()`.

Knows how to drive a model fast: what is compiled, what is captured, how much memory the cache takes. Refuses to know
its mathematics (`model.py`), its files (`checkpoint.py`), its words (`tokenizer.py`) and the command line
(`generate.py`).
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import checkpoint
import machine
import shapes
import shortlist
import tp as tensor_parallel
from checkpoint import DTYPES
from compilation import CompiledModules, Function, captured, compiled
from input_folder import default_sampling, resolve, tell
from linear import Linear
from machine import Stats, pick_device, to_host
from model import KVCache, ModelConfig, Transformer
from sampling import SamplingParams, Structure, sample
from speculative import RESUMED, FastRounds, Program, Read, Speculation, Write, recent
from tokenizer import Answer, Ids, Increment, Tokenizer, draft_mismatch, encode_all

try:  # with the folder deleted everything works, only slower
    import decode_kernels
except ModuleNotFoundError:
    decode_kernels = None  # type: ignore[assignment]

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "tales"


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run."""

    device: str | None = None  # cpu, cuda or mps; None takes CUDA if there is one, else the CPU
    dtype: str = "auto"  # float32, bfloat16, float16; auto: the checkpoint's own, or what a CPU is fast with
    kernels: str = "auto"  # triton, inductor (plain PyTorch), or auto: triton where it runs, a CPU's fastest operators
    compile: bool | None = None  # the decode step; None compiles on a GPU
    compile_prefill: bool = False  # and the prefill, for any length
    prefill_chunk: int = 0  # tokens that a prefill takes at a time; 0: all, or what a sliding window calls for
    batch_size: int = 1
    max_seq_len: int | None = None  # reserve the cache now, and let no sequence grow beyond; None: it grows on demand
    draft: str | None = None  # speculate with a smaller checkpoint, "ngram", "self-int4" or "self-int8"
    num_draft_tokens: int | None = None  # to propose at a time; None: as many as pay

    def __post_init__(self) -> None:
        chunk, rows, k = self.prefill_chunk, self.batch_size, self.num_draft_tokens
        for name, ok, want in (
            ("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            ("kernels", self.kernels in ("auto", "triton", "inductor"), "auto, triton or inductor"),
            ("prefill_chunk", isinstance(chunk, SupportsIndex) and chunk >= 0, "0 (all tokens), or an integer above"),
            ("batch_size", isinstance(rows, SupportsIndex) and rows >= 1, "an integer of at least 1"),
            ("num_draft_tokens", k is None or (isinstance(k, SupportsIndex) and 1 <= k <= 15), "1 to 15, or None"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {want}")


class State:
    """Everything a decode step reads and writes besides the cache: static device tensors, so that a step takes no
    argument.
    """

    def __init__(self, batch_size: int, max_seq_len: int, vocab_size: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.token, self.position = zeros(batch_size, 1), zeros(batch_size, 1)  # the newest token, and its position
        self.seeds, self.knobs = zeros(batch_size), torch.ones(4, device=device)  # see `sampling.sample`
        self.out, self.step = zeros(batch_size, max_seq_len), zeros(1)  # column i: the tokens of step i
        self.seen = torch.zeros((batch_size, vocab_size), dtype=torch.bool, device=device)  # see `sampling.penalise`


def advance_(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    """The end of a step, in place: tokens int64 [B] go into column step [1] of out [B, S] and, -1 as 0, into token
    [B, 1]; position [B, 1] and step advance by one.
    """
    out.index_copy_(1, step, tokens[:, None])
    token.copy_(tokens.clamp(min=0)[:, None])
    position.add_(1)
    step.add_(1)


class Engine:
    """A model, its tokenizer, one static cache, and the two programs that run it: prefill and decode.

        engine = Engine.load("org/name")
        for piece in engine.generate(["Once upon a time"], max_new_tokens=100):
            print(piece.text, end="", flush=True)

    A cache slot depends on the ids before it alone, so a prompt that starts like the previous one (a chat) prefills
    only the rest; in bfloat16 a shorter prefill may round differently. One engine runs one generation at a time.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | Ids,
        options: EngineOptions = EngineOptions(),
        *,
        defaults: SamplingParams = SamplingParams(),
        **changes: Any,  # noqa: ANN401
    ) -> None:
        """The model lies where it is to run. changes: fields of `options`; device and dtype are the model's."""
        options = replace(options, **changes)
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults
        self.device, self.dtype = model.norm.weight.device, model.norm.weight.dtype
        self.stats = Stats(self.device)
        self.cuda = self.device.type == "cuda"
        self.compile = self.cuda if options.compile is None else options.compile
        self.use_kernels = wants_kernels(options.kernels, self.device, self.dtype)
        self.cpu_operators = bool(decode_kernels) and (options.kernels, self.device.type) == ("auto", "cpu")
        fast = self.use_kernels or self.cpu_operators
        self._run: Function = decode_kernels.use_(model, fast, self.compile) if decode_kernels else nn.Module.__call__
        windows = [w for w in model.config.windows if w]  # bounds the mask of a long prompt
        self.prefill_chunk = options.prefill_chunk or (max(min(windows), 512) if windows else 0)
        self._prefill = self._run  # what calls a layer, where nothing is compiled
        self.compile_prefill = options.compile_prefill
        if self.compile_prefill and any(model.config.sparse):
            raise ValueError("--compile-prefill: a mixture-of-experts prefill needs the host; leave the flag out")
        self.sync_every = 8 if self.cuda else 1  # steps between two looks of the host
        self.vocab_size, self.context = model.config.vocab_size, model.config.max_position_embeddings
        self.max_seq_len = self.context
        self.cache: KVCache | None = None
        self.state = State(0, 0, self.vocab_size, self.device)
        self.speculation: Speculation | None = None
        self.broadcast = model.tp.broadcast  # rank 0's tensor on every rank
        self._programs: dict[Structure, dict[int, Program]] = {}
        self._kernels: set[tuple[object, ...]] = set()  # for which runs they were compiled ahead
        self._cached: list[int] = []  # the ids that the cache's first row holds
        self._busy = threading.Lock()

    @classmethod
    def load(
        cls,
        checkpoint_name: str | Path = DEFAULT_CHECKPOINT,
        options: EngineOptions = EngineOptions(),
        *,
        shape: str | None = None,
        defaults: SamplingParams | None = None,
        chosen: dict[str, float] | None = None,
        progress: bool = False,
        **changes: Any,  # noqa: ANN401
    ) -> "Engine":
        """A checkpoint folder or Hub id (or a named `shape` with random weights) on a device, ready to generate.

        defaults: sampling parameters instead of generation_config.json's; chosen: some that overrule them. changes:
        fields of `options`. ValueError or FileNotFoundError for all that a user can get wrong, memory too.
        """
        options, began = replace(options, **changes), time.perf_counter()
        device = pick_device(options.device)
        group = tensor_parallel.init(device)
        source = shapes.shape_config(shape) if shape else resolve(str(checkpoint_name))
        dtype = DTYPES[options.dtype] or checkpoint.default_dtype(source, device)
        wants_kernels(options.kernels, device, dtype)  # refuses before anything is read
        machine.check_weights_fit(source, dtype, device, group)
        if isinstance(source, ModelConfig):
            model = checkpoint.random_model(source, tp=group, device=device, dtype=dtype)
            engine = cls(model, Ids(source.vocab_size), options)
        else:
            model = checkpoint.load(str(source), tp=group, device=device, dtype=dtype, progress=progress)
            defaults = defaults or default_sampling(source, SamplingParams, chosen)
            engine = cls(model, Tokenizer.from_folder(source), options, defaults=defaults)
        engine.warn()
        if options.draft is not None:
            engine.speculate(engine._drafter(options.draft, options), options.num_draft_tokens)
        if options.max_seq_len is not None:
            engine.limit(options.batch_size, options.max_seq_len)
        engine.stats.load_s = time.perf_counter() - began
        return engine

    def _drafter(self, name: str, options: EngineOptions) -> "Engine | None":
        own = replace(options, draft=None, max_seq_len=None)
        if name in ("self-int4", "self-int8"):
            return Engine(checkpoint.quantized_copy(self.model, int(name[-1])), self.tokenizer, own)
        return None if name == "ngram" else Engine.load(name, own, defaults=self.defaults)

    def speculate(self, draft: "Engine | None", num_draft_tokens: int | None = None) -> None:
        """From here on decode by speculation: `draft` proposes (None: prompt lookup), this model verifies.

        ValueError unless every id that the draft may propose means the same to both.
        """
        if draft is not None and draft.tokenizer is not self.tokenizer:
            reason = draft_mismatch(self.tokenizer, draft.tokenizer, min(self.vocab_size, draft.vocab_size))
            if reason:
                remedy = "use a draft with the same tokenizer, or --draft ngram"
                raise ValueError(f"the draft's vocabulary is not the target's: {reason}; {remedy}")
        self.speculation = Speculation(self, draft, num_draft_tokens)

    # -- generation ----------------

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        *,
        max_new_tokens: int = 200,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        seed: int = 0,
    ) -> Iterator[Increment]:
        """Continue every prompt (text or ids); yields increments as they come, row by row, until every row has ended.

        Each row's draws depend on (seed, row, position) alone. All rows end where the longest prompt's row reaches
        max_seq_len (that of `load`, else the model's context), at the latest.
        ValueError for arguments that make no sense, for a prompt that does not fit, and for logits that are not finite;
        RuntimeError while another generation of this engine is under way: finish or `close()` it first.
        """
        if not isinstance(max_new_tokens, SupportsIndex) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be an integer of at least 1")
        rows = self.encode(prompts)
        longest = max(map(len, rows))
        if longest >= self.max_seq_len:
            room = f"--max-seq-len {self.max_seq_len} (the model's context: {self.context})"
            raise ValueError(f"the prompt has {longest} tokens; {room} leaves no room to continue")
        limit = min(max_new_tokens, self.max_seq_len - longest)
        stop_ids = frozenset() if ignore_eos else self.tokenizer.stop_ids
        answers = [Answer(i, self.tokenizer.decoder(row), stop_ids, stop, limit) for i, row in enumerate(rows)]
        return self._generate(rows, answers, sampling or self.defaults, limit, seed)

    def _generate(
        self, rows: list[list[int]], answers: list[Answer], sampling: SamplingParams, limit: int, seed: int
    ) -> Iterator[Increment]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this engine is generating already: finish or close() that generator first")
        try:
            longest, structure = max(map(len, rows)), sampling.structure
            self._prepare(len(rows), longest, limit, structure)
            began = time.perf_counter()
            self.state.seeds.copy_(torch.arange(len(rows)) + (seed << 20))
            self.state.knobs.copy_(sampling.knobs(self.device))
            first = self._first_tokens(rows, structure)
            steps = self.steps(limit - 1, longest, structure)
            if self.speculation:
                self.speculation.begin(rows, first)
                steps = self.speculation.steps(structure)
            block = first[:, None].tolist()
            self.stats.ttft_s, began = time.perf_counter() - began, time.perf_counter()
            while block:
                yield from self._increments(answers, block)
                if len(rows) == 1:
                    self._cached = [*rows[0], *answers[0].ids[:-1]]
                block = [] if all(a.stop_reason for a in answers) else next(steps, [])
                self.stats.decode_s = time.perf_counter() - began
                self.stats.decode_steps = max(len(a.ids) for a in answers) - 1
        finally:  # also when the caller stops asking
            prefix = max(map(len, rows)) + self.stats.decode_steps // 2
            self.stats.bytes_per_step = machine.bytes_per_step(self.model, len(rows), prefix)
            self._busy.release()

    def _prepare(self, batch_size: int, longest: int, limit: int, structure: Structure) -> None:
        """Build every program that `limit` tokens behind prompts of at most `longest` will use."""
        speculation = self.speculation
        self.reserve(batch_size, longest + limit, speculation.margin if speculation else 0)
        self.stats = Stats(self.device, load_s=self.stats.load_s, batch_size=batch_size)
        if self.use_kernels:
            self._compile_kernels(longest, structure)
        if speculation:
            speculation.prepare(longest, limit, structure)
        else:
            for position in range(longest, longest + limit - 1):
                self.decode(position, structure)

    def _compile_kernels(self, longest: int, structure: Structure) -> None:
        """Those of every step, side by side, once for each kind of run; what torch.compile makes, meanwhile."""
        (rows, slots), speculation = self.state.out.shape, self.speculation
        if (kind_of_run := (rows, slots, structure, speculation)) in self._kernels:
            return
        self._kernels.add(kind_of_run)
        prefill, draft = min(self.prefill_chunk or longest, longest), speculation and speculation.draft
        tokens, drafts = (speculation.tokens, draft is not None) if speculation else ((1,), None)
        listed = shortlist.serves(structure, self.vocab_size, self.model.tp.size)
        runs = [decode_kernels.Run(self.model, rows, slots, tokens, (prefill,), structure, drafts, listed)]
        if isinstance(draft, Engine) and draft.use_kernels:
            runs.append(decode_kernels.Run(draft.model, rows, slots, (1, 2), (longest, RESUMED), structure, drafts))
        with self.stats.compiling(), decode_kernels.compiling_ahead(runs, self.device, tell):
            if speculation and self.compile:
                speculation.compile(structure)

    def _first_tokens(self, rows: list[list[int]], structure: Structure) -> Tensor:
        """Prefill, and sample the first token of every row, int64 [B]; the state is ready for the first step."""
        state, known = self.state, 0
        if len(rows) == 1:  # keep what the cache already holds, but for the last id, whose logits are needed
            same = [a == b for a, b in zip(rows[0][:-1], self._cached)]
            known = [*same, False].index(False)
        logits = self.prefill(rows, known)
        lengths = torch.tensor([len(r) for r in rows], device=self.device)
        if structure.penalty:
            for seen, row in zip(state.seen.zero_(), rows):
                seen[torch.tensor(row, device=self.device)] = True
        token = self.sampler(structure)(logits, structure, state.knobs, state.seeds, lengths - 1, state.seen)
        first = self.broadcast(token)
        state.token.copy_(first.clamp(min=0)[:, None])
        state.seen.scatter_(1, state.token, True)
        state.position.copy_(lengths[:, None])
        state.step.zero_()
        self.stats.prefill_tokens = sum(map(len, rows)) - known
        return first

    def _increments(self, answers: list[Answer], block: list[list[int]]) -> Iterator[Increment]:
        for row, (answer, ids) in enumerate(zip(answers, block)):
            if answer.stop_reason is None:
                if -1 in ids[: answer.limit - len(answer.ids)]:
                    self.cache = None  # it holds NaN, and 0 * NaN would reach the next prompt too
                    raise ValueError(
                        f"row {row}: the logits are not finite; is the checkpoint damaged, or {self.dtype} too narrow?"
                    )
                yield answer.add(ids)

    def encode(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Ids of each prompt. ValueError for none, for an empty one, and for what is no id of the model."""
        return encode_all(self.tokenizer, prompts, self.vocab_size)

    # -- the two programs ----------------

    def prefill(self, prompts: Sequence[Sequence[int]], start: int = 0) -> Tensor:
        """Write prompts[b][start:] into the cache behind `start` slots that are already right; logits [B, V] of each
        last id.

        Rows are padded on the right: a padded slot is overwritten by the row's own next tokens before anything may
        attend to it.
        """
        assert self.cache is not None
        self._cached = []
        lengths = torch.tensor([len(p) for p in prompts])
        longest, last = int(lengths.max()), (lengths - 1).to(self.device)
        rows = torch.arange(len(prompts), device=self.device)
        tokens = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(self.device)
        chunk, run = self.prefill_chunk or longest, self._prefill
        logits: Tensor | None = None
        for a in range(start, longest, chunk):
            b = min(a + chunk, longest)
            positions = torch.arange(a, b, device=self.device).repeat(len(prompts), 1)
            select = (last - a).clamp(0, b - a - 1) + rows * (b - a)
            new = self.model(tokens[:, a:b].clone(), positions, self.cache, run, end=b, select=select)[:, 0]
            logits = new if logits is None else torch.where((last >= a)[:, None], new, logits)
        assert logits is not None
        return logits

    def attended(self, position: int) -> int:
        """How many cache slots a program for rows at `position` at most looks at: all where a kernel reads the length
        on the device, or a CPU asks the positions (`program`), else a power of two, so that a cache of S slots needs at
        most log2(S) programs (a smaller one is one more to compile).
        """
        slots, one = self.state.out.shape[1], self.use_kernels or self.device.type == "cpu"
        return slots if one else min(slots, max(512, 1 << position.bit_length()))

    def fused(self, structure: Structure) -> FastRounds | None:
        """Kernels for what surrounds the models in a round, where drawing and the end of a step are kernels too."""
        rows, able = len(self.state.token), self.use_kernels
        return decode_kernels.fast_rounds(self.dtype, self.vocab_size, rows, structure) if able else None

    def sampler(self, structure: Structure) -> Callable[..., Tensor]:
        """`sampling.sample`, or the kernel that does the same."""
        return decode_kernels.sample if self.fused(structure) else sample

    def decode(self, position: int, structure: Structure) -> Program:
        """The program of one decode step for rows at `position` at most; built on first use."""
        programs, end = recent(self._programs, structure), self.attended(position)
        if end not in programs:
            state, fused, model = self.state, bool(self.fused(structure)), self.model
            draw, end_step_ = self.sampler(structure), decode_kernels.advance_ if fused else advance_
            if listed := shortlist.serves(structure, self.vocab_size, model.tp.size):
                draw = decode_kernels.sample if fused else shortlist.sample
                draw = partial(draw, first=model.first_id, gather=model.tp.all_gather)

            def write(logits: Tensor) -> None:
                token = draw(logits[:, 0], structure, state.knobs, state.seeds, state.position[:, 0], state.seen)
                token = token if listed and fused else self.broadcast(token)  # one kernel draws the same everywhere
                if structure.penalty:
                    state.seen.scatter_(1, token.clamp(min=0)[:, None], True)
                end_step_(token, state.token, state.position, state.step, state.out)

            read: Read = lambda: (state.token, state.position)  # noqa: E731
            programs[end] = self.program(read, write, end, self.park, fused, whole=not listed)
        return programs[end]

    def program(
        self, read: Read, write: Write, end: int, park: Program, fused: bool = False, whole: bool = True
    ) -> Program:
        """One step as a function without arguments, on static tensors.

        read() gives tokens and positions [B, T], the model looks at `end` cache slots (on a CPU at those that are
        filled), write(logits [B, T, V]) samples and moves on. fused: write is kernels alone, or `shared`, and not to be
        compiled. whole: as of `Transformer`.
        What is compiled, and what is captured:

        |              | layers                            | write                  | the step                         |
        |--------------|-----------------------------------|------------------------|----------------------------------|
        | GPU, plain   | inside                            | inside                 | torch.compile, "reduce-overhead" |
        | GPU, kernels | kernels; some layers compiled (*) | kernels, else compiled | one CUDA graph                   |
        | CPU          | one layer and the head compiled   | compiled (**)          | a plain loop                     |
        | compile off  | eager, a CPU's fastest operators  | eager                  | a plain loop                     |

        (*) Those of which some pieces are plain PyTorch: experts, norms over all heads.
        (**) By one rank.

        park: makes the state such that a trial step writes to slots which belong to no kept prefix.
        """
        model, cache, run, on_cpu = self.model, self.cache, self._run, self.device.type == "cpu"
        plain, mixed = self.cuda and not self.use_kernels, any(model.config.sparse) or model.config.qk_norm_whole
        if self.compile and not self.cuda:
            run = CompiledModules([*model.layers, model.lm_head], f"layer_{end}", guards=False)
            write = write if fused or model.tp.size > 1 else run.including(write, f"write_{end}")
        elif self.compile and self.use_kernels:
            run = CompiledModules(model.layers, f"layer_{end}", guards=True) if mixed else run
            write = write if fused else compiled(write, f"write_{end}")

        def step() -> None:
            tokens, positions = read()
            filled = int(positions.max()) + 1 if on_cpu else end
            write(model(tokens, positions, cache, run, end=filled, whole=whole))

        # a CPU's many small operators take 15% less without autograd's books
        step = step if self.cuda else torch.inference_mode()(step)
        if self.compile and plain:
            return self._tried(compiled(step, f"step_{end}", mode="reduce-overhead"), park, capture=False)
        step = self._tried(step, park, capture=self.cuda)
        if isinstance(run, CompiledModules) and not self.cuda:
            run.settle(park, step)
        return step

    def shared(self, ending: Function, structure: Structure) -> Function:
        """What several programs end with: compiled once for all of them, where it is none but the model is kernels."""
        return compiled(ending, "ending") if self.compile and self.use_kernels and not self.fused(structure) else ending

    def small_program(self, fn: Program, park: Program, fused: bool = False) -> Program:
        """The same for a step that does not run the model: a kernel, or compiled as a whole."""
        return self._tried(fn if fused or not self.compile else compiled(fn, "small"), park, capture=self.cuda)

    def _tried(self, step: Program, park: Program, capture: bool) -> Program:
        if not self.compile:
            return step
        if not self.stats.compile_s:
            tell("compiling the decode step; what it builds is kept on disk for the next time")
        with self.stats.compiling():
            return captured(step, park, capture)

    def park(self, margin: int = 1) -> None:
        """Let every row stand at the last `margin` slots, which belong to no prefix that is kept."""
        self.state.step.zero_()
        self.state.position.fill_(self.state.out.shape[1] - margin)

    def static(self, *tensors: Tensor) -> None:
        """Say that these tensors never move: programs read and write them where they are."""
        if self.compile and self.cuda and not self.use_kernels:
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor)

    def steps(self, count: int, position: int, structure: Structure) -> Iterator[list[list[int]]]:
        """Run `count` decode steps; yields ids [B][n] a few columns at a time.

        On a GPU the host reads one block behind the one it has just queued, so the queue never runs dry.
        """
        pending: list[Callable[[], list[list[int]]]] = []
        for a in range(0, count, self.sync_every):
            b = min(a + self.sync_every, count)
            for i in range(a, b):
                self.decode(position + i, structure)()
            pending.append(to_host(self.state.out[:, a:b]))
            if len(pending) > self.cuda:
                yield pending.pop(0)()
        for block in pending:
            yield block()

    # -- scoring, and memory ----------------

    def score(self, tokens: Tensor, chunk: int = 512) -> Tensor:
        """Log-probability float32 [B, T - 1] of each of tokens[:, 1:] (int64 [B, T]) given the ones before it, in one
        pass.
        """
        B, T = tokens.shape
        self.reserve(B, T)
        self._cached, tokens, out = [], tokens.to(self.device), []
        for a in range(0, T - 1, chunk):
            b = min(a + chunk, T - 1)
            positions = torch.arange(a, b, device=self.device).expand(B, -1)
            logits = self.model(tokens[:, a:b], positions, self.cache, end=b).float()
            out.append(torch.log_softmax(logits, -1).gather(-1, tokens[:, a + 1 : b + 1, None]).squeeze(-1))
        return torch.cat(out, 1)

    def limit(self, batch_size: int, max_seq_len: int) -> None:
        """Reserve the cache now, and let no sequence grow beyond it."""
        self.reserve(batch_size, max_seq_len, self.speculation.margin if self.speculation else 0)
        self.max_seq_len = max_seq_len

    def reserve(self, batch_size: int, max_seq_len: int, slack: int = 0) -> None:
        """Make sure that the cache holds batch_size rows of max_seq_len slots, and `slack` more that no kept token
        uses. ValueError, before allocating, when it cannot.
        """
        cache, config = self.cache, self.model.config
        if not 0 < max_seq_len <= config.max_position_embeddings:
            kind = " (rope_type dynamic is exact up to there)" if config.ropes[0].rope_type == "dynamic" else ""
            raise ValueError(f"{max_seq_len} tokens do not fit the model's context of {self.context}{kind}")
        slots, long = -(-(max_seq_len + slack) // 128) * 128, config.long(max_seq_len)
        if cache is not None and (cache.batch_size, cache.long) == (batch_size, long) and cache.max_seq_len >= slots:
            return
        self.cache, self._programs, self._cached = None, {}, []  # frees the old ones first
        machine.check_cache_fits(self.model, batch_size, slots, slack)
        self.cache = KVCache(config, batch_size, slots, self.device, self.dtype, self.model.tp)
        self.cache.long = long  # as a cache without the slack
        self.state = State(batch_size, slots, self.vocab_size, self.device)
        self.static(*vars(self.state).values(), *self.cache.buffers())
        if self.compile_prefill:  # anew: it is tied to the cache, and Dynamo allows a code object few variants
            self._prefill = CompiledModules(self.model.layers, "prefill", guards=True, dynamic=True)

    def warn(self) -> None:
        """What is right but not as a user may expect, once, on standard error."""
        ids, known = self.tokenizer.vocab_size, self.vocab_size
        if ids > known:
            tell(f"warning: the tokenizer has {ids} ids, the model {known}; a prompt with others is refused")
        if self.tokenizer.stop_ids and min(self.tokenizer.stop_ids) >= known:
            tell("warning: the model's vocabulary has no id that ends a text; it goes on to the end")
        if any(m.expands for m in self.model.modules() if isinstance(m, Linear)):
            tell(f"note: no fast path for some quantized weights in {self.dtype}: every step expands them, slowly")


def wants_kernels(choice: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run and are wanted. ValueError where they are asked for and do not run."""
    able = decode_kernels is not None and decode_kernels.supported(device) and dtype != torch.float32
    if choice == "triton" and not able:
        need = "Triton, bfloat16 or float16, and a CUDA device of capability 8.0 or newer"
        raise ValueError(f"--kernels triton needs {need}; here: {dtype} on {device}")
    return choice != "inductor" and able
