"""Measures decoding, prefill and the cost of more rows against the device's memory bandwidth.

    python scripts/benchmark.py --shape llama-2-7b --mode int4
    python scripts/benchmark.py --checkpoint DIR_OR_HUB_ID
    python scripts/benchmark.py --shape llama-2-70b --mode int4 --draft llama-2-7b --num-draft-tokens 5 \
        --simulated-acceptance 0.6,0.8

Prints a table and, last, one JSON line; appends the same numbers to `benchmarks/decode.csv` (and `prefill.csv`,
`rows.csv`, `speculative.csv` beside it). Knows clocks, bytes and bandwidths. Refuses to know how a step is run: it
times `Engine.generate` as a user calls it, sampling and host loop included, the device synchronised only at the two
ends of the loop. Under torchrun every rank takes part, the first one reports, and bytes are those of one rank.
"""

import argparse
import contextlib
import csv
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from command_line import DTYPES as DTYPE_NAMES
from command_line import FAULTS, MAX_ROWS, Parser, at_least, begin, draft_tokens, refuse

BITS = {"bf16": 16, "int8": 8, "int4": 4}


def numbers(text: str) -> list[int]:
    """An argparse type: 2048,8192 -> [2048, 8192]."""
    return [at_least(1)(part) for part in text.split(",")]


def rates(text: str) -> list[float]:
    """An argparse type: 0.6,0.8 -> [0.6, 0.8]."""
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not sensible; rates from 0 to 1 are")
    return values


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="benchmark.py", description="Measure decoding against memory bandwidth.", allow_abbrev=False)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", help="a named shape with random weights")
    which.add_argument("--checkpoint", help="folder or Hub id")
    p.add_argument("--mode", choices=tuple(BITS), help="weights of a --shape (default bf16: not quantized)")
    for name, default, low in (("batch", 1, 1), ("prompt-len", 5, 1), ("new-tokens", 200, 2), ("repeats", 4, 1)):
        p.add_argument(f"--{name}", type=at_least(low), default=default, help=f"({default})")
    p.add_argument("--cache-len", type=at_least(1), help="cache slots (default: what the run needs)")
    p.add_argument("--group-size", type=int, help="of a --mode; -1: a scale a row (default: int4 128, int8 -1)")
    for name, usual in (("top-k", 200), ("temperature", 0.8)):
        p.add_argument(f"--{name}", type=type(usual), default=usual, help=f"({usual})")
    p.add_argument("--kernels", choices=("auto", "triton", "inductor"), default="auto", help="as generate.py's")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    p.add_argument("--compile-prefill", action="store_true", help="the prefill too")
    p.add_argument("--compile-twice", action="store_true", help="build again, from the caches, for compile_s_warm")
    p.add_argument("--prefill", type=numbers, default=[], metavar="T,T", help="also time prefills of these lengths")
    p.add_argument("--transformers", action="store_true", help="time transformers' prefills of the --shape beside")
    p.add_argument("--rows-table", type=numbers, nargs="?", const=[1, 2, 4, 8, 16], default=[], help="time M-row steps")
    p.add_argument(
        "--draft", metavar="DRAFT", help="also speculate: ngram, self-int4, self-int8, a folder, or a shape[:mode]"
    )
    p.add_argument("--num-draft-tokens", type=draft_tokens, metavar="K", help="as generate.py's")
    p.add_argument("--simulated-acceptance", type=rates, default=[], metavar="P,P", help="of random weights")
    p.add_argument("--tp-model", type=at_least(1, 1025), metavar="N", help="also estimate the step of N ranks")
    p.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: CUDA if there is one")
    p.add_argument("--dtype", choices=DTYPE_NAMES, default="auto", help="auto: as generate.py's")
    p.add_argument("--csv", metavar="FILE", default=str(ROOT / "benchmarks" / "decode.csv"), help="rows go there")
    p.add_argument("--no-csv", action="store_true", help="append no rows")
    p.add_argument("--commit", metavar="HASH", help="what to record where there is no git repository")
    args = p.parse_args(argv)
    if args.checkpoint and args.mode:
        p.error("--mode goes with --shape: a checkpoint brings its own weight format")
    if args.draft is None and (args.simulated_acceptance or args.num_draft_tokens):
        p.error("--simulated-acceptance and --num-draft-tokens need --draft")
    if args.transformers and not (args.shape and args.prefill):
        p.error("--transformers needs --shape and --prefill")
    if args.checkpoint and args.simulated_acceptance:
        p.error("--simulated-acceptance is for random weights (--shape); a checkpoint shows its own")
    if args.rows_table and (args.rows_table[0] != 1 or max(args.rows_table) > MAX_ROWS):
        p.error(f"--rows-table starts with 1 and goes to {MAX_ROWS} at most, not {args.rows_table}")
    return args


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import torch

