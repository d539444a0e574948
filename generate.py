"""The command: arguments in, text out; prompts, chat, the summary.

Knows words: flags, prompts, what is printed where. Refuses to know how a step runs (`engine.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import (
    DEFAULT_CHECKPOINT,
    DTYPES,
    FAULTS,
    MAX_ROWS,
    RANK,
    SAMPLING,
    Parser,
    at_least,
    begin,
    draft_tokens,
    first_to_fail,
    printable,
    ready,
    refuse,
    sampling_parameter,
)

if TYPE_CHECKING:  # nothing here may import PyTorch before the arguments are known to be good
    from engine import Engine
    from sampling import SamplingParams


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="generate.py", description="Stream text from a Hugging Face checkpoint.", allow_abbrev=False)
    one = p.add_argument_group("the model").add_mutually_exclusive_group()
    one.add_argument(
        "--checkpoint", default=str(DEFAULT_CHECKPOINT), help="folder or Hub id org/name[@revision] (checkpoints/tales)"
    )
    one.add_argument("--shape", help="a named public shape with random weights; one that does not exist lists them")
    group = p.add_argument_group("the text")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--prompt", default="", help="text, - for standard input, @FILE; empty: from BOS alone (empty)")
    one.add_argument("--prompts-file", metavar="FILE", help="one prompt a line, generated as one batch")
    one.add_argument("--chat", action="store_true", help="talk, with the checkpoint's chat template")
    group.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    group.add_argument("--max-new-tokens", type=at_least(1), default=200, help="of each answer (200)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="do not end at the model's own stop ids")
    group.add_argument(
        "--num-samples", type=at_least(1, 1 << 16), default=1, help="answers to each prompt, as one batch (1)"
    )
    group.add_argument("--json", action="store_true", help="standard output is one JSON object per answer")
    group = p.add_argument_group(
        "sampling; without a flag generation_config.json's value, else what stands in brackets"
    )
    for name, (*_, meaning) in SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=sampling_parameter(name), metavar="X", help=meaning)
    group.add_argument("--seed", type=at_least(0), metavar="N", help="repeat a run (a new one each time)")
    add_running_(p)
    args = p.parse_args(argv)
    if "" in args.stop:
        p.error("--stop is empty; give some text")
    if args.draft is None and (args.compare or args.num_draft_tokens is not None):
        p.error("--compare and --num-draft-tokens need --draft")
    if args.chat and (args.json or args.num_samples > 1 or args.shape):
        p.error("--chat goes with none of --json, --num-samples, --shape")
    if args.system is not None and not args.chat:
        p.error("--system goes with --chat")
    return args


def add_running_(p: Parser) -> None:
    """The flags that change how, and not what, is generated."""
    group = p.add_argument_group("speculation")
    group.add_argument(
        "--draft", metavar="DRAFT", help="folder or Hub id of a smaller model, ngram, self-int4 or self-int8"
    )
    group.add_argument("--num-draft-tokens", type=draft_tokens, metavar="K", help="1 to 15, or auto: what pays (auto)")
    group.add_argument("--compare", action="store_true", help="decode plainly too, and report the speed-up")
    group = p.add_argument_group("how it runs")
    group.add_argument("--device", choices=("cpu", "cuda", "mps"), help="(CUDA if there is one, else the CPU)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's, or float32 on an older CPU (auto)"
    )
    group.add_argument(
        "--max-seq-len", type=at_least(1), metavar="N", help="cache slots (what is asked for; chat: at most 8192)"
    )
    group.add_argument(
        "--prefill-chunk", type=at_least(0), default=0, metavar="N", help="prefill N tokens at a time (0: all)"
    )
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the decode step (on a GPU)")
    group.add_argument("--compile-prefill", action="store_true", help="and the prefill, for any length")
    group.add_argument(
        "--kernels",
        choices=("auto", "triton", "inductor"),
        default="auto",
        help="auto: Triton's on a GPU, PyTorch's fastest operators on a CPU; inductor: plain PyTorch (auto)",
    )
    group.add_argument("--profile", metavar="FILE", help="write a Chrome trace of the generation")
    group.add_argument("--selftest", action="store_true", help="check this machine; exit status 1 on a failure")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, each repeated --num-samples times."""
    try:
        if args.prompts_file:
            prompts = [line for line in Path(args.prompts_file).read_text("utf-8").split("\n") if line.strip()]
            if not prompts:
                raise ValueError(f"--prompts-file {args.prompts_file} holds no prompt")
        elif args.prompt == "-":
            prompts = [sys.stdin.read() if RANK == 0 else ""]  # which rank 0 shares
        else:
            prompts = [Path(args.prompt[1:]).read_text("utf-8") if args.prompt.startswith("@") else args.prompt]
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file is not UTF-8: {error}") from error
    return [p for p in prompts for _ in range(args.num_samples)]


