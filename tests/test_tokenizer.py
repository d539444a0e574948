"""Ids equal transformers' and sentencepiece's; decoding is exact however it is split; templates cannot do harm."""

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenizer import Ids, Tokenizer, draft_mismatch

MODELS = Path(__file__).parent.parent.parent / "shared" / "models"
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two leading,   three inside, trailing  ",
    " ",
    "\n\n\tdef f(x):\r\n\t\treturn {'a': x[0] ** 2}  # ≥ 1\n",
    "日本語のテキスト、中文，한국어 और हिन्दी; العربية.",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u00a0nbsp\u2003em\u200bzero \ufeffbom ▁ Ġ \x00\x7f",
    "don't I'LL 1234567 3.14 https://example.org/?q=a&b=%20",
    "<0x41> <|bos|> </s> <s> <unk> <think>",
]
CORPUS = [*TEXTS[:5], *TEXTS[6:7], "hello world, the cat sat on the mat and said hello to the world again"] * 8
TEMPLATE = (
    "{{ bos_token }}{% if tools is not none %}tools{% endif %}"
    "{% for message in messages %}\n  {% if message['role'] == 'system' %}\n{% continue %}\n{% endif %}"
    "<|head|>{{ message.role }}\n{% generation %}{{ message['content'] | trim }}{% endgeneration %}<|eot|>"
    "{{- {'b': '<é>', 'a': [1]} | tojson }}{%- endfor %}{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "system", "content": "no"}, {"role": "user", "content": " Hé <b> <|eot|> 日本 "}]


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """Llama-3's and Qwen's kind: byte-level BPE, a split pattern, special and plain added tokens, BOS, several EOS."""
    folder = tmp_path_factory.mktemp("byte_level")
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = r"(?i:'s|'t|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, plain_bytes])
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    model.add_special_tokens(["<|bos|>", "<|eos|>", "<|eot|>", "<|head|>"])
    model.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    bos = model.token_to_id("<|bos|>")
    model.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    model.enable_truncation(8)  # both are training leftovers that a folder may carry
    model.enable_padding(length=64)
    model.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "<|eos|>", "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": eos}
    write(folder, "tokenizer_config.json", config | {"chat_template": TEMPLATE})
    write(folder, "generation_config.json", {"eos_token_id": [model.token_to_id("<|eot|>"), 7]})
    write(folder, "config.json", {"eos_token_id": 9, "bos_token_id": 9})
    return folder


