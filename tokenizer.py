"""Text to token ids and back for one Hugging Face folder; its stop ids; its chat template; prompts, and answers as they
grow.

Knows tokenizer.json (through `tokenizers`), tokenizer.model (through `sentencepiece`) and the JSON files beside them.
Knows nothing of models, devices or sampling, and refuses a tokenizer whose decoder it cannot follow byte by byte.

Control tokens: a prompt may quote text that nobody vetted, so `encode` reads `</s>` or `<|eot_id|>` inside it as plain
characters; BOS and EOS come from the folder's configuration alone. `encode_chat` does read them, in the messages too,
because a chat template speaks in control tokens. What tokenizer.json adds without calling it special is always read.

A chat template runs in a child process that has limits, and a tokenizer from outside `checkpoints/` is tried in one
before it is used (`sandbox.py`).
"""

import codecs
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, index
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from input_folder import end_ids, read_json, templates_of
from sandbox import render_template, try_tokenizer

Json = dict[str, Any]
MOST_EXTRA = 256  # ids by which the tokenizers of a draft and its target may differ at the end
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# GPT-2's alphabet: a printable Latin-1 character is its own byte, the other bytes follow from U+0100 on.
BYTES = {chr(byte): byte for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTES |= {chr(256 + n): byte for n, byte in enumerate([*range(33), *range(127, 161), 173])}
MOST_TEXT = 1 << 26  # characters of a text to encode
TRUSTED = Path(__file__).resolve().parent / "checkpoints"


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


class Added:
    """The tokens that the JSON files beside a tokenizer add to it, as transformers reads them.

    `declared`: tokens by id, of `added_tokens_decoder` in tokenizer_config.json, else of added_tokens.json; `named`: by
    role (`bos_token`, ...); `extra`: the rest of the special ones. special_tokens_map.json counts where there is no
    `added_tokens_decoder`, and is then merged into `config`.
    """

    def __init__(self, folder: Path, config: Json) -> None:
        declared, self.source = config.get("added_tokens_decoder"), "tokenizer_config.json"
        if declared is None:
            config.update(read_json(folder / "special_tokens_map.json"))
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        if not isinstance(extra, list | dict) or not isinstance(declared or {}, dict):
            raise ValueError("added_tokens_decoder must be an object, additional special tokens a list or an object")
        roles = {**dict.fromkeys(ROLES), **config, **(extra if isinstance(extra, dict) else {})}
        self.named = {
            role: token_of(role, value)
            for role, value in roles.items()
            if value and (role in ROLES or (role.endswith("_token") and isinstance(value, str | dict)))
        }
        self.extra = [] if isinstance(extra, dict) else [token_of("additional_special_tokens", t) for t in extra]
        ids = list((declared or {}).items())
        if declared is None:
            self.source, special = "added_tokens.json", {t.content for t in (*self.named.values(), *self.extra)}
            found = read_json(folder / self.source)
            ids = [(i, {"content": text, "special": text in special}) for text, i in found.items()]
        if wrong := [i for i, _ in ids if not re.fullmatch(r"\d{1,7}", str(i))]:
            raise ValueError(f"{self.source} has {wrong[0]!r} where it must have an id below 10000000")
        self.declared = {int(i): token_of(f"added_tokens_decoder[{i}]", token) for i, token in ids}

    def beyond(self, own: dict[int, tokenizers.AddedToken]) -> list[tokenizers.AddedToken]:
        """The tokens that a tokenizer with its `own` added tokens lacks, in the order in which they get ids."""
        # tokenizer_config.json's flags replace those of the tokenizer's own
        key: Callable[[Any], str] = repr if self.source == "tokenizer_config.json" else attrgetter("content")
        known = set(map(key, own.values()))
        tokens = [token for _, token in sorted(self.declared.items()) if key(token) not in known]
        names = {t.content for t in (*own.values(), *tokens)}
        wanted = [*(token for role, token in self.named.items() if role in ROLES), *self.extra]
        tokens += [token for token in wanted if token.content not in names]
        roles = {t.content for t in self.named.values()}
        for token in tokens:
            token.special = token.special or token.content in roles
        return tokens


class JsonFile:
    """The tokenizer of a tokenizer.json. `special`: the ids that are control tokens, which have no text; `size`: the
    largest id + 1.
    """

    def __init__(self, path: Path, added: Added) -> None:
        self.model = model = tokenizers.Tokenizer.from_file(str(path))
        model.no_truncation()
        model.no_padding()
        self.id_of, self.token = model.token_to_id, model.id_to_token
        if model.decoder is None:
            raise ValueError("tokenizer.json has no decoder")
        self.byte_level = model.decoder.decode(["Ġ"]) == " "
        if not self.byte_level and model.decoder.decode(["a", "▁b"]) != "a b":
            raise ValueError("the decoder of tokenizer.json is neither byte-level nor sentencepiece's")
        own = model.get_added_tokens_decoder()
        new = {i: t.content for i, t in added.declared.items() if model.token_to_id(t.content) is None}
        model.add_tokens(added.beyond(own))
        if wrong := [(i, text) for i, text in new.items() if model.token_to_id(text) != i]:
            (i, text), free = wrong[0], model.token_to_id(wrong[0][1])
            raise ValueError(f"{added.source} gives {text!r} the id {i}; after tokenizer.json's ids it would be {free}")
        # a token of both files is special where one of them says so
        everything = [*own.items(), *model.get_added_tokens_decoder().items()]
        self.special = {i for i, token in everything if token.special}
        self.size = max(model.get_vocab().values()) + 1

    def encode(self, text: str, bos: bool, control: bool) -> list[int]:
        self.model.encode_special_tokens = not control
        return self.model.encode(text, add_special_tokens=bos).ids


class SentencePieceFile:
    """The tokenizer of a tokenizer.model, with the attributes of `JsonFile`.

    `legacy`: a text after a control token starts with a space, as at the beginning. sentencepiece puts that space
    before every text that it is given. Where there must be none, `mark`, a character that is in no piece, is put before
    the text, and its ids are cut off.
    """

    byte_level = False

    def __init__(self, path: Path, added: Added, config: Json, legacy: bool) -> None:
        self.model = model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
        control = {token: i for token, i in pieces.items() if model.is_control(i) or model.is_unknown(i)}
        tokens = [tokenizers.AddedToken(token, normalized=False, special=True) for token in control]
        tokens += added.beyond({})
        self.added = {i: token for token, i in control.items()} | {i: t.content for i, t in added.declared.items()}
        for text in (token.content for token in tokens):  # without a declared id it is a piece, or gets the next id
            if text not in self.added.values():
                self.added[pieces.get(text, max(model.vocab_size() - 1, *self.added) + 1)] = text
        self.size = max(model.vocab_size() - 1, *self.added) + 1
        names = {token: i for i, token in self.added.items()}
        self.special, self.id_of = {names[t.content] for t in tokens if t.special}, (pieces | names).get
        # finds the added tokens in a text, by the library's rules; what lies between them is id 0
        self.finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
        self.finder.add_tokens(tokens)
        self.found = {i: names[token.content] for i, token in self.finder.get_added_tokens_decoder().items()}
        self.legacy = legacy
        self.mark = next(c for c in map(chr, range(0xE000, 0xF900)) if not any(c in piece for piece in pieces))
        self.marked = len(model.encode(self.mark))
        self.ends = []
        for role, default, i in (("bos", model.bos_id() >= 0, model.bos_id()), ("eos", False, model.eos_id())):
            if type(wanted := config.get(f"add_{role}_token", default)) is not bool:
                raise ValueError(f"add_{role}_token is {wanted!r}; it must be true or false")
            named = added.named.get(f"{role}_token")
            i = names[named.content] if named else i
            self.ends.append([i] * (wanted and i >= 0))

    def token(self, i: int) -> str:
        return self.added.get(i) or (self.model.id_to_piece(i) if i < self.model.vocab_size() else "")

    def encode(self, text: str, bos: bool, control: bool) -> list[int]:
        self.finder.encode_special_tokens = not control
        found, (begin, end) = self.finder.encode(text), self.ends if bos else ([], [])
        ids = list(begin)
        for i, (a, b) in zip(found.ids, found.offsets):
            if i:
                ids.append(self.found[i])
            elif a == 0 or self.legacy:
                ids += self.model.encode(text[a:b])
            else:
                ids += self.model.encode(self.mark + text[a:b])[self.marked :]
        return ids + end


class Tokenizer:
    """The tokenizer of a folder; `vocab_size` is its largest id + 1, `stop_ids` what ends a text."""

    def __init__(self, folder: Path, config: Json, generation: Json, model: Json) -> None:
        added, path = Added(folder, config), folder / "tokenizer.json"
        if path.is_file():
            self.file: JsonFile | SentencePieceFile = JsonFile(path, added)
        else:  # transformers 5 made `legacy: false` the default of Llama's class, which Mistral's models do not get
            kind = model.get("model_type")
            llama = str(config.get("tokenizer_class") or kind).lower().startswith("llama")
            legacy = config.get("legacy", not llama or kind in ("mistral", "mixtral"))
            self.file = SentencePieceFile(folder / "tokenizer.model", added, config, legacy)
        file, self.vocab_size = self.file, self.file.size
        # whether a text's first space is not its own
        self.strip = any(str(file.token(i)).startswith("▁") for i in self.encode("a", bos=False)[:1])
        self.roles = {role: token.content for role, token in added.named.items()}
        for role, token in (("bos_token", "<s>"), ("eos_token", "</s>")):
            if role not in config and file.id_of(token) is not None:
                self.roles[role] = token
        self.bos_id: int | None = file.id_of(self.roles.get("bos_token", ""))
        ends = file.id_of(self.roles.get("eos_token", "")), *end_ids(generation, model)
        self.stop_ids = frozenset(i for i in ends if i is not None)
        self.templates = templates_of(folder, config.get("chat_template"))
        self.has_chat_template = bool(self.templates)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Raises FileNotFoundError without a tokenizer, ValueError (one line) for one that cannot be read."""
        paths = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
        if not any(map(os.path.lexists, paths)):
            remedy = "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes the former"
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer.model; {remedy}")
        names = ("tokenizer_config.json", "generation_config.json", "config.json")
        configs = [read_json(folder / name) for name in names]
        try:
            if TRUSTED not in folder.resolve().parents:
                try_tokenizer(next(path for path in paths if os.path.lexists(path)))
            return cls(folder, *configs)
        except Exception as error:  # `tokenizers` raises nothing more specific
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{folder}: its tokenizer cannot be read: {' '.join(reason.split())}") from error

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a plain text, with BOS and EOS as the folder configures (`bos=False`: neither). "" is BOS alone."""
        if bos and not text:
            return [] if self.bos_id is None else [self.bos_id]
        return self._encode(text, bos, control=False)

    def _encode(self, text: str, bos: bool, control: bool) -> list[int]:
        """ValueError for a text that is too long, that is no Unicode, or in which the library fails."""
        text.encode()  # ValueError for a lone surrogate, Python's sign of broken UTF-8
        if len(text) > MOST_TEXT:
            raise ValueError(f"the text has {len(text)} characters; {MOST_TEXT} are encoded at most")
        try:
            return self.file.encode(text, bos, control)
        except (ValueError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # `tokenizers` raises Exception itself, and its panics are not even that
            raise ValueError(f"the tokenizer failed: {str(error)[:200]!a}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence, without control tokens."""
        return self.decoder().add(ids, final=True)

    def decoder(self, prompt: Iterable[int] = ()) -> Decoder:
        """A fresh incremental decoder for what follows `prompt`: after text, a leading space is kept."""
        return Decoder(self, self.strip and not any(map(self.piece, prompt)))

    def piece(self, i: int) -> bytes:
        """The bytes of one id: none for a control token, or for an id beyond the vocabulary."""
        token = "" if i >= self.vocab_size or i in self.file.special else self.file.token(i) or ""
        if self.file.byte_level:  # an added token may hold other characters than the alphabet's: it is plain text
            return bytes(map(BYTES.__getitem__, token)) if BYTES.keys() >= set(token) else token.encode()
        byte = re.fullmatch("<0x(..)>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    def render_chat(self, messages: list[Json], add_generation_prompt: bool = True) -> str:
        """The text that the folder's template makes of `messages` (role, content). ValueError where that fails."""
        if not self.templates:
            raise ValueError("this tokenizer has no chat template: use a chat model, or a plain prompt")
        if "default" not in self.templates:
            names = ", ".join(sorted(self.templates))
            raise ValueError(f"this tokenizer has chat templates called {names}, but none called default")
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        variables |= {"tools": None, "documents": None, **self.roles}
        return render_template(self.templates["default"], variables)

    def encode_chat(self, messages: list[Json]) -> list[int]:
        """Ids of the rendered template, which writes its own BOS."""
        return self._encode(self.render_chat(messages), bos=False, control=True)


class Ids:
    """Stands in for a tokenizer where a model has none (`--shape`): UTF-8 bytes in, numbers out."""

    stop_ids: frozenset[int] = frozenset()
    has_chat_template = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [b % self.vocab_size for b in text.encode()] or [0]

    def encode_chat(self, messages: list[Json]) -> list[int]:
        """Raises ValueError, for there is no template."""
        raise ValueError("random weights have no chat template")

    def decoder(self, prompt: Sequence[int] = ()) -> "Ids":
        return self

    def piece(self, i: int) -> bytes:
        return b"%d " % i

    def add(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def flush(self) -> str:
        return ""


@dataclass(frozen=True)
class Increment:
    """What one row gained: new ids, the text that is now certain, and why the row ended (eos, stop, length) if so."""

    row: int
    ids: list[int]
    text: str
    stop_reason: str | None


class Answer:
    """One row's answer as it grows: ids, certain text, stop ids and stop strings (also across token boundaries)."""

    def __init__(
        self, row: int, decoder: Decoder | Ids, stop_ids: frozenset[int], stop: Sequence[str], limit: int
    ) -> None:
        if isinstance(stop, str):
            raise ValueError(f"stop is the string {stop[:40]!r}; give a list of strings")
        self.row, self.decoder, self.stop_ids, self.stop, self.limit = row, decoder, stop_ids, tuple(stop), limit
        self.ids: list[int] = []
        self.held = ""  # text that may be the beginning of a stop string
        self.stop_reason: str | None = None

    def add(self, ids: list[int]) -> Increment:
        """Take ids until the answer ends."""
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
        end = self.held if self.stop_reason is None else ""
        keep = max((n for s in self.stop for n in range(1, len(s)) if end.endswith(s[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return Increment(self.row, taken, text, self.stop_reason)


def encode_all(tokenizer: Tokenizer | Ids, prompts: Sequence[str | Sequence[int]], vocab_size: int) -> list[list[int]]:
    """Ids of each prompt, a text or a list of ids, for a model with so many.

    ValueError for none, for an empty one, and for what is no id of the model.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the string {prompts[:40]!r}; give a list of strings")
    try:
        rows = [tokenizer.encode(p) if isinstance(p, str) else list(map(index, p)) for p in prompts]
    except TypeError as error:
        raise ValueError(f"a prompt is a text or a list of integer ids: {error}") from error
    if not rows:
        raise ValueError("there is no prompt; give a list of at least one")
    for row in rows:
        if not row:
            raise ValueError("the prompt is empty and the model has no BOS token to start from; give some text")
        if (worst := max(row)) >= vocab_size or (worst := min(row)) < 0:
            raise ValueError(f"the prompt uses token id {worst}; the model's vocabulary has {vocab_size}")
    return rows


def draft_mismatch(target: Tokenizer | Ids, draft: Tokenizer | Ids, proposed: int) -> str:
    """Why the ids 0..proposed - 1 of a draft model do not all mean the same to its target; "" where they do.

    Tokens that only one of the two knows, a few at the end or control tokens, are never both proposed and accepted.
    """
    if isinstance(target, Ids) or isinstance(draft, Ids):
        return "" if type(target) is type(draft) else "one of the two models has random weights and no tokenizer"
    sizes = target.vocab_size, draft.vocab_size
    if abs(sizes[0] - sizes[1]) > MOST_EXTRA:
        return f"the draft's tokenizer has {sizes[1]} ids and the target's {sizes[0]}"
    for i in range(min(proposed, *sizes)):
        mine, theirs = (str(t.file.token(i)) for t in (target, draft))
        control = [i in t.file.special for t in (target, draft)]
        if mine != theirs and all(control):  # renamed is harmless, moved to another id is not
            control[0] = target.file.id_of(theirs) is None and draft.file.id_of(mine) is None
        if control[0] != control[1] or (mine != theirs and not all(control)):
            return f"id {i} is {mine!r} to the target and {theirs!r} to the draft"
    return ""


def token_of(what: str, value: Any) -> tokenizers.AddedToken:  # noqa: ANN401
    """A special token as the JSON files write it: its text, or an object with the text and its flags."""
    flags = value if isinstance(value, dict) else {"content": value, "special": True}
    if not isinstance(flags.get("content"), str):
        raise ValueError(f"{what!a} is {value!r}; it must be a token's text, or an object that has it as content")
    special = bool(flags.get("special"))
    chosen = {name: bool(flags[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in flags}
    return tokenizers.AddedToken(flags["content"], special=special, **{"normalized": not special, **chosen})
