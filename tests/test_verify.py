"""verify.py: one table for runs, checkpoints and dataset folders, and exit code 2 if a file is corrupt."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from minigpt.runs import read_val_loss
from minigpt.tokenizer import Tokenizer

SCRIPT = "verify.py"


@pytest.fixture
def runs(pretrained, tmp_path) -> Path:
    """A folder with two copies of a run, and a file."""
    for name in ("one", "two"):
        shutil.copytree(pretrained, tmp_path / "runs" / name)
    (tmp_path / "runs" / "picture.png").write_text("not a run")
    return tmp_path / "runs"


def flip_bit(file: Path, position: int = 200) -> None:
    """Change one bit, which changes no length: only the checksum finds it."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def states(done) -> dict[str, str]:
    """Return the last column of the table by the first."""
    return {line.split()[0]: line.split("  ")[-1] for line in done.stdout.splitlines()[1:]}


def test_checkpoints_are_listed(run_script, pretrained, runs):
    """All runs of a folder, one run, or one checkpoint: loss, size, state, and which one is the best."""
    losses = {step: read_val_loss(pretrained / f"step_{step:06d}") for step in (6, 12)}
    assert losses[12] < losses[6]
    lines = run_script(SCRIPT).stdout.splitlines()
    assert run_script(SCRIPT, "runs/").stdout.splitlines() == lines and len(lines) == 5
    assert lines[0].split() == ["folder", "validation", "loss", "size", "saved", "state"]
    assert len({len(line.split("  best")[0]) for line in lines[2::2]}) == 1  # the columns are aligned
    for name, (first, second) in {"one": lines[1:3], "two": lines[3:5]}.items():
        assert first.split()[:2] == [f"runs/{name}/step_000006", f"{losses[6]:.4f}"] and first.endswith("  whole")
        assert second.split()[:2] == [f"runs/{name}/step_000012", f"{losses[12]:.4f}"]
        assert second.endswith("  best, whole")
    size = sum(file.stat().st_size for file in (pretrained / "step_000006").iterdir()) / 1e6
    assert f" {size:,.1f} MB  {time.strftime('%Y-')}" in lines[1]
    assert run_script(SCRIPT, "runs/two").stdout.splitlines()[1:] == lines[3:]
    assert run_script(SCRIPT, "runs/two/step_000012").stdout.splitlines()[1:] == lines[4:]
    (alone,) = run_script(SCRIPT, ".", cwd=runs / "one/step_000006").stdout.splitlines()[1:]
    assert alone.startswith(". ") and alone.endswith("  whole")


def test_a_run_may_be_called_as_a_checkpoint(run_script, runs):
    (runs / "one").rename(runs / "step_5")
    expected = [f"runs/step_5/step_{step:06d}" for step in (6, 12)]
    assert list(states(run_script(SCRIPT, "runs/step_5"))) == expected
    assert list(states(run_script(SCRIPT)))[:2] == expected


def test_a_vocabulary_is_read(run_script, fails, text_data, tmp_path):
    tokenizer = Tokenizer("gpt2", {bytes([byte]): byte for byte in range(256)} | {b"th": 256})
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    tokenizer.save(tmp_path / "data" / "tokenizer")
    (tmp_path / "data" / "tokenizer" / "meta.json").write_text('{"kind": "tokenizer"}')
    shutil.copytree(text_data, tmp_path / "data" / "text")
    assert states(run_script(SCRIPT, "data")) == {"data/text": "whole", "data/tokenizer": "whole"}
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "1 of 2 are corrupt" in fails(SCRIPT, "data")


def test_a_checkpoint_without_metadata_is_listed(run_script, runs):
    (runs / "one" / "step_000012" / "meta.json").unlink()
    found = states(run_script(SCRIPT, "runs/one", expect=2))
    assert found == {
        "runs/one/step_000006": "best, whole",
        "runs/one/step_000012": "not a checkpoint: it has no meta.json",
    }


