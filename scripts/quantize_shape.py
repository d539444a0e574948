"""Time and host memory that `quantize.py` needs for a public shape, measured on random weights.

    python scripts/quantize_shape.py --shape llama-2-7b --work FOLDER --mode int4-gptq [-- flags of quantize.py]

Writes the shape's checkpoint (bf16, standard deviation 0.02, a byte-level tokenizer) into FOLDER once, quantizes it as
a user would, in a process of its own, and samples that process's anonymous memory (Linux). Appends to
`benchmarks/quantize_shape.csv`.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from checkpoint import SHAPES  # noqa: E402
from generate import Parser, at_least  # noqa: E402


def write_checkpoint(shape: str, layers: int | None, folder: Path) -> None:
    """A llama-like shape as a sharded Hugging Face folder, one layer a shard, so that memory stays small."""
    kind, hidden, mlp, count, heads, kv_heads, head_dim, vocab, context, theta, tied, *moe = SHAPES[shape]
    if kind not in ("llama", "mistral") or moe:
        raise ValueError(f"--shape {shape}: only dense llama and mistral shapes are written here")
    count = layers or count
    config: dict[str, Any] = {"model_type": kind, "hidden_size": hidden, "intermediate_size": mlp, "vocab_size": vocab}
    config |= {"num_hidden_layers": count, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config |= {"head_dim": head_dim, "max_position_embeddings": context, "rope_theta": theta, "dtype": "bfloat16"}
    config |= {"tie_word_embeddings": tied, "architectures": ["LlamaForCausalLM"], "bos_token_id": 256}
    block = {"self_attn.q_proj": (heads * head_dim, hidden), "self_attn.k_proj": (kv_heads * head_dim, hidden)}
    block |= {"self_attn.v_proj": (kv_heads * head_dim, hidden), "self_attn.o_proj": (hidden, heads * head_dim)}
    block |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    shards = [{f"model.layers.{i}.{n}.weight": s for n, s in (block | norms).items()} for i in range(count)]
    shards.append({"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)})
    shards[-1] |= {} if tied else {"lm_head.weight": (vocab, hidden)}
    folder.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        fill = [torch.ones(s) if len(s) == 1 else torch.randn(s, device=device) * 0.02 for s in shard.values()]
        save_file(dict(zip(shard, (t.bfloat16().cpu() for t in fill))), folder / file)
        where |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.add_special_tokens(["<s>"])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    (folder / "config.json").write_text(json.dumps(config))


def measure(source: Path, mode: str, flags: Sequence[str]) -> dict[str, Any]:
    """Run quantize.py; its seconds and the peak of its anonymous memory. RuntimeError when it fails."""
    output = source.with_name(f"{source.name}-{mode}")
    argv = [sys.executable, str(ROOT / "quantize.py"), "--checkpoint", str(source), "--mode", mode, "--force"]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([*argv, "--output", str(output), *flags])
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) << 10)
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"quantize.py ended with exit status {process.returncode}")
    seconds = time.perf_counter() - started
    report = json.loads((output / "quantization_report.json").read_text())
    row = {key: report[key] for key in ("mode", "device", "dtype", "torch", "calibration_tokens", "heldout_tokens")}
    row |= {"seconds": f"{seconds:.1f}", "linears_seconds": f"{sum(r['seconds'] for r in report['layers']):.1f}"}
    return row | {"anonymous_GB": f"{peak / 1e9:.2f}", "bytes": report["bytes_after"]}


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="quantize_shape.py", description="Measure quantize.py on a public shape.", allow_abbrev=False)
    p.add_argument("--shape", choices=tuple(SHAPES), default="llama-2-7b")
    p.add_argument("--layers", type=at_least(1), help="fewer layers than the shape has")
    p.add_argument("--work", type=Path, required=True, help="folder for the checkpoints; stays")
    p.add_argument("--mode", action="append", choices=("int8", "int4", "int4-gptq"), required=True)
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "quantize_shape.csv")
    p.add_argument("flags", nargs=argparse.REMAINDER, help="after --: flags of quantize.py")
    args = p.parse_args(argv)
    source = args.work / (args.shape if args.layers is None else f"{args.shape}-{args.layers}")
    if not (source / "config.json").exists():
        write_checkpoint(args.shape, args.layers, source)
    for mode in args.mode:
        row = {"shape": args.shape, "layers": args.layers or SHAPES[args.shape][3]}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        row |= {"hardware": device} | measure(source, mode, [flag for flag in args.flags if flag != "--"])
        new = not args.output.exists()
        with open(args.output, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
