"""prepare_dolly.py as a subprocess: instructions and conversations in, tokens and loss mask out."""

import csv
import functools
import gzip
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from unittest import mock

import datasets
import hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, error_of

import prepare_dolly
from minigpt import chat, runs, shards
from minigpt.chat import encode_chat
from minigpt.cli import UserError
from minigpt.files import write_manifest
from minigpt.shards import PROGRESS_FILE
from minigpt.tokenizer import load_tokenizer
from prepare_dolly import suggest_finetuning

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
    """Run the script on these records, and with `filling` on some more for both splits, into the folder "out"."""

    def run(records: list[dict], expect: int = 0, filling: bool = True, **flags):
        write_jsonl(tmp_path / "chat.jsonl", records + RECORDS * filling)
        flags = {"files": "chat.jsonl", "tokenizer": "bytes", "out": "out", "val_fraction": 0.2} | flags
        arguments = [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]
        return run_script(SCRIPT, *arguments, expect=expect)

    return run


def encoded(folder: Path, split: str) -> list[tuple[list[int], list[bool]]]:
    """Return the conversations of a split, (tokens, loss_mask) each."""
    arrays = {key: np.load(folder / f"{split}_{key}.npy") for key in ("tokens", "loss_mask", "offsets")}
    assert [array.dtype for array in arrays.values()] == [np.uint16, bool, np.int64]
    offsets = arrays["offsets"].tolist()
    assert offsets[0] == 0 and offsets[-1] == len(arrays["tokens"]) == len(arrays["loss_mask"])
    return [(arrays["tokens"][a:b].tolist(), arrays["loss_mask"][a:b].tolist()) for a, b in pairwise(offsets)]


def conversations(folder: Path) -> list[str]:
    """Return all conversations as text, with tokens in the loss between braces."""
    return [format_marked(*conversation) for split in SPLITS for conversation in encoded(folder, split)]


def format_marked(tokens: list[int], loss_mask: list[bool]) -> str:
    text, inside = b"", False
    for token, mark in zip(tokens, loss_mask, strict=True):
        text += (b"{" if mark else b"}") if mark != inside else b""
        text, inside = text + BYTES.token_bytes(token), mark
    return text.decode() + ("}" if inside else "")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def counts(folder: Path) -> tuple[int, int, int]:
    return tuple(meta(folder)[key] for key in ("truncated", "dropped", "skipped_empty"))


# ---- the dataset -----------------------------------------------------------------------------------------------------


LAYOUTS = [
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
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "W"}, {"type": "text", "text": "ho?"}]},
                {"role": "assistant", "content": "Jane."},
            ]
        },
        "<|endoftext|><|user|>Who?<|end|><|assistant|>{Jane.<|end|>}",
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
]


def test_every_layout(prepare, tmp_path):
    """Equal conversations of several layouts are counted."""
    prepare([record for record, _ in LAYOUTS])
    expected = Counter(text for _, text in LAYOUTS)
    found = Counter(conversations(tmp_path / "out"))
    assert {text: found[text] for text in expected} == expected
    assert found.total() == len(LAYOUTS) + len(RECORDS)


@pytest.mark.parametrize("name", ["chat.jsonl.gz", "chat.json", "chat.json.zst", "chat.parquet", "folder"])
def test_every_file_format(prepare, tmp_path, name):
    """The same records give the same arrays in every format; Parquet holds lists of messages too."""
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
    plain, other = ({n: b for n, b in contents(tmp_path / f).items() if n.endswith(".npy")} for f in ("plain", "out"))
    assert len(plain) == 6 and other == plain


def test_answers_in_a_truncated_prompt_are_not_in_the_loss(prepare, tmp_path):
    prompt = [{"role": "user", "content": "u" * 50}, FINE, {"role": "user", "content": "Hi"}, FINE]
    prepare([{"prompt": [*prompt, {"role": "user", "content": "Who?"}], "completion": [FINE]}], block_size=60)
    expected = "<|user|>Hi<|end|><|assistant|>Yes.<|end|><|user|>Who?<|end|><|assistant|>{Yes.<|end|>}"
    assert f"<|endoftext|>{expected}" in conversations(tmp_path / "out")


