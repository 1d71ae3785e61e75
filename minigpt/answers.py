"""How well a chat model answers the validation questions of a dataset: Rouge-L against the answers of the dataset."""

import math
from dataclasses import dataclass

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from minigpt.cli import Progress
from minigpt.dataset import ChatDataset
from minigpt.distributed import Processes
from minigpt.inference import make_generator, stream_text
from minigpt.sampling import SamplingParams
from minigpt.tokenizer import Tokenizer
from model import GPT

MAX_TOKENS = 256  # of an answer


@dataclass(frozen=True)
class Answer:
    """A question, the model's answer and the dataset's.

    Attributes:
        ended: whether the answer ended by itself, before the limit.
        rouge_l: F-measure of the longest common subsequence of words (Lin, 2004), from 0 to 1.
    """

    question: str
    answer: str
    reference: str
    ended: bool
    rouge_l: float


def answer_questions(
    model: GPT, data: ChatDataset, n_questions: int, procs: Processes, progress: Progress | None = None
) -> list[Answer]:
    """Answer validation questions with the most likely tokens; the same on any number of processes.

    The questions are the first ones of conversations that are evenly spaced over the split. An answer is limited to 256
    tokens and to the model's context.
    """
    n_conversations = len(data.arrays["val"][2]) - 1
    chosen = np.linspace(0, n_conversations, min(n_questions, n_conversations), endpoint=False).astype(int).tolist()
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    answers = []
    for conversation in chosen[procs.rank :: procs.world_size]:
        prompt, reference_tokens = split_conversation(data, conversation)
        answer, ended = generate_answer(model, data.tokenizer, prompt)
        question = data.tokenizer.decode(token for token in prompt if token < data.tokenizer.end_of_text)
        reference = data.tokenizer.decode(reference_tokens)
        rouge_l = scorer.score(reference, answer)["rougeL"].fmeasure
        answers.append(Answer(question, answer, reference, ended, rouge_l))
        if progress is not None:
            progress.update(min(procs.world_size, len(chosen) - progress.done))
    shares = procs.all_gather(answers)
    return [shares[i % procs.world_size][i // procs.world_size] for i in range(len(chosen))]


def split_conversation(data: ChatDataset, conversation: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a validation conversation before its first answer, and those of the answer."""
    tokens, loss_mask, offsets = data.arrays["val"]
    span = slice(int(offsets[conversation]), int(offsets[conversation + 1]))
    tokens, in_loss = tokens[span].tolist(), loss_mask[span]
    start = int(in_loss.argmax())
    end = tokens.index(data.tokenizer.end_of_turn, start)
    return tokens[:start], tokens[start:end]


def generate_answer(model: GPT, tokenizer: Tokenizer, prompt: list[int]) -> tuple[str, bool]:
    """Return the answer to a prompt, and whether it ended by itself."""
    limit = min(MAX_TOKENS, model.config.block_size - len(prompt) + 1)
    generator = make_generator(0, model.wte.weight.device)
    params = SamplingParams(max_tokens=limit, temperature=0)
    *pieces, [rest] = (piece for piece in stream_text(model, tokenizer, prompt, params, generator))
    return "".join(piece or "" for [piece] in pieces) + (rest or ""), rest is None


def summarize_answers(answers: list[Answer]) -> dict[str, float]:
    """Return the mean Rouge-L in percent, its standard error, and the fraction of answers that ended by themselves."""
    scores = [100 * answer.rouge_l for answer in answers]
    stderr = float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    ended = sum(answer.ended for answer in answers) / len(answers)
    return {"rouge_l": float(np.mean(scores)), "rouge_l_stderr": stderr, "ended": ended, "answers": len(answers)}
