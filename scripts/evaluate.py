"""Perplexity of checkpoints on a text, and the table that compares this project's quantization with llm-compressor's.

    python scripts/evaluate.py checkpoints/tales DIR_OR_HUB_ID ... [--text FILE]
    python scripts/evaluate.py --table benchmarks/quantization.csv --environment FOLDER

The second command quantizes the embedded model in every way, here and by llm-compressor, with the same calibration
rows; it makes llm-compressor's virtual environment in FOLDER (it pins an older transformers) unless it is there.
All perplexities are computed here, in float32 on the dequantized weights, with `Engine.score`.
"""

import argparse
import csv
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from generate import Parser, at_least, begin, ready


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="evaluate.py", description="Perplexity of checkpoints.", allow_abbrev=False)
    p.add_argument("checkpoints", nargs="*", default=[str(ROOT / "checkpoints" / "tales")], help="folders or Hub ids")
    p.add_argument("--text", type=Path, default=ROOT / "data" / "heldout.txt", metavar="FILE")
    p.add_argument("--row-length", type=at_least(16), default=2048, help="tokens in a row, at most the model's context")
    p.add_argument("--device", choices=("cpu", "cuda", "mps"))
    p.add_argument("--table", type=Path, metavar="CSV", help="compare ways to quantize the first checkpoint")
    p.add_argument("--environment", type=Path, default=Path("llm-compressor"), help="its virtual environment")
    p.add_argument("--rows", type=at_least(1), default=128, help="calibration rows of the table")
    return p.parse_args(argv)


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import torch
from safetensors.torch import save_file

import quantize
from architectures import config_from_hf
from checkpoint import read_config
from engine import Engine, pick_device
from tokenizer import Tokenizer

PACKAGES = ("torch==2.13.0", "llmcompressor==0.14.0.1")


def perplexity(checkpoint: str, text: Path, length: int, device: str | None) -> tuple[float, int]:
    """exp of the mean loss, and over how many tokens: rows of `length`, each after BOS, cover the whole text."""
    engine = Engine.load(checkpoint, device=device, dtype="float32", compile=False)
    length = min(length, engine.model.config.max_position_embeddings)
    assert isinstance(engine.tokenizer, Tokenizer)
    rows = quantize.text_rows(text, engine.tokenizer, engine.model.config, 1 << 30, length)
    scores = torch.cat([engine.score(row) for row in rows.split(8)])
    return math.exp(-float(scores.double().mean())), scores.numel()


def ways() -> list[dict[str, Any]]:
    """Every row of the table: tool, mode, group size, act-order, clip search."""
    rows: list[dict[str, Any]] = [{"tool": "none", "mode": "unquantized"}]
    rows += [{"tool": "ours", "mode": "int8", "group_size": -1}, {"tool": "ours", "mode": "int4", "group_size": 128}]
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
    names = ["tool", "mode", "group_size", "act_order", "clip_search", "perplexity", "loss_percent", "tokens"]
    base = 0.0
    with tempfile.TemporaryDirectory() as work, open(args.table, "w", newline="") as file:
        save_file({"rows": ids}, f"{work}/rows.safetensors")
        writer = csv.DictWriter(file, [*names, "calibration_tokens"], restval="")
        writer.writeheader()
        for i, way in enumerate(ways()):
            output = Path(work) / str(i)
            if way["tool"] == "none":
                output = folder
            elif way["tool"] == "ours":
                settings = quantize.Settings(**{k: v for k, v in way.items() if k != "tool"})
                how = (calibration, args.rows, length), (args.text, 0), pick_device(args.device)
                quantize.quantize(source, output, settings, *how)
            else:
                worker = [str(output), f"{work}/rows.safetensors", str(way["group_size"]), str(int(way["act_order"]))]
                subprocess.run([str(python), str(ROOT / "scripts" / "llm_compressor.py"), source, *worker], check=True)
                for name in folder.glob("token*"):
                    shutil.copy(name, output)
            value, tokens = perplexity(str(output), args.text, length, args.device)
            base = base or value
            row = way | {
                "perplexity": f"{value:.4f}",
                "loss_percent": f"{100 * (value / base - 1):.3f}",
                "tokens": tokens,
            }
            writer.writerow(row | {"calibration_tokens": ids.numel() if i else ""})
            file.flush()
            print(row, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    ready()
    args = parse(argv)
    try:
        if args.table:
            table(args)
        else:
            for name in args.checkpoints:
                value, tokens = perplexity(name, args.text, args.row_length, args.device)
                print(f"{name}: perplexity {value:.4f} over {tokens} tokens")
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