def test_another_split_of_a_hub_dataset(run_script, tmp_path):
    """In Arrow, fields of other records are null, and messages are lists of structs."""
    (tmp_path / "files").mkdir()
    answer = {"from": "gpt", "value": "Yes."}
    talks = [{"conversations": [{"from": "human", "value": f"{i}?"}, answer]} for i in range(9)]
    write_jsonl(tmp_path / "files" / "train.jsonl", [talks[0] | RECORDS[0]])
    write_jsonl(tmp_path / "files" / "test.jsonl", [*talks, *RECORDS])
    flags = ("--dataset", "some/chats", "--split", "test", "--tokenizer", "bytes", "--val_fraction", 0.2)
    with hub.serve(tmp_path / "files") as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        run_script(SCRIPT, *flags, "--out", "out", env=env)
    found = conversations(tmp_path / "out")
    assert len(found) == 49 and "<|endoftext|><|user|>8?<|end|><|assistant|>{Yes.<|end|>}" in found
    assert meta(tmp_path / "out")["source"]["split"] == "test"


def test_all_conversations_are_read_back_and_described_in_meta_json(prepare, tmp_path):
    done = prepare([])
    out = tmp_path / "out"
    assert sorted(conversations(out)) == sorted(
        f"<|endoftext|><|user|>{question}<|end|><|assistant|>{{{record['response']}<|end|>}}"
        for record in RECORDS
        for question in ["\n\n".join(filter(None, [record["instruction"], record["context"]]))]
    )
    found = meta(out)
    assert (found["kind"], found["vocab_size"], found["block_size"]) == ("chat", BYTES.chat_vocab_size, 1024)
    assert (found["truncated"], found["dropped"], found["skipped_empty"]) == (0, 0, 0)
    for split in SPLITS:
        both = encoded(out, split)
        assert found[split]["documents"] == len(both) > 0
        assert found[split]["tokens"] == sum(len(tokens) for tokens, _ in both)
        assert found[split]["loss_tokens"] == sum(sum(loss_mask) for _, loss_mask in both)
        in_loss = f"{found[split]['loss_tokens']:,} of {found[split]['tokens']:,} tokens in the loss"
        assert f"{split}: {len(both)} conversations, {in_loss}\n" in done.stdout
        for tokens, _ in both:  # text that looks like a special token stays text
            assert [token for token in tokens if token >= BYTES.end_of_text] == [256, 258, 260, 259, 260]
    assert done.stderr == ""


def test_gpt2_tokens(prepare, tmp_path, gpt2_tokenizer):
    prepare([], tokenizer="gpt2")
    messages = [{"role": "user", "content": "Question 0 ä?"}, {"role": "assistant", "content": "Answer 0 👍."}]
    found = [conversation for split in SPLITS for conversation in encoded(tmp_path / "out", split)]
    assert encode_chat(gpt2_tokenizer, messages) in found


def test_the_same_input_gives_the_same_bytes_and_a_second_run_changes_nothing(prepare, tmp_path):
    prepare([], out="one")
    prepare([])
    assert contents(tmp_path / "one") == contents(tmp_path / "out")
    assert "out is already complete\n" in prepare([]).stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "out")


def test_prepared_folders_stay_valid(prepare, tmp_path):
    """The same bytes as earlier versions, meta.json included: a change would make everyone prepare their data again."""
    prepare([{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, FINE]}])
    files = contents(tmp_path / "out")
    meta = {name: value for name, value in json.loads(files["meta.json"]).items() if name != "checksum"}  # is newer
    files["meta.json"] = (json.dumps(meta, indent=2) + "\n").encode()
    whole = b"".join(data for name, data in sorted(files.items()) if name != ".lock")
    assert hashlib.sha256(whole).hexdigest() == "0d425ca4e8060748fe61fd5d215c93bc09e871b07e2a6f377f757d030b5154ad"