@pytest.fixture(scope="module")
def llama_json(tmp_path_factory):
    """Llama-2's and Mistral's kind: BPE over `▁` with byte fallback."""
    folder = tmp_path_factory.mktemp("llama_json")
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
    merges = [tuple(pair) for pair in state["merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.normalizer = trained.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write(folder, "tokenizer_config.json", config)
    return folder


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory):
    """A small sentencepiece model as Meta trains them, in a folder without tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("piece_model")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    write(folder, "config.json", {"eos_token_id": 2, "bos_token_id": 1})
    return folder


@pytest.fixture(params=["tiny", "stories260K", "llama2-tokenizer"])
def pieces(request, piece_model):
    """(our tokenizer, sentencepiece's) of the same tokenizer.model."""
    folder = piece_model if request.param == "tiny" else MODELS / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return Tokenizer.from_folder(folder), sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


@pytest.fixture(params=["byte_level", "llama_json", "piece_model"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("kind", ["byte_level", "llama_json"])
def test_ids_equal_transformers(kind, request):
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(kind)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True), text
        assert ours.encode(text, bos=False) == theirs.encode(text, split_special_tokens=True, add_special_tokens=False)
    assert ours.bos_id == theirs.bos_token_id
    assert (
        ours.vocab_size == max(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values()) + 1
    )


def test_ids_equal_sentencepiece(pieces):
    ours, theirs = pieces
    for text in TEXTS:
        assert ours.encode(text) == [theirs.bos_id(), *theirs.encode(text)], text
        assert ours.encode(text, bos=False) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text.replace("▁", " ")
    assert ours.vocab_size == theirs.vocab_size() and ours.bos_id == 1


def test_bos_and_eos_follow_the_folder(piece_model, byte_level, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((piece_model / "tokenizer.model").read_bytes())
    plain = Tokenizer.from_folder(piece_model).encode("hello", bos=False)
    for add_bos, add_eos, expected in ((True, True, [1, *plain, 2]), (False, False, plain), (False, True, [*plain, 2])):
        write(
            tmp_path, "tokenizer_config.json", {"add_bos_token": add_bos, "add_eos_token": add_eos, "bos_token": "<s>"}
        )
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.encode("hello") == expected
        assert tokenizer.encode("hello", bos=False) == plain
        assert tokenizer.encode("") == [1] and tokenizer.encode("", bos=False) == []  # an empty prompt is BOS alone
    write(tmp_path, "tokenizer_config.json", {"add_bos_token": False, "bos_token": None})
    assert Tokenizer.from_folder(tmp_path).bos_id is None and Tokenizer.from_folder(tmp_path).encode("") == []


def test_stop_ids(byte_level, llama_json, piece_model):
    tokenizer = Tokenizer.from_folder(byte_level)
    eos, eot = (tokenizer.file.id_of(name) for name in ("<|eos|>", "<|eot|>"))
    assert tokenizer.stop_ids == {eos, eot, 7}  # the tokenizer's and generation_config.json's, not config.json's
    assert Tokenizer.from_folder(llama_json).stop_ids == {2}
    assert Tokenizer.from_folder(piece_model).stop_ids == {2}  # config.json's, for want of the others


def test_control_tokens_in_a_plain_prompt_are_text(folder):
    tokenizer = Tokenizer.from_folder(folder)
    text = "say </s> or <|eot|> or <s>"
    ids = tokenizer.encode(text, bos=False)
    assert not set(ids) & tokenizer.file.special
    assert tokenizer.decode(ids) == text


def readable(tokenizer, text):
    """What a text comes back as: sentencepiece cannot tell its own ▁ from a space."""
    return text if tokenizer.file.byte_level else text.replace("▁", " ")


def library_decode(folder, ids):
    if (folder / "tokenizer.json").is_file():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids)
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).decode(ids)


def test_decoding_equals_the_library(folder):
    tokenizer = Tokenizer.from_folder(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == library_decode(folder, ids) == readable(tokenizer, text)
    ids = tokenizer.encode(" ".join(TEXTS[4:6]), bos=False)  # any cut between characters, byte pieces included
    for start in range(len(ids)):
        part = ids[start:]
        if "\ufffd" not in tokenizer.decode(part):
            assert tokenizer.decode(part) == library_decode(folder, part)


def test_incremental_decoding_equals_one_shot(folder):
    tokenizer, rng = Tokenizer.from_folder(folder), random.Random(0)
    broken = 0
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(40))]
        decoder, text, at = tokenizer.decoder(), "", 0
        while at < len(ids):
            step = rng.randrange(4)
            text, at = text + decoder.add(ids[at : at + step]), at + step
        assert text + decoder.flush() == tokenizer.decode(ids)
        broken += "\ufffd" in tokenizer.decode(ids)
    assert broken > 100  # the random ids did contain broken UTF-8


def test_streaming_never_breaks_a_character(folder):
    tokenizer = Tokenizer.from_folder(folder)
    for text in TEXTS:
        decoder = tokenizer.decoder()
        parts = [decoder.add([i]) for i in tokenizer.encode(text)]
        assert not any("\ufffd" in part for part in parts) and decoder.flush() == ""
        assert "".join(parts) == readable(tokenizer, text)
    ids = tokenizer.encode("日", bos=False)
    decoder = tokenizer.decoder()
    assert decoder.add(ids[:-1]).strip() + decoder.flush() in ("\ufffd", "")  # an unfinished character, or one piece


def test_decoding_is_linear(piece_model, monkeypatch):
    tokenizer, calls = Tokenizer.from_folder(piece_model), []
    monkeypatch.setattr(tokenizer.file, "token", lambda i: calls.append(i) or "a")
    decoder = tokenizer.decoder()
    for i in range(5000):
        decoder.add([100 + i % 50])
    assert len(calls) == 5000  # each id is looked up once


def test_leading_space(piece_model, llama_json, byte_level):
    for folder in (piece_model, llama_json):
        tokenizer = Tokenizer.from_folder(folder)
        ids = tokenizer.encode("hello world", bos=False)
        assert tokenizer.decoder().add(ids) == "hello world"
        assert tokenizer.decoder([tokenizer.bos_id]).add(ids) == "hello world"  # BOS has no text
        assert tokenizer.decoder(tokenizer.encode("Hi,")).add(ids) == " hello world"
    tokenizer = Tokenizer.from_folder(byte_level)
    assert tokenizer.decoder().add(tokenizer.encode(" hello", bos=False)) == " hello"


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_equals_transformers(byte_level, prompt):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(byte_level), Tokenizer.from_folder(byte_level)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    assert ours.has_chat_template and ours.render_chat(MESSAGES, add_generation_prompt=prompt) == text
    assert text.startswith("<|bos|><|head|>user\nHé <b> <|eot|> 日本<|eot|>") and '{"b": "<é>", "a": [1]}' in text
    if prompt:
        ids = ours.encode_chat(MESSAGES)
        assert ids == theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
        assert ids.count(ours.bos_id) == 1


def test_chat_with_sentencepiece(piece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((piece_model / "tokenizer.model").read_bytes())
    template = "{% for m in messages %}{{ bos_token }}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endfor %}"
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})
    turn = Tokenizer.from_folder(piece_model).encode("[INST] hello [/INST]", bos=False)
    assert Tokenizer.from_folder(tmp_path).encode_chat([{"role": "user", "content": "hello"}] * 2) == [1, *turn, 2] * 2


