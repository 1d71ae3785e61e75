"""Answers to validation questions: those of generate.py, Rouge-L by its definition, any number of processes."""

import json

import pytest
from conftest import start
from test_hellaswag import SINGLE

from minigpt.answers import MAX_TOKENS, Answer, answer_questions, split_conversation, summarize_answers
from minigpt.dataset import ChatDataset
from minigpt.pretrained import load_pretrained


def rouge_l(answer: str, reference: str) -> float:
    """Return Rouge-L of lower-case words without suffixes, by the table of longest common subsequences."""
    a, b = answer.split(), reference.split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


def test_answers_are_those_of_generate(finetuned, chat_data, run_script):
    loaded, data = load_pretrained(str(finetuned)), ChatDataset(chat_data, 64)
    answers = answer_questions(loaded.model, data, 5, SINGLE)
    assert len({answer.question for answer in answers}) == 5
    for answer in answers:
        number = int(answer.question.removeprefix("After ").removesuffix("?"))
        assert answer.reference == f"{number + 1}" * (1 + number % 5)
    flags = ("--checkpoint", finetuned, "--temperature", 0, "--max_tokens", 40, "--prompt", answers[0].question)
    assert run_script("generate.py", *flags).stdout.rstrip("\n").startswith(answers[0].answer[:40].rstrip("\n"))


def test_questions_are_spread_over_the_split(chatterbox, tmp_path):
    """An endless answer stops at the limit, and a question with several answers is asked once."""
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    records = [{"messages": [{"role": "user", "content": f"no. {i}"}, *turns[1:]]} for i in range(10)]
    for name, lines in {"train": records[:1], "val": records}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    files = ("--files", "train.jsonl", "--val_files", "val.jsonl", "--tokenizer", "bytes", "--block_size", 64)
    start("prepare_dolly.py", *files, "--out", "data", cwd=tmp_path)
    data, model = ChatDataset(tmp_path / "data", 64), load_pretrained(str(chatterbox)).model
    assert data.tokenizer.decode(split_conversation(data, 3)[1]) == "assistant 0"
    answers = answer_questions(model, data, 2, SINGLE)
    assert [answer.question for answer in answers] == ["no. 0", "no. 5"]
    assert not any(answer.ended for answer in answers)
    assert [len(answer.answer) for answer in answers] == [MAX_TOKENS] * 2


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("the sea is deep", "the sea is blue"), ("a b c d e", "c a d e b"), ("one", "two"), ("same words", "same words")],
)
def test_rouge_l_by_its_definition(monkeypatch, finetuned, chat_data, answer, reference):
    data = ChatDataset(chat_data, 64)
    monkeypatch.setattr("minigpt.answers.generate_answer", lambda *args: (answer, True))
    monkeypatch.setattr("minigpt.answers.split_conversation", lambda *args: ([], data.tokenizer.encode(reference)))
    [result] = answer_questions(load_pretrained(str(finetuned)).model, data, 1, SINGLE)
    assert result.rouge_l == pytest.approx(rouge_l(answer, reference)) and result.ended


def test_summary():
    answers = [
        Answer("", "", "", ended, score) for ended, score in ((True, 0.1), (False, 0.3), (True, 0.5), (True, 0.5))
    ]
    result = summarize_answers(answers)
    assert result["rouge_l"] == pytest.approx(35) and result["ended"] == 0.75 and result["answers"] == 4
    variance = (25**2 + 5**2 + 2 * 15**2) / 3
    assert result["rouge_l_stderr"] == pytest.approx((variance / 4) ** 0.5)