def test_an_interrupted_run_is_completed(prepare, tmp_path):
    prepare([])
    out = tmp_path / "out"
    whole = contents(out)
    (out / "meta.json").rename(out / PROGRESS_FILE)
    (out / "train_tokens.npy").write_bytes(b"half")
    (out / "val_loss_mask.npy.tmp").write_bytes(b"half")
    prepare([])
    assert contents(out) == whole


def test_adding_conversations_moves_none_to_the_other_split(prepare, tmp_path):
    more = [{"instruction": f"Another {i}", "response": "Yes."} for i in range(30)]
    prepare([], out="before")
    prepare(more, out="after")
    for split in SPLITS:
        before, after = (encoded(tmp_path / folder, split) for folder in ("before", "after"))
        assert all(conversation in after for conversation in before) and len(after) > len(before)


def test_own_validation_files(prepare, tmp_path):
    """All conversations of --val_files are for validation, with the others' hashes ignored, and none of the others."""
    write_jsonl(tmp_path / "val.jsonl", [record | {"instruction": "Held out?"} for record in RECORDS[:3]])
    done = prepare([], val_files="val.jsonl", val_fraction=None)
    assert "train: 40 conversations" in done.stdout and "val: 3 conversations" in done.stdout
    texts = {split: [format_marked(*both) for both in encoded(tmp_path / "out", split)] for split in SPLITS}
    assert all("Held out?" in text for text in texts["val"])
    assert all("Question" in text for text in texts["train"])
    source = meta(tmp_path / "out")["source"]
    assert (source["files"][0]["file"], source["val"]["files"][0]["file"]) == ("chat.jsonl", "val.jsonl")
    prepare([], val_files="val.jsonl", val_fraction=None, files=None, mix="chat.jsonl=2", out="mixed")
    assert [len(encoded(tmp_path / "mixed", split)) for split in SPLITS] == [80, 3]


def test_a_context_that_is_too_long_is_truncated_and_the_answer_kept(prepare, tmp_path):
    long = {"instruction": "Who?", "context": "by Jane " * 50, "response": "Jane Austen."}
    prepare([long], block_size=100)
    question = ("Who?\n\n" + "by Jane " * 50)[: 100 - len("Jane Austen.") - 5]  # five special tokens
    found = conversations(tmp_path / "out")
    assert f"<|endoftext|><|user|>{question}<|end|><|assistant|>{{Jane Austen.<|end|>}}" in found
    assert counts(tmp_path / "out") == (1, 0, 0)
    assert len(found) == len(RECORDS) + 1


def test_a_conversation_of_exactly_block_size_is_kept_whole(prepare, tmp_path):
    exact = {"instruction": "x" * 50, "response": "y" * 45}
    prepare([exact], block_size=100)
    assert f"<|endoftext|><|user|>{'x' * 50}<|end|><|assistant|>{{{'y' * 45}<|end|>}}" in conversations(
        tmp_path / "out"
    )
    assert counts(tmp_path / "out") == (0, 0, 0)


def test_the_oldest_turns_are_dropped_first(prepare, tmp_path):
    turns = [("user", "u" * 50), ("assistant", "a" * 50), ("user", "Last?"), ("assistant", "Last.")]
    prepare([{"messages": [{"role": role, "content": content} for role, content in turns]}], block_size=100)
    assert "<|endoftext|><|user|>Last?<|end|><|assistant|>{Last.<|end|>}" in conversations(tmp_path / "out")


def test_truncated_and_skipped_records_are_counted_and_printed(prepare, tmp_path):
    truncated = [{"instruction": "x" * 200, "response": "Yes."}]
    dropped = [{"instruction": "Who?", "response": "y" * 200}] * 2
    blank = {"instruction": " ", "context": "", "response": "\n"}
    unanswered = {"instruction": "Who?", "response": ""}
    empty = [blank, unanswered, {"messages": [{"role": "assistant", "content": ""}]}]
    done = prepare([*truncated, *dropped, *empty], block_size=100)
    assert counts(tmp_path / "out") == (1, 2, 3)
    assert len(conversations(tmp_path / "out")) == len(RECORDS) + 1
    assert done.stdout.splitlines()[2] == (
        "out: 46 records, 1 truncated to 100 tokens, 2 dropped (answer too long), 3 skipped (empty answer)"
    )


