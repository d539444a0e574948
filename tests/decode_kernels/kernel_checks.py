"""What the tests of the kernels share: where they run, how near is equal, and how a kernel is compiled."""

import importlib.util
import re

import pytest
import torch

from decode_kernels import INTERPRETED, supported

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]  # the interpreter truncates to bf16
needs_kernels = pytest.mark.skipif(not supported(DEVICE), reason="needs a GPU or Triton's interpreter")
needs_compiler = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler: pip install -e '.[interpreter]'"
)


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def compiled(kernel, types, values, sm, warps):
    """A kernel for that architecture, with or without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in values.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name.endswith("ptr")}
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})


def unhinted(kernel):
    """Loads and stores of many axes whose pointers do not say to which of them lanes are dealt: Triton 3.6 is right,
    later versions guess the other way round, and then everything passes through shared memory.
    """
    text = kernel.asm["ttir"]
    hinted = set(re.findall(r"(%\S+) = .*tt\.contiguity", text))
    used = re.findall(r"tt\.(?:load|store) (%[^ ,]+),? .*tensor<(?:\d+x){5,}!tt", text)
    assert used
    return [name for name in used if name not in hinted]