def with_template(llama_json, folder, template):
    (folder / "tokenizer.json").write_bytes((llama_json / "tokenizer.json").read_bytes())
    write(folder, "tokenizer_config.json", {"chat_template": template})
    return Tokenizer.from_folder(folder)


def test_where_the_template_comes_from(llama_json, tmp_path):
    none = with_template(llama_json, tmp_path, None)
    assert not none.has_chat_template
    with pytest.raises(ValueError, match="no chat template: use "):
        none.encode_chat(MESSAGES)
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
    assert with_template(llama_json, tmp_path, named).render_chat([]) == "the default"
    assert with_template(llama_json, tmp_path, {"default": "in an object"}).render_chat([]) == "in an object"
    with pytest.raises(ValueError, match="has chat templates called tool_use, but none called default"):
        with_template(llama_json, tmp_path, named[:1]).render_chat([])
    write(tmp_path, "chat_template.jinja", "the file")
    assert with_template(llama_json, tmp_path, named).render_chat([]) == "the file"
    (tmp_path / "chat_template.jinja").unlink()
    dated = with_template(llama_json, tmp_path, "{{ strftime_now('%Y') }}{{ messages[0].content }}")
    assert dated.render_chat([{"role": "user", "content": "\ud83d \x00 é"}])[4:] == "\ud83d \x00 é"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "alternate"),
        ("{{ raise_exception('x' * 9999) }}", "xxx"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[0].missing.deeper }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{{ strftime_now.__self__.now() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it ran into its limits"),
    ],
)
def test_hostile_templates_are_one_line(llama_json, tmp_path, template, reason):
    tokenizer = with_template(llama_json, tmp_path, template)
    with pytest.raises(ValueError, match="^the chat template failed: ") as caught:
        tokenizer.render_chat(MESSAGES)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_broken_folders_are_one_line(llama_json, piece_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither tokenizer.json nor tokenizer.model"):
        Tokenizer.from_folder(tmp_path)
    good = (llama_json / "tokenizer.json").read_text("utf-8")
    wordpiece = json.loads(good) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    broken = [
        ("tokenizer.json", good[:1000]),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "\x00"),
        ("tokenizer.json", json.dumps(wordpiece)),
        ("tokenizer.json", json.dumps(json.loads(good) | {"decoder": None})),
        ("tokenizer.model", "not a model"),
        ("tokenizer.model", ""),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"chat_template": [1]}'),
        ("generation_config.json", '"text"'),
    ]
    for n, (name, content) in enumerate(broken):
        folder = tmp_path / str(n)
        folder.mkdir()
        if not name.startswith("tokenizer."):
            write(folder, "tokenizer.json", good)
        write(folder, name, content)
        named = "its tokenizer cannot be read" if "template" in content or name.startswith("tokenizer.") else name
        with pytest.raises(ValueError, match=named) as caught:
            Tokenizer.from_folder(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_text_that_is_not_unicode_is_one_line(folder):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        Tokenizer.from_folder(folder).encode("a\udc80")


def test_chat_that_is_not_unicode_is_one_line(llama_json, tmp_path):
    tokenizer = with_template(llama_json, tmp_path, "{{ messages[0].content }}")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode_chat([{"role": "user", "content": "a\udc80"}])


def test_a_sentencepiece_model_without_bos(tmp_path):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=100, bos_id=-1, eos_id=-1, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.bos_id is None and tokenizer.stop_ids == frozenset() and tokenizer.encode("") == []
    assert tokenizer.encode("hello world") == tokenizer.encode("hello world", bos=False) != []
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


# -- tokens that only the files beside the tokenizer name ----------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def flags(content, special=True, **changes):
    return dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {
        "content": content, "special": special, **changes
    }  # fmt: skip


def beside(source, first):
    """(tokenizer_config.json, other files) that add two ids from `first` on."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML}
    named = {"eos_token": "<|im_end|>"}
    if source == "added_tokens_decoder":
        decoder = {str(first): flags("<|im_start|>", rstrip=True), str(first + 1): flags("<|im_end|>")}
        return config | named | {"added_tokens_decoder": decoder}, {}
    if source == "disagreeing flags":
        decoder = {str(first): flags("<|im_start|>", special=False), str(first + 1): flags("<|im_end|>", False)}
        return config | named | {"added_tokens_decoder": decoder}, {}
    if source == "added_tokens.json":
        return config | named, {"added_tokens.json": {"<|im_start|>": first, "<|im_end|>": first + 1}}
    if source == "special_tokens_map.json":
        tokens = {"eos_token": flags("<|im_start|>"), "additional_special_tokens": ["<|im_end|>"]}
        return config | {"eos_token": "</s>"}, {"special_tokens_map.json": tokens}
    return config | {"eos_token": "<|im_start|>", "additional_special_tokens": ["<|im_end|>"]}, {}


SOURCES = ["added_tokens_decoder", "disagreeing flags", "added_tokens.json", "special_tokens_map.json", "names alone"]


@pytest.mark.parametrize("kind", ["byte_level", "llama_json"])
@pytest.mark.parametrize("source", SOURCES)
def test_added_tokens_equal_transformers(kind, source, request, tmp_path):
    from transformers import AutoTokenizer

    tokenizer_json = json.loads((request.getfixturevalue(kind) / "tokenizer.json").read_text("utf-8"))
    first = Tokenizer.from_folder(request.getfixturevalue(kind)).vocab_size
    write(tmp_path, "tokenizer.json", tokenizer_json | {"padding": None})  # whose token transformers would add
    config, files = beside(source, first)
    for name, content in ({"tokenizer_config.json": config} | files).items():
        write(tmp_path, name, content)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
    ids = ours.encode_chat(MESSAGES)
    assert ids == theirs.apply_chat_template(MESSAGES)["input_ids"] and {first, first + 1} <= set(ids)
    assert theirs.eos_token_id in ours.stop_ids
    assert ours.vocab_size == first + 2
    for i in (first, first + 1):  # one is a control token and has no text, or both are plain
        assert ours.decode([i]) == theirs.decode([i], skip_special_tokens=True)
    text = "say <|im_start|> \n"
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)


@pytest.mark.parametrize("source", SOURCES)
def test_added_tokens_of_a_sentencepiece_folder(piece_model, tmp_path, source):
    (tmp_path / "tokenizer.model").write_bytes((piece_model / "tokenizer.model").read_bytes())
    config, files = beside(source, 420)
    for name, content in ({"tokenizer_config.json": config | {"legacy": True}} | files).items():
        write(tmp_path, name, content)
    tokenizer, plain = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(piece_model)
    user, answer = (plain.encode(text, bos=False) for text in ("user\nHi", "assistant"))
    want = [420, *user, 421, *plain.encode("\n", bos=False), 420, *answer]
    assert tokenizer.encode_chat([{"role": "user", "content": "Hi"}]) == want
    eos = 421 if source in SOURCES[:3] else 420
    assert eos in tokenizer.stop_ids and tokenizer.vocab_size == 422
    special = {"disagreeing flags": {421}, "added_tokens.json": {421}}.get(source, {420, 421})
    assert tokenizer.file.special - plain.file.special == special
    assert tokenizer.decode([420]) == ("" if 420 in special else "<|im_start|>")
    text = "say <|im_end|>"
    assert not {420, 421} & set(tokenizer.encode(text)) and tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "legacy, spaced", [({"legacy": True}, True), ({"legacy": False}, False), ({}, True),
                       ({"tokenizer_class": "LlamaTokenizer"}, False)]
)  # fmt: skip
def test_space_after_a_control_token(piece_model, tmp_path, legacy, spaced):
    """transformers' `legacy: false` starts only the text itself with a space, not what follows a control token."""
    (tmp_path / "tokenizer.model").write_bytes((piece_model / "tokenizer.model").read_bytes())
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }} {{ messages[0].content }}"
    write(tmp_path, "tokenizer_config.json", {"eos_token": "</s>", "chat_template": template, **legacy})
    tokenizer, model = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(piece_model).file.model
    hello = model.encode("hello")
    bare = hello if spaced else model.encode("\nhello")[len(model.encode("\n")) :]
    assert (hello != bare) != spaced
    after = model.encode(" hello") if spaced else hello
    assert tokenizer.encode_chat([{"role": "user", "content": "hello"}]) == [1, *bare, 2, *after]
    assert tokenizer.encode("hello") == [1, *hello]


