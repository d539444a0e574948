"""Linear layers in every weight format behind one signature, with room for what is fused into them.

Knows weight formats and which fused kernel serves a few rows. Refuses to know models and files: nobody outside asks
which format a Linear holds. Legend: M rows, K in_features, N out_features, G groups of K, E experts.

    y = x @ W.T + bias,  optionally  x = norm(x) first,  y = silu(y[..., :N/2]) * y[..., N/2:] after it,  y = residual +
    y last.
"""

import torch
from torch import nn

import kernels


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

    use_kernels: serve up to kernels.MAX_ROWS rows by one fused kernel instead of several PyTorch operations.
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
        """(weight, scale, zero) as `kernels.linear` takes them."""
        return self.weight, None, None

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The logical weight [N, K] or [E, N, K] in `dtype` (default: the activations')."""
        weight, scale, zero = self.operands()
        if scale is None:
            return weight.to(dtype or weight.dtype)
        return kernels.dequantize(weight, scale, zero, self.out_features, self.in_features, dtype or scale.dtype)

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
        fused = self.use_kernels and (rows.shape[0] <= kernels.MAX_ROWS or experts is not None)
        if self.use_kernels and not fused and scale is not None:
            weight = kernels.dequantize(weight, scale, zero, self.out_features, self.in_features, x.dtype)
            scale = zero = None
        parts = [slice(None)]
        if fused and experts is not None:  # kept apart: a range over the rows would tie a compiled prefill to one T
            parts = [slice(i, i + kernels.MAX_ROWS) for i in range(0, rows.shape[0], kernels.MAX_ROWS)]
        y = [
            (kernels.linear if fused else kernels.linear_reference)(
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
    """W8A16: w = q * weight_scale[n]; weight_packed is `kernels.pack_int8` of q where kernels serve, else q itself."""

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
        self.weight_packed = kernels.pack_int8(q) if self.use_kernels else q.contiguous()
        self.weight_scale = scale.squeeze(-1).contiguous()


class Int4Linear(Linear):
    """W4A16: 4-bit weights in `kernels.pack_int4`'s layout, a scale per group of group_size inputs: w = (q - zero) *
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
        self.weight_packed, self.weight_scale = kernels.pack_int4(q), scale.contiguous()
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
