"""What works with parts of the house: without the folder decode_kernels, and with four files copied out."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine import DEFAULT_CHECKPOINT

ROOT = Path(__file__).resolve().parent.parent
needs_tales = pytest.mark.skipif(not DEFAULT_CHECKPOINT.is_dir(), reason="needs the embedded checkpoint")
DRAFT = DEFAULT_CHECKPOINT.with_name("tales-draft")

PLAIN = """
import contextlib, json, sys
import torch
import checkpoint, engine, quantize, shapes
from engine import Engine
from sampling import SamplingParams
from tokenizer import Ids

def ids(e, prompt, n=24):
    pieces = e.generate([prompt], SamplingParams(0.0), max_new_tokens=n, ignore_eos=True)
    return [i for piece in pieces for i in piece.ids]

tales, draft, out = sys.argv[1:]
FLOAT = {"device": "cpu", "dtype": "float32"}  # in 16 bits the fast paths round otherwise
plain = Engine.load(tales, **FLOAT)
said = {"plain": ids(plain, "The old king")}
for bits in (8, 4):
    said[f"int{bits}"] = ids(Engine(checkpoint.quantized_copy(plain.model, bits), plain.tokenizer), "The old king")
for name in (draft, "ngram", "self-int4"):
    said[name] = ids(Engine.load(tales, **FLOAT, draft=name, num_draft_tokens=3), "The old king")
with contextlib.redirect_stdout(sys.stderr):
    quantize.main(["--checkpoint", tales, "--mode", "int8", "--heldout-tokens", "0", "--output", out])
said["quantized"] = ids(Engine.load(out, **FLOAT), "The old king")
torch.manual_seed(0)
model = checkpoint.random_model(shapes.shape_config("tiny"), dtype=torch.float32)
random = [ids(Engine(model, Ids(512), compile=c), [1, 2, 3], 12) for c in (False, True)]
print(json.dumps({"kernels": engine.decode_kernels is not None, "said": said, "random": random}))
"""


def run(folder: Path, *command: object) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_tales
def test_everything_works_with_the_kernels_deleted(tmp_path):
    """Generation, int8, int4, speculation, quantization, compilation and two ranks say the same as with the folder."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, bare)
    shutil.copytree(ROOT / "data", bare / "data")
    (bare / "plain.py").write_text(PLAIN)
    without = json.loads(run(bare, "plain.py", DEFAULT_CHECKPOINT, DRAFT, tmp_path / "a").splitlines()[-1])
    assert not without["kernels"]
    shutil.copytree(ROOT / "decode_kernels", bare / "decode_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    whole = json.loads(run(bare, "plain.py", DEFAULT_CHECKPOINT, DRAFT, tmp_path / "b").splitlines()[-1])
    assert whole["kernels"] and whole["said"] == without["said"] and whole["random"] == without["random"]
    said, random = without["said"], without["random"]
    assert said["plain"] == said["ngram"] == said[str(DRAFT)] == said["self-int4"] and len(said["plain"]) == 24
    assert random[0] == random[1]
    shutil.rmtree(bare / "decode_kernels")
    words = ("generate.py", "--checkpoint", DEFAULT_CHECKPOINT, "--device", "cpu", "--prompt", "The old king")
    words += ("--temperature", 0, "--max-new-tokens", 24)
    ranks = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29_400 + os.getpid() % 500)
    assert run(bare, *ranks, *words) == run(bare, *words)


@needs_tales
def test_four_files_can_be_copied_and_run_with_the_readmes_loader(tmp_path):
    """The block of the README that begins with `# loader.py`, beside the files that it names, in an empty folder."""
    (block,) = re.findall(r"```python\n(# loader\.py.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip() and not line.startswith("#")]) <= 30
    (tmp_path / "loader.py").write_text(block)
    for name in ("model.py", "linear.py", "sampling.py", "tp.py"):
        shutil.copy(ROOT / name, tmp_path)
    said = run(tmp_path, "loader.py", DEFAULT_CHECKPOINT, "The old king")
    words = ("--checkpoint", DEFAULT_CHECKPOINT, "--device", "cpu", "--prompt", "The old king", "--temperature", 0)
    wanted = run(ROOT, "generate.py", *words, "--max-new-tokens", 40)
    assert said.strip() == "The old king" + wanted.rstrip("\n")
