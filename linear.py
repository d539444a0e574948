"""Linear layers in every weight format behind one signature, with room for what is fused into them.

Knows weight formats and which fused kernel serves a few rows. Refuses to know models and files: nobody outside asks
which format a Linear holds. Legend: M rows, K in_features, N out_features, G groups of K, E experts.

    y = x @ W.T + bias,  optionally  x = norm(x) first,  y = silu(y[..., :N/2]) * y[..., N/2:] after it,  y = residual +
    y last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decode_kernels


def _blocks(q: Tensor) -> Tensor:
    """int8 [..., N, K] -> [..., N/16, K/128, 2 e, 2 u, 8 g, 4 t, 2 b, 2 h, 4 i], padded with zeros to whole blocks.

    Row 16 n + 8 h + g, column 128 c + 64 u + 32 e + 8 t + 4 b + i: the axes from g on are what the 32 lanes of a warp
    hold, 16 bytes each, of one operand of the tensor cores' m16n8k32 instruction.
    """
    n, k = q.shape[-2:]
    q = F.pad(q, (0, -k % 128, 0, -n % 16)).unflatten(-2, (-1, 2, 8)).unflatten(-1, (-1, 2, 2, 4, 2, 4))
    return q.movedim((-9, -8, -7, -6, -5, -4, -3, -2, -1), (-9, -2, -5, -8, -6, -7, -4, -3, -1))


def pack_int8(q: Tensor) -> Tensor:
    """int8 [..., N, K] -> int8 [..., N/16, K/128, 2048] in the memory order of `_blocks`."""
    return _blocks(q).flatten(-7).contiguous()


def pack_int4(q: Tensor) -> Tensor:
    """int8 [..., N, K] with values -8..7 -> uint8 [..., N/16, K/128, 1024]: e = 0 in the high nibble, 1 in the low."""
    high, low = _blocks(q).unbind(-7)
    return (high << 4 | low & 15).flatten(-6).view(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack_int8` and `pack_int4`, padding included: -> int8 [..., N, K]."""
    if packed.dtype == torch.uint8:
        packed = packed.view(torch.int8)
        packed = torch.cat([packed >> 4, packed << 4 >> 4], -1)
    q = packed.unflatten(-1, (2, 2, 8, 4, 2, 2, 4))
    q = q.movedim((-9, -2, -5, -8, -6, -7, -4, -3, -1), (-9, -8, -7, -6, -5, -4, -3, -2, -1))
    return q.flatten(-6).flatten(-4, -2)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight in float32 (Zhang & Sennrich 2019), returned in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def dequantize_reference(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    """Twin of `decode_kernels.dequantize`; int8 may also lie as it is, [..., N, K]."""
    q = weight if decode_kernels.lies_plain(weight, scale) else unpack(weight)[..., :n, :k]
    if scale is None:
        return q.to(dtype)
    if weight.dtype == torch.int8:
        return (q.float() * scale.float()[..., None]).to(dtype)
    q = q.float().unflatten(-1, (scale.shape[-1], -1))
    q = q if zero is None else q - zero.float()[..., None]
    return (q * scale.float()[..., None]).flatten(-2).to(dtype)


def linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    experts: Tensor | None = None,
) -> Tensor:
    """Twin of `decode_kernels.linear`: any number of rows, any shape and dtype."""
    if norm_weight is not None:
        x = rms_norm_reference(x, norm_weight, eps)
    if experts is not None:
        weight, scale, zero = (t if t is None else t[experts] for t in (weight, scale, zero))
    late = scale if weight.dtype == torch.int8 else None  # a per-channel scale is cheaper, and exact, on the result
    if scale is None or decode_kernels.lies_plain(weight, scale):
        w = weight.to(x.dtype)
    else:
        n, factor = decode_kernels.out_features(weight, scale), None if late is not None else scale
        w = dequantize_reference(weight, factor, zero, n, x.shape[-1], x.dtype)
    y = F.linear(x, w) if experts is None else torch.einsum("mk,mnk->mn", x, w)
    if late is not None:
        y = (y.float() * late.float()).to(x.dtype)
    if bias is not None:
        y = y + (bias if experts is None or bias.dim() == 1 else bias[experts])
    if silu_mul:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


