"""Hugging Face folder or Hub id <-> live model: safetensors, the packing table, strictness.

Knows names on disk and where they go. Refuses to know the dialects of config.json (`architectures.py`), what a weight
format looks like inside (`formats.py`) and how a model is run. Weights are read in place, memory-mapped, slice by
slice, straight to their device and dtype; safetensors only, never pickle.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from architectures import config_from_hf, text_part
from formats import FLOATS, QuantConfig, Quantized, Scheme, merge, suffixes, unpack
from input_folder import read_json, resolve, tell
from linear import Int4Linear, Int8Linear, Linear, RMSNorm, from_linear
from model import ModelConfig, Transformer
from tp import SHARD_DIM, TensorParallel

Span = tuple[int, int]  # a half-open range
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
# Names of tensors of a multimodal model: of its text part, and of the parts that are left out.
TEXT = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?(?=(lm_head)?)")
VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
# Prefixes of torch.compile and of DistributedDataParallel; names of a model that was saved without its head.
WRAPPED, BARE = re.compile(r"^(?:module\.)+|_orig_mod\."), re.compile(r"(?:layers|embed_tokens|norm)\.")
# Tensors that are left out: the table of RoPE is computed anew, and the KV cache is not quantized here.
LEFTOVER = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.([kv]_proj\.output_scale|[qkv]_(scale|zero_point)))")
# Models with norms behind attention and MLP give one of them the name that Llama gives the norm before the MLP: the
# end of our name, the name on disk.
BEHIND = [("post_attention_layernorm", "pre_feedforward_layernorm")]
BEHIND += [("self_attn.post_norm", "post_attention_layernorm"), ("mlp.post_norm", "post_feedforward_layernorm")]
# Devices on which 8-bit weights with groups or zero points become plain ones: no operator takes them there, and what
# expands them in every step is slower than weights of 16 bits (SmolLM2 on a CPU: 13.6 tok/s instead of 34 to 37).
PLAIN = ("cpu", "mps")
# Dtypes by the names that config.json and the command line give them; auto leaves the choice to `default_dtype`.
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json; of a multimodal model, those of its text part. FileNotFoundError without it."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give a Hugging Face checkpoint folder")
    return text_part(read_json(folder / "config.json"))


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that config.json declares (`dtype` or the older `torch_dtype`), bfloat16 when it declares none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if (dtype := DTYPES.get(name)) is None:
        raise ValueError(f"config.json declares dtype {name!r}; supported are {', '.join(list(DTYPES)[1:])}")
    return dtype


class Weights:
    """The tensors of a folder's safetensors, single file or sharded, by name; memory-mapped, read to `device`.

    The files' headers say what there is; an index only names the files. Names are the usual ones also where a file
    spells them as a compiled, a wrapped or a bare model does.
    """

    def __init__(self, folder: Path, device: torch.device = torch.device("cpu")) -> None:
        self.folder, self.device = folder, device
        self._files: dict[str, Any] = {}
        self.where: dict[str, str] = {}  # the file of each tensor
        self._stored: dict[str, str] = {}  # its name there
        files, index = self._shards()
        for file in files:
            for stored in self._open(file).keys():  # noqa: SIM118 (no mapping)
                name = TEXT.sub(lambda m: "" if m[1] else "model.", WRAPPED.sub("", stored))
                name = f"model.{name}" if BARE.match(name) else name
                if self.where.get(name) == file:
                    raise ValueError(f"{folder / file} holds {name!r} twice, once as {stored!r}")
                if name not in self.where or index.get(stored) == file:
                    self.where[name], self._stored[name] = file, stored

    def _shards(self) -> tuple[list[str], dict[str, Any]]:
        """The files to read, and the index's word for tensors that are in several of them."""
        if (self.folder / "model.safetensors").is_file():
            return ["model.safetensors"], {}
        path, found = self.folder / "model.safetensors.index.json", sorted(p.name for p in self.folder.iterdir())
        index = read_json(path).get("weight_map") if os.path.lexists(path) else {}
        if not isinstance(index, dict):
            raise ValueError(f"{path} has no weight_map of tensor names to files")
        files = {str(file) for file in index.values()}
        for file in sorted(files):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{path} names the file {file!r}; only .safetensors files in the folder are read")
        sets: dict[tuple[str, ...], set[str]] = {}  # of files that number each other
        for match in filter(None, map(SHARD.fullmatch, found)):
            sets.setdefault(match.groups(), set()).add(match[0])
        for key in {match.groups() for match in map(SHARD.fullmatch, files) if match} & sets.keys():
            files |= sets[key]
        if not index:
            whole = [names for (_, total), names in sets.items() if len(names) == int(total)]
            files = whole[0] if len(whole) == 1 else files
        return sorted(files or self._refuse()), index

    def _refuse(self) -> NoReturn:
        files, own = sorted(self.folder.iterdir()), "only safetensors are read: convert with transformers'"
        message = f"{self.folder} has no model.safetensors and no model.safetensors.index.json"
        for pattern, advice in (
            (r"adapter_.*\.safetensors", "an adapter: merge it into its base model with peft's merge_and_unload()"),
            (r".*-of-\d+\.safetensors", "download the rest of them too"),
            (r".*\.safetensors", "a single file must be called model.safetensors"),
            (r".*\.gguf", f"{own} from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(...)"),
            (r"consolidated.*\.pth", f"{own} convert_llama_weights_to_hf.py, or take the model's -hf folder"),
            (r".*\.(bin|pth|pt)", f"{own} AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(...)"),
        ):
            if others := [f.name for f in files if re.fullmatch(pattern, f.name) and f.is_file()]:
                raise FileNotFoundError(f"{message} but {_some(others)}; {advice}")
        raise FileNotFoundError(message)

    def _open(self, file: str) -> Any:  # noqa: ANN401
        if file not in self._files:
            if not (self.folder / file).is_file():
                raise FileNotFoundError(f"{self.folder / file} is missing, which the index names; download it too")
            try:
                self._files[file] = safe_open(self.folder / file, "pt", device=str(self.device))
            except (SafetensorError, OSError) as error:
                what = f"{self.folder / file} cannot be read as safetensors (truncated or corrupt?)"
                raise ValueError(f"{what}: {ascii(str(error))}") from error
        return self._files[file]

    def rename(self, old: str, new: str) -> None:
        """Call a tensor by another name, instead of one that had it."""
        self.where[new], self._stored[new] = self.where.pop(old), self._stored.pop(old)

    def __contains__(self, name: object) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def slice(self, name: str) -> Any:  # noqa: ANN401
        """A safetensors slice: `.get_shape()`, and `[a:b, c:d]` reads just that part. ValueError when there is no such
        tensor.
        """
        if name not in self.where:
            raise ValueError(f"{self.folder} has no tensor {name!r}, which config.json calls for")
        try:
            return self._open(self.where[name]).get_slice(self._stored[name])
        except SafetensorError as error:  # a dtype that this library or PyTorch does not know
            raise ValueError(f"{self.folder / self.where[name]}: {name!r}: {ascii(str(error))}") from error


