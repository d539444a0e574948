"""A checkpoint folder as it comes: from the Hub where it is not here; its text and JSON files, its chat templates, and
what generation_config.json says.

Knows the Hub and its cache, and the dialect of generation_config.json. Refuses to know what the other files mean:
tensors (`checkpoint.py`), config.json (`architectures.py`), tokenizers (`tokenizer.py`).
"""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

Json = dict[str, Any]
Params = TypeVar("Params")
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "LICEN[CS]E*", "NOTICE*"]
HUB_IGNORED = ["*/*", "consolidated*"]  # sub-folders hold other formats; consolidated*: a second copy of the weights

# keys of generation_config.json that `SamplingParams` knows
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# other keys that change the output, each with the value that is off; null and what is empty always are
_NOT_SAMPLED = {
    **dict.fromkeys("encoder_repetition_penalty typical_p guidance_scale".split(), 1),
    **dict.fromkeys("num_beams num_beam_groups".split(), 1),
    **dict.fromkeys("no_repeat_ngram_size encoder_no_repeat_ngram_size min_length min_new_tokens".split(), 0),
    **dict.fromkeys("epsilon_cutoff eta_cutoff diversity_penalty penalty_alpha top_h token_healing".split(), 0),
    **dict.fromkeys("presence_penalty frequency_penalty".split(), 0),
    **dict.fromkeys("bad_words_ids force_words_ids constraints suppress_tokens begin_suppress_tokens".split()),
    **dict.fromkeys("forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty max_time".split()),
    **dict.fromkeys("sequence_bias stop_strings watermarking_config dola_layers".split()),
}


def resolve(path_or_hub_id: str) -> Path:
    """The local folder of a checkpoint: an existing folder as it is, else the Hub's `org/name[@revision]` in its cache.

    Files that the cache lacks are downloaded, with progress bars (huggingface_hub reads HF_HUB_OFFLINE, HF_TOKEN,
    HF_ENDPOINT and HF_HOME). Raises FileNotFoundError: one line with the remedy.
    """
    if os.path.isdir(path_or_hub_id):
        return Path(path_or_hub_id)
    if os.path.exists(path_or_hub_id):
        raise FileNotFoundError(f"checkpoint {path_or_hub_id!r} is a file: give the folder that holds it")
    match = HUB_ID.fullmatch(path_or_hub_id)
    if match is None or ".." in path_or_hub_id:
        raise FileNotFoundError(f"checkpoint {path_or_hub_id!r}: no such folder, and no Hub id (org/name[@revision])")
    repo, revision = match.groups()
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except Exception as error:  # each HTTP library that huggingface_hub has used (requests, httpx) raises its own
        raise FileNotFoundError(_hub_problem(repo, revision or "main", error)) from error


def _hub_problem(repo: str, revision: str, error: Exception) -> str:
    """One line: why `repo` could not be downloaded, and what to do."""
    # A fruitless look into the cache hides the Hub's own answer one level down.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{repo}"
    if isinstance(cause, GatedRepoError):  # before RepositoryNotFoundError, which it derives from
        return f"{repo} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account"
    if isinstance(cause, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}: see {page}/commits"
    if status == 401 and "Invalid credentials" in str(cause):
        token = "the token in HF_TOKEN (or the saved one)"
        return f"{hub} does not know {token}: correct it, or unset it for a public model"
    if isinstance(cause, (RepositoryNotFoundError, HFValidationError)) or status == 401:
        return f"{repo!r}: no such folder, and no such repository on {hub}; if it is private, set HF_TOKEN"
    if status == 403:
        return f"{hub} refused access to {repo} (HTTP {status}): check HF_TOKEN, and your rights at {page}"
    if constants.HF_HUB_OFFLINE or isinstance(cause, OfflineModeIsEnabled):
        return f"{repo!r} ({revision}): no such folder, and not complete in the Hub's cache: unset HF_HUB_OFFLINE once"
    detail = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
    what = f"{repo!r}: no such folder, and downloading it from {hub} failed ({detail})"
    return f"{what}: try again; files that arrived whole are kept"


def text_of(path: Path) -> str:
    """A file's text. ValueError names a file that cannot be read, such as a link to nowhere."""
    try:
        if not path.is_file():
            raise OSError("it is not a file, or a link to nowhere")
        return path.read_text("utf-8-sig")  # some editors put a mark in front
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> Json:
    """The JSON object of a file, {} where there is none. ValueError names the file."""
    if not os.path.lexists(path):
        return {}
    text = text_of(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def templates_of(folder: Path, configured: Any) -> dict[str, str]:  # noqa: ANN401
    """Chat templates by name: the folder's files, else those of tokenizer_config.json; a lone one is default."""
    files = [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]
    found = {path.stem.replace("chat_template", "default"): text_of(path) for path in files if os.path.lexists(path)}
    if found or not configured:
        return found
    if isinstance(configured, list) and all(isinstance(entry, dict) for entry in configured):
        configured = {entry.get("name"): entry.get("template") for entry in configured}
    templates = configured if isinstance(configured, dict) else {"default": configured}
    if wrong := [value for pair in templates.items() for value in pair if not isinstance(value, str)]:
        raise ValueError(f"chat_template holds {wrong[0]!r} where it must hold text")
    return templates


def end_ids(generation: Json, config: Json) -> list[int]:
    """The ids that end a text: those of generation_config.json, else those of config.json."""
    name = "generation_config.json" if generation.get("eos_token_id") is not None else "config.json"
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{name}: eos_token_id is {ids}; it must be an id or a list of ids")
    return ids


def sampling_from_hf(config: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """generation_config.json -> (the `SAMPLING` parameters that it sets, the keys that it sets in vain).

    Values that other programs take for "off", such as top_k -1, are off. A temperature below 0.001 is greedy, as it is
    there, and so is top_p 0, which leaves the most probable token. `do_sample: false` is greedy.
    """
    values: dict[str, float] = {}
    for name in (n for n in SAMPLING if config.get(n) is not None):
        value, whole = config[name], name == "top_k"
        if type(value) not in (int, float) or (whole and value % 1 != 0):
            raise ValueError(f"{name} is {value!r}; it must be {'an integer' if whole else 'a number'}")
        rounded = {"top_k": 0 if value == -1 else value, "top_p": value or 1e-6}
        rounded["temperature"] = 0.0 if 0 <= value < 1e-3 else value
        values[name] = int(rounded[name]) if whole else rounded.get(name, value)
    if not isinstance(sampled := config.get("do_sample"), bool | None):
        raise ValueError(f"do_sample is {sampled!r}; it must be true or false")
    if sampled is False:
        values = {"temperature": 0.0} | {n: v for n, v in values.items() if n == "repetition_penalty"}
    return values, [name for name, off in _NOT_SAMPLED.items() if config.get(name) not in (None, off, "", [], {})]


def default_sampling(folder: Path, make: Callable[..., Params], chosen: Mapping[str, float] | None) -> Params:
    """`make` called with what generation_config.json says of sampling (config.json where there is none, as transformers
    does), but for what is `chosen`. A ValueError names the file; what is set and not implemented is told in one line.
    """
    path = folder / "generation_config.json"
    path = path if os.path.lexists(path) else folder / "config.json"
    config = read_json(path)
    try:
        values, ignored = sampling_from_hf({k: v for k, v in config.items() if k not in (chosen or {})})
        params = make(**{**values, **(chosen or {})})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if ignored:
        tell(f"warning: {path} sets {', '.join(ignored)}: not implemented here, so the output may be another")
    return params


def tell(line: str) -> None:
    """Print a line on standard error, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