# ---- several sources -------------------------------------------------------------------------------------------------


@pytest.fixture
def mix(run_script, tmp_path):
    """Run the script on sources with weights; "a" and "b" have 300 conversations each and share 100."""
    for name, numbers in (("a", range(300)), ("b", range(200, 500))):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{i}?", "completion": "Yes."} for i in numbers])

    def run(*items: str, out: str = "out", expect: int = 0, **options):
        flags = ("--tokenizer", "bytes", "--val_fraction", 0.2, "--out", out)
        return run_script(SCRIPT, "--mix", *items, *flags, expect=expect, **options)

    return run


def times(folder: Path, split: str) -> Counter[int]:
    """Count how often the conversation of each number is in a split."""
    texts = [format_marked(*conversation) for conversation in encoded(folder, split)]
    return Counter(int(re.fullmatch(r"<\|endoftext\|><\|user\|>(\d+)\?.*", text)[1]) for text in texts)


def test_weights_are_how_often_a_conversation_is_in_the_training_split(mix, tmp_path):
    done = mix("a.jsonl=2.5", "b.jsonl=0.5")
    train, val = times(tmp_path / "out", "train"), times(tmp_path / "out", "val")
    assert not train.keys() & val.keys() and set(val.values()) == {1}
    ranges = (range(200), range(200, 300), range(300, 500))
    alone, both, other = ([train[i] for i in numbers if i not in val] for numbers in ranges)
    assert set(alone) == {2, 3} and alone.count(3) / len(alone) == pytest.approx(0.5, abs=0.15)
    assert set(other) == {0, 1} and other.count(1) / len(other) == pytest.approx(0.5, abs=0.15)
    assert set(both) == {2, 4}  # the same hash selects the third copy and the half
    assert 0.1 < sum(i < 300 for i in val) / 300 < 0.3  # as without weights
    mix_meta = meta(tmp_path / "out")["source"]["mix"]
    assert [(part["weight"], part["files"][0]["file"]) for part in mix_meta] == [(2.5, "a.jsonl"), (0.5, "b.jsonl")]
    of_a = sum(alone) + sum(both) - both.count(4) + sum(i < 300 for i in val)
    of_b = sum(train.values()) + sum(val.values()) - of_a
    for label, n in {"a.jsonl=2.5": of_a, "b.jsonl=0.5": of_b}.items():
        assert f"{label}: {n:,} conversations, {n * len('Yes.!'):,} tokens in the loss\n" in done.stdout


def test_adding_data_does_not_change_the_selection(mix, tmp_path):
    mix("a.jsonl=0.5", out="before")
    mix("b.jsonl=1", "a.jsonl=0.5", out="after")
    for split in SPLITS:
        before, after = (times(tmp_path / out, split) for out in ("before", "after"))
        assert {i for i in before if i < 200} == {i for i in after if i < 200}


def test_weight_one_equals_no_mix(mix, run_script, tmp_path):
    mix("a.jsonl=1")
    run_script(SCRIPT, "--files", "a.jsonl", "--tokenizer", "bytes", "--val_fraction", 0.2, "--out", "plain")
    for split in SPLITS:
        assert encoded(tmp_path / "out", split) == encoded(tmp_path / "plain", split)
    assert "out is already complete\n" in mix("a.jsonl=1").stdout
    assert "out already holds another dataset (the source differs)" in error_of(mix("a.jsonl=2", expect=2))


def test_duplicates_are_kept_without_a_mix(prepare, tmp_path):
    """With a mix, the validation split has each conversation once."""
    prepare(RECORDS)
    prepare(RECORDS, mix="chat.jsonl=1", files=None, out="mixed")
    plain, mixed = (Counter(map(str, encoded(tmp_path / out, "val"))) for out in ("out", "mixed"))
    assert set(plain.values()) == {2} and set(mixed.values()) == {1} and plain.keys() == mixed.keys()


