"""Linear layers in every weight format behind one signature, in plain PyTorch.

Knows the weight formats: for each its plain expression, its plain layout in memory, rounding, and `state_dict`. Refuses
to know models, files and devices. Nobody outside asks in which format a Linear holds its weight.

    y = x @ W.T + bias,  with options:  x = norm(x) before it,  y = silu(y[..., : N/2]) * y[..., N/2 :] after it,  and
    y = residual + y at the end.

Legend: M rows of activations, K in_features, N out_features, G groups of K, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Experts: TypeAlias = Tensor | int | None  # int64 [M]: row m meets matrix experts[m]; an int: all rows meet that one


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), computed in float32 and cast last."""

    fast: Callable[..., Tensor] | None = None  # residual + norm(x), for `model.add_to`; None: plain PyTorch

    def __init__(
        self, size: int, eps: float, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class FastLinear(Protocol):
    """A faster way to compute what a Linear computes; `decode_kernels` has them."""

    def covers(self, linear: Linear) -> bool:
        """Whether one row of activations in bf16 or fp16 is served."""

    def __call__(
        self, linear: Linear, x: Tensor, norm: RMSNorm | None, residual: Tensor | None, silu_mul: bool, experts: Experts
    ) -> Tensor | None:
        """What `Linear.forward` returns for x [M, K]; None for a shape or dtype that is not served."""


class FastQuantized(FastLinear, Protocol):
    """A fast path that lays the integers of a quantized weight out in memory in its own way."""

    def pack(self, q: Tensor) -> Tensor:
        """int8 [..., N, K] in this path's layout."""

    def unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        """The inverse of `pack`: int8 [..., N, K]."""

    def constants(self, linear: QuantizedLinear) -> Tensor | None:
        """What this path makes of scales and zero points and keeps in `fast_constants`."""

    def matrix(self, linear: QuantizedLinear, experts: Experts, dtype: torch.dtype) -> Tensor | None:
        """What `QuantizedLinear.matrix` returns, or None."""


class Linear(nn.Module):
    """weight [N, K] in the activations' dtype, bias [N] or None; with num_experts the weight is [E, N, K] and there is
    no bias. A fast path may lay it out in blocks of n rows, [N / n, n, K]; a `state_dict` holds [N, K] all the same.
    """

    fast: FastLinear | None  # set by `decode_kernels.use_`; None: the plain expression

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        num_experts: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_experts = in_features, out_features, num_experts
        self.fast, self.bias = None, None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
        self._allocate(device, dtype)

    def _allocate(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.weight = nn.Parameter(torch.empty(self.shape, device=device, dtype=dtype), requires_grad=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logical weight: (N, K) or (E, N, K)."""
        lead = (self.num_experts,) if self.num_experts else ()
        return (*lead, self.out_features, self.in_features)

    def forward(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        silu_mul: bool = False,
        experts: Experts = None,
    ) -> Tensor:
        """x [..., K] -> [..., N], or [..., N/2] with silu_mul."""
        rows = x.reshape(-1, self.in_features)
        added = None if residual is None else residual.reshape(-1, residual.shape[-1])
        y = None if self.fast is None else self.fast(self, rows, norm, added, silu_mul, experts)
        if y is None:
            y = self.finish(self.product(rows if norm is None else norm(rows), experts), added, silu_mul)
        return y.reshape(*x.shape[:-1], -1)

    def finish(self, y: Tensor, residual: Tensor | None, silu_mul: bool) -> Tensor:
        """What follows the matrix product [M, N]: the bias, the gate, the residual."""
        if self.bias is not None:
            y = y + self.bias
        if silu_mul:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y if residual is None else y + residual

    def product(self, x: Tensor, experts: Experts) -> Tensor:
        """x [M, K] -> [M, N]: the matrix product alone."""
        return _multiply(x, self.matrix(experts, x.dtype))

    def matrix(self, experts: Experts, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] or [E, N, K]; with experts that one [N, K], or [M, N, K]."""
        return _of(experts, self.weight.reshape(self.shape)).to(dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The logical weight [N, K] or [E, N, K] in `dtype` (default: its own)."""
        return self.matrix(None, dtype or self.weight.dtype)

    @property
    def expands(self) -> bool:
        """Whether every product first writes out the whole matrix, which is right but slow."""
        return False

    def bytes_read(self) -> int:
        """Bytes that one row reads: every weight and scale once, of one expert only."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        total = sum(t.nbytes for name, t in tensors.items() if name != "fast_constants")
        return total // max(self.num_experts, 1)


def _of(experts: Experts, t: Tensor) -> Tensor:
    return t if experts is None else t[experts]


def _multiply(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] by w [N, K], or row m by w[m] of [M, N, K]: [M, N]."""
    return F.linear(x, w) if w.dim() == 2 else torch.einsum("mk,mnk->mn", x, w)


class QuantizedLinear(Linear):
    """w = (q - zero) * scale, with a scale and perhaps a zero point for every group of inputs: `Int8Linear` (W8A16) and
    `Int4Linear` (W4A16) differ in q's plain layout alone.

    weight_packed holds the integers q in the plain layout, or in that of the fast path while there is one. A
    `state_dict` always holds the plain layout, so one that was made with a fast path is read without it, and vice
    versa. weight_scale is [N, G], weight_zero_point [N, G] or None (symmetric); G is 1 for a scale a row. permutation
    int64 [K] or None: the order of the inputs in memory, for act-order checkpoints, whose groups are not contiguous.
    """

    fast: FastQuantized | None
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    permutation: Tensor | None
    fast_constants: Tensor | None  # the fast path's own, made of the scales; in no `state_dict`
    bits: int
    stored: torch.dtype  # of the plain layout

    def _allocate(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.register_buffer("weight_packed", torch.empty(0, device=device, dtype=self.stored))
        self.register_buffer("weight_scale", torch.empty(0, 0, device=device, dtype=dtype))
        self.register_buffer("weight_zero_point", None)
        self.register_buffer("permutation", None)
        self.register_buffer("fast_constants", None, persistent=False)

    def lay(self, q: Tensor) -> Tensor:
        """q int8 [..., N, K] in the plain layout."""
        raise NotImplementedError

    def lift(self, packed: Tensor) -> Tensor:
        """The inverse of `lay`."""
        raise NotImplementedError

    def set_(self, q: Tensor, scale: Tensor, zero: Tensor | None, permutation: Tensor | None = None) -> None:
        """Take logical values: q int8 [N, K]; scale, zero [N, G], zero signed or None; permutation [K] or None."""
        self.weight_scale = scale.contiguous()
        self.weight_zero_point = None if zero is None else zero.to(scale.dtype)
        self.permutation = permutation
        self._lay_out_(q)

    def _lay_out_(self, q: Tensor) -> None:
        fast = self.fast
        self.weight_packed = self.lay(q) if fast is None else fast.pack(q)
        self.fast_constants = None if fast is None else fast.constants(self)

    def use_(self, fast: FastQuantized | None) -> None:
        """Switch to a fast path, or with None back to the plain expression; lays the integers out anew."""
        if fast is not self.fast:
            q = self.values(self.weight_packed)
            self.fast = fast
            self._lay_out_(q)

    def operands(self, experts: Experts) -> tuple[Tensor, Tensor, Tensor | None]:
        """(weight_packed, weight_scale, weight_zero_point), of the experts chosen."""
        names = ("weight_packed", "weight_scale", "weight_zero_point")
        packed, scale, zero = map(self._buffers.__getitem__, names)  # `nn.Module.__getattr__` takes a microsecond
        assert packed is not None and scale is not None
        if experts is None:
            return packed, scale, zero
        return _of(experts, packed), _of(experts, scale), None if zero is None else _of(experts, zero)

    def values(self, packed: Tensor) -> Tensor:
        """The integers, int8 [..., N, K], of weight_packed or of some experts' share of it."""
        n, k = self.shape[-2:]
        return self.lift(packed) if self.fast is None else self.fast.unpack(packed, n, k)

    @property
    def by_row(self) -> bool:
        """Whether a row has one scale and no zero point."""
        _, scale, zero = self.operands(None)
        return zero is None and scale.shape[-1] == 1

    @property
    def expands(self) -> bool:
        return (self.bits == 4 or not self.by_row) and (self.fast is None or not self.fast.covers(self))

    def forward(self, x: Tensor, *, norm: RMSNorm | None = None, **options: Any) -> Tensor:  # noqa: ANN401
        """As above, with the inputs in the order in memory."""
        if self.permutation is not None:
            x, norm = (x if norm is None else norm(x))[..., self.permutation], None
        return super().forward(x, norm=norm, **options)

    def product(self, x: Tensor, experts: Experts) -> Tensor:
        if self.by_row and self.fast is None and not torch.compiler.is_compiling():
            # a scale a row is as exact on the result, and cheaper there
            packed, scale, _ = self.operands(experts)
            return (_multiply(x, self.values(packed).to(x.dtype)).float() * scale.squeeze(-1).float()).to(x.dtype)
        if len(x) == 1 and not isinstance(experts, Tensor) and torch.compiler.is_compiling():
            # Inductor fuses this sum with what makes the matrix, so that integers are read and no floats are written.
            # As a product it calls a library: int8 Llama-2-7B on an H200 gives 104 tok/s that way, and so 171.
            return (self.matrix(experts, torch.float32) * x.float()).sum(-1)[None].to(x.dtype)
        return super().product(x, experts)

    def matrix(self, experts: Experts, dtype: torch.dtype) -> Tensor:
        w = None if self.fast is None else self.fast.matrix(self, experts, dtype)
        if w is None:
            packed, scale, zero = self.operands(experts)
            # q is exact in 16 bits, and so is q - zero
            q = self.values(packed).to(dtype).unflatten(-1, (scale.shape[-1], -1))
            q = q if zero is None else q - zero[..., None]
            w = (q * scale[..., None]).flatten(-2).to(dtype)
        return w

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        w = self.matrix(None, dtype or self.weight_scale.dtype)
        return w if self.permutation is None else w[..., self.permutation.argsort()]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        fast = self.fast
        self.use_(None)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.use_(fast)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # noqa: ANN401
        """As usual, once the buffers have the shapes that the groups, zero points and order of what comes call for."""
        fast, self.fast = self.fast, None
        packed = self.lay(torch.empty(self.shape, dtype=torch.int8, device="meta")).shape
        known = {"weight_packed": packed, "permutation": self.shape[-1:]}
        for name in ("weight_packed", "weight_scale", "weight_zero_point", "permutation"):
            given = state_dict.get(prefix + name)
            if given is not None:
                shape = known.get(name, (*self.shape[:-1], *given.shape[-1:]))  # scales: of any number of groups
                setattr(self, name, torch.empty(shape, dtype=given.dtype, device=self.weight_scale.device))
            elif name in ("weight_zero_point", "permutation"):
                setattr(self, name, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.use_(fast)


class Int8Linear(QuantizedLinear):
    """q in -128..127; its plain layout is q itself, int8 [N, K]."""

    bits, stored = 8, torch.int8

    def lay(self, q: Tensor) -> Tensor:
        return q.contiguous()

    def lift(self, packed: Tensor) -> Tensor:
        return packed


class Int4Linear(QuantizedLinear):
    """q in -8..7; its plain layout is two values a byte, uint8 [N, ceil(K / 2)]: an even column in the low four bits,
    the odd column after it in the high four.
    """

    bits, stored = 4, torch.uint8

    def lay(self, q: Tensor) -> Tensor:
        q = F.pad(q, (0, q.shape[-1] % 2)) & 15
        return (q[..., 0::2] | q[..., 1::2] << 4).view(torch.uint8)

    def lift(self, packed: Tensor) -> Tensor:
        q = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., : self.in_features]
        return (q ^ 8).view(torch.int8) - 8  # the sign of four bits


def quantize_rtn(weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric round-to-nearest of weight [..., K]: (q int8 [..., K], scale [..., G]). group_size -1 is one group per
    row.

    The scale is rounded to scale_dtype before it divides, so that its rounding is not an error on top. 4 bits: scale =
    amax / 7.5, q in -8..7; 8 bits: scale = amax / 127, q in -127..127. ValueError when group_size does not divide K.
    """
    k = weight.shape[-1]
    size = k if group_size == -1 else group_size
    if k % size:
        raise ValueError(
            f"in_features {k} is not a multiple of group size {size}; use one that divides it, or -1 for one per row"
        )
    top, low, half = (7, -8, 7.5) if bits == 4 else (127, -127, 127.0)
    groups = weight.float().unflatten(-1, (k // size, size))
    scale = (groups.abs().amax(-1) / half).clamp(min=2.0**-24).to(scale_dtype)
    q = (groups / scale.float().unsqueeze(-1)).round().clamp(low, top)
    return q.flatten(-2).to(torch.int8), scale


def from_linear(linear: Linear | nn.Linear, bits: int, group_size: int | None = None) -> QuantizedLinear:
    """A new int8 or int4 Linear holding round-to-nearest values of an unquantized one, ours or PyTorch's. group_size
    None: a scale a row with 8 bits, groups of 128 with 4.

    ValueError for a Linear that is quantized already, for other bits, and for a group_size that does not divide K.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; it must be 4 or 8")
    if isinstance(linear, QuantizedLinear):
        raise ValueError("the model is quantized already; rounding it once more makes it no faster")
    w = linear.dequantize() if isinstance(linear, Linear) else linear.weight.detach()
    experts = len(w) if w.dim() == 3 else 0
    q, scale = quantize_rtn(w, bits, group_size or {4: 128, 8: -1}[bits], w.dtype)
    cls = Int4Linear if bits == 4 else Int8Linear
    out = cls(linear.in_features, linear.out_features, num_experts=experts, device=torch.device("meta"), dtype=w.dtype)
    out.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    out.set_(q, scale, None)
    return out
