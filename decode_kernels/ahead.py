"""Compiles the kernels of a run side by side in processes, before the first of them is wanted.

Knows how to find out which kernels a run will launch, and how to compile them on every processor at once. Refuses to
know what a kernel does, and when a run begins.

Triton compiles a kernel when it is first launched, one after the other: 28 s of the 33 that a first start of
Llama-2-7B in int4 would take on an H200, and 5 s side by side on 16 processors, which the longest takes alone. It
keeps what it has compiled on disk, under a name made of the source, the types of the arguments, the constants and the
options. So whoever compiles a kernel of that name beforehand makes the launch quick.

**Which kernels.** A list beside the code would go stale. Instead the model itself runs, on tensors without contents
(PyTorch's device "meta") and without a GPU: `StandIn` answers what Triton asks of its driver, and `Recorder` takes what
Triton would compile. So the names are those of the real run, which a test checks.

**Processes.** This one forks another, which rehearses, and that one forks one for each processor, which compiles:

    this process   forks, traces what torch.compile makes, if anything, waits ........... runs, finds all on disk
    rehearsal            rehearses, forks for what is not on disk ...... waits, ends
    compilers                                                      take kernel after kernel, end

A child never calls CUDA, which does not survive a fork: it has no driver but the stand-in, frees no tensor, and ends
without any cleaning up. The operating system ends the children with their parent. Whatever goes wrong in one of them, a
kernel that is not on disk is compiled when it is launched, as ever.
"""

import contextlib
import copy
import ctypes
import gc
import hashlib
import importlib
import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_manager, triton_key

import decode_kernels
from decode_kernels import ROWS, Run, launch
from decode_kernels import prefill as prefilling
from linear import QuantizedLinear
from model import MLP, Attention, Experts, KVCache, Transformer
from speculative import FastRounds

META = torch.device("meta")
PATIENCE = 120  # seconds without any kernel's becoming ready, after which the children are given up


# -- which kernels ----------------


class StandIn:
    """What Triton asks of its driver, answered for a GPU of this architecture that need not be there, whose programs
    may have so many bytes of shared memory.
    """

    def __init__(self, sm: int, shared: int) -> None:
        self.sm, self.shared, self.utils = sm, shared, self

    def get_current_device(self) -> int:
        return -self.sm  # Triton keeps what it has compiled by device, and no device has this number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared}


class Rehearsal(TorchDispatchMode):
    """While it is entered, our operators launch their kernels though their tensors are without contents."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import Dynamo, which takes two seconds

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func.namespace == "decode":  # not what traces them, but what a device would run
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Recorder(triton.AsyncCompileMode):
    """While it is entered, a launch compiles nothing and launches nothing: `jobs` has what would have compiled it, and
    how many bytes of integers the module has that was called last.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.integers, self.jobs = 0, dict[str, tuple[Callable[[], Any], int]]()

    def called(self, module: nn.Module, _: object) -> None:
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        self.integers = sum(t.nbytes for t in tensors if t.dtype.itemsize == 1)

    def submit(self, key: str, compile_fn: Callable[[], Any], *_: object) -> None:
        self.jobs.setdefault(key, (compile_fn, self.integers))


def without_contents(model: Transformer) -> Transformer:
    """A copy with one layer of each kind, whose tensors have shapes and nothing else."""
    known: dict[int, Any] = {id(model.tp): model.tp}
    kinds: dict[object, nn.Module] = {}
    for layer in model.layers:
        shapes = [(t.shape, t.dtype) for t in (*layer.parameters(), *layer.buffers())]
        kinds.setdefault((layer.self_attn.window, *shapes), layer)
    known[id(model.layers)] = layers = nn.ModuleList()
    sums = [m.fast_sum for m in model.modules() if isinstance(m, (Attention, MLP)) and m.fast_sum]
    theirs = [t for each in sums for t in vars(each).values() if isinstance(t, Tensor)]
    for t in (*model.parameters(), *model.buffers(), *theirs):
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META)
        known[id(t)] = nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty
    layers.extend(copy.deepcopy(layer, known) for layer in kinds.values())
    return copy.deepcopy(model, known)


def ids(*shape: int) -> Tensor:
    """Such a tensor without contents."""
    return torch.empty(shape, dtype=torch.int64, device=META)


