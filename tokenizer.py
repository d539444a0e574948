"""Text to token ids and back for one Hugging Face folder; its stop ids; its chat template.

Knows tokenizer.json (through `tokenizers`), tokenizer.model (through `sentencepiece`) and the JSON files beside them.
Knows nothing of models, devices or sampling, and refuses a tokenizer whose decoder it cannot follow byte by byte.

Control tokens: a prompt may quote text that nobody vetted, so `encode` reads `</s>` or `<|eot_id|>` inside it as plain
characters; BOS and EOS come from the folder's configuration alone. `encode_chat` does read them, in the messages too,
because a chat template speaks in control tokens. What tokenizer.json adds without calling it special is always read.

A chat template is a program that came with a download. Jinja's immutable sandbox keeps it from Python's objects but
bounds neither its loops nor its memory, so it runs in a child process that has limits: this file, run as a program.
"""

import codecs
import contextlib
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2.sandbox
import sentencepiece
import tokenizers

Json = dict[str, Any]


class Decoder:
    """Turns ids into text as they come, each byte once; an incomplete UTF-8 character waits for the next ids.

    Any split of the ids gives the same text: `bytes.decode("utf-8", "replace")` of all their bytes together.
    """

    def __init__(self, tokenizer: "Tokenizer", strip: bool) -> None:
        self.tokenizer, self.strip = tokenizer, strip
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int], final: bool = False) -> str:
        """The text that has become certain; `final`: no ids follow."""
        text = self.utf8.decode(b"".join(map(self.tokenizer.piece, ids)), final)
        if text and self.strip:
            text, self.strip = text.removeprefix(" "), False
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the ids end inside a character, else nothing."""
        return self.add((), final=True)


class JsonFile:
    """tokenizer.json. `special`: the ids that are control tokens, which have no text; `size`: the largest id + 1."""

    def __init__(self, path: Path) -> None:
        self.model = model = tokenizers.Tokenizer.from_file(str(path))
        model.no_truncation()
        model.no_padding()
        self.id_of, self.token, decode = model.token_to_id, model.id_to_token, model.decoder.decode
        self.byte_level = decode(["Ġ"]) == " "
        if not self.byte_level and decode(["a", "▁b"]) != "a b":
            raise ValueError("its decoder is neither byte-level nor sentencepiece's")
        self.special = {i for i, token in model.get_added_tokens_decoder().items() if token.special}
        self.size = max(model.get_vocab().values()) + 1

    def encode(self, text: str, bos: bool, control: bool) -> list[int]:
        self.model.encode_special_tokens = not control
        return self.model.encode(text, add_special_tokens=bos).ids


class SentencePieceFile:
    """tokenizer.model, with the attributes of `JsonFile`. After a control token a text starts as at the beginning."""

    def __init__(self, path: Path, config: Json) -> None:
        self.model = model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.size = model.vocab_size()
        self.special = {i for i in range(self.size) if model.is_control(i) or model.is_unknown(i)}
        self.names = {model.id_to_piece(i): i for i in self.special}
        self.id_of, self.token, self.byte_level = self.names.get, model.id_to_piece, False
        self.ends = {
            "add_bos": config.get("add_bos_token", model.bos_id() >= 0),
            "add_eos": config.get("add_eos_token", False),
        }

    def encode(self, text: str, bos: bool, control: bool) -> list[int]:
        if not control:
            return self.model.encode(text, **self.ends if bos else {})
        parts = re.split(f"({'|'.join(map(re.escape, self.names))})", text)
        return [i for part in parts for i in ([self.names[part]] if part in self.names else self.model.encode(part))]


class Tokenizer:
    """The tokenizer of a folder; `vocab_size` is its largest id + 1, `stop_ids` what ends a text."""

    def __init__(self, folder: Path, config: Json, generation: Json, model: Json) -> None:
        path = folder / "tokenizer.json"
        self.file = file = JsonFile(path) if path.is_file() else SentencePieceFile(folder / "tokenizer.model", config)
        self.vocab_size = file.size
        self.strip = str(file.token(self.encode("a", bos=False)[0]))[0] == "▁"  # a text's first space is not its own
        named = config.get("bos_token", "<s>"), config.get("eos_token", "</s>")
        self.bos, self.eos = (token["content"] if isinstance(token, dict) else token or "" for token in named)
        self.bos_id: int | None = file.id_of(self.bos)
        stop = generation.get("eos_token_id", model.get("eos_token_id"))
        stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
        if not all(type(i) is int for i in stop):
            raise ValueError(f"eos_token_id is {stop}; it must be an id or a list of ids")
        self.stop_ids = frozenset([file.id_of(self.eos), *stop]) - {None}
        template = config.get("chat_template", "")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        self.template = text_of(folder / "chat_template.jinja") or template
        self.has_chat_template = bool(self.template)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Raises FileNotFoundError without a tokenizer, ValueError (one line) for one that cannot be read."""
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer.model")
        names = ("tokenizer_config.json", "generation_config.json", "config.json")
        configs = [object_of(folder / name) for name in names]
        try:
            return cls(folder, *configs)
        except Exception as error:  # `tokenizers` raises nothing more specific
            raise ValueError(f"{folder}: its tokenizer cannot be read: {error!r}") from error

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a plain text, with BOS and EOS as the folder configures (`bos=False`: neither). "" is BOS alone."""
        text.encode()  # ValueError for a lone surrogate, Python's sign of broken UTF-8
        if bos and not text:
            return [] if self.bos_id is None else [self.bos_id]
        return self.file.encode(text, bos, control=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence, without control tokens."""
        return self.decoder().add(ids, final=True)

    def decoder(self, prompt: Iterable[int] = ()) -> Decoder:
        """A fresh incremental decoder for what follows `prompt`: after text, a leading space is kept."""
        return Decoder(self, self.strip and not any(map(self.piece, prompt)))

    def piece(self, i: int) -> bytes:
        """The bytes of one id: none for a control token, or for an id beyond the vocabulary."""
        token = "" if i >= self.vocab_size or i in self.file.special else self.file.token(i) or ""
        if self.file.byte_level:
            # GPT-2's alphabet: a printable Latin-1 character is its own byte, the other bytes follow from U+0100 on.
            text = token.translate({256 + n: byte for n, byte in enumerate([*range(33), *range(127, 161), 173])})
            return text.encode("latin-1" if max(text, default="") <= "ÿ" else "utf-8")
        byte = re.fullmatch("<0x(..)>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    def render_chat(self, messages: list[Json], add_generation_prompt: bool = True) -> str:
        """The text that the folder's template makes of `messages` (role, content). ValueError where that fails."""
        if not self.template:
            raise ValueError("this tokenizer has no chat template: use a chat model, or a plain prompt")
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None}
        request = json.dumps([self.template, {**variables, "bos_token": self.bos, "eos_token": self.eos}])
        child = subprocess.run([sys.executable, __file__], input=request, capture_output=True, text=True)
        if child.returncode:
            reason = child.stderr.strip().split("\n")[-1] or "it ran into its limits (3 s, 1 GiB)"
            raise ValueError(f"the chat template failed: {reason[:200]}")
        return json.loads(child.stdout)

    def encode_chat(self, messages: list[Json]) -> list[int]:
        """Ids of the rendered template, which writes its own BOS."""
        text = self.render_chat(messages)
        text.encode()  # as in `encode`
        return self.file.encode(text, bos=False, control=True)


