"""Products and attention of one row of activations, written for Inductor, which makes loops of them in a layer.

Knows how Inductor vectorizes a sum, and what its vectors of 256 and of 512 bits load well. Refuses to know modules.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def short() -> bool:
    """Whether a vector has 256 bits, and the code of Inductor's that loads eight bytes waits for its own writes."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def sums(x: Tensor, w: Tensor) -> Tensor:
    """x [1, K] by w [N, K] as a loop for Inductor, which reads four rows of w at a time: a sum of one row waits for its
    own last addition, and 2048 x 8192 of bf16 took 4.0 ms instead of 2.6. The view, which changes nothing, makes it
    store x first: else it norms x anew for every four rows, and 49152 x 576 of int8 take 1.44 ms instead of 0.85. Of
    more than 4,096 numbers it makes a cascade of sums, which takes 0.85 ms for 2048 x 8192 of int8 instead of 0.63.
    """
    x, k = x.as_strided(x.shape, x.stride()), x.shape[-1]
    pieces = next(n for n in range(1, k + 1) if k % n == 0 and k // n <= 4096)
    return torch.cat([(part.float() * x).unflatten(-1, (pieces, -1)).sum(-1).sum(-1) for part in w.chunk(4)])[None]


def word_sums(x: Tensor, words: Tensor) -> Tensor:
    """`sums` for int8 [N, K] as float32 [N, K / 4], each of the bits of four integers, where vectors are `short`: then
    49152 x 576 take 1.3 ms instead of 13. A word's bytes, each where it stands, are made floats, whose powers of 256
    leave with x. The sign bits of the lower three are turned, which makes them positive, 128 more than they were.

        word 0xFE030201 ^ 0x00808080 = 0xFE838281: 0x81 - 128 = 1, 0x8200 / 256 - 128 = 2, ..., and -2 * 2^24 / 2^24
    """
    bytes_, (flipped, masks) = x.view(-1, 4), (0x00808080, (0xFF, 0xFF00, 0xFF0000, -0x1000000))
    columns = torch.stack([bytes_[:, j] * 256.0**-j for j in range(4)])
    columns = columns.as_strided(columns.shape, columns.stride())  # stored, as in `sums`
    y = []
    for part in words.chunk(4):
        q = part.view(torch.int32) ^ flipped
        terms = [(q & mask).float() * column for mask, column in zip(masks, columns)]
        y.append((terms[0] + terms[1] + terms[2] + terms[3]).sum(-1))
    return (torch.cat(y) - 128 * bytes_[:, :3].sum())[None]


def sums_int4(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, half: int) -> Tensor:
    """float32 x [1, K] by ((q - zero) * scale) [N, K] as loops for Inductor, in whole blocks whose bytes hold rows
    that are `half` a block apart: float32 [1, N]; scale, zero [N, G].

    The rows lie side by side in the processor's vectors, and a column is one step for all of them. A byte is 16 times
    its high digit and its low one, so two sums give both digits' products without a shift: of all bytes, and of the low
    digits. Of a column's bytes each half has sums of its own, for a sum waits for its own last addition. The 8 that was
    added to q leaves with 8 times the sum of x.
    """
    groups, k = scale.shape[-1], x.shape[-1]
    x = x.as_strided(x.shape, x.stride()).view(groups, -1, 1)  # stored, as in `sums`
    halves = packed.view(-1, groups, k // groups, 2, half // 2).to(torch.int32).unbind(3)
    low = [((b & 15).float() * x).sum(2)[:, :, None, None] for b in halves]
    high = [0.0625 * ((b.float() * x).sum(2)[:, :, None, None] - digit) for b, digit in zip(halves, low)]
    first = torch.arange(2)[:, None] == 0
    digits = torch.where(first[:, None], torch.where(first, *low), torch.where(first, *high))
    scales, zeros = (  # [blocks, G, 2 digits, 2, half / 2], as the digits
        t if t is None else t.view(-1, 2, 2, half // 2, groups).permute(0, 4, 1, 2, 3).float() for t in (scale, zero)
    )
    offset = x.sum(1)[:, :, None, None] * (8 if zeros is None else 8 + zeros)
    return ((digits - offset) * scales).sum(1).view(1, -1)


def int4_word_sums(x: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    """`sums_int4` without zero points where vectors are `short`, for integers that `cpu_int4.lay` has packed, as
    float32, and `lanes` of scales: float32 [M, K] -> [M, N].

    A word holds eight digits of eight rows, and eight words of a column fill a vector. A digit stays where it stands in
    the word, 16^d times too large, and the highest, as it is the word's sign, is turned, not 8 too large. One loop has
    all eight sums, for which the registers suffice if the compiler is told to save them: see `inductor.prepare`.
    """
    blocks, groups, digits, lanes = scales.shape
    size = x.shape[-1] // groups
    powers = torch.tensor([16.0**-d for d in range(digits)])[:, None]
    eights = torch.tensor([8.0 * (d < 7) for d in range(digits)])[:, None]
    q = words.view(torch.int32).view(blocks * groups, 1, size, lanes) ^ -0x80000000
    x = x.as_strided(x.shape, x.stride()).view(-1, groups, size, 1).transpose(0, 1)  # stored, as in `sums`
    every = x.expand(blocks, *x.shape).flatten(0, 1)  # one loop over blocks and groups, which threads share evenly
    masks = [15 << 4 * d if d < 7 else -1 << 28 for d in range(digits)]
    sums = torch.stack([((q & mask).float() * every).sum(2) for mask in masks], 2)  # of [blocks * groups, M, lanes]
    exact = sums.unflatten(0, (blocks, groups)) * powers - x.sum(2)[..., None] * eights
    y = (exact * scales[:, :, None].float()).sum(1).transpose(0, 1).flatten(1)  # of [blocks, M, digits, lanes]
    return y.as_strided(y.shape, y.stride())


def lanes(scale: Tensor) -> Tensor:
    """scale [N, G] in the order of `int4_word_sums`: [blocks, G, 8, 8]."""
    return scale.view(-1, 8, 8, scale.shape[-1]).movedim(-1, 1).contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, position: Tensor, window: int) -> Tensor:
    """Attention of one token, q [H, Dh] over slots k, v [Hkv, S, Dh], as sums that Inductor fuses with what surrounds
    them; two products would be two calls of a library, 60 us a layer.
    """
    q, k, v = (x.float() for x in (q.unflatten(0, (len(k), -1, 1)), k[:, None], v[:, None]))
    scores, slots = (q * k).sum(-1) * q.shape[-1] ** -0.5, torch.arange(k.shape[2])  # [Hkv, H / Hkv, S]
    keep = (slots <= position) & (slots > position - (window or len(slots)))
    scores = scores.masked_fill(~keep, float("-inf"))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))  # softmax, which is divided by its sum at the end
    return ((weights[..., None] * v).sum(2) / weights.sum(-1, keepdim=True)).flatten()[None, None]
