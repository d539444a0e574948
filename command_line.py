"""What every program shares: a parser whose errors are one line, types of arguments, and how a program ends.

Knows argparse, exit statuses and the ranks' environment. Refuses to know models; imports no PyTorch, so that `--help`
and bad arguments are answered at once.
"""

import argparse
import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

# what argparse needs to know of `engine` and `decode_kernels`; a test compares
DEFAULT_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "tales"
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_ROWS = 16
RANK = int(os.environ.get("RANK", "0"))  # torchrun's


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, of one rank, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        if first_to_fail():
            print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def at_least(low: int, high: int = 1 << 40, auto: bool = False) -> Callable[[str], Any]:
    """An argparse type: an integer from `low` up to an absurd one; or auto, which is None."""

    def integer(text: str) -> int | None:
        if auto and text == "auto":
            return None
        value = int(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{value} is not sensible; {low} to {high - 1}{' or auto' * auto} is")
        return value

    return integer


draft_tokens = at_least(1, MAX_ROWS, auto=True)


SAMPLING: dict[str, tuple[Callable[[str], float], Callable[[float], bool], str, str]] = {
    # type, range, the range in words, the meaning (and default)
    "temperature": (float, lambda t: t == 0 or 1e-3 <= t < math.inf, "0 (greedy) or at least 0.001", "0: greedy (0.8)"),
    "top_k": (int, lambda k: k >= 0, "0 (off) or more", "draw from the k most probable tokens; 0: from all (200)"),
    "top_p": (float, lambda p: 0 < p <= 1, "above 0 and at most 1 (off)", "from the fewest with that probability (1)"),
    "min_p": (float, lambda p: 0 <= p < 1, "at least 0 (off) and below 1", "from those of that share of the best (0)"),
    "repetition_penalty": (float, lambda p: 0.01 <= p <= 100, "0.01 to 100 (1: off)", "on what was said before (1)"),
}


def sampling_parameter(name: str) -> Callable[[str], float]:
    """An argparse type: a value that SamplingParams takes."""
    kind, fits, range_, _ = SAMPLING[name]

    def number(text: str) -> float:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{name} is {value}; it must be {range_}")
        return value

    number.__name__ = kind.__name__  # argparse says "invalid float value"
    return number


def begin(parse: Callable[[None], object]) -> None:
    """What a program does before it imports PyTorch: --help, or an argument that cannot be right, ends it here. Then,
    until `ready`, Ctrl-C ends it without a word: an import cannot be unwound.
    """
    # a stream is None where the shell closed it
    sys.stdin, sys.stderr = sys.stdin or open(os.devnull), sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    parse(None)
    if (quota := processors_granted()) is not None:  # OpenMP knows a process's affinity, but not a container's quota
        os.environ.setdefault("OMP_NUM_THREADS", str(quota))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def processors_granted(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """How many processors' time the control groups of this process grant, where that is fewer than it may run on; at
    least 1. Two files of each group tell it, or one: microseconds of processor time in a period of so many.
    """
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    granted = count
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text("utf-8").splitlines():
            _, kinds, path = line.split(":", 2)  # such as 0::/a/b, or 4:cpu,cpuacct:/a/b of version 1
            if kinds and "cpu" not in kinds.split(","):
                continue
            group = groups / ("cpu" if kinds else "") / path.lstrip("/")
            for folder in (group, *group.parents):
                granted = min(granted, quota_of(folder) or granted)
    return granted if granted < count else None


def quota_of(folder: Path) -> int | None:
    """That of one control group; None where it has none."""
    files = [folder / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    if (folder / "cpu.max").is_file():
        files = [folder / "cpu.max"]
    share = " ".join(file.read_text("utf-8") for file in files if file.is_file()).split()
    if len(share) != 2 or share[0] in ("max", "-1"):
        return None
    return max(int(share[0]) // int(share[1]), 1)


def ready() -> None:
    """Ctrl-C is Python's KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def printable(text: str) -> str:
    """The text without a terminal's commands."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def first_to_fail() -> bool:
    """Whether no other rank of this run has asked before: of one fault that ends all ranks, one is told."""
    if "WORLD_SIZE" not in os.environ:
        return True
    import torch.distributed as dist

    try:  # torchrun's own store, which outlives the ranks
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(where, 5).close()  # where nobody answers PyTorch would say so in forty lines
        store = dist.TCPStore(*where, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        return store.add(f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except OSError:  # this rank is alone
        return True
    except (KeyError, ValueError, RuntimeError):
        return RANK == 0


FAULTS = (ValueError, OSError, RuntimeError, MemoryError, subprocess.SubprocessError)  # what `refuse` may know
COMPILER = (
    r"working C\+\+ compiler|C\+\+ compile error|find C compiler|^Command '\['([^']*/)?[^'/]*(cc|\+\+|clang)[^'/]*'"
)
COLLECTIVE = "gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|[Tt]imed out|TCPStore|DistBackendError"


def refuse(program: str, error: Exception) -> int:
    """Tell the user of an error in one line, of the rank that met it first. Returns the exit status.

    A RuntimeError is ours, and raised again, unless it is of memory, of a compiler, or of another rank that has ended.
    """
    line = " ".join(str(error).split()).rpartition("DefaultCPUAllocator: ")[2] or type(error).__name__
    memory = re.search("DefaultCPUAllocator|out of memory|Cannot allocate memory", str(error))
    if re.search(COMPILER, line):  # Inductor's words, and Triton's
        words = re.search("error: .*", str(error))
        line = "no working compiler for C++, which --compile and a GPU's kernels need; install one and Python's headers"
        line += (
            f" (CC and CXX name it), or use --no-compile --kernels inductor{f'; it says: {words[0]}' if words else ''}"
        )
    elif isinstance(error, RuntimeError) and not memory:
        if "WORLD_SIZE" not in os.environ or not re.search(COLLECTIVE, line):
            raise error
        line = "another rank has ended or does not answer"
    if first_to_fail():
        print(f"{program}: error: {printable(line)}", file=sys.stderr)
    return 2
