"""The worked examples in the docstrings are what comes out, and the kernels' files are written as they should be."""

import ast
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE, HAS_TRITON, compiled, needs_compiler, needs_kernels

from decode_kernels import tiles
from speculative import look_up_

if HAS_TRITON:
    import triton
    import triton.language as tl

    from decode_kernels import attention, bounds, dense, digits, draw, launch, quantized, rounds, step

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install -e '.[interpreter]'")
FOLDER = Path(__file__).resolve().parents[2] / "decode_kernels"
KERNELS = ("attention.py", "blocks.py", "dense.py", "draw.py", "quantized.py", "rounds.py")


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


# -- quantized.py ----------------


@needs_triton
def test_two_digits():
    unit = 2 / (127 * 256)
    x = [round(value / unit) for value in (0.3, 2)]
    high = [(n + 128) >> 8 for n in x]
    low = [n - 256 * h for n, h in zip(x, high)]
    assert said(digits, f"The unit is 2 / {127 * 256} = {unit:.10f}, and 0.3 is {0.3 / unit:.1f} units, rounded {x[0]}")
    assert said(digits, f"= 256 * {high[0]} + {low[0]}: the digits are {high[0]} and {low[0]}, and those of 2 are")
    assert said(digits, f"those of 2 are {high[1]} and {low[1]}. Multiplied by weights q = 5 and q = 3")
    sums = [5 * digit[0] + 3 * digit[1] for digit in (high, low)]
    assert said(
        digits, f"5 * {high[0]} + 3 * {high[1]} = {sums[0]} low digits: 5 * {low[0]} + 3 * {low[1]} = {sums[1]}"
    )
    whole = 256 * sums[0] + sums[1]
    assert said(
        digits, f"(256 * {sums[0]} + {sums[1]}) units = {whole} units = {whole * unit:.5f}, where 5 * 0.3 + 3 * 2 is"
    )


@needs_triton
def test_four_digits():
    x = round(0.3 * 2**24)
    high = (x + 0x8080) >> 16
    low = x - 65536 * high
    assert said(digits, f"2^-24, and 0.3 is {0.3 * 2**24:.1f} units, rounded {x} = 65536 * {high} - {-low}.")
    pairs = [((n + 128) >> 8, (n + 128) % 256 - 128) for n in (high, low)]
    (a, b), (c, d) = pairs
    assert said(
        digits, f"As {high} = 256 * {a} + {b} and {low} = 256 * {c} - {-d}, the digits are {a}, {b}, {c} and {d}."
    )


@needs_kernels
def test_what_the_gates_and_ups_of_the_example_can_be_equals_twin():
    packed = quantized.pack(torch.full((256, 4), 4, dtype=torch.int8, device=DEVICE), 4)
    operands = packed, torch.full((256, 1), 0.2, device=DEVICE), None
    (unit,) = bounds.known_units(operands, None, torch.ones(4, device=DEVICE), 4).tolist()
    assert said(quantized, f"silu(gate) * up is at most {unit * 2**30:.2f}.")
    found = bounds.unit_factors(operands, 4, torch.ones(256, device=DEVICE), 4).mul(2**30)
    (factor, per_length), _ = found.tolist()
    assert said(quantized, f"5 + 2 * {per_length:.1f} = {5 * factor + 2 * per_length:.1f}.")


@needs_kernels
def test_digits_of_the_example_equals_twin():
    x = torch.zeros(1, 128)
    x[0, 45], x[0, 2] = 0.3, 2
    empty = digits.empty_digits(x.to(DEVICE), *x.shape, norm=False)
    found, unit, *_ = digits.fill_digits_(x.to(DEVICE), None, empty)
    found = found.cpu().view(2, 8, 4, 2, 8)  # e, column, t, u, the column's last three digits
    assert found[1, :2, 1, 0, 5].tolist() == [19, 13]  # column 45 = 32 + 8 + 5
    assert found[0, :2, 0, 0, 2].tolist() == [127, 0]
    assert unit[0, 0, 0].item() == pytest.approx(2 / 32512)


