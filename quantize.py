"""Quantize a Hugging Face folder into a new one: to int8 or int4, by rounding to nearest or by GPTQ.

Knows how to stream a model block by block, with the activations of its calibration text. Refuses to know the algorithm
(`gptq.py`), how the formats are laid out (`formats.py`), which names a checkpoint uses (`checkpoint.py`), and how a
folder appears whole or not at all (`output_folder.py`).

Rounding reads no text unless it is asked to measure something. The memory needed is that of one block's weights, the
Hessian of one Linear with all its experts, the activations of the calibration rows (twice, at the last Linear of each
half of a block) and of the held-out rows, and one output shard.
"""

import argparse
import contextlib
import copy
import fnmatch
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from command_line import DEFAULT_CHECKPOINT, FAULTS, Parser, at_least, begin, ready, refuse
from command_line import DTYPES as DTYPE_NAMES

GROUP_SIZES = (128, 64, 32)
MODES = ("int8", "int8-gptq", "int4", "int4-gptq")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="quantize.py", description="Quantize a Hugging Face checkpoint.", allow_abbrev=False)
    flag, data = argparse.BooleanOptionalAction, Path(__file__).resolve().parent / "data"
    p.add_argument("--checkpoint", default=str(DEFAULT_CHECKPOINT), help="folder or Hub id org/name[@revision]")
    p.add_argument("--mode", choices=MODES, required=True, help="rounding, or GPTQ, to 8 or 4 bits")
    sizes = ("auto", *map(str, GROUP_SIZES), "-1")
    p.add_argument("--group-size", choices=sizes, help="inputs with one scale; -1: a row (default: int4 128, int8 -1)")
    p.add_argument("--output", type=Path, help="folder to write (default: NAME-MODE here)")
    p.add_argument("--force", action="store_true", help="replace an --output that this program wrote")
    p.add_argument(
        "--format", choices=("compressed-tensors", "gptq"), default="compressed-tensors", help="of the tensors"
    )
    p.add_argument("--calibration", default="self", metavar="FILE", help="any UTF-8 text; self: what the model writes")
    p.add_argument("--rows", type=at_least(1), help="of calibration; default: 32, with rounding none: measure nothing")
    p.add_argument("--row-length", type=at_least(16), default=512, help="tokens in a row, at most the model's context")
    p.add_argument("--heldout", type=Path, default=data / "heldout.txt", metavar="FILE", help="text for the perplexity")
    p.add_argument("--heldout-tokens", type=at_least(0), help="default: 8192, with rounding 0: measure nothing")
    p.add_argument("--act-order", action=flag, default=True, help="GPTQ: inputs with large activations first")
    p.add_argument("--clip-search", action=flag, default=True, help="search the scale of every group")
    head = "lm_head too (a tied one becomes a tensor of its own), with as many bits as the rest, or with 8"
    p.add_argument("--quantize-head", nargs="?", type=int, const=True, default=False, choices=[8], help=head)
    p.add_argument("--skip", nargs="+", default=[], metavar="PATTERN", help="Linears to leave, such as '*.layers.0.*'")
    p.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: CUDA if there is one")
    p.add_argument("--dtype", choices=DTYPE_NAMES, default="auto", help="of activations; auto: as in generate.py")
    return p.parse_args(argv)


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from architectures import config_from_hf
from checkpoint import Loader, Weights, checkpoint_dtype, mapped, read_config, resolve, sources
from engine import DTYPES, Engine, pick_device
from formats import QuantConfig, Quantized, Scheme, pack
from gptq import gptq, relative_error, round_to_nearest
from linear import Linear
from model import LayerCache, ModelConfig, Transformer
from output_folder import REPORT, Writer, complete_folder, write_json
from tokenizer import Tokenizer
from tp import TensorParallel

COPIED = ["*token*", "*.jinja", "vocab*", "merges.txt", "generation_config.json", "chat_template*"]
COPIED += ["LICEN[CS]E*", "NOTICE*"]
AUTO = 0
CACHE_BYTES = 1 << 32  # at most, for the rows of calibration text that a model writes together
LOSSES = ("perplexity_before", "perplexity_after", "kl_mean", "kl_99", "top1_agreement")
ERRORS = ("weight_error", "output_error_rtn", "output_error")  # relative; the last two need calibration text


