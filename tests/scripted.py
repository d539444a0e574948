"""Checkpoints whose answers are known beforehand: a byte-level tokenizer, and a model that recites a text."""

import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, processors

SPECIAL = ("<|bos|>", "<|eos|>", "<|eot|>")
VOCAB = 256 + len(SPECIAL)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), "utf-8")


def byte_ids() -> dict[int, int]:
    """byte -> id of `add_tokenizer`'s tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {c: i for i, c in enumerate(alphabet)}
    # GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100 on in order
    other = iter(b for b in range(256) if chr(b) not in printable)
    return {(ord(c) if ord(c) < 256 else next(other)): i for c, i in printable.items()}


def add_tokenizer(folder: Path, *, bos: bool = True, template: str | None = None, **generation: object) -> Path:
    """One id per byte (0..255), then SPECIAL. generation_config.json holds `generation`."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(list(SPECIAL))
    if bos:
        first = [(SPECIAL[0], model.token_to_id(SPECIAL[0]))]
        model.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=first)
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[0] if bos else None, "eos_token": SPECIAL[1]}
    write_json(folder / "tokenizer_config.json", config | ({"chat_template": template} if template else {}))
    write_json(folder / "generation_config.json", generation)
    return folder


def recital(folder: Path, text: str, end: str | None = None, *, context: int = 256, poison: int = -1, **tokenizer):
    """A checkpoint that, wherever it is in `text` (no byte twice), says the next byte; from BOS the first one.

    After the last byte it says the special token `end`, and after that, or without one, the first byte again. The
    embedding of id `poison` is NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = byte_ids()
    line = [ids[b] for b in text.encode()]
    assert len(set(line)) == len(line)
    first, last = line[0], VOCAB - len(SPECIAL) + SPECIAL.index(end) if end else line[0]
    follows = dict(zip(line, [*line[1:], last])) | dict.fromkeys(range(256, VOCAB), first)
    embed, head = torch.eye(VOCAB), torch.zeros(VOCAB, VOCAB)
    for token in range(VOCAB):
        head[follows.get(token, token), token] = 1.0
    if poison >= 0:
        embed[poison] = float("nan")
    zeros = {
        "self_attn.q_proj": (4, VOCAB),
        "self_attn.k_proj": (4, VOCAB),
        "self_attn.v_proj": (4, VOCAB),
        "self_attn.o_proj": (VOCAB, 4),
        "mlp.gate_proj": (8, VOCAB),
        "mlp.up_proj": (8, VOCAB),
        "mlp.down_proj": (VOCAB, 8),
    }
    tensors = {f"model.layers.0.{name}.weight": torch.zeros(shape) for name, shape in zeros.items()}
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = torch.ones(VOCAB)
    save_file(tensors | {"model.embed_tokens.weight": embed, "lm_head.weight": head}, folder / "model.safetensors")
    sizes = {"hidden_size": VOCAB, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": context}
    write_json(folder / "config.json", {"model_type": "llama", "torch_dtype": "float32"} | sizes | heads)
    return add_tokenizer(folder, **tokenizer)
