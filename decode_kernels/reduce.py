"""Sums over ranks, and what else ranks tell each other in a decode step: one kernel each, within one machine.

Knows mailboxes: memory of every GPU into which the others write. Refuses to know models and what the numbers mean.

A small all-reduce takes 32.6 us by NCCL between two H200s, by this kernel 2.4 us (`benchmarks/NOTES.md`). Every rank
writes its numbers as letters (`letters.py`) into a mailbox of each rank, its own too, then waits until its own mailbox
is full and adds what lies there up, in the order of the ranks: so all ranks compute the same bits. The many sums of a
step do without this kernel (`sums.py`).

Worked example, two ranks, message 7 of each, one word: rank 0 holds the numbers (1.0, 2.0) in bf16, 0x40003F80, and
sends 0x00000007_40003F80; rank 1 holds (3.0, 0.5) and sends 0x00000007_3F004040. Both then find these two letters in
their mailbox and add them to (4.0, 2.5).

**Reuse.** A mailbox has room for two messages of each rank, the odd and the even ones. Rank A sends message k + 2 after
it has received message k + 1 of every other rank B, and B sent that after its kernel of message k had ended, so B no
longer needs the place into which A writes. Every program has its own counter and its own part of the mailbox.

**Whoever does not answer.** A program looks at most `TRIES` times, some seconds.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import os
import socket

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric

from decode_kernels import launch
from decode_kernels.letters import LETTERS, letters_of, of_rank, receive
from tp import TensorParallel

BLOCK = 256  # words of one program, which is one warp: it waits without barriers
CAPACITY = 1024 * BLOCK  # words of a message, at most: half a million 16-bit numbers
TRIES = 1 << 24


# -- the kernel ----------------


@triton.jit
def _send(word, boxes_ptr, rank, number, at, mask, SIZE: tl.constexpr, CAPACITY: tl.constexpr):
    """This rank's words, each with the number of the message, into the mailbox of every rank."""
    letter = letters_of(word, number)
    for reader in tl.static_range(SIZE):
        box = tl.load(boxes_ptr + reader).to(tl.pointer_type(tl.int64))
        tl.store(box + ((number & 1) * SIZE + rank) * CAPACITY + at, letter, mask)


