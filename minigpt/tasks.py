"""The benchmark tasks of lm_eval, EleutherAI's evaluation harness, on any model that `load_pretrained` returns."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minigpt.cli import Progress, UserError
from minigpt.distributed import Processes
from minigpt.inference import make_generator, stream_text
from minigpt.likelihood import score_continuations
from minigpt.pretrained import PretrainedModel
from minigpt.sampling import SamplingParams
from minigpt.sources import first_line

# OpenAI's GPT-2 124M, zero-shot; from the README of MARS (github.com/AGI-Arena/MARS).
GPT2_ACC_NORM = {"hellaswag": 0.311, "arc_easy": 0.395, "arc_challenge": 0.227, "piqa": 0.625, "sciq": 0.644}


def evaluate_tasks(
    loaded: PretrainedModel,
    names: Sequence[str],
    procs: Processes,
    folder: Path | None = None,
    max_examples: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return the metrics of each task, with lm_eval's names ("acc", "acc_norm_stderr"), the same on all processes.

    Args:
        names: tasks, groups or patterns such as "mmlu_*".
        folder: the folder of the tasks' .yaml files; None: lm_eval's own.

    Raises:
        UserError: a task does not exist, or its data cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is None and procs.is_main:
        print("reading lm_eval's list of tasks, which takes about 20 s", flush=True)
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    for name in names:
        if not manager.match_tasks([name]):
            known = f"{folder} has: {', '.join(manager.all_tasks)}" if folder else "`lm_eval ls tasks` lists them"
            raise UserError(f"--tasks {name}: no such task; {known}")
    try:
        results = simple_evaluate(
            model=HarnessModel(loaded, procs),
            tasks=manager.match_tasks(list(names)),
            task_manager=manager,
            limit=max_examples,
            bootstrap_iters=1000,  # for the standard errors of perplexities
            log_samples=False,
        )
    except (OSError, DatasetsError) as error:
        raise UserError(f"--tasks: the data of a task cannot be loaded: {first_line(error)}") from None
    metrics = {}
    for task, values in procs.call_on_main(lambda: results["results"]).items():
        numbers = {name: value for name, value in values.items() if "," in name and isinstance(value, float)}
        metrics[task] = {name.replace(",none", ""): value for name, value in numbers.items()}
    return metrics


def format_tasks(metrics: dict[str, dict[str, float]]) -> str:
    """Return the table of metrics, with those of OpenAI's GPT-2 124M."""
    lines = [f"{'task':<24} {'metric':<16} {'value':>10} {'standard error':>16} {'GPT-2 124M':>12}"]
    for task, values in metrics.items():
        for name, value in values.items():
            if name.partition(",")[0].endswith("_stderr"):
                continue
            stderr = values.get(name.replace(",", "_stderr,") if "," in name else f"{name}_stderr", math.nan)
            published = f"{GPT2_ACC_NORM[task]:12.3f}" if name == "acc_norm" and task in GPT2_ACC_NORM else ""
            lines.append(f"{task:<24} {name:<16} {value:>10.4f} {stderr:>16.4f} {published}".rstrip())
    return "\n".join(lines)


class HarnessModel(TemplateLM):
    """A model with the methods that lm_eval calls.

    Every process receives all requests and computes its share of the batches, so to lm_eval there is one process.
    """

    def __init__(self, loaded: PretrainedModel, procs: Processes):
        super().__init__()
        self.loaded, self.procs = loaded, procs

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.loaded.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        progress = Progress(len(pairs), "request", enabled=self.procs.is_main)
        losses, greedy = score_continuations(self.loaded.model, pairs, self.procs, progress)
        progress.close()
        return list(zip((-losses).tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows that cover every token once."""
        windows, window_counts = [], []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            block_size = self.loaded.model.config.block_size
            rolling = get_rolling_token_windows(tokens, self.eot_token_id, max_seq_len=block_size, context_len=1)
            pairs = [make_disjoint_window(pair) for pair in rolling]
            windows += [(("", ""), context, continuation) for context, continuation in pairs]
            window_counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in window_counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated text of each request, up to the first of its stop strings."""
        progress = Progress(len(requests), "request", enabled=self.procs.is_main)
        texts = {}
        for i in range(self.procs.rank, len(requests), self.procs.world_size):
            texts[i] = self._generate(*requests[i].args)
            progress.update(min(self.procs.world_size, len(requests) - progress.done))
        progress.close()
        shares = self.procs.all_gather(texts)
        return [shares[i % self.procs.world_size][i] for i in range(len(requests))]

    def _generate(self, context: str, options: dict) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        sampled = options.get("do_sample", False)
        params = SamplingParams(
            max_tokens=options.get("max_gen_toks", 256),
            temperature=options.get("temperature", 1.0) if sampled else 0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p", 1.0),
        )
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        prompt = self.tok_encode(context) or [self.eot_token_id]
        prompt = prompt[-max(1, model.config.block_size - params.max_tokens) :]
        text, generator = "", make_generator(0, self.procs.device)
        for [piece] in stream_text(model, tokenizer, prompt, params, generator):
            text += piece or ""
            ends = [text.index(stop) for stop in stops if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return text