@dataclass(frozen=True)
class Settings:
    """What to do to every Linear: round to nearest, or GPTQ if the mode's name ends in -gptq.

    group_size says how many inputs share a scale: -1 means all of a row, AUTO the largest size that divides all layers.
    """

    mode: str = "int4-gptq"
    group_size: int = 128
    format: str = "compressed-tensors"
    act_order: bool = True
    clip_search: bool = True
    quantize_head: bool | int = False  # 8: with so many bits
    skip: tuple[str, ...] = ()
    damp: float = 0.01

    def scheme(self, path: str) -> Scheme:
        """How the Linear of that name is stored."""
        size = (8, -1) if path == "lm_head" and self.quantize_head > self.bits else (self.bits, self.group_size)
        return Scheme("gptq" if self.format == "gptq" else "pack-quantized", *size, True)

    @property
    def bits(self) -> int:
        return 8 if self.mode.startswith("int8") else 4

    @property
    def solve(self) -> bool:
        """Whether GPTQ is asked for, which needs calibration rows."""
        return self.mode.endswith("-gptq")


@dataclass(frozen=True)
class Target:
    """One Linear to quantize. path is its name in the Transformer; parts[expert] lists the modules of which it is made
    on disk, each with its rows and with whether it is to be quantized.
    """

    path: str
    parts: list[list[tuple[str, int, bool]]]
    in_features: int


class Enough(Exception):
    """A hook raises this once it has seen its input, so that the rest of the block is not computed."""


