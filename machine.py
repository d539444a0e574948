"""The machine: which device it has, how many bytes, and how fast it reads them; what weights, a cache and a decode step
need of it; and what a generation took.

Knows devices, sizes and seconds. Refuses to know what the bytes mean, and how a step runs.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import VISION, Weights
from compilation import captured
from linear import Linear
from model import ModelConfig, Transformer
from tp import TensorParallel


@dataclass
class Stats:
    """Of the last `Engine.generate()`: seconds, counts, and the bytes a decode step reads (weights, average KV
    prefix).
    """

    device: torch.device
    load_s: float = 0.0
    compile_s: float = 0.0
    prefill_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    batch_size: int = 0
    bytes_per_step: int = 0

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second of one row."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0

    def peak_bytes(self) -> int:
        """The most memory that this process has used so far."""
        return peak_bytes(self.device)

    def read_bandwidth(self) -> float | None:
        """Of this device's memory, measured now."""
        return read_bandwidth(self.device)

    def seconds_of_sum(self, tp: TensorParallel, n: int, dtype: torch.dtype) -> float:
        """Of n numbers over the ranks, all of which must call it; measured now."""
        return seconds_of_sum(tp, n, dtype, self.device)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """The body's seconds are those of compilation."""
        began = time.perf_counter()
        yield
        self.compile_s += time.perf_counter() - began


def pick_device(name: str | None) -> torch.device:
    """cpu, cuda or mps; None takes CUDA if there is one, else the CPU. ValueError for a device that is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = name or ("cuda" if available["cuda"] else "cpu")
    if not available.get(name):
        able = ", ".join(d for d, ok in available.items() if ok)
        raise ValueError(f"device {name!r} is not available here; available: {able}")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device, in bytes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has used, on a GPU or else of the host (0 where nobody says)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def read_bandwidth(device: torch.device) -> float | None:
    """Bytes per second that a sum of numbers reads, at best of four; None where memory is short. Under 0.1 s."""
    size = 1 << (30 if device.type == "cuda" else 27)  # more than any cache holds
    if device.type not in ("cuda", "cpu") or free_bytes(device) < 2 * size:
        return None
    x, best = torch.ones(size // 4, device=device), float("inf")
    for _ in range(4):
        began = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - began)
    return size / best


def seconds_of_sum(tp: TensorParallel, n: int, dtype: torch.dtype, device: torch.device, count: int = 64) -> float:
    """How long one all-reduce of n zeros takes, of `count` in a row, on a GPU in a CUDA graph as in a step.

    Every rank must call it.
    """
    x = torch.zeros(n, dtype=dtype, device=device)

    def several() -> None:
        for _ in range(count):
            tp.all_reduce(x)

    run = captured(several, lambda: None, capture=x.is_cuda)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    for _ in range(2):  # a graph is brought to the GPU when it first runs
        began = time.perf_counter()
        run()
        wait()
    return (time.perf_counter() - began) / count


def to_host(x: Tensor) -> Callable[[], list[list[int]]]:
    """Begin to copy x to the host; what is returned waits until it is there, and gives its numbers."""
    if not x.is_cuda:
        return x.tolist
    host, event = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    event.record()

    def wait() -> list[list[int]]:
        event.synchronize()
        return host.tolist()

    return wait


def stored_bytes(folder: Path, dtype: torch.dtype) -> int:
    """What the folder's weights take in memory once loaded in `dtype`; read from the safetensors headers alone."""
    weights, sizes, total = Weights(folder), {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}, 0
    for name in (n for n in weights if not VISION.fullmatch(n)):
        part = weights.slice(name)
        total += math.prod(part.get_shape()) * sizes.get(part.get_dtype(), dtype.itemsize)
    return total


def check_weights_fit(
    weights: Path | ModelConfig, dtype: torch.dtype, device: torch.device, tp: TensorParallel
) -> None:
    """ValueError, before anything is allocated, when a folder's weights, or those of a shape, do not fit the device.

    A rank on a device of its own holds its share; ranks on a CPU share the memory.
    """
    if isinstance(weights, ModelConfig):
        with torch.device("meta"):
            need = sum(p.numel() for p in Transformer(weights).parameters()) * dtype.itemsize
    else:
        need = stored_bytes(weights, dtype)
    need, free = need // (1 if device.type == "cpu" else tp.size), free_bytes(device)
    if need > free:
        raise ValueError(
            f"the weights need {need / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are free; "
            "use a smaller --dtype or a quantized checkpoint (quantize.py)"
        )


def check_cache_fits(model: Transformer, batch_size: int, slots: int, slack: int) -> None:
    """ValueError, which says what would fit, when a cache of batch_size rows of `slots` slots does not fit beside the
    model. `slack` of the slots are not for kept tokens.
    """
    device, per_slot = model.norm.weight.device, bytes_per_slot(model)
    need, free = batch_size * slots * per_slot, free_bytes(device)
    if need > free:
        fits, rows = int(free // (batch_size * per_slot)) // 128 * 128 - slack, int(free // (slots * per_slot))
        advice = [f"--max-seq-len {fits} at this batch"] * (fits > 0) + [f"a batch of {rows}"] * (rows > 0)
        raise ValueError(
            f"a cache of {batch_size} x {slots} slots needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            f"what fits: {', or '.join(advice) or 'no cache at all'}"
        )


def bytes_per_slot(model: Transformer) -> int:
    """Bytes that one slot of one row takes in this rank's cache."""
    c, (first, last) = model.config, model.tp.span(model.config.num_key_value_heads, "num_key_value_heads")
    return 2 * c.num_hidden_layers * (last - first) * c.head_dim * model.norm.weight.element_size()


def bytes_per_step(model: Transformer, batch_size: int, prefix: int) -> int:
    """What a decode step must read: every weight and scale that it uses (of one embedding row), and the keys and values
    of `prefix` slots, or of the window, in every row.
    """
    c, total = model.config, 0
    for module in model.modules():
        if isinstance(module, Linear):
            rows = batch_size * c.num_experts_per_tok
            total += module.bytes_read() * (min(rows, module.num_experts) if module.num_experts else 1)
    slots = sum(min(prefix, window or prefix) for window in c.windows)
    return total + batch_size * slots * bytes_per_slot(model) // c.num_hidden_layers
