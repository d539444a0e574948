"""The worked examples in the docstrings are what comes out, and the kernels' files are written as they should be."""

import ast
import re
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE, HAS_TRITON, compiled, needs_compiler, needs_kernels

if HAS_TRITON:
    import triton
    import triton.language as tl

    from decode_kernels import dense, launch, step

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install -e '.[interpreter]'")
FOLDER = Path(__file__).resolve().parents[2] / "decode_kernels"
KERNELS = ("dense.py", "step.py")


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


# -- step.py ----------------


@needs_triton
def test_a_race():
    p, e = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([2.0, 0.4, 0.05])
    told = [", ".join(f"{n:.3g}" if n < 2 else f"{n:.1f}" for n in x.tolist()) for x in (p, e, p / e)]
    assert (p / e).argmax() == 2
    assert said(step, "p = {} and E = {} give p / E = {}, so the third wins".format(*told))


@needs_triton
def test_the_largest_are_in_the_blocks_with_the_largest_maxima():
    blocks = [[5, 1, 0, 2], [4, 3, 3, 1], [2, 2, 0, 1]]
    maxima = [max(block) for block in blocks]
    told = [" ".join(map(str, block)) for block in blocks]
    assert said(step, f"logits {' | '.join(told)} have the maxima {maxima[0]}, {maxima[1]} and {maxima[2]}")
    best = sorted(sorted(range(3), key=lambda i: -maxima[i])[:2])
    assert said(step, f"The blocks with the two largest are {told[best[0]]} and {told[best[1]]}")
    assert sorted(sum(blocks, []))[-2:] == sorted(blocks[best[0]] + blocks[best[1]])[-2:] == [4, 5]


if HAS_TRITON:

    @triton.jit
    def keys_kernel(x_ptr, key_ptr, chosen_ptr, place_ptr, N: tl.constexpr, K: tl.constexpr):
        i = tl.arange(0, N)
        key = step._sortable_keys(tl.load(x_ptr + i), 0x7C00)
        chosen, place = step._k_largest(key, K)
        tl.store(key_ptr + i, key)
        tl.store(chosen_ptr + i, chosen.to(tl.int32))
        tl.store(place_ptr + i, place)


@needs_kernels
def test_keys_and_the_k_largest_equals_twin():
    x = torch.tensor([1.0, 0.0, -0.0, -1.0, float("inf"), -float("inf"), float("nan"), 1.0], dtype=torch.float16)
    key, chosen, place = (torch.empty(8, dtype=torch.int32, device=DEVICE) for _ in range(3))
    keys_kernel[(1,)](x.to(DEVICE), key, chosen, place, 8, 5)
    one, zero, negative_zero, minus_one, *others, again = key.tolist()
    assert said(
        step, f"1.0 is 0x3C00 and becomes {one}, 0.0 and -0.0 become {zero}, and -1.0, 0xBC00, becomes {minus_one}"
    )
    assert one == again and zero == negative_zero and others == [65535] * 3
    assert chosen.bool().tolist() == [True, False, False, False, True, True, True, True]
    assert place[chosen.bool()].tolist() == [0, 1, 2, 3, 4]
    keys_kernel[(1,)](x.to(DEVICE), key, chosen, place, 8, 4)  # one of the two 1.0 only: the first
    assert chosen.bool().tolist() == [True, False, False, False, True, True, True, False]


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
