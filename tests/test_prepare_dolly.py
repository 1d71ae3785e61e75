"""prepare_dolly.py as people run it: instructions and conversations in, tokens and a mask of what is learned out."""

import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import error_of

from shards import INCOMPLETE
from tokenizer import load_tokenizer

SCRIPT = "prepare_dolly.py"
SPLITS = ("train", "val")
BYTES = load_tokenizer("bytes")
RECORDS = [
    {"instruction": f"Question {i} ä?", "context": "<|end|>" * (i % 3), "response": f"Answer {i} 👍."}
    for i in range(40)
]


def write_jsonl(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def prepare(run_script, tmp_path):
    """Run the script on these records and some that serve to fill both splits, into the folder "out"."""

    def run(records: list[dict], expect: int = 0, filling: bool = True, **flags):
        write_jsonl(tmp_path / "chat.jsonl", records + RECORDS * filling)
        flags = {"files": "chat.jsonl", "tokenizer": "bytes", "out": "out", "val_fraction": 0.2} | flags
        arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
        return run_script(SCRIPT, *arguments, expect=expect)

    return run


def encoded(folder: Path, split: str) -> list[tuple[list[int], list[bool]]]:
    """The conversations of a split, (tokens, learned) each."""
    arrays = {key: np.load(folder / f"{split}_{key}.npy") for key in ("tokens", "learned", "offsets")}
    assert [array.dtype for array in arrays.values()] == [np.uint16, bool, np.int64]
    offsets = arrays["offsets"].tolist()
    assert offsets[0] == 0 and offsets[-1] == len(arrays["tokens"]) == len(arrays["learned"])
    return [(arrays["tokens"][a:b].tolist(), arrays["learned"][a:b].tolist()) for a, b in pairwise(offsets)]


def conversations(folder: Path) -> list[str]:
    """All conversations as text, the learned parts between braces."""
    return [marked(*conversation) for split in SPLITS for conversation in encoded(folder, split)]


def marked(tokens: list[int], learned: list[bool]) -> str:
    text, inside = b"", False
    for token, mark in zip(tokens, learned, strict=True):
        text += (b"{" if mark else b"}") if mark != inside else b""
        text, inside = text + BYTES.token_bytes(token), mark
    return text.decode() + ("}" if inside else "")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def counts(folder: Path) -> tuple[int, int, int]:
    return tuple(meta(folder)[key] for key in ("shortened", "dropped", "skipped_empty"))


# ---- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"instruction": "Who?", "context": "", "response": "Jane.", "category": "open_qa"},
            "<|endoftext|><|user|>Who?<|end|><|assistant|>{Jane.<|end|>}",
        ),
        (
            {"instruction": "Who?", "context": "Emma, by Jane", "response": "Jane."},
            "<|endoftext|><|user|>Who?\n\nEmma, by Jane<|end|><|assistant|>{Jane.<|end|>}",
        ),
        (
            {"instruction": "Who?", "context": None, "response": "Jane."},
            "<|endoftext|><|user|>Who?<|end|><|assistant|>{Jane.<|end|>}",
        ),
        (
            {"instruction": "Who?", "input": "Emma, by Jane", "output": "Jane."},
            "<|endoftext|><|user|>Who?\n\nEmma, by Jane<|end|><|assistant|>{Jane.<|end|>}",
        ),
        (
            {"instruction": "Who?", "output": "Jane."},
            "<|endoftext|><|user|>Who?<|end|><|assistant|>{Jane.<|end|>}",
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello!"},
                    {"role": "user", "content": "Bye"},
                    {"role": "assistant", "content": "See you."},
                ]
            },
            "<|endoftext|><|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>{Hello!<|end|>}"
            "<|user|>Bye<|end|><|assistant|>{See you.<|end|>}",
        ),
    ],
    ids=["dolly", "dolly with context", "context null", "alpaca", "alpaca without input", "messages"],
)
def test_every_kind_of_record(prepare, tmp_path, record, expected):
    prepare([record])
    assert expected in conversations(tmp_path / "out")