def rehearse(run: Run) -> None:
    """Every step of a run, with all that is a kernel in it."""
    model, b = without_contents(run.model), run.batch_size
    cache = KVCache(model.config, b, run.slots, META, model.norm.weight.dtype, model.tp)

    def step(tokens: int, end: int, select: Tensor | None = None) -> Tensor:
        return model(ids(b, tokens), ids(b, tokens), cache, end=end, select=select)[:, -1]

    for tokens in run.prefills:
        if tokens <= ROWS:
            step(tokens, tokens, ids(b))
            mlps(model, b, tokens)  # before the last layer, which alone is asked for the last tokens alone
        elif (rows := tokens * b) <= 2 * ROWS:  # its products are those of a step of so many rows
            model(ids(rows, 1), ids(rows, 1), cache, end=run.slots, select=ids(b))
            mlps(model, rows, 1)
    for tokens in sorted(run.tokens, reverse=True):
        logits = step(tokens, run.slots)
    token, of_rows = model.tp.broadcast(ids(b)), (torch.empty(4, device=META), ids(b), ids(b))
    if fast := decode_kernels.fast_rounds(logits.dtype, logits.shape[-1], b, run.structure):
        token = decode_kernels.sample(logits, run.structure, *of_rows, ids(*logits.shape).bool())
        if run.listed:
            decode_kernels.sample(logits[:, : model.vocab_local], run.structure, *of_rows, gather=model.tp.all_gather)
        decode_kernels.advance_(token, ids(b, 1), ids(b, 1), ids(1), ids(b, run.slots))
        if run.drafts is not None:
            end_round(fast, run, logits)
    if max(run.prefills) * b > ROWS:
        prefill(model, cache, ids(b, ROWS + 1))
        mlps(model, b, 1)


def end_round(fast: FastRounds, run: Run, logits: Tensor) -> None:
    """What a round adds to the steps of its models, of which this one gave these logits [B, V]. What only the other one
    needs is the same, if both have the same ids.
    """
    (b, v), (_, top_k, top_p, _, penalty) = logits.shape, run.structure
    of_rows, history, drafted = (torch.empty(4, device=META), ids(b), ids(b, 1)), ids(b, run.slots), ids(1)
    q, seen = torch.empty(b, 1, v, device=META) if run.drafts else None, ids(b, v).bool() if penalty else None
    if run.drafts:
        fast.propose_(logits, top_k or 1, top_p, *of_rows, drafted, history, q)
    else:
        fast.look_up_(history, ids(b, 1), max(run.tokens) - 1)
    for tokens in run.tokens:
        verified = fast.verify(logits.new_empty(b, tokens, v), top_k or 1, top_p, *of_rows, history, seen, q, None)
        fast.settle_(run.model.tp.broadcast(verified), 0, ids(b, 1), ids(b, 1), history, drafted, ids(b, 1), seen)


def mlps(model: Transformer, *shape: int) -> None:
    """The MLPs of so many tokens that no kernel has left digits of."""
    for layer in model.layers:
        x = torch.empty(*shape, model.config.hidden_size, dtype=model.norm.weight.dtype, device=META)
        layer.mlp(x, layer.post_attention_layernorm)


