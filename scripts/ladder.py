"""The ladder: how fast one sequence is decoded on this machine, one technique a rung.

    python scripts/ladder.py [--checkpoint DIR_OR_HUB_ID | --shape llama-2-7b] [--draft DRAFT] [--output runs/ladder]

Rungs: transformers (eager, a cache that grows), this project eager with its static cache, compiled in plain PyTorch,
with the kernels, int8, int4 (GPTQ of a checkpoint), speculation, and int4 with speculation. Each is an engine of its
own, measured as `benchmark.py` measures; a rung that this machine or model does not have is named with its reason.
Prints a table and writes ladder.csv, ladder.json and, where matplotlib is installed, ladder.png and ladder.svg; the
quantized checkpoints stay beside them. Under torchrun every rung runs on all ranks, without transformers' one.

On a CPU the kernels are PyTorch's own fast operators, and that rung and those above it are compiled, which is not the
default there.
"""

import argparse
import contextlib
import csv
import gc
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from command_line import DEFAULT_CHECKPOINT, FAULTS, Parser, at_least, begin, draft_tokens, ready, refuse
from command_line import DTYPES as DTYPE_NAMES


def rate(text: str) -> float:
    """An argparse type: from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not sensible; a rate from 0 to 1 is")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="ladder.py", description="Decoding speed, one technique a rung.", allow_abbrev=False)
    one = p.add_mutually_exclusive_group()
    one.add_argument("--checkpoint", help="folder or Hub id (default: the embedded model)")
    one.add_argument("--shape", help="a named shape with random weights")
    p.add_argument("--draft", help="as benchmark.py's (default: the embedded model's own; --shape: self-int4; ngram)")
    p.add_argument(
        "--num-draft-tokens", type=draft_tokens, metavar="K", help="1..15, or auto: what pays (default; --shape: 4)"
    )
    p.add_argument("--simulated-acceptance", type=rate, default=0.8, metavar="P", help="with --shape (0.8)")
    p.add_argument("--new-tokens", type=at_least(2), default=200, help="(200)")
    p.add_argument("--repeats", type=at_least(1), default=3, help="timed runs, of which the median counts (3)")
    p.add_argument("--heldout-tokens", type=at_least(0), default=8192, help="of data/heldout.txt, perplexity (8192)")
    p.add_argument("--rows", type=at_least(1), default=32, help="calibration rows of GPTQ (32)")
    p.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: CUDA if there is one")
    p.add_argument("--dtype", choices=DTYPE_NAMES, default="auto", help="auto: as generate.py's")
    p.add_argument("--output", type=Path, default=Path("runs/ladder"), metavar="DIR", help="(runs/ladder)")
    args = p.parse_args(argv)
    if not args.shape and args.checkpoint is None:
        args.checkpoint, args.draft = str(DEFAULT_CHECKPOINT), args.draft or f"{DEFAULT_CHECKPOINT}-draft"
    args.draft = args.draft or ("self-int4" if args.shape else "ngram")
    if args.shape and args.num_draft_tokens is None:
        args.num_draft_tokens = 4  # random weights accept by chance alone, from which nothing can be learned
    return args


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import benchmark
import evaluate
import plots
import torch
from tqdm import tqdm

import architectures
import checkpoint
import machine
import quantize
import shapes
import tp
from engine import Engine, pick_device

FORMATS = {bits: name for name, bits in benchmark.BITS.items()}
FIRST = "transformers, eager"
PROMPT = 5  # tokens
HEADS = ("rung", "tok/s", "speed-up", "TTFT ms", "MB/token", "MBU", "memory GB", "perplexity")
KEYS = (  # of a row
    *"rung tok_s speedup ttft_ms bytes_per_token mbu memory_gb perplexity".split(),
    *"weights dtype kernels compiled tp draft mean_accepted".split(),
)


@dataclass(frozen=True)
class Rung:
    """One technique more. flags: of benchmark.py; bits: of the weights; draft: with speculation."""

    name: str
    flags: tuple[str, ...] = ()
    bits: int = 16
    draft: bool = False


RUNGS = (
    Rung("eager, static cache", ("--kernels", "inductor", "--no-compile")),
    Rung("compiled", ("--kernels", "inductor", "--compile")),
    Rung("kernels", ("--kernels", "triton")),
    Rung("int8", bits=8),
    Rung("int4", bits=4),
    Rung("speculation", draft=True),
    Rung("int4 and speculation", bits=4, draft=True),
)


class Ladder:
    """What all rungs share: arguments, device, its bandwidth, and the checkpoints quantized so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, pick_device(args.device)
        self.group = tp.init(self.device)
        folder = checkpoint.resolve(args.checkpoint) if args.checkpoint else None  # refused before the work
        hf = checkpoint.read_config(folder) if folder else shapes.shape_json(args.shape)
        context = architectures.config_from_hf(hf).max_position_embeddings
        if PROMPT + args.new_tokens > context:
            raise ValueError(
                f"--new-tokens {args.new_tokens} do not fit the model's context of {context}; {context - PROMPT} do"
            )
        if args.draft != "ngram" and not args.draft.startswith("self-"):
            name = args.draft.partition(":")[0]
            checkpoint.resolve(args.draft) if folder else shapes.shape_json(name)
        self.bandwidth = max(
            benchmark.read_bandwidth(self.device), benchmark.KNOWN_READ.get(benchmark.device_name(self.device), 0.0)
        )
        self.names = {16: args.checkpoint}  # by bits of the weights
        self.losses: dict[int, float] = {}

    def quantized(self, bits: int) -> str | None:
        """The checkpoint with so many bits, made on the first use by the first rank; None for a shape."""
        args = self.args
        if args.shape or bits in self.names:
            return self.names.get(bits)
        mode = "int8" if bits == 8 else "int4-gptq"
        folder, problem = args.output / mode, ""
        if self.group.rank == 0:
            settings = quantize.Settings(mode, -1 if bits == 8 else quantize.AUTO)
            # one rank alone cannot generate: with several, the text is a file instead of the model's own
            text = ROOT / "data" / "calibration.txt" if self.group.size > 1 else None
            texts = (text, args.rows if bits == 4 else 0, 512), (evaluate.HELDOUT, 0)
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # a line for every Linear
                    quantize.quantize(args.checkpoint, folder, settings, *texts, self.device, force=True)
            except (ValueError, OSError) as error:
                problem = str(error)
        if problem := self.group.share(problem):  # the others wait here for the first
            raise ValueError(problem)
        self.names[bits] = str(folder)
        return self.names[bits]

    def setting(self, rung: Rung) -> argparse.Namespace:
        """benchmark.py's arguments for a rung."""
        args, name = self.args, self.quantized(rung.bits)
        argv = ["--checkpoint", name] if name else ["--shape", args.shape, "--mode", FORMATS[rung.bits]]
        argv += ["--new-tokens", str(args.new_tokens), "--repeats", str(args.repeats), "--dtype", args.dtype]
        flags = ["--compile"] if self.device.type == "cpu" and "inductor" not in rung.flags else rung.flags
        argv += ["--device", self.device.type, "--prompt-len", str(PROMPT), *flags]
        if rung.draft:
            argv += ["--draft", args.draft, "--num-draft-tokens", str(args.num_draft_tokens or "auto")]
            argv += [] if name else ["--simulated-acceptance", str(args.simulated_acceptance)]
        return benchmark.parse(argv)

    def climb(self, rung: Rung) -> dict[str, Any]:
        """The row of a rung. ValueError where this machine or model does not have it."""
        if rung.draft and rung.bits < 16 and self.args.draft.startswith("self-"):
            raise ValueError(f"{self.args.draft} drafts for unquantized weights; --draft names a smaller model")
        setting = self.setting(rung)
        engine = benchmark.build(setting, self.device)
        found = benchmark.measure_decode(engine, setting, self.bandwidth, 0.0)
        row: dict[str, Any] = {"rung": rung.name, "tok_s": found["decode_tok_s"], "ttft_ms": found["ttft_ms"]}
        row |= {key: found[key] for key in ("bytes_per_token", "mbu")} | {"draft": None, "mean_accepted": None}
        if rung.draft:  # what a round reads is spread over as many tokens as it gives: no one number
            [fast] = benchmark.measure_speculation(engine, setting, found)
            row |= {"tok_s": fast["tok_s"], "ttft_ms": 1e3 * engine.stats.ttft_s, "bytes_per_token": None, "mbu": None}
            row |= {"draft": fast["draft"], "mean_accepted": fast["mean_accepted"]}
        described = benchmark.describe(engine, setting)
        row |= {key: described[key] for key in ("dtype", "kernels", "compiled", "tp")}
        row |= {"memory_gb": held_bytes(engine) / 1e9, "perplexity": self.perplexity(rung.bits, engine)}
        return row | {"weights": row["dtype"] if rung.bits == 16 else FORMATS[rung.bits]}

    def perplexity(self, bits: int, engine: Engine) -> float | None:
        """On held-out text, of weights with so many bits: speculation does not change it."""
        if self.args.shape or not self.args.heldout_tokens:
            return None
        if bits not in self.losses:
            setting = evaluate.parse(["--tokens", str(max(self.args.heldout_tokens, 2))])
            self.losses[bits] = evaluate.measure(evaluate.Scorer("", engine, False), setting)["perplexity"]
        return self.losses[bits]

    def transformers(self) -> dict[str, Any]:
        """The first rung: transformers' own loop, sampling as everywhere here."""
        if self.group.size > 1:
            raise ValueError("transformers is not measured over several ranks")
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
            from transformers.utils import logging
        except ImportError as error:
            raise ValueError("transformers is not installed") from error
        args = self.args
        logging.disable_progress_bar()
        folder = None if args.shape else checkpoint.resolve(args.checkpoint)
        dtype = benchmark.DTYPES[args.dtype] or checkpoint.default_dtype(folder, self.device)
        if args.shape:
            config = AutoConfig.for_model(**shapes.shape_json(args.shape))
            with self.device:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = model.eval().to(self.device)
        how: dict[str, Any] = {"do_sample": True, "top_k": 200, "temperature": 0.8, "pad_token_id": 0}

        def run(count: int, seed: int) -> float:
            torch.manual_seed(seed)
            ids = torch.randint(model.config.vocab_size, (1, PROMPT), device=self.device)
            began, mask = time.perf_counter(), torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **how)
            out.tolist()
            return time.perf_counter() - began

        run(2, 0)
        firsts, wholes = (sorted(run(n, seed) for seed in range(args.repeats)) for n in (1, args.new_tokens))
        first, whole = (times[len(times) // 2] for times in (firsts, wholes))
        row: dict[str, Any] = {"rung": FIRST, "tok_s": (args.new_tokens - 1) / (whole - first)}
        row |= {"ttft_ms": 1e3 * first, "dtype": str(dtype).removeprefix("torch."), "kernels": "transformers"}
        size = machine.peak_bytes(self.device) if self.device.type == "cuda" else model.get_memory_footprint()
        return row | {"memory_gb": size / 1e9, "compiled": False, "tp": 1, "weights": row["dtype"]}


def held_bytes(engine: Engine) -> int:
    """Bytes: on a GPU the most that was allocated; elsewhere weights and caches, of a draft too."""
    if engine.cuda:
        return machine.peak_bytes(engine.device)
    draft = engine.speculation.draft if engine.speculation else None
    engines = [engine, draft] if isinstance(draft, Engine) else [engine]
    tensors = [t for e in engines for t in (*e.model.state_dict().values(), *(e.cache.buffers() if e.cache else ()))]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def climb(args: argparse.Namespace) -> dict[str, Any]:
    """All rungs: what ladder.json holds. ValueError when there is not one."""
    ladder, rows, skipped = Ladder(args), list[dict[str, Any]](), list[dict[str, str]]()
    steps = [(FIRST, ladder.transformers), *((rung.name, partial(ladder.climb, rung)) for rung in RUNGS)]
    for name, run in tqdm(steps, desc="climbing", unit="rung", disable=None):
        try:
            rows.append(dict.fromkeys(KEYS) | run())
        except FAULTS as error:  # the others are not lost for this one
            if ladder.group.size > 1 and not isinstance(error, ValueError):  # perhaps on one rank alone
                raise
            skipped.append({"rung": name, "reason": " ".join(str(error).split())[:200] or type(error).__name__})
        torch._dynamo.reset()
        gc.collect()
        if ladder.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if not rows:
        raise ValueError(f"not one rung can be climbed; {skipped[1]['rung']}: {skipped[1]['reason']}")
    sizes = {row["weights"]: row["bytes_per_token"] for row in rows if row["bytes_per_token"]}
    for row in rows:
        row["speedup"] = row["tok_s"] / rows[0]["tok_s"]
        if row["rung"] == FIRST and row["weights"] in sizes:  # what the next rung reads
            row["bytes_per_token"] = size = sizes[row["weights"]]
            row |= {"mbu": size * row["tok_s"] / ladder.bandwidth, "perplexity": ladder.losses.get(16)}
    return {
        "model": Path(args.checkpoint).name if args.checkpoint else args.shape,
        "device": benchmark.device_name(ladder.device),
        "ranks": ladder.group.size,
        "torch": torch.__version__,
        "commit": benchmark.commit_hash(),
        "bandwidth_gb_s": ladder.bandwidth / 1e9,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "heldout_tokens": None if args.shape else args.heldout_tokens,
        "simulated_acceptance": args.simulated_acceptance if args.shape else None,
        "roofline": {name: ladder.bandwidth / size for name, size in sizes.items()},
        "rungs": rows,
        "skipped": skipped,
    }


def table(found: dict[str, Any]) -> str:
    """What a terminal shows."""
    forms = {"tok_s": ",.1f", "speedup": ".2f", "ttft_ms": ".1f", "mbu": ".0%", "memory_gb": ".2f", "perplexity": ".3f"}
    device = plots.several(found["ranks"]) + found["device"]
    lines = [f"{found['model']} on {device}, {found['bandwidth_gb_s']:,.0f} GB/s"]
    lines.append(f"{HEADS[0]:22}" + "".join(f"{head:>12}" for head in HEADS[1:]))
    for row in found["rungs"]:
        shown = row | {"bytes_per_token": None}
        cells = ["-" if shown[key] is None else format(shown[key], forms[key]) for key in forms]
        cells.insert(3, f"{row['bytes_per_token'] / 1e6:,.1f}" if row["bytes_per_token"] else "-")
        lines.append(f"{row['rung']:22}" + "".join(f"{cell:>12}" for cell in cells))
    lines += [f"{row['rung']}: not here: {row['reason']}" for row in found["skipped"]]
    if found["simulated_acceptance"] is not None:
        lines.append(f"Random weights: speculation with a simulated acceptance of {found['simulated_acceptance']:g}.")
    return "\n".join(lines)


def write(found: dict[str, Any], folder: Path) -> None:
    """ladder.json, ladder.csv, and the picture where matplotlib is installed."""
    (folder / "ladder.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    setting = {key: found[key] for key in ("commit", "device", "torch", "model", "bandwidth_gb_s", "new_tokens")}
    with (folder / "ladder.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*setting, *KEYS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(setting | row for row in found["rungs"])
    try:
        plots.save(plots.ladder(found), folder, "ladder")
    except ValueError as error:
        print(f"no picture: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 bad input (one line), 130 interrupted."""
    ready()
    args = parse(argv)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        found = climb(args)
        if int(os.environ.get("RANK", "0")) == 0:
            print(table(found))
            write(found, args.output)
            print(f"written to {args.output}")
    except KeyboardInterrupt:
        return 130
    except FAULTS as error:
        return refuse("ladder.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