def test_all_conversations_come_back_with_the_manifest(prepare, tmp_path):
    done = prepare([])
    out = tmp_path / "out"
    assert sorted(conversations(out)) == sorted(
        f"<|endoftext|><|user|>{question}<|end|><|assistant|>{{{record['response']}<|end|>}}"
        for record in RECORDS
        for question in ["\n\n".join(filter(None, [record["instruction"], record["context"]]))]
    )
    found = meta(out)
    assert (found["kind"], found["vocab_size"], found["block_size"]) == ("chat", BYTES.chat_vocab_size, 1024)
    assert (found["shortened"], found["dropped"], found["skipped_empty"]) == (0, 0, 0)
    for split in SPLITS:
        both = encoded(out, split)
        assert found[split]["documents"] == len(both) > 0
        assert found[split]["tokens"] == sum(len(tokens) for tokens, _ in both)
        assert found[split]["learned_tokens"] == sum(sum(learned) for _, learned in both)
        assert f"{split}: {len(both)} conversations, {found[split]['learned_tokens']:,} of" in done.stdout
        for tokens, _ in both:  # a marker in the text is never a special token
            assert [token for token in tokens if token >= BYTES.end_of_text] == [256, 258, 260, 259, 260]
    assert "next: python finetune.py --init RUN --data out --run out" in done.stdout and done.stderr == ""


def test_gpt2_tokens(prepare, tmp_path, gpt2_tokenizer):
    prepare([], tokenizer="gpt2")
    messages = [{"role": "user", "content": "Question 0 ä?"}, {"role": "assistant", "content": "Answer 0 👍."}]
    found = [conversation for split in SPLITS for conversation in encoded(tmp_path / "out", split)]
    assert gpt2_tokenizer.encode_chat(messages) in found


def test_the_same_input_gives_the_same_bytes_and_is_not_made_twice(prepare, tmp_path):
    prepare([], out="one")
    prepare([])
    assert contents(tmp_path / "one") == contents(tmp_path / "out")
    assert prepare([]).stdout == "out is already complete.\n"
    assert contents(tmp_path / "one") == contents(tmp_path / "out")


def test_prepared_folders_stay_valid(prepare, tmp_path):
    """The bytes that earlier versions wrote, manifest included: a change would make everybody prepare again."""
    prepare([{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, FINE]}])
    whole = b"".join(data for name, data in sorted(contents(tmp_path / "out").items()) if name != ".lock")
    assert hashlib.sha256(whole).hexdigest() == "c53c653688366280ba308bb9c8d5f340d461fb7eeb03cd35737d66cf36370985"


def test_an_interrupted_run_is_done_again(prepare, tmp_path):
    prepare([])
    out = tmp_path / "out"
    whole = contents(out)
    (out / "meta.json").rename(out / INCOMPLETE)
    (out / "train_tokens.npy").write_bytes(b"half")
    (out / "val_learned.npy.tmp").write_bytes(b"half")
    prepare([])
    assert contents(out) == whole


def test_a_conversation_moves_to_no_other_split(prepare, tmp_path):
    more = [{"instruction": f"Another {i}", "response": "Yes."} for i in range(30)]
    prepare([], out="before")
    prepare(more, out="after")
    for split in SPLITS:
        before, after = (encoded(tmp_path / folder, split) for folder in ("before", "after"))
        assert all(conversation in after for conversation in before) and len(after) > len(before)


def test_too_long_a_context_is_shortened_and_the_answer_stays(prepare, tmp_path):
    long = {"instruction": "Who?", "context": "by Jane " * 50, "response": "Jane Austen."}
    prepare([long], block_size=100)
    question = ("Who?\n\n" + "by Jane " * 50)[: 100 - len("Jane Austen.") - 5]  # five special tokens
    found = conversations(tmp_path / "out")
    assert f"<|endoftext|><|user|>{question}<|end|><|assistant|>{{Jane Austen.<|end|>}}" in found
    assert counts(tmp_path / "out") == (1, 0, 0)
    assert len(found) == len(RECORDS) + 1


def test_a_conversation_that_just_fits_stays_whole(prepare, tmp_path):
    exact = {"instruction": "x" * 50, "response": "y" * 45}
    prepare([exact], block_size=100)
    assert f"<|endoftext|><|user|>{'x' * 50}<|end|><|assistant|>{{{'y' * 45}<|end|>}}" in conversations(
        tmp_path / "out"
    )
    assert counts(tmp_path / "out") == (0, 0, 0)


def test_old_turns_go_first(prepare, tmp_path):
    turns = [("user", "u" * 50), ("assistant", "a" * 50), ("user", "Last?"), ("assistant", "Last.")]
    prepare([{"messages": [{"role": role, "content": content} for role, content in turns]}], block_size=100)
    assert "<|endoftext|><|user|>Last?<|end|><|assistant|>{Last.<|end|>}" in conversations(tmp_path / "out")