import checkpoint
import machine
import shapes
import tp
from engine import DTYPES, Engine, EngineOptions, pick_device
from linear import Linear
from sampling import SamplingParams, Structure
from speculative import Program
from tokenizer import Ids

# Bytes per second that the best read-only kernel reached; a slower measurement must not flatter MBU.
KNOWN_READ = {"NVIDIA H200": 4.68e12, "NVIDIA H100 80GB HBM3": 3.17e12}
SUM_MS = 0.0024  # a sum over two H200s of one row of Llama-2-7B's activations (benchmarks/NOTES.md)

# -- the device ----------------


def device_name(device: torch.device) -> str:
    """A GPU's name, or the processor's, its vectors as PyTorch uses them, and how many threads compute."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    info = Path("/proc/cpuinfo")
    names = re.findall(r"(?m)^model name\s*: (.+)$", info.read_text()) if info.is_file() else []
    name = f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{name} ({torch.get_num_threads()} threads)"


def seconds(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of one of `times` runs queued back to back, the device synchronised at the two ends."""
    wait = getattr(torch, device.type).synchronize  # a device's name is its module's
    wait()
    began = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - began) / times


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that the fastest of a few read-only reductions reaches, over 8.6 GB on a GPU."""
    x = torch.ones((1 << (17 if device.type == "cuda" else 12), 1 << 14), device=device)  # float32: 8.6 GB or 0.27 GB
    candidates: list[Callable[[], object]] = [x.sum, lambda: x.sum(1)]
    if device.type == "cuda":
        by_row = torch.compile(lambda rows: rows.sum(1))
        candidates.append(lambda: by_row(x))
    for run in candidates:
        run()
    return max(x.nbytes / min(seconds(run, device, 3) for _ in range(4)) for run in candidates)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one 8192^3 matrix product (512^3 off the GPU) in `dtype`; on a CPU of one
    in float32 if it is faster: without instructions for bfloat16 that has a hundredth of it.
    """
    n = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    seconds(lambda: a @ b, device, 3)
    rate = 2 * n**3 / statistics.median(seconds(lambda: a @ b, device, 10) for _ in range(4))
    return max(rate, matmul_rate(device, torch.float32)) if device.type == "cpu" and dtype != torch.float32 else rate


def process_seconds() -> float:
    """Since this process started, imports included (processor seconds where there is no /proc)."""
    if not Path("/proc/self/stat").exists():
        return time.process_time()
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


# -- what is measured ----------------


def build(args: argparse.Namespace, device: torch.device) -> Engine:
    """The engine of a checkpoint, or of a named shape with random weights in the asked format."""
    options = EngineOptions(device.type, args.dtype, args.kernels, args.compile, args.compile_prefill)
    if args.checkpoint:
        return Engine.load(args.checkpoint, options)
    config, size = shapes.shape_config(args.shape), args.group_size
    if size not in (None, -1) and (size < 1 or config.hidden_size % size):
        raise ValueError(f"--group-size {size} does not divide hidden_size {config.hidden_size}")
    group, bits = tp.init(device), BITS[args.mode or "bf16"]
    dtype = DTYPES[args.dtype] or checkpoint.default_dtype(None, device)
    model = checkpoint.random_model(config, bits=bits, group_size=size, tp=group, device=device, dtype=dtype)
    return Engine(model, Ids(config.vocab_size), options)


def random_prompts(engine: Engine, batch: int, length: int, seed: int) -> list[list[int]]:
    """Ids that differ from run to run at the first one, so that no run finds its prompt in the cache."""
    vocab, g = engine.model.config.vocab_size, torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocab, (batch, length), generator=g)
    prompts[:, 0] = seed % vocab
    return prompts.tolist()


