"""Does this machine compute the right thing? One line per check; exit status 1 when one fails, 2 for bad input.

    python generate.py --selftest [--checkpoint DIR_OR_HUB_ID] [--device ...] [--dtype ...] [--compile] ...

Takes generate.py's arguments and checks the engine that they describe against the same checkpoint in float32 and plain
PyTorch, kernel by kernel and as a whole. Refuses to know expected numbers, but for `golden.json` beside the weights: an
answer that was recorded elsewhere, as

    python generate.py --checkpoint DIR --device cpu --temperature 0 --prompt TEXT --json > DIR/golden.json
"""

import argparse
import contextlib
import itertools
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules are used from the checkout, not installed

from command_line import FAULTS, begin, ready, refuse
from generate import parse

if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import torch

import checkpoint
from engine import Engine, decode_kernels
from linear import Linear
from sampling import SamplingParams

GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_k=50)
Check = tuple[str, float, float]  # what, its error, the largest error that passes


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, which is NaN where a or b holds one."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def ids_of(engine: Engine, prompt: list[int], sampling: SamplingParams, count: int, seed: int = 0) -> list[int]:
    pieces = engine.generate([prompt], sampling, max_new_tokens=count, ignore_eos=True, seed=seed)
    return list(itertools.chain.from_iterable(piece.ids for piece in pieces))


def versions(engine: Engine) -> str:
    gpu = engine.device.type == "cuda"
    device = torch.cuda.get_device_name(engine.device) if gpu else f"cpu, {torch.get_num_threads()} threads"
    triton = "absent"
    with contextlib.suppress(ImportError):
        import triton as package

        triton = package.__version__
    return (
        f"     python {platform.python_version()}, torch {torch.__version__}, triton {triton}, {device}, "
        f"{str(engine.dtype).removeprefix('torch.')}, kernels {'triton' if engine.use_kernels else 'plain PyTorch'}"
        f"{' and fast CPU operators' if engine.cpu_operators else ''}, {'compiled' if engine.compile else 'eager'}"
    )


def against_float32(engine: Engine, twin: Engine, prompt: list[int]) -> Iterator[Check]:
    """Prefill, a cached step, decoding and scoring: `engine` against its float32 twin."""
    exact = engine.dtype == torch.float32
    limit, count = 1e-4 if exact else 5e-2, 32
    for e in (engine, twin):
        e.reserve(1, len(prompt) + count)
    yield "prefill logits", relative(engine.prefill([prompt]), twin.prefill([prompt])), limit
    for new in (1, 9):
        logits = (e.prefill([prompt], len(prompt) - new) for e in (engine, twin))
        yield f"logits of {new} rows behind a cached prefix", relative(*logits), limit
    ids = ids_of(engine, prompt, GREEDY, count)
    tokens = torch.tensor([[*prompt, *ids]])
    positions = torch.arange(tokens.shape[1] - 1, device=twin.device)[None]
    twin.reserve(1, tokens.shape[1])
    assert twin.cache is not None
    logits = twin.model(tokens[:, :-1].to(twin.device), positions, twin.cache, end=positions.shape[1])
    logits = logits[0, len(prompt) - 1 :]
    chosen = logits.gather(-1, torch.tensor(ids, device=twin.device)[:, None])[:, 0]
    yield "greedy tokens below float32's best logit", float(((logits.amax(-1) - chosen) / logits.std(-1)).max()), limit
    yield "log-probabilities of a text", relative(engine.score(tokens), twin.score(tokens)), limit
    again = []
    for _ in range(2):
        engine.prefill([prompt])  # forgets the prefix of the run before, whose logits round differently
        again.append(ids_of(engine, prompt, SAMPLED, count, seed=7))
    yield "sampled tokens that a second run changes", sum(a != b for a, b in zip(*again)), 0


def against_twins(engine: Engine, prompt: list[int]) -> Iterator[Check]:
    """Each kernel, or fast CPU operator, of the first layer and of the head, and a whole step, against plain PyTorch on
    the same weights.
    """
    limit = 1e-4 if engine.dtype == torch.float32 else 2e-2
    for name, module in engine.model.named_modules():
        if not isinstance(module, Linear) or not name.startswith(("lm_head", "layers.0.")):
            continue
        for rows in (1, 5):
            x = torch.randn(rows, module.in_features, device=engine.device, dtype=engine.dtype)
            experts = torch.arange(rows, device=engine.device) % module.num_experts if module.num_experts else None
            y = []
            for on in (True, False):
                decode_kernels.use_(engine.model, on, engine.compile)
                y.append(module(x, experts=experts))
            decode_kernels.use_(engine.model, True, engine.compile)
            what = type(module.fast).__name__.lower() if module.fast else "plain"
            yield f"kernel ({what}) of {name}, {rows} rows", relative(*y), limit
    for new in (1, 9):
        logits = []
        for on in (True, False):
            decode_kernels.use_(engine.model, on, engine.compile)
            engine.prefill([prompt])
            logits.append(engine.prefill([prompt], len(prompt) - new))
        yield f"all kernels together, {new} rows", relative(*logits), limit
    decode_kernels.use_(engine.model, True, engine.compile)


def against_golden(twin: Engine, folder: Path) -> Iterator[Check]:
    golden = checkpoint.read_json(folder / "golden.json")
    if golden:
        ids = ids_of(twin, golden["prompt_ids"], GREEDY, len(golden["ids"]))
        yield "golden tokens that differ", sum(a != b for a, b in zip(ids, golden["ids"])), 0


def selftest(args: argparse.Namespace) -> bool:
    """Print a line per check as it ends. True if all hold."""
    if args.shape:
        raise ValueError("--selftest compares a checkpoint with itself in float32; --shape has none")
    engine = Engine.load(
        args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        kernels=args.kernels,
        compile=args.compile,
        compile_prefill=args.compile_prefill,
        prefill_chunk=args.prefill_chunk,
    )
    plain = {"device": engine.device.type, "dtype": "float32", "kernels": "inductor", "compile": False}
    twin = Engine.load(args.checkpoint, **plain)
    vocab, room = engine.model.config.vocab_size, engine.max_seq_len - 32
    prompt = torch.randint(vocab, (min(100, room),), generator=torch.Generator().manual_seed(0)).tolist()
    speaks, ok = engine.model.tp.rank == 0, True
    if speaks:
        print(versions(engine), flush=True)
    checks = [against_float32(engine, twin, prompt)]
    checks += [against_twins(engine, prompt)] if engine.use_kernels or engine.cpu_operators else []
    checks += [against_golden(twin, checkpoint.resolve(args.checkpoint))]
    for what, error, limit in itertools.chain.from_iterable(checks):
        ok &= error <= limit  # NaN fails
        if speaks:
            print(f"{'ok  ' if error <= limit else 'FAIL'} {what}: {error:.2g} (at most {limit:.2g})", flush=True)
    return ok


def main(argv: Sequence[str] | None = None) -> int:
    ready()
    args = parse(argv)
    try:
        return 0 if selftest(args) else 1
    except KeyboardInterrupt:
        return 130
    except FAULTS as error:
        return refuse("generate.py", error)


if __name__ == "__main__":
    sys.exit(main())
