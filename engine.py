"""The `Engine`: a model, one static cache and the two programs that run it; `generate()` and `score()`.

Knows how to drive a model fast: what is compiled, what is captured, how much memory the cache takes. Refuses to know
its mathematics (`model.py`), its files (`checkpoint.py`), its words (`tokenizer.py`) and the command line
(`generate.py`).
"""

import contextlib
import os
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import architectures
import checkpoint
import decode_kernels
import tp as tensor_parallel
from linear import Linear
from model import DecoderLayer, KVCache, Transformer
from sampling import SamplingParams, Structure, sample
from speculative import Speculation
from tokenizer import Answer, Ids, Tokenizer

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "tales"
Function = Callable[..., Any]
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Increment:
    """What one row gained: new ids, the text that is now certain, and why the row ended (eos, stop, length) if so."""

    row: int
    ids: list[int]
    text: str
    stop_reason: str | None


@dataclass
class Stats:
    """Of the last `generate()`: seconds, counts, and the bytes a decode step reads (weights, average KV prefix)."""

    load_s: float = 0.0
    compile_s: float = 0.0
    prefill_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    batch_size: int = 0
    bytes_per_step: int = 0

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second of one row."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0


class State:
    """Everything a decode step reads and writes besides the cache: static device tensors, so that a step takes no
    argument.
    """

    def __init__(self, batch_size: int, max_seq_len: int, device: torch.device) -> None:
        self.token = torch.zeros((batch_size, 1), dtype=torch.int64, device=device)
        self.position = torch.zeros((batch_size, 1), dtype=torch.int64, device=device)
        self.seeds = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.knobs = torch.ones(3, device=device)
        # column i: the i-th step's tokens
        self.out = torch.zeros((batch_size, max_seq_len), dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)


def advance_reference_(
    tokens: torch.Tensor, token: torch.Tensor, position: torch.Tensor, step: torch.Tensor, out: torch.Tensor
) -> None:
    """Twin of `decode_kernels.advance_`."""
    out.index_copy_(1, step, tokens[:, None])
    token.copy_(tokens.clamp(min=0)[:, None])
    position.add_(1)
    step.add_(1)


def private_copy(fn: Function, name: str) -> Function:
    """fn with a code object of its own: Dynamo counts recompilations per code object, so two engines must not share
    one.
    """
    return types.FunctionType(fn.__code__.replace(co_name=name), fn.__globals__, name, fn.__defaults__, fn.__closure__)


