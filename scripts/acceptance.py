"""How many proposals does a real model accept? A hundred prompts of three kinds, for each drafter.

    python scripts/acceptance.py CHECKPOINT                                    # all, ten minutes on two CPU cores
    python scripts/acceptance.py CHECKPOINT --drafts ngram --prompts 4

Chat: the questions of data/prompts.txt. Summaries: "Summarise this text" and the beginning of a paragraph group of
data/heldout.txt. Code: "Explain this function" and a function of this project. All go through the checkpoint's chat
template; answers are greedy. One row of benchmarks/acceptance.csv for each kind and drafter.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from command_line import Parser, at_least, begin

DRAFTS = ("ngram", "self-int8", "self-int4")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="acceptance.py", description="Acceptance of drafters on real prompts.", allow_abbrev=False)
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id, with a chat template")
    p.add_argument("--drafts", default=",".join(DRAFTS), metavar="D,D", help=f"of {', '.join(DRAFTS)} (all)")
    p.add_argument("--num-draft-tokens", type=at_least(1), default=3, metavar="K", help="proposals a round (3)")
    p.add_argument("--prompts", type=at_least(1), default=34, metavar="N", help="of each kind, at most (34, 33 and 33)")
    p.add_argument("--max-new-tokens", type=at_least(2), default=32, metavar="N", help="of an answer (32)")
    p.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: CUDA if there is one")
    p.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "acceptance.csv", help="rows go there")
    args = p.parse_args(argv)
    args.drafts = args.drafts.split(",")
    if unknown := sorted({*args.drafts} - {*DRAFTS}):
        p.error(f"--drafts {', '.join(unknown)}: drafters are {', '.join(DRAFTS)}")
    return args


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import benchmark
from tqdm import tqdm

import checkpoint
from engine import Engine
from sampling import SamplingParams
from tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0)


def summaries() -> list[str]:
    """A text of 700 to 1,400 characters from each tale and each half of it."""
    found = []
    for tale in (ROOT / "data" / "heldout.txt").read_text("utf-8").split("\n\n\n\n"):
        for start in (0, len(tale) // 2):
            text = tale[tale.find("\n\n", start) :].strip()
            text = text[: text.rfind(".", 700, 1400) + 1]
            if len(text) >= 700:
                found.append(f"Summarise this text in two sentences.\n\n{text}")
    return found


def functions() -> list[str]:
    """The project's functions of 6 to 25 lines, in order of file and line."""
    found = []
    for path in sorted(ROOT.glob("*.py")):
        source = path.read_text("utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and 6 <= (node.end_lineno or 0) - node.lineno < 25:
                text = ast.get_source_segment(source, node)
                found.append(f"Explain what this Python function does.\n\n```python\n{text}\n```")
    return found


def prompts(limit: int) -> dict[str, list[str]]:
    """At most `limit` prompts of each kind, and a hundred together."""
    chat = (ROOT / "data" / "prompts.txt").read_text("utf-8").splitlines()
    kinds = {"chat": chat[:34], "summary": summaries()[:33], "code": functions()[::2][:33]}
    return {kind: texts[:limit] for kind, texts in kinds.items()}


def rounds_of(engine: Engine, texts: Sequence[str], tokens: int) -> list[tuple[int, int]]:
    """(proposals, accepted ones) of every round of all answers."""
    assert isinstance(engine.tokenizer, Tokenizer) and engine.speculation is not None
    rounds = list[tuple[int, int]]()
    for text in tqdm(texts, leave=False, disable=None):
        prompt = engine.tokenizer.encode_chat([{"role": "user", "content": text}])
        for _ in engine.generate([prompt], GREEDY, max_new_tokens=tokens):
            pass
        rounds += [(K, emitted[0] - 1) for K, emitted in engine.speculation.book if K]
    return rounds


def copy_of(engine: Engine, draft: str) -> Engine | None:
    """What proposes: the model itself with rounded weights; None for lookups."""
    if draft == "ngram":
        return None
    return Engine(checkpoint.quantized_copy(engine.model, int(draft[-1])), engine.tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    engine = Engine.load(args.checkpoint, device=args.device, progress=sys.stderr.isatty())
    for draft in args.drafts:
        engine.speculate(copy_of(engine, draft), args.num_draft_tokens)
        for kind, texts in prompts(args.prompts).items():
            rounds = rounds_of(engine, texts, args.max_new_tokens)
            accepted = sum(n for _, n in rounds) / max(len(rounds), 1)
            row = {
                "commit": benchmark.commit_hash(),
                "device": benchmark.device_name(engine.device),
                "model": Path(args.checkpoint).name,
                "dtype": str(engine.dtype).removeprefix("torch."),
                "draft": draft,
                "kind": kind,
                "prompts": len(texts),
                "new_tokens": args.max_new_tokens,
                "num_draft_tokens": args.num_draft_tokens,
                "rounds": len(rounds),
                "mean_accepted": f"{accepted:.3f}",
            }
            benchmark.append_csv(args.csv, [row])
            print(
                f"{draft:10} {kind:8} {accepted:.3f} of {args.num_draft_tokens} proposals accepted a round", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
