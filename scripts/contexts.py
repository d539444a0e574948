"""Milliseconds of a decode step at several positions of one long cache.

    python scripts/contexts.py --shape llama-3.1-8b --mode int4 --positions 5,8192,131000
    python scripts/contexts.py --shape llama-3.1-8b --positions 2048,8192 --transformers

Knows positions, random weights and a random cache, which no prompt had to fill. Refuses to know whole generations,
which `benchmark.py` times: here the captured step is replayed, sampling included, and the host has no part. Appends a
row for every position to `benchmarks/contexts.csv`. With --transformers its compiled step with a static cache of just
as many slots as the position needs is timed beside it, at every position, in bfloat16.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from command_line import FAULTS, Parser, at_least, begin, refuse

MODES = ("bf16", "int8", "int4")
STEPS = 32  # that are timed at a position, one after the other


def positions(text: str) -> list[int]:
    """An argparse type: 5,2048 -> [5, 2048]."""
    return [at_least(1)(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="contexts.py", description="A decode step at several positions.", allow_abbrev=False)
    p.add_argument("--shape", required=True, help="a named shape with random weights")
    p.add_argument("--mode", choices=MODES, default="bf16", help="weights (bf16)")
    p.add_argument(
        "--positions", type=positions, default=[5, 2048, 8192, 16384, 32000], metavar="P,P", help="(5 to 32000)"
    )
    p.add_argument("--repeats", type=at_least(1), default=4, help=f"of {STEPS} steps, whose median counts (4)")
    p.add_argument("--transformers", action="store_true", help="time transformers' steps beside")
    p.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: CUDA if there is one")
    p.add_argument("--csv", metavar="FILE", default=str(ROOT / "benchmarks" / "contexts.csv"), help="rows go there")
    p.add_argument("--no-csv", action="store_true", help="append no rows")
    p.add_argument("--commit", metavar="HASH", help="what to record where there is no git repository")
    return p.parse_args(argv)


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import benchmark
import torch

import machine
import shapes
from engine import Engine, pick_device
from sampling import SamplingParams

SAMPLING = SamplingParams(temperature=0.8, top_k=200)


def ours(engine: Engine, position: int, repeats: int) -> float:
    """Seconds of a step from `position` on."""
    state, run = engine.state, engine.decode(position + STEPS, SAMPLING.structure)
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        state.position.fill_(position)
        state.step.zero_()
        times.append(benchmark.seconds(run, engine.device, STEPS))
    return statistics.median(times[1:])


def transformers_step(shape: str, device: torch.device) -> Callable[[int, int], float]:
    """The same of transformers: compiled with CUDA graphs as its documentation has it, greedy, the host included."""
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    config = AutoConfig.for_model(**shapes.shape_json(shape))
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def step(position: int, repeats: int) -> float:
        slots = position + (repeats + 2) * STEPS
        cache, token = (
            StaticCache(config=config, max_cache_len=slots),
            torch.ones((1, 1), dtype=torch.int64, device=device),
        )
        model(token.expand(1, position), past_key_values=cache, logits_to_keep=1)
        torch._dynamo.reset()
        forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

        def run() -> None:
            token.copy_(forward(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))

        times = [benchmark.seconds(run, device, STEPS) for _ in range(repeats + 1)]
        return statistics.median(times[1:])

    return step


def measure(args: argparse.Namespace) -> None:
    """A row for every position, on the screen and in the CSV."""
    shapes.shape_json(args.shape)  # an unknown shape is refused before the work
    device = pick_device(args.device)
    torch.manual_seed(0)
    wanted = vars(args) | {"checkpoint": None, "dtype": "auto", "kernels": "auto", "compile": None}
    wanted["group_size"] = 128 if args.mode == "int4" else None  # of int8 a row has a scale
    engine = benchmark.build(argparse.Namespace(**wanted, compile_prefill=False), device)
    engine.reserve(1, max(args.positions) + STEPS)
    assert engine.cache is not None
    for layer in engine.cache.layers:
        layer.k.normal_(), layer.v.normal_()
    engine.state.knobs.copy_(SAMPLING.knobs(device))
    other = transformers_step(args.shape, device) if args.transformers else None
    bandwidth = benchmark.KNOWN_READ.get(benchmark.device_name(device)) or benchmark.read_bandwidth(device)
    setting = benchmark.describe(engine, argparse.Namespace(**wanted))
    rows = []
    for position in args.positions:
        s = ours(engine, position, args.repeats)
        read = machine.bytes_per_step(engine.model, 1, position + STEPS // 2)
        row = {"position": position, "cache_len": engine.state.out.shape[1], "ms": 1e3 * s, "tok_s": 1 / s}
        row |= {"bytes_per_token": read, "mbu": read / s / bandwidth}
        row["transformers_ms"] = 1e3 * other(position, args.repeats) if other else None
        rows.append(setting | row)
        print(" ".join(f"{name} {value:.4g}" for name, value in row.items() if value is not None), flush=True)
    if not args.no_csv:
        benchmark.append_csv(Path(args.csv), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 after one line on standard error for bad input."""
    args = parse(argv)
    try:
        measure(args)
    except KeyboardInterrupt:
        return 130
    except (*FAULTS, ImportError) as error:
        return refuse("contexts.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
