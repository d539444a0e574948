"""Train the demo pair: a tokenizer, a small Llama target and a draft distilled from it, from one text file.

Knows a text corpus, a plain training loop around transformers' Llama, and how to write ordinary Hugging Face folders.
Refuses to know how the project runs models: it imports nothing of ours; the folders are all that it hands over.

    python scripts/train_demo.py --text train.txt --valid valid.txt --out runs/checkpoints

The text is UTF-8; three blank lines separate documents. Every document becomes BOS, its pieces, EOS. The same command
again resumes from the last epoch in `--work`. Needs `pip install -e .[train]`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text; three blank lines between documents")
    parser.add_argument("--valid", type=Path, help="held-out text (default: the last documents of the text)")
    parser.add_argument("--size", choices=("tiny", "demo", "large"), default="demo", help="(demo)")
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoints"), help="receives tales/ and tales-draft/")
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="logs, resume state, numbers")
    return parser.parse_args()


if __name__ == "__main__":
    parse()  # --help, or a bad argument, before PyTorch is imported

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, EOS, IGNORE = 1, 2, -100  # IGNORE: a label that cross_entropy does not score
EVAL_ROWS, PATIENCE = 32, 4  # rows per evaluation batch; epochs without a better held-out loss before stopping


@dataclass(frozen=True)
class Recipe:
    """Shape and schedule of one model: `batch` rows of one context a step; `minutes` may shorten the schedule."""

    config: LlamaConfig
    epochs: int
    lr: float
    dropout: float = 0.0
    weight_decay: float = 0.1
    batch: int = 32
    minutes: float = math.inf


@dataclass
class Progress:
    """How far a training has come: a line of the log, and saved beside the weights to resume from."""

    epoch: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    train_loss: float = math.inf
    valid_loss: float = math.inf
    best: float = math.inf
    stale: int = 0  # epochs since the best


def llama(*shape: int, vocab: int = 4096, context: int = 1024) -> LlamaConfig:
    """A Llama with a tied head. `shape` gives hidden and MLP size, layers, query heads and key/value heads."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    rest = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": BOS, "eos_token_id": EOS}
    return LlamaConfig(**dict(zip(names, shape)), vocab_size=vocab, max_position_embeddings=context, **rest)


def recipes(size: str) -> tuple[Recipe, Recipe]:
    """Target and draft. Widths of demo and large are multiples of 128, so that int4 groups of 128 fit."""
    if size == "tiny":  # seconds on a CPU
        target, draft = llama(64, 128, 2, 2, 1, vocab=512, context=64), llama(32, 64, 1, 1, 1, vocab=512, context=64)
        return Recipe(target, 2, 3e-3, dropout=0.1, minutes=0.1), Recipe(draft, 2, 3e-3, minutes=0.1)
    if size == "demo":  # 7.9 M and 1.0 M parameters
        target, draft = llama(384, 1024, 4, 6, 2), llama(128, 512, 2, 2, 1)
        return Recipe(target, 30, 3e-3, dropout=0.15, weight_decay=0.3, batch=16), Recipe(draft, 30, 5e-3)
    target, draft = llama(1024, 3072, 24, 16, 4), llama(512, 1536, 6, 8, 2)  # 294 M and 20 M
    return (
        Recipe(target, 6, 5e-4, dropout=0.1, weight_decay=0.3, batch=8, minutes=3.4),
        Recipe(draft, 6, 1.5e-3, batch=16, minutes=0.9),
    )


def replacing(path: Path, write: Callable[[Path], object]) -> None:
    """`write` under a temporary name, then rename: a reader never sees half a file."""
    unfinished = path.with_name(path.name + ".tmp")
    write(unfinished)
    os.replace(unfinished, path)