def heldout_prompts(engine: Engine, batch: int, length: int, seed: int) -> list[list[int]]:
    """Passages of data/heldout.txt, other ones for every seed: real text, so that acceptance is real."""
    text = (ROOT / "data" / "heldout.txt").read_text("utf-8")
    starts = [(seed * batch + row) * 7919 % (len(text) - 8 * length) for row in range(batch)]
    return [engine.encode([text[start : start + 8 * length]])[0][:length] for start in starts]


def decode(engine: Engine, args: argparse.Namespace, seed: int) -> tuple[float, float, float]:
    """One whole generation: (seconds to the first token, decode seconds, seconds of building programs)."""
    sampling = SamplingParams(temperature=args.temperature, top_k=args.top_k)
    if args.draft and args.checkpoint:
        prompts = heldout_prompts(engine, args.batch, args.prompt_len, seed)
    else:
        prompts = random_prompts(engine, args.batch, args.prompt_len, seed)
    list(engine.generate(prompts, sampling, max_new_tokens=args.new_tokens, ignore_eos=True, seed=seed))
    if engine.stats.decode_steps != args.new_tokens - 1:
        raise ValueError(f"{args.prompt_len} + {args.new_tokens} tokens do not fit the model's context")
    return engine.stats.ttft_s, engine.stats.decode_s, engine.stats.compile_s


def measure_decode(engine: Engine, args: argparse.Namespace, bandwidth: float, spent: float) -> dict[str, Any]:
    """A warm-up, which compiles, then the median of the timed runs. spent: seconds so far that were not start-up."""
    from torch._dynamo.utils import counters  # here: a plain start does without it, and a GPU's bandwidth has used it

    if args.cache_len:
        engine.reserve(args.batch, args.cache_len)
    counters.clear()
    _, _, compile_s = decode(engine, args, seed=1)
    first_token_s = process_seconds() - spent - engine.stats.decode_s
    cold = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"] > 0
    runs = [decode(engine, args, seed) for seed in range(2, 2 + args.repeats)]
    ttft, decode_s, total = (statistics.median(x) for x in zip(*((a, b, a + b) for a, b, _ in runs)))
    rate = engine.stats.decode_steps / decode_s
    return {
        **{key: getattr(args, key) for key in ("batch", "prompt_len", "new_tokens", "top_k", "temperature", "repeats")},
        "cache_len": engine.state.out.shape[1],
        "decode_tok_s": args.batch * rate,
        "total_tok_s": args.batch * args.new_tokens / total,  # the prefill's seconds counted in
        "tpot_ms": 1e3 / rate,
        "ttft_ms": 1e3 * ttft,
        "prefill_tok_s": args.batch * args.prompt_len / ttft,
        "mfu": None,  # the longest --prefill's, and then prefill_tok_s too
        "bytes_per_token": engine.stats.bytes_per_step // args.batch,
        "read_gb_s": engine.stats.bytes_per_step * rate / 1e9,
        "bandwidth_gb_s": bandwidth / 1e9,
        "mbu": engine.stats.bytes_per_step * rate / bandwidth,
        "compile_s_cold": compile_s if engine.compile and cold else None,
        "compile_s_warm": compile_s if engine.compile and not cold else None,
        "first_token_s": first_token_s,
        "peak_memory_gb": machine.peak_bytes(engine.device) / 1e9,
    }


def step_of_ranks(engine: Engine, ranks: int, decoded: dict[str, Any]) -> str:
    """What a step would take on `ranks` devices: its bytes shared by them, two sums a layer and one of the embedding
    more, everything else as in this run. The seconds of a sum are measured here, or those of two H200s.
    """
    tp, config, batch = engine.model.tp, engine.model.config, decoded["batch"]
    n, sums = batch * config.hidden_size, 2 * config.num_hidden_layers + 1
    each = 1e3 * machine.seconds_of_sum(tp, n, engine.dtype, engine.device) if tp.size > 1 else SUM_MS
    reading = 1e3 * decoded["bytes_per_token"] * batch * tp.size / (decoded["bandwidth_gb_s"] * 1e9)
    rest = decoded["tpot_ms"] - reading / tp.size - (sums * each if tp.size > 1 else 0)
    ms = rest + reading / ranks + (sums * each if ranks > 1 else 0)
    terms = f"{rest:.3f} + {reading:.3f} / {ranks} to read + {sums} sums of {1e3 * each:.1f} us"
    return f"{ranks} ranks: {terms} = {ms:.3f} ms, {1e3 * batch / ms:.1f} tok/s ({decoded['tpot_ms'] / ms:.2f} times)"


