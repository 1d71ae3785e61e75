"""Answer the validation questions of a chat dataset, scored with Rouge-L against the dataset's answers."""

import math
from dataclasses import dataclass

import numpy as np

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
    """A question with the model's answer and the reference answer.

    Attributes:
        finished: whether the model ended the answer within the limit.
        rouge_l: F-measure of the longest common subsequence of words (Lin, 2004), in percent.
    """

    question: str
    answer: str
    reference: str
    finished: bool
    rouge_l: float


def answer_questions(model: GPT, data: ChatDataset, max_answers: int, procs: Processes) -> list[Answer]:
    """Answer validation questions with greedy decoding; all processes return the same answers.

    The questions are the first ones of conversations that are evenly spaced over the split. An answer is limited to 256
    tokens and to the model's context.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes seconds to import

    n_conversations = len(data.arrays["val"][2]) - 1
    n_answers = min(max_answers, n_conversations)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    progress = Progress(n_answers, "answer", enabled=procs.is_main)

    def answer(i: int) -> Answer:
        prompt, reference_tokens = split_conversation(data, i * n_conversations // n_answers)
        text, finished = generate_answer(model, data.tokenizer, prompt)
        reference = data.tokenizer.decode(reference_tokens)
        progress.update(min(procs.world_size, n_answers - progress.done))
        rouge_l = 100 * scorer.score(reference, text)["rougeL"].fmeasure
        return Answer(last_message(data.tokenizer, prompt), text, reference, finished, rouge_l)

    answers = procs.map(answer, range(n_answers))
    progress.close()
    return answers


def split_conversation(data: ChatDataset, conversation: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a validation conversation before its first answer, and those of the answer."""
    tokens, loss_mask, offsets = data.arrays["val"]
    span = slice(int(offsets[conversation]), int(offsets[conversation + 1]))
    tokens, in_loss = tokens[span].tolist(), loss_mask[span]
    start = int(in_loss.argmax())
    end = tokens.index(data.tokenizer.end_of_turn, start)
    return tokens[:start], tokens[start:end]


def last_message(tokenizer: Tokenizer, prompt: list[int]) -> str:
    """Return the text of the last message before the token that starts the reply."""
    *_, start, end = [i for i, token in enumerate(prompt[:-1]) if token >= tokenizer.end_of_text]  # role, end of turn
    return tokenizer.decode(prompt[start + 1 : end])


def generate_answer(model: GPT, tokenizer: Tokenizer, prompt: list[int]) -> tuple[str, bool]:
    """Return the answer to a prompt, and whether it was finished within the limit."""
    max_tokens = min(MAX_TOKENS, model.config.block_size - len(prompt) + 1)
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    generator = make_generator(0, model.wte.weight.device)
    *pieces, [rest] = stream_text(model, tokenizer, prompt, params, generator)
    return "".join(piece or "" for [piece] in pieces) + (rest or ""), rest is None


def summarize_answers(answers: list[Answer]) -> dict[str, float]:
    """Return the mean Rouge-L in percent, its standard error, the finished answers in percent, and their number."""
    scores = [answer.rouge_l for answer in answers]
    stderr = float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    finished = 100 * sum(answer.finished for answer in answers) / len(answers)
    return {"rouge_l": float(np.mean(scores)), "rouge_l_stderr": stderr, "finished": finished, "answers": len(answers)}
