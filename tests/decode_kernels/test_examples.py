"""The worked examples in the docstrings are what comes out, and the kernels' files are written as they should be."""

import ast
import re
from pathlib import Path

import pytest
import torch
from kernel_checks import HAS_TRITON, compiled, needs_compiler

if HAS_TRITON:
    import triton
    import triton.language as tl

    from decode_kernels import dense, launch

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install -e '.[interpreter]'")
FOLDER = Path(__file__).resolve().parents[2] / "decode_kernels"
KERNELS = ("dense.py",)


def said(module, *sentences):
    """Whether a module's docstring says this, whatever its lines."""
    text = " ".join(module.__doc__.split())
    return all(" ".join(sentence.split()) in text for sentence in sentences)


# -- launch.py ----------------

if HAS_TRITON:

    @triton.jit
    def copy_kernel(from_ptr, to_ptr):
        at = tl.arange(0, 4)[:, None, None, None, None, None] * 768 + tl.arange(0, 8)[:, None, None, None, None] * 96
        at += tl.arange(0, 2)[:, None, None, None] * 48 + tl.arange(0, 4)[:, None, None] * 16
        x = tl.load(launch.deal_to_lanes(from_ptr, at + tl.arange(0, 16)))
        tl.store(launch.deal_to_lanes(to_ptr, at + tl.arange(0, 16)), x)


@needs_compiler
def test_lanes_are_dealt_as_the_docstring_says():
    code = compiled(copy_kernel, {"from_ptr": "*i8", "to_ptr": "*i8"}, {}, 90, 2).asm["ttgir"]
    layout = re.search(r"#\w+ = #ttg.blocked<(\{sizePerThread = \[1, 1, 1, 1, 1, 16\].*\})>", code)[1]
    lanes = [int(n) for n in re.search(r"threadsPerWarp = \[([\d, ]+)\]", layout)[1].split(",")]
    warps = [int(n) for n in re.search(r"warpsPerCTA = \[([\d, ]+)\]", layout)[1].split(",")]
    order = [int(n) for n in re.search(r"order = \[([\d, ]+)\]", layout)[1].split(",")]
    assert lanes == [4, 8, 1, 1, 1, 1] and warps == [1, 1, 2, 1, 1, 1] and order[:4] == [5, 0, 1, 2]
    assert said(
        launch, f"element [3, 2, 1, 0, 0, 5] is loaded by lane 3 + 4 * 2 = {3 + lanes[0] * 2} of warp 1: byte 5"
    )


# -- dense.py ----------------


@needs_triton
def test_two_rows_in_eight_pieces():
    a, b, x = torch.arange(1, 17), torch.ones(16, dtype=torch.int64), torch.arange(1, 9).repeat_interleave(2)
    sums = torch.cat([a, b]).view(16, 2) @ x.view(8, 2).T  # sixteen rows, eight columns, two elements of k
    for row in (0, 1, 7):
        assert said(dense, f"a{row} " + " ".join(str(n) for n in sums[row].tolist()))
    parts = sums[:8].diagonal().tolist(), sums[8:].diagonal().tolist()
    assert [sum(part) for part in parts] == [a @ x, b @ x]
    assert said(dense, f"{' + '.join(map(str, parts[0]))} = {a @ x}, is a x^T")
    assert said(dense, f"{' + '.join(map(str, parts[1][:3]))} + ... + {parts[1][-1]} = {b @ x}, is b x^T")


# -- the files ----------------


def in_kernel(function):
    return any(ast.unparse(d).startswith(("triton.jit", "triton.constexpr_function")) for d in function.decorator_list)


@pytest.mark.parametrize("name", ["launch.py", *KERNELS])
def test_what_runs_outside_kernels_is_annotated(name):
    """What ruff and mypy do not look for in these files, for Triton's functions take anything."""
    for function in ast.walk(ast.parse((FOLDER / name).read_text("utf-8"))):
        if isinstance(function, ast.FunctionDef):
            a = function.args
            bare = {p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.annotation is None}
            if in_kernel(function):
                assert {p.arg for p in a.args} - bare == {p.arg for p in a.args if p.arg.isupper()}, function.name
                assert function.returns is None, function.name
            else:
                assert not bare and function.returns is not None, function.name


@pytest.mark.parametrize("name", KERNELS)
def test_a_file_reads_from_its_kernels_to_its_functions(name):
    """The docstring has a worked example; then kernels, launches, operators and public functions."""
    tree = ast.parse((FOLDER / name).read_text("utf-8"))
    assert "Worked example" in ast.get_docstring(tree)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    public = [f for f in functions if not in_kernel(f) and not f.name.startswith("_")]
    assert public and all(ast.get_docstring(f) for f in public)
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    operators = {n.targets[0].id: n.lineno for n in assigned if ast.unparse(n.value).startswith("operator(")}
    kernels = [f.lineno for f in functions if in_kernel(f)]
    for name, line in operators.items():
        calls = [f.lineno for f in public if name in ast.unparse(f)]
        assert calls and min(kernels) < line < min(calls), name