def drafter(engine: Engine, args: argparse.Namespace) -> Engine | None:
    """--draft as an engine; None for prompt lookup."""
    if args.draft == "ngram":
        return None
    if args.draft in ("self-int4", "self-int8"):
        copy = checkpoint.quantized_copy(engine.model, int(args.draft[-1]))
        return Engine(copy, engine.tokenizer, kernels=args.kernels, compile=args.compile)
    name, _, mode = args.draft.partition(":")
    other = {"checkpoint": args.draft} if args.checkpoint else {"shape": name, "mode": mode or args.mode}
    if not args.checkpoint and mode not in ("", *BITS):
        raise ValueError(f"--draft {args.draft}: the mode is one of {', '.join(BITS)}")
    return build(argparse.Namespace(**(vars(args) | other)), engine.device)


def measure_speculation(engine: Engine, args: argparse.Namespace, plain: dict[str, Any]) -> list[dict[str, Any]]:
    """Decoding with drafts, for every rate of acceptance; without simulation, at the real one.

    ideal is the speed-up that E tokens a round give at no overhead, E t / (K d + t), with milliseconds t and d of one
    row of target and draft as plain decoding takes them, in this run; ideal_bytes the same with the bytes they read.
    """
    draft, out = drafter(engine, args), []
    draft_ms, t = 0.0, plain["tpot_ms"]
    if draft is not None:
        decode(draft, args, seed=1)
        runs = [decode(draft, args, seed)[1] for seed in range(2, 2 + args.repeats)]
        draft_ms = 1e3 * statistics.median(runs) / draft.stats.decode_steps
    engine.speculate(draft, args.num_draft_tokens)
    speculation = engine.speculation
    assert speculation is not None
    if args.simulated_acceptance:
        speculation.simulated = torch.zeros((), device=engine.device)
    for rate in args.simulated_acceptance or [None]:
        times, rounds = [], []
        if speculation.simulated is not None:
            speculation.simulated.fill_(rate)
        for seed in range(1, 2 + args.repeats):  # the first one warms up
            times.append(decode(engine, args, seed)[1] / engine.stats.decode_steps)
            rounds += speculation.book if seed > 1 else []
        parts = dict(
            zip(("round_draft_ms", "round_verify_ms", "round_other_ms"), speculation.round_ms(engine.stats.decode_s))
        )
        speculation.book = rounds
        K, mean = args.num_draft_tokens, speculation.acceptance()[1]
        E = mean + 1 if rate is None else sum(rate**i for i in range((K or 0) + 1))
        work = draft.stats.bytes_per_step / engine.stats.bytes_per_step if draft else 0.0
        speed = t / (1e3 * statistics.median(times[1:]))
        ideal = E * t / (K * draft_ms + t) if K else None
        row = {
            "draft": Path(args.draft).name,
            "num_draft_tokens": K or "auto",
            "acceptance": "real" if rate is None else rate,
            **{key: getattr(args, key) for key in ("batch", "prompt_len", "temperature")},
            "mean_accepted": mean,
            "tok_s": args.batch * 1e3 * speed / t,
            "plain_ms": t,
            "draft_ms": draft_ms,
            "speedup": speed,
            "ideal": ideal,
            "efficiency": speed / ideal if ideal else None,
            "ideal_bytes": E / (K * work + 1) if K else None,
        }
        out.append(row | parts)
    return out


def prefill_flops(engine: Engine, T: int) -> float:
    """Of one prompt of T ids on this rank: the Linears (the head on one position) and causal attention."""
    model, c = engine.model, engine.model.config
    total = 0.0
    for name, m in model.named_modules():
        if isinstance(m, Linear):
            uses = 1 if name == "lm_head" else T * (c.num_experts_per_tok if m.num_experts else 1)
            total += 2.0 * uses * m.in_features * m.out_features
    pairs = sum(T * (T + 1) / 2 if not w or w >= T else w * (T - w) + w * (w + 1) / 2 for w in c.windows)
    return total + 4.0 * pairs * c.head_dim * c.num_attention_heads / model.tp.size