def test_a_mix_of_files_and_a_hub_dataset(mix, tmp_path):
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", [{"prompt": "7000?", "completion": "No."}])
    write_jsonl(tmp_path / "files" / "test.jsonl", [{"prompt": f"{i}?", "completion": "Yes."} for i in range(900, 940)])
    with hub.serve(tmp_path / "files") as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        mix("a.jsonl=1", "some/chats::test=3", env=env)
    train, val = times(tmp_path / "out", "train"), times(tmp_path / "out", "val")
    assert {train[i] for i in range(900, 940) if i not in val} == {3} and 7000 not in train | val
    hub_meta = meta(tmp_path / "out")["source"]["mix"][1]
    assert hub_meta == {"weight": 3, "dataset": "some/chats", "name": None, "revision": hub.REVISION, "split": "test"}


def test_a_mix_can_be_finetuned_on(mix, run_script, pretrained, tmp_path):
    mix("a.jsonl=2.5", "b.jsonl=0.5")
    flags = ("--init", pretrained, "--data", "out", "--out", tmp_path / "run", "--steps", 2, "--batch_tokens", 256)
    assert "step 2" in run_script("finetune.py", *flags, "--micro_batch_size", 2).stdout


WEIGHT = "expected SOURCE=WEIGHT, with a weight above 0 and at most 100"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl"], f"--mix a.jsonl: {WEIGHT}"),
        (["a.jsonl=1", "a.jsonl=0"], f"--mix a.jsonl=0: {WEIGHT}"),
        (["a.jsonl=nan"], f"--mix a.jsonl=nan: {WEIGHT}"),
        (["a.jsonl=-1"], f"--mix a.jsonl=-1: {WEIGHT}"),
        (["a.jsonl=1000"], f"--mix a.jsonl=1000: {WEIGHT}"),
        (["=1"], f"--mix =1: {WEIGHT}"),
        (["gone/a.jsonl=1"], "--mix gone/a.jsonl: no such file"),
        (["*.txt=1"], "--mix *.txt: no such file"),
        (
            ["a.jsonl=1", "--files", "b.jsonl"],
            "--files, --mix and --dataset with --name and --split cannot be combined",
        ),
        (["a.jsonl=1", "--split", "test"], "--files, --mix and --dataset with --name and --split cannot be combined"),
    ],
)
def test_a_mix_that_cannot_be_used(mix, tmp_path, arguments, message):
    assert error_of(mix(*arguments, expect=2)).startswith(message)
    assert not (tmp_path / "out").exists()


# ---- preview ---------------------------------------------------------------------------------------------------------


def test_preview_prints_the_first_conversations(prepare, tmp_path):
    records = [{"prompt": f"{i}? ä👍", "completion": f"Yes, {i}.\n\tß"} for i in range(3)]
    done = prepare(records, preview=2)
    expected = "<|endoftext|><|user|>{}? ä👍<|end|><|assistant|>«Yes, {}.\n\tß<|end|>»\n"
    for i in range(2):
        figures = f"--- chat.jsonl line {i + 1}: 12 of 25 tokens in the loss\n"
        assert figures + expected.format(i, i) in done.stdout
    assert "2? " not in done.stdout and done.stderr == ""
    assert done.stdout.endswith("preview: tokens in the loss are between « and »; out was not written\n")
    assert not (tmp_path / "out").exists()


def test_preview_with_gpt2_tokens(prepare, gpt2_tokenizer):
    """Characters of several tokens are printed whole."""
    done = prepare([{"prompt": "ᚠᛇᚻ 🦜 日本語", "completion": "🦜ᛦ"}], preview=1, tokenizer="gpt2")
    assert "<|user|>ᚠᛇᚻ 🦜 日本語<|end|><|assistant|>«🦜ᛦ<|end|>»\n" in done.stdout


def test_preview_escapes_control_characters(prepare):
    """Text that looks like a special token or a mark is escaped too."""
    record = {"prompt": "\x1b[2J\x07\r\u202e«a»<|end|>", "completion": "\x9b31m»"}
    done = prepare([record], preview=1)
    expected = r"<|user|>\x1b[2J\x07\r\u202e\xaba\xbb\x3c|end|><|end|><|assistant|>«\x9b31m\xbb<|end|>»"
    assert expected + "\n" in done.stdout