def train_tokenizer(text: str, vocab_size: int) -> SentencePieceProcessor:
    """A tokenizer by Llama 2's recipe: BPE, byte fallback, text as it is, single digits; newlines are byte pieces."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in text.split("\n") if line]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.99995,
        required_chars="0123456789",
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=1 << 16,
        minloglevel=2,
        num_threads=1,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def fast_tokenizer(pieces: SentencePieceProcessor) -> Tokenizer:
    """The same tokenizer for tokenizer.json. Of all possible merges sentencepiece applies the one whose piece comes
    first in the vocabulary, so the merges are all the ways to split each piece, in order of the pieces."""
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    merges = []
    for piece in list(vocab)[3 + 256 :]:  # after <unk> <s> </s> and the bytes
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        merges += sorted(splits, key=lambda split: vocab[split[0]])
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(parts)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    return fast


def training_rows(documents: list[Tensor], context: int, seed: int) -> tuple[Tensor, Tensor]:
    """The rows [N, context] of one epoch, int64, and their labels: documents shuffled, joined, cut at a random place.

    Every row begins with BOS, as every prompt will: slot 0 is overwritten, and the token after it not scored unless a
    document really begins there. A tenth of the documents also begin a row of their own. Rows overlap by two.
    """
    torch.manual_seed(seed)
    documents = [documents[i] for i in torch.randperm(len(documents))]
    stream = torch.cat(documents)
    begins = torch.tensor([0] + [len(tokens) for tokens in documents[: len(documents) // 10]]).cumsum(0)
    if (last := len(stream) - context) < context:
        raise ValueError(f"{len(stream)} training tokens do not fill two rows of {context}: give a longer --text")
    starts = torch.cat([torch.arange(int(torch.randint(context, ())), last, context - 2), begins[begins <= last]])
    rows = stream[starts[torch.randperm(len(starts)), None] + torch.arange(context)]
    labels = rows.clone()
    labels[:, 0] = IGNORE
    labels[rows[:, 0] != BOS, 1] = IGNORE
    rows[:, 0] = BOS
    return rows, labels


def held_out_rows(documents: list[Tensor], context: int) -> tuple[Tensor, Tensor]:
    """Rows and labels that score every token once, each (after the first row) with at least half a context before."""
    stream, half = torch.cat(documents), context // 2
    count = math.ceil(len(stream) / half / EVAL_ROWS) * EVAL_ROWS  # whole batches: one shape to compile
    at = half * torch.arange(count)[:, None] + torch.arange(context)
    rows = stream[at.clamp(max=len(stream) - 1)]
    labels = torch.where(at < len(stream), rows, IGNORE)
    labels[1:, :half] = IGNORE
    labels[0, 0] = IGNORE
    rows[:, 0] = BOS  # as in training: without it the loss read 4.47, not 3.20
    return rows, labels


def logits_of(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """[B, T] -> [B * (T - 1), V] in float32, for the labels[:, 1:]; bf16 matrix products on a GPU."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
        return model(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1).float()


@torch.no_grad()
def compare(target: LlamaForCausalLM, draft: LlamaForCausalLM, rows: Tensor, labels: Tensor) -> dict[str, float]:
    """Means over the scored tokens: -log p of both models in nats, agreement of their greedy choices, and expected
    acceptance sum_x min(p(x), q(x)) of speculative sampling at temperature 1 (Leviathan et al., arXiv:2211.17192)."""
    total = torch.zeros(4, device=rows.device, dtype=torch.float64)
    for x, y in zip(rows.split(8), labels[:, 1:].split(8)):
        scored, token = y.flatten() != IGNORE, y[y != IGNORE]
        p, q = (logits_of(model, x)[scored].log_softmax(-1) for model in (target, draft))
        losses = [F.nll_loss(each, token, reduction="sum") for each in (p, q)]
        total += torch.stack([*losses, (p.argmax(-1) == q.argmax(-1)).sum(), torch.minimum(p, q).exp().sum()])
    total /= (labels != IGNORE).sum()
    return dict(zip(("loss", "draft_loss", "greedy_agreement", "expected_acceptance"), total.tolist()))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Tensor, labels: Tensor) -> float:
    """Mean -log p per scored token, in nats."""
    batches = zip(rows.split(EVAL_ROWS), labels[:, 1:].flatten().split(EVAL_ROWS * (rows.shape[1] - 1)))
    loss = sum(F.cross_entropy(logits_of(model, x), y, ignore_index=IGNORE, reduction="sum") for x, y in batches)
    return float(loss) / int((labels != IGNORE).sum())


