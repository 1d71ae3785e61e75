"""Benchmark tasks of lm_eval, EleutherAI's evaluation harness."""

import logging
import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minigpt.cli import Progress, UserError
from minigpt.distributed import Processes
from minigpt.inference import make_generator, stream_text
from minigpt.likelihood import score_continuations
from minigpt.pretrained import PretrainedModel
from minigpt.sampling import SamplingParams
from minigpt.sources import first_line


def load_tasks(names: Sequence[str], folder: Path | None = None) -> list[Task | Group]:
    """Load tasks and groups of tasks, and download their data.

    Args:
        names: names, or patterns such as "arc_*".
        folder: the folder of the tasks' .yaml files; None: lm_eval's own.

    Raises:
        UserError: a task does not exist or cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    for name in names:
        if not manager.match_tasks([name]):
            known = f"{folder} has {', '.join(manager.all_tasks) or 'none'}" if folder else "see `lm_eval ls tasks`"
            raise UserError(f"--tasks {name}: no such task; {known}")
    try:
        found = manager.load(manager.match_tasks(list(names)))
    except Exception as error:  # lm_eval and datasets raise many types: no network, an invalid .yaml file
        raise UserError(f"--tasks: {first_line(error)}; check the network, and task files of your own") from None
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"--tasks {name}: this task runs code that the model generates, which is not supported")
    everything = found["groups"] | found["tasks"]
    members = {name for group in found["group_map"].values() for name in group}
    return [item for name, item in everything.items() if name not in members]


def evaluate_tasks(
    loaded: PretrainedModel, tasks: list[Task | Group], procs: Processes, max_examples: int | None = None
) -> dict[str, dict[str, float]]:
    """Return the metrics of each task, with lm_eval's names ("acc", "acc_norm_stderr"), the same on all processes."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # no fork of a process that uses a GPU
    results = simple_evaluate(
        model=HarnessModel(loaded, procs),
        tasks=tasks,
        limit=max_examples,
        bootstrap_iters=1000 if procs.is_main else 0,  # for metrics without a formula for the standard error
        log_samples=False,
    )
    metrics: dict[str, dict[str, float]] = {}
    for task, values in procs.call_on_main(lambda: results["results"]).items():
        metrics[task] = {}
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if filter_name and isinstance(value, numbers.Real):
                label = "" if filter_name == "none" else f" ({filter_name})"
                stderr = "_stderr" if name.endswith("_stderr") else ""
                metrics[task][f"{name.removesuffix('_stderr')}{label}{stderr}"] = float(value)
    return metrics


class HarnessModel(TemplateLM):
    """Adapter from `PretrainedModel` to lm_eval's model interface.

    Every process runs lm_eval with all requests, as if it were the only one, and computes its share of them.
    """

    def __init__(self, loaded: PretrainedModel, procs: Processes):
        super().__init__()
        self.loaded, self.procs = loaded, procs
        self.block_size = loaded.model.config.block_size

    @property
    def eot_token_id(self) -> int:
        """The token before a text without context."""
        return self.loaded.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text; special tokens in it are ordinary text."""
        return self.loaded.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding would generate it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context or [self.eot_token_id], continuation) for _, context, continuation in requests]
        for _, continuation in pairs:
            if not 0 < len(continuation) <= self.block_size:
                n = len(continuation)
                raise UserError(f"a task has a continuation of {n} tokens; the model's context is {self.block_size}")
        progress = Progress(len(pairs), "row", enabled=self.procs.is_main)
        losses, greedy = score_continuations(self.loaded.model, pairs, self.procs, progress)
        progress.close()
        return list(zip((-losses).tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows that cover every token once."""
        windows, window_counts = [], []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.eot_token_id, max_seq_len=self.block_size, context_len=1)
            pairs = [make_disjoint_window(pair) for pair in rolling]
            windows += [(("", ""), context, continuation) for context, continuation in pairs]
            window_counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in window_counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated text of each request, up to the first of its stop strings."""
        progress = Progress(len(requests), "text", enabled=self.procs.is_main)

        def generate(i: int) -> str:
            text = self._generate(*requests[i].args, seed=i)
            progress.update(min(self.procs.world_size, len(requests) - progress.done))
            return text

        texts = self.procs.map(generate, range(len(requests)))
        progress.close()
        return texts

    def _generate(self, context: str, options: dict, seed: int) -> str:
        options = normalize_gen_kwargs(options)
        params = SamplingParams(
            max_tokens=options["max_gen_toks"],
            temperature=options.get("temperature", 1.0) if options["do_sample"] else 0,
            top_k=options.get("top_k") or None,
            top_p=options.get("top_p", 1.0),
        )
        room = self.block_size - params.max_tokens
        if room < 1:
            raise UserError(
                f"a task generates up to {params.max_tokens} tokens; the model's context is {self.block_size}: lower"
                " max_gen_toks in the task's .yaml file"
            )
        prompt = (self.tok_encode(context) or [self.eot_token_id])[-room:]
        text, generator = "", make_generator(seed, self.procs.device)
        for [piece] in stream_text(self.loaded.model, self.loaded.tokenizer, prompt, params, generator):
            text += piece or ""
            ends = [text.index(stop) for stop in options["until"] if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return text
