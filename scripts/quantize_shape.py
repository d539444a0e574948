"""Time and host memory that `quantize.py` needs for a public shape, measured on random weights.

    python scripts/quantize_shape.py --shape llama-2-7b --work FOLDER --mode int4-gptq [-- flags of quantize.py]

Writes the shape's checkpoint (bf16, standard deviation 0.02, the embedded model's tokenizer) into FOLDER once,
quantizes it as a user would, in a process of its own, and samples that process's anonymous memory (Linux). Appends to
`benchmarks/quantize_shape.csv`.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from command_line import Parser, begin


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="quantize_shape.py", description="Measure quantize.py on a public shape.", allow_abbrev=False)
    p.add_argument("--shape", default="llama-2-7b", help="(llama-2-7b)")
    p.add_argument("--work", type=Path, required=True, help="folder for the checkpoints; stays")
    p.add_argument(
        "--mode",
        action="append",
        choices=("int8", "int8-gptq", "int4", "int4-gptq"),
        required=True,
        help="may be repeated",
    )
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "quantize_shape.csv", help="rows go there")
    p.add_argument("flags", nargs=argparse.REMAINDER, help="after --: flags of quantize.py")
    return p.parse_args(argv)


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import torch
from safetensors.torch import save_file

import quantize
from architectures import config_from_hf
from shapes import shape_json


def write_checkpoint(shape: str, folder: Path) -> None:
    """A dense llama-like shape as a Hugging Face folder, one tensor a shard, so that memory stays small."""
    config = shape_json(shape) | {"tie_word_embeddings": False, "dtype": "bfloat16"}
    model = quantize.empty(config_from_hf(config))
    targets, _ = quantize.plan(model, quantize.Settings("int8", quantize_head=True))
    sizes = {f"model.{n}": p.shape for n, p in model.named_parameters() if p.ndim == 1 or n.startswith("embed")}
    for target in targets:
        parts = {f"{name}.weight": rows for row in target.parts for name, rows, _ in row}
        sizes |= {name: (rows, model.get_submodule(target.path).in_features) for name, rows in parts.items()}
    shutil.copytree(ROOT / "checkpoints" / "tales", folder, ignore=shutil.ignore_patterns("*.safetensors", "*.png"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, size in sizes.items():
        weight = torch.ones(size) if len(size) == 1 else torch.randn(size, device=device) * 0.02
        save_file({name: weight.bfloat16().cpu()}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in sizes}}
    quantize.write_json(folder / "model.safetensors.index.json", index)
    quantize.write_json(folder / "config.json", config)


def measure(source: Path, mode: str, flags: Sequence[str]) -> dict[str, Any]:
    """Run quantize.py; its seconds and the peak of its anonymous memory. Ends with its exit status when it fails."""
    output = source.with_name(f"{source.name}-{mode}")
    argv = [sys.executable, str(ROOT / "quantize.py"), "--checkpoint", str(source), "--mode", mode, "--force"]
    argv += ["--calibration", str(ROOT / "data" / "calibration.txt")]  # what random weights write is no text
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([*argv, "--output", str(output), *flags])
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) << 10)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)  # it has said why
    seconds = time.perf_counter() - started
    report = json.loads((output / "quantization_report.json").read_text())
    row = {key: report[key] for key in ("mode", "device", "dtype", "torch", "calibration_tokens", "heldout_tokens")}
    row |= {"seconds": f"{seconds:.1f}", "linears_seconds": f"{sum(r['seconds'] for r in report['layers']):.1f}"}
    return row | {"anonymous_GB": f"{peak / 1e9:.2f}", "bytes": report["bytes_after"]}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        shape_json(args.shape)
    except ValueError as error:
        print(f"quantize_shape.py: error: {error}", file=sys.stderr)
        return 2
    source = args.work / args.shape
    if not (source / "config.json").exists():
        write_checkpoint(args.shape, source)
    for mode in args.mode:
        row = {"shape": args.shape, "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
        row |= measure(source, mode, args.flags[1:])
        new = not args.output.exists()
        with open(args.output, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
