"""Quantized weights on disk <-> one logical form. Pure functions on tensors and dictionaries.

Knows: what compressed-tensors (`pack-quantized`, `int-quantized`), GPTQ (v1, v2, act-order, `dynamic`) and AWQ (`gemm`)
write into config.json and into safetensors. Refuses to know: files, models, devices, kernels. How a loader uses it::

    config = QuantConfig.from_hf(config_json.get("quantization_config"), quantize_config_json)  # None: not quantized
    schemes = config.schemes(names of Linears, names of tensors)  # None: a plain `.weight`
    tensors = {s: file.get_slice(f"{name}.{s}") for s in suffixes(scheme) if it is in the file}
    q = unpack(name, tensors, scheme, (N, K), rows=(n0, n1), columns=(k0, k1))  # only this rank's share
    qkv = merge([q, k, v])  # rows of all; stack=True: experts. None: they disagree, join their `dequantize()` instead

`tensors` holds safetensors slices or plain tensors; the result lives on the device they are read to and is ready for a
kernel: groups are contiguous and equal in the column order of `q`. With act-order, `permutation` says which input
feeds which column: `y = x[..., permutation] @ ((q - zero) * scale).T`. Where a slice cuts groups, the group size falls
to what still divides it, and for a slice of an act-order matrix to 1. The result is right in every case; use
`dequantize()` where no kernel takes that size.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Which logical axis (N outputs, K inputs, G groups) each dimension follows; "*": packed, 32 // bits values in an int32.
# The order of tensors is: values, scales, zero points, group of each column, shape.
_GPTQ = {"qweight": "K* N", "scales": "G N", "qzeros": "G N*", "g_idx": "K"}
_OTHER = {"weight_scale": "N G", "weight_zero_point": "N* G", "weight_g_idx": "K", "weight_shape": "2"}
LAYOUTS = {
    "pack-quantized": {"weight_packed": "N K*", **_OTHER},
    "int-quantized": {"weight": "N K", **_OTHER},
    "gptq": _GPTQ,
    "gptq_v2": _GPTQ,
    "awq": {"qweight": "K N*", "scales": "G N", "qzeros": "G N*"},
}
# Dtypes, as safetensors calls them, of what is not packed; packed tensors are I32
FLOATS, INTEGERS = ("F32", "F16", "BF16"), ("I32", "I64")
DTYPES = {"weight": ("I8",), "scales": FLOATS, "weight_scale": FLOATS, "weight_zero_point": ("I32", "I8")}
DTYPES |= dict.fromkeys(("g_idx", "weight_g_idx", "weight_shape"), INTEGERS)
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}
NAMES |= {torch.int8: "I8", torch.uint8: "U8"}
READABLE = "compressed-tensors (pack-quantized, int-quantized), gptq, auto-round and awq (gemm) of 4 or 8 bits are"
AWQ_SLOTS = [0, 4, 1, 5, 2, 6, 3, 7]  # output 8c + j sits in field AWQ_SLOTS[j] of word c
ROUTERS = r"re:.*\.(gate|shared_expert_gate)$"  # GPTQ and AWQ writers leave them plain without saying so


@dataclass(frozen=True)
class Scheme:
    """How one Linear is stored. group_size -1: one group for a whole row. symmetric: no zero points to read."""

    format: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool = False

    def __post_init__(self) -> None:
        """ValueError for what no reader here understands."""
        for name, kind in (("bits", int), ("group_size", int), ("symmetric", bool), ("act_order", bool)):
            if type(value := getattr(self, name)) is not kind:
                raise ValueError(f"the quantization has {name} = {value!r:.100}; it must be of type {kind.__name__}")
        widths = {"int-quantized": (8,), "awq": (4,)}.get(self.format, (4, 8))
        if self.format not in LAYOUTS or self.bits not in widths or (self.group_size < 1 and self.group_size != -1):
            what = f"{self.bits!r}-bit {self.format!r} weights with group_size {self.group_size!r}"
            raise ValueError(f"{what} are not supported: {READABLE}")


@dataclass(frozen=True)
class Quantized:
    """The logical form: weight[n, permutation[k]] = (q[n, k] - zero[n, g]) * scale[n, g], g = k // group_size.

    q int8 [..., N, K], -2^(bits-1) <= q < 2^(bits-1); scale floating [..., N, G]; zero int8 [..., N, G] (None:
    symmetric); permutation int64 [K] (None: columns are in their own order). A leading dimension is experts.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None = None
    permutation: Tensor | None = None
    bits: int = 4

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.q.shape[-1] // self.scale.shape[-1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [..., N, K] in its original column order, computed in float32."""
        w = self.q.unflatten(-1, (-1, self.group_size)).float()
        w = w if self.zero is None else w - self.zero.unsqueeze(-1)
        w = (w * self.scale.float().unsqueeze(-1)).flatten(-2).to(dtype)
        return w if self.permutation is None else w[..., self.permutation.argsort()]


