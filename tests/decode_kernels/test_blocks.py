"""What stands around products, against the modules without it."""

import math

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, HAS_TRITON, needs_kernels, relative_error

import architectures
import decode_kernels
import model
from checkpoint import random_model
from linear import RMSNorm
from tp import TensorParallel

if HAS_TRITON:
    from decode_kernels import blocks, gpu


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 640), (2, 3, 100), (1, 16, 64)])
def test_a_norm_behind_a_block_equals_twin(shape, dtype):
    torch.manual_seed(shape[-1])
    norm = RMSNorm(shape[-1], 1e-6, DEVICE, dtype)
    norm.weight.copy_(torch.randn(shape[-1]))
    x, residual = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    decode_kernels.use_(norm)
    y = norm.fast(norm, x, residual)
    assert relative_error(y, residual.double() + norm(x).double()) < 5e-3
    many = x.expand(17, *shape)
    assert torch.equal(norm.fast(norm, many, residual), residual + norm(many))
    decode_kernels.use_(norm, False)
    assert norm.fast is None


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, n", [(1, 640), (5, 300)])
def test_gelu_equals_twin(rows, n, dtype):
    torch.manual_seed(n)
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": n, "max_position_embeddings": 64}
    config = architectures.config_from_hf({"model_type": "gemma3_text"} | sizes)
    mlp = model.MLP(config, TensorParallel()).to(DEVICE, dtype)
    for p in mlp.parameters():
        p.data.normal_(std=0.2)
    x = torch.randn(1, rows, 64, device=DEVICE).to(dtype)
    mlp.post_norm.weight.data.fill_(1)
    wanted = mlp.float()(x.float(), None)
    mlp.to(dtype).fast = gpu.gelu
    assert relative_error(mlp(x, None), wanted) < 1.5e-2
    h = torch.tensor([[-1e4, -5.0, 0.0, 5.0, 1e4, 1.0, 2.0, 3.0, 4.0, 5.0]], device=DEVICE).to(dtype)
    assert torch.allclose(blocks.gelu(h).cpu(), torch.tensor([[0.0, 0.0, 0.0, 20.0, 5e4]]).to(dtype), 0, 1e-5)


@needs_kernels
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("rows, experts, k", [(1, 8, 2), (16, 128, 8), (40, 5, 3)])
def test_routes_equals_twin(rows, experts, k, normalise):
    torch.manual_seed(experts)
    logits = torch.randn(rows, experts, device=DEVICE).to(DTYPES[0])
    (weights, ids), (wanted, theirs) = blocks.route(logits, k, normalise), model.route(logits, k, normalise)
    assert (weights - wanted).abs().max() < 1e-6 and ids.dtype == theirs.dtype
    assert torch.equal(logits.gather(1, ids), logits.gather(1, theirs))  # equal logits may change places
    assert all(len(set(row)) == k for row in ids.tolist())
    logits[0, 1] = math.nan
    weights, ids = blocks.route(logits, k, normalise)
    assert weights[0].isnan().all() and ids.min() >= 0 and ids.max() < experts


@needs_kernels
def test_the_first_among_equals_of_the_example_equals_twin():
    logits = torch.tensor([[1.0, 5.0, 2.0, 2.0]], device=DEVICE).log().half()
    for normalise, wanted in ((False, [0.5, 0.2]), (True, [0.714, 0.286])):
        weights, ids = blocks.route(logits, 2, normalise)
        assert weights.tolist() == [pytest.approx(wanted, abs=1e-3)] and ids.tolist() == [[1, 2]]


@needs_kernels
def test_a_model_with_norms_behind_its_blocks_equals_twin():
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 96, "max_position_embeddings": 64}
    config = architectures.config_from_hf({"model_type": "gemma3_text"} | sizes)
    torch.manual_seed(0)
    layer = random_model(config, device=DEVICE, dtype=DTYPES[0]).layers[0].mlp
    x, norm = torch.randn(1, 2, 64, device=DEVICE).to(DTYPES[0]), RMSNorm(64, 1e-6, DEVICE, DTYPES[0])
    norm.weight.fill_(1)
    wanted = layer(x, norm)
    decode_kernels.use_(layer)
    assert layer.fast is gpu.gelu and relative_error(layer(x, norm), wanted) < 5e-3
