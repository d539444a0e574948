"""What is compiled ahead is what a run launches, and no failure of it ends a run."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton's compiler: pip install -e '.[interpreter]'")
ROOT = Path(__file__).resolve().parents[2]

# A model without contents passes for one on a GPU: its launches compile for one that is not there, and do nothing else.
RUNS = """
import os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/scripts"]
import torch, triton
import architectures, checkpoint, compilation, decode_kernels, engine, machine_code, speculative
from decode_kernels import ahead, reduce
from sampling import Structure
from tokenizer import Ids
from tp import TensorParallel

driver = machine_code.Driver(90)
triton.runtime.driver.set_active(driver)
decode_kernels.supported = lambda device: True
decode_kernels.connect = lambda model: model.tp.fast
ahead.stand_in = lambda device: ahead.StandIn(90, machine_code.SHARED_MEMORY[90])
ahead.processors = lambda: 2
speculative.CHOICES = (0, 3)
engine.compiled = compilation.compiled = lambda fn, name, **options: fn  # by torch.compile
engine.tell = lambda line: print(*line.split()[1:2] * ("kernels" in line), end=" ", flush=True)  # how many

def build(kind, bits, group, layers, ranks=1):
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640}
    sizes |= {"intermediate_size": 256, "num_hidden_layers": layers, "max_position_embeddings": 4096}
    if kind == "mixtral":
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if kind == "gemma3_text":
        sizes |= {"head_dim": 64, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}
    tp = TensorParallel(0, ranks)
    if ranks > 1:
        box = reduce.box_of(ranks, torch.device("meta"))
        tp.fast = reduce.Mailboxes(box, torch.full((ranks,), 1 << 40), 0)  # addresses of 64 bits
    config, meta = architectures.config_from_hf({"model_type": kind} | sizes), torch.device("meta")
    model = checkpoint.random_model(config, bits=bits, group_size=group, tp=tp, device=meta)
    return engine.Engine(model, Ids(640), kernels="triton", compile=True)

def run(target, batch, longest, structure):
    driver.launches.clear()
    speculation = target.speculation
    target.reserve(batch, longest + 20, speculation.margin if speculation else 0)
    target._compile_kernels(longest, structure)
    missed = []
    def listen(*, src, cache_hit, **_):
        missed.extend([] if cache_hit else [src.name])
    triton.knobs.compilation.listener = listen
    if speculation:
        speculation._allocate()
        speculation._programs(longest, structure)
    if not speculation or speculation.rests:
        target.decode(longest, structure)
    target._first_tokens([list(range(longest))] * batch, structure)
    if speculation and speculation.draft:
        speculation.draft.prefill([list(range(longest))] * batch)
    print("|", len({name for name, _ in driver.launches}), *missed)

with ahead.Rehearsal():
    # every length of a draft; grouped-query attention in splits; the kinds of rows of 4 bits
    target = build("qwen2", 4, 128, 3)
    target.speculate(None)
    run(target, 1, 9, Structure(False, 200))
    run(target, 1, 9, Structure(False, 200))  # once more, when all is there
    # a draft of another format, and more rows in a prefill than a kernel takes
    target = build("llama", 8, -1, 2)
    target.speculate(draft := build("llama", 4, 32, 1), 3)
    draft.reserve(3, 26, 5)
    run(target, 3, 6, Structure(False, 200, top_p=True, penalty=True))
    # windows and norms of heads; a long prompt; greedy
    run(build("gemma3_text", 16, 0, 2), 2, 40, Structure(True, 0, penalty=True))
    # a prompt of more tokens than an instruction takes, which is no prefill of many yet
    run(build("llama", 16, 0, 1), 1, 20, Structure(True, 0))
    # experts; one of two ranks, which send lists
    run(build("mixtral", 16, 0, 1, 2), 1, 3, Structure(False, 40))
