"""Perplexity of checkpoints on a text, how far one is from another, tasks of lm-evaluation-harness, and the table that
compares this project's quantization with llm-compressor's.

    python scripts/evaluate.py [DIR_OR_HUB_ID ...] [--text FILE] [--stride N]
    python scripts/evaluate.py QUANTIZED --against ORIGINAL
    python scripts/evaluate.py DIR_OR_HUB_ID --tasks hellaswag,arc_easy
    python scripts/evaluate.py --table benchmarks/quantization.csv --environment FOLDER

Prints a table and, last, one JSON line. Knows texts, windows over them and what to count. Refuses to know tasks: those
are the harness's, to which `harness.py` shows an engine. The last command quantizes the embedded model in every way,
here and by llm-compressor, with the same calibration rows; it makes llm-compressor's virtual environment in FOLDER (it
pins an older transformers) unless it is there.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from command_line import DTYPES as DTYPE_NAMES
from command_line import FAULTS, Parser, at_least, begin, ready, refuse


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="evaluate.py", description="Perplexity of checkpoints.", allow_abbrev=False)
    p.add_argument(
        "checkpoints",
        nargs="*",
        default=[str(ROOT / "checkpoints" / "tales")],
        metavar="CHECKPOINT",
        help="folders or Hub ids (default: the embedded model)",
    )
    p.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: data/heldout.txt)")
    p.add_argument("--tokens", type=at_least(2), metavar="N", help="the first N tokens of it (default: all)")
    p.add_argument(
        "--row-length", type=at_least(16), default=2048, help="tokens in a window, at most the model's context (2048)"
    )
    p.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="from one window to the next; a smaller one gives every token more context and takes longer "
        "(default: the window, so that none overlap)",
    )
    p.add_argument(
        "--against", metavar="CHECKPOINT", help="also KL divergence and first choices, compared with this one"
    )
    p.add_argument("--tasks", metavar="NAME,...", help="tasks of lm-evaluation-harness (needs the extra [evaluate])")
    p.add_argument("--task-folder", metavar="DIR", help="where --tasks looks for more of them, as YAML files")
    p.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: CUDA if there is one")
    p.add_argument("--dtype", choices=DTYPE_NAMES, default="auto", help="auto: as generate.py's")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    p.add_argument("--table", type=Path, metavar="CSV", help="compare ways to quantize the first checkpoint")
    p.add_argument("--environment", type=Path, default=Path("llm-compressor"), help="its virtual environment")
    p.add_argument("--rows", type=at_least(1), default=128, help="calibration rows of the table")
    args = p.parse_args(argv)
    if args.stride and args.stride >= args.row_length:
        p.error(f"--stride {args.stride} leaves out text between windows of --row-length {args.row_length}")
    if args.task_folder and not args.tasks:
        p.error("--task-folder goes with --tasks")
    if args.tasks is not None and not all(args.tasks.split(",")):
        p.error(f"--tasks {args.tasks!r} has an empty name; give names with commas between them")
    if args.table and (args.tasks or args.against):
        p.error("--table goes with neither --tasks nor --against")
    return args


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import quantize
from architectures import config_from_hf
from checkpoint import read_config
from compilation import CompiledModules
from engine import Engine, pick_device
from input_folder import text_of
from model import KVCache
from tokenizer import Tokenizer, draft_mismatch

HELDOUT = ROOT / "data" / "heldout.txt"
PACKAGES = ("torch==2.13.0", "llmcompressor==0.14.0.1")
WORST = 10  # positions that --against prints
COLUMNS = (  # of the table: what it is called in JSON and there, and how it is written
    ("perplexity", "perplexity", ".4f"),
    ("bits_per_byte", "bits/byte", ".4f"),
    ("tokens", "tokens", ""),
    ("perplexity_against", "against", ".4f"),
    ("kl_mean", "KL mean", ".5f"),
    ("kl_p99", "KL 99%", ".4f"),
    ("top1_agreement", "same first", ".2%"),
)
CHUNK = 512  # tokens whose logits exist at a time: with a vocabulary of 150,000 each takes 600 KB


class Scorer:
    """An engine and logits of whole rows from it; its cache is its own, so that the engine may generate in between."""

    def __init__(self, name: str, engine: Engine, compile: bool | None = None) -> None:
        """compile: a layer, used for all; None compiles on a GPU."""
        self.name, self.engine, experts = name, engine, any(engine.model.config.sparse)
        if compile and experts:
            raise ValueError("--compile: the experts of a mixture are chosen by the host here; leave the flag out")
        self.compiled = bool(engine.cuda if compile is None else compile) and not experts
        layers = engine.model.layers if self.compiled else ()
        self.run = CompiledModules(layers, "score", guards=True, dynamic=True)
        self.cache: KVCache | None = None

    @classmethod
    def load(cls, name: str, args: argparse.Namespace) -> "Scorer":
        engine = Engine.load(name, device=args.device, dtype=args.dtype, progress=sys.stderr.isatty())
        return cls(name, engine, args.compile)

    @property
    def tokenizer(self) -> Tokenizer:
        assert isinstance(self.engine.tokenizer, Tokenizer)
        return self.engine.tokenizer

    def logits(self, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(a, float32 [B, t, V]) for tokens int64 [B, T]: the logits behind columns a..a + t - 1, chunk by chunk, for
        all columns but the last.
        """
        engine, (B, T) = self.engine, tokens.shape
        if self.cache is None or self.cache.batch_size != B or self.cache.max_seq_len < T:
            self.cache = None  # free the old one first
            self.cache = KVCache(engine.model.config, B, T, engine.device, engine.dtype, engine.model.tp)
        tokens, chunk = tokens.to(engine.device), max(CHUNK // B, 1)
        for a in range(0, T - 1, chunk):
            b = min(a + chunk, T - 1)
            positions = torch.arange(a, b, device=engine.device).repeat(B, 1)
            yield a, engine.model(tokens[:, a:b].clone(), positions, self.cache, self.run, end=b).float()


def windows(ids: list[int], bos: list[int], length: int, stride: int) -> tuple[Tensor, Tensor]:
    """Rows of at most `length` tokens that cover a text: BOS and then ids, `stride` further on in every row; int64
    [N, L] twice.

    The second says which id of the text each token is where it is to be scored, and -1 elsewhere: for BOS, for
    padding, and for ids that an earlier row has scored. Without BOS the first id of a text has nothing before it.
    Nine ids without BOS, length 6, stride 3: ids 0..5 score 1..5, ids 3..8 score 6..8.
    """
    room = min(length - len(bos), len(ids))
    tokens, index, done = [], [], 0
    for start in range(0, len(ids), stride):
        end = min(start + room, len(ids))
        first, pad = max(done, start if bos else start + 1), [-1] * (start + room - end)
        tokens.append([*bos, *ids[start:end], *(0 for _ in pad)])
        index.append([-1] * (len(bos) + first - start) + [*range(first, end), *pad])
        done = end
        if end == len(ids):
            break
    return torch.tensor(tokens), torch.tensor(index)


@dataclass(frozen=True)
class Text:
    """A text as one model reads it: its ids, the bytes of those that are scored, and `windows` over them."""

    ids: list[int]
    size: int
    stride: int
    tokens: Tensor
    index: Tensor


def read_text(scorer: Scorer, args: argparse.Namespace) -> Text:
    """The text as this model reads it. ValueError for a file that cannot be used, and for such a stride."""
    file, tokenizer, context = args.text or HELDOUT, scorer.tokenizer, scorer.engine.context
    text = text_of(file)
    bos, all_ids = tokenizer.encode("")[:1], tokenizer.encode(text, bos=False)
    ids = all_ids[: args.tokens]
    if len(ids) + len(bos) < 2:
        raise ValueError(f"{file} gives {len(ids)} tokens, too few to predict one from another; use a longer text")
    length = min(args.row_length, context)
    stride = args.stride or length - len(bos)
    if stride > length - len(bos):
        raise ValueError(
            f"--stride {stride} leaves out text between windows of {length} tokens (the model's context is "
            f"{context}, BOS takes {len(bos)}); use --stride {length - len(bos)} or less"
        )
    tokens, index = windows(scorer.engine.encode([ids])[0], bos, length, stride)
    left_out = set(range(len(all_ids))).difference(index.flatten().tolist())
    size = len(text.encode()) - sum(len(tokenizer.piece(all_ids[i])) for i in left_out)
    return Text(ids, size, stride, tokens, index)


@torch.inference_mode()
def measure(scorer: Scorer, args: argparse.Namespace, other: Scorer | None = None) -> dict[str, Any]:
    """Perplexity per token and bits per byte of the text; with another checkpoint its perplexity too, and how far this
    one is from it. ValueError where the logits are not finite.
    """
    began, text, columns = time.perf_counter(), read_text(scorer, args), []
    with tqdm(total=int((text.index >= 0).sum()), desc=scorer.name, unit="token", disable=None) as bar:
        rows = max(1, 2 * CHUNK // text.tokens.shape[1])
        for tokens, index in zip(text.tokens.split(rows), text.index.split(rows)):
            others = other.logits(tokens) if other else itertools.repeat((0, None))
            for (a, logits), (_, reference) in zip(scorer.logits(tokens), others):
                span = slice(a + 1, a + 1 + logits.shape[1])  # the ids that these logits are to predict
                mask = index[:, span] >= 0
                token, after = tokens[:, span][mask].to(logits.device), logits[mask]
                before = after if reference is None else reference[mask]
                found = quantize.compare(token, before, after).double().cpu()
                choices = torch.stack((before.argmax(-1), after.argmax(-1))).cpu()
                columns.append(torch.cat((found, choices, index[:, span][mask][None])))
                bar.update(len(token))
    table = torch.cat(columns, 1)
    loss_before, loss, kl, same = table[:4].mean(1).tolist()
    for name, value in ((scorer.name, loss), (other.name if other else "", loss_before)):
        if not value < 700:  # NaN too
            raise ValueError(f"{name}: the loss is {value:g}: the checkpoint is damaged, or --dtype too narrow")
    bits = float(table[1].sum()) / math.log(2)
    record: dict[str, Any] = {"perplexity": math.exp(loss), "bits_per_byte": bits / text.size}
    record |= {"tokens": table.shape[1], "bytes": text.size, "window": text.tokens.shape[1], "stride": text.stride}
    record["compiled"] = scorer.compiled
    if other:
        record |= {"against": other.name, "perplexity_against": math.exp(loss_before), "kl_mean": kl}
        record |= {"kl_p99": float(table[2].quantile(0.99)), "top1_agreement": same}
        record["worst"] = worst(scorer.tokenizer, text.ids, table)
    return record | {"seconds": time.perf_counter() - began}


def worst(tokenizer: Tokenizer, ids: list[int], table: Tensor) -> list[dict[str, Any]]:
    """The positions where the two differ most: what stands before them, what follows, and both first choices."""
    found = []
    for column in table[:, table[2].argsort(descending=True, stable=True)[:WORST]].t().tolist():
        kl, (choice_before, choice, position) = column[2], map(int, column[4:])
        before = tokenizer.decode(ids[max(0, position - 12) : position])[-30:]
        names = zip(("token", "choice_against", "choice"), (ids[position], choice_before, choice))
        words = {name: tokenizer.piece(i).decode(errors="replace") for name, i in names}
        found.append({"position": position, "kl": kl, "before": before} | words)
    return found


def check_vocabularies(scorer: Scorer, other: Scorer) -> None:
    """ValueError unless every id means the same to both."""
    sizes = scorer.engine.vocab_size, other.engine.vocab_size
    differs = draft_mismatch(other.tokenizer, scorer.tokenizer, min(sizes))
    if differs or sizes[0] != sizes[1]:
        reason = differs.replace("draft", "first").replace("target", "second") or f"{sizes[0]} and {sizes[1]} ids"
        raise ValueError(f"{scorer.name} and {other.name} cannot be compared, their vocabularies differ: {reason}")


def report(records: list[dict[str, Any]]) -> None:
    """A table of all checkpoints, the worst positions of each, and one JSON line: the first checkpoint's numbers, and
    those of all, if there are several, under "checkpoints".
    """
    names = [f"{r['checkpoint']} ({r['dtype']})" for r in records]
    columns = [c for c in COLUMNS if c[0] in records[0]]
    width = max(map(len, names))
    if columns:
        print(" " * width + "".join(f"{head:>14}" for _, head, _ in columns))
    for name, r in zip(names, records) if columns else ():
        print(f"{name:{width}}" + "".join(f"{r[key]:>14{form}}" for key, _, form in columns))
    for r in records:
        for task, metrics in r.get("tasks", {}).items():
            print(f"{r['checkpoint']}: {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        if "worst" in r:
            print(f"\nwhere {r['checkpoint']} is furthest from {r['against']}, and what each would say first:")
            print(f"{'position':>9}{'KL':>9}  {'before':34}{'text':>16}{'against':>16}{'checkpoint':>16}")
        for w in r.get("worst", []):
            words = "".join(f"{w[key]!r:>16}" for key in ("token", "choice_against", "choice"))
            print(f"{w['position']:9}{w['kl']:9.4f}  {w['before']!r:34}{words}")
    print(json.dumps(records[0] | ({"checkpoints": records} if len(records) > 1 else {})))


def run_tasks(scorer: Scorer, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What lm-evaluation-harness finds: numbers by task and metric."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != here] + [here]  # the harness imports a package `evaluate` too
    return importlib.import_module("harness").run(scorer, args.tasks.split(","), args.task_folder)


def evaluate(args: argparse.Namespace) -> None:
    """Measure everything that was asked for, one checkpoint after the other."""
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError('--tasks needs lm-evaluation-harness: pip install -e ".[evaluate]"')
    records, rank = [], 0
    other = Scorer.load(args.against, args) if args.against else None
    for name in args.checkpoints:
        scorer = Scorer.load(name, args)
        if other:
            check_vocabularies(scorer, other)
        record = {"checkpoint": name, "dtype": str(scorer.engine.dtype).removeprefix("torch.")}
        if other or args.text or not args.tasks:
            record |= measure(scorer, args, other)
        if args.tasks:
            record["tasks"] = run_tasks(scorer, args)
        records.append(record)
        rank = scorer.engine.model.tp.rank
    if rank == 0:
        report(records)


# -- the comparison of quantizations ----------------


def ways() -> list[dict[str, Any]]:
    """Every row of the table but the first: tool, mode, group size, act-order, clip search."""
    rows: list[dict[str, Any]] = [{"tool": "ours", "mode": mode, "group_size": -1} for mode in ("int8", "int8-gptq")]
    rows += [{"tool": "ours", "mode": mode, "group_size": size} for mode, size in (("int8", 32), ("int4", 128))]
    for act_order in (False, True):
        base = {"mode": "int4-gptq", "group_size": 128, "act_order": act_order}
        rows.append({"tool": "llm-compressor"} | base)
        rows += [{"tool": "ours", "clip_search": clip_search} | base for clip_search in (False, True)]
    return rows


def environment(folder: Path) -> Path:
    """The interpreter of llm-compressor's virtual environment; made on the first use."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in PACKAGES:
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
    return python


def table(args: argparse.Namespace) -> None:
    """Write the CSV row by row, so that an interrupted run leaves what it measured."""
    source, python = args.checkpoints[0], environment(args.environment)
    folder = Path(source)
    config = config_from_hf(read_config(folder))
    length = min(args.row_length, config.max_position_embeddings)
    calibration = ROOT / "data" / "calibration.txt"
    ids = quantize.text_rows(calibration, Tokenizer.from_folder(folder), config, args.rows, length)
    names = ["tool", "mode", "group_size", "act_order", "clip_search", "perplexity", "loss_percent"]
    names += ["kl_mean", "kl_p99", "top1_agreement", "tokens", "calibration_tokens"]
    plain = Scorer(source, Engine.load(source, device=args.device, dtype="float32"), False)
    with tempfile.TemporaryDirectory() as work, open(args.table, "w", newline="") as file:
        save_file({"rows": ids}, f"{work}/rows.safetensors")
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        found = measure(plain, args)
        row = {"tool": "none", "mode": "unquantized", "loss_percent": "0.000", "tokens": found["tokens"]}
        writer.writerow(row | {"perplexity": f"{found['perplexity']:.4f}"})
        for i, way in enumerate(ways()):
            output = Path(work) / str(i)
            if way["tool"] == "ours":
                settings = quantize.Settings(**{k: v for k, v in way.items() if k != "tool"})
                how = (calibration, args.rows, length), (HELDOUT, 0), pick_device(args.device)
                quantize.quantize(source, output, settings, *how)
            else:
                worker = [str(output), f"{work}/rows.safetensors", str(way["group_size"]), str(int(way["act_order"]))]
                subprocess.run([str(python), str(ROOT / "scripts" / "llm_compressor.py"), source, *worker], check=True)
                for name in folder.glob("token*"):
                    shutil.copy(name, output)
            engine = Engine.load(output, device=args.device, dtype="float32")
            found = measure(Scorer(str(output), engine, False), args, plain)
            loss = 100 * (found["perplexity"] / found["perplexity_against"] - 1)
            row = way | {"perplexity": f"{found['perplexity']:.4f}", "loss_percent": f"{loss:.3f}"}
            row |= {"kl_mean": f"{found['kl_mean']:.5f}", "kl_p99": f"{found['kl_p99']:.4f}"}
            row |= {"top1_agreement": f"{found['top1_agreement']:.4f}", "tokens": found["tokens"]}
            writer.writerow(row | {"calibration_tokens": ids.numel() * way["mode"].endswith("-gptq") or ""})
            file.flush()
            print(row, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    ready()
    args = parse(argv)
    try:
        (table if args.table else evaluate)(args)
    except KeyboardInterrupt:
        return 130
    except FAULTS as error:
        return refuse("evaluate.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