def test_ids_that_cannot_be_as_declared_are_refused(llama_json, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((llama_json / "tokenizer.json").read_bytes())
    size = Tokenizer.from_folder(tmp_path).vocab_size
    for source, files in (
        ("tokenizer_config.json", {"tokenizer_config.json": {"added_tokens_decoder": {str(size + 3): flags("<a>")}}}),
        ("added_tokens.json", {"added_tokens.json": {"<a>": size + 3}, "tokenizer_config.json": {}}),
    ):
        for name, content in files.items():
            write(tmp_path, name, content)
        with pytest.raises(ValueError, match=f"{source} gives '<a>' the id {size + 3}; .* it would be {size}$"):
            Tokenizer.from_folder(tmp_path)


def test_added_tokens_with_characters_beyond_the_byte_alphabet(byte_level, tmp_path):
    model = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    model.add_tokens(["naïve café", "<tool é>", "你好"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in ("a naïve café b", "<tool é>", "你好"):
        ids = tokenizer.encode(text, bos=False)
        assert max(ids) >= 405 and tokenizer.decode(ids) == model.decode(ids) == text


def with_tokens(llama_json, folder, *tokens, rename=()):
    folder.mkdir()
    content = json.loads((llama_json / "tokenizer.json").read_text("utf-8"))
    for old, new in rename:
        entry = next(t for t in content["added_tokens"] if t["content"] == old)
        entry["content"], content["model"]["vocab"][new] = new, content["model"]["vocab"].pop(old)
        content = json.loads(json.dumps(content).replace(f'"{old}"', f'"{new}"'))
    write(folder, "tokenizer.json", content)
    first = Tokenizer.from_folder(folder).vocab_size
    decoder = {str(first + n): flags(text, special) for n, (text, special) in enumerate(tokens)}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": decoder})
    return Tokenizer.from_folder(folder)


def test_drafts_whose_ids_mean_the_same(llama_json, byte_level, tmp_path):
    plain = Tokenizer.from_folder(llama_json)
    size = plain.vocab_size
    chat = with_tokens(llama_json, tmp_path / "chat", ("<|im_start|>", True), ("<|im_end|>", True))
    swapped = with_tokens(llama_json, tmp_path / "swapped", ("<|im_end|>", True), ("<|im_start|>", True))
    other = with_tokens(llama_json, tmp_path / "other", ("<|reserved_0|>", True), ("<|im_end|>", True))
    think = with_tokens(llama_json, tmp_path / "think", ("<think>", False))
    many = with_tokens(llama_json, tmp_path / "many", *((f"<{i}>", True) for i in range(300)))
    for target, draft in ((plain, plain), (plain, chat), (chat, plain), (chat, other), (plain, think), (think, plain)):
        assert draft_mismatch(target, draft, size + 64) == ""
    assert f"id {size} is '<|im_start|>' to the target and '<|im_end|>' " in draft_mismatch(chat, swapped, size + 64)
    assert draft_mismatch(chat, swapped, size) == ""  # a draft model that has no rows for them cannot propose them
    assert "'<think>' to the draft" in draft_mismatch(chat, think, size + 64)
    assert f"has {size + 300} ids and the target's {size}" in draft_mismatch(plain, many, size + 512)
    assert draft_mismatch(plain, Tokenizer.from_folder(byte_level), 400)
    assert draft_mismatch(Ids(8), Ids(8), 8) == "" and "random weights" in draft_mismatch(plain, Ids(8), 8)


def test_chat_variables_equal_transformers(llama_json, tmp_path):
    from transformers import AutoTokenizer

    roles = "pad_token unk_token sep_token image_token tools documents date_string eos_token".split()
    template = "".join(f"{{{{ {r} if {r} is defined else '(no {r})' }}}};{{{{ {r} is none }}}} " for r in roles)
    config = {
        "pad_token": "</s>",
        "unk_token": flags("<unk>", __type="AddedToken"),
        "image_token": "<image>",
        "eos_token": "</s>",
    }
    write(tmp_path, "tokenizer.json", (llama_json / "tokenizer.json").read_text("utf-8"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "sep_token": None}
    write(tmp_path, "tokenizer_config.json", config)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES, tokenize=False)
    assert Tokenizer.from_folder(tmp_path).render_chat(MESSAGES, add_generation_prompt=False) == theirs
    assert "None;True" in theirs and "<image>;False" in theirs and "(no sep_token);False" in theirs


def test_additional_chat_templates(llama_json, tmp_path):
    with_template(llama_json, tmp_path, "configured")
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path, "additional_chat_templates/tool_use.jinja", "tools")
    with pytest.raises(ValueError, match="called tool_use, but none called default"):
        Tokenizer.from_folder(tmp_path).render_chat([])
    write(tmp_path, "chat_template.jinja", "the file")
    assert Tokenizer.from_folder(tmp_path).render_chat([]) == "the file"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_a_link_to_nowhere_is_not_an_absent_file(llama_json, tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes((llama_json / "tokenizer.json").read_bytes())
    for target in (tmp_path / "nowhere", tmp_path / name, tmp_path):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"{name} cannot be read: ") as caught:
            Tokenizer.from_folder(tmp_path)
        assert "\n" not in str(caught.value)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "config, words",
    [
        ({"eos_token": 7}, "eos_token. is 7"),
        ({"bos_token": ["<s>"]}, "bos_token.*is"),
        ({"eos_token": {"special": True}}, "it must be a token's text"),
        ({"added_tokens_decoder": {"9": 3}}, r"added_tokens_decoder\[9\]' is 3"),
        ({"added_tokens_decoder": {"x": "<a>"}}, "has 'x' where it must have an id"),
        ({"added_tokens_decoder": {"99999999": "<a>"}}, "has '99999999' where it must have an id"),
        ({"added_tokens_decoder": ["<a>"]}, "added_tokens_decoder must be an object"),
        ({"additional_special_tokens": "<a>"}, "additional special tokens a list or an object"),
        ({"additional_special_tokens": [None]}, "additional_special_tokens' is None"),
        ({"chat_template": {"default": 3}}, "chat_template holds 3"),
        ({"chat_template": [{"name": "default"}]}, "chat_template holds None"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; it must be true or false"),
    ],
)
def test_wrong_types_are_named(piece_model, tmp_path, config, words):
    (tmp_path / "tokenizer.model").write_bytes((piece_model / "tokenizer.model").read_bytes())
    write(tmp_path, "tokenizer_config.json", config)
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "Error" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}}, "makes .* ids of"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "PanicException: chunk size must be non-zero"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "tokenizer.json was tried"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "tokenizer.json was tried"),
    ],
)
def test_tokenizers_are_tried_before_they_are_used(byte_level, tmp_path, capfd, change, words):
    """Panics and bombs end in a child process; here there is one line, and nothing on standard error."""
    content = json.loads((byte_level / "tokenizer.json").read_text("utf-8"))
    write(tmp_path, "tokenizer.json", content | change)
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(caught.value).isprintable() and str(tmp_path) in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_is_too_long_is_refused(llama_json, tmp_path, monkeypatch):
    tokenizer = with_template(llama_json, tmp_path, "{{ 'ab ' * 10000000 }}")
    with pytest.raises(ValueError, match="the chat template failed: it made 30000000 characters; 4194304 are allowed"):
        tokenizer.render_chat(MESSAGES)
    monkeypatch.setattr("tokenizer.MOST_TEXT", 100)
    assert tokenizer.encode("a" * 100)
    with pytest.raises(ValueError, match="the text has 101 characters; 100 are encoded at most"):
        tokenizer.encode("a" * 101)


def test_a_panic_on_a_certain_text_is_one_line(llama_json, monkeypatch):
    class Panic(BaseException):
        pass

    def encode(*_):
        raise Panic("range end index 9 out of range\n")

    tokenizer = Tokenizer.from_folder(llama_json)
    monkeypatch.setattr(tokenizer.file, "encode", encode)
    with pytest.raises(ValueError, match="^the tokenizer failed: 'range end index 9 out of range"):
        tokenizer.encode("a")


def test_ids_of_added_tokens_json_are_checked(llama_json, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((llama_json / "tokenizer.json").read_bytes())
    for wrong in ("7x", None, [1], -1, 10**9):
        write(tmp_path, "added_tokens.json", {"<a>": wrong})
        with pytest.raises(ValueError, match="added_tokens.json|TypeError") as caught:
            Tokenizer.from_folder(tmp_path)
        assert "Error" not in str(caught.value)


def test_a_tokenizer_is_tried_whatever_lies_in_the_current_folder(llama_json, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    (tmp_path / "contextlib.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert Tokenizer.from_folder(llama_json).encode("hello")
    shown = with_template(llama_json, tmp_path, "{{ messages[0].content }}").render_chat([{"content": "hi"}])
    assert shown == "hi"