def transformers_prefill(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[int], None]:
    """The prefill of T ids by transformers (SDPA attention, eager) of a llama-like --shape with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shapes.shape_json(args.shape))
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def run(T: int) -> None:
        model(torch.ones((args.batch, T), dtype=torch.int64, device=device), use_cache=True, logits_to_keep=1)

    return run


def measure_prefill(engine: Engine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of whole prompts, and MFU against a matrix product measured here."""
    rate, out = matmul_rate(engine.device, engine.dtype), []
    other = transformers_prefill(args, engine.device, engine.dtype) if args.transformers else None
    for T in args.prefill:
        engine.reserve(args.batch, T)
        run = functools.partial(engine.prefill, random_prompts(engine, args.batch, T, seed=T))
        run()
        s = statistics.median(seconds(run, engine.device, 1) for _ in range(args.repeats))
        out.append({"batch": args.batch, "prompt_len": T, "ms": 1e3 * s, "prefill_tok_s": args.batch * T / s})
        out[-1] |= {"matmul_tflop_s": rate / 1e12, "mfu": args.batch * prefill_flops(engine, T) / s / rate}
        out[-1] |= {"compiled_prefill": engine.compile_prefill, "transformers_ms": None}
        if other:
            other(T)
            times = [seconds(functools.partial(other, T), engine.device, 1) for _ in range(args.repeats)]
            out[-1]["transformers_ms"] = 1e3 * statistics.median(times)
    return out


