"""Golden ids of the embedded pair, in every mode: does a change of the source change a single token?

    python scripts/golden.py                  # compare every mode with what is recorded
    python scripts/golden.py plain ngram      # only these
    python scripts/golden.py --write          # record anew

Everything runs on the CPU in float32, where the recorded ids lead by more than rounding, so that any machine repeats
them. Every mode answers one prompt twice: greedily, and by draws whose noise is a function of seed and position alone.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from command_line import Parser, begin

RANKS = "two ranks"  # the mode that needs processes
DRAFTERS = ("ngram", "draft model", "self-int8", "self-int4")
NAMES = ("plain", "compiled", "int8", "int4", *DRAFTERS, RANKS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="golden.py", description="Golden ids of the embedded pair.", allow_abbrev=False)
    p.add_argument("modes", nargs="*", metavar="MODE", help=f"of {', '.join(NAMES)}; none: all")
    p.add_argument("--write", action="store_true", help="record instead of comparing")
    p.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)  # one process of the mode `two ranks`
    args = p.parse_args(argv)
    if unknown := sorted({*args.modes} - {*NAMES}):
        p.error(f"{', '.join(unknown)}: modes are {', '.join(NAMES)}")
    return args


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import checkpoint
from engine import DEFAULT_CHECKPOINT, Engine
from sampling import SamplingParams

RECORD = ROOT / "tests" / "golden.json"
PROMPT, TOKENS, SEED = "Once upon a time", 64, 7
Answers = dict[str, list[int]]  # ids, by how they are chosen
WAYS = {"greedy": SamplingParams(temperature=0.0), "sampled": SamplingParams(temperature=0.8, top_k=200)}


def load(**options: Any) -> Engine:  # noqa: ANN401
    return Engine.load(device="cpu", dtype="float32", **options)


def rounded(bits: int) -> Engine:
    """The embedded model with its Linears rounded to nearest."""
    plain = load()
    return Engine(checkpoint.quantized_copy(plain.model, bits), plain.tokenizer, compile=False)


MODES: dict[str, Callable[[], Engine]] = {
    "plain": load,
    "compiled": lambda: load(compile=True),
    "int8": lambda: rounded(8),
    "int4": lambda: rounded(4),
    # as many drafts in every round: which number pays depends on the machine, and draws depend on it
    "ngram": lambda: load(draft="ngram", num_draft_tokens=3),
    "draft model": lambda: load(draft=f"{DEFAULT_CHECKPOINT}-draft", num_draft_tokens=3),
    "self-int8": lambda: load(draft="self-int8", num_draft_tokens=3),
    "self-int4": lambda: load(draft="self-int4", num_draft_tokens=3),
}


def answers(engine: Engine) -> Answers:
    """What the engine says to the prompt, each way."""
    out: Answers = {}
    for way, sampling in WAYS.items():
        pieces = engine.generate([PROMPT], sampling, max_new_tokens=TOKENS, ignore_eos=True, seed=SEED)
        out[way] = [i for piece in pieces for i in piece.ids]
    return out


def golden(mode: str) -> Answers:
    """The answers of one mode. CalledProcessError where a rank fails."""
    if mode != RANKS:
        return answers(MODES[mode]())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, __file__, "--rank"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where ids differ from the record, 2 bad input."""
    args = parse(argv)
    if args.rank:
        engine = load()
        found = answers(engine)
        if engine.model.tp.rank == 0:
            print(json.dumps(found))
        return 0
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    wrong = 0
    for mode in args.modes or NAMES:
        found = golden(mode)
        if args.write:
            record[mode] = found
        for way, ids in found.items():
            differing = sum(a != b for a, b in zip(ids, record.get(mode, {}).get(way, [-1] * TOKENS)))
            wrong += differing
            print(f"{mode}, {way}: {differing} of {len(ids)} ids differ", flush=True)
    if args.write:
        RECORD.write_text("{\n" + ",\n".join(f'"{mode}": {json.dumps(ids)}' for mode, ids in record.items()) + "\n}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
