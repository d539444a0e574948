"""Fingerprints of the kernels' machine code, for GPUs that need not be there: has a change of the source changed them?

    python scripts/machine_code.py                            # compare with what is recorded, for sm_90
    python scripts/machine_code.py --quick                    # one or two cases of every kernel
    python scripts/machine_code.py --sm 80 86 89 90 --write   # record anew for this Triton

Knows a case for every way in which an operator launches its kernels, with the shapes of public models. Each case calls
the operator itself, on tensors without contents, while a stand-in for Triton's driver claims a GPU of that
architecture: Triton compiles what it would compile there, and the launch does nothing but note the SHA-1 of the code
(the `.text` sections of the cubin). Names, comments and the order of lines do not change it; the order of a kernel's
parameters does. Another release of Triton or ptxas makes other code of the same source, so both are part of the key.
"""

import argparse
import csv
import functools
import hashlib
import os
import re
import struct
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from command_line import Parser, at_least, begin

# bytes that one program may have, by architecture
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="machine_code.py", description="Fingerprints of the kernels' machine code.", allow_abbrev=False)
    p.add_argument("--sm", type=int, nargs="+", choices=tuple(SHARED_MEMORY), default=[90], help="architectures (90)")
    p.add_argument("--processes", type=at_least(1), default=2, help="compile side by side in so many")
    p.add_argument("--quick", action="store_true", help="only one or two cases of every kernel")
    p.add_argument("--write", action="store_true", help="record instead of comparing")
    args = p.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        p.error("TRITON_INTERPRET is set, and the interpreter makes no machine code; unset it")
    if args.quick and args.write:
        p.error("--write records every case; leave out --quick")
    return args


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.compiler import get_ptxas_version

from decode_kernels import attention as attending
from decode_kernels import blocks, bounds, dense, draw, prefill, quantized, reduce, rounds, sums
from decode_kernels import step as ends
from decode_kernels.ahead import StandIn
from decode_kernels.digits import empty_digits

RECORD = ROOT / "tests" / "decode_kernels" / "machine_code.csv"
Launch = tuple[str, str]  # a kernel's name, the SHA-1 of its code
Row = dict[str, str]  # case, number (of the launch in its case), kernel, sm, triton, ptxas, sha1


def code_of(cubin: bytes) -> str:
    """SHA-1 of the contents of an ELF file's `.text*` sections, in their order."""
    table, size, count, names = struct.unpack_from("<40xQ", cubin)[0], *struct.unpack_from("<58xHHH", cubin)
    # of each section: where its name stands in the table of names, where it begins and how long it is
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(count)]
    digest = hashlib.sha1()
    for name, start, length in sections:
        if cubin.startswith(b".text", sections[names][1] + name):
            digest.update(cubin[start : start + length])
    return digest.hexdigest()


class Driver(StandIn):
    """The stand-in with launches that only note which code they would run: `launches` grows with every one."""

    def __init__(self, sm: int) -> None:
        super().__init__(sm, SHARED_MEMORY[sm])
        self.launches = list[Launch]()

    def get_current_device(self) -> int:
        return self.sm  # Triton keeps what it has compiled by device

    def load_binary(self, name: str, cubin: bytes, *_: object) -> tuple[None, Launch, int, int, int]:
        """(module, function, registers, spills, most threads of a program); the function is passed to `launch`."""
        return None, (name, code_of(cubin)), 0, 0, 1024

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: Launch, *_: object) -> None:
            self.launches.append(function)

        return launch


# -- the cases ----------------