def test_corrupt_checkpoints_are_listed_and_fail(run_script, fails, pretrained, tmp_path):
    for name in "abcd":
        shutil.copytree(pretrained, tmp_path / name)
    with open(tmp_path / "a/step_000006/model.safetensors", "r+b") as file:
        file.write(b"?")
    (tmp_path / "b/step_000006/train_state.safetensors").unlink()
    (tmp_path / "c/step_000012/meta.json").write_text("{")
    done = run_script(SCRIPT, tmp_path, expect=2)
    found = [line.split("  ")[-1] for line in done.stdout.splitlines()[1:]]
    assert found[0] == "model.safetensors is corrupt or truncated: its checksum is wrong"
    assert found[2] == "train_state.safetensors is missing"
    assert found[4] == "best, whole" and found[5].startswith("meta.json is corrupt: ")
    assert found[1::6] == ["best, whole", "best, whole"] and found[6] == "whole"
    assert done.stderr == "error: 3 of 8 are corrupt: delete them, and prepare datasets again\n"
    assert "nowhere: no such folder" in fails(SCRIPT, "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoints" in fails(SCRIPT, tmp_path / "empty")


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_every_file_of_a_dataset_is_compared_with_its_checksum(run_script, request, tmp_path, kind):
    shutil.copytree(request.getfixturevalue(f"{kind}_data"), tmp_path / "data")
    (line,) = run_script(SCRIPT, "data").stdout.splitlines()[1:]
    size = sum(file.stat().st_size for file in (tmp_path / "data").iterdir()) / 1e6
    assert line.split()[:4] == ["data", "-", f"{size:,.1f}", "MB"] and line.endswith("  whole")
    for name in sorted(file.name for file in (tmp_path / "data").glob("*.npy")):
        shutil.copytree(tmp_path / "data", tmp_path / name)
        flip_bit(tmp_path / name / name, position=-1 if kind == "chat" else 200)
    names = [file.name for file in tmp_path.glob("*.npy")]
    done = run_script(SCRIPT, "data", *names, expect=2)
    expected = {name: f"{name} is corrupt: its checksum is wrong; delete {name} and prepare it again" for name in names}
    assert states(done) == {"data": "whole"} | expected and len(names) >= 3
    assert (
        done.stderr == f"error: {len(names)} of {len(names) + 1} are corrupt: delete them, and prepare datasets again\n"
    )


def test_missing_and_truncated_dataset_files_are_named(run_script, text_data, tmp_path):
    for name in ("missing", "truncated", "shorter"):
        shutil.copytree(text_data, tmp_path / name)
    (tmp_path / "missing" / "train_000001.npy").unlink()
    shard = tmp_path / "truncated" / "train_000001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    np.save(tmp_path / "shorter" / "train_000001.npy", np.arange(3, dtype=np.uint16))
    found = states(run_script(SCRIPT, "missing", "truncated", "shorter", expect=2))
    assert found["missing"].startswith("train_000001.npy is missing: ")
    assert found["truncated"].startswith("train_000001.npy is corrupt or truncated: ")
    assert found["shorter"].startswith("train_000001.npy has 3 entries, expected 9999 from its meta.json: ")


def test_runs_and_datasets_share_one_table(run_script, runs, text_data, chat_data, tmp_path):
    shutil.copytree(text_data, tmp_path / "data" / "text")
    shutil.copytree(chat_data, tmp_path / "data" / "chat")
    paths = ("runs/one", "data/text", "runs/two/step_000012", "data/chat")
    found = states(run_script(SCRIPT, *paths))
    assert list(found.items()) == [
        ("runs/one/step_000006", "whole"),
        ("runs/one/step_000012", "best, whole"),
        ("data/text", "whole"),
        ("runs/two/step_000012", "best, whole"),
        ("data/chat", "whole"),
    ]
    flip_bit(runs / "one/step_000012/model.safetensors", -1)
    flip_bit(tmp_path / "data/text/train_000001.npy")
    done = run_script(SCRIPT, *paths, expect=2)
    corrupt = {name: state for name, state in states(done).items() if not state.endswith("whole")}
    assert corrupt == {
        "runs/one/step_000012": "best, model.safetensors is corrupt or truncated: its checksum is wrong",
        "data/text": "train_000001.npy is corrupt: its checksum is wrong; delete data/text and prepare it again",
    }
    assert done.stderr.startswith("error: 2 of 5 are corrupt")


def test_folders_without_checksums_are_refused(fails, runs, tmp_path):
    """A missing folder, a folder of datasets, and bare shards; nothing is verified before that."""
    np.save(tmp_path / "shards_train_000001.npy", np.arange(3, dtype=np.uint16))
    np.save(tmp_path / "shards_val_000001.npy", np.arange(3, dtype=np.uint16))
    assert fails(SCRIPT, "runs", "nowhere") == (
        "nowhere: no such folder; give a run, a folder of runs, a checkpoint or a dataset folder"
    )
    assert fails(SCRIPT, ".") == ". holds no checkpoints and no meta.json: there are no checksums to compare"