@triton.jit
def _numbers(word, DTYPE: tl.constexpr):
    """The two 16-bit floats of a word, in float32."""
    low = (word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = ((word >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _word(low, high, DTYPE: tl.constexpr):
    """The inverse of `_numbers`."""
    low = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    high = high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    return (high << 16) | (low & 0xFFFF)


@triton.jit(do_not_specialize=["n", "rank", "tries"])
def _exchange_kernel(
    word_ptr,  # the message, int32 [n]
    out_ptr,  # int32 [n] of the sum, or [SIZE, n]: the messages of all ranks
    boxes_ptr,  # the address of every rank's mailbox, int64 [SIZE]
    counter_ptr,  # how many messages each program has sent, int32
    n,
    rank,
    tries,
    DTYPE: tl.constexpr,  # of the numbers to add; None: keep them apart
    SEND: tl.constexpr,  # tests of the sum send for all ranks first, and then receive
    RECEIVE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    launch.launch_next(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    launch.wait_for_previous(PDL)
    number = tl.load(counter_ptr + tl.program_id(0)) + 1
    if SEND:
        _send(tl.load(word_ptr + at, mask, 0), boxes_ptr, rank, number, at, mask, SIZE, CAPACITY)
    if RECEIVE:
        box = tl.load(boxes_ptr + rank).to(tl.pointer_type(tl.int64)) + (number & 1) * SIZE * CAPACITY
        words = receive(box, number, at, mask, tries, SIZE, CAPACITY)
        low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for writer in tl.static_range(SIZE):
            word = of_rank(words, writer)
            if DTYPE is None:
                tl.store(out_ptr + writer * n + at, word, mask)
            else:
                one, other = _numbers(word, DTYPE)
                low, high = low + one, high + other
        if DTYPE is not None:
            tl.store(out_ptr + at, _word(low, high, DTYPE), mask)
        tl.store(counter_ptr + tl.program_id(0), number)


# -- its operator ----------------


def _exchange_shape(x: Tensor, boxes: Tensor, counter: Tensor, rank: int, add: bool) -> Tensor:
    return x.new_empty(x.shape) if add else x.new_empty(len(boxes), *x.shape)


@launch.operator("exchange", _exchange_shape, mutates=("counter",))
def exchange(x: Tensor, boxes: Tensor, counter: Tensor, rank: int, add: bool) -> Tensor:
    """The sum over ranks of x (bf16 or fp16, contiguous, added in float32), or the x of all ranks, [size, *x.shape].

    boxes int64 [size]: addresses of the mailboxes, of CAPACITY letters for each of two messages of each rank; counter
    int32 [CAPACITY / BLOCK], zero at the start.
    """
    return run(x, boxes, counter, rank, add)


def run(
    x: Tensor,
    boxes: Tensor,
    counter: Tensor,
    rank: int,
    add: bool,
    *,
    send: bool = True,
    receive: bool = True,
    tries: int = TRIES,
) -> Tensor:
    """`exchange`, or half of it, or with less patience."""
    out, words = _exchange_shape(x, boxes, counter, rank, add), x.view(-1).view(torch.int32)
    _exchange_kernel[(triton.cdiv(len(words), BLOCK),)](
        words,
        out.view(-1).view(torch.int32),
        boxes,
        counter,
        len(words),
        rank,
        tries,
        DTYPE={torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype] if add else None,
        SEND=send,
        RECEIVE=receive,
        SIZE=len(boxes),
        BLOCK=BLOCK,
        CAPACITY=CAPACITY,
        **launch.options(1),
    )
    return out


# -- the mailboxes ----------------


class Mailboxes:
    """`TensorParallel.fast`: what ranks tell each other through mailboxes. None is returned for what does not fit."""

    def __init__(self, box: Tensor, boxes: Tensor, rank: int, owner: object = None) -> None:
        self.box, self.boxes, self.rank, self.owner = box, boxes, rank, owner  # kept as long as others may write there
        self.counter = torch.zeros(CAPACITY // BLOCK, dtype=torch.int32, device=boxes.device)
        self.sums: list[object] = []  # captured programs use them as long as they live

    def fits(self, x: Tensor) -> bool:
        return x.nbytes % 4 == 0 and 0 < x.nbytes <= 4 * CAPACITY and not torch.compiler.is_compiling()

    def all_reduce(self, x: Tensor) -> Tensor | None:
        """The sum over ranks of x, bf16 or fp16: the same bits on every rank."""
        if not self.fits(x) or x.dtype not in (torch.bfloat16, torch.float16):
            return None
        return exchange(x.contiguous(), self.boxes, self.counter, self.rank, True)

    def gather(self, x: Tensor) -> Tensor | None:
        """The x of all ranks, [size, *x.shape]."""
        return exchange(x.contiguous(), self.boxes, self.counter, self.rank, False) if self.fits(x) else None


def box_of(size: int, device: torch.device) -> Tensor:
    """An empty mailbox for messages of `size` ranks."""
    return torch.zeros(2 * size * (CAPACITY + LETTERS.value), dtype=torch.int64, device=device)


def connect(tp: TensorParallel, device: torch.device) -> Mailboxes | None:
    """Mailboxes between the GPUs of the ranks; None, on all ranks, where they are not on one machine or one of them
    cannot write into another's memory. Every rank must call it.
    """
    places: list[tuple[str, int]] = [("", 0)] * tp.size
    dist.all_gather_object(places, (socket.gethostname(), device.index), group=tp.words)
    able = all(
        host == socket.gethostname() and (i == device.index or torch.cuda.can_device_access_peer(device.index, i))
        for host, i in places
    )
    answers = [able] * tp.size
    dist.all_gather_object(answers, able, group=tp.words)
    if not all(answers) or len(set(places)) < tp.size:
        return None
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # it is not needed
    box = symmetric.empty(2 * tp.size * (CAPACITY + LETTERS.value), dtype=torch.int64, device=device).zero_()
    handle = symmetric.rendezvous(box, dist.group.WORLD)
    boxes = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
    torch.cuda.synchronize(device)
    dist.barrier(group=tp.words)  # nobody writes before all mailboxes are empty
    return Mailboxes(box, boxes, tp.rank, handle)
