"""Datasets prepared in parts: the same bytes in any order, and one dataset for every other script."""

import json
import shutil
import signal

import hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soak
from test_prepare_fineweb import documents, write_jsonl

import prepare_fineweb
import verify
from minigpt import shards
from minigpt.cli import Progress, UserError
from minigpt.dataset import TokenDataset

TEXTS = [[f"File {i}, document {j}: {j * j}." for j in range(40)] for i in range(5)]


@pytest.fixture
def prepare_part(prepare_in_process, tmp_path):
    """Return a function that prepares a part of five files."""
    for i, texts in enumerate(TEXTS):
        write_jsonl(tmp_path / f"{i}.jsonl", texts)

    def prepare(part: str | None, out: str = "out", **flags) -> None:
        flags = {"val_fraction": 0.2, "shard_tokens": 1000} | flags
        prepare_in_process(prepare_fineweb, "*.jsonl", part=part, out=out, **flags)

    return prepare


def test_the_order_of_the_parts_does_not_matter(prepare_part, tmp_path, capsys):
    for part in (1, 2, 3):
        assert not (tmp_path / "out" / "meta.json").exists()
        prepare_part(f"{part}/3")
    assert "part 2 of 3 is complete; the last one to finish completes out" in capsys.readouterr().out
    for part in (3, 1, 2):
        prepare_part(f"{part}/3", "other")
    files = [[path for path in sorted((tmp_path / out).rglob("*")) if path.is_file()] for out in ("out", "other")]
    assert len(files[0]) > 12
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_parts_have_the_documents_of_the_whole(prepare_part, tmp_path):
    prepare_part(None, "whole")
    for part in (1, 2, 3):
        prepare_part(f"{part}/3")
    whole, merged = (shards.read_meta(tmp_path / out, "text") for out in ("whole", "out"))
    for split in shards.SPLITS:
        assert merged[split]["documents"] == whole[split]["documents"]
        assert merged[split]["tokens"] == whole[split]["tokens"]
    assert [file["file"] for file in merged["source"]["files"]] == [f"{i}.jsonl" for i in range(5)]
    texts = [sorted(documents(tmp_path / out)[split]) for split in shards.SPLITS for out in ("whole", "out")]
    assert texts[0] == texts[1] and texts[2] == texts[3]
    data = TokenDataset(tmp_path / "out", 16)
    assert data.n_rows["train"] == (whole["train"]["tokens"] - 1) // 16
    verify.verify_dataset(tmp_path / "out", Progress(None, "file"))


def test_a_part_that_is_prepared_again_completes_the_dataset(prepare_part, tmp_path):
    """As after a crash between the end of the last part and the merge."""
    for part in (1, 2):
        prepare_part(f"{part}/2")
    expected = (tmp_path / "out" / "meta.json").read_bytes()
    (tmp_path / "out" / "meta.json").unlink()
    prepare_part("1/2")
    assert (tmp_path / "out" / "meta.json").read_bytes() == expected


@pytest.mark.parametrize("kill", [3, 20, 40])
def test_a_killed_part_resumes(tmp_path, kill):
    """It is killed before one of its system calls, and the other part ends before it resumes."""
    for i, texts in enumerate(TEXTS):
        write_jsonl(tmp_path / f"{i}.jsonl", texts)
    flags = ("--files", tmp_path / "*.jsonl", "--tokenizer", "bytes", "--val_fraction", 0.2, "--shard_tokens", 1000)

    def prepare(out: str, part: str, kill: int | None = None) -> int:
        return soak.launch("prepare_fineweb.py", *flags, "--out", tmp_path / out, "--part", part, kill=kill).returncode

    assert [prepare("peace", part) for part in ("1/2", "2/2")] == [0, 0]
    assert prepare("out", "1/2", kill) == -signal.SIGKILL
    assert [prepare("out", part) for part in ("2/2", "1/2")] == [0, 0]
    assert (tmp_path / "out" / "meta.json").read_bytes() == (tmp_path / "peace" / "meta.json").read_bytes()


def test_parts_of_a_hub_dataset(run_script, tmp_path):
    (tmp_path / "files").mkdir()
    for i, texts in enumerate(TEXTS[:3]):
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, tmp_path / "files" / f"train-{i}-of-3.parquet")
    flags = ("--dataset", "some/texts", "--tokenizer", "bytes", "--val_fraction", 0.2, "--out", "out")
    with hub.serve(tmp_path / "files") as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        for part in (2, 1):
            run_script("prepare_fineweb.py", *flags, "--part", f"{part}/2", env=env)
        wrong = run_script("prepare_fineweb.py", *flags, "--out", "four", "--part", "1/4", env=env, expect=2)
    assert "--part: 4 parts of 3 files: use at most one part for each file" in wrong.stderr
    found = documents(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(text for texts in TEXTS[:3] for text in texts)
    meta = json.loads((tmp_path / "out" / "part_001_of_002" / "meta.json").read_text())
    assert meta["train"]["documents"] + meta["val"]["documents"] == 80  # files 0 and 2


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_impossible_parts(prepare_part, part):
    with pytest.raises(UserError, match=f"--part {part}: expected INDEX/COUNT"):
        prepare_part(part)


def test_mistakes(prepare_part, tmp_path):
    with pytest.raises(UserError, match="6 parts of 5 files"):
        prepare_part("1/6")
    with pytest.raises(UserError, match="--part and --max_tokens cannot be combined"):
        prepare_part("1/2", max_tokens=100)
    prepare_part("1/2")
    with pytest.raises(UserError, match=r"part_002_of_002 has val_fraction 0\.3, .*part_001_of_002 has 0\.2"):
        prepare_part("2/2", val_fraction=0.3)
    shutil.rmtree(tmp_path / "out" / "part_002_of_002")
    prepare_part("2/2")
    with pytest.raises(UserError, match="out already holds another dataset"):
        prepare_part("1/3")


def test_a_validation_split_of_nothing(prepare_part, tmp_path):
    """A part may have none, but not all of them."""
    prepare_part("1/2", val_fraction=1e-9)
    with pytest.raises(UserError, match="the val split of all parts has 0 tokens, expected at least 17"):
        prepare_part("2/2", val_fraction=1e-9)


def test_names_outside_the_folder_are_refused(prepare_part, tmp_path):
    for part in (1, 2):
        prepare_part(f"{part}/2")
    np.save(tmp_path / "train_000000.npy", np.zeros(3, dtype=np.uint16))
    meta = shards.read_meta(tmp_path / "out", "text")
    for name in (
        "../train_000000.npy",
        "part_001_of_002/../../train_000000.npy",
        "other/train_000000.npy",
        "/etc/passwd",
    ):
        meta["train"]["files"][0]["file"] = name
        with pytest.raises(UserError, match="which is not a file in the folder or in a part of it"):
            shards.open_arrays(tmp_path / "out", meta)