class Engine:
    """A model, its tokenizer, one static cache, and the two callables that run it: prefill and decode, compiled or not.

        engine = Engine.load("org/name")
        for piece in engine.generate(["Once upon a time"], max_new_tokens=100):
            print(piece.text, end="", flush=True)

    A cache slot depends on the ids before it alone, so a prompt that starts like the previous one (a chat) prefills
    only the rest; in bfloat16 a shorter prefill may round differently.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | Ids,
        *,
        compile: bool | None = None,
        compile_prefill: bool = False,
        prefill_chunk: int = 0,
        use_kernels: bool = False,
        defaults: SamplingParams = SamplingParams(),
    ) -> None:
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults
        self.device, self.dtype = model.norm.weight.device, model.norm.weight.dtype
        self.compile = self.device.type == "cuda" if compile is None else compile
        self.use_kernels, self.compile_prefill, self.stats = use_kernels, compile_prefill, Stats()
        windows = [w for w in model.config.windows if w]  # bounds the mask of a long prompt
        self.prefill_chunk = prefill_chunk or (max(min(windows), 512) if windows else 0)
        self.sync_every = 8 if self.device.type == "cuda" else 1
        self.cache: KVCache | None = None
        self.max_seq_len = model.config.max_position_embeddings
        self.state = State(0, 0, self.device)
        self._programs: dict[tuple[Any, ...], Callable[[], None]] = {}
        self._cached: list[int] = []
        self.speculation: Speculation | None = None
        self._prefill_layer: Function = DecoderLayer.__call__
        if compile_prefill and any(model.config.sparse):
            raise ValueError("--compile-prefill: a mixture-of-experts prefill needs the host; leave the flag out")

    @classmethod
    def load(
        cls,
        checkpoint_name: str | Path = DEFAULT_CHECKPOINT,
        *,
        device: str | None = None,
        dtype: str = "auto",
        kernel_choice: str = "auto",
        shape: str | None = None,
        max_seq_len: int | None = None,
        batch_size: int = 1,
        progress: bool = False,
        draft: str | None = None,
        num_draft_tokens: int | None = None,
        chosen: dict[str, float] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> "Engine":
        """A checkpoint folder or Hub id (or a named `shape` with random weights) on a device, ready to generate.

        device None: CUDA if there is one, else the CPU. kernel_choice: triton, inductor (plain PyTorch), or auto
        (triton where it runs). max_seq_len and batch_size reserve the cache now; otherwise it grows on demand. draft:
        speculate with a smaller checkpoint, "ngram", "self-int4" or "self-int8", num_draft_tokens (None: as pays) at a
        time. chosen: sampling parameters that overrule generation_config.json's. options: see `__init__`. ValueError or
        FileNotFoundError for all that a user can get wrong, memory too.
        """
        start = time.perf_counter()
        where = pick_device(device)
        group = tensor_parallel.init(where)
        folder = None if shape else checkpoint.resolve(str(checkpoint_name))
        kind = DTYPES[dtype] or (checkpoint.default_dtype(folder, where) if folder else torch.bfloat16)
        able = decode_kernels.supported(where) and kind != torch.float32
        if kernel_choice == "triton" and not able:
            raise ValueError(
                "--kernels triton needs Triton, bfloat16 or float16, and a CUDA device of capability 8.0 or newer; "
                f"here: {kind} on {where}"
            )
        use_kernels = kernel_choice != "inductor" and able
        if folder is None:
            config = architectures.shape_config(str(shape))
            checkpoint.check_weights_fit(config, kind, where, group)
            model = checkpoint.random_model(config, tp=group, device=where, dtype=kind, use_kernels=use_kernels)
            engine = cls(model, Ids(config.vocab_size), use_kernels=use_kernels, **options)
        else:
            checkpoint.check_weights_fit(folder, kind, where, group)
            model = checkpoint.load(
                str(folder), tp=group, device=where, dtype=kind, use_kernels=use_kernels, progress=progress
            )
            tokenizer = Tokenizer.from_folder(folder)
            options.setdefault("defaults", checkpoint.default_sampling(folder, SamplingParams, chosen))
            engine = cls(model, tokenizer, use_kernels=use_kernels, **options)
        engine.warn()
        if draft in ("self-int4", "self-int8"):
            copy = checkpoint.quantized_copy(model, int(draft[-1]))
            engine.speculate(cls(copy, engine.tokenizer, use_kernels=use_kernels, **options), num_draft_tokens)
        elif draft is not None:
            names: dict[str, Any] = {"device": device, "dtype": dtype, "kernel_choice": kernel_choice}
            engine.speculate(None if draft == "ngram" else cls.load(draft, **names, **options), num_draft_tokens)
        if max_seq_len is not None:
            engine.limit(batch_size, max_seq_len)
        engine.stats.load_s = time.perf_counter() - start
        return engine

    def warn(self) -> None:
        """What is right but not as a user may expect, once, on standard error."""
        ids, vocabulary = self.tokenizer.vocab_size, self.model.config.vocab_size
        if ids > vocabulary:
            what = f"warning: the tokenizer has {ids} ids, the model {vocabulary}"
            print(f"{what}; a prompt that uses one beyond is refused", file=sys.stderr)
        if any(m.unfused for m in self.model.modules() if isinstance(m, Linear)):
            what = f"note: there is no kernel for quantized weights in {self.dtype} on {self.device.type}"
            print(f"{what}; they are expanded at every step, which is slow", file=sys.stderr)

    def speculate(self, draft: "Engine | None", num_draft_tokens: int | None = None) -> None:
        """From here on decode by speculation: `draft` proposes (None: prompt lookup), this model verifies.

        ValueError unless every id means the same to both tokenizers; vocabularies may differ by padding.
        """
        if draft is not None and draft.tokenizer is not self.tokenizer:
            sizes = [e.tokenizer.vocab_size for e in (self, draft)]
            mine, theirs = ([e.tokenizer.piece(i) for i in range(min(sizes))] for e in (self, draft))
            if sizes[0] != sizes[1] or mine != theirs:
                raise ValueError(
                    f"the draft's vocabulary ({sizes[1]} ids) is not the target's ({sizes[0]} ids); "
                    "use a draft with the same tokenizer, or --draft ngram"
                )
        self.speculation = Speculation(self, draft, num_draft_tokens)

    # -- memory ----------------

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
            kind = " (rope_type dynamic is exact up to there)" if config.rope.rope_type == "dynamic" else ""
            raise ValueError(
                f"{max_seq_len} tokens do not fit the model's context of {config.max_position_embeddings}{kind}"
            )
        if cache is not None and cache.batch_size == batch_size and cache.max_seq_len >= max_seq_len + slack:
            return
        slots = -(-(max_seq_len + slack) // 128) * 128
        self.cache = None  # free the old one first
        self._programs, self._cached = {}, []
        per_slot = 2 * len(self.model.layers) * config.num_key_value_heads // self.model.tp.size
        per_slot *= config.head_dim * self.dtype.itemsize
        need, free = batch_size * slots * per_slot, checkpoint.free_bytes(self.device)
        if need > free:
            fits, rows = int(free // (batch_size * per_slot)) // 128 * 128 - slack, int(free // (slots * per_slot))
            advice = [f"--max-seq-len {fits} at this batch"] * (fits > 0) + [f"a batch of {rows}"] * (rows > 0)
            raise ValueError(
                f"a cache of {batch_size} x {slots} slots needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
                f"what fits: {', or '.join(advice) or 'no cache at all'}"
            )
        self.cache = KVCache(config, batch_size, slots, self.device, self.dtype, self.model.tp)
        self.state = State(batch_size, slots, self.device)
        if self.compile_prefill:  # anew: it is tied to the cache, and Dynamo allows a code object few variants
            own = private_copy(DecoderLayer.forward, "prefill")
            self._prefill_layer = torch.compile(own, fullgraph=True, dynamic=True)

    # -- the two programs ----------------

    def prefill(self, prompts: Sequence[Sequence[int]], start: int = 0) -> torch.Tensor:
        """Write prompts[b][start:] into the cache behind `start` slots that are already right; logits [B, V] of each
        last id.

        Rows are padded on the right: a padded slot is overwritten by the row's own next tokens before anything may
        attend to it.
        """
        assert self.cache is not None
        self._cached = []
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        tokens = torch.zeros((len(prompts), longest), dtype=torch.int64)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        tokens, last = tokens.to(self.device), (lengths - 1).to(self.device)
        chunk, layer = self.prefill_chunk or longest, self._prefill_layer
        logits: torch.Tensor | None = None
        for a in range(start, longest, chunk):
            b = min(a + chunk, longest)
            positions = torch.arange(a, b, device=self.device).repeat(len(prompts), 1)
            select = (last - a).clamp(0, b - a - 1)
            new = self.model(tokens[:, a:b].clone(), positions, self.cache, layer, end=b, select=select)[:, 0]
            logits = new if logits is None else torch.where((last >= a)[:, None], new, logits)
        assert logits is not None
        return logits

    def attended(self, position: int) -> int:
        """How many cache slots a program for rows at `position` at most looks at: all where a kernel reads the length
        on the device, else a power of two, so that a cache of S slots needs at most log2(S) programs.
        """
        assert self.cache is not None
        slots = self.cache.max_seq_len
        return slots if self.use_kernels else min(slots, max(128, 1 << position.bit_length()))

    def _decode(self, position: int, structure: Structure) -> Callable[[], None]:
        """The program for one decode step of rows at `position` at most: built, warmed up and captured on first use."""
        cache, state, model, end = self.cache, self.state, self.model, self.attended(position)
        if (program := self._programs.get((end, structure))) is not None:
            return program

        fused, fits = self.fused(structure), self.use_kernels and decode_kernels.fits_advance(state.out)
        advance_ = decode_kernels.advance_ if fits else advance_reference_

        def settle(logits: torch.Tensor) -> None:
            token = sample(logits, structure, state.knobs, state.seeds, state.position[:, 0], fused)
            advance_(model.tp.broadcast(token), state.token, state.position, state.step, state.out)

        settle, layer = settle if fused else self.compiled(settle, f"settle_{end}", whole=False), self.layer(end)

        def decode() -> None:
            settle(model(state.token, state.position, cache, layer, end=end)[:, 0])

        program = self.compiled(decode, f"decode_{end}")
        program = self.captured(program, [state.token, state.position, state.out, state.step])
        self._programs[end, structure] = program
        return program

    def fused(self, structure: Structure) -> bool:
        """Whether drawing a token is a kernel here."""
        return self.use_kernels and decode_kernels.samples(self.dtype, self.model.config.vocab_size, structure)

    def compiled(self, fn: Function, name: str, whole: bool | None = True, dynamic: bool | None = None) -> Function:
        """fn through torch.compile where this engine compiles, else fn. whole: it runs the model, or (False) is a part
        of what does; on a GPU only parts are compiled, identical layers once: a captured graph needs no compiler around
        them.
        """
        if not self.compile or whole == (self.use_kernels or self.device.type == "cuda"):
            return fn
        options = {"coordinate_descent_tuning": self.device.type == "cuda" and not self.use_kernels}
        return torch.compile(private_copy(fn, name), fullgraph=True, dynamic=dynamic, options=options)

    def layer(self, end: int) -> Function:
        """What calls a layer in one program, over `end` slots; between kernels nothing is left to fuse."""
        if self.use_kernels and not any(self.model.config.sparse):
            return DecoderLayer.__call__
        return self.compiled(DecoderLayer.forward, f"layer_{end}", whole=False, dynamic=False)

    def captured(
        self, program: Callable[[], None], restored: list[torch.Tensor], margin: int = 1
    ) -> Callable[[], None]:
        """Compile by running, then on a GPU capture one CUDA graph: a step is then one launch, with no guards and no
        arguments.

        The trial steps write to the last `margin` slots, which never belong to a prefix that is kept, and `restored`
        is put back.
        """
        if not self.compile:
            return program
        began, state, saved = time.perf_counter(), self.state, [t.clone() for t in restored]
        for _ in range(2):  # a GPU's libraries allocate on the first run, which a capture may not
            state.step.zero_()
            state.position.fill_(state.out.shape[1] - margin)
            program()
        if self.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                program()
            program = graph.replay
        for tensor, value in zip(restored, saved):
            tensor.copy_(value)
        self.stats.compile_s += time.perf_counter() - began
        return program

    def _steps(self, count: int, position: int, structure: Structure) -> Iterator[list[list[int]]]:
        """Run `count` decode steps; yields ids [B][n] a few columns at a time.

        On a GPU the host reads one block behind the one it has just queued, so the queue never runs dry.
        """
        pending: tuple[torch.Tensor, torch.cuda.Event] | None = None
        for a in range(0, count, self.sync_every):
            b = min(a + self.sync_every, count)
            for i in range(a, b):
                self._decode(position + i, structure)()
            if self.device.type != "cuda":
                yield self.state.out[:, a:b].tolist()
                continue
            host = torch.empty((self.state.out.shape[0], b - a), dtype=torch.int64, pin_memory=True)
            host.copy_(self.state.out[:, a:b], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            if pending is not None:
                pending[1].synchronize()
                yield pending[0].tolist()
            pending = host, event
        if pending is not None:
            pending[1].synchronize()
            yield pending[0].tolist()

    # -- what callers use ----------------

    def encode(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Ids of each prompt. ValueError for an empty one and for ids beyond the model's vocabulary."""
        rows = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        for row in rows:
            if not row:
                raise ValueError("the prompt is empty and the model has no BOS token to start from; give some text")
            if (worst := max(row)) >= self.model.config.vocab_size:
                raise ValueError(
                    f"the prompt uses token id {worst}; the model's vocabulary has {self.model.config.vocab_size}"
                )
        return rows

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
        ValueError for a prompt that does not fit, and for logits that are not finite.
        """
        sampling, rows = sampling or self.defaults, self.encode(prompts)
        longest, context = max(map(len, rows)), self.model.config.max_position_embeddings
        if longest >= self.max_seq_len:
            raise ValueError(
                f"the prompt has {longest} tokens; --max-seq-len {self.max_seq_len} (the model's context: {context}) "
                "leaves no room to continue"
            )
        limit = min(max_new_tokens, self.max_seq_len - longest)
        speculation = self.speculation
        self.reserve(len(rows), longest + limit, speculation.margin if speculation else 0)
        self.stats = Stats(load_s=self.stats.load_s, batch_size=len(rows))
        state, structure, known = self.state, sampling.structure, 0
        if speculation:
            speculation.prepare(longest, limit, structure)
        else:
            for position in range(longest, longest + limit - 1):
                self._decode(position, structure)
        if len(rows) == 1:  # keep what the cache already holds, but for the last id, whose logits are needed
            same = (a == b for a, b in zip(rows[0][:-1], self._cached))
            known = next((i for i, equal in enumerate(same) if not equal), min(len(rows[0]) - 1, len(self._cached)))
        began = time.perf_counter()
        state.seeds.copy_(torch.arange(len(rows)) + (seed << 20))
        state.knobs.copy_(sampling.knobs(self.device))
        logits = self.prefill(rows, known)
        lengths = torch.tensor([len(r) for r in rows], device=self.device)
        first = sample(logits, structure, state.knobs, state.seeds, lengths - 1, self.fused(structure))
        first = self.model.tp.broadcast(first)
        state.token.copy_(first.clamp(min=0)[:, None])
        state.position.copy_(lengths[:, None])
        state.step.zero_()
        stop_ids = frozenset() if ignore_eos else self.tokenizer.stop_ids
        answers = [Answer(self.tokenizer.decoder(row), stop_ids, stop, limit) for row in rows]
        if speculation:
            speculation.begin(rows, first)
        block = first[:, None].tolist()
        self.stats.ttft_s, self.stats.prefill_tokens = time.perf_counter() - began, sum(map(len, rows)) - known
        began, compile_s = time.perf_counter(), self.stats.compile_s
        steps = speculation.steps(structure) if speculation else self._steps(limit - 1, longest, structure)
        try:
            while block:
                yield from self._increments(answers, block)
                if len(rows) == 1:
                    self._cached = [*rows[0], *answers[0].ids[:-1]]
                block = [] if all(a.stop_reason for a in answers) else next(steps, [])
                self.stats.decode_s = time.perf_counter() - began - (self.stats.compile_s - compile_s)
                self.stats.decode_steps = max(len(a.ids) for a in answers) - 1
        finally:  # also when the caller stops asking
            self.stats.bytes_per_step = self._bytes_per_step(longest + self.stats.decode_steps // 2)

    def _increments(self, answers: list[Answer], block: list[list[int]]) -> Iterator[Increment]:
        for row, (answer, ids) in enumerate(zip(answers, block)):
            if answer.stop_reason is None:
                if -1 in ids[: answer.limit - len(answer.ids)]:
                    self.cache = None  # it holds NaN, and 0 * NaN would reach the next prompt too
                    raise ValueError(
                        f"row {row}: the logits are not finite; is the checkpoint damaged, or {self.dtype} too narrow?"
                    )
                taken, text = answer.add(ids)
                yield Increment(row, taken, text, answer.stop_reason)

    def score(self, tokens: torch.Tensor, chunk: int = 512) -> torch.Tensor:
        """Log-probability float32 [B, T - 1] of each of tokens[:, 1:] (int64 [B, T]) given the ones before it, in one
        pass.
        """
        B, T = tokens.shape
        self.reserve(B, T)
        self._cached = []
        tokens, out = tokens.to(self.device), []
        for a in range(0, T - 1, chunk):
            b = min(a + chunk, T - 1)
            positions = torch.arange(a, b, device=self.device).expand(B, -1)
            logits = self.model(tokens[:, a:b], positions, self.cache, end=b).float()
            out.append(torch.log_softmax(logits, -1).gather(-1, tokens[:, a + 1 : b + 1, None]).squeeze(-1))
        return torch.cat(out, 1)

    def peak_bytes(self) -> int:
        """The most memory that this process has used: of its GPU, or else of the host."""
        return checkpoint.peak_bytes(self.device)

    @contextlib.contextmanager
    def profile(self, file: str) -> Iterator[None]:
        """Write a Chrome trace of the body."""
        with torch.profiler.profile() as trace:
            yield
        trace.export_chrome_trace(file)

    def _bytes_per_step(self, prefix: int) -> int:
        """Bytes one decode step must read: every weight and scale used (of one embedding row), and the KV prefix
        attended.
        """
        config, B = self.model.config, self.stats.batch_size
        total = 0
        for module in self.model.modules():
            if isinstance(module, Linear):
                times = min(B * config.num_experts_per_tok, module.num_experts) if module.num_experts else 1
                total += module.bytes_read() * times
        kv = 2 * config.num_key_value_heads // self.model.tp.size * config.head_dim * self.dtype.itemsize
        return total + B * kv * sum(min(prefix, w or prefix) for w in config.windows)


def pick_device(name: str | None) -> torch.device:
    """cpu, cuda or mps; None takes CUDA if there is one, else the CPU. ValueError for a device that is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = name or ("cuda" if available["cuda"] else "cpu")
    if not available.get(name):
        able = ", ".join(d for d, ok in available.items() if ok)
        raise ValueError(f"device {name!r} is not available here; available: {able}")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)
