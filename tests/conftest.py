"""Tiny random checkpoints, written by transformers, that every test may ask for."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TINY = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def pytest_configure() -> None:
    """Workers of pytest-xdist, and what they start, share the cores: a thread a core in each of them takes minutes."""
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        threads = max(1, (os.cpu_count() or 1) // int(workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """tiny(model_type, shard=..., dtype=..., **config changes) -> (a fresh folder, the transformers model in it)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind: str = "llama", *, seed: int = 0, shard: str | None = None, dtype=torch.float32, **changes):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **(TINY | changes))
        config.dtype = dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for name, weight in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # transformers starts them at one and zero: no test of them
                weight.data.add_(0.1 * torch.randn_like(weight))
            else:
                weight.data.normal_(std=0.08)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        return folder, model

    return make