"""


IMPORTS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import architectures, checkpoint, decode_kernels
from decode_kernels import ahead, gpu
from linear import Linear
from sampling import Structure

sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640}
sizes |= {"intermediate_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 4096}
model = checkpoint.random_model(architectures.config_from_hf({"model_type": "llama"} | sizes))
for module in model.modules():
    if isinstance(module, Linear):
        module.fast = gpu.DENSE
model.fast, model.layers[0].self_attn.fast = gpu.begin, gpu.attend
run = decode_kernels.Run(model, 1, 256, (1, 4, 8, 13), (5, 200), Structure(False, 200), drafts=True)
jobs = ahead.record(ahead.StandIn(90, 227 << 10), [run])
print(len(jobs), *{"sympy", "torch._dynamo"} & sys.modules.keys())
"""
NAMES = """
import importlib, os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/scripts"]
import triton
import machine_code
from decode_kernels import ahead

def names(files):
    found = [f for file in files for f in vars(importlib.import_module(f"decode_kernels.{file}")).values()]
    print(*sorted({f.__name__ + f.cache_key for f in found if isinstance(f, triton.JITFunction)}), flush=True)

triton.runtime.driver.set_active(machine_code.Driver(90))
with ahead.compiling_ahead(ahead.StandIn(90, 0), [], 1, lambda line: None):
    pass
for files in (("dense", "quantized", "sums"), ("sums", "quantized", "dense")):
    os.waitpid(ahead.fork(lambda: names(files)), 0)
"""
FAILURES = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/scripts"]
import triton
import machine_code
from decode_kernels import ahead

def fail(*_):
    raise ValueError("seen by nobody")

def refuse():
    raise BlockingIOError("no more processes")

triton.runtime.driver.set_active(machine_code.Driver(90))
record, compile_all, fork = ahead.record, ahead.compile_all, os.fork
for fault in ("rehearsal", "killed", "job", "fork"):
    ahead.record = fail if fault == "rehearsal" else lambda *_: [fail] * 3
    ahead.compile_all = (lambda *_: os.kill(os.getpid(), signal.SIGKILL)) if fault == "killed" else compile_all
    os.fork = refuse if fault == "fork" else fork
    with ahead.compiling_ahead(ahead.StandIn(90, 0), [], 2, lambda line: None):
        print(fault, flush=True)
"""
ORPHANS = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/scripts"]
import triton
import machine_code
from decode_kernels import ahead

def job():
    os.write(out, b"%d %d " % (os.getpid(), os.getppid()))
    signal.pause()

out = os.dup(1)
triton.runtime.driver.set_active(machine_code.Driver(90))
ahead.record = lambda *_: [job, job]
with ahead.compiling_ahead(ahead.StandIn(90, 0), [], 2, lambda line: None):
    pass
"""


def environment(folder):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return env | {"TRITON_CACHE_DIR": str(folder)}


def start(folder, program):
    """A process of its own: this one may drive a GPU, or interpret its kernels."""
    argv = [sys.executable, "-c", program, str(ROOT)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment(folder))


def test_a_run_compiles_nothing_more(tmp_path):
    done = start(tmp_path, RUNS)
    assert done.returncode == 0, done.stderr
    counts = []
    for line in done.stdout.splitlines():
        compiled, launched = line.split("|")
        assert int(launched) > 5, done.stdout  # and no names behind it, of kernels that were not there
        counts.append(int(compiled.strip() or 0))
    assert counts[0] > 20 and counts[1] == 0 and min(counts[2:]) > 5, counts


def test_a_kernel_has_one_name_whatever_is_launched_first(tmp_path):
    """Triton's own depends on it, where a function that others call reads a constant of its module."""
    done = start(tmp_path, NAMES)
    one, other = done.stdout.splitlines()
    assert one == other and "_quantized_kernel" in one, done.stderr


def test_no_failure_ends_a_run(tmp_path):
    done = start(tmp_path, FAILURES)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.split() == ["rehearsal", "killed", "job", "fork"]


def test_children_end_with_their_parent(tmp_path):
    argv = [sys.executable, "-c", ORPHANS, str(ROOT)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment(tmp_path)) as parent:
        found = b""
        while found.count(b" ") < 4:
            found += os.read(parent.stdout.fileno(), 100)
        ids = set(map(int, found.split()))
        assert len(ids) == 3  # two compilers and the rehearsal
        watched = [os.pidfd_open(child) for child in ids]
        parent.kill()
        for child in watched:
            assert select.select([child], [], [], 60)[0]  # readable once it has ended
            os.close(child)


def test_a_rehearsal_imports_no_compiler(tmp_path):
    """Which takes longer than a kernel, in every start."""
    done = start(tmp_path, IMPORTS)
    assert done.returncode == 0, done.stderr
    jobs, *imported = done.stdout.split()
    assert int(jobs) > 20 and not imported