def measure_rows(engine: Engine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a step of M new tokens of one sequence (a verification), each sampled, compiled and captured as
    a decode step is; and how many one-row steps that is.
    """
    position, times = args.prompt_len, 50 if engine.device.type == "cuda" else 3
    engine.reserve(1, max(position + 2 * MAX_ROWS, args.cache_len or 1))
    sampling, out = SamplingParams(temperature=args.temperature, top_k=args.top_k), []
    state, chosen = engine.state, torch.zeros(MAX_ROWS, dtype=torch.int64, device=engine.device)
    state.knobs.copy_(sampling.knobs(engine.device))
    engine.static(chosen)
    for rows in args.rows_table:
        program = rows_program(engine, rows, engine.attended(position + rows), sampling.structure, chosen)
        state.position.fill_(position)
        s = statistics.median(seconds(program, engine.device, times) for _ in range(args.repeats + 1))
        out.append({"position": position, "rows": rows, "ms": 1e3 * s})
        out[-1]["ratio"] = out[-1]["ms"] / out[0]["ms"]
    return out


def rows_program(engine: Engine, rows: int, end: int, structure: Structure, chosen: torch.Tensor) -> Program:
    """A step of `rows` new tokens over `end` slots, each sampled into `chosen`."""
    state, fused = engine.state, bool(engine.fused(structure))
    tokens = torch.randint(engine.vocab_size, (1, rows), device=engine.device)
    later = torch.arange(rows, device=engine.device)
    draw = engine.sampler(structure)

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        return tokens, state.position + later

    def write(logits: torch.Tensor) -> None:
        drawn = draw(logits[0], structure, state.knobs, state.seeds, (state.position + later)[0])
        chosen[:rows].copy_(engine.broadcast(drawn))

    program = engine.program(read, write, end, functools.partial(engine.park, rows), fused)
    engine.park(rows)
    program()
    return program


# -- the report ----------------


def commit_hash() -> str:
    """Short hash, +dirty with uncommitted changes outside benchmarks/; unknown where there is no repository."""

    commands = ["git rev-parse --short HEAD", "git status --porcelain -- . :!benchmarks"]
    try:
        head, changes = (subprocess.check_output(c.split(), cwd=ROOT, stderr=subprocess.DEVNULL) for c in commands)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.decode().strip() + ("+dirty" if changes else "")


def triton_version() -> str | None:
    """None where there is no Triton."""
    with contextlib.suppress(ImportError):
        import triton

        return triton.__version__
    return None


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows under the header, which is their keys; the file is replaced whole. ValueError for another header."""
    columns = list(rows[0])
    text = path.read_text("utf-8") if path.is_file() else ",".join(columns) + "\n"
    if text.splitlines()[0].split(",") != columns:
        raise ValueError(f"{path} has another header than {','.join(columns)}; give --csv another file")
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        csv.DictWriter(file, columns, lineterminator="\n").writerows(rows)
    temporary.replace(path)


def kernels_name(engine: Engine) -> str:
    """What computes: Triton's kernels, PyTorch's fast operators for a CPU, what Inductor makes, or plain operators."""
    if engine.use_kernels:
        return "triton"
    if engine.cpu_operators:
        return "cpu compiled" if engine.compile else "cpu"
    return "inductor" if engine.compile else "eager"


def describe(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """The setting of a run: what every row of every CSV starts with."""
    local = args.checkpoint and os.path.isdir(args.checkpoint)  # a folder's path is nobody's business
    return {
        "commit": args.commit or commit_hash(),
        "device": device_name(engine.device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "tp": engine.model.tp.size,
        "shape": Path(args.checkpoint).resolve().name if local else args.shape or args.checkpoint,
        "mode": args.mode or ("bf16" if args.shape else "checkpoint"),
        "group_size": {"int4": args.group_size or 128, "int8": args.group_size}.get(args.mode),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "kernels": kernels_name(engine),
        "compiled": engine.compile,
    }


def report(args: argparse.Namespace, setting: dict[str, Any], decoded: dict[str, Any], tables: dict[str, Any]) -> None:
    """Everything on the screen and appended to its CSV; last the JSON line: the decode row, the tables inside."""
    decoded, tables = json.loads(json.dumps([decoded, tables]), parse_float=lambda text: float(f"{float(text):.5g}"))
    for key, value in (setting | decoded).items():
        print(f"{key:>16}  {'-' if value is None else value}")
    for rows in tables.values():
        for row in [dict(zip(rows[0], rows[0])), *rows]:
            print(" ".join(f"{'-' if value is None else value:>14}" for value in row.values()))
    files = {args.csv: [decoded]} | {Path(args.csv).with_name(f"{name}.csv"): rows for name, rows in tables.items()}
    for path, rows in [] if args.no_csv else files.items():
        append_csv(Path(path), [setting | row for row in rows])
    versions = {"torch": setting["torch"], "triton": setting["triton"], "gpu": setting["device"]}
    print(json.dumps(setting | decoded | tables | {"versions": versions}))


def measure(args: argparse.Namespace) -> None:
    """Bandwidth first, then the model, then whatever was asked for."""
    SamplingParams(temperature=args.temperature, top_k=args.top_k)  # a bad value is refused before the work
    if args.shape:
        shapes.shape_json(args.shape)  # and an unknown shape
    if not args.no_csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    device = pick_device(args.device)
    torch.manual_seed(0)
    began = time.perf_counter()
    bandwidth = max(read_bandwidth(device), KNOWN_READ.get(device_name(device), 0.0))
    spent = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    engine = build(args, device)
    decoded = measure_decode(engine, args, bandwidth, spent)
    tables = {"rows": measure_rows(engine, args)} if args.rows_table else {}
    if args.draft:
        tables["speculative"] = measure_speculation(engine, args, decoded)
    if args.prefill:
        tables["prefill"] = measure_prefill(engine, args)
        decoded |= {key: tables["prefill"][-1][key] for key in ("prefill_tok_s", "mfu")}
    if args.compile_twice and engine.compile:
        torch._dynamo.reset()
        again = Engine(engine.model, engine.tokenizer, kernels=args.kernels, compile=True)
        engine.cache = None
        decoded["compile_s_warm"] = decode(again, args, seed=1)[2]
    estimate = step_of_ranks(engine, args.tp_model, decoded) if args.tp_model else ""
    if engine.model.tp.rank == 0:
        print(estimate, end="\n" * bool(estimate))
        report(args, describe(engine, args), decoded, tables)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 after one line on standard error for bad input."""
    args = parse(argv)
    try:
        measure(args)
    except KeyboardInterrupt:
        return 130
    except (*FAULTS, ImportError) as error:
        return refuse("benchmark.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
