"""Damaged and hostile files: flipped bits and edited values end in one line, or change nothing.

`make soak` runs thousands of cases (FUZZ_EXAMPLES).
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import export
import verify
from minigpt import checkpoint, runs
from minigpt.cli import Progress, UserError
from minigpt.dataset import ChatDataset, TokenDataset
from minigpt.files import write_manifest
from minigpt.optim import build_optimizer
from minigpt.pretrained import PretrainedModel, load_pretrained
from minigpt.shards import inspect_folder, open_npy
from minigpt.tokenizer import Tokenizer, read_tokenizer
from model import GPT, GPTConfig

fuzz = settings(
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
VALUES = st.sampled_from(
    [None, True, -1, 0, 2**62, 2**70, 10**400, 0.5, math.nan, math.inf, "", "x", "../x", [], {}, [1], {"a": None}]
)
QUIET = Progress(None, "file", enabled=False)


def load_checkpoint(folder: Path) -> object:
    """Load everything that generation, resuming and the model card use; return what must not change."""
    loaded = load_pretrained(str(folder))
    optimizer = build_optimizer(loaded.model, 1e-3, 0.1)
    checkpoint.load_optimizer_state_dict(folder, runs.read_meta(folder), loaded.model, optimizer)
    export.model_card(loaded)
    runs.find_best(folder.parent)
    state = checkpoint.optimizer_state_dict(loaded.model, optimizer)
    return runs.read_meta(folder), {**loaded.model.state_dict(), **state}


def load_text(folder: Path) -> object:
    """Verify a dataset and read a batch."""
    verify.verify_dataset(folder, QUIET)
    data = TokenDataset(folder, 64)
    return data.fingerprint, data.batch("train", [0]).tokens


def load_chat(folder: Path) -> object:
    verify.verify_dataset(folder, QUIET)
    data = ChatDataset(folder, 64)
    return data.fingerprint, data.batch("train", [0]).tokens


@pytest.fixture(params=["checkpoint", "text", "chat"])
def folder_and_loader(request, pretrained, text_data, chat_data, tmp_path) -> tuple[Path, Callable[[Path], object]]:
    """Return a folder of each kind and the function that loads it."""
    folders = {"checkpoint": pretrained / "step_000012", "text": text_data, "chat": chat_data}
    loaders = {"checkpoint": load_checkpoint, "text": load_text, "chat": load_chat}
    shutil.copytree(folders[request.param], tmp_path / "run" / "step_000012")
    return tmp_path / "run" / "step_000012", loaders[request.param]


def assert_equal(found: object, expected: object) -> None:
    """Compare nested tuples and dicts of tensors and values."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_equal(found[name], expected[name])
    elif isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected or (found != found and expected != expected)


def test_flipped_bits_are_detected_or_harmless(folder_and_loader):
    folder, load = folder_and_loader
    expected = load(folder)
    files = sorted(file for file in folder.iterdir() if file.name != ".lock")

    @fuzz
    @given(st.data())
    def flip(data) -> None:
        file = data.draw(st.sampled_from(files))
        original = bytearray(file.read_bytes())
        # Half of the flips are in the first bytes, where the headers are.
        position = data.draw(st.integers(0, len(original) - 1) | st.integers(0, min(200, len(original) - 1)))
        damaged = bytearray(original)
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(damaged)
        try:
            with contextlib.suppress(UserError):
                assert_equal(load(folder), expected)
        finally:
            file.write_bytes(original)

    flip()


@pytest.fixture
def exported(tmp_path) -> Path:
    """Return a chat model with a trained vocabulary in Hugging Face's format, which has no checksums."""
    tokenizer = Tokenizer("gpt2", {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257})
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.chat_vocab_size, n_layer=2, n_head=2, n_embd=8))
    (tmp_path / "exported").mkdir()
    export.write_files(tmp_path / "exported", PretrainedModel(model, tokenizer, True, "runs/a/step_000001", []))
    load_hf_folder(tmp_path / "exported")
    return tmp_path / "exported"


