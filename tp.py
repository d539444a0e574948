"""Tensor parallelism: who am I among the ranks, what ranks say to each other, and the plan that says which dimension of
which weight is sharded.

Knows torch.distributed and the names of the linear layers. Refuses to know models, checkpoints or quantization:
`model.py` calls the collectives where the reader can see them, `checkpoint.py` reads each rank's slice with the plan.

The split is Megatron-LM's (Shoeybi et al. 2019, section 3): query/key/value, gate and up by output rows, o_proj and
down_proj by input columns, so each block needs one all-reduce after attention and one after the MLP. Vocabulary
matrices are split by rows.
"""

import atexit
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

# HF module name -> dimension of its [out_features, in_features] weight that is split; every other parameter is
# replicated. Modules that are several in one on disk (Phi-3's qkv_proj and gate_up_proj) are split each by itself.
SHARD_DIM = {
    **dict.fromkeys("q_proj k_proj v_proj qkv_proj gate_proj up_proj gate_up_proj w1 w3".split(), 0),
    **dict.fromkeys(("embed_tokens", "lm_head"), 0),
    **dict.fromkeys(("o_proj", "down_proj", "w2"), 1),
}

# PyTorch 2.13 has a new name for it, and warns of the old one
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _broadcast(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    dist.broadcast(x, src=0)
    return x


# an operator, for torch.compile can trace the other two collectives, but not this one; not `custom_op`, whose first
# call imports Dynamo and sympy, 1.3 s of every start
_LIBRARY = torch.library.Library("decode", "FRAGMENT")
_LIBRARY.define("broadcast(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.impl("broadcast", _broadcast, "CompositeExplicitAutograd")
torch.library.register_fake("decode::broadcast", torch.empty_like, lib=_LIBRARY)


Value = TypeVar("Value")


class FastCollectives(Protocol):
    """What `decode_kernels` does in one kernel, for the few numbers of a decode step; None: too many, or others."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor | None:
        """The sum of x over all ranks, the same bits on every rank."""

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """The x of all ranks, [size, *x.shape]."""


@dataclass
class TensorParallel:
    """One rank's view of the group. With size 1 every collective returns its argument."""

    rank: int = 0
    size: int = 1
    words: "dist.ProcessGroup | None" = None  # the group that `share` uses
    fast: FastCollectives | None = None  # set by `decode_kernels.use_`; None: torch.distributed

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of x over all ranks; x may be overwritten."""
        y = None if self.fast is None else self.fast.all_reduce(x)
        if y is None and self.size > 1:
            dist.all_reduce(x)
        return x if y is None else y

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] on each rank -> [..., size * n], ranks in order along the last dimension."""
        if self.size == 1:
            return x
        out = None if self.fast is None else self.fast.gather(x)
        if out is None:
            out = x.new_empty((self.size, *x.shape))
            _gather(out.flatten(0, 1), x.contiguous())
        return out.movedim(0, -2).flatten(-2)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's x on every rank."""
        if self.size == 1:
            return x
        sent = None if self.fast is None else self.fast.gather(x)
        return torch.ops.decode.broadcast(x) if sent is None else sent[0]

    def share(self, value: Value) -> Value:
        """Rank 0's value on every rank. It waits as long as rank 0 takes, which may be a user who types."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.words)
        return box[0]

    def check_same(self, value: int, what: str) -> None:
        """ValueError unless all ranks hold the same value, naming the ranks that differ from rank 0."""
        values = [value] * self.size
        if self.words is not None:
            dist.all_gather_object(values, value, group=self.words)
        if different := [str(rank) for rank, other in enumerate(values) if other != values[0]]:
            raise ValueError(
                f"rank {', '.join(different)} has another {what} than rank 0: give every rank the same one"
            )

    def local(self, n: int, what: str) -> int:
        """This rank's share of n. ValueError when n does not divide."""
        if n % self.size:
            able = ", ".join(str(size) for size in range(1, min(n, 64) + 1) if n % size == 0)
            raise ValueError(f"{what} = {n} cannot be split over {self.size} ranks; it can over {able}")
        return n // self.size

    def span(self, n: int, what: str) -> tuple[int, int]:
        """This rank's part [first, last) of n key/value heads. Fewer heads than ranks: several ranks hold the same."""
        if n < self.size and self.size % n == 0:
            return self.rank * n // self.size, self.rank * n // self.size + 1
        return self.rank * self.local(n, what), (self.rank + 1) * self.local(n, what)

    def padded(self, n: int) -> int:
        """A rank's share of n words. Where n does not divide, the last ranks' shares end with rows of no word."""
        return n // self.size if n % self.size == 0 else -(-n // (8 * self.size)) * 8


def reach(address: str, port: int, seconds: float = 120) -> None:
    """Wait until rank 0 listens; OSError when it does not. PyTorch's own attempts take longer and write forty lines."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), 5).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def init(device: torch.device) -> TensorParallel:
    """The group torchrun started (RANK, WORLD_SIZE), or a group of one. NCCL on a GPU, gloo elsewhere.

    ValueError when the environment names a group and its other ranks cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return TensorParallel()
    if not dist.is_initialized():
        try:
            if os.environ.get("RANK", "0") != "0" and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
                reach(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=2)))
            kind = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))
        except (ValueError, RuntimeError, OSError) as error:  # a variable is missing, nobody answers
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"WORLD_SIZE is {size}, but the ranks do not meet: {reason}; start with torchrun"
            ) from error
        if device.type != "cuda":  # gloo may abort a process that ends without; NCCL waits for captured graphs for ever
            atexit.register(dist.destroy_process_group)
    words = dist.new_group(backend="gloo", timeout=timedelta(days=30))  # rank 0 may wait for a user who types
    return TensorParallel(dist.get_rank(), size, words)