def dequantize(weight: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The [..., N, K] matrix in `dtype` that a packed weight stands for, by a kernel where there is one."""
    if decode_kernels.fits_dequantize(weight, scale):
        return decode_kernels.dequantize(weight, scale, zero, n, k, dtype)
    return dequantize_reference(weight, scale, zero, n, k, dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    experts: Tensor | None = None,
) -> Tensor:
    """`decode_kernels.linear` where it fits, else `linear_reference`."""
    fits = decode_kernels.fits_linear(x, weight, scale, silu_mul, bias)
    return (decode_kernels.linear if fits else linear_reference)(
        x,
        weight,
        scale,
        zero,
        bias,
        norm_weight=norm_weight,
        eps=eps,
        residual=residual,
        silu_mul=silu_mul,
        experts=experts,
    )


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019): normalised in float32, cast, then scaled, in that order, as
    Hugging Face does.
    """

    def __init__(
        self, size: int, eps: float, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Linear(nn.Module):
    """weight [N, K] in the activations' dtype, bias [N] or None; with num_experts the weight is [E, N, K] and there is
    no bias.

    use_kernels: serve up to decode_kernels.MAX_ROWS rows by one fused kernel instead of several PyTorch operations.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        num_experts: int = 0,
        use_kernels: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_experts = in_features, out_features, num_experts
        self.use_kernels = use_kernels
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
        self._allocate(device, dtype)

    def _shape(self, *tail: int) -> tuple[int, ...]:
        return (self.num_experts, *tail) if self.num_experts else tail

    def _allocate(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        shape = self._shape(self.out_features, self.in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(weight, scale, zero) as `decode_kernels.linear` takes them."""
        return self.weight, None, None

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The logical weight [N, K] or [E, N, K] in `dtype` (default: the activations')."""
        weight, scale, zero = self.operands()
        if scale is None:
            return weight.to(dtype or weight.dtype)
        expand = dequantize if self.use_kernels else dequantize_reference
        return expand(weight, scale, zero, self.out_features, self.in_features, dtype or scale.dtype)

    def forward(
        self,
        x: torch.Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: torch.Tensor | None = None,
        silu_mul: bool = False,
        experts: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """x [..., K] -> [..., N], or [..., N/2] with silu_mul. experts: one for all, or int64 [M] with x [M, K]."""
        weight, scale, zero = self.operands()
        if isinstance(experts, int):
            one, experts = experts, None
            weight, scale, zero = (t if t is None else t[one] for t in (weight, scale, zero))
        rows = x.reshape(-1, self.in_features)
        added = None if residual is None else residual.reshape(-1, residual.shape[-1])
        fused = self.use_kernels and (rows.shape[0] <= decode_kernels.MAX_ROWS or experts is not None)
        if self.use_kernels and not fused and scale is not None:
            weight = dequantize(weight, scale, zero, self.out_features, self.in_features, x.dtype)
            scale = zero = None
        parts = [slice(None)]
        if fused and experts is not None:  # kept apart: a range over the rows would tie a compiled prefill to one T
            parts = [slice(i, i + decode_kernels.MAX_ROWS) for i in range(0, rows.shape[0], decode_kernels.MAX_ROWS)]
        y = [
            (linear if fused else linear_reference)(
                rows[part],
                weight,
                scale,
                zero,
                self.bias,
                norm_weight=None if norm is None else norm.weight,
                eps=0.0 if norm is None else norm.eps,
                residual=None if added is None else added[part],
                silu_mul=silu_mul,
                experts=None if experts is None else experts[part],
            )
            for part in parts
        ]
        return (y[0] if len(y) == 1 else torch.cat(y)).reshape(*x.shape[:-1], -1)

    @property
    def unfused(self) -> bool:
        """Whether quantized weights are expanded at every call, which is right but slow, for want of a kernel."""
        return self.operands()[1] is not None and not self.use_kernels

    def bytes_read(self) -> int:
        """Bytes one row reads: every weight and scale once, of one expert only."""
        total = sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))
        return total // max(self.num_experts, 1)


class Int8Linear(Linear):
    """W8A16: w = q * weight_scale[n]; weight_packed is `pack_int8` of q where kernels serve, else q itself."""

    def _allocate(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.register_buffer("weight_packed", torch.empty(0, device=device, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(0, device=device, dtype=dtype))

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return self.weight_packed, self.weight_scale, None

    def set_(
        self, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, permutation: torch.Tensor | None = None
    ) -> None:
        """Take logical values, packed here: q int8 [N, K], scale [N, 1]. ValueError with a zero point."""
        if zero is not None:
            raise ValueError("int8 weights with zero points are not supported; symmetric ones are")
        self.weight_packed = pack_int8(q) if self.use_kernels else q.contiguous()
        self.weight_scale = scale.squeeze(-1).contiguous()


class Int4Linear(Linear):
    """W4A16: 4-bit weights in `pack_int4`'s layout, a scale per group of group_size inputs: w = (q - zero) *
    scale.

    weight_packed holds [N, K] values, weight_scale is [N, G], weight_zero_point [N, G] or None (symmetric). permutation
    int64 [K] or None: the inputs' order in memory, for act-order checkpoints whose groups are not contiguous.
    """

    weight_zero_point: torch.Tensor | None
    permutation: torch.Tensor | None

    def _allocate(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.register_buffer("weight_packed", torch.empty(0, device=device, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.empty(0, device=device, dtype=dtype))
        self.register_buffer("weight_zero_point", None)
        self.register_buffer("permutation", None)

    def set_(
        self, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, permutation: torch.Tensor | None = None
    ) -> None:
        """Take logical values: q int8 [N, K] in -8..7, scale [N, G], zero [N, G] signed or None; packed for the kernel
        here.
        """
        self.weight_packed, self.weight_scale = pack_int4(q), scale.contiguous()
        self.weight_zero_point = None if zero is None else zero.to(scale.dtype)
        self.permutation = permutation

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return self.weight_packed, self.weight_scale, self.weight_zero_point

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        w = super().dequantize(dtype)
        return w if self.permutation is None else w[..., self.permutation.argsort()]

    def forward(
        self,
        x: torch.Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: torch.Tensor | None = None,
        silu_mul: bool = False,
        experts: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if self.permutation is not None:
            x, norm = (x if norm is None else norm(x))[..., self.permutation], None
        return super().forward(x, norm=norm, residual=residual, silu_mul=silu_mul, experts=experts)


def quantize_rtn(
    weight: torch.Tensor, bits: int, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
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


def from_linear(linear: Linear, bits: int, group_size: int = 128) -> Linear:
    """A new int8 (per row) or int4 (per group) Linear holding round-to-nearest values of an unquantized one.

    ValueError for a Linear that is quantized already.
    """
    if type(linear) is not Linear:
        raise ValueError("the model is quantized already; rounding it once more makes it no faster")
    w = linear.weight
    q, scale = quantize_rtn(w, bits, group_size if bits == 4 else -1, w.dtype)
    cls = Int4Linear if bits == 4 else Int8Linear
    out = cls(
        linear.in_features,
        linear.out_features,
        num_experts=linear.num_experts,
        use_kernels=linear.use_kernels,
        device=torch.device("meta"),
        dtype=w.dtype,
    )
    out.bias = linear.bias
    out.set_(q, scale, None)
    return out