@dataclass(frozen=True)
class QuantConfig:
    """What a checkpoint's config says about its weights, as rules (patterns, scheme or None), the first match wins.

    A pattern is "Linear" (any), a full module name, or `re:` and an expression that matches from the start of the name.
    `notes`: what a user should know of the rest of the config, a line each.
    """

    rules: tuple[tuple[tuple[str, ...], Scheme | None], ...]
    notes: tuple[str, ...] = ()

    def scheme(self, name: str) -> Scheme | None:
        """How the Linear called `name` (its path on disk, without suffix) is stored; None: a plain weight."""
        return self.schemes([name])[name]

    def schemes(self, names: Sequence[str], tensors: Container[str] | None = None) -> dict[str, Scheme | None]:
        """`scheme` of each. Writers forget to list what they left plain, or rounded all the same (routers, heads): with
        the names of a file's `tensors`, what it holds of a Linear decides.
        """
        matched = _matches([p for patterns, _ in self.rules for p in patterns if p[:3] == "re:"], names)
        general = next((scheme for _, scheme in reversed(self.rules) if scheme), None)
        found: dict[str, Scheme | None] = {}
        for name in names:
            known = (s for patterns, s in self.rules for p in patterns if p in ("Linear", name) or (p, name) in matched)
            found[name] = scheme = next(known, None)
            if tensors is None or general is None:
                continue
            plain = f"{name}.weight" in tensors
            if scheme is None and not plain and f"{name}.{suffixes(general)[0]}" in tensors:
                found[name] = general
            elif scheme is not None and plain and f"{name}.{suffixes(scheme)[1]}" not in tensors:
                found[name] = None
        return found

    @staticmethod
    def from_hf(config: dict[str, Any] | None, legacy: dict[str, Any] | None = None) -> QuantConfig | None:
        """Read `quantization_config`, else the older file of GPTQ or AWQ. ValueError names what is refused."""
        if not isinstance(config or {}, dict):
            raise ValueError(f"quantization_config is {config!r}; it must be an object")
        config = config or ({"quant_method": "awq" if "zero_point" in legacy else "gptq"} | legacy if legacy else None)
        if not config:
            return None
        method = config.get("quant_method", config.get("method"))
        method = "auto-round" if method == "intel/auto-round" else method
        readers = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq, "auto-round": _auto_round}
        if str(method) not in readers:
            mlx = " (a folder of MLX names none)" if method is None and "bits" in config else ""
            raise ValueError(f"quantization method {method!r}{mlx} is not supported: {READABLE}")
        try:
            rules = tuple(readers[str(method)](config))
            for pattern in (p for patterns, _ in rules for p in patterns):
                if not isinstance(pattern, str):
                    raise TypeError(f"{pattern!r} is no name of a module")
                re.compile(pattern.removeprefix("re:") if pattern[:3] == "re:" else "")
        except (AttributeError, LookupError, TypeError, RecursionError, OverflowError, re.error) as error:
            why = str(error) if isinstance(error, re.error) else "a part is not of its writer's type"
            why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else why
            raise ValueError(f"quantization_config cannot be read as {method}'s: {why}: {str(config)[:300]}") from error
        cache = "note: the checkpoint has scales for a quantized KV cache; the cache here keeps the model's dtype"
        return QuantConfig(rules, (cache,) if config.get("kv_cache_scheme") else ())

    def to_hf(self) -> dict[str, Any]:
        """`quantization_config` for config.json, for rules [(ignored, None), (names, symmetric scheme), ...], the last
        of which is for ("Linear",).
        """
        (ignored, _), *others, (_, scheme) = self.rules
        assert scheme is not None and scheme.symmetric
        own = [(names, other) for names, other in others if other and other != scheme]
        if scheme.format == "gptq":
            config: dict[str, Any] = {
                "quant_method": "gptq",
                "checkpoint_format": "gptq",
                "pack_dtype": "int32",
                "sym": True,
            }
            config |= {
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "desc_act": False,
                "lm_head": "lm_head" not in ignored,
            }
            skip = [p[3:] if p[:3] == "re:" else re.escape(p) + "$" for p in ignored if p not in ("lm_head", ROUTERS)]
            dynamic: dict[str, Any] = {"-:" + p: {} for p in skip}
            for names, other in own:
                dynamic |= {f"+:{re.escape(p)}$": {"bits": other.bits, "group_size": other.group_size} for p in names}
            return config | ({"dynamic": dynamic} if dynamic else {})
        # vLLM reads the format at the top, transformers the one of the group.
        groups = [_group(names, each) for names, each in (*own, (("Linear",), scheme))]
        config = {"quant_method": "compressed-tensors", "format": scheme.format, "quantization_status": "compressed"}
        config |= {"global_compression_ratio": None, "kv_cache_scheme": None, "ignore": list(ignored)}
        return config | {"config_groups": {f"group_{i}": group for i, group in enumerate(groups)}}