def prefill(model: Transformer, cache: KVCache, tokens: Tensor) -> None:
    """The kernels around the products and the attention of a prefill, which are PyTorch's: those would import Dynamo
    here.
    """
    dtype = model.norm.weight.dtype
    angles = torch.empty(*tokens.shape, 1, model.config.head_dim // 2, device=META)
    for m in model.modules():
        if isinstance(m, QuantizedLinear):  # a matrix of floats
            m.matrix(0 if m.num_experts else None, dtype)
        if isinstance(m, (MLP, Experts)) and getattr(m, "silu", True):
            prefilling.gate(torch.empty(tokens.numel(), m.gate_up_proj.out_features, dtype=dtype, device=META))
    for attention, layer_cache in zip((layer.self_attn for layer in model.layers), cache.layers):
        if attention.fast is not None:
            qkv = torch.empty(*tokens.shape, attention.qkv_proj.out_features, dtype=dtype, device=META)
            prefilling.rotate(attention, qkv, angles, angles, tokens, layer_cache)


def record(driver: StandIn, runs: Sequence[Run]) -> list[Callable[[], Any]]:
    """What compiles each kernel of these runs that is not on disk, as it is to begin: those of the largest matrices of
    integers first, which take up to 12 s. Triton's driver is the stand-in from here on.
    """
    triton.runtime.driver.set_active(driver)
    recorder, calls = Recorder(), nn.modules.module.register_module_forward_pre_hook
    for run in runs:
        with contextlib.suppress(Exception), recorder, Rehearsal(), calls(recorder.called), torch.inference_mode():
            rehearse(run)  # what it has come to, if not to its end, is worth having

    def missing(key: str) -> bool:
        folder = Path(get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).cache_dir)
        return not any(folder.glob("__grp__*"))  # which is written last

    jobs = [job for key, job in recorder.jobs.items() if missing(key)]
    return [job for job, _ in sorted(jobs, key=lambda pair: -pair[1])]


def name_kernels() -> None:
    """Give every kernel its name, in one order. For Triton looks at a function when it is first needed, and then counts
    the constants of those that this one calls only if it has looked at them before: what a rehearsal finds in another
    order than the run would have other names.
    """
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        for function in vars(importlib.import_module(f"decode_kernels.{file.stem}")).values():
            if isinstance(function, triton.JITFunction):
                _ = function.cache_key


# -- processes ----------------


def fork(body: Callable[[], object]) -> int:
    """The id of a process that runs `body`, and ends with it, or with its parent."""
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    with contextlib.suppress(BaseException):
        gc.disable()  # what is freed may be a tensor of the GPU
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a signal when the parent ends
        if os.getppid() == parent:
            body()
    os._exit(0)


def compile_all(jobs: Sequence[Callable[[], Any]], processes: int, report: int) -> None:
    """Do all jobs in so many processes; a byte into the file `report` after each."""
    source, sink = os.pipe()
    os.write(sink, b"".join(i.to_bytes(2, "little") for i in range(len(jobs))))
    os.close(sink)

    def work() -> None:
        os.nice(10)  # the parent may be tracing meanwhile, which takes longer
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        while number := os.read(source, 2):  # every process takes the next one
            with contextlib.suppress(Exception):
                kernel = jobs[int.from_bytes(number, "little")]()
                CudaLauncher(kernel.src, kernel.metadata)  # a piece of C for the types of its arguments
            os.write(report, b".")

    children = [fork(work) for _ in range(min(processes, len(jobs)))]
    for child in children:
        os.waitpid(child, 0)


@contextlib.contextmanager
def compiling_ahead(
    driver: StandIn, runs: Sequence[Run], processes: int, tell: Callable[[str], None]
) -> Iterator[None]:
    """Have every kernel of these runs on disk at the end of the body, which runs meanwhile."""
    # else torch.compile sets them, when it is first used, and the names on disk are others from there on
    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)
    os.environ.setdefault("TRITON_PTXAS_PATH", triton.knobs.nvidia.ptxas.path)
    name_kernels()
    report, end = os.pipe()

    def rehearsal() -> None:
        if jobs := record(driver, runs):
            tell(f"compiling {len(jobs)} kernels, {min(processes, len(jobs))} at a time; they are kept on disk")
            compile_all(jobs, processes, end)

    child = 0
    with contextlib.suppress(OSError):  # no more processes
        child = fork(rehearsal)
    os.close(end)
    try:
        # meanwhile what this process needs for every kernel: Triton's own driver, and what the names on disk begin with
        launch.options(1)
        triton_key()
        make_backend(driver.get_current_target()).hash()
        yield
        while select.select([report], [], [], PATIENCE)[0] and os.read(report, 4096):
            pass  # until all children have ended
    finally:
        os.close(report)
        if child:
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def processors() -> int:
    """How many the children may use: this process takes one, and the other ranks of this machine their share."""
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 1)


def stand_in(device: torch.device) -> StandIn:
    """For this GPU."""
    found = torch.cuda.get_device_properties(device)
    # a KB of every program's is CUDA's own
    return StandIn(10 * found.major + found.minor, found.shared_memory_per_multiprocessor - 1024)
