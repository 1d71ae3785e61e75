"""prepare_dolly.py as people run it: instructions and conversations in, tokens and a mask of what is learned out."""

import gzip
import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

import hub
import numpy as np
import pyarrow
import pyarrow.parquet
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

FINE = {"role": "assistant", "content": "Yes."}


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
        (
            {"prompt": "Who?", "completion": "Jane."},
            "<|endoftext|><|user|>Who?<|end|><|assistant|>{Jane.<|end|>}",
        ),
        (
            {
                "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}],
                "completion": [{"role": "assistant", "content": "Jane."}],
                "messages": None,
            },
            "<|endoftext|><|system|>Be kind.<|end|><|user|>Who?<|end|><|assistant|>{Jane.<|end|>}",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Hi"}, FINE, {"role": "user", "content": "Who?"}],
                "completion": [FINE, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No."}],
            },
            "<|endoftext|><|user|>Hi<|end|><|assistant|>Yes.<|end|><|user|>Who?<|end|><|assistant|>{Yes.<|end|>}"
            "<|user|>Sure?<|end|><|assistant|>{No.<|end|>}",
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "Hi", "weight": None},
                    {"from": "gpt", "value": "Hello!"},
                    {"from": "user", "value": "Bye"},
                    {"from": "assistant", "value": "See you."},
                ]
            },
            "<|endoftext|><|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>{Hello!<|end|>}"
            "<|user|>Bye<|end|><|assistant|>{See you.<|end|>}",
        ),
        (
            {"conversations": [{"role": "user", "content": "Who?", "from": None}, FINE]},
            "<|endoftext|><|user|>Who?<|end|><|assistant|>{Yes.<|end|>}",
        ),
        (
            {"prompt": "Who?", "prompt_id": "7", "messages": [{"role": "user", "content": "Who?"}, FINE]},
            "<|endoftext|><|user|>Who?<|end|><|assistant|>{Yes.<|end|>}",
        ),
    ],
    ids=[
        "dolly",
        "dolly with context",
        "context null",
        "alpaca",
        "alpaca without input",
        "messages",
        "prompt and completion",
        "prompt and completion in messages",
        "answers in the prompt",
        "sharegpt",
        "conversations of roles",
        "messages beside a prompt",
    ],
)
def test_every_kind_of_record(prepare, tmp_path, record, expected):
    prepare([record])
    assert expected in conversations(tmp_path / "out")


@pytest.mark.parametrize("name", ["chat.jsonl.gz", "chat.json", "chat.json.zst", "chat.parquet", "folder"])
def test_every_kind_of_file(prepare, tmp_path, name):
    """The same records give the same arrays, whatever file they come in; lists of messages go through Parquet, too."""
    records = [{"messages": [{"role": "user", "content": f"After {i}?"}, FINE], "id": i} for i in range(40)]
    prepare(records, filling=False, out="plain")
    lines, array = "".join(json.dumps(record) + "\n" for record in records).encode(), json.dumps(records).encode()
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "chat.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "chat.json").write_bytes(array)
    (tmp_path / "chat.json.zst").write_bytes(pyarrow.compress(array, "zstd", asbytes=True))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "chat.parquet")
    (folder / "1.json").write_text(json.dumps(records[:20]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[20:]), folder / "2.parquet")
    prepare([], files=name)
    plain, packed = ({n: b for n, b in contents(tmp_path / f).items() if n.endswith(".npy")} for f in ("plain", "out"))
    assert len(plain) == 6 and packed == plain


def test_answers_in_a_prompt_that_is_shortened_are_not_learned(prepare, tmp_path):
    prompt = [{"role": "user", "content": "u" * 50}, FINE, {"role": "user", "content": "Hi"}, FINE]
    prepare([{"prompt": [*prompt, {"role": "user", "content": "Who?"}], "completion": [FINE]}], block_size=60)
    expected = "<|user|>Hi<|end|><|assistant|>Yes.<|end|><|user|>Who?<|end|><|assistant|>{Yes.<|end|>}"
    assert f"<|endoftext|>{expected}" in conversations(tmp_path / "out")


def test_another_split_of_a_hub_dataset(run_script, tmp_path):
    """In Arrow, a field that other records have is null, and messages are lists of structures."""
    (tmp_path / "files").mkdir()
    answer = {"from": "gpt", "value": "Yes."}
    talks = [{"conversations": [{"from": "human", "value": f"{i}?"}, answer]} for i in range(9)]
    write_jsonl(tmp_path / "files" / "train.jsonl", [talks[0] | RECORDS[0]])
    write_jsonl(tmp_path / "files" / "test.jsonl", [*talks, *RECORDS])
    flags = ("--dataset", "some/chats", "--split", "test", "--tokenizer", "bytes", "--val_fraction", 0.2)
    with hub.serve(tmp_path / "files") as address:
        there = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        run_script(SCRIPT, *flags, "--out", "out", env=there)
    found = conversations(tmp_path / "out")
    assert len(found) == 49 and "<|endoftext|><|user|>8?<|end|><|assistant|>{Yes.<|end|>}" in found
    assert meta(tmp_path / "out")["source"]["split"] == "test"


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


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hello?"}]}, "nothing to learn: .* no message of the assistant"),
        (
            {"messages": [{"role": "human", "content": "Hello?"}, FINE]},
            "role 'human'; a message needs one of",
        ),
        ({"messages": [FINE, {"role": "tool", "content": "5"}, FINE]}, "role 'tool'; a message needs one of"),
        ({"conversations": [FINE, {"from": "function_call", "value": "5"}]}, "role 'function_call'; a message needs"),
        ({"conversations": [FINE, {"from": ["human"], "value": "5"}]}, r"role \['human'\]; a message needs"),
        ({"messages": [{"role": "user", "content": None}, FINE]}, "a message needs a content in text, not NoneType"),
        ({"messages": [{"role": "user"}, FINE]}, "a message needs a content in text, not NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, FINE]}, "a message needs a content in text"),
        ({"messages": [{"content": "Hello?"}, FINE]}, "role None; a message needs one of system, user, assistant"),
        ({"messages": ["Hello?", FINE]}, "role None; a message needs one of system, user, assistant"),
        ({"prompt": "Who?", "completion": 5}, "completion must be a list of messages"),
        ({"prompt": [FINE], "completion": [{"role": "user", "content": "?"}]}, "nothing to learn"),
        ({"messages": []}, "nothing to learn"),
        ({"messages": "Hello?"}, "messages must be a list"),
        (
            {"prompt": "Who?", "response": "Jane."},
            "no known layout: its fields are prompt, response; known are",
        ),
        (
            {},
            "no known layout: it has no fields; known are messages, or conversations, or prompt and compl",
        ),
        ({"instruction": "Who?", "answer": "Jane."}, "no text in field 'response' or 'output'; the record has: inst"),
        ({"instruction": "Who?", "response": 5}, "no text in field 'response' or 'output'"),
        ({"instruction": "Who?", "context": ["a"], "response": "Jane."}, "no text in field 'context' or 'input'"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(prepare, tmp_path, record, message):
    done = prepare([RECORDS[0], record], expect=2)
    assert re.match(f"chat.jsonl line 2(, message [12] of (messages|conversations))?: {message}", error_of(done))
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
