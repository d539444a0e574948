"""What torch.compile is asked for: functions with code of their own, and layers, each kind of them once.

Knows the habits of Dynamo. Refuses to know what is compiled, and when.
"""

import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from model import DecoderLayer

Function = Callable[..., Any]


def compiled(fn: Function, name: str, **options: Any) -> Function:  # noqa: ANN401
    """fn through torch.compile, whole, with a code object of its own: Dynamo counts recompilations per code object, so
    two engines must not share one.
    """
    code = fn.__code__.replace(co_name=name)
    own = types.FunctionType(code, fn.__globals__, name, fn.__defaults__, fn.__closure__)
    return torch.compile(own, fullgraph=True, **options)


def unguarded(guards: Sequence[object]) -> list[bool]:
    """For torch.compile: ask nothing before a call. Dynamo's questions take a quarter of a small model's step on a CPU
    (SmolLM2-135M in bf16, two cores: 54 tok/s with them, 72 without).
    """
    return [False] * len(guards)


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


def compiled_layers(layers: Iterable[nn.Module], name: str, guards: bool) -> Function:
    """A layer's forward, compiled once for each kind of layer."""
    made: dict[object, Function] = {}
    chosen: dict[int, Function] = {}
    for layer in layers:
        if (alike := kind(layer)) not in made:
            options = {} if guards else {"options": {"guard_filter_fn": unguarded}}
            made[alike] = compiled(DecoderLayer.forward, name, dynamic=False, **options)
        chosen[id(layer)] = made[alike]
    return lambda layer, *rest: chosen[id(layer)](layer, *rest)