def of_ranks(engine: Engine) -> str:
    """A line on what the sums over ranks cost in the last generation; empty for one rank. All ranks must call it."""
    tp, config = engine.model.tp, engine.model.config
    if tp.size == 1:
        return ""
    numbers, sums = engine.stats.batch_size * config.hidden_size, 1 + 2 * config.num_hidden_layers
    each = engine.stats.seconds_of_sum(tp, numbers, engine.dtype)
    way = "torch.distributed" if tp.fast is None else "one-shot"
    share = min(each * sums * engine.stats.decode_tok_s, 1)
    return f"\n{tp.size} ranks | {sums} all-reduces a step, {each * 1e6:.1f} us each ({way}): {share:.0%} of it"


def summary(engine: Engine) -> str:
    """The last generation in one line, and its speculation in another."""
    s, rate, rows = engine.stats, engine.stats.decode_tok_s, max(engine.stats.batch_size, 1)
    peak, gb, bandwidth = s.peak_bytes() / 1e9, s.bytes_per_step / 1e9, (s.read_bandwidth() or 0) / 1e9
    parts = [
        f"load {s.load_s:.1f} s",
        f"compile {s.compile_s:.1f} s" if s.compile_s else "",
        f"TTFT {s.ttft_s * 1e3:.0f} ms ({s.prefill_tokens} tokens)",
        f"decode {rate * rows:.1f} tok/s" + (f" ({rows} rows of {rate:.1f})" if rows > 1 else ""),
        f"{gb / rows:.3g} GB/token",
        f"{gb * rate:.1f} GB/s"
        + (f", {gb * rate / bandwidth:.0%} of the {bandwidth:,.0f} of a sum" if bandwidth else ""),
        f"memory {peak:.2f} GB",
        str(engine.dtype).removeprefix("torch."),
    ]
    return " | ".join(filter(None, parts)) + (
        f"\n{engine.speculation.summary(s.decode_s)}" if engine.speculation else ""
    )


