"""Calls of what Inductor has made, again, with kernels that are Python: what is replayed, and what is not."""

import ctypes
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import inductor
from inductor import Inductor, drop_unfinished

guards = torch._C._dynamo.guards  # what Inductor's Python calls: no operators


def floats(tensor):
    return (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())


def kernel(x, weight, scratch, y):
    """y = (x * weight) + 1, as machine code would: past PyTorch."""
    for i, (a, b) in enumerate(zip(floats(x), floats(weight))):
        floats(scratch)[i] = a * b
        floats(y)[i] = floats(scratch)[i] + 1


@pytest.fixture
def backend(monkeypatch):
    """A backend whose module, written by Inductor, has this kernel; and how often all of the module is called."""
    import torch._inductor.codecache as codecache

    written = types.ModuleType("written")
    written.cpp_fused_0 = kernel
    monkeypatch.setattr(codecache.PyCodeCache, "modules", [written])
    made = Inductor()
    made.written, made.whole = written, 0
    return made


def call(backend, part, *given):
    """The module's Python: two buffers and a kernel, of whose first operand it takes a part."""
    backend.whole += 1
    scratch, y = (guards._empty_strided_cpu((4,), (1,), torch.float32) for _ in range(2))
    backend.written.cpp_fused_0(part(given[0]), given[1], scratch, y)
    return (y,)


def test_kernels_alone_are_called_with_what_changes_and_what_the_module_has(backend):
    backend.made = lambda *given: call(backend, lambda x: x, *given)
    inputs, weights = torch.arange(8.0).view(4, 2, 1).unbind(1), (torch.ones(4), torch.full((4,), 2.0))
    inputs = [x.flatten().clone() for x in inputs]
    again = []
    for weight in weights:
        y = backend.run(inputs[0], weight)[0]
        assert torch.equal(y, inputs[0] * weight + 1)
        again.append(backend.again((inputs[0], 7)))
    count, answers = backend.whole, [fn(nn.Identity(), inputs[1], 7) for fn in again]
    assert backend.whole == count
    for answer, weight in zip(answers, weights):  # each has a buffer of its own for its result
        assert torch.equal(answer, inputs[1] * weight + 1)
    assert again[0](nn.Identity(), inputs[0], 7) is answers[0]
    assert backend.written.cpp_fused_0 is kernel


def test_an_integer_is_one_that_changes(backend):
    """As the number of slots: a size, which Inductor hands to kernels as a number."""
    first, weight = torch.ones(4), torch.full((4,), 2.0)

    def several(x, weight, y, n):
        for i in range(n):
            floats(y)[i] = floats(x)[i] * floats(weight)[i]

    def made(n, x, weight):
        y = guards._empty_strided_cpu((4,), (1,), torch.float32)
        backend.written.cpp_fused_0(x, weight, y, n)
        return (y,)

    several.__name__ = "kernel"
    backend.written.cpp_fused_0, backend.made = several, made
    backend.run(4, first, weight)
    again = backend.again((first, 4))
    assert again(nn.Identity(), first * 3, 2).tolist() == [6, 6, 2, 2]  # the buffer is the recorded call's
    assert again(nn.Identity(), first * 5, 4).tolist() == [10] * 4


@pytest.mark.parametrize(
    "part",
    [lambda x: x + 0, lambda x: x.as_strided((4,), (1,)), lambda x: guards._reinterpret_tensor(x, (4,), (1,), 0)],
    ids=["an operator", "a view by an operator", "a view"],
)
def test_more_than_kernels_is_called_whole(backend, part):
    backend.made = lambda *given: call(backend, part, *given)
    first, second, weight = torch.arange(4.0), torch.arange(4.0) + 3, torch.full((4,), 2.0)
    backend.run(first, weight)
    again, count = backend.again((first,)), backend.whole
    assert torch.equal(again(nn.Identity(), second), second * 2 + 1) and backend.whole == count + 1


def test_without_what_inductor_has_written_all_is_called(backend, monkeypatch):
    import torch._inductor.codecache as codecache

    monkeypatch.delattr(codecache.PyCodeCache, "modules")
    backend.made = lambda *given: call(backend, lambda x: x, *given)
    x, weight = torch.arange(4.0), torch.ones(4)
    backend.run(x, weight)
    again, count = backend.again((x,)), backend.whole
    assert torch.equal(again(nn.Identity(), x + 1), x + 2) and backend.whole == count + 1


@pytest.mark.skipif(sys.platform != "linux", reason="libraries of another format")
def test_a_library_that_a_killed_compiler_has_left_is_deleted(tmp_path):
    """One whose end is missing is loaded without an error, and the process dies when it is called."""
    whole = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    with whole.open("rb") as file:
        start = file.read(1 << 16)
    short, empty, zeros, lock = (tmp_path / name for name in ("short.so", "empty.so", "zeros.so", "lock"))
    for path, held in ((short, start), (empty, b""), (zeros, bytes(4096))):
        path.write_bytes(held)
        drop_unfinished(path, lock)
        assert not path.exists()
    kept = tmp_path / "whole.so"
    kept.symlink_to(whole)
    drop_unfinished(kept, lock)
    assert kept.exists()
    drop_unfinished(tmp_path / "gone.so", lock)


@pytest.mark.parametrize("shared", [True, False])
def test_headers_are_read_by_a_thread_only_where_it_has_a_configuration_of_its_own(monkeypatch, shared):
    """Otherwise the end of its options would be the end of those of the compilation beside it."""
    begun = []
    thread = lambda target, **_: types.SimpleNamespace(start=lambda: begun.append(target))  # noqa: E731
    monkeypatch.setattr(inductor, "Thread", thread)
    monkeypatch.setattr(inductor, "one_configuration", lambda: shared)
    inductor.prepare.__wrapped__()
    assert begun == ([] if shared else [inductor.read_headers])
