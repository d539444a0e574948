"""Triton kernels, and PyTorch's CPU operators, for decoding at the speed of the memory bus: the front door.

Knows on which devices they run, and what the engine asks for besides a model's modules. `use_(model)` sets the field
`fast` of the modules: to the Triton kernels (`gpu.py`), or on a CPU to PyTorch's operators (`cpu.py`). A fast path
returns None for what it does not serve, and the module goes on in plain PyTorch. Every other file here holds the
kernels of one subject and the operators that launch them; all are imported, and Triton with them, when the first is
wanted. Refuses to know files, and how a model is run.

How they come near the memory's speed (measurements in benchmarks/NOTES.md):

- 16-bit weights and up to four rows: small programs that ask for all their weights at once, in the memory's order. The
  tensor cores multiply, at the price of products that nobody wants: converting and adding took longer than reading.
  More rows: the wanted products alone, the loads of the next steps passing through shared memory meanwhile.
- int8 and int4 weights: a GPU has no time to make floats of them. The activations become integers instead, two int8
  digits of a block floating-point number that is finer than bf16 (`digits.py`), and the tensor cores
  multiply integers exactly. One row uses two of their eight columns, four rows use all: up to eight rows are nearly
  free.
- Registers are operands: weights are packed so that the 16 bytes which a lane loads are what m16n8k32 wants there.
  Lanes are dealt to axis 0 of such pointers, then 1, warps to axis 2, and the last axis is a lane's own. It takes
  `max_contiguous` to say so: of axes without contiguous addresses Triton 3.6 takes the first, later versions the last.
  Only the order of its numbers counts, for the last axis, which a lane loads in one piece, is contiguous or one long.
- The compiler must not move a load down to its use, nor a product up before a load. Nothing says so to it, but a second
  `gdc_wait`, which returns at once, stops the one, and a branch that is always taken the other.
- A prefill has PyTorch's products and attention; the rotation, the cache write and the gate around them are kernels
  (`prefill.py`), each of which reads and writes the activations once.
- A kernel is launched while the one before it runs (programmatic dependent launch), asks for what no kernel writes, its
  weights above all, and then waits. A forward pass begins with PyTorch's own kernels, which end before the next starts.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import Transformer
from sampling import Structure
from speculative import FastRounds
from tp import FastCollectives

Letters = tuple[Tensor | int, ...] | None  # where a product whose result is summed over ranks sends it: `dense.run`
ROWS = 16  # of activations in one launch, at most
# Triton runs its kernels in its CPU interpreter (for tests); it reads the variable when it is imported, as this does
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def supported(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device; elsewhere plain PyTorch serves."""
    able = INTERPRETED or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
    return able and importlib.util.find_spec("triton") is not None


def use_(model: nn.Module, on: bool = True, compiled: bool = False) -> Callable[..., Tensor]:
    """Set the fast path of every module under `model` that has one, or clear it. The weights must lie where they will
    be used; quantized ones are laid out anew, one matrix at a time. compiled: whether torch.compile makes the steps.
    Returns what calls a layer, or the head, where it does not.
    """
    if not INTERPRETED and all(t.is_cpu for t in (*model.parameters(), *model.buffers())):
        from decode_kernels import cpu, cpu_step

        cpu.use_(model, on, compiled)
        return cpu_step.Layers(model)
    if on or any(vars(module).get("fast") for module in model.modules()):
        from decode_kernels import gpu, sums

        gpu.use_(model, on)
        for module in model.modules():
            if isinstance(module, Transformer):
                if on and module.tp.fast is None:  # once: a captured program writes into these mailboxes for ever
                    module.tp.fast = connect(module)
                if module.tp.fast is not None:
                    sums.use_(module, on)
    return nn.Module.__call__


class Run(NamedTuple):
    """What will be run: the model over `slots` cache slots of every row, with so many new tokens of a row in a step,
    and prefills of so many; structure: of the sampling, which may be a kernel. drafts: whether a model
    drafts the tokens that a round verifies; None where nobody speculates. listed: whether ranks draw from lists.
    """

    model: Transformer
    batch_size: int
    slots: int
    tokens: Iterable[int]
    prefills: Iterable[int]
    structure: Structure
    drafts: bool | None = None
    listed: bool = False


def compiling_ahead(
    runs: Sequence[Run], device: torch.device, tell: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    """Compiles what these runs need and the disk does not hold, side by side, while the body runs; see `ahead.py`."""
    if INTERPRETED or sys.platform != "linux":
        return contextlib.nullcontext()
    from decode_kernels import ahead

    return ahead.compiling_ahead(ahead.stand_in(device), runs, ahead.processors(), tell)


def connect(model: Transformer) -> FastCollectives | None:
    """`TensorParallel.fast`, where the ranks' GPUs reach each other's memory; every rank must call it."""
    if INTERPRETED or model.tp.words is None:
        return None
    from decode_kernels import reduce

    return reduce.connect(model.tp, model.norm.weight.device)


def samples(dtype: torch.dtype, vocabulary: int, rows: int, structure: Structure) -> bool:
    """Whether `sample` and `advance_` serve such logits of a model on which `use_` was called."""
    able = rows <= 1024 and structure.top_k < vocabulary <= 1 << 19 and dtype in (torch.bfloat16, torch.float16)
    return able and (structure.greedy or 0 < structure.top_k <= 256)


def sample(
    logits: Tensor,
    structure: Structure,
    knobs: Tensor,
    seeds: Tensor,
    positions: Tensor,
    seen: Tensor | None = None,
    *,
    first: int = 0,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`sampling.sample` for what `samples`, in two kernels; with `gather` `shortlist.sample`, in four."""
    from decode_kernels import draw

    top_k = structure.top_k or 1
    source = logits if gather is None else gather(draw.shortlist(logits, top_k, first))
    if structure.penalty and seen is not None:
        source = draw.penalise(logits[:, None], seen, knobs, None, None)[:, 0]
    return draw.sample(source, knobs, seeds, positions, top_k, structure.top_p)


def fast_rounds(dtype: torch.dtype, vocabulary: int, rows: int, structure: Structure) -> FastRounds | None:
    """What surrounds the models in a round, where `samples`."""
    if not samples(dtype, vocabulary, rows, structure):
        return None
    from decode_kernels import rounds

    return rounds


def advance_(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    """`engine.advance_` in one kernel."""
    from decode_kernels import step as ends

    ends.advance_(tokens, token, position, step, out)