def run(engine: Engine, args: argparse.Namespace, sampling: SamplingParams, texts: list[str]) -> int:
    """Generate once and print: one answer streams, several come as they end; --json prints objects and nothing else.
    Returns the exit status; Ctrl-C ends the answers as they are.
    """
    prompts = engine.encode(texts)
    text, reasons = [""] * len(prompts), ["interrupted"] * len(prompts)
    ids: list[list[int]] = [[] for _ in prompts]
    streaming, samples = len(prompts) == 1 and not args.json, args.num_samples

    def show(row: int) -> None:
        if not streaming and not args.json:
            print(f"[prompt {row // samples + 1}, sample {row % samples + 1}]{text[row]}\n", flush=True)

    if streaming and sys.stdout.isatty():  # the prompt, dimmed, so that the answer reads
        print(f"\033[2m{printable(texts[0])}\033[0m", end="", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for piece in engine.generate(prompts, sampling, **options(args), seed=args.seed):
            text[piece.row] += piece.text
            ids[piece.row] += piece.ids
            if streaming:
                print(piece.text, end="", flush=True)
            if piece.stop_reason:
                reasons[piece.row] = piece.stop_reason
                show(piece.row)
    for row, prompt in enumerate(prompts):
        if args.json:
            record: dict[str, Any] = {
                "prompt": row // samples,
                "sample": row % samples,
                "text": text[row],
                "ids": ids[row],
            }
            record |= {"prompt_ids": prompt, "stop_reason": reasons[row], "ttft_ms": engine.stats.ttft_s * 1e3}
            print(json.dumps(record | {"decode_tok_s": engine.stats.decode_tok_s}))
        elif reasons[row] == "interrupted":
            show(row)
    if streaming:
        print(flush=True)
    ranks = "" if "interrupted" in reasons else of_ranks(engine)
    if engine.model.tp.rank == 0:
        print(summary(engine) + ranks, file=sys.stderr)
    if args.compare and engine.speculation and "interrupted" not in reasons:
        fast, engine.speculation = engine.stats.decode_tok_s, None
        for _ in engine.generate(prompts, sampling, **options(args), seed=args.seed):
            pass
        plain = engine.stats.decode_tok_s
        print(f"plain {plain:.1f} tok/s, speculative {fast:.1f} tok/s: {fast / max(plain, 1e-9):.2f}x", file=sys.stderr)
    return 130 if "interrupted" in reasons else 0


def options(args: argparse.Namespace) -> dict[str, Any]:
    return {"max_new_tokens": args.max_new_tokens, "stop": args.stop, "ignore_eos": args.ignore_eos}


def chat(engine: Engine, args: argparse.Namespace, sampling: SamplingParams) -> int:
    """Turns until end of file. Ctrl-C ends the answer; what came of it stays in the conversation, without a word of
    it neither does the question.
    """
    tokenizer = engine.tokenizer
    if not tokenizer.has_chat_template:
        raise ValueError("this checkpoint has no chat template; leave out --chat and use --prompt")
    if RANK == 0 and sys.stdin.isatty():
        print("Ctrl-D leaves the chat, Ctrl-C an answer", file=sys.stderr)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    for turn in itertools.count(args.seed):
        question = engine.model.tp.share(ask() if RANK == 0 else None)
        if question is None:
            return 0
        messages.append({"role": "user", "content": question})
        answer = ""
        try:
            ids = conversation(engine, messages)
            for piece in engine.generate([ids], sampling, **options(args), seed=turn):
                answer += piece.text
                print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            if not answer:  # not a word of it: as if nothing had been asked
                messages.pop()
                print()
                continue
        print()
        messages.append({"role": "assistant", "content": answer})
        if sys.stdin.isatty():
            print(summary(engine), file=sys.stderr)
    return 0


def ask() -> str | None:
    """A line that is not empty; None at the end of input, or for Ctrl-C."""
    try:
        while not (line := input("> ")).strip():
            pass
        return line
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def conversation(engine: Engine, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a chat. Where they leave no room for an answer, the oldest question and its answer go, with one line
    that says so. ValueError when the last question alone is too long.
    """
    first, dropped = int(messages[0]["role"] == "system"), 0
    while len(ids := engine.tokenizer.encode_chat(messages)) >= engine.max_seq_len - MAX_ROWS:
        if len(messages) - first < 3:
            if len(ids) < engine.max_seq_len:
                break
            raise ValueError(f"the question has {len(ids)} tokens and --max-seq-len is {engine.max_seq_len}; ask less")
        del messages[first : first + 2]
        dropped += 1
    if dropped and RANK == 0:
        turns = "turn" if dropped == 1 else f"{dropped} turns"
        print(f"the conversation is full: its oldest {turns} went", file=sys.stderr)
    return ids


def answer(engine: Engine, args: argparse.Namespace, prompts: list[str], chosen: dict[str, Any]) -> int:
    """Generate or chat, on rank 0 alone visibly. Returns the exit status."""
    sampling = replace(engine.defaults, **chosen)
    if args.chat and args.max_seq_len is None:
        engine.limit(1, min(engine.max_seq_len, 8192))
    rank = engine.model.tp.rank  # one rank speaks
    trace = profiled(args.profile) if args.profile else contextlib.nullcontext()
    with trace, open(os.devnull, "w") as null, contextlib.redirect_stdout(null if rank else sys.stdout):
        status = chat(engine, args, sampling) if args.chat else run(engine, args, sampling, prompts)
    if args.profile:  # PyTorch writes it without a word of a full disk
        with open(args.profile, "rb") as file:
            if not file.read().rstrip().endswith(b"}"):
                raise OSError(f"--profile {args.profile} could not be written whole; is the disk full?")
    return status


@contextlib.contextmanager
def profiled(file: str) -> Iterator[None]:
    """Write a Chrome trace of the body."""
    from torch.profiler import profile

    with profile() as trace:
        yield
    trace.export_chrome_trace(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 a failed selftest, 2 bad input (one line), 130 interrupted (what was generated is printed), 141
    the reader left.
    """
    args = parse(argv)
    if args.seed is None:
        args.seed = int.from_bytes(os.urandom(4), "little")
    try:
        if args.selftest:  # a program of its own, which uses this one
            program = Path(__file__).resolve().parent / "scripts" / "selftest.py"
            return subprocess.call([sys.executable, str(program), *(sys.argv[1:] if argv is None else argv)])
        prompts = [] if args.chat else read_prompts(args)
        if args.profile:
            if os.path.exists(args.profile) and not os.path.isfile(args.profile):  # it would be replaced
                raise ValueError(f"--profile {args.profile} is no regular file; give the name of one")
            open(args.profile, "ab").close()  # refused now, not after the generation
        from engine import Engine

        ready()
        chosen = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
        same = "device dtype kernels shape max_seq_len draft num_draft_tokens".split()
        same += ["compile", "compile_prefill", "prefill_chunk"]
        engine = Engine.load(
            args.checkpoint,
            batch_size=len(prompts) or 1,
            progress=sys.stderr.isatty(),
            chosen=chosen,
            **{name: getattr(args, name) for name in same},
        )
        prompts, args.seed = engine.model.tp.share((prompts, args.seed))
        return answer(engine, args, prompts, chosen)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has left, as `head` does: nobody is there to be told
        first_to_fail()  # nor need another rank tell that this one has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FAULTS as error:
        return refuse("generate.py", error)


if __name__ == "__main__":
    begin(parse)
    sys.exit(main())
