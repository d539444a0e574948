"""The kernels' machine code is what is recorded: a change that should change none changes none."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton's compiler: pip install -e '.[interpreter]'")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "machine_code.py"
RECORD = Path(__file__).with_name("machine_code.csv")


def run(*argv):
    """A process of its own: this one may drive a GPU, or interpret its kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, env=env)


def test_machine_code_is_what_is_recorded():
    """A case or two of every kernel for sm_90; by hand all of them, and other architectures."""
    done = run(SCRIPT, "--quick")
    if done.returncode == 0 and " 0 are not recorded" not in done.stdout:
        pytest.skip(f"another Triton or ptxas: {done.stdout.strip()}")
    assert done.returncode == 0 and " 0 differ" in done.stdout, done.stdout + done.stderr


def test_every_kernel_is_recorded():
    with RECORD.open() as file:
        rows = list(csv.DictReader(file))
    sources = "".join(path.read_text("utf-8") for path in ROOT.glob("decode_kernels/*.py"))
    defined = len(re.findall(r"^def \w+_kernel\(", sources, re.MULTILINE))
    for sm in ("80", "86", "89", "90"):
        assert len({row["kernel"] for row in rows if row["sm"] == sm}) == defined > 10
    program = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import machine_code as m; print(m.QUICK)"
    quick = run("-c", program).stdout
    assert len({row["kernel"] for row in rows if repr(row["case"]) in quick}) == defined


KERNELS = """
import sys
import torch
import triton
import triton.language as tl

@triton.jit
def first(x_ptr, out_ptr, n):
    i = tl.arange(0, 128)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n, 0) + 1, i < n)

@triton.jit
def renamed(source_ptr, to_ptr, count):
    '''With another name, other names inside, and other lines.'''
    lane = tl.arange(0, 128)  # a comment

    tl.store(to_ptr + lane,
             tl.load(source_ptr + lane, lane < count, 0) + 1, lane < count)

@triton.jit
def reordered(out_ptr, x_ptr, n):
    i = tl.arange(0, 128)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n, 0) + 1, i < n)

sys.path.insert(0, sys.argv[1])
import machine_code
driver = machine_code.Driver(90)
triton.runtime.driver.set_active(driver)
for kernel in (first, renamed, reordered):
    kernel[(1,)](torch.empty(128), torch.empty(128), 100)
print(*[sha1 for _, sha1 in driver.launches])
"""


def test_names_and_lines_do_not_count_and_the_order_of_parameters_does(tmp_path):
    (tmp_path / "some_kernels.py").write_text(KERNELS)
    done = run(tmp_path / "some_kernels.py", SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    first, renamed, reordered = done.stdout.split()
    assert first == renamed != reordered and len(first) == 40