def test_preview_prints_truncated_conversations(prepare):
    """A character may be cut in the middle."""
    done = prepare([{"prompt": "ä" * 60, "completion": "Yes."}], preview=1, block_size=64)
    assert f"<|user|>{'ä' * 27}\\xc3<|end|><|assistant|>«Yes.<|end|>»\n" in done.stdout
    assert "\n1 record, 1 truncated to 64 tokens" in done.stdout


def test_preview_of_a_mix_prints_every_source(mix):
    done = mix("a.jsonl=1", "b.jsonl=2", "--preview", "1")
    assert "--- a.jsonl line 1: " in done.stdout and "--- b.jsonl line 1: " in done.stdout


@pytest.mark.parametrize(("no_color", "marks"), [("", "\x1b[32mYes.<|end|>\x1b[0m"), ("1", "«Yes.<|end|>»")])
def test_preview_is_in_color_on_a_terminal(tmp_path, no_color, marks):
    write_jsonl(tmp_path / "chat.jsonl", [{"prompt": "«Who?»", "completion": "Yes."}])
    terminal, stdout = pty.openpty()
    command = [sys.executable, str(ROOT / SCRIPT), "--files", "chat.jsonl", "--tokenizer", "bytes", "--preview", "1"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"NO_COLOR": no_color}, stdout=stdout, check=True)
    os.close(stdout)
    text = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert f"<|assistant|>{marks}\r\n" in text
    assert ("«Who?»" in text) == (no_color == "")


# ---- errors ----------------------------------------------------------------------------------------------------------


NO_ANSWER = "the conversation has no message of the assistant"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hello?"}]}, f": {NO_ANSWER}"),
        ({"prompt": [FINE], "completion": [{"role": "user", "content": "?"}]}, f": {NO_ANSWER}"),
        ({"messages": []}, f": {NO_ANSWER}"),
        ({"messages": [FINE, {"role": "tool", "content": "5"}]}, ", message 2 of messages: role 'tool'; expected one"),
        ({"conversations": [{"from": "human"}]}, ", message 1 of conversations: the content of a message must be text"),
        ({"prompt": "Who?", "completion": 5}, ": completion must be a list of messages"),
        ({"text": "Who?", "label": "Jane."}, ": unknown layout: its fields are text, label; supported are"),
        ({"instruction": "Who?", "answer": "Jane."}, ": no text in field 'response' or 'output'; the record has: inst"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(prepare, tmp_path, record, message):
    """test_chat_format.py has the other layout errors."""
    assert error_of(prepare([RECORDS[0], record], expect=2)).startswith(f"chat.jsonl line 2{message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], r"the source has 0 usable conversations \(0 records, .*\), but each split needs one"),
        (
            [{"instruction": "", "response": ""}],
            r"the source has 0 usable .*\(1 record, .* 1 skipped \(empty answer\)\)",
        ),
        (
            [{"instruction": "Who?", "response": "y" * 2000}],
            r"the source has 0 usable .*\(1 record, .* 1 dropped \(answer too long",
        ),
        (RECORDS[:1], r"the source has 1 usable conversation \(1 record, "),
        (RECORDS[:1] * 2, "all 2 conversations are equal, but each split needs its own: give more data"),
    ],
)
def test_a_source_with_too_little(prepare, tmp_path, records, message):
    assert re.match(message, error_of(prepare(records, filling=False, expect=2)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"val_fraction": 0}, "--val_fraction is 0.0: it must be above 0 and at most 0.5"),
        ({"val_fraction": "nan"}, "--val_fraction is nan: it must be above 0 and at most 0.5"),
        ({"preview": 0}, "--preview is 0: it must be at least 1"),
        ({"split": "test"}, "--split test: --files has no folder of several splits saved by datasets.save_to_disk"),
        (
            {"files": None, "split": "test", "mix": "chat.jsonl=1"},
            "--files, --mix and --dataset with --name and --split",
        ),
        ({"block_size": 15}, "--block_size is 15: it must be at least 16"),
        ({"tokenizer": "gpt3"}, "there is no tokenizer 'gpt3'"),
        ({"files": "text.txt"}, "--files text.txt: no such file"),
        ({"val_files": "gone.jsonl", "val_fraction": None}, "--val_files gone.jsonl: no such file"),
        ({"val_files": "chat.jsonl"}, "--val_files and --val_fraction cannot be combined"),
    ],
)
def test_a_value_that_cannot_be_used(prepare, tmp_path, flags, message):
    assert error_of(prepare([], expect=2, **flags)).startswith(message)
    assert not (tmp_path / "out").exists()


