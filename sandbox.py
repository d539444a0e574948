"""Runs what came with a download in a child process that has limits: chat templates, and tokenizers on trial.

Knows limits of time, memory and output, and what a template may call. Refuses to know what the text means.

A chat template is a program. Jinja's immutable sandbox keeps it from Python's objects but bounds neither its loops nor
its memory. A tokenizer is one too: its expressions may backtrack for ever, its replacements multiply, its parser panic.
Loading it and encoding a few texts finds a fault that any text meets, not one that only a certain text triggers.

The child is this file, run as a program: standard input is the JSON of a job's name and its arguments, standard output
that of the result. What fails says why in the last line of standard error.
"""

import contextlib
import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2.sandbox
import sentencepiece
import tokenizers

Json = dict[str, Any]
LIMITS = {"render": (3, 1), "try_out": (10, 4)}  # of a job: seconds of processor time, GiB of addresses
MOST_RENDERED = 1 << 22  # characters of a rendered conversation
TEXTS = ["", " ", "Once upon a time, there was a little girl. " * 50, "a" * 2000, "1234567890" * 100, " " * 1000]
TEXTS += ["\n\t{x[0] ** 2}  # é 日本語 🙂\r\n" * 50, "don't I'LL </s> <|im_end|> <unk> \ue000" * 20]


def render_template(template: str, variables: Json) -> str:
    """The text that a chat template makes of its variables. ValueError where that fails."""
    try:
        return _in_child("render", template, variables)
    except ValueError as error:
        raise ValueError(f"the chat template failed: {error}") from error


def try_tokenizer(path: Path) -> None:
    """ValueError where a tokenizer's file cannot be loaded and used on a few texts."""
    try:
        _in_child("try_out", str(path.resolve()))
    except ValueError as error:
        raise ValueError(f"{path.name} was tried: {str(error)!a}") from error


def _in_child(job: str, *arguments: object) -> Any:  # noqa: ANN401
    """The result of that job, one of `LIMITS`. ValueError with the reason of a failure."""
    request = json.dumps([job, *arguments])
    child = subprocess.run([sys.executable, __file__], input=request, capture_output=True, text=True)
    if child.returncode:
        reason = child.stderr.strip().split("\n")[-1] if child.returncode > 0 else ""  # below 0: ended by a signal
        raise ValueError(reason[:200] or "it ran into its limits ({} s, {} GiB)".format(*LIMITS[job]))
    return json.loads(child.stdout)


def render(template: str, variables: Json) -> str:
    """Renders a chat template with the functions and whitespace rules that transformers gives it."""

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def tojson(x: Any, ensure_ascii: bool = False, **options: Any) -> str:  # noqa: ANN401
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": fail, "strftime_now": datetime.now().strftime}
    # {% generation %} marks a training mask: a tag without effect here.
    template = re.sub(r"({%[-+]?\s*)(?:end)?generation(\s*[-+]?%})", r"\1set _ = 0\2", template)
    text = env.from_string(template).render(variables)
    if len(text) > MOST_RENDERED:
        sys.exit(f"it made {len(text)} characters; {MOST_RENDERED} are allowed")
    return text


def try_out(path: str) -> bool:
    """Loads the tokenizer, and encodes and decodes `TEXTS`."""
    if path.endswith("json"):
        model: Any = tokenizers.Tokenizer.from_file(path)
        model.no_truncation()
        model.no_padding()
    else:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    for text in TEXTS:
        encoded = model.encode(text)
        ids = encoded if isinstance(encoded, list) else encoded.ids
        if len(ids) > 64 + 4 * len(text.encode()):
            sys.exit(f"it makes {len(ids)} ids of {len(text)} characters")
        model.decode(ids)
    return True


if __name__ == "__main__":
    name, *given = json.load(sys.stdin)
    with contextlib.suppress(ImportError, ValueError):  # Windows has no such limits, macOS not the second
        import resource

        seconds, gigabytes = LIMITS[name]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
    print(json.dumps(render(*given) if name == "render" else try_out(*given)))
