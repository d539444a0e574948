"""What the kernels share: how they are launched, and the functions inside them that more than one file uses.

Knows Triton, its launch options and its compiler's habits. Refuses to know matrices, caches and tokens.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from decode_kernels import INTERPRETED

LIBRARY = torch.library.Library("decode", "FRAGMENT")


def operator(name: str, launch: Callable, shape: Callable, mutates: Sequence[str] = ()) -> Callable:
    """The operator `torch.ops.decode.<name>`, which torch.compile takes as a whole. launch runs it; shape gives its
    results without contents, for tracing; mutates names the arguments that it changes.

    Not `torch.library.custom_op`, whose first call imports Dynamo and sympy, 1.3 s of every start.
    """
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    LIBRARY.define(name + torch.library.infer_schema(launch, mutates_args=mutates), tags=tags)
    LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"decode::{name}", shape, lib=LIBRARY)
    return getattr(torch.ops.decode, name)


def _shared_memory() -> int:
    """Bytes of shared memory that one program may have on the current device."""
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"]


def _launch(warps: int, stages: int = 1) -> dict[str, bool | int | None]:
    """Launch options: programmatic dependent launch (PDL) from sm90 on."""
    if INTERPRETED:
        return {"PDL": False, "num_warps": warps}
    pdl = triton.runtime.driver.active.get_current_target().arch >= 90
    return {"PDL": pdl, "num_warps": warps, "num_stages": stages, "launch_pdl": pdl}


@triton.jit
def _at(ptr: tl.tensor, offset: tl.tensor) -> tl.tensor:
    """ptr + offset, lanes, then warps, dealt to the axes in order; the last axis is a lane's own. The hint is the
    sum's: with an argument of a function it would not stay.
    """
    ptr += offset
    if len(ptr.shape) == 6:
        ptr = tl.max_contiguous(ptr, [64, 32, 16, 8, 1, 128])
    else:
        ptr = tl.max_contiguous(ptr, [64, 32, 16, 8, 1, 1, 128])
    return ptr


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """acc + a @ b, batched or not. The interpreter (not ASM) knows no bf16 product."""
    if not ASM:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _halved(x: tl.tensor, AXIS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The two halves of [n, rows, columns] along axis 0 or 1."""
    if AXIS == 0:
        x = x.reshape(2, x.shape[0] // 2, x.shape[1], x.shape[2]).permute(1, 2, 3, 0)
    else:
        x = x.reshape(x.shape[0], 2, x.shape[1] // 2, x.shape[2]).permute(0, 2, 3, 1)
    return tl.split(x)