def build(recipe: Recipe, device: torch.device) -> LlamaForCausalLM:
    """A fresh Llama. Dropout, on the embedding and on what each block adds to the residual stream, is not in config."""
    model = LlamaForCausalLM(recipe.config).to(device)
    blocks = [block for layer in model.model.layers for block in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in (model.model.embed_tokens, *blocks):
        module.register_forward_hook(lambda module, args, x: F.dropout(x, recipe.dropout, module.training))
    return model


def loss_of(model: LlamaForCausalLM, rows: Tensor, labels: Tensor, teacher: LlamaForCausalLM | None) -> Tensor:
    """Next-token loss, or cross entropy to the teacher's distribution (Hinton et al. 2015, arXiv:1503.02531)."""
    if teacher is None:
        return F.cross_entropy(logits_of(model, rows), labels[:, 1:].flatten(), ignore_index=IGNORE)
    with torch.no_grad():
        taught = logits_of(teacher, rows).softmax(-1)
    return F.cross_entropy(logits_of(model, rows), taught)


def epochs(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    documents: list[Tensor],
    done: Progress,
    teacher: LlamaForCausalLM | None,
) -> Iterator[None]:
    """Train, yielding after each epoch. The rate is a cosine over the epochs or the minutes, whichever end first."""
    # a run that used up its time goes no further
    began, progress = time.perf_counter() - done.seconds, done.seconds / 60 / recipe.minutes
    while done.epoch < recipe.epochs and progress < 1 and done.stale < PATIENCE:
        rows = [x.to(model.device) for x in training_rows(documents, recipe.config.max_position_embeddings, done.epoch)]
        # whole batches: one shape to compile
        batches = list(zip(*[x.split(recipe.batch) for x in rows]))[: len(rows[0]) // recipe.batch or 1]
        losses: list[Tensor] = []
        model.train()
        for x, y in tqdm(batches, desc=f"epoch {done.epoch + 1}, held-out loss {done.valid_loss:.3f}"):
            spent = (time.perf_counter() - began) / 60 / recipe.minutes
            progress = min(max((done.epoch + len(losses) / len(batches)) / recipe.epochs, spent), 1.0)
            done.lr = recipe.lr * max(min(progress / 0.03, 0.5 + 0.5 * math.cos(math.pi * progress)), 0.01)
            for group in optimizer.param_groups:
                group["lr"] = done.lr
            loss = loss_of(model, x, y, teacher)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if progress == 1:  # out of time
                break
        done.epoch, done.seconds = done.epoch + 1, time.perf_counter() - began
        done.train_loss = torch.stack(losses).mean().item()
        yield


def resume_(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Progress:
    """Take back the weights and AdamW's moments that `train` saved."""
    with safe_open(path, "pt") as file:
        done = Progress(**json.loads(file.metadata()["done"]))
    saved, state = load_file(path), optimizer.state_dict()
    for i in (i for group in state["param_groups"] for i in group["params"]):
        state["state"][i] = {key: saved.pop(f"{i}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(state)
    model.load_state_dict(saved, strict=False)  # the tied head is not listed
    return done


def train(
    folder: Path,
    recipe: Recipe,
    documents: list[Tensor],
    valid: tuple[Tensor, Tensor],
    teacher: LlamaForCausalLM | None = None,
) -> LlamaForCausalLM:
    """Train or resume in `folder`; return the model of the best held-out loss, weights rounded to bf16, to evaluate.

    `folder` holds best.safetensors (bf16), state.safetensors (to resume) and log.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.compiler.reset()  # forget the models before this one: a limit counts the graphs of one function
    model, done = build(recipe, valid[0].device), Progress()
    groups = [
        {
            "params": [p for p in model.parameters() if (p.dim() > 1) == matrix],
            "weight_decay": recipe.weight_decay * matrix,
        }
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    if (folder / "state.safetensors").exists():
        done = resume_(folder / "state.safetensors", model, optimizer)
    for layer in model.model.layers if valid[0].is_cuda else ():
        layer.compile()  # one graph serves all layers
    for _ in epochs(model, optimizer, recipe, documents, done, teacher):
        done.valid_loss = held_out_loss(model.eval(), *valid)
        done.stale = 0 if done.valid_loss < done.best else done.stale + 1
        if not done.stale:
            done.best = done.valid_loss
            best = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
            replacing(folder / "best.safetensors", partial(save_file, best))
        with (folder / "log.jsonl").open("a") as log:
            print(json.dumps(vars(done)), file=log)
        state = dict(model.named_parameters())
        for i, moments in optimizer.state_dict()["state"].items():
            state |= {f"{i}.{key}": value for key, value in moments.items()}
        replacing(folder / "state.safetensors", partial(save_file, state, metadata={"done": json.dumps(vars(done))}))
    model = build(recipe, valid[0].device)
    model.load_state_dict(load_file(folder / "best.safetensors"), strict=False)  # the tied head is not listed
    model = model.to(torch.bfloat16).eval()
    return model if valid[0].is_cuda else model.float()  # bf16 is slow on most CPUs


def export(model: LlamaForCausalLM, pieces: SentencePieceProcessor, folder: Path) -> None:
    """An ordinary Hugging Face folder in bf16, with both forms of the tokenizer (the tests compare their ids)."""
    # without a filter a small model soon draws a word that derails it; much colder, it repeats itself
    defaults = {"do_sample": True, "temperature": 0.9, "top_k": 50, "bos_token_id": BOS, "eos_token_id": EOS}
    model.generation_config = GenerationConfig(**defaults)
    model.to(torch.bfloat16).save_pretrained(folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    # PreTrainedTokenizerFast takes tokenizer.json as it is; LlamaTokenizer would rebuild it and lose leading spaces.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        **names,
        "model_max_length": model.config.max_position_embeddings,
    }
    fast_tokenizer(pieces).save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def plot_losses(folders: list[Path], image: Path) -> None:
    """Held-out and training loss by epoch."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for folder, color in zip(folders, ("C0", "C1")):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for key, style in (("valid_loss", "-"), ("train_loss", "--")):
            axes.plot(*zip(*[(x["epoch"], x[key]) for x in lines]), style, color=color, label=f"{folder.name}, {key}")
    axes.set(xlabel="epoch", ylabel="nats per token")
    axes.legend()
    figure.savefig(image, dpi=110)


def main() -> None:
    """Train the tokenizer, the target and the draft; then write the folders, the plot and the numbers."""
    args = parse()
    # TinyStories came with opening quotes decoded wrongly, as '"oe': 61 places in the demo's text
    texts = [text for text in args.text.read_text(encoding="utf-8").replace('"oe', '"').split("\n\n\n\n") if text]
    held = args.valid.read_text(encoding="utf-8").split("\n\n\n\n") if args.valid else texts[len(texts) * 31 // 32 :]
    texts = texts if args.valid else texts[: len(texts) * 31 // 32]
    target_recipe, draft_recipe = recipes(args.size)
    pieces = train_tokenizer("\n".join(texts), target_recipe.config.vocab_size)
    documents = [torch.tensor([BOS, *ids, EOS]) for ids in pieces.encode(texts)]
    held_documents = [torch.tensor([BOS, *ids, EOS]) for ids in pieces.encode(held)]
    rows, labels = held_out_rows(held_documents, target_recipe.config.max_position_embeddings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    valid = rows.to(device), labels.to(device)
    target = train(args.work / "target", target_recipe, documents, valid)
    draft = train(args.work / "draft", draft_recipe, documents, valid, teacher=target)
    numbers = compare(target, draft, *valid)
    tokens_per_byte = sum(map(len, held_documents)) / sum(len(text.encode()) for text in held)
    for name in ("", "draft_"):
        numbers[name + "perplexity"] = math.exp(numbers[name + "loss"])
        numbers[name + "perplexity_per_byte"] = math.exp(numbers[name + "loss"] * tokens_per_byte)
    for name, model in (("tales", target), ("tales-draft", draft)):
        export(model, pieces, args.out / name)
    print(json.dumps(numbers, indent=2))
    plot_losses([args.work / "target", args.work / "draft"], args.out / "tales" / "loss.png")


if __name__ == "__main__":
    main()
