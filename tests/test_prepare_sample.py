"""prepare_sample.py writes files that the other two prepare scripts can read."""

import json
import re

import numpy as np
import pytest

import prepare_sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Return a folder with the two files."""
    folder = tmp_path_factory.mktemp("sample")
    prepare_sample.main(prepare_sample.Config(out=folder))
    return folder


def read_jsonl(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_text_is_about_two_megabytes_of_english(sample):
    texts = [record["text"] for record in read_jsonl(sample / "text.jsonl")]
    assert 1.2e6 < sum(map(len, texts)) < 4e6 and len(texts) > 300
    assert all(text.strip() for text in texts)
    corpus = " ".join(texts).lower()
    assert corpus.count(" the ") > 10_000
    assert any("assert_stmt" in text and "debugging assertions" in text for text in texts)  # help("assert")


def test_thousands_of_short_questions_with_answers(sample):
    records = read_jsonl(sample / "chat.jsonl")
    assert len(records) > 2000 and all(list(record) == ["instruction", "context", "response"] for record in records)
    pairs = {(record["instruction"], record["response"]) for record in records}
    assert len(pairs) == len(records)
    for question, answer in pairs:
        assert re.fullmatch(r"What (is [\w.]+|does [\w.]+ do)\?", question)
        assert 0 < len(answer) <= 160 and "\n" not in answer
    assert "What does textwrap.dedent do?" in {question for question, _ in pairs}


def test_private_names_and_tests_are_excluded(sample):
    records = read_jsonl(sample / "chat.jsonl")
    names = [re.search(r"[\w.]+(?= do\?|\?)", record["instruction"])[0].split(".") for record in records]
    assert {"json", "unittest"} <= {name[0] for name in names}
    assert not {"test", "idlelib", "site-packages", "lib2to3"} & {name[0] for name in names}
    assert not [name for name in names if any(part.startswith("_") for part in name)]


def test_the_script_writes_the_same_files_each_time(run_script, tmp_path, sample):
    done = run_script("prepare_sample.py")
    written = tmp_path / "data" / "sample"
    for name in ("text.jsonl", "chat.jsonl"):
        assert (written / name).read_bytes() == (sample / name).read_bytes()
        assert f"to data/sample/{name}" in done.stdout
    assert not done.stderr


def test_the_other_scripts_read_it(run_script, tmp_path, sample):
    """Run the commands in the docstring, with the paths of this test."""
    commands = re.findall(r"python (prepare_(?:fineweb|dolly)\.py) (.*)", prepare_sample.__doc__)
    assert len(commands) == 2
    for script, arguments in commands:
        run_script(script, *arguments.replace("data/sample", str(sample)).split())
    demo = json.loads((tmp_path / "data" / "demo" / "meta.json").read_text())
    assert 1e6 < demo["train"]["tokens"] < 4e6 and demo["val"]["tokens"] > 10_000
    chat = json.loads((tmp_path / "data" / "demo_chat" / "meta.json").read_text())
    assert chat["train"]["documents"] > 2000 and chat["val"]["documents"] > 20
    assert chat["dropped"] == 0
    assert np.diff(np.load(tmp_path / "data" / "demo_chat" / "train_offsets.npy")).max() <= 256


def test_docstrings_are_parsed_without_import(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""About the module."""\nraise SystemExit\nclass A:\n    """About A."""\n    async def b(self):\n'
        '        """About b.\n\n        More."""\n    def c(self): pass\n'
    )
    docstrings = prepare_sample.parse_docstrings(file)
    assert docstrings == [("", "About the module."), ("A", "About A."), ("A.b", "About b.\n\nMore.")]
    assert list(prepare_sample.make_questions("m", docstrings)) == [
        ("What is m?", "About the module."),
        ("What does m.A do?", "About A."),
        ("What does m.A.b do?", "About b."),
    ]
    file.write_text("print 'Python 2'")
    assert prepare_sample.parse_docstrings(file) == []