def test_txt_files_are_refused(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("Hello")
    assert error_of(prepare([], files="a.txt", expect=2)).startswith("--files a.txt: a file must end in .json")


def test_malformed_json_names_file_and_line(run_script, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(RECORDS[0]) + '\n{"instruction": ')
    done = run_script(SCRIPT, "--files", "bad.jsonl", "--tokenizer", "bytes", "--out", "out", expect=2)
    assert error_of(done).startswith("bad.jsonl line 2: malformed JSON")


def test_another_dataset_in_the_folder_is_kept(prepare, tmp_path):
    prepare([])
    before = contents(tmp_path / "out")
    assert "block_size is 1024, not 512" in error_of(prepare([], block_size=512, expect=2))
    assert contents(tmp_path / "out") == before


def test_a_message_after_the_last_answer_is_dropped(prepare, tmp_path):
    """Some published conversations end with the user."""
    turns = [("user", "Who?"), ("assistant", "Jane."), ("user", "Thanks! " * 20)]
    prepare([{"messages": [{"role": role, "content": content} for role, content in turns]}], block_size=100)
    assert "<|endoftext|><|user|>Who?<|end|><|assistant|>{Jane.<|end|>}" in conversations(tmp_path / "out")


# ---- in this process: small sources, runs, file formats --------------------------------------------------------------


@pytest.fixture
def here(prepare_in_process):
    """Run the script in this process, without a GPU, on files in the working directory."""
    return functools.partial(prepare_in_process, prepare_dolly)


def test_of_a_few_conversations_the_one_with_the_lowest_hash_is_for_validation(here, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", RECORDS[:5])
    here("a.jsonl", val_fraction=0.001)
    (validation,) = encoded(tmp_path / "out", "val")
    question = {record["instruction"]: record for record in RECORDS[:5]}
    messages = {text: chat.to_messages("", record)[0] for text, record in question.items()}
    hashes = {text: shards.hash_document(json.dumps(value).encode()) for text, value in messages.items()}
    assert min(hashes, key=hashes.get) in format_marked(*validation)
    assert len(encoded(tmp_path / "out", "train")) == 4
    assert meta(tmp_path / "out")["val_fraction"] == 0.001 and meta(tmp_path / "out")["val_fraction_used"] > 0.001
    printed = capsys.readouterr().out
    assert "val: 1 conversation, " in printed
    assert "the 1 conversation with the lowest hash, because too few fell below --val_fraction 0.001\n" in printed


def test_csv_and_saved_datasets(here, tmp_path):
    """Of several splits, --split selects one."""
    rows = [{"question": f"What is {i},\nplus 1?", "answer": f'It is "{i + 1}".'} for i in range(30)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    write_jsonl(tmp_path / "a.jsonl", rows)
    whole, other = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows[:1])
    datasets.DatasetDict({"train": other, "test": whole}).save_to_disk("saved")
    for name, flags in {"a.jsonl": {}, "a.csv": {}, "saved": {"split": "test"}}.items():
        here(name, **flags, out=f"{name}.out")
    plain, *others = (conversations(tmp_path / f"{name}.out") for name in ("a.jsonl", "a.csv", "saved"))
    assert len(plain) == 30 and others == [plain, plain]


def make_run(name: str, age: int, tokenizer: str = "bytes", init: bool = False, **sizes: int) -> None:
    """Write the metadata of a run's checkpoint."""
    file = Path("runs", name, "step_000010", "meta.json")
    file.parent.mkdir(parents=True)
    identity = {"lr": 1} | ({"init": "x"} if init else {})
    model = {"block_size": 1024, "n_embd": 768} | sizes
    meta = {"version": runs.FORMAT_VERSION, "step": 10, "files": {}, "metrics": {}, "config": {}, "source": {}}
    meta |= {"tokenizer": tokenizer, "identity": identity, "model": model, "history": []}
    write_manifest(file, meta)
    os.utime(file, (2_000_000_000 - age,) * 2)


def test_the_newest_pretrained_run_gives_the_context_and_the_next_command(here, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    here("a.jsonl", out="data/new")
    printed = capsys.readouterr().out
    assert printed.startswith("--block_size 1024: no run under runs has bytes tokens yet\n")
    first = "next: python prepare_fineweb.py --tokenizer bytes\n"
    assert printed.endswith(first)
    make_run("finetuned", age=1, init=True)
    make_run("gpt2-tokens", age=2, tokenizer="gpt2")
    make_run("corrupt", age=3)
    Path("runs/corrupt/step_000010/meta.json").write_text("{")
    make_run("small one", age=4, block_size=256, n_embd=128)
    make_run("gpt2", age=5)
    here("a.jsonl", out="data/mine")
    printed = capsys.readouterr().out
    assert printed.startswith("--block_size 256: the context of runs/small one\n")
    assert meta(tmp_path / "data/mine")["block_size"] == 256
    command = "next: python finetune.py --init 'runs/small one' --data data/mine --out runs/mine"
    assert printed.endswith(f"{command} --batch_tokens 256 --epochs 30 --lr 1e-3\n")
    here("a.jsonl", out="data/gpt2", block_size=1024)  # too long for the newest
    printed = capsys.readouterr().out
    assert not printed.startswith("--block_size")
    command = "next: python finetune.py --data data/gpt2 --out runs/gpt2_chat"
    assert printed.endswith(f"{command} --batch_tokens 1024 --epochs 30\n")
    here("a.jsonl", out="data/dolly", block_size=1024)
    assert capsys.readouterr().out.endswith("next: python finetune.py --batch_tokens 1024 --epochs 30\n")
    here("a.jsonl", out="data/dolly", block_size=1024)
    printed = capsys.readouterr().out
    assert printed.startswith("data/dolly is already complete\ntrain: ")
    assert printed.endswith("next: python finetune.py --batch_tokens 1024 --epochs 30\n")
    (tmp_path / "data" / "dolly" / "val_tokens.npy").unlink()
    with pytest.raises(UserError, match=r"val_tokens\.npy is missing: delete data/dolly and prepare it again"):
        here("a.jsonl", out="data/dolly", block_size=1024)


GPT2, DEMO = {"block_size": 1024, "n_embd": 768}, {"block_size": 96, "n_embd": 128}


@pytest.mark.parametrize(
    ("n_conversations", "n_tokens", "model", "on_gpu", "flags"),
    [
        (14_700, 3_000_000, GPT2, True, ""),
        (14_700, 3_000_000, DEMO, True, "--lr 1e-3"),
        (14_700, 3_000_000, DEMO, False, "--batch_tokens 4032 --epochs 3 --lr 1e-3"),
        (1_960, 120_000, GPT2, True, "--batch_tokens 4096 --epochs 10"),
        (196, 12_000, GPT2, True, "--batch_tokens 1024 --epochs 26"),
        (196, 12_000, GPT2 | {"block_size": 8192}, True, "--batch_tokens 8192 --epochs 30"),
    ],
)
def test_suggested_flags_fit_the_conversations_and_the_device(n_conversations, n_tokens, model, on_gpu, flags):
    assert suggest_finetuning(n_conversations, n_tokens, model, on_gpu) == flags


def test_files_are_checked_before_the_vocabulary_is_downloaded(here, monkeypatch):
    monkeypatch.setattr(prepare_dolly, "load_tokenizer", mock.Mock(side_effect=UserError("no network")))
    with pytest.raises(UserError, match=r"--files a\.jsonl: no such file in /"):
        here("a.jsonl", tokenizer="gpt2")