def _group(names: Sequence[str], scheme: Scheme) -> dict[str, Any]:
    """One of the `config_groups` of compressed-tensors."""
    size = None if scheme.group_size == -1 else scheme.group_size
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False, "actorder": None}
    weights |= {"strategy": "group" if size else "channel", "group_size": size}
    group = {"targets": list(names), "weights": weights, "input_activations": None, "output_activations": None}
    return group | {"format": scheme.format}


Rules = list[tuple[tuple[str, ...], Scheme | None]]
# Expressions of a download may backtrack for ever: they run in a child process that has 3 s and 1 GiB.
MATCHER = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError):  # Windows has no such limits, macOS not the second
    pass
patterns, names = json.load(sys.stdin)
print(json.dumps([[p, n] for p in patterns for n in names if re.match(p[3:], n)]))
"""


def _matches(patterns: list[str], names: Sequence[str]) -> set[tuple[str, str]]:
    """Which `re:` patterns match which names, from their start."""
    if not patterns:
        return set()
    request, argv = json.dumps([patterns, list(names)]), [sys.executable, "-I", "-S", "-c", MATCHER]
    child = subprocess.run(argv, input=request, capture_output=True, text=True)
    if child.returncode:
        raise ValueError(f"quantization_config has expressions that take too long to match: {str(patterns)[:200]}")
    return {(pattern, name) for pattern, name in json.loads(child.stdout)}


def _compressed_tensors(config: dict[str, Any]) -> Rules:
    """Ignored modules, then each target of the groups in the library's order: names, expressions, the class.

    Dynamic activation quantization is an approximation made for speed: activations simply stay whole here.
    """
    rules: Rules = [(tuple(config.get("ignore") or ()), None)]
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense" or config.get("transform_config"):
        raise ValueError("compressed-tensors with a sparsity_config or transform_config is not supported")
    if not isinstance(groups := config.get("config_groups"), dict):
        raise ValueError(f"compressed-tensors with config_groups = {groups!r} is not supported; it must be an object")
    targets: dict[str, Scheme | None] = {}
    for group in groups.values():
        weights, inputs = group["weights"], group.get("input_activations")
        form, size = group.get("format") or config["format"], weights.get("group_size") or -1
        if weights.get("type") != "int" or weights.get("strategy") not in ("group", "channel", "tensor", None):
            raise ValueError(f"compressed-tensors {form!r} with weights {weights} is not supported: {READABLE}")
        if (inputs and not inputs["dynamic"]) or group.get("output_activations"):
            raise ValueError(f"compressed-tensors {form!r} with static activation scales is not supported: {READABLE}")
        scheme = Scheme(form, weights["num_bits"], size, weights["symmetric"], weights.get("actorder") == "group")
        targets |= dict.fromkeys(group["targets"], scheme)
    order = sorted(targets, key=lambda target: (target == "Linear", target[:3] == "re:", target))
    return rules + [((target,), targets[target]) for target in order]


def _gptq(config: dict[str, Any]) -> Rules:
    """The overrides of `dynamic`, then the modules that are plain unless the config says otherwise, then one scheme for
    the rest.
    """
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    form = "marlin" if config.get("is_marlin_format") else form
    if form not in ("gptq", "gptq_v2") or config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"gptq checkpoint_format {form!r} ({config.get('pack_dtype', 'int32')}) is not supported")

    def scheme(override: dict[str, Any]) -> Scheme:
        c = config | override
        bits, size = c.get("bits", c.get("w_bit", 0)), c.get("group_size", c.get("q_group_size", -1))
        return Scheme(form, bits, size, c.get("sym", False), c.get("desc_act", False))  # no `sym`: the file decides

    rules: Rules = []
    for pattern, override in (config.get("dynamic") or {}).items():
        skip = override is False or pattern[:2] == "-:"
        rules.append((("re:" + re.sub(r"^[+-]:", "", pattern),), None if skip else scheme(override)))
    plain = [ROUTERS] + ["lm_head"] * (not config.get("lm_head"))
    if blocks := config.get("modules_in_block_to_quantize"):
        names = [name for names in blocks for name in ([names] if isinstance(names, str) else names)]
        plain.append(rf"re:(?!.*\.({'|'.join(map(re.escape, names))})$|lm_head$)")
    return [*rules, (tuple(plain), None), (("Linear",), scheme({}))]


def _awq(config: dict[str, Any]) -> Rules:
    """One scheme for every module but those whose path contains a name of `modules_to_not_convert`."""
    version, zero_point = config.get("version", "gemm"), config.get("zero_point", True)
    if version.lower() != "gemm":
        raise ValueError(f"awq version {version!r} is not supported: {READABLE}")
    plain = [ROUTERS, "lm_head", *(f"re:.*{re.escape(name)}" for name in config.get("modules_to_not_convert") or ())]
    bits, size = config.get("bits", config.get("w_bit", 0)), config.get("group_size", config.get("q_group_size", -1))
    return [(tuple(plain), None), (("Linear",), Scheme("awq", bits, size, zero_point is False))]


def _auto_round(config: dict[str, Any]) -> Rules:
    """The tensors are those of GPTQ or AWQ. `extra_config` overrides the scheme of modules, by name or expression; 16
    bits or more mean a plain weight.
    """
    form = config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq"
    kind = re.search("gptq(?!model)|awq", form)
    if kind is None or config.get("data_type", "int") != "int":
        raise ValueError(f"auto-round packing_format {form!r} ({config.get('data_type')}) is not supported: {READABLE}")

    def scheme(override: dict[str, Any]) -> Scheme | None:
        c = {"sym": True} | config | override
        return None if c["bits"] >= 16 else Scheme(kind[0], c["bits"], c["group_size"], c["sym"])

    extra = config.get("extra_config") or {}
    rules: Rules = [((name, f"re:(?:{name})$"), scheme(override)) for name, override in extra.items()]
    blocks = config.get("block_name_to_quantize") or ()
    blocks = blocks.split(",") if isinstance(blocks, str) else blocks
    blocks = [name for names in blocks for name in ([names] if isinstance(names, str) else names)]
    plain = [ROUTERS, "lm_head"] + [f"re:(?!{'|'.join(map(re.escape, blocks))})"] * bool(blocks)
    return [*rules, (tuple(plain), None), (("Linear",), scheme({}))]


def suffixes(scheme: Scheme) -> tuple[str, ...]:
    """Suffixes of the tensors that a Linear stored this way may have besides `bias`; not every file has all of them."""
    return tuple(LAYOUTS[scheme.format])


def _fields(words: Tensor, bits: int) -> Tensor:
    """int32 [R, C] -> uint8 [R, C * 32 / bits]: fields of each word, least significant first. No wide intermediate."""
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def _words(fields: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] -> int32 [R, ceil(C * bits / 32)], the inverse of `_fields`; zeros fill the last word."""
    octets = torch.nn.functional.pad(fields, (0, -fields.shape[-1] % (32 // bits)))
    octets = octets if bits == 8 else octets[..., ::2] | octets[..., 1::2] << 4
    return octets.contiguous().view(torch.int32)


def _checked(what: str, tensor: Any) -> list[int]:  # noqa: ANN401
    """The shape of a tensor or slice. ValueError for a dtype that its suffix may not have and that would be misread."""
    found = NAMES.get(tensor.dtype, str(tensor.dtype)) if isinstance(tensor, Tensor) else tensor.get_dtype()
    if found not in (wanted := DTYPES.get(what.rpartition(".")[2], ("I32",))):
        raise ValueError(f"{what} has dtype {found}; it must be {' or '.join(wanted)}")
    return list(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())


def _read(what: str, tensor: Any, axes: str, sizes: dict[str, int], scheme: Scheme, **spans: range) -> Tensor:  # noqa: ANN401
    """Check the full shape, read the spans (the other axes whole) and return signed values with N first."""
    shape = _checked(what, tensor)
    span = [spans.get(axis[0], range(sizes[axis[0]])) for axis in axes.split()]
    if axes == "N G" and sizes["G"] == 1 and shape in ([1], [sizes["N"]]):  # one scale for all, or a bare column
        return tensor[:].expand(sizes["N"])[span[0].start : span[0].stop, None]
    per_word = [32 // scheme.bits if axis[1:] else 1 for axis in axes.split()]
    expected = [-(-sizes[axis[0]] // per) for axis, per in zip(axes.split(), per_word)]
    if shape != expected:
        others = [(n, m) for n, m, axis in zip(shape, expected, axes.split()) if axis[0] != "G"]
        if len(shape) == len(expected) and all(n == m for n, m in others):
            groups = shape[[axis[0] for axis in axes.split()].index("G")]
            of = f"group_size {scheme.group_size} makes {sizes['G']} of {sizes['K']} columns"
            raise ValueError(f"{what} holds {groups} groups, but the quantization's {of}")
        raise ValueError(f"{what} has shape {shape}, expected {expected} for {scheme.bits}-bit {scheme.format} weights")
    x = tensor[tuple(slice(r.start // per, -(-r.stop // per)) for r, per in zip(span, per_word))]
    if max(per_word) > 1:
        dim = per_word.index(max(per_word))
        x = _fields(x.transpose(dim, 1), scheme.bits)
        x = x.unflatten(1, (-1, 8))[..., AWQ_SLOTS].flatten(1) if scheme.format == "awq" else x
        if what.endswith("qzeros") and scheme.format == "gptq":
            x = x + 1 & (1 << scheme.bits) - 1  # v1 stores zero - 1; a stored 15 can only be a zero of 0
        x = (x ^ 128).view(torch.int8) if scheme.bits == 8 else x.to(torch.int8) - 8
        x = x.narrow(1, span[dim].start % max(per_word), len(span[dim])).transpose(dim, 1)
    return x.t() if axes[0] != "N" and x.ndim == 2 else x


def unpack(
    name: str,
    tensors: Mapping[str, Any],
    scheme: Scheme,
    shape: tuple[int, int],
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> Quantized:
    """Read rows [start, stop) of N and columns [start, stop) of K of the Linear `name` into the logical form.

    tensors: suffix -> tensor or safetensors slice; shape: (N, K) of the whole. ValueError: missing or mis-shaped.
    """
    layout, size = LAYOUTS[scheme.format], shape[1] if scheme.group_size == -1 else scheme.group_size
    sizes = {"N": shape[0], "K": shape[1], "G": -(-shape[1] // size)}
    n, k = range(*(rows or (0, shape[0]))), range(*(columns or (0, shape[1])))
    values, scales, zeros, index = (*layout, "none")[:4]
    needed = [values, scales] + [zeros] * (not scheme.symmetric) + [index] * (scheme.act_order and index in layout)
    if missing := [suffix for suffix in needed if suffix not in tensors]:
        raise ValueError(f"{name} is stored as {scheme.format} but has no {', '.join(missing)}")
    if "weight_shape" in tensors:
        _checked(f"{name}.weight_shape", tensors["weight_shape"])
        if (stored := tensors["weight_shape"][:].tolist()) != list(shape):
            raise ValueError(f"{name}.weight_shape is {stored}, expected {list(shape)}")

    def read(suffix: str, axes: str, **spans: range) -> Tensor:
        return _read(f"{name}.{suffix}", tensors[suffix], axes, sizes, scheme, **spans)

    q, scale, zero = read(values, layout[values], N=n, K=k), read(scales, layout[scales], N=n), None
    if zeros in tensors:
        _checked(f"{name}.{zeros}", tensors[zeros])
        unpacked = tensors[zeros][:1].dtype == torch.int8  # compressed-tensors before 2025-04
        zero = read(zeros, "N G" if unpacked else layout[zeros], N=n)
        if scheme.symmetric and bool(zero.any()):
            raise ValueError(f"{name}: the config says symmetric, but {zeros} holds other zero points")
    step, permutation = math.gcd(size, k.start, len(k)), None
    group = regular = torch.arange(k.start, k.stop, device=q.device) // size
    if index in tensors and not torch.equal(group := read(index, "K", K=k).long(), regular):
        step, order = 1, group.argsort(stable=True)
        if len(k) == shape[1] and torch.equal(group[order], regular):  # act-order: sort the columns by group
            q, group, permutation, step = q[:, order], regular, order, math.gcd(size, len(k))
    pick = group[::step]
    if int(pick.min()) < 0 or int(pick.max()) >= sizes["G"]:
        raise ValueError(f"{name}.{index} names groups outside 0..{sizes['G'] - 1}")
    zero = None if zero is None or scheme.symmetric else zero[:, pick].contiguous()
    return Quantized(q.contiguous(), scale[:, pick].contiguous(), zero, permutation, scheme.bits)


def merge(parts: Sequence[Quantized], stack: bool = False) -> Quantized | None:
    """Several Linears as one: rows of all (q, k, v), with `stack` experts in a new dimension. None if they disagree."""
    orders = [p.permutation for p in parts if p.permutation is not None]
    if len({(p.bits, p.group_size, p.zero is None, p.permutation is None) for p in parts}) > 1:
        return None
    if not all(torch.equal(orders[0], order) for order in orders):
        return None
    join = torch.stack if stack else torch.cat
    zeros = [p.zero for p in parts if p.zero is not None]
    q, scale, zero = join([p.q for p in parts]), join([p.scale for p in parts]), join(zeros) if zeros else None
    return Quantized(q, scale, zero, parts[0].permutation, parts[0].bits)


def pack(part: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """One symmetric Linear [N, K] as tensors by suffix, `pack-quantized` or `gptq` (v1). The inverse of `unpack`."""
    assert part.zero is None and part.permutation is None
    n, k = part.q.shape
    fields = part.q.view(torch.uint8) ^ 128 if part.bits == 8 else (part.q + 8).view(torch.uint8)
    words = _words(fields, part.bits)
    if scheme.format == "pack-quantized":
        return {"weight_packed": words, "weight_scale": part.scale, "weight_shape": torch.tensor([n, k])}
    zeros = torch.full((k // part.group_size, n), (1 << part.bits - 1) - 1, dtype=torch.uint8)
    group = torch.arange(k, dtype=torch.int32) // part.group_size
    qweight, scales = words.t().contiguous(), part.scale.t().contiguous()
    return {"qweight": qweight, "qzeros": _words(zeros, part.bits), "scales": scales, "g_idx": group}
