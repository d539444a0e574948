"""llm-compressor's GPTQ (4 bits, symmetric, groups) of a folder with given rows of ids; `evaluate.py` runs it.

    python scripts/llm_compressor.py SOURCE OUTPUT ROWS.safetensors GROUP_SIZE ACT_ORDER(0|1)

Runs in an environment of its own, without the modules of this project. Everything stays in float32, scales included,
where `quantize.py` rounds its scales to the checkpoint's dtype: the comparison errs on llm-compressor's side.
"""

import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main(source: str, output: str, rows_file: str, group_size: str, act_order: str) -> None:
    rows = load_file(rows_file)["rows"]
    data = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=4)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group_size)}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder="weight" if act_order == "1" else None)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    size = {"num_calibration_samples": len(rows), "max_seq_length": rows.shape[1], "pipeline": "sequential"}
    oneshot(model=model, tokenizer=source, dataset=data, recipe=recipe, **size)
    model.save_pretrained(output, save_compressed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
