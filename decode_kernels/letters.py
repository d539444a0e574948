"""Letters: how numbers travel from a kernel on one GPU to a kernel on another while both run.

Knows how a letter is written, and how a kernel waits for it. Refuses to know whose letters they are.

**A letter** is 64 bits: 32 bits of the message, and above them the number of the message. The sender writes it straight
into a mailbox, memory of the receiver's GPU. 64 bits arrive whole, so whoever sees the number it waits for has the
content as well; neither flags nor fences are needed, and one way over NVLink is all that is waited for (the idea of
NCCL's LL protocol, and of the one-shot all-reduce in TensorRT-LLM and vLLM).

Worked example: message 7 says 1.5, in float32 0x3FC00000. Its letter is 0x00000007_3FC00000. A mailbox that still holds
0x00000005_40400000, 3.0 from message 5, is looked at again.

**Whoever does not answer.** A receiver looks a limited number of times, and then takes all ones for what is missing:
NaN as a float of 16 or 32 bits, -1 as an integer. The engine stops at both.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

SLICE = tl.constexpr(128)  # results of a product that one program adds up
LETTERS = tl.constexpr(1 << 17)  # results of a product that is summed over ranks, at most: 16 rows of 8,192
NEXT = tl.constexpr(1 << 16)  # from the number of one message of a sum to that of its next


@triton.jit
def letters_of(word, number):
    """Words of 32 bits and the number of their message."""
    return (number.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def receive(box_ptr, number, at, mask, tries, SIZE: tl.constexpr, CAPACITY: tl.constexpr):
    """The words [ranks, words] of all ranks from the places [SIZE, CAPACITY] of a message in this rank's mailbox, once
    all of them have come; -1 for those that never do.
    """
    writer = tl.arange(0, triton.next_power_of_2(SIZE))[:, None]
    place = box_ptr + writer * CAPACITY + at
    mask = mask & (writer < SIZE)
    letter = tl.load(place, mask, 0, volatile=True)
    missing = mask & ((letter >> 32).to(tl.int32) != number)
    while (tl.max(missing.to(tl.int32)) > 0) & (tries > 0):
        letter = tl.load(place, mask, 0, volatile=True)
        missing = mask & ((letter >> 32).to(tl.int32) != number)
        tries -= 1
    return tl.where(missing, -1, letter.to(tl.int32))


@triton.jit
def of_rank(words, writer):
    """The words of one rank from what `receive` returns."""
    return tl.sum(tl.where(tl.arange(0, words.shape[0])[:, None] == writer, words, 0), 0)


@triton.jit
def send_results(y, at, exists, number, letters):
    """Results y of a product, in float32, to the places `at` of every rank: letters is (numbers, an address for each
    rank), as `sums.py` explains.
    """
    letter = letters_of(y.to(tl.int32, bitcast=True), number)
    for i in tl.static_range(1, len(letters)):
        tl.store(letters[i].to(tl.pointer_type(tl.int64)) + at, letter, exists)


@triton.jit
def receive_sum(incoming, index, mask, SIZE: tl.constexpr):
    """The sum over ranks of the index-th SLICE of their results, float32, in the order of the ranks: incoming is
    (mailbox, numbers, tries).
    """
    box_ptr, numbers_ptr, tries = incoming
    number = tl.load(numbers_ptr + index, volatile=True)  # not from the L1 cache: this kernel waits for no other first
    words = receive(box_ptr, number, index * SLICE + tl.arange(0, SLICE), mask, tries, SIZE, LETTERS)
    y = tl.zeros([SLICE], tl.float32)
    for writer in tl.static_range(SIZE):
        y += of_rank(words, writer).to(tl.float32, bitcast=True)
    tl.store(numbers_ptr + index, number + NEXT)
    return y