@contextlib.contextmanager
def mapped(folder: Path) -> Iterator[None]:
    """While the folder's files are read, end the process with one line and status 2 where a file has become shorter.

    Reading behind the end of a mapped file is a bus error, which otherwise ends the process without a message. The
    handler is one of C, because Python runs its own after the failed instruction, which would fail again for ever.
    """

    def end(_: int) -> None:
        line = f"{Path(sys.argv[0]).name}: error: a weights file in {folder} became shorter while it was read"
        os.write(2, f"{ascii(line)[1:-1]}: try again when nobody writes there\n".encode())
        os._exit(2)

    if os.name != "posix":
        yield
        return
    handler, set_ = ctypes.CFUNCTYPE(None, ctypes.c_int)(end), ctypes.CDLL(None).signal
    set_.argtypes, set_.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = set_(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_(signal.SIGBUS, before)


def _some(names: list[str]) -> str:
    return ", ".join(repr(n)[1:-1] for n in names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def sources(name: str, config: ModelConfig) -> list[list[str]]:
    """The packing table: a module's path in `Transformer` -> modules on disk, [expert][part]; parts are joined along
    the rows. Those of Phi-3 are joined on disk already.
    """
    mixtral = config.model_type == "mixtral"
    path = name if name.startswith("lm_head") else f"model.{name}"
    if ".experts." in name:
        if mixtral:
            path = path.replace(".mlp.", ".block_sparse_moe.")
        stem, last = path.rsplit(".", 1)
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        parts = [gate, up] if last == "gate_up_proj" else [down]
        return [[f"{stem}.{e}.{p}" for p in parts] for e in range(config.num_experts)]
    if name.endswith(".mlp.gate") and mixtral:
        return [[path.replace(".mlp.", ".block_sparse_moe.")]]
    for ours, theirs in BEHIND if config.post_norms else ():
        if name.endswith(ours):
            return [[path.removesuffix(ours) + theirs]]
    for packed, parts in (("qkv_proj", ["q_proj", "k_proj", "v_proj"]), ("gate_up_proj", ["gate_proj", "up_proj"])):
        if name.endswith(f".{packed}") and config.model_type != "phi3":
            return [[path.removesuffix(packed) + p for p in parts]]
    return [[path]]


def row_order(path: str, config: ModelConfig, tp: TensorParallel) -> Tensor | None:
    """In which order a Linear has its rows, where it is not that on disk; None elsewhere.

    `model.rotate` turns pairs of numbers, one of each half of a head. Where a part of a head is turned (Phi-4-mini),
    the pairs lie on disk in the halves of that part, so the rows of q and k change places. Of 8 numbers, 4 of them
    turned, the order is 0 1 4 5 2 3 6 7.
    """
    turned, dim = config.rotary_dim, config.head_dim
    if turned == dim or not path.endswith("qkv_proj"):
        return None
    half, middle = turned // 2, (turned + dim) // 2
    head = [*range(half), *range(turned, middle), *range(half, turned), *range(middle, dim)]
    first, last = tp.span(config.num_key_value_heads, "num_key_value_heads")
    kv = last - first
    heads = [head] * (config.num_attention_heads // tp.size + kv) + [[*range(dim)]] * kv
    return (torch.tensor(heads) + dim * torch.arange(len(heads))[:, None]).flatten()


def as_stored(config: ModelConfig, weights: Weights) -> ModelConfig:
    """The config, with tie_word_embeddings as the files have it. ValueError where its sizes are not those of the files.

    Tied embeddings may be stored under one name or under both. Two matrices that differ are used as two, whatever
    config.json says.
    """
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in weights:
        a, b = weights.slice(head), weights.slice(embed if embed in weights else head)
        if a.get_shape() == b.get_shape() and torch.equal(a[:], b[:]):
            weights.rename(head, embed)
        else:
            tell(f"note: {weights.folder} ties the word embeddings, but {head} differs from them: it is used")
            config = replace(config, tie_word_embeddings=False)
    if not config.tie_word_embeddings and not any(name.startswith("lm_head.") for name in weights):
        raise ValueError(f"{weights.folder} has no {head}, and config.json has no tie_word_embeddings that is true")
    if (found := weights.slice(embed).get_shape()) != (want := [config.vocab_size, config.hidden_size]):
        wanted = f"config.json calls for {want} (vocab_size, hidden_size)"
        raise ValueError(f"tensor {embed!r} has shape {found}; {wanted}")
    for key, part in (("num_hidden_layers", "layers"), ("num_experts", "experts")):
        numbers = map(re.compile(rf".*\.{part}\.(\d{{1,6}})\.").match, weights)
        if (want := getattr(config, key)) != (count := max((int(n[1]) + 1 for n in numbers if n), default=0)):
            raise ValueError(f"config.json has {key} = {want}, and the files hold {count}")
    return config


@dataclass(frozen=True)
class Part:
    """What a rank reads of one Linear on disk, whose full shape is [N, K]."""

    name: str
    shape: tuple[int, int]
    rows: Span
    columns: Span


class Loader:
    """Fills modules of a `Transformer` from `Weights` and remembers what it used, so that leftovers can be refused."""

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        quant: QuantConfig | None,
        tp: TensorParallel,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if config.model_type == "gemma3_text":  # multiplied in the activations' dtype, as these models were trained
            rounded = float(torch.tensor(config.embedding_multiplier, dtype=dtype))
            config = replace(config, embedding_multiplier=rounded)
        self.weights, self.config, self.quant, self.tp = weights, as_stored(config, weights), quant, tp
        self.device, self.dtype = device, dtype
        self.used: set[str] = set()
        modules = sorted({name.rpartition(".")[0] for name in weights})
        self.schemes = quant.schemes(modules, weights) if quant else {}

    def fill_(self, root: nn.Module, prefix: str = "", progress: bool = False) -> None:
        """Fill everything under root (on the meta device), whose path in the Transformer is `prefix`. Quantized Linears
        are replaced.
        """
        modules = [(name, m) for name, m in root.named_modules() if isinstance(m, (Linear, RMSNorm, nn.Embedding))]
        for name, module in tqdm(modules, desc="loading", unit="module", disable=not progress, leave=False):
            path = ".".join(filter(None, (prefix, name)))
            if isinstance(module, Linear):
                if path != "lm_head" or not self.config.tie_word_embeddings:
                    parent, _, child = name.rpartition(".")
                    setattr(root.get_submodule(parent), child, self.linear(path, module))
            else:
                ((source,),) = sources(path, self.config)
                n, *tail = module.weight.shape
                if isinstance(module, nn.Embedding):
                    n = self.config.vocab_size
                elif self.config.qk_norm_whole and path.endswith(("q_norm", "k_norm")):
                    kv = self.config.num_key_value_heads * self.config.head_dim
                    n = kv if path.endswith("k_norm") else n * self.tp.size
                first, last = self._share(0, n, source)
                stored = self._plain(source, "weight", (n, *tail))[first:last]  # refuses before it is allocated
                weight = torch.zeros(module.weight.shape, device=self.device, dtype=self.dtype)
                if isinstance(module, RMSNorm):  # Gemma stores w - 1; logits are divided by dividing the last norm
                    offset = self.config.model_type == "gemma3_text"
                    stored = (stored.float() + offset) / (self.config.logits_scaling if path == "norm" else 1.0)
                weight[: len(stored)].copy_(stored)
                module.weight = nn.Parameter(weight, requires_grad=False)

    def linear(self, path: str, module: Linear) -> Linear:
        """The Linear for `path`, filled: `module` itself, or a quantized one in its place when the checkpoint's config
        says so.
        """
        grid = self._grid(path, module)
        schemes = {self.schemes.get(part.name) for row in grid for part in row}
        quantized = None if schemes == {None} else self._quantized(grid)
        if quantized is not None:
            module = self._replacement(module, quantized)
        else:
            for part in (part for row in grid for part in row if self.schemes.get(part.name) is None):
                self._plain(part.name, "weight", part.shape)  # refuses a wrong shape before it is allocated
            sizes = len(grid), module.out_features, module.in_features
            weight = torch.zeros(sizes, device=self.device, dtype=self.dtype)
            for e, row in enumerate(grid):
                at = 0
                for part in row:
                    read = self._dense(part)
                    weight[e, at : at + len(read)].copy_(read)
                    at += len(read)
            module.weight = nn.Parameter(weight if module.num_experts else weight[0], requires_grad=False)
        if module.bias is not None:
            parts = [self._plain(p.name, "bias", p.shape[:1])[slice(*p.rows)].to(self.dtype) for p in grid[0]]
            bias = torch.cat(parts).to(self.device)
            row_parallel = SHARD_DIM.get(grid[0][0].name.rpartition(".")[2]) == 1
            # a row-parallel bias enters the sum over ranks once
            module.bias = nn.Parameter(bias * (0 if row_parallel and self.tp.rank else 1), requires_grad=False)
        self.reorder_(path, module)
        return module

    def reorder_(self, path: str, module: Linear, back: bool = False) -> None:
        """Put the rows of a Linear into the order of `row_order`, or back into the order on disk. The Linear has the
        plain layout of any weight format.
        """
        order = row_order(path, self.config, self.tp)
        if order is not None:
            order = (order.argsort() if back else order).to(self.device)
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if name != "permutation":  # of the inputs
                    tensor.copy_(tensor[order])

    def finish(self) -> None:
        """ValueError for tensors nobody asked for, but for the few that real folders are known to contain."""
        extra, left_out = [], 0
        for name in self.weights:
            if name in self.used or LEFTOVER.fullmatch(name):
                continue
            if VISION.fullmatch(name) and self.config.model_type == "gemma3_text":
                left_out += 1
                continue
            part = self.weights.slice(name)
            if name.endswith(".bias") and part.get_shape() and part.get_dtype() in FLOATS and not part[:].any():
                continue  # GPTQ writers add zero biases
            extra.append(name)
        if extra:
            raise ValueError(f"the checkpoint has tensors that config.json does not call for: {_some(sorted(extra))}")
        if left_out:
            tell(f"note: {self.weights.folder}: text alone is read; {left_out} tensors for images are left out")

    def _grid(self, path: str, module: Linear) -> list[list[Part]]:
        """[expert][part]: what this rank reads, whether the parts are modules of their own on disk or rows of one."""
        c, names = self.config, sources(path, self.config)
        kind = path.rpartition(".")[2]
        dim = SHARD_DIM.get(names[0][0].rpartition(".")[2])
        n = module.out_features * (self.tp.size if dim == 0 else 1)
        k = module.in_features * (self.tp.size if dim == 1 else 1)
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        split = {"qkv_proj": (q, kv, kv), "gate_up_proj": (n // 2, n // 2), "lm_head": (c.vocab_size,)}
        sizes, grid = split.get(kind, (n,)), []
        columns = self._share(0, k, names[0][0] if dim == 1 else "")
        for row in names:
            joined, parts, at = len(row) < len(sizes), list[Part](), 0
            for name, size in zip(row * len(sizes) if joined else row, sizes):
                part = name if not joined or kind != "qkv_proj" else ("q_proj", "k_proj", "v_proj")[len(parts)]
                rows = self._share(at, size, part if dim == 0 else "")
                parts.append(Part(name, (sum(sizes) if joined else size, k), rows, columns))
                at += size if joined else 0
            grid.append(parts)
        return grid

    def _share(self, start: int, size: int, name: str) -> Span:
        """This rank's part of the `size` rows or columns, from `start` on, of what `name` is on disk; all of what
        is not split.
        """
        kind, tp, dim = name.rpartition(".")[2], self.tp, self.config.head_dim
        whole = self.config.qk_norm_whole
        if kind in ("k_proj", "v_proj") or (kind == "k_norm" and whole):
            first, last = (dim * i for i in tp.span(size // dim, "num_key_value_heads"))
        elif kind in ("embed_tokens", "lm_head"):
            local = tp.padded(size)
            first, last = min(tp.rank * local, size), min((tp.rank + 1) * local, size)
        elif kind in SHARD_DIM or (kind == "q_norm" and whole):
            local = tp.local(size, name)
            first, last = tp.rank * local, (tp.rank + 1) * local
        else:
            first, last = 0, size
        return start + first, start + last

    def _plain(self, name: str, kind: str, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
        """The slice of an unquantized tensor, before anything is read. ValueError for a wrong shape or dtype."""
        source = self.weights.slice(f"{name}.{kind}")
        if (found := tuple(source.get_shape())) != shape:
            raise ValueError(f"tensor '{name}.{kind}' has shape {list(found)}; config.json calls for {list(shape)}")
        if source.get_dtype() not in FLOATS:
            raise ValueError(f"tensor '{name}.{kind}' has dtype {source.get_dtype()}; supported are F32, F16 and BF16")
        self.used.add(f"{name}.{kind}")
        return source

    def _unpack(self, part: Part, scheme: Scheme) -> Quantized:
        present = [s for s in suffixes(scheme) if f"{part.name}.{s}" in self.weights]
        self.used.update(f"{part.name}.{s}" for s in present)
        tensors = {s: self.weights.slice(f"{part.name}.{s}") for s in present}
        return unpack(part.name, tensors, scheme, part.shape, rows=part.rows, columns=part.columns)

    def _dense(self, part: Part) -> Tensor:
        """This rank's share of a weight in the activations' dtype, whether it is quantized or not."""
        if scheme := self.schemes.get(part.name):
            return self._unpack(part, scheme).dequantize(self.dtype)
        return self._plain(part.name, "weight", part.shape)[slice(*part.rows), slice(*part.columns)]

    def _quantized(self, grid: list[list[Part]]) -> Quantized | None:
        """All parts and experts of one module as one logical tensor; None when they cannot be one (it is then
        dequantized).
        """
        experts = []
        for row in grid:
            parts = []
            for part in row:
                if (scheme := self.schemes.get(part.name)) is None:
                    return None
                parts.append(self._unpack(part, scheme))
            if (joined := merge(parts)) is None:
                return None
            experts.append(joined)
        whole = merge(experts, stack=True) if len(experts) > 1 else experts[0]
        if whole is not None and whole.bits == 8 and (whole.zero is not None or whole.scale.shape[-1] > 1):
            return None if self.device.type in PLAIN or whole.group_size < 32 else whole
        return whole

    def _replacement(self, module: Linear, quantized: Quantized) -> Linear:
        cls = Int4Linear if quantized.bits == 4 else Int8Linear
        new = cls(module.in_features, module.out_features, num_experts=module.num_experts, device=torch.device("meta"))
        new.bias = module.bias
        q, scale, zero = quantized.q, quantized.scale.to(self.dtype), quantized.zero
        if missing := module.out_features - q.shape[-2]:  # rows of no word, in the last share of a vocabulary
            rows = (0, 0, 0, missing)
            q, scale, zero = F.pad(q, rows), F.pad(scale, rows), None if zero is None else F.pad(zero, rows)
        new.set_(q, scale, zero, quantized.permutation)
        return new


def load(
    checkpoint: str,
    *,
    tp: TensorParallel = TensorParallel(),
    device: torch.device = torch.device("cpu"),
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Transformer:
    """Load a folder or Hub id as a Transformer. dtype None: `default_dtype`.

    ValueError or FileNotFoundError, one line, for everything that is missing, left over, mis-shaped, unreadable or
    unsupported.
    """
    folder = resolve(checkpoint)
    tp.check_same(fingerprint(folder) if tp.size > 1 else 0, "checkpoint")
    hf = read_config(folder)
    config = config_from_hf(hf)
    quant = quantization(folder, hf)
    dtype = dtype or default_dtype(folder, device)
    for note in quant.notes if quant else ():
        tell(note)
    with mapped(folder):
        loader = Loader(Weights(folder, device), config, quant, tp, device, dtype)
        with torch.device("meta"):
            model = Transformer(loader.config, tp)
        loader.fill_(model, progress=progress)
        loader.finish()
    return _finish_(model, device)


def _finish_(model: Transformer, device: torch.device) -> Transformer:
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.init_rope_(device)
    return model.eval()


def fingerprint(folder: Path) -> int:
    """A checksum of config.json and of the name, the size and sixteen pieces of every safetensors file. Ranks compare
    it before they share the work.
    """
    value = zlib.crc32((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        value = zlib.crc32(f"{path.name} {(size := path.stat().st_size)}".encode(), value)
        with open(path, "rb") as file:
            for i in range(16):
                file.seek(size * i // 16)
                value = zlib.crc32(file.read(4096), value)
    return value


def quantization(folder: Path, hf: dict[str, Any]) -> QuantConfig | None:
    """What a folder, whose config.json is hf, says of its quantized weights. ValueError names what is refused."""
    told = hf.get("quantization_config") or hf.get("compression_config") or hf.get("quantization")
    older = read_json(folder / "quantize_config.json") or read_json(folder / "quant_config.json")  # GPTQ's, AWQ's
    return QuantConfig.from_hf(told, older or None)


def default_dtype(source: Path | ModelConfig | None, device: torch.device) -> torch.dtype:
    """What a folder declares, bfloat16 where there is none, for random weights. On a CPU float32 instead without AVX2,
    as PyTorch has no fast products of 16 bits then, and else bfloat16 for float16 with quantized weights: of int4
    3072 x 576 its operator takes 0.13 ms in bfloat16, 1.8 in float16. The processor's features decide, never a
    stopwatch, so that ids repeat.
    """
    hf = read_config(source) if isinstance(source, Path) else {}
    declared = checkpoint_dtype(hf) if hf else torch.bfloat16
    if device.type != "cpu":
        return declared
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return torch.float32
    quantized = declared == torch.float16 and isinstance(source, Path) and quantization(source, hf)
    return torch.bfloat16 if quantized else declared


def quantized_copy(model: Transformer, bits: int) -> Transformer:
    """The model with its Linears rounded to 8 bits per row or 4 bits per group; embedding and norms are shared.

    The group is the largest of 128, 64, 32 that divides a layer's in_features; ValueError when none does.
    """
    with torch.device("meta"):
        copy = Transformer(model.config, model.tp)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, Linear) and not name.endswith("mlp.gate"):
            size = next((g for g in (128, 64, 32) if module.in_features % g == 0), 0)
            if bits == 4 and not size:
                raise ValueError(
                    f"{name} has in_features {module.in_features}, which 32 does not divide; use self-int8"
                )
            setattr(copy.get_submodule(parent), child, from_linear(module, bits, size if bits == 4 else -1))
        elif isinstance(module, (Linear, RMSNorm, nn.Embedding)):
            setattr(copy.get_submodule(parent), child, module)
    copy.init_rope_(model.inv_freq.device)
    return copy.eval()


def random_model(
    config: ModelConfig,
    *,
    bits: int = 16,
    group_size: int | None = None,
    quantize_head: bool = False,
    tp: TensorParallel = TensorParallel(),
    device: torch.device = torch.device("cpu"),
    dtype: torch.dtype = torch.bfloat16,
) -> Transformer:
    """A Transformer with random weights of standard deviation 0.02, for measuring; quantized weights are drawn in
    packed form. group_size None and the head, which stays plain by default, are as in `quantize.py`.
    """
    with torch.device("meta"):
        model = Transformer(config, tp)
    for name, module in list(model.named_modules()):
        if isinstance(module, (RMSNorm, nn.Embedding)):
            fresh = torch.ones if isinstance(module, RMSNorm) else torch.randn
            module.weight = nn.Parameter(fresh(module.weight.shape, device=device, dtype=dtype), requires_grad=False)
            if isinstance(module, nn.Embedding):
                module.weight.mul_(0.02)
        elif isinstance(module, Linear):
            lead = (module.num_experts,) if module.num_experts else ()
            n, k = module.out_features, module.in_features
            if module.bias is not None:
                module.bias = nn.Parameter(torch.zeros(n, device=device, dtype=dtype), requires_grad=False)
            plain = name.endswith("mlp.gate") or (name == "lm_head" and not quantize_head)
            if bits == 16 or plain:
                weight = torch.empty((*lead, n, k), device=device, dtype=dtype).normal_(std=0.02)
                module.weight = nn.Parameter(weight, requires_grad=False)
                continue
            half, size = {4: (8, group_size or 128), 8: (127, group_size or -1)}[bits]
            groups = k // size if size > 0 else 1
            q = torch.randint(-half, half, (*lead, n, k), device=device, dtype=torch.int8)
            scale = torch.full((*lead, n, groups), 0.02 * 3**0.5 / half, device=device, dtype=dtype)
            new = (Int4Linear if bits == 4 else Int8Linear)(
                k, n, num_experts=module.num_experts, device=torch.device("meta")
            )
            new.bias = module.bias
            new.set_(q, scale, None)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    if config.tie_word_embeddings and not (bits < 16 and quantize_head):
        model.lm_head.weight = model.embed_tokens.weight
    model.init_rope_(device)
    return model.eval()