class Streams:
    """The activations that enter the next block: of the `calibration` rows, and of held-out rows in the model `before`
    and `after` quantization.
    """

    def __init__(self, model: Transformer, calibration: Tensor, heldout: Tensor, tokens_at_once: int = 4096) -> None:
        rows = max(1, tokens_at_once // calibration.shape[1])
        self.model, self.rope = model, 0  # which rotation the next block takes
        self.heldout = [part for part in heldout.split(rows) if len(part)]
        anywhere = torch.zeros_like  # an embedding does not depend on the position
        self.calibration = [model.embed(part, anywhere(part))[0] for part in calibration.split(rows) if len(part)]
        self.before = [model.embed(part, anywhere(part))[0] for part in self.heldout]
        self.after = [x.clone() for x in self.before]

    def run(self, half: Callable[..., Tensor], xs: list[Tensor], keep: bool = True) -> None:
        """Run one half of a block over all rows. With keep its outputs replace its inputs in xs."""
        config = self.model.config
        for i, x in enumerate(xs):
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
            shape = (x.shape[0], config.num_key_value_heads, x.shape[1], config.head_dim)
            cache = LayerCache(shape, x.device, x.dtype)
            which = 1 if config.long(x.shape[1]) else self.rope
            with contextlib.suppress(Enough):
                y = half(x, *self.model.rope(positions, which), positions, cache, x.shape[1])
                xs[i] = y if keep else x

    def head(self, xs: list[Tensor], head: Linear) -> Iterator[Tensor]:
        """The logits of all rows, 512 tokens at a time, because with a vocabulary of 150,000 those of one token take
        600 KB.
        """
        for x in xs:
            for h in x.flatten(0, 1).split(512):
                with contextlib.suppress(Enough):
                    yield head(h, norm=self.model.norm).float()

    def loss(self, plain: Linear) -> dict[str, float | None]:
        """What quantization loses on the held-out rows, from the second token of each row on.

        `plain` is the head before quantization. The result holds the perplexity before and after, the mean and the 99th
        percentile of the KL divergence from before to after in nats, and how often both have the same first choice; all
        are None without held-out rows. ValueError for losses that are NaN or too large for a float.
        """
        wanted = (t for tokens in self.heldout for t in tokens[:, 1:].flatten().split(512))
        logits = (
            self.head([x[:, :-1] for x in xs], h) for xs, h in ((self.before, plain), (self.after, self.model.lm_head))
        )
        columns = [compare(token, before, after) for token, before, after in zip(wanted, *logits)]
        if not columns:
            return dict.fromkeys(LOSSES)
        table = torch.cat(columns, 1).double().cpu()
        before, after, kl, same = table.mean(1).tolist()
        if not (before < 700 and after < 700):  # NaN too
            raise ValueError(
                f"the loss of the held-out text is {before:g}, quantized {after:g}: the checkpoint is damaged, or "
                f"{self.before[0].dtype} too narrow (--dtype); --heldout-tokens 0 does not measure it"
            )
        return dict(zip(LOSSES, (math.exp(before), math.exp(after), kl, float(table[2].quantile(0.99)), same)))


def compare(token: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Compare the logits of two models, float32 [N, V], given the tokens that follow, int64 [N].

    Returns float32 [4, N]: the loss of each model, the KL divergence from before to after in nats, and 1 where both
    have the same first choice.
    """
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    losses = (-x.gather(1, token[:, None])[:, 0] for x in (p, q))
    return torch.stack([*losses, (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).float()])


def hessians(linear: Linear, run: Callable[[], object], last: list[dict[str, Any]]) -> tuple[Tensor, list[int]]:
    """X.T @ X / tokens, float32 [experts, K, K], for the inputs X that `linear` sees while `run()` runs, and the number
    of tokens that each expert sees.

    A Linear that adds the residual is the last of its half of a block. The arguments of its calls are collected in
    `last`: applied to them once it is quantized, it gives what the whole half would give.
    """
    experts, k, step = max(linear.num_experts, 1), linear.in_features, math.ceil(linear.in_features / 4)
    total, counts = torch.zeros(experts, k, k, device=linear.weight.device), [0] * experts

    def hook(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        x, norm, chosen = args[0], kwargs.get("norm"), kwargs.get("experts")
        x = (x if norm is None else norm(x)).flatten(0, -2).float()
        rows = chosen.unique().tolist() if isinstance(chosen, Tensor) else [chosen or 0]
        for e in rows:
            h = x[chosen == e] if isinstance(chosen, Tensor) else x
            for a in range(0, k, step):  # the lower triangle of the symmetric product is 5/8 of the work
                total[e, a:, a : a + step].addmm_(h[:, a:].t(), h[:, a : a + step])
            counts[e] += len(h)
        if kwargs.get("residual") is not None:
            last.append({"x": args[0]} | kwargs)
        if not linear.num_experts:
            raise Enough

    handle = linear.register_forward_pre_hook(hook, with_kwargs=True)
    run()
    handle.remove()
    total.tril_().add_(total.tril(-1).mT)
    return total.div_(torch.tensor(counts, device=total.device).clamp(min=1).view(-1, 1, 1)), counts


def quantize_linear_(
    linear: Linear, target: Target, seen: tuple[Tensor, list[int]] | None, settings: Settings, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Quantize one Linear, so that its weight becomes the dequantized one.

    seen is what `hessians` returns, or None, with which only the error of the weights is measured. Returns the row of
    the report, and the tensors to write by name.
    """
    size, bits = (scheme := settings.scheme(target.path)).group_size, scheme.bits
    search = settings.clip_search and (bits == 4 or size > 0)  # in a row of 8 bits it would find nothing
    notes, tensors, errors = [], dict[str, Tensor](), []
    for e, weight in enumerate(linear.weight if linear.num_experts else linear.weight[None]):
        w, where = weight.float(), f"expert {e}: " if linear.num_experts else ""
        if not all(x.isfinite() for x in w.aminmax()):  # NaN is passed on; unlike w.isfinite() this makes no copy
            raise ValueError(f"{target.parts[e][0][0]}.weight holds NaN or infinite values: the checkpoint is damaged")
        chosen = nearest = Quantized(*round_to_nearest(w, size, dtype, search=search, bits=bits), bits=bits)
        if settings.solve and seen:
            how: dict[str, Any] = {"act_order": settings.act_order, "clip_search": search, "damp": settings.damp}
            solved = gptq(w, seen[0][e], size, dtype, bits=bits, **how)
            if solved:
                chosen = Quantized(*solved[:2], bits=bits)
                notes += [f"{where}damping raised to {solved[2]:g}"] * (solved[2] > settings.damp)
            else:
                notes.append(f"{where}not solvable, rounded to nearest")
            if seen[1][e] < linear.in_features:
                notes.append(f"{where}only {seen[1][e]} calibration tokens for {linear.in_features} inputs")
        values = chosen.dequantize()
        found = {"weight_error": relative_error(w, values)}
        if seen:
            found["output_error_rtn"] = relative_error(w, nearest.dequantize(), seen[0][e])
            found["output_error"] = relative_error(w, values, seen[0][e])
        errors.append(found)
        start = 0
        for name, rows, wanted in target.parts[e]:
            span = slice(start, start := start + rows)
            if wanted:
                weight[span] = values[span]
                part = pack(Quantized(chosen.q[span], chosen.scale[span], bits=bits), scheme)
                # A copy does not keep the whole matrix alive. It is made last, because otherwise it leaves holes in the
                # heap, with which the memory in use grew from block to block.
                tensors |= {f"{name}.{suffix}": tensor.clone() for suffix, tensor in part.items()}
    report = {"name": target.path, "shape": list(linear.weight.shape)} | ({"tokens": sum(seen[1])} if seen else {})
    means = {key: math.sqrt(sum(found[key] ** 2 for found in errors) / len(errors)) for key in errors[0]}
    return report | means | {"notes": notes}, tensors


def plan(model: Transformer, settings: Settings) -> tuple[list[Target], list[str]]:
    """What to quantize, and the names on disk of the Linears that stay plain. ValueError for a --skip pattern that
    matches nothing.
    """
    targets, plain, used = [], [], set[str]()
    kv = model.config.num_key_value_heads * model.config.head_dim
    for path, linear in model.named_modules():
        if not isinstance(linear, Linear):
            continue
        n, parts = linear.out_features, []
        for names in sources(path, model.config):
            rows = {1: [n], 2: [n // 2] * 2, 3: [n - 2 * kv, kv, kv]}[len(names)]
            hits = [[p for p in settings.skip if fnmatch.fnmatchcase(name, p)] for name in names]
            used.update(*hits)
            always = path.endswith("mlp.gate") or (path == "lm_head" and not settings.quantize_head)
            parts.append([(name, r, not (always or hit)) for name, r, hit in zip(names, rows, hits)])
        wanted = [name for row in parts for name, _, chosen in row if chosen]
        plain += [name for row in parts for name, _, chosen in row if not chosen]
        if wanted:
            targets.append(Target(path, parts, linear.in_features))
    if set(settings.skip) - used or not targets:
        raise ValueError(
            f"--skip {' '.join(settings.skip)}: {'a pattern matches no Linear' if targets else 'nothing is left'}"
        )
    return targets, plain


def fit_group_size(settings: Settings, targets: list[Target]) -> Settings:
    """The settings with AUTO replaced by the largest group size that divides every Linear.

    ValueError, which offers that size, for one that does not.
    """
    fits = [g for g in GROUP_SIZES if not any(t.in_features % g for t in targets)]
    if settings.group_size == AUTO and fits:
        return replace(settings, group_size=fits[0])
    size = settings.group_size or GROUP_SIZES[-1]
    for target in targets if size > 0 else ():
        if target.in_features % size:
            name = next(name for row in target.parts for name, _, wanted in row if wanted)
            other = f"{fits[0]}, the largest that divides every layer (auto takes it)" if fits else "-1"
            raise ValueError(
                f"{name}: in_features {target.in_features} is not a multiple of --group-size {size}: "
                f"use --group-size {other}, or --skip '*.{name.rpartition('.')[2]}'"
            )
    return settings


def text_rows(file: Path, tokenizer: Tokenizer, config: ModelConfig, rows: int, length: int, least: int = 1) -> Tensor:
    """int64 [<= rows, length]: the text is tokenized as a whole, cut into pieces, and pieces at equal distances are
    taken, each behind BOS. ValueError for a text that gives fewer than `least` tokens.
    """
    bos, ids = tokenizer.encode("")[:1], tokenizer.encode(file.read_text("utf-8"), bos=False)
    step = length - len(bos)
    pieces = torch.tensor(ids[: len(ids) // step * step], dtype=torch.int64).view(-1, step)
    rows = min(rows, len(pieces))
    if rows * step < least:
        raise ValueError(
            f"{file} gives {len(ids)} tokens, {rows * step} in {rows} rows of {length}: at least {least} are needed; "
            "use a longer text, more rows of it, or a smaller --row-length"
        )
    if int(pieces.max()) >= config.vocab_size:
        raise ValueError(f"the tokenizer gives id {int(pieces.max())} to a model with vocab_size {config.vocab_size}")
    pieces = pieces[torch.linspace(0, len(pieces) - 1, rows).long()]
    return torch.cat((torch.tensor(bos, dtype=torch.int64).expand(rows, -1), pieces), 1)


@torch.inference_mode()
def stream(
    loader: Loader, texts: tuple[Tensor, Tensor], settings: Settings, targets: list[Target], writer: Writer
) -> dict[str, Any]:
    """Quantize one Linear after the other and write all tensors. The inputs for which a Linear is quantized are what
    the quantized Linears before it make of the calibration rows, if there are any.

    Returns the report: what `Streams.loss` returns, and a row for every Linear.
    """
    scale_dtype, model = checkpoint_dtype(read_config(loader.weights.folder)), empty(loader.config)
    report: list[dict[str, Any]] = []

    def quantize_(root: nn.Module, prefix: str, part: str, run: Callable[[], object]) -> bool:
        """Quantize the Linears of one half of a block. Returns whether its calibration activations are up to date."""
        last: list[dict[str, Any]] = []
        for target in targets:
            if not target.path.startswith(prefix + part):
                continue
            started, linear = time.perf_counter(), root.get_submodule(target.path.removeprefix(prefix))
            assert isinstance(linear, Linear)
            seen = hessians(linear, run, last) if streams.calibration else None
            loader.reorder_(target.path, linear, back=True)
            row, tensors = quantize_linear_(linear, target, seen, settings, scale_dtype)
            loader.reorder_(target.path, linear)
            report.append(row | {"seconds": time.perf_counter() - started})
            say(report[-1])
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            streams.calibration = [linear(**call) for call in last] or streams.calibration
        return bool(last)

    loader.fill_(model.embed_tokens, "embed_tokens")
    model.init_rope_(loader.device)
    streams = Streams(model, *texts)
    for i, block in enumerate(tqdm(model.layers, desc="quantizing", unit="block", disable=None)):
        loader.fill_(block, f"layers.{i}")
        streams.rope = loader.config.layer_ropes[i]
        for part, half in halves(block):  # so that attention is not computed again for the Linears of the MLP
            streams.run(half, streams.before)
            done = quantize_(block, f"layers.{i}.", part, partial(streams.run, half, streams.calibration, keep=False))
            if not done:
                streams.run(half, streams.calibration)
            streams.run(half, streams.after)
        writer.copy(loader.weights, f"model.layers.{i}.")
        block.to_empty(device="meta")
    loader.fill_(model.norm, "norm")
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    else:
        model.embed_tokens.to_empty(device="meta")  # with a large vocabulary it is larger than a block
        loader.linear("lm_head", model.lm_head)
    for prefix in ("model.embed_tokens.", "model.norm.", "lm_head."):
        writer.copy(loader.weights, prefix)
    plain = copy.deepcopy(model.lm_head) if settings.quantize_head and streams.heldout else model.lm_head
    quantize_(model.lm_head, "lm_head", "", lambda: deque(streams.head(streams.calibration, model.lm_head), maxlen=0))
    loader.finish()
    return streams.loss(plain) | {"layers": report}


def halves(block: nn.Module) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """The attention and the MLP of a block: how the names of their Linears begin, and a function to run each."""
    yield "self_attn.", lambda x, *rest: block.self_attn(x, block.input_layernorm, *rest)
    yield "mlp.", lambda x, *_: block.mlp(x, block.post_attention_layernorm)


def empty(config: ModelConfig) -> Transformer:
    """A Transformer on the meta device, which takes no memory."""
    with torch.device("meta"):
        return Transformer(config)


def say(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    numbers = "".join(f"{row[key]:11.5f}" for key in ERRORS if key in row)
    notes = row["notes"][:1] + [f"and {len(row['notes']) - 1} more notes"] * (len(row["notes"]) > 1)
    shape = "x".join(map(str, row["shape"]))
    tqdm.write(f"{row['name']:32}{shape:>18}{numbers}{row['seconds']:9.2f}  {'; '.join(notes)}".rstrip())


def copies(folder: Path) -> list[Path]:
    """The small files that a quantized folder takes over unchanged. A folder that bears such a name is left out."""
    found = [path for path in folder.iterdir() if any(fnmatch.fnmatch(path.name, pattern) for pattern in COPIED)]
    for path in found:
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there")
    return sorted(path for path in [*found, *folder.glob("additional_chat_templates/*.jinja")] if path.is_file())


def check_room(parent: Path, weights: Weights, replaced: set[str], settings: Settings, dtype: torch.dtype) -> None:
    """ValueError when the disk has no room for what will be written."""
    total = 0.0
    for name in weights:
        shape, path = weights.slice(name).get_shape(), name.removesuffix(".weight")
        width, scheme = 8.0 * dtype.itemsize, settings.scheme(path)
        if path in replaced:
            width = scheme.bits + width / (scheme.group_size if scheme.group_size > 0 else shape[-1])
        total += math.prod(shape) * width / 8
    if total > (free := shutil.disk_usage(parent).free):
        raise ValueError(
            f"the result needs {total / 1e6:.1f} MB and {parent} has {free / 1e6:.1f} MB free: No space left"
        )


def quantize(
    checkpoint: str,
    output: Path,
    settings: Settings,
    calibration: tuple[Path | None, int, int],
    heldout: tuple[Path, int],
    device: torch.device,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Quantize a folder or Hub id into the folder `output`, and return the report that lies beside its weights.

    calibration is a text file (None: the model writes the text itself), a number of rows and their length in tokens;
    heldout is a text file and a number of tokens. With 0 rows or tokens no such text is used. dtype is that of the
    activations; None means the checkpoint's on a GPU and float32 on a CPU. ValueError or OSError with a message of one
    line for everything that is wrong with the input or the disk; nothing is left behind then.
    """
    folder = resolve(checkpoint)
    hf = read_config(folder)
    if "quantization_config" in hf or (folder / "quantize_config.json").exists():
        raise ValueError(f"{folder} is quantized already: start from the unquantized checkpoint")
    config, weights, scale_dtype = config_from_hf(hf), Weights(folder, device), checkpoint_dtype(hf)
    targets, plain = plan(empty(config), settings)
    settings = fit_group_size(settings, targets)
    replaced = {name for target in targets for row in target.parts for name, _, wanted in row if wanted}
    dtype = dtype or (torch.float32 if device.type == "cpu" else scale_dtype)
    with complete_folder(output, folder, force) as work, mapped(folder):
        check_room(work.parent.parent, weights, replaced, settings, scale_dtype)
        for path in copies(folder):
            (target := work / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        writer = Writer(work, replaced)
        loader = Loader(weights, config, None, TensorParallel(), device, dtype)
        texts = read_texts(loader, settings, calibration, heldout)
        report = stream(loader, tuple(rows.to(device) for rows in texts), settings, targets, writer)
        report["bytes_after"] = writer.finish()
        report["bytes_before"] = sum((folder / file).stat().st_size for file in set(weights.where.values()))
        rules = [((path,), settings.scheme(path)) for path in ("lm_head", "Linear") if path not in plain]
        hf["quantization_config"] = QuantConfig(((tuple(plain), None), *rules)).to_hf()
        hf["tie_word_embeddings"] = config.tie_word_embeddings and not settings.quantize_head
        write_json(work / "config.json", hf)
        run = {"torch": torch.__version__, "device": device.type, "dtype": str(dtype), **asdict(settings)}
        report |= run | {"scale_bits": 8 * scale_dtype.itemsize}
        report |= dict(zip(("calibration_tokens", "heldout_tokens"), (rows.numel() for rows in texts)))
        report["files"] = sorted([REPORT, *(path.relative_to(work).as_posix() for path in work.rglob("*"))])
        write_json(work / REPORT, report)
    return report


def own_rows(folder: Path, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """int64 [rows, length] of text that the model writes itself, beginning with BOS, at temperature 1 and without top-k
    or top-p. It writes on after an end-of-text id, as its training texts went on with the next document.
    """
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    name = str(dtype).removeprefix("torch.")
    engine = Engine.load(folder, device=device.type, dtype=name, chosen=plain)
    begin = engine.tokenizer.encode("")[:1] or [min(engine.tokenizer.stop_ids, default=0)]
    c, done = engine.model.config, list[list[int]]()
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize * length  # bytes of a row
    together = math.ceil(rows / math.ceil(rows * cache / CACHE_BYTES))
    if device.type == "cuda":
        together = min(together, 16)  # the kernels take no more rows
    for at in tqdm(range(0, rows, together), desc="writing calibration rows", unit=f"{together} rows", disable=None):
        texts = [list(begin) for _ in range(min(together, rows - at))]
        for piece in engine.generate(texts, max_new_tokens=length - 1, ignore_eos=True, seed=at):
            texts[piece.row] += piece.ids
        done += texts
    return torch.tensor(done)


def read_texts(
    loader: Loader, settings: Settings, calibration: tuple[Path | None, int, int], heldout: tuple[Path, int]
) -> tuple[Tensor, Tensor]:
    """Rows of calibration and of held-out text, as many as `quantize` was asked for, and what heads the table."""
    config, folder = loader.config, loader.weights.folder
    file, count, length = *calibration[:2], min(calibration[2], config.max_position_embeddings)
    least = max(512, config.hidden_size) if settings.solve else 1  # with fewer tokens than inputs a Hessian is singular
    rows = held = torch.empty(0, length, dtype=torch.int64)
    tokenizer = Tokenizer.from_folder(folder)
    if count and file:
        rows = text_rows(file, tokenizer, config, count, length, least)
    elif 0 < count * length < least:
        raise ValueError(f"{count} rows of {length} tokens: at least {least} are needed; use more or longer rows")
    if heldout[1]:
        held = text_rows(heldout[0], tokenizer, config, max(1, heldout[1] // length), length)
    if count and not file:
        rows = own_rows(folder, count, length, loader.device, loader.dtype)
    if len(rows):
        tqdm.write(f"calibration: {rows.numel()} tokens in {len(rows)} rows of {length}, {file or 'its own text'}")
    heads = ("weight", "output RTN", settings.mode)[: 3 if len(rows) else 1]
    tqdm.write(f"{'relative errors of':50}{''.join(f'{head:>11}' for head in heads)}  seconds")
    return rows, held


def advice(report: dict[str, Any]) -> str:
    """The settings that lose less, with the bits that each takes for a weight."""
    size, scale_bits, mode = report["group_size"], report["scale_bits"], report["mode"]
    ways, bits = [] if mode.endswith("-gptq") else [f"--mode {mode}-gptq (as many bits)"], int(mode[3])
    for smaller in (g for g in GROUP_SIZES if g < size or size == -1):
        if not any(row["shape"][-1] % smaller for row in report["layers"]):
            ways.append(f"--group-size {smaller} ({bits + scale_bits / smaller:.4g} bits a weight)")
    last = {4: "--mode int8 (8 bits a weight)", 8: "--skip the Linears with the largest errors (16 bits a weight)"}
    return ", or ".join([*ways, last[bits]])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 bad input or a full disk (one line), 130 interrupted."""
    ready()
    args = parse(argv)
    size = AUTO if args.group_size == "auto" else int(args.group_size or (-1 if args.mode.startswith("int8") else 128))
    try:
        settings = Settings(
            args.mode, size, args.format, args.act_order, args.clip_search, args.quantize_head, tuple(args.skip)
        )
        name = f"{Path(args.checkpoint.partition('@')[0]).name}-{args.mode}"
        file = None if args.calibration == "self" else Path(args.calibration)
        calibration = file, args.rows or (32 if settings.solve else 0), args.row_length
        heldout = args.heldout, (8192 if settings.solve else 0) if args.heldout_tokens is None else args.heldout_tokens
        output, device = args.output or Path(name), pick_device(args.device)
        report = quantize(
            args.checkpoint, output, settings, calibration, heldout, device, DTYPES[args.dtype], args.force
        )
    except KeyboardInterrupt:
        return 130
    except (*FAULTS, SafetensorError) as error:
        return refuse("quantize.py", error)
    print(f"{output}: {report['bytes_before'] / 1e6:.1f} MB -> {report['bytes_after'] / 1e6:.1f} MB")
    before, after, kl, kl_99, same = (report[key] for key in LOSSES)
    if before is None:
        print("what it loses was not measured; --heldout-tokens 8192 does")
        return 0
    print(f"held-out perplexity: {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.2f}%)")
    print(f"KL divergence: mean {kl:.4f}, 99th percentile {kl_99:.3f}; same first choice: {100 * same:.1f}%")
    if after > 1.05 * before:
        print(f"That is more than 5%; try {advice(report)}")
    elif args.mode.startswith("int8") and kl > 0.001:  # more than llama.cpp's Q8_0 loses
        print(f"To lose less, try {advice(report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
