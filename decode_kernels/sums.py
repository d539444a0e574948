"""The sum over ranks at the end of a block, without a kernel that sends.

Knows which product of a model ends with a sum, and who reads it. Refuses to know how a product is computed.

    block's last product, on every rank         letters, float32          sum, on every rank
    x W^T (+ residual, on rank 0)      ->  into the mailbox of every rank  ->  added in the order of the ranks

The epilogue of the product sends its results as letters (`letters.py`) where it would have stored them, and a small
kernel waits for those of all ranks, adds them and stores the sum. That kernel is launched while the product still runs
and looks into its mailbox from then on; it waits for the end of the product last, so that one way over NVLink and the
end of a kernel are waited for side by side. Where int8 or int4 weights read the sum next, the same kernel also makes
the digits of the activations, which would be a kernel of its own. On two H200s a step of Llama-2-7B in bf16 takes
1.815 ms so, and 1.900 with all-reduces by `reduce.py`; Llama-3.1-8B in int4 0.996 ms and 1.108 (1.043 with digits in
kernels of their own; 1.016 where the wait for the product comes first).

**Numbers.** Every sum of a model, two a layer, has a number of its own for every SLICE results, which the product reads
and the sum advances by NEXT. It begins with the place of the sum among all sums, so no two sums ever have equal
numbers, and a letter that an earlier sum has left is told from the one that is waited for. The kernel of the sum reads
its numbers before the kernels in front of it have ended, but they have not changed since the last step, and a step
begins with a kernel that starts when all before has ended (`step.embed`).

Worked example, three sums: they number their first messages 1, 2, 3 and their second ones 65537, 65538, 65539.

**Reuse.** Sums with even and with odd places in the model have a half of the mailbox each. Rank A sends sum k + 2 after
its sum k + 1 was complete, so every other rank B had sent its part of that. B's product sends after all kernels before
it have ended, so B's sum k was complete, and B no longer needs the letters over which A writes. Between two
steps, and wherever another collective stands between two sums, that collective takes the place of sum k + 1.

**Memory.** The sum is written while the product may still run on this rank, but not before each of its programs which
contribute has read all it needs. So what the sum writes is allocated before the product: memory that the product frees
is not written by its own sum.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels import ROWS, launch, reduce
from decode_kernels.digits import Digits, Left, empty_digits, fill_digits_
from decode_kernels.gpu import Dense, Quantized, serves
from decode_kernels.letters import LETTERS, SLICE, receive_sum
from linear import Linear, QuantizedLinear
from model import MLP, Attention, Transformer


@triton.jit(do_not_specialize=["n"])
def _sum_kernel(incoming, out_ptr, n, SIZE: tl.constexpr, PDL: tl.constexpr):
    """A slice of the sum."""
    launch.launch_next(PDL)
    at = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    y = receive_sum(incoming, tl.program_id(0), at < n, SIZE)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), at < n)
    launch.wait_for_previous(PDL)


class Sum:
    """`fast_sum` of a block: its last product and the sum over ranks. With the gain of the norm that comes next, the
    sum also leaves its digits.
    """

    def __init__(self, boxes: reduce.Mailboxes, gain: Tensor | None = None) -> None:
        place, size = len(boxes.sums), len(boxes.boxes)
        first = 2 * size * reduce.CAPACITY + place % 2 * size * LETTERS.value
        self.gain, self.box = gain, boxes.box[first : first + size * LETTERS.value]
        self.numbers = torch.full((LETTERS.value // SLICE.value,), place + 1, dtype=torch.int32, device=self.box.device)
        self.letters = (self.numbers, *(at + 8 * (first + boxes.rank * LETTERS.value) for at in boxes.boxes.tolist()))
        self.left = Left()
        boxes.sums.append(self)

    def __call__(self, proj: Linear, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The sum over ranks of proj(x) and the residual, if there is one; None where the kernels do not serve."""
        fast, rows, n = proj.fast, x.reshape(-1, x.shape[-1]), proj.out_features
        ordered = isinstance(proj, QuantizedLinear) and proj.permutation is not None  # `Int4Linear.forward` sees to it
        if not isinstance(fast, Dense) or not fast.covers(proj) or not serves(x) or ordered:
            return None
        if len(rows) > ROWS or len(rows) * n > LETTERS.value or torch.compiler.is_compiling():
            return None
        digits = None if self.gain is None or n % SLICE.value else empty_digits(rows, len(rows), n, norm=True)
        added = None if residual is None else residual.reshape(-1, n)
        product = fast.product(proj, None, False, self.letters)
        assert product is not None  # only gates and ups may have none
        out = product(rows, proj.bias, None, 0.0, added, False, None)
        return self.receive_(out, digits).view(*x.shape[:-1], n)

    def receive_(self, out: Tensor, digits: Digits | None = None, tries: int = reduce.TRIES) -> Tensor:
        """Fill what the product has returned, and the digits."""
        incoming = self.box, self.numbers, tries
        if digits is None:
            grid = (triton.cdiv(out.numel(), SLICE.value),)
            _sum_kernel[grid](incoming, out, out.numel(), SIZE=len(self.letters) - 1, **launch.options(1))
        else:
            self.left.keep(out, fill_digits_(out, self.gain, digits, incoming=incoming))
        return out


def use_(model: Transformer, on: bool) -> None:
    """Set or clear `fast_sum` of the blocks. A product with integers takes the digits of the sum before it."""
    blocks = [block for layer in model.layers for block in (layer.self_attn, layer.mlp)]
    norms = [norm for layer in model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    readers = [next(m for m in block.modules() if isinstance(m, Linear)) for block in blocks]
    for block, reader, norm in zip(blocks, [*readers[1:], model.lm_head], [*norms[1:], model.norm]):
        if not isinstance(block, (Attention, MLP)) or not isinstance(model.tp.fast, reduce.Mailboxes):
            continue
        block.fast_sum = None
        if on:
            fast = reader.fast if norm is not None else None
            block.fast_sum = total = Sum(model.tp.fast, norm.weight if isinstance(fast, Quantized) else None)
            if isinstance(fast, Quantized):
                reader.fast = Quantized(fast.bits, total.left, fast.leave)
