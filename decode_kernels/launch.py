"""How the kernels are launched and registered, and the compiler tricks that they share, each under a name.

Knows Triton, its launch options and the habits of its compiler. Refuses to know matrices, caches and tokens.

Decoding Llama-2-7B runs 160 to 290 small kernels a token, and each of them mostly waits for memory. Three things decide
how long:

1. When the loads of the weights are issued. From sm90 on a kernel may start while the one before it still runs
   (programmatic dependent launch, PDL). It then loads what no kernel writes, its weights above all, and waits for the
   results of the kernel before it only when it needs them:

       kernel A   launch_next ....... multiplies ....... stores, ends
       kernel B               starts, loads its weights | wait_for_previous | loads what A stored, multiplies

   A chain of kernels that do nothing takes 0.73 us a kernel with PDL and 1.00 us without; `launch_next` as the first
   statement of every kernel saved 5 to 10% of the products with one row.
2. Whether the compiler leaves the loads there. Nothing tells it to, so two statements that do nothing at run time are
   used as obstacles: it moves no load down across `keep_loads_here`, and no product up across a branch on
   `always_true`. With the branch alone a layer of Llama-2-7B took 36.8 us instead of 38.7 in int4, 53.0 instead of
   56.7 in int8.
3. Whether a value is in the lane that needs it. The tensor cores say which lane holds which part of an operand, and a
   load that puts every byte there needs no shared memory. `deal_to_lanes` is how a pointer tells Triton which lane
   loads what.

Worked example of 3. Pointers of the shape [4, 8, 2, 3, 1, 16] to bytes, with 2 warps. Axis 0 and axis 1 are dealt to
the 32 lanes, axis 2 to the warps, the last axis is one load of 16 bytes, and what is between is further loads of the
same lane. So element [3, 2, 1, 0, 0, 5] is loaded by lane 3 + 4 * 2 = 11 of warp 1: byte 5 of its first load of three.

The measurements are of one H200 (`benchmarks/NOTES.md`).
"""

# What runs inside a kernel has no annotations but `tl.constexpr`; every other function has all, which a test checks.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import functools
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from decode_kernels import INTERPRETED

LIBRARY = torch.library.Library("decode", "FRAGMENT")
ASKED = 4 << 20  # bytes of a matrix that the L2 cache is asked for before the matrix is wanted


# -- inside a kernel ----------------


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Allows the next kernel in the stream to start as soon as there is room for it beside this one."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Waits until the kernel before this one has ended and all that it has stored can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def keep_loads_here(PDL: tl.constexpr):
    """Keeps the compiler from moving the loads above this statement down to where their values are used, where every
    one of them would wait for memory on its own. It is a second wait for the previous kernel, which returns at once.
    """
    if PDL:
        gdc_wait()


@triton.jit
def always_true(eps, STEP: tl.constexpr):
    """A condition that holds (eps is not negative) without the compiler's knowing it. It moves no product out of the
    branch, so the loads in front of the branch are all issued before the first product waits for one of them. Every
    branch of a kernel has a STEP of its own, for branches on the same condition would become one.
    """
    return eps != -1 - STEP


@triton.jit
def deal_to_lanes(ptr, offset):
    """ptr + offset, loaded or stored by the lanes and warps that the shape says (module docstring).

    Triton gives neighbouring addresses to neighbouring lanes, as far as it knows them, so the pointers claim to be
    contiguous along axis 0 for 64 elements, along axis 1 for 32 and so on: only the order of these numbers counts. The
    claim belongs to the operation that made the pointer, here the sum; made of an argument it would be lost silently.
    """
    ptr += offset
    if len(ptr.shape) == 6:
        ptr = tl.max_contiguous(ptr, [64, 32, 16, 8, 1, 128])
    elif len(ptr.shape) == 7:
        ptr = tl.max_contiguous(ptr, [64, 32, 16, 8, 1, 1, 128])
    else:
        ptr = tl.max_contiguous(ptr, [64, 32, 16, 8, 1, 1, 1, 128])
    return ptr


@triton.jit
def spread_over_lanes(ptr, SHAPE: tl.constexpr):
    """ptr broadcast to SHAPE, several lanes loading the same address, dealt to them like `deal_to_lanes`."""
    ptr = tl.broadcast_to(ptr, SHAPE)
    if len(ptr.shape) == 5:
        ptr = tl.max_contiguous(ptr, [64, 32, 16, 1, 128])
    elif len(ptr.shape) == 6:
        ptr = tl.max_contiguous(ptr, [64, 32, 16, 8, 1, 128])
    else:
        ptr = tl.max_contiguous(ptr, [64, 32, 16, 8, 1, 1, 128])
    return ptr


@triton.jit
def ask_for(ptr, part, BYTES: tl.constexpr):
    """Asks the L2 cache to load the part-th BYTES from ptr on: one instruction of the program's first lane (sm90)."""
    CODE: tl.constexpr = """{ .reg .pred first; .reg .u32 lane; mov.u32 lane, %tid.x; setp.eq.u32 first, lane, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"""
    given = [ptr.to(tl.int64) + part * BYTES, tl.full([], BYTES, tl.int32)]
    tl.inline_asm_elementwise(CODE, "=r,l,r", given, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def dot(a, b, acc, ASM: tl.constexpr):
    """acc + a @ b, batched or not. The interpreter (not ASM) has no bf16 product."""
    if not ASM:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def halve_warps(x):
    """The two halves of x [warps, rows, columns] along axis 0. Adding them, again and again until one is left, sums
    over warps with one exchange through shared memory; `tl.sum` stored and loaded with conflicts of 32 lanes in one
    bank (1,985 wavefronts too many a program with 16 int4 rows).
    """
    return tl.split(x.reshape(2, x.shape[0] // 2, x.shape[1], x.shape[2]).permute(1, 2, 3, 0))


# -- around a kernel ----------------


def operator(name: str, shape: Callable, mutates: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """Makes of a function the operator `torch.ops.decode.<name>`, which torch.compile takes as a whole. shape gives its
    results without contents, for tracing; mutates names the arguments that it changes.

    Not `torch.library.custom_op`, whose first call imports Dynamo and sympy, 1.3 s of every start.
    """

    def register(function: Callable) -> Callable:
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates), tags=tags)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"decode::{name}", shape, lib=LIBRARY)
        return getattr(torch.ops.decode, name)

    return register


def options(warps: int, stages: int = 1) -> dict[str, bool | int | None]:
    """What every launch says besides its arguments: warps, stages of Triton's pipeline, and PDL from sm90 on."""
    if INTERPRETED:
        return {"PDL": False, "num_warps": warps}
    pdl = triton.runtime.driver.active.get_current_target().arch >= 90
    return {"PDL": pdl, "num_warps": warps, "num_stages": stages, "launch_pdl": pdl}


def share_of(matrix: Tensor | None, programs: int) -> tuple[Tensor | None, int]:
    """(the matrix, for how many of its first bytes each program is to `ask_for`); None and 0 where nobody asks."""
    share = 0 if matrix is None or not options(1)["PDL"] else min(matrix.nbytes, ASKED) // programs // 128 * 128
    return matrix if share else None, share


def shared_memory() -> int:
    """Bytes of shared memory that one program may have on the current device."""
    return _shared_memory(triton.runtime.driver.active.get_current_device())


@functools.cache
def _shared_memory(device: int) -> int:
    """Asked once: the answer takes a millisecond, and a pass over a model asks a hundred times."""
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
