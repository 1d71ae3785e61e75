"""Answers to validation questions: those of generate.py, Rouge-L by its definition."""

import json
from unittest import mock

import pytest
from conftest import start
from test_hellaswag import SINGLE

from minigpt import answers
from minigpt.answers import MAX_TOKENS, Answer, answer_questions, split_conversation, summarize_answers
from minigpt.dataset import ChatDataset
from minigpt.pretrained import load_pretrained
from minigpt.tokenizer import load_tokenizer


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
    found = answer_questions(loaded.model, data, 5, SINGLE)
    assert len({answer.question for answer in found}) == 5
    for answer in found:
        number = int(answer.question.removeprefix("After ").removesuffix("?"))
        assert answer.reference == f"{number + 1}" * (1 + number % 5)
    flags = ("--checkpoint", finetuned, "--temperature", 0, "--max_tokens", 40, "--prompt", found[0].question)
    printed = run_script("generate.py", *flags).stdout
    assert found[0].answer and printed.rstrip("\n") == found[0].answer[:40].rstrip("\n")


def test_questions_are_spread_over_the_split(chatterbox, tmp_path):
    """Answers stop at the token limit. Of each conversation, only the first question is asked."""
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    first = {"role": "system", "content": "Be kind."}
    records = [{"messages": [first, {"role": "user", "content": f"no. {i}"}, *turns[1:]]} for i in range(10)]
    for name, lines in {"train": records[:1], "val": records}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    files = ("--files", "train.jsonl", "--val_files", "val.jsonl", "--tokenizer", "bytes", "--block_size", 64)
    start("prepare_dolly.py", *files, "--out", "data", cwd=tmp_path)
    data, model = ChatDataset(tmp_path / "data", 64), load_pretrained(str(chatterbox)).model
    assert data.tokenizer.decode(split_conversation(data, 3)[1]) == "assistant 0"
    found = answer_questions(model, data, 2, SINGLE)
    assert [answer.question for answer in found] == ["no. 0", "no. 5"]
    assert not any(answer.finished for answer in found)
    assert [len(answer.answer) for answer in found] == [MAX_TOKENS] * 2


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the sea is deep", "the sea is blue", None),
        ("a b c d e", "c a d e b", None),
        ("one", "two", None),
        ("same words", "same words", None),
        ("The Cats walked.", "A cat walks", 200 * 2 / 6),  # punctuation, capitals and suffixes do not count
    ],
)
def test_rouge_l_by_its_definition(monkeypatch, answer, reference, expected):
    data = mock.Mock(arrays={"val": ([], [], [0, 1])}, tokenizer=load_tokenizer("bytes"))
    monkeypatch.setattr(answers, "generate_answer", lambda *args: (answer, True))
    monkeypatch.setattr(answers, "last_message", lambda *args: "")
    monkeypatch.setattr(answers, "split_conversation", lambda *args: ([], data.tokenizer.encode(reference)))
    [result] = answer_questions(None, data, 1, SINGLE)
    expected = 100 * rouge_l(answer, reference) if expected is None else expected
    assert result.rouge_l == pytest.approx(expected) and result.finished


def test_summary():
    scores = ((True, 10), (False, 30), (True, 50), (True, 50))
    given = [Answer("", "", "", finished, score) for finished, score in scores]
    result = summarize_answers(given)
    assert result["rouge_l"] == pytest.approx(35) and result["finished"] == 75 and result["answers"] == 4
    variance = (25**2 + 5**2 + 2 * 15**2) / 3
    assert result["rouge_l_stderr"] == pytest.approx((variance / 4) ** 0.5)