def linear(
    rows: int,
    shape: tuple[int, int],
    mode: str = "bf16",
    *,
    norm: bool = False,
    residual: bool = False,
    bias: bool = False,
    silu_mul: bool = False,
    experts: int = 0,
) -> Callable[[], object]:
    """A Linear with weights of shape (K inputs, N outputs). mode: bf16, fp16, int8 or int4, these with a group size
    behind -g unless a row has one scale, and z with zero points.
    """
    (k, n), lead = shape, (experts,) if experts else ()
    dtype = torch.float16 if mode == "fp16" else torch.bfloat16
    scale = zero = None
    if mode in ("bf16", "fp16"):
        weight = torch.empty((*lead, n, k), dtype=dtype)
    else:
        bits, group = int(mode[3]), int(mode.partition("-g")[2].strip("z") or k)
        packed = (*lead, -(-n // 16), -(-k // 128), 256 * bits)
        weight = torch.empty(packed, dtype=torch.int8 if bits == 8 else torch.uint8)
        scale = torch.empty((*lead, n, k // group), dtype=dtype)
        zero = torch.empty_like(scale) if mode.endswith("z") else None

    def run() -> Tensor:
        x, out = torch.empty(rows, k, dtype=dtype), n // 2 if silu_mul else n
        gain = torch.empty(k, dtype=dtype) if norm else None
        added = torch.empty(rows, out, dtype=dtype) if residual else None
        offset = torch.empty(n, dtype=dtype) if bias else None
        chosen = torch.zeros(rows, dtype=torch.int64) if experts else None
        if scale is None:
            return dense.linear(x, weight, offset, gain, 1e-5, added, silu_mul, chosen)
        return quantized.linear(x, weight, scale, zero, offset, gain, 1e-5, added, silu_mul, chosen, bits)

    return run


def attention(
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    slots: int,
    *,
    window: int = 0,
    norm: bool = False,
    leave: bool = False,
) -> Callable[[], object]:
    """Attention of new tokens, with so many heads and KV heads, to a cache of that many slots; leave: it leaves the
    digits of its results, and asks for the next matrix.
    """
    h, kv_heads = heads

    def run() -> Tensor:
        make = functools.partial(torch.empty, dtype=torch.bfloat16)
        qkv = make(batch * tokens, (h + 2 * kv_heads) * dim)
        angle, positions = torch.empty(batch * tokens, dim // 2), torch.zeros(batch, tokens, dtype=torch.int64)
        gain = make(dim) if norm else None
        caches = make(batch, kv_heads, slots, dim), make(batch, kv_heads, slots, dim)
        digits = empty_digits(qkv, batch * tokens, h * dim, norm=False) if leave else None
        following = torch.empty(8 << 20, dtype=torch.uint8) if leave else None
        return attending.run(qkv, (angle, angle), positions, caches, (gain, gain, 1e-6), window, digits, following)

    return run


def around_products(width: int, mlp: int, experts: int, chosen: int) -> Callable[[], object]:
    """The norm behind a block, GELU and its product, and the choice of experts."""

    def run() -> None:
        make = functools.partial(torch.empty, dtype=torch.bfloat16)
        blocks.add_norm(make(1, 1, width), make(width), 1e-6, make(1, 1, width))
        blocks.gelu(make(1, 1, 2 * mlp))
        blocks.route(make(1, experts), chosen, True)

    return run


def many_tokens(heads: int, kv_heads: int, dim: int, width: int, *, norm: bool = False) -> Callable[[], object]:
    """What a prefill has besides products and attention: rotation, and the gate of `width` pairs."""

    def run() -> None:
        make = functools.partial(torch.empty, dtype=torch.bfloat16)
        gain = types.SimpleNamespace(weight=make(dim), eps=1e-6) if norm else None
        module: Any = types.SimpleNamespace(num_heads=heads, q_norm=gain, k_norm=gain, window=0)
        cache: Any = types.SimpleNamespace(k=make(1, kv_heads, 17, dim), v=make(1, kv_heads, 17, dim))
        angle, positions = torch.empty(1, 17, 1, dim // 2), torch.zeros(1, 17, dtype=torch.int64)
        prefill.attend(module, make(1, 17, (heads + 2 * kv_heads) * dim), angle, angle, positions, cache, 17)
        prefill.gate(make(17, 2 * width))

    return run


def dequantize(k: int, n: int, bits: int, group: int) -> Callable[[], object]:
    """A whole matrix for a prefill."""

    def run() -> Tensor:
        weight = torch.empty(n // 16, k // 128, 256 * bits, dtype=torch.int8 if bits == 8 else torch.uint8)
        scale = torch.empty(n, k // group, dtype=torch.bfloat16)
        return quantized.dequantize(weight, scale, None, n, k, torch.bfloat16, bits)

    return run


def step(vocabulary: int, width: int, half: int, top_k: int, top_p: bool = False) -> Callable[[], object]:
    """The two ends of a decode step: embedding and angles, sampling, advancing."""

    def run() -> None:
        token = torch.zeros(1, 1, dtype=torch.int64)
        table, logits = (torch.empty(vocabulary, n, dtype=torch.bfloat16) for n in (width, 1))
        ends.embed(token, token, table, torch.empty(half), 1.0, 0, half)
        draw.sample(logits.view(1, -1), torch.empty(4), token[0], token[0], top_k, top_p)
        ends.advance_(token[0], token, token, token[0], torch.zeros(1, 256, dtype=torch.int64))

    return run


def listed(vocabulary: int, ranks: int, top_k: int) -> Callable[[], object]:
    """Sampling over ranks, each of which lists the largest logits of its words."""

    def run() -> Tensor:
        logits, token = torch.empty(1, vocabulary // ranks, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
        lists = draw.shortlist(logits, top_k, 0).repeat(1, ranks)
        return draw.sample(lists, torch.empty(4), token, token, top_k, False)

    return run


def round_(vocabulary: int, top_k: int, drafts: bool, usual: bool = False) -> Callable[[], object]:
    """What surrounds the models in a round of speculation, by a draft or by looking up. usual: with top-p and a
    penalty, as many checkpoints ask for.
    """

    def run() -> None:
        logits, token, history = torch.empty(1, 4, vocabulary, dtype=torch.bfloat16), ids(1), ids(256)
        of_rows, q = (torch.empty(4), token[0], token), torch.empty(1, 5, vocabulary)
        if drafts:
            rounds.propose_(logits[:, 0], top_k, usual, *of_rows, token[0], history, q)
        else:
            rounds.look_up_(history, token, 3)
        seen = torch.zeros(1, vocabulary, dtype=torch.bool) if usual else None
        verified = rounds.verify(logits, top_k, usual, *of_rows, history, seen, q if drafts else None, None)
        rounds.settle_(verified, 255, token, token, history, token[0], ids(6), seen)

    def ids(n: int) -> Tensor:
        return torch.zeros(1, n, dtype=torch.int64)

    return run


def exchange(n: int, size: int, add: bool) -> Callable[[], object]:
    """The sum over ranks of n bf16 numbers, or their gather."""

    def run() -> object:
        x, boxes = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.int64)
        return reduce.exchange(x, boxes, torch.zeros(reduce.CAPACITY // reduce.BLOCK, dtype=torch.int32), 0, add)

    return run


def summed(k: int, n: int, bits: int, size: int) -> Callable[[], object]:
    """A product whose results go to all ranks, on rank 0, and the sum of what comes; with int4 it leaves digits."""

    def run() -> object:
        make = functools.partial(torch.empty, dtype=torch.bfloat16)
        boxes = reduce.Mailboxes(reduce.box_of(size, torch.device("cpu")), torch.arange(1, size + 1) << 40, 0)
        total, x, residual = sums.Sum(boxes, make(n) if bits == 4 else None), make(1, k), make(1, n)
        digits = empty_digits(x, 1, n, norm=True) if bits == 4 else None
        if bits == 4:
            weight, scale = torch.empty(n // 16, k // 128, 1024, dtype=torch.uint8), make(n, k // 128)
            out = quantized.run(x, weight, scale, None, None, None, 0.0, residual, False, None, 4, total.letters)
        else:
            out = dense.run(x, make(n, k), None, None, 0.0, residual, False, None, total.letters)
        return total.receive_(out, digits)

    return run


def left(k: int, width: int) -> Callable[[], object]:
    """Products in int4 that leave the digits of their results, and those that read them: o, gate_up and down; gate_up
    also where it has two digits of each activation.
    """

    def run() -> None:
        make, single = functools.partial(torch.empty, dtype=torch.bfloat16), functools.partial(torch.empty)
        x, gain = make(1, k), make(k)
        o, gate_up, down = (
            (torch.empty(n // 16, m // 128, 1024, dtype=torch.uint8), make(n, m // 128), None, None)
            for n, m in ((k, k), (2 * width, k), (k, width))
        )
        normed, h = (empty_digits(x, 2, n, norm=False)._replace(halves=True) for n in (k, width))
        normed = normed._replace(squares=single(k // 16))
        behind = *normed[:2], single(k // 128, 2), gain, normed.squares
        quantized.run(x, *o, None, 0.0, x, False, None, 4, leave=behind)
        bounds.unit_factors(o[:3], k, gain, 4)
        gates = *h[:2], bounds.known_units(gate_up[:3], None, gain, 4)
        for digits in (normed, None):
            quantized.run(x, *gate_up, gain, 1e-5, None, True, None, 4, digits=digits, leave=gates)
        quantized.run(make(1, width), *down, None, 0.0, x, False, None, 4, digits=h)

    return run


def cases() -> dict[str, Callable[[], object]]:
    """What is launched, by a name that says for which model, matrix, format and number of rows."""
    layer: dict[str, tuple[int, int, dict[str, Any]]] = {
        "qkv": (4096, 12288, {"norm": True}),
        "o": (4096, 4096, {"residual": True}),
        "gate_up": (4096, 22016, {"norm": True, "silu_mul": True}),
        "down": (11008, 4096, {"residual": True}),
    }
    out: dict[str, Callable[[], object]] = {}
    for mode in ("bf16", "int8", "int4-g128"):
        for rows in (1, 4, 8, 16):
            for name, (k, n, extra) in layer.items():
                out[f"llama-2-7b {name} {mode} {rows}"] = linear(rows, (k, n), mode, **extra)
    return out | {
        "llama-2-7b head bf16 1": linear(1, (4096, 32000), norm=True),
        "llama-3.2-1b down bf16 1": linear(1, (8192, 2048), residual=True),
        "llama-3.2-1b gate_up fp16 1": linear(1, (2048, 16384), "fp16", norm=True, silu_mul=True),
        "qwen2.5-7b qkv bf16 1": linear(1, (3584, 4608), norm=True, bias=True),
        "mixtral-8x7b gate_up bf16 2": linear(2, (4096, 28672), silu_mul=True, experts=8),
        "mixtral-8x7b down int8 2": linear(2, (14336, 4096), "int8", experts=8),
        "llama-2-7b o int4-g32z 1": linear(1, (4096, 4096), "int4-g32z", residual=True),
        "llama-2-7b o int4-g64 5": linear(5, (4096, 4096), "int4-g64", residual=True),
        "llama-2-7b down int4-g 1": linear(1, (11008, 4096), "int4-g", residual=True),
        "llama-2-7b o int8-g32 1": linear(1, (4096, 4096), "int8-g32", residual=True),
        "llama-2-7b down int8-g128z 5": linear(5, (11008, 4096), "int8-g128z", residual=True),
        "llama-2-7b dequantize int8": dequantize(4096, 4096, 8, 4096),
        "llama-2-7b dequantize int4-g128": dequantize(4096, 4096, 4, 128),
        "llama-2-7b attention 1 of 256": attention(1, 1, (32, 32), 128, 256),
        "llama-3.1-8b attention 1 of 2048": attention(1, 1, (32, 8), 128, 2048),
        "llama-3.1-8b attention 5 of 2048": attention(1, 5, (32, 8), 128, 2048),
        "llama-3.2-1b attention 1 of 256": attention(1, 1, (32, 8), 64, 256),
        "qwen3-8b attention 1 of 512": attention(1, 1, (32, 8), 128, 512, norm=True),
        "llama-2-7b attention 1 of 256, with digits": attention(1, 1, (32, 32), 128, 256, leave=True),
        "llama-3.1-8b attention 1 of 2048, with digits": attention(1, 1, (32, 8), 128, 2048, leave=True),
        "mistral-7b attention 2 x 9 of 8192": attention(2, 9, (32, 8), 128, 8192, window=4096),
        "llama-3.1-8b prefill": many_tokens(32, 8, 128, 14336),
        "qwen3-8b prefill": many_tokens(32, 8, 128, 12288, norm=True),
        "gemma-3-4b and mixtral-8x7b, around products": around_products(2560, 10240, 8, 2),
        "llama-2-7b step": step(32000, 4096, 64, 200),
        "llama-3.1-8b step, greedy": step(128256, 4096, 64, 1),
        "qwen2.5-7b step, top-p": step(152064, 3584, 64, 20, top_p=True),
        "llama-2-7b step over 2 ranks": listed(32000, 2, 200),
        "llama-2-7b round, looked up": round_(32000, 200, drafts=False),
        "qwen2.5-7b round, looked up, top-p and a penalty": round_(152064, 20, drafts=False, usual=True),
        "llama-3.1-8b round of a draft, greedy": round_(128256, 1, drafts=True),
        "llama-2-7b sum over 2 ranks": exchange(4096, 2, True),
        "llama-2-70b gather over 8 ranks": exchange(4000, 8, False),
        "llama-2-7b o bf16 1, summed over 2 ranks": summed(2048, 4096, 16, 2),
        "llama-3.1-8b o int4-g128 1, summed over 2 ranks": summed(2048, 4096, 4, 2),
        "llama-2-7b o, gate_up and down int4-g128 1, with digits": left(4096, 11008),
    }


QUICK = (  # of every kernel, and of every way in which it is compiled otherwise, one case
    "llama-2-7b qkv bf16 1",
    "llama-2-7b gate_up bf16 4",
    "llama-2-7b down bf16 8",
    "llama-2-7b gate_up int8 1",
    "llama-2-7b o int4-g128 1",
    "llama-2-7b down int4-g128 8",
    "mixtral-8x7b gate_up bf16 2",
    "llama-2-7b o int4-g32z 1",
    "llama-2-7b o int8-g32 1",
    "llama-2-7b dequantize int4-g128",
    "llama-3.1-8b attention 1 of 2048",
    "llama-3.1-8b attention 1 of 2048, with digits",
    "gemma-3-4b and mixtral-8x7b, around products",
    "mistral-7b attention 2 x 9 of 8192",
    "llama-3.1-8b prefill",
    "llama-2-7b step",
    "llama-2-7b step over 2 ranks",
    "llama-2-7b round, looked up",
    "qwen2.5-7b round, looked up, top-p and a penalty",
    "llama-3.1-8b round of a draft, greedy",
    "llama-2-7b sum over 2 ranks",
    "llama-2-7b o bf16 1, summed over 2 ranks",
    "llama-2-7b o, gate_up and down int4-g128 1, with digits",
)


# -- comparing ----------------


def compiled(sm: int, names: Sequence[str]) -> list[Row]:
    """The launches of these cases on that architecture."""
    driver, rows, make = Driver(sm), list[Row](), cases()
    triton.runtime.driver.set_active(driver)
    versions = {"sm": str(sm), "triton": triton.__version__, "ptxas": ptxas_version(sm)}
    for name in names:
        driver.launches.clear()
        make[name]()
        for number, (kernel, sha1) in enumerate(driver.launches, 1):
            rows.append({"case": name, "number": str(number), "kernel": kernel} | versions | {"sha1": sha1})
    return rows


def ptxas_version(sm: int) -> str:
    """Such as 12.8.93."""
    found = re.search(r"V([\d.]+)", get_ptxas_version(sm))
    return found[1] if found else "unknown"


def fingerprints(sms: Iterable[int], names: Sequence[str] | None = None, processes: int = 2) -> list[Row]:
    """The launches of the named cases (None: of all), compiled side by side, in the order of the cases."""
    names = list(cases()) if names is None else names
    parts = [(sm, names[i::processes]) for sm in sms for i in range(processes)]
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        rows = [row for part in pool.map(compiled, *zip(*parts)) for row in part]
    return sorted(rows, key=lambda row: (row["sm"], names.index(row["case"]), int(row["number"])))


def recorded() -> list[Row]:
    """The rows of the record."""
    with RECORD.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: Row) -> tuple[str, ...]:
    """A kernel's name is no part of it, so that a kernel may be renamed."""
    return tuple(row[name] for name in ("case", "number", "sm", "triton", "ptxas"))


def differences(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(rows whose code is not what is recorded, rows whose key is not recorded)."""
    known = {key(row): row["sha1"] for row in recorded()}
    unknown = [row for row in rows if key(row) not in known]
    return [row for row in rows if known.get(key(row), row["sha1"]) != row["sha1"]], unknown


def write(rows: Sequence[Row]) -> None:
    """Put rows into the record, in the place of those with the same Triton, ptxas and architecture."""
    new = {(row["sm"], row["triton"], row["ptxas"]) for row in rows}
    old = recorded() if RECORD.exists() else []
    kept = [row for row in old if (row["sm"], row["triton"], row["ptxas"]) not in new]
    everything = sorted([*kept, *rows], key=lambda row: (row["triton"], row["ptxas"], row["sm"]))
    temporary = RECORD.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)
    temporary.replace(RECORD)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where code differs from the record, 2 bad input."""
    args = parse(argv)
    rows = fingerprints(args.sm, QUICK if args.quick else None, args.processes)
    if args.write:
        write(rows)
        print(f"{RECORD.name}: {len(rows)} launches recorded")
        return 0
    changed, unknown = differences(rows)
    for row in changed:
        print(f"differs: {row['case']}, launch {row['number']}, {row['kernel']}, sm_{row['sm']}")
    versions = f"Triton {rows[0]['triton']}, ptxas {rows[0]['ptxas']}"
    print(f"{versions}: {len(rows)} launches, {len(changed)} differ, {len(unknown)} are not recorded")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
