"""Sums over ranks: their arithmetic with all ranks in one process, and the waiting with two streams of one GPU."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, HAS_TRITON, compiled, needs_compiler, needs_kernels

import architectures
import decode_kernels
from model import Transformer
from tp import TensorParallel

if HAS_TRITON:
    import triton.language as tl

    from decode_kernels import reduce


def ranks(size):
    """The mailboxes of that many ranks, all in this process."""
    memory = [reduce.box_of(size, DEVICE) for _ in range(size)]
    addresses = torch.tensor([box.data_ptr() for box in memory], device=DEVICE)
    return [reduce.Mailboxes(box, addresses, rank) for rank, box in enumerate(memory)]


def one_after_another(boxes, messages, add):
    """Programs of the interpreter run one after another, so all ranks send before the first one looks."""
    halves = [(m.contiguous(), box.boxes, box.counter, box.rank, add) for box, m in zip(boxes, messages)]
    for half in halves:
        reduce.run(*half, receive=False)
    return [reduce.run(*half, send=False, tries=1) for half in halves]


@needs_kernels
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_in_the_order_of_ranks_is_the_same_on_all(size, dtype):
    boxes, gen = ranks(size), torch.Generator().manual_seed(size)
    for shape in ((1, 1, 64), (2, 3, 350), (1, 1, 64)):  # one word more than a program takes; each place used twice
        messages = [(torch.randn(shape, generator=gen) * 100).to(DEVICE, dtype) for _ in range(size)]
        wanted = torch.zeros(shape, device=DEVICE)
        for message in messages:
            wanted = wanted + message.float()
        for got in one_after_another(boxes, messages, True):
            assert torch.equal(got, wanted.to(dtype))


@needs_kernels
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
def test_gather_keeps_the_messages_apart(dtype):
    boxes = ranks(3)
    messages = [torch.arange(1100, device=DEVICE).to(dtype).view(2, -1) - 500 * rank for rank in range(3)]
    for got in one_after_another(boxes, messages, False):
        assert torch.equal(got, torch.stack(messages))


@needs_kernels
def test_a_rank_that_sends_nothing_is_noticed():
    x, token = torch.ones(8, dtype=torch.float16, device=DEVICE), torch.ones(1, dtype=torch.int64, device=DEVICE)
    first, _ = ranks(2)
    assert reduce.run(x, first.boxes, first.counter, 0, True, tries=3).isnan().all()
    _, second = ranks(2)
    assert reduce.run(token, second.boxes, second.counter, 1, False, tries=3).tolist() == [[-1], [1]]


@needs_kernels
def test_what_does_not_fit_is_left_to_others():
    box = ranks(1)[0]
    assert box.all_reduce(torch.ones(4, device=DEVICE)) is None  # float32
    assert box.all_reduce(torch.ones(3, dtype=torch.float16, device=DEVICE)) is None  # a word and a half
    assert box.gather(torch.ones(reduce.CAPACITY + 1, dtype=torch.int32, device=DEVICE)) is None
    assert box.gather(torch.ones(0, dtype=torch.int32, device=DEVICE)) is None


@needs_kernels
def test_ranks_are_connected_once(monkeypatch):
    """A second engine of the same ranks, or kernels switched off and on, must not free what captured programs use."""
    made = []
    monkeypatch.setattr(decode_kernels, "connect", lambda model: made.append(model) or object())
    model = Transformer(architectures.shape_config("tiny"), TensorParallel(0, 2)).half().to(DEVICE)
    decode_kernels.use_(model)
    first = model.tp.fast
    for on in (True, False, True):
        decode_kernels.use_(model, on)
        assert model.tp.fast is first is not None
    assert len(made) == 1


@needs_compiler
@pytest.mark.parametrize("sm, dtype", [(80, "bf16"), (90, "fp16"), (90, None)])
def test_a_letter_is_written_and_read_in_one_piece(sm, dtype):
    types = {"word_ptr": "*i32", "out_ptr": "*i32", "boxes_ptr": "*i64", "counter_ptr": "*i32", "n": "i32"}
    types["rank"] = types["tries"] = "i32"
    values = {"DTYPE": {"bf16": tl.bfloat16, "fp16": tl.float16, None: None}[dtype], "SEND": True, "RECEIVE": True}
    values |= {"SIZE": 4, "BLOCK": 256, "CAPACITY": reduce.CAPACITY, "PDL": sm == 90}
    ptx = compiled(reduce._exchange_kernel, types, values, sm, 1).asm["ptx"]
    assert "ld.volatile.global" in ptx and "st.global" in ptx
    assert not any(f"ld.volatile.global{many}.b32" in ptx for many in ("", ".v2", ".v4"))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_two_streams_wait_for_each_other():
    boxes, streams = ranks(2), [torch.cuda.Stream() for _ in range(2)]
    gen = torch.Generator().manual_seed(0)
    messages = [[torch.randn(4096, generator=gen).to(DEVICE, torch.bfloat16) for _ in range(2)] for _ in range(100)]
    for box in ranks(2):  # compiled and loaded, so that nothing keeps the second kernel from starting beside the first
        reduce.run(messages[0][0], box.boxes, box.counter, box.rank, True, tries=1)
    torch.cuda.synchronize()
    results = [[], []]
    for pair in messages:
        for rank in (0, 1):
            with torch.cuda.stream(streams[rank]):
                results[rank].append(boxes[rank].all_reduce(pair[rank]))
    torch.cuda.synchronize()
    for (a, b), one, other in zip(messages, *results):
        wanted = (a.float() + b.float()).to(a.dtype)
        assert torch.equal(one, wanted) and torch.equal(other, wanted)
