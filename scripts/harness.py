"""An engine as EleutherAI's lm-evaluation-harness wants to see a model; `evaluate.py --tasks` imports this file.

Knows the harness's three requests. Refuses to know tasks, metrics and how logits are made (`evaluate.Scorer`). Needs
the package lm_eval, which only --tasks needs: `pip install -e ".[evaluate]"`.
"""

import math
from typing import TYPE_CHECKING, Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from sampling import SamplingParams

if TYPE_CHECKING:  # it is the program that imports this file
    from evaluate import Scorer

Likelihood = tuple[float, bool]  # log-probability in nats, and whether every token was the first choice


class Harness(LM):
    """One request after the other, in the model's whole context."""

    def __init__(self, scorer: "Scorer") -> None:
        super().__init__()
        self.scorer, self.engine = scorer, scorer.engine
        self.bos = scorer.tokenizer.encode("")[:1]

    def _ids(self, text: str) -> list[int]:
        return [*self.bos, *self.scorer.tokenizer.encode(text, bos=False)]

    def loglikelihood(self, requests: list[Instance]) -> list[Likelihood]:
        """Of every (context, continuation). Spaces at the end of a context belong to the continuation's first token."""
        out = []
        for context, continuation in self._args(requests, "scoring"):
            start, whole = self._ids(context.rstrip(" ")), self._ids(context + continuation)
            out.append(self._score(start, whole[len(start) :]))
        return out

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of every (text,), behind BOS if there is one. A long one is cut into pieces, none scored twice, the last with
        as much before it as fits.
        """
        out = []
        for (text,) in self._args(requests, "scoring texts"):
            ids, total, room, done = self._ids(text), 0.0, self.engine.context - 1, len(self.bos)
            while done < len(ids):
                end = min(done + room, len(ids))
                total += self._score(ids[max(0, end - room - 1) : done], ids[done:end])[0]
                done = end
            out.append(total)
        return out

    @torch.inference_mode()
    def _score(self, context: list[int], continuation: list[int]) -> Likelihood:
        """Of the end of both that the model's context holds; a first id without BOS before it is not scored."""
        if len(context) + len(continuation) < 2:
            return 0.0, True
        ids = self.engine.encode([[*context, *continuation][-self.engine.context :]])[0]
        first, total, greedy = max(len(ids) - len(continuation), 1), 0.0, True
        tokens = torch.tensor([ids])
        for a, logits in self.scorer.logits(tokens):
            b = a + logits.shape[1]
            skip = max(first - 1 - a, 0)
            wanted, logits = tokens[0, a + 1 + skip : b + 1].to(logits.device), logits[0, skip:]
            total += float(logits.log_softmax(-1).gather(1, wanted[:, None]).double().sum())
            greedy &= bool((logits.argmax(-1) == wanted).all())
        if not math.isfinite(total):
            raise ValueError(f"{self.scorer.name}: the logits are not finite; is it damaged, or --dtype too narrow?")
        return total, greedy

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to every (context, arguments): until, max_gen_toks, and temperature where do_sample is set."""
        out = []
        for context, arguments in self._args(requests, "generating"):
            until = arguments.get("until") or []
            stop = [until] if isinstance(until, str) else list(until)
            sampled, stop = arguments.get("do_sample", False), [s for s in stop if s]
            sampling = SamplingParams(temperature=float(arguments.get("temperature", 1.0)) if sampled else 0.0, top_k=0)
            count = min(int(arguments.get("max_gen_toks", 256)), self.engine.max_seq_len - 1)
            ids = self._ids(context)[-(self.engine.max_seq_len - count) :]
            pieces = self.engine.generate([ids], sampling, max_new_tokens=count, stop=stop)
            out.append("".join(piece.text for piece in pieces))
        return out

    def _args(self, requests: list[Instance], what: str) -> "tqdm[Any]":
        return tqdm([request.args for request in requests], desc=what, disable=None)


def finite(value: object) -> bool:
    """Whether it is a number that JSON can hold."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def run(scorer: "Scorer", tasks: list[str], folder: str | None) -> dict[str, dict[str, float]]:
    """task -> metric -> number, standard errors included. ValueError for a task that is not known."""
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        where = f"nor has {folder} one of that name" if folder else "--task-folder DIR adds your own"
        raise ValueError(f"--tasks: lm-evaluation-harness knows no task {', '.join(unknown)}; {where}")
    found = lm_eval.simple_evaluate(model=Harness(scorer), tasks=tasks, task_manager=manager, log_samples=False)
    results = found["results"] if found else {}
    return {
        task: {name.replace(",none", ""): value for name, value in row.items() if finite(value)}
        for task, row in results.items()
    }