@needs_triton
def test_where_row_9_column_45_lies():
    q = torch.zeros(16, 128, dtype=torch.int8)
    q[9, 45] = 7
    (at,) = quantized.pack(q, 8).flatten().nonzero().flatten().tolist()
    (byte,) = quantized.pack(q, 4).flatten().nonzero().flatten().tolist()
    assert quantized.pack(q, 4).flatten()[byte] == 7  # the low nibble
    assert said(
        quantized,
        f"64 * 1 + 16 * 1 + 8 * 1 + 4 * 1 + 1 = {at}; lane {at % 512 // 16} loads it, as byte {at % 16} of 16",
    )
    assert said(quantized, f"int4: the low nibble of byte {at} - 1024 = {byte}")
    # m16n8k32: lane 4 g + t holds, as byte i of 16, row g + 8 (i // 4 % 2), k = 4 t + i % 4 + 16 (i // 8)
    lane, i = at % 512 // 16, at % 16
    row, k = lane // 4 + 8 * (i // 4 % 2), lane % 4 * 4 + i % 4 + 16 * (i // 8)
    assert said(quantized, f"The instruction takes byte {i} of lane {lane} for its row {row} and its k = {k}.")


# -- tiles.py ----------------


def test_a_tile_is_looked_up():
    k, n = 11008, 4096
    tile = tiles.choose("int4", k, n, 1, gated=False)
    assert tile is tiles.TABLES["int4"][7].tile
    assert said(tiles, f"the eighth fits: {tile.rows} rows of the matrix in a program, {tile.warps} warps")
    assert said(tiles, f"the loads of {tile.w_ahead} steps of {tile.columns} columns under way")
    chunks = -(-k // tile.columns)
    told = f"So {n // tile.rows} programs of {tile.warps} warps take {chunks} chunks of {tile.columns} columns in"
    assert said(tiles, f"{told} {-(-chunks // tile.warps)} steps.")


SIZES = [1, 1024, 2048, 2560, 3072, 4096, 4104, 5504, 6144, 8192, 8200, 10240, 14336, 16384, 28672]


@pytest.mark.parametrize("table", tiles.TABLES)
def test_every_product_has_a_tile_and_every_tile_a_product(table):
    rows = (1, 2, 4) if table == "16-bit, few rows" else (1, 4, 5, 8, 9, 16)
    rows += (17, 32) if table == "16-bit, many rows" else ()
    asked = itertools.product(SIZES, SIZES, rows, (False, True), (99 * 1024, 227 * 1024))
    found = {id(tiles.choose(table, *args)) for args in asked}
    assert found == {id(choice.tile) for choice in tiles.TABLES[table]}
    for choice in tiles.TABLES[table]:
        assert re.search(r"\d|not measured", choice.measured) and re.fullmatch("[0-9a-f]{7}", choice.commit)


# -- attention.py ----------------


@needs_triton
def test_joining_two_warps():
    m, parts = [3, 2], [sum(2.0 ** (s - 3) for s in (1, 3)), 2.0 ** (2 - 2)]
    whole = sum(part * 2.0 ** (top - 3) for part, top in zip(parts, m))
    assert whole == (2**1 + 2**3 + 2**2) / 2**3
    assert said(attention, f"m = 3, sum 2^(1 - 3) + 2^(3 - 3) = {parts[0]} and m = 2, sum 2^(2 - 2) = {parts[1]:.0f}")
    assert said(attention, f"together m = 3, sum {parts[0]} * 2^(3 - 3) + 1 * 2^(2 - 3) = {whole},")


if HAS_TRITON:

    @triton.jit
    def places_kernel(key_ptr, value_ptr, DIM: tl.constexpr, WARPS: tl.constexpr):
        k_lane, _, _, v_lane, _, _, _ = attention._cache_lanes(key_ptr, value_ptr, DIM, DIM, WARPS)
        t = tl.arange(0, 4)[:, None, None, None, None, None, None]
        g = tl.arange(0, 8)[:, None, None, None, None, None]
        lane = tl.arange(0, WARPS)[:, None, None, None, None] * 32 + g * 4 + t
        none = tl.zeros([4, 8, WARPS, 2, DIM // 64, 2, 4], tl.int32)  # of K: [t, g, warp, half, c, h, word]
        tl.store(k_lane, lane + none)
        none = tl.zeros([4, 8, WARPS, 2, 2, DIM // 64, 4], tl.int32)  # of V: [t, g, warp, h, i, c, word]
        tl.store(v_lane, lane + none)


@needs_kernels
def test_which_lane_holds_which_slot_equals_twin():
    """Every word of a step belongs to one lane, the one that the docstring says."""
    dim, warps = 128, 8
    keys, values = (torch.full((16 * warps, dim // 2), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    places_kernel[(1,)](keys, values, dim, warps)
    slot, word = torch.arange(16 * warps)[:, None], torch.arange(dim // 2)
    low, d = slot % 16, word * 2
    assert torch.equal(keys.cpu(), slot // 16 * 32 + low % 8 * 4 + d % 32 // 8)
    assert torch.equal(values.cpu(), slot // 16 * 32 + d % 64 // 8 * 4 + low % 8 // 2)
    key, value = keys[141 - 128].tolist(), values[141 - 128].tolist()
    assert said(attention, f"lanes {min(key)} to {max(key)} hold it: lane 21 has dimensions 8 to 15 of both halves")
    assert [2 * i for i, lane in enumerate(key) if lane == 21] == [*range(8, 16, 2), *range(40, 48, 2)] + [
        *range(72, 80, 2),
        *range(104, 112, 2),
    ]
    a, b, *_, last = sorted(set(value))
    assert said(attention, f"lanes {a}, {b}, ..., {last} hold it: lane {b} has dimensions 8 to 15")
    assert [2 * i for i, lane in enumerate(value) if lane == b] == [*range(8, 16, 2), *range(72, 80, 2)]


# -- step.py ----------------


@needs_triton
def test_the_angles_of_the_example():
    cos, sin = math.cos(3 * 0.5), math.sin(3 * 0.5)
    assert said(step, f"the frequency 0.5 and the factor 1 give cos 1.5 = {cos:.4f} and sin 1.5 = {sin:.4f}")


# -- draw.py ----------------


@needs_triton
def test_a_race():
    p, e = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([2.0, 0.4, 0.05])
    told = [", ".join(f"{n:.3g}" if n < 2 else f"{n:.1f}" for n in x.tolist()) for x in (p, e, p / e)]
    assert (p / e).argmax() == 2
    assert said(draw, "p = {} and E = {} give p / E = {}, so the third wins".format(*told))


@needs_triton
def test_the_largest_are_in_the_blocks_with_the_largest_maxima():
    blocks = [[5, 1, 0, 2], [4, 3, 3, 1], [2, 2, 0, 1]]
    maxima = [max(block) for block in blocks]
    told = [" ".join(map(str, block)) for block in blocks]
    assert said(draw, f"logits {' | '.join(told)} have the maxima {maxima[0]}, {maxima[1]} and {maxima[2]}")
    best = sorted(sorted(range(3), key=lambda i: -maxima[i])[:2])
    assert said(draw, f"The blocks with the two largest are {told[best[0]]} and {told[best[1]]}")
    assert sorted(sum(blocks, []))[-2:] == sorted(blocks[best[0]] + blocks[best[1]])[-2:] == [4, 5]


@needs_triton
def test_what_top_p_keeps_in_the_example():
    p, top_p = 0.5 ** torch.tensor([0.0, 1, 1, 3]), 0.5
    told = ", ".join(f"{n:g}" for n in p.tolist())
    assert said(draw, f"p = {told} and top_p = {top_p}: 4 alone has less than half of {p.sum():g}, with a 3 it is more")
    assert p[0] < top_p * p.sum() < p[:2].sum()


if HAS_TRITON:

    @triton.jit
    def keys_kernel(x_ptr, key_ptr, kept_ptr, count_ptr, N: tl.constexpr, K: tl.constexpr, MOST: tl.constexpr):
        i = tl.arange(0, N)
        key = draw._sortable_keys(tl.load(x_ptr + i), 16)
        tl.store(key_ptr + i, key)
        key, first = tl.reshape(key, (N // 8, 8)), tl.arange(0, N // 8) * 8
        count, _ = draw._keep_largest(key, first, tl.min(key), tl.max(key), kept_ptr, N, K, MOST)
        tl.store(count_ptr, count)


def kept(x, k, most):
    """(the keys of x, which of them are kept as the k largest, where so many may be kept)."""
    key, places, count = (torch.full((n,), -1, dtype=torch.int32, device=DEVICE) for n in (len(x), most, 1))
    keys_kernel[(1,)](x.to(DEVICE), key, places, count, len(x), k, most)
    assert (places[count.item() :] == -1).all()
    return key.cpu(), places[: count.item()].tolist()


@needs_kernels
def test_keys_and_the_k_largest_equals_twin():
    x = torch.tensor([1.0, 0.0, -0.0, -1.0, float("inf"), -float("inf"), float("nan"), 1.0], dtype=torch.float16)
    key, five = kept(x, 5, 5)
    one, zero, negative_zero, minus_one, *others, again = key.tolist()
    assert said(
        draw, f"1.0 is 0x3C00 and becomes {one}, 0.0 and -0.0 become {zero}, and -1.0, 0xBC00, becomes {minus_one}"
    )
    assert one == again and zero == negative_zero and others == [65535] * 3
    assert five == [0, 4, 5, 6, 7]
    assert kept(x, 4, 4)[1] == [0, 4, 5, 6]  # one of the two 1.0 only: the first


@needs_kernels
@pytest.mark.parametrize("k, most", [(1, 1), (5, 5), (5, 8), (50, 64), (64, 64), (100, 128)])
def test_whatever_the_numbers_the_largest_are_kept_equals_twin(k, most):
    """All of the k largest, the first among equals; and no other before all that are larger."""
    gen = torch.Generator().manual_seed(k)
    normal = torch.randn(128, generator=gen)
    same, steep = torch.full((128,), -2.5), 30000 * torch.rand(128, generator=gen) ** 20
    for x in (normal, normal.round(), same, steep, torch.cat((same[1:], normal[:1])), torch.arange(128.0)):
        key, got = kept(x.half(), k, most)
        order = key.sort(descending=True, stable=True).indices.tolist()
        assert k <= len(got) <= most and got == sorted(order[: len(got)])


@needs_triton
def test_some_more_than_the_largest_may_stay_in_the_example():
    numbers, k, most = [9, 3, 7, 1, 5, 2], 2, 4
    told = f"k = {k} of the integers {' '.join(map(str, numbers))}, of which {most} may stay"
    low, high = min(numbers), max(numbers)
    middle = high - (high - low) // 2
    upper = sum(n >= middle for n in numbers)
    assert said(draw, f"{told}: the upper half of {low} to {high} is {middle} to {high}, and there are {upper} of them")
    assert k <= upper <= most


# -- rounds.py ----------------


@needs_kernels
def test_what_is_looked_up_in_the_example_equals_twin():
    ids, where = [7, 4, 5, 9, 4, 5, 8, 5, 4, 5], torch.tensor([[9]], device=DEVICE)
    history = torch.tensor([[*ids, *[0] * 8]], device=DEVICE)
    twin = history.clone()
    rounds.look_up_(history, where, 8)
    look_up_(twin, where, 8)
    assert torch.equal(history, twin)
    told, last, found = (" ".join(map(str, part)) for part in (ids[:-2], ids[-2:], history[0, 10:14].tolist()))
    assert said(rounds, f"the ids {told} and then {last}, whose last is at position 9", f"and {found} is proposed")
    assert said(rounds, f"then again {' '.join(map(str, history[0, 14:].tolist()))}:")


@needs_triton
def test_a_round_of_the_example_emits_what_the_target_says():
    q, p = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.2, 0.5, 0.3])
    accepted, left = (p / q).clamp(max=1)[:2], (p - q).clamp(min=0)
    assert said(rounds, "q = {}, {}, 0 and p = {:.1f}, {:.1f}, {:.1f}".format(*q.tolist()[:2], *p.tolist()))
    assert accepted[1] == 1 and said(rounds, f"the first for u < {accepted[0]:.1f}")
    assert left.count_nonzero() == 1 and said(rounds, f"what is left is 0, 0, {left[2]:.1f}, so the third is drawn")
    assert torch.allclose(torch.cat((q[:2] * accepted, q[:1] * (1 - accepted[0]))), p)


# -- the files ----------------


def in_kernel(function):
    return any(ast.unparse(d).startswith(("triton.jit", "triton.constexpr_function")) for d in function.decorator_list)


@pytest.mark.parametrize("name", ["launch.py", "step.py", *KERNELS])
def test_what_runs_outside_kernels_is_annotated(name):
    """What ruff and mypy do not look for in these files, for Triton's functions take anything."""
    for function in ast.walk(ast.parse((FOLDER / name).read_text("utf-8"))):
        if isinstance(function, ast.FunctionDef):
            a = function.args
            bare = {p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.annotation is None}
            if in_kernel(function):
                constants = {p.arg for p in a.args if p.arg.isupper() or p.arg == "dtype"}
                assert {p.arg for p in a.args} - bare == constants, function.name
                assert function.returns is None, function.name
            else:
                assert not bare and function.returns is not None, function.name


@pytest.mark.parametrize("name", KERNELS)
def test_a_file_reads_from_its_kernels_to_its_functions(name):
    """The mathematics with a worked example; then kernels; then the operators, which are the public functions."""
    tree = ast.parse((FOLDER / name).read_text("utf-8"))
    assert "Worked example" in ast.get_docstring(tree)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    public = [f for f in functions if not in_kernel(f) and not f.name.startswith("_")]
    assert public and all(ast.get_docstring(f) for f in public)
    kernels = [f.lineno for f in functions if in_kernel(f)]
    operators = [f for f in public if any("operator(" in ast.unparse(d) for d in f.decorator_list)]
    assert operators and min(kernels) < min(f.lineno for f in operators)
    assert len(ast.get_docstring(tree).splitlines()) > 15