def test_what_is_shortened_and_left_out_is_counted_and_said(prepare, tmp_path):
    shortened = [{"instruction": "x" * 200, "response": "Yes."}]
    dropped = [{"instruction": "Who?", "response": "y" * 200}] * 2
    blank = {"instruction": " ", "context": "", "response": "\n"}
    unanswered = {"instruction": "Who?", "response": ""}
    empty = [blank, unanswered, {"messages": [{"role": "assistant", "content": ""}]}]
    done = prepare([*shortened, *dropped, *empty], block_size=100)
    assert counts(tmp_path / "out") == (1, 2, 3)
    assert len(conversations(tmp_path / "out")) == len(RECORDS) + 1
    said = " ".join(line for line in done.stdout.splitlines() if not line.startswith(("train:", "val:")))
    assert re.search(r"\b1 .*shortened to 100 tokens.*\b2 .*longer.*\b3 .*empty", said)


# ---- mistakes ------------------------------------------------------------------------------------------------------

FINE = {"role": "assistant", "content": "Yes."}
NEEDS = r"a message needs a role \(system, user, assistant\) and a content in text"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hello?"}]}, "nothing to learn: .* no message of the assistant"),
        ({"messages": [{"role": "human", "content": "Hello?"}, FINE]}, NEEDS),
        ({"messages": [{"role": "user", "content": None}, FINE]}, NEEDS),
        ({"messages": [{"role": "user"}, FINE]}, NEEDS),
        ({"messages": [{"content": "Hello?"}, FINE]}, NEEDS),
        ({"messages": ["Hello?", FINE]}, NEEDS),
        ({"messages": []}, "nothing to learn"),
        ({"messages": "Hello?"}, "messages must be a list"),
        ({"prompt": "Who?", "response": "Jane."}, "no text in field 'instruction'; the record has: prompt, response"),
        ({"instruction": "Who?", "answer": "Jane."}, "no text in field 'response' or 'output'; the record has: inst"),
        ({"instruction": "Who?", "response": 5}, "no text in field 'response' or 'output'"),
        ({"instruction": "Who?", "context": ["a"], "response": "Jane."}, "no text in field 'context' or 'input'"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(prepare, tmp_path, record, message):
    done = prepare([RECORDS[0], record], expect=2)
    assert re.match(f"chat.jsonl line 2: {message}", error_of(done))
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no conversations to learn: of 0 records"),
        ([{"instruction": "", "response": ""}], "no conversations to learn: .* 1 are empty"),
        ([{"instruction": "Who?", "response": "y" * 2000}], "no conversations to learn: .* 1 are too long"),
        (RECORDS[:1], "none of the 1 conversations fell into the val split at --val_fraction 0.2"),
    ],
)
def test_a_source_with_too_little(prepare, records, message):
    assert re.match(message, error_of(prepare(records, filling=False, expect=2)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"val_fraction": 0}, "--val_fraction is 0.0: it must be above 0 and at most 0.5"),
        ({"val_fraction": "nan"}, "--val_fraction is nan: it must be above 0 and at most 0.5"),
        ({"block_size": 15}, "--block_size is 15: it must be at least 16"),
        ({"tokenizer": "gpt3"}, "there is no tokenizer 'gpt3'"),
        ({"files": "text.txt"}, "--files text.txt: no such file"),
    ],
)
def test_a_value_that_cannot_be_used(prepare, tmp_path, flags, message):
    assert error_of(prepare([], expect=2, **flags)).startswith(message)
    assert not (tmp_path / "out").exists()


def test_text_files_hold_no_conversations(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("Hello")
    assert error_of(prepare([], files="a.txt", expect=2)).startswith("--files a.txt: a file must end in .json")


def test_malformed_json_names_file_and_line(run_script, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(RECORDS[0]) + '\n{"instruction": ')
    done = run_script(SCRIPT, "--files", "bad.jsonl", "--tokenizer", "bytes", "--out", "out", expect=2)
    assert error_of(done).startswith("bad.jsonl line 2: malformed JSON")


def test_other_data_in_the_folder_stays(prepare, tmp_path):
    prepare([])
    before = contents(tmp_path / "out")
    assert "block_size is 1024, not 512" in error_of(prepare([], block_size=512, expect=2))
    assert contents(tmp_path / "out") == before


def test_words_after_the_last_answer_never_cost_the_answer(prepare, tmp_path):
    """A conversation that ends with the user, as some in the wild do."""
    turns = [("user", "Who?"), ("assistant", "Jane."), ("user", "Thanks! " * 20)]
    prepare([{"messages": [{"role": role, "content": content} for role, content in turns]}], block_size=100)
    assert "<|endoftext|><|user|>Who?<|end|><|assistant|>{Jane.<|end|>}" in conversations(tmp_path / "out")
