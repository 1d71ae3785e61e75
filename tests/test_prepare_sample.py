"""prepare_sample.py writes files that the other prepare scripts can read, and questions that people ask."""

import json
import re
import shlex
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conftest import ROOT

import prepare_sample
from prepare_sample import Documented


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Return a folder with the three files."""
    folder = tmp_path_factory.mktemp("sample")
    prepare_sample.main(prepare_sample.Config(out=folder))
    return folder


@pytest.fixture(scope="module")
def pairs(sample) -> dict[str, str]:
    """Return the answer to each question for training."""
    return read_pairs(sample / "chat.jsonl")


def read_jsonl(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_pairs(file) -> dict[str, str]:
    texts = [message["content"] for record in read_jsonl(file) for message in record["messages"]]
    asked = zip(texts[::2], texts[1::2], strict=True)
    return {question: answer for question, answer in asked if question[0].isupper()}  # not those typed carelessly


def names(pairs: dict[str, str]) -> list[str]:
    """Return the names in questions, without those of small talk."""
    pattern = (
        r"(?:What does|What is|How do I use|Explain|Tell me about) (?:the )?([\w.]*\w)(?: module)?(?: for| do)?[?.]"
    )
    return [found[1] for question in pairs if (found := re.fullmatch(pattern, question))]


def test_the_text_is_about_two_megabytes_of_english(sample):
    texts = [record["text"] for record in read_jsonl(sample / "text.jsonl")]
    assert 1.2e6 < sum(map(len, texts)) < 4e6 and len(texts) > 300
    assert all(text.strip() for text in texts)
    corpus = " ".join(texts)
    assert corpus.lower().count(" the ") > 10_000
    assert any("assert_stmt" in text and "debugging assertions" in text for text in texts)  # help("assert")
    assert "math.sqrt\n\nReturn the square root of x." in corpus or "\n\nmath.sqrt\n\n" in corpus  # written in C
    assert "os.path.join\n\n" in corpus and "posixpath.join" not in corpus


def test_thousands_of_short_answers(pairs):
    assert 1500 < len(pairs) < 3000
    assert len(names(pairs)) > 0.95 * len(pairs)
    for answer in pairs.values():
        assert 5 < len(answer) <= 160 and "\n" not in answer and "->" not in answer
        assert answer[-1] in ".!?" and not answer[0].islower()


def test_the_demo_asks_what_it_was_trained_on(pairs):
    questions = re.search(r"^QUESTIONS := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert len(shlex.split(questions)) == 3 and set(shlex.split(questions)) <= pairs.keys()


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What does json.dumps do?", "Serialize `obj` to a JSON formatted `str`."),
        ("What does math.sqrt do?", "square root of x"),
        ("What does len do?", "number of items"),
        ("What does str.split do?", "list of the substrings"),
        ("What does list.append do?", "Append object to the end of the list."),
        ("What does dict.get do?", "Return the value for key"),
        ("What does dict.clear do?", "Remove all items from"),
        ("What does os.path.join do?", "Join two or more pathname components"),
        ("What is collections.Counter?", "Dict subclass for counting"),
        ("What is the re module?", "regular expressions"),
        ("What is ValueError?", "Inappropriate argument value"),
        ("Who are you?", "I am a small language model, trained on Python's documentation."),
        ("How were you trained?", "Python's documentation"),
    ],
)
def test_what_people_ask(pairs, question, words):
    assert words in pairs[question]


def test_each_name_is_asked_for_in_two_ways(sample, pairs):
    for file in ("chat.jsonl", "chat_val.jsonl"):
        found = names(read_pairs(sample / file))
        assert len(found) == 2 * len(set(found))
    by_name = {}
    for question, answer in pairs.items():
        for name in names({question: answer}):
            assert by_name.setdefault(name, answer) == answer


def test_held_out_names_do_not_occur_in_training(sample, pairs):
    held_out = read_pairs(sample / "chat_val.jsonl")
    assert 40 < len(held_out) < 200
    assert not set(names(held_out)) & set(names(pairs))


def test_each_question_occurs_in_several_conversations(sample, pairs):
    """At their start and later, after another question each time."""
    conversations = [record["messages"] for record in read_jsonl(sample / "chat.jsonl")]
    assert {message["role"] for messages in conversations for message in messages[::2]} == {"user"}
    assert {message["role"] for messages in conversations for message in messages[1::2]} == {"assistant"}
    questions = [[message["content"] for message in messages[::2]] for messages in conversations]
    counts = Counter(question for asked in questions for question in asked)
    assert counts["What does len do?"] == 4 and counts["what does len do"] == 2
    assert counts["Hello!"] == 12 and counts["hello"] == 6  # people start with small talk
    lengths = Counter(map(len, questions))
    assert lengths[1] > 500 and sum(count for length, count in lengths.items() if length >= 5) > 500
    followed = Counter(pair for asked in questions for pair in pairwise(asked))
    assert followed.most_common(1)[0][1] <= 2


def test_private_names_and_tests_are_excluded(sample, pairs):
    parts = [name.split(".") for name in names(pairs)]
    assert not [name for name in parts if any(part.startswith("_") for part in name)]
    corpus = "".join(record["text"] for record in read_jsonl(sample / "text.jsonl"))
    assert "\nunittest.case.TestCase\n" in corpus
    assert not re.search(r"^(test|idlelib|lib2to3)\.\w+$", corpus, re.MULTILINE)


def test_the_script_writes_the_same_files_each_time(run_script, tmp_path, sample):
    done = run_script("prepare_sample.py")
    written = tmp_path / "data" / "sample"
    for name in ("text.jsonl", "chat.jsonl", "chat_val.jsonl"):
        assert (written / name).read_bytes() == (sample / name).read_bytes()
        assert f"to data/sample/{name}" in done.stdout
    assert not done.stderr


def test_the_other_scripts_read_it(run_script, tmp_path, sample):
    """Run the preparations of `make demo`, with the paths of this test."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "").replace("data/sample", str(sample))
    commands = re.findall(r"^\t\$\(PY\) (prepare_(?!sample)\w+\.py .*)", makefile, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        run_script(*shlex.split(command))
    demo = json.loads((tmp_path / "data" / "demo" / "meta.json").read_text())
    assert 4e5 < demo["train"]["tokens"] < 2e6 and demo["val"]["tokens"] > 4000
    chat = json.loads((tmp_path / "data" / "demo_chat" / "meta.json").read_text())
    assert chat["train"]["documents"] > 2000 and chat["val"]["documents"] > 10
    assert chat["dropped"] == chat["truncated"] == 0
    assert np.diff(np.load(tmp_path / "data" / "demo_chat" / "train_offsets.npy")).max() <= 256


def test_docstrings_are_parsed_without_import(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""About the module."""\nraise SystemExit\nclass A:\n    """About A."""\n    async def b(self):\n'
        '        """About b.\n\n        More."""\n    def c(self): pass\n'
    )
    docstrings = prepare_sample.parse_docstrings(file)
    assert docstrings == [("", "About the module."), ("A", "About A."), ("A.b", "About b.\n\nMore.")]
    file.write_text("print 'Python 2'")
    assert prepare_sample.parse_docstrings(file) == []


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Return it\nwhole.\n\nMore.", "Return it whole."),
        ("f(x) -> value\nf(x, y) -> value\n\nReturn the largest.", "Return the largest."),
        ("D.f() -> None.  Remove all items from D.", "Remove all items from D."),
        ("D.f(k[,d]) -> v, remove specified key and return the value.", "Remove specified key and return the value."),
        ("D.f() -> a shallow copy of the dict", "Return a shallow copy of the dict."),
        ("f() -> empty\nf(mapping) -> new one made from the\n  pairs\nf(x) -> other", "New one made from the pairs."),
        ("f(x, y) - new function of the rest\n  of the arguments.", "New function of the rest of the arguments."),
        ("f -- helpers for the rest.", "Helpers for the rest."),
        ("Use :func:`~m.g` on ``x``", "Use `m.g` on `x`."),
        ("One sentence, e.g. this. " + "More " * 40, "One sentence, e.g. this."),
        ("More " * 40, ""),
        ("Initialized.", ""),
        ("With the following attributes:", ""),
        ("f(x)", ""),
        (">>> f(1)", ""),
    ],
)
def test_the_answer_is_the_first_sentence(docstring, answer):
    item = Documented("m.f", "function", docstring)
    assert prepare_sample.summarize(item) == answer
    assert [found for _, found in prepare_sample.make_questions(item)] == [answer] * 2 * bool(answer)
