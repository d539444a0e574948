"""Sums over ranks: their arithmetic with all ranks in one process, and the waiting with two streams of one GPU."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, HAS_TRITON, compiled, needs_compiler, needs_kernels, relative_error

import decode_kernels
import shapes
from decode_kernels import INTERPRETED
from linear import Linear, QuantizedLinear, RMSNorm, from_linear
from model import Transformer
from tp import TensorParallel

if HAS_TRITON:
    import triton.language as tl

    from decode_kernels import gpu, reduce, sums
    from decode_kernels.digits import empty_digits


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
    model = Transformer(shapes.shape_config("tiny"), TensorParallel(0, 2)).half().to(DEVICE)
    decode_kernels.use_(model)
    first = model.tp.fast
    for on in (True, False, True):
        decode_kernels.use_(model, on)
        assert model.tp.fast is first is not None
    assert len(made) == 1


@needs_kernels
@pytest.mark.parametrize("bits", [16, 4])
def test_blocks_of_ranks_end_with_sums(monkeypatch, bits):
    """Each with one of its own; those before integers leave digits. Kernels that are set twice lay nothing out anew."""
    model = Transformer(shapes.shape_config("tiny"), TensorParallel(0, 2)).half().to(DEVICE)
    model.tp.fast = ranks(2)[0]
    if bits == 4:
        for parent in [block for layer in model.layers for block in (layer.self_attn, layer.mlp)]:
            for name, linear in list(parent.named_children()):
                setattr(parent, name, from_linear(linear, 4))
    blocks = [block for layer in model.layers for block in (layer.self_attn, layer.mlp)]
    decode_kernels.use_(model)
    found = [block.fast_sum for block in blocks]
    assert len({id(total) for total in found}) == 4 and len({total.numbers[0].item() for total in found}) == 4
    assert [total.gain is not None for total in found] == [bits == 4] * 3 + [False]  # the head is plain
    monkeypatch.setattr(QuantizedLinear, "_lay_out_", lambda self, q: pytest.fail("laid out anew"))
    decode_kernels.use_(model)
    monkeypatch.undo()
    decode_kernels.use_(model, False)
    assert all(block.fast_sum is None for block in blocks)


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


def shares(size, kind, rows, k, n, gen):
    """(Linears of that many ranks, on the fast path of their format, their activations): each rank has k columns."""
    linears, xs = [], []
    for _ in range(size):
        linear = Linear(k, n, bias=kind == "bias").to(DEVICE, DTYPES[0])
        linear.weight.copy_(torch.randn(n, k, generator=gen) / k**0.5)
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(n, generator=gen))
        holder = torch.nn.ModuleList([linear if kind in ("bias", "16-bit") else from_linear(linear, int(kind[3:]), 32)])
        decode_kernels.use_(holder)
        linears.append(holder[0])
        xs.append(torch.randn(rows, k, generator=gen).to(DEVICE, DTYPES[0]))
    return linears, xs


def send(total, linear, x, residual):
    """The first half of `Sum.__call__`."""
    return linear.fast.product(linear, None, False, total.letters)(x, linear.bias, None, 0.0, residual, False, None)


@needs_kernels
@pytest.mark.parametrize("kind, rows", [("bias", 1), ("16-bit", 3), ("16-bit", 6), ("int8", 1), ("int4", 6)])
def test_products_that_send_equals_twin(kind, rows):
    """Two sums take turns, as in a model, and both halves of the mailbox are used twice."""
    boxes, gen, n = ranks(2), torch.Generator().manual_seed(rows), 26
    pairs = [[sums.Sum(box) for box in boxes] for _ in range(2)]
    for step, count in enumerate((rows, rows, rows + 1, rows)):
        (linears, xs), totals = shares(2, kind, count, 32, n, gen), pairs[step % 2]
        residual = torch.randn(count, n, generator=gen).to(DEVICE, DTYPES[0])
        wanted = sum((linear(x).float() for linear, x in zip(linears, xs)), residual.float())
        halves = [send(*one, residual if rank == 0 else None) for rank, one in enumerate(zip(totals, linears, xs))]
        tries = 1 if INTERPRETED else reduce.TRIES  # a GPU begins to look before the products have ended
        got = [total.receive_(half, tries=tries) for total, half in zip(totals, halves)]
        assert relative_error(got[0], wanted) < (2e-3 if INTERPRETED else 6e-3)
        assert torch.equal(got[1], got[0])


@needs_kernels
@pytest.mark.parametrize("rows", [5] if INTERPRETED else [1, 5])
def test_a_product_of_the_digits_that_a_sum_leaves_equals_twin(rows):
    gen, n = torch.Generator().manual_seed(rows), 256
    norm = RMSNorm(n, 1e-5, DEVICE, DTYPES[0])
    norm.weight.copy_(torch.randn(n, generator=gen))
    totals = [sums.Sum(box, norm.weight) for box in ranks(2)]
    (linears, xs), ((reader, _), _) = shares(2, "int8", rows, 32, n, gen), shares(2, "int4", rows, n, 32, gen)
    empty = [empty_digits(norm.weight, rows, n, norm=True) for _ in totals]
    halves = [send(*one, None) for one in zip(totals, linears, xs)]
    for total, half, digits in zip(totals, halves, empty):
        x = total.receive_(half, digits, tries=2)
        assert relative_error(x, linears[0](xs[0]).float() + linears[1](xs[1]).float()) < 6e-3
        reader.fast = gpu.INT4
        wanted = reader(x, norm=norm)
        reader.fast = gpu.Quantized(4, total.left)
        assert torch.equal(reader(x.clone(), norm=norm), wanted) and total.left.kept is not None  # of another tensor
        assert torch.equal(reader(x, norm=norm), wanted) and total.left.kept is None


@needs_kernels
def test_a_sum_without_an_answer_is_nan():
    total = sums.Sum(ranks(2)[0])
    (linear, _), (x, _) = shares(2, "16-bit", 1, 8, 8, torch.Generator())
    assert total.receive_(send(total, linear, x, None), tries=3).isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("kind", ["16-bit", "int4"])
def test_sums_of_two_streams_wait_for_each_other(kind):
    """As in a model, between two steps every rank runs a kernel that starts when all before it has ended."""
    boxes, streams, gen = ranks(2), [torch.cuda.Stream() for _ in range(2)], torch.Generator().manual_seed(0)
    totals = [[sums.Sum(box) for _ in range(4)] for box in boxes]
    linears, xs = shares(2, kind, 1, 512, 4096, gen)
    wanted = linears[0](xs[0]).float() + linears[1](xs[1]).float()
    spare = [sums.Sum(box) for box in ranks(2)]  # compiled and loaded, so that both kernels may run at once
    for one in zip(spare, linears, xs):
        one[0].receive_(send(*one, None), tries=2)
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(25):
        for i in range(4):
            for rank, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    results[rank].append(totals[rank][i](linears[rank], xs[rank], None))
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                boxes[rank].gather(xs[rank].clone())
    torch.cuda.synchronize()
    for one, other in zip(*results):
        assert relative_error(one, wanted) < 6e-3 and torch.equal(one, other)
