"""What torch.compile and CUDA graphs are asked for: functions with code of their own, layers, each kind of them once,
and the capture of a step.

Knows the habits of Dynamo and of captures. Refuses to know what is compiled, and when.
"""

import types
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from inductor import Inductor, prepare
from model import DecoderLayer, Select

Function = Callable[..., Any]


def compiled(fn: Function, name: str, **options: Any) -> Function:  # noqa: ANN401
    """fn through torch.compile, whole, with a code object of its own: Dynamo counts recompilations per code object, so
    two engines must not share one.
    """
    code = fn.__code__.replace(co_name=name)
    own = types.FunctionType(code, fn.__globals__, name, fn.__defaults__, fn.__closure__)
    own.__kwdefaults__ = fn.__kwdefaults__
    return torch.compile(own, fullgraph=True, **options)


def unguarded(guards: Sequence[object]) -> list[bool]:
    """For torch.compile: ask nothing before a call. Dynamo's questions take a quarter of a small model's step on a CPU
    (SmolLM2-135M in bf16, two cores: 54 tok/s with them, 72 without).
    """
    return [False] * len(guards)


def by_size(fn: Function) -> Function:
    """How `of_size` is called as a layer, once it is compiled, until Inductor's kernels are called directly: for all
    slots of the cache, so that their buffers suffice for any number. The first time, when it is traced, there is one
    slot less, because torch.compile would take all of a cache for a special case.
    """
    fewer = [1]

    def call(layer: nn.Module, *args: Any) -> Any:  # noqa: ANN401
        slots = torch.empty(args[-2].k.shape[2] - (fewer.pop() if fewer else 0), device="meta")
        torch._dynamo.mark_dynamic(slots, 0)
        return fn(layer, *args[:-1], slots)

    return call


def of_size(layer: nn.Module, *args: Any) -> Any:  # noqa: ANN401
    """A layer's forward, which is told the number of slots by the size of a tensor: one program serves all of them."""
    return layer.forward(*args[:-1], len(args[-1]))


def kind(layer: nn.Module) -> tuple[object, ...]:
    """What layers have in common that one compiled function may serve without asking: classes, plain attributes, fast
    paths, and the shapes of tensors.
    """
    found: list[object] = []
    for name, module in layer.named_modules():
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        found += [name, type(module), id(vars(module).get("fast"))]
        found += [(key, value) for key, value in vars(module).items() if isinstance(value, (int, float, str))]
        found += [(key, t.shape, t.stride(), t.dtype) for key, t in tensors]
    return tuple(found)


class CompiledModules:
    """Calls these modules through their compiled forwards, of which each kind of module has one, and any other module
    as it is.
    """

    def __init__(self, modules: Iterable[nn.Module], name: str, *, guards: bool, dynamic: bool = False) -> None:
        self.forward: dict[nn.Module, Function] = {}
        self.backends: dict[nn.Module, Inductor] = {}
        made: dict[object, tuple[Function, Inductor]] = {}
        if not guards:
            prepare()
        for module in modules:
            if (alike := kind(module)) not in made:
                backend, sized = Inductor(), isinstance(module, DecoderLayer) and not guards
                options = {} if guards else {"backend": backend, "options": {"guard_filter_fn": unguarded}}
                fn = of_size if sized else type(module).forward
                fn = compiled(fn, f"{name}_{len(made)}", dynamic=dynamic, **options)
                made[alike] = by_size(fn) if sized else fn, backend
            self.forward[module], self.backends[module] = made[alike]

    def including(self, fn: Function, name: str) -> Function:
        """A function of one tensor, and of tensors that never move, through torch.compile as these modules are."""
        key, backend = nn.Module(), Inductor()
        own = compiled(fn, name, backend=backend, options={"guard_filter_fn": unguarded})
        self.forward[key], self.backends[key] = lambda _, x: own(x), backend
        return partial(self, key)

    def __call__(self, module: nn.Module, *args: object, select: Select = None, **options: object) -> Any:  # noqa: ANN401
        y = self.forward.get(module, nn.Module.__call__)(module, *args, **options)
        return y if select is None else y.flatten(0, 1).index_select(0, select)[:, None]  # not a program of its own

    def settle(self, park: Callable[[], None], step: Callable[[], None]) -> None:
        """Run step, in which all of these are called, and call what Inductor has made of them directly from then on,
        for the tensors that they have now: Dynamo takes 20 to 30 us a call. park: as of `captured`.
        """
        forward, direct = self.forward, dict[nn.Module, Function]()

        def record(module: nn.Module, *args: object, **options: object) -> Any:  # noqa: ANN401
            y = forward[module](module, *args, **options)
            backend = self.backends[module]
            direct[module] = backend.again(args) if backend.given else forward[module]
            return y

        self.forward = dict.fromkeys(forward, record)
        park()
        step()
        self.forward = direct


def captured(step: Callable[[], None], park: Callable[[], None], capture: bool) -> Callable[[], None]:
    """step, compiled by running it; to capture, recorded as one CUDA graph: then a step is one launch, without guards.

    park: makes the state such that a trial step does no harm.
    """
    for _ in range(2):  # a GPU's libraries allocate on the first run, which a capture may not
        park()
        step()
    if not capture:
        return step
    park()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
