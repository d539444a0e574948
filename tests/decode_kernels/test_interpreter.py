"""The difference tests of this folder in Triton's CPU interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_checks import HAS_TRITON

FOLDER = Path(__file__).resolve().parent


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install -e '.[interpreter]'")
def test_kernels_in_the_interpreter():
    """In a process of its own: Triton reads the variable when it is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", str(FOLDER), "-k", "equals_twin", "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=env, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
