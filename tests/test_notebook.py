"""The notebook for Colab: every cell runs, at tiny sizes, on the datasets of a hub on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = ROOT / "docs" / "colab.ipynb"
SIZES = {"DATASET_TOKENS": 20_000, "MODEL": "tiny", "BLOCK_SIZE": 64, "BATCH_TOKENS": 256, "STEPS": 8, "EPOCHS": 1}
README = """---
configs:
- {config_name: default, default: true, data_files: data/dolly.jsonl}
- {config_name: sample-10BT, data_files: data/fineweb.jsonl}
---
"""


def find_cell(notebook: nbformat.NotebookNode, cell_id: str) -> nbformat.NotebookNode:
    return next(cell for cell in notebook.cells if cell.id == cell_id)


def read_notebook(**parameters: object) -> nbformat.NotebookNode:
    """Return the notebook with other values in its parameters cell."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in parameters.items():
        cell.source, n_found = re.subn(rf"(?m)^{name} = .*", f"{name} = {value!r}", cell.source)
        assert n_found == 1
    return notebook


def output_of(cell: nbformat.NotebookNode) -> str:
    """Return what a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Return a function that executes a notebook in a folder. `python` and `pip` are those of the tests."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()

    return run


def make_repository(folder: Path) -> None:
    """Commit a copy of the files that the notebook needs to a new git repository."""
    shutil.copytree(ROOT / "minigpt", folder / "minigpt", ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(file, folder)
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message", "copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


def make_datasets(folder: Path) -> None:
    """Write a text dataset and a chat dataset as two configurations of every dataset on the hub."""
    folder.mkdir()
    (folder / "README.md").write_text(README)
    texts = [{"text": f"Document {i} counts {i}, {i + 1}, {i + 2} and so on. " * 20} for i in range(400)]
    chats = [{"instruction": f"After {i}?", "context": "", "response": f"{i + 1} comes next."} for i in range(200)]
    for name, records in {"fineweb": texts, "dolly": chats}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_every_cell_runs(execute, gpt2_tokenizer, tmp_path, monkeypatch):
    """In an empty folder; then the training cell runs again."""
    make_repository(tmp_path / "repository")
    make_datasets(tmp_path / "files")
    runs = tmp_path / "drive" / "runs"
    notebook = read_notebook(**SIZES, REPOSITORY=str(tmp_path / "repository"), RUNS=str(runs))
    notebook.cells.append(nbformat.v4.new_code_cell(find_cell(notebook, "pretrain").source, id="pretrain-again"))
    with hub.serve(tmp_path / "files") as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "PIP_NO_INDEX": "1"}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        execute(notebook, tmp_path / "content")
    printed = {cell.id: output_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert not [output for output in printed.values() if re.search("error:|Traceback", output, re.IGNORECASE)]
    assert printed["install"].split()[-2:] == ["GPU:", "False"]
    assert "data/dolly: 200 records" in printed["data"] and "data/fineweb: 20,0" in printed["data"]
    assert f"{runs / 'gpt2'}: 8 steps, 0 completed" in printed["pretrain"] and "done: 8 steps" in printed["pretrain"]
    [picture] = [output.data for output in find_cell(notebook, "curves").outputs if "data" in output]
    assert "image/png" in picture
    assert "1.00 epochs, 0 completed" in printed["finetune"] and "done: " in printed["finetune"]
    assert printed["ask"].strip()
    assert "8 steps, 8 completed" in printed["pretrain-again"] and "done: 8 steps" in printed["pretrain-again"]


def test_the_checkout_around_the_notebook_is_used(execute, tmp_path):
    (tmp_path / "pretrain.py").touch()
    notebook = read_notebook()
    notebook.cells = [find_cell(notebook, cell_id) for cell_id in ("parameters", "checkout")]
    notebook.cells.append(nbformat.v4.new_code_cell("print(Path.cwd())"))
    execute(notebook, tmp_path / "docs")
    assert output_of(notebook.cells[-1]).strip() == str(tmp_path)


def test_the_address_of_the_repository_is_required(execute, tmp_path):
    with pytest.raises(CellExecutionError, match="error: REPOSITORY is empty: set it to the address"):
        execute(read_notebook(), tmp_path / "content")


def test_the_notebook_has_no_outputs():
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