class Ids:
    """Stands in for a tokenizer where a model has none (`--shape`): UTF-8 bytes in, numbers out."""

    stop_ids: frozenset[int] = frozenset()
    has_chat_template = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [b % self.vocab_size for b in text.encode()] or [0]

    def encode_chat(self, messages: list[Json]) -> list[int]:
        """ValueError: there is no template."""
        raise ValueError("random weights have no chat template")

    def decoder(self, prompt: Sequence[int] = ()) -> "Ids":
        return self

    def piece(self, i: int) -> bytes:
        return b"%d " % i

    def add(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def flush(self) -> str:
        return ""


class Answer:
    """One row's answer as it grows: ids, certain text, stop ids and stop strings (also across token boundaries)."""

    def __init__(self, decoder: Decoder | Ids, stop_ids: frozenset[int], stop: Sequence[str], limit: int) -> None:
        self.decoder, self.stop_ids, self.stop, self.limit = decoder, stop_ids, tuple(stop), limit
        self.ids: list[int] = []
        self.held = ""  # text that may be the beginning of a stop string
        self.stop_reason: str | None = None

    def add(self, ids: list[int]) -> tuple[list[int], str]:
        """Take ids until the answer ends; returns those taken and the text that became certain."""
        taken: list[int] = []
        for token in ids:
            if self.stop_reason is not None:
                break
            taken.append(token)
            if token in self.stop_ids:
                self.stop_reason = "eos"
            else:
                self.held += self.decoder.add([token])
                if len(self.ids) + len(taken) == self.limit:
                    self.stop_reason = "length"
            if self.stop_reason is not None:
                self.held += self.decoder.flush()
            if found := [i for s in self.stop if (i := self.held.find(s)) >= 0]:
                self.held, self.stop_reason = self.held[: min(found)], "stop"
        self.ids += taken
        keep = 0
        if self.stop_reason is None:
            keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return taken, text


def text_of(path: Path) -> str:
    """A file's text, "" where there is none."""
    return path.read_text("utf-8") if path.is_file() else ""


def object_of(path: Path) -> Json:
    """The JSON object of a file, {} where there is none. ValueError names the file."""
    try:
        value = json.loads(text_of(path) or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def render(template: str, variables: Json) -> str:
    """Renders a chat template with the functions and whitespace rules that transformers gives it."""

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    env.globals |= {"raise_exception": fail, "strftime_now": datetime.now().strftime}
    # {% generation %} marks a training mask: a tag without effect here.
    template = re.sub(r"({%[-+]?\s*)(?:end)?generation(\s*[-+]?%})", r"\1set _ = 0\2", template)
    return env.from_string(template).render(variables)


if __name__ == "__main__":
    with contextlib.suppress(ImportError, ValueError):  # Windows has no such limits, macOS not the second
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (3, 3))  # seconds
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))  # bytes
    print(json.dumps(render(*json.load(sys.stdin))))
