"""What Inductor makes of a function for a CPU, how it is called again with nothing between its kernels, and what is
done about its cache before.

Knows how Inductor's Python calls its kernels. Refuses to know which modules are compiled, and when.

Inductor writes C++ for the arithmetic of a function, and Python that allocates buffers and calls the C++ with them.
The Python takes 30 to 40 us for a layer of SmolLM2-135M in int4, and the C++ 107 (two cores). So a call is recorded
once, as a CUDA graph records it: which kernels are called, and with what. From then on the kernels alone are called,
for this module, with the tensors and buffers that it had: 230 tok/s instead of 187.
"""

import importlib
import os
import struct
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

if os.name == "posix":
    import fcntl

Function = Callable[..., Any]


class Launches(TorchDispatchMode):
    """While it is entered, `calls` gets every call of a kernel that Inductor has made for a CPU, with what it is called
    with, and `others` counts PyTorch's operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.others = list[tuple[Function, list[Any]]](), 0
        self.kernels = list[tuple[dict[str, Any], str, Function]]()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.others += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "Launches":
        written = getattr(torch._inductor.codecache, "PyCodeCache", None)
        for module in getattr(written, "modules", ()):
            for name, kernel in list(vars(module).items()):
                if callable(kernel) and getattr(kernel, "__name__", "") == "kernel":
                    self.kernels.append((vars(module), name, kernel))
                    vars(module)[name] = partial(self.launch, kernel)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:  # noqa: ANN401
        super().__exit__(*raised)
        for names, name, kernel in self.kernels:
            names[name] = kernel

    def launch(self, kernel: Function, *given: Any) -> None:  # noqa: ANN401
        self.calls.append((kernel, list(given)))
        kernel(*given)


CONTRACT = "cpp.enable_floating_point_contract_flag"


class Inductor:
    """A backend of torch.compile for functions of a module that need no guards. It remembers what the function was
    called with last. The module's own tensors are among that, so that it can be called for this module again without
    Dynamo.
    """

    # Fused multiply-adds make the loops of `cpu_loops.sums_int4` 1.25 times as fast in the cache.
    options = {"size_asserts": False, CONTRACT: "fast"}
    # Whether the compiler knows the processor's vectors is not tried, which takes 3 to 4 s: every one that compiles
    # PyTorch's headers knows these. It need not know those of 512 bits.
    options |= {"cpp.vec_isa_ok": True} if torch.backends.cpu.get_cpu_capability() == "AVX2" else {}
    given: tuple[Any, ...] = ()  # none where nothing is compiled, as with TORCHDYNAMO_DISABLE=1
    buffers: Sequence[Tensor] = ()  # of the kernels, for all modules

    def __call__(self, graph: fx.GraphModule, examples: list[Any]) -> Function:
        self.made = self.build(graph, examples)
        return self.run

    def build(self, graph: fx.GraphModule, examples: list[Any]) -> Function:
        """What Inductor makes of a graph: a function of a flat list of tensors."""
        return cast(Function, torch._inductor.compile(graph, examples, self.options))

    def run(self, *given: Any) -> Any:  # noqa: ANN401
        self.given = given
        return self.made(*given)

    def again(self, args: Sequence[object]) -> Function:
        """The last call, whose changing arguments were args, as a function of a module and such arguments: tensors, and
        at most one integer, which was as large then as it will be. Its result is overwritten by the next call of this
        function.
        """
        made, given = self.made, list(self.given)
        with Launches() as launches:
            y = next(iter(made(*given)), None)
        calls = self.on_shared_buffers(launches, given, y) or [(made, given)]
        number = {int if type(arg) is int else id(arg): j for j, arg in enumerate(args)}
        every = [(passed, i, int if type(t) is int else id(t)) for _, passed in calls for i, t in enumerate(passed)]
        places = [(passed, i, number[key]) for passed, i, key in every if key in number]

        def call(module: nn.Module, *args: object, **options: object) -> Any:  # noqa: ANN401
            for passed, i, j in places:
                passed[i] = args[j]
            for fn, passed in calls:
                answer = fn(*passed)
            return next(iter(answer), None) if answer is not None else y  # a kernel returns None

        return call

    def on_shared_buffers(
        self, launches: Launches, given: Sequence[Any], y: Tensor | None
    ) -> Sequence[tuple[Function, list[Any]]]:
        """The calls of kernels that made y of what was given, with a buffer of its own for y, and for the rest those of
        the first module; none if more than kernels was called, or with a part of a tensor that was given.
        """
        own, theirs = set(map(id, given)), {storage(t) for t in given if isinstance(t, Tensor)}
        buffers = [t for _, passed in launches.calls for t in passed if isinstance(t, Tensor) and id(t) not in own]
        found, result = set(map(storage, buffers)), None if y is None else storage(y)
        if launches.others or not {result} <= found | {None} or not found.isdisjoint(theirs):
            return ()
        self.buffers = self.buffers or buffers
        shared = {id(t): first for t, first in zip(buffers, self.buffers) if storage(t) != result}
        return [(kernel, [shared.get(id(t), t) for t in passed]) for kernel, passed in launches.calls]


@cache
def prepare() -> None:
    """What a process does before it has Inductor compile for a CPU. RuntimeError where there is no compiler for C++."""
    compiler = importlib.import_module("torch._inductor.async_compile").AsyncCompile()
    torch._inductor.cpp_builder.get_cpp_compiler()  # Inductor itself asks later, and tells first what it cannot compile
    if torch._inductor.cpp_builder.is_gcc() and torch.backends.cpu.get_cpu_capability() == "AVX2":
        # Of the eight sums in `cpu_loops.int4_word_sums` GCC keeps one in memory, where each addition waits for the
        # last, unless told otherwise: 2048 x 8192 take 761 us for 577. Its command is one line of text, so this
        # flag travels behind the other.
        Inductor.options[CONTRACT] = "fast -flive-range-shrinkage"
    folder = Path(torch._inductor.runtime.cache_dir_utils.cache_dir())
    for path in folder.glob("*/*.so") if sys.platform == "linux" else ():
        drop_unfinished(path, folder / "locks" / f"{path.name.split('.')[0]}.lock")
    if not one_configuration():
        Thread(target=read_headers, args=(compiler,), daemon=True).start()


def drop_unfinished(path: Path, lock: Path) -> None:
    """Delete a library that a compiler has not finished, because it was killed: Inductor would load it, and the process
    ends then with an error or without one. Its section headers, which are written last, are missing. lock: what
    Inductor locks while it compiles it.
    """

    def finished() -> bool:
        with path.open("rb") as file:
            head = file.read(64).ljust(64)
        (start,), (size, count) = struct.unpack_from("=Q", head, 40), struct.unpack_from("=HH", head, 58)
        return head[:4] == b"\x7fELF" and 0 < start <= path.stat().st_size - size * count

    with suppress(OSError):  # another process may have deleted it, or own it
        if not finished():
            with lock.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not finished():
                    path.unlink()


def one_configuration() -> bool:
    """Whether what a thread sets of Inductor's configuration counts for all, as in PyTorch 2.11: there `read_headers`
    would take the options away from what is compiled meanwhile, as it ends.
    """
    config = torch._inductor.config
    with config.patch(Inductor.options), ThreadPoolExecutor(1) as pool:
        return (
            pool.submit(lambda: config.cpp.enable_floating_point_contract_flag).result() == Inductor.options[CONTRACT]
        )


def read_headers(compiler: Any) -> None:  # noqa: ANN401
    """Have PyTorch's headers compiled, which Inductor keeps for all later C++, and waits for when it has written its
    first: on another processor meanwhile, for it takes 7 s.
    """
    with suppress(Exception), torch._inductor.config.patch(Inductor.options):  # where it fails, so does what is wanted
        compiler.cpp_pybinding([], '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel() {}')


def storage(tensor: Tensor) -> int:
    """Where what it is a view of lies in memory."""
    return tensor.untyped_storage().data_ptr()