def load_hf_folder(folder: Path) -> None:
    """Load a model and its tokenizer and use both."""
    read_tokenizer.cache_clear()
    loaded = load_pretrained(str(folder))
    tokens = loaded.tokenizer.encode("the cat\n\n  sat")[:16]
    loaded.model(torch.tensor([tokens]))
    loaded.tokenizer.decode(range(loaded.tokenizer.chat_vocab_size))


def test_flipped_bits_of_a_hugging_face_folder(exported):
    """Half of the flips are in the first bytes of a file, where the header of the weights is."""

    @fuzz
    @given(st.sampled_from(["config.json", "tokenizer.json", "model.safetensors"]), st.data())
    def flip(name: str, data) -> None:
        original = (exported / name).read_bytes()
        position = data.draw(st.integers(0, len(original) - 1) | st.integers(0, min(2000, len(original) - 1)))
        damaged = bytearray(original)
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
        (exported / name).write_bytes(damaged)
        try:
            with contextlib.suppress(UserError):
                load_hf_folder(exported)
        finally:
            (exported / name).write_bytes(original)

    flip()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_edited_values_of_a_hugging_face_folder(exported, name):
    content = json.loads((exported / name).read_text())
    paths = [path for path in places(content) if "vocab" not in path[:-1] or path[-1] in ("a", "the")]

    @fuzz
    @given(st.sampled_from(paths), VALUES | st.just("absent"))
    def edit(path: tuple, value: object) -> None:
        (exported / name).write_text(json.dumps(edit_value(content, path, value)))
        with contextlib.suppress(UserError):
            load_hf_folder(exported)

    edit()


def edit_value(content: dict, path: tuple, value: object) -> dict:
    """Return a copy of a JSON value with another value at a path, or with none if it is "absent"."""
    edited = json.loads(json.dumps(content))
    parent = edited
    for key in path[:-1]:
        parent = parent[key]
    if value == "absent":
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return edited


def places(value: object) -> list[tuple]:
    """Return the paths of all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in [(key,), *((key, *rest) for rest in places(item))]]


def test_edited_manifests_end_in_one_line(folder_and_loader):
    """Their checksum is right, as in a file that somebody prepared with care."""
    folder, load = folder_and_loader
    meta = json.loads((folder / "meta.json").read_text())
    meta.pop("checksum")
    paths = places(meta)

    @fuzz
    @given(st.sampled_from(paths), VALUES | st.just("absent"))
    def edit(path: tuple, value: object) -> None:
        write_manifest(folder / "meta.json", edit_value(meta, path, value))
        with contextlib.suppress(UserError):
            load(folder)
        with contextlib.suppress(UserError):
            inspect_folder(folder, {"kind": meta.get("kind"), "version": 1})

    edit()


@fuzz
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: ("{" + text + "}").encode()))
def test_log_rows_of_any_bytes_are_dropped_or_read(tmp_path_factory, line):
    folder = tmp_path_factory.getbasetemp()
    row = {"step": 1, "tokens": 2, "loss": 3.0}
    (folder / "log.jsonl").write_bytes(line + b"\n" + json.dumps(row).encode() + b"\n")
    assert list(runs.read_log(folder))[-1] == row


HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', 'fortran_order': False, 'shape': (8,), }"
HEADER = HEADER.ljust(127) + b"\n"


@fuzz
@given(st.integers(0, 127), st.integers(0, 7))
def test_flipped_bits_of_an_array_header(tmp_path_factory, position, bit):
    file = tmp_path_factory.getbasetemp() / "a.npy"
    damaged = bytearray(HEADER + bytes(range(16)))
    file.write_bytes(damaged)
    assert open_npy(file).tobytes() == bytes(range(16))
    damaged[position] ^= 1 << bit
    file.write_bytes(damaged)
    with contextlib.suppress(ValueError):
        assert open_npy(file).tobytes() == bytes(range(16))
