"""The structure of the repository: which file imports which, names on the command line, and where scripts run."""

import argparse
import ast
import importlib
import signal
import sys
from pathlib import Path

import memory
import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

SCRIPTS = sorted(file.stem for file in ROOT.glob("*.py") if file.stem != "model")
MODULES = sorted(f"minigpt.{file.stem}" for file in ROOT.glob("minigpt/*.py") if file.stem != "__init__")
DISTRIBUTED_SCRIPTS = ("pretrain", "finetune", "evaluate")
TRAINING_MODULES = ("dataset", "hellaswag", "metrics", "optim", "run", "stragglers", "training")
TRAINING_MODULES = {f"minigpt.{name}" for name in TRAINING_MODULES}


def imports(name: str) -> set[str]:
    """Return the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & set(MODULES) or {node.module}
    return found


def reachable(name: str) -> set[str]:
    """Return the project's files that a file imports, directly or not."""
    found, queue = set(), [name]
    while queue:
        new = imports(queue.pop()) & {*MODULES, *SCRIPTS, "model"} - found
        found |= new
        queue += new
    return found


def test_model_imports_torch_only():
    ours = {*MODULES, *SCRIPTS}
    assert {name.split(".")[0] for name in imports("model")} <= {"torch", *sys.stdlib_module_names} - ours


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_no_script_and_no_circle(name):
    assert not reachable(name) & {*SCRIPTS, name}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_no_script(name):
    assert not imports(name) & set(SCRIPTS)


def test_generate_reaches_no_training_module():
    assert "minigpt.inference" in reachable("generate")
    assert not reachable("generate") & TRAINING_MODULES


@pytest.mark.parametrize("name", ["generate", "minigpt.cli"])
def test_importing_is_cheap(run_script, tmp_path, name):
    """--help of generate.py does not wait for torch."""
    check = tmp_path / "check.py"
    check.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}; print(sorted(sys.modules))")
    assert not {"torch", "tyro", "tqdm"} & set(ast.literal_eval(run_script(check, fresh=True).stdout))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_in_any_folder(run_script, tmp_path, script):
    """The modules are found beside the script, not in the current folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = run_script(Path(ROOT / f"{script}.py"), "--help", cwd=folder, fresh=script == "generate")
    assert done.stdout.startswith(importlib.import_module(script).__doc__.strip().splitlines()[0][:40])
    assert not list(folder.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_imports_is_one_line(run_script, tmp_path, script):
    """The first package that a script imports sends itself the signal."""
    for package in ("datasets", "matplotlib", "numpy", "torch", "tyro"):
        (tmp_path / f"{package}.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    done = run_script(f"{script}.py", expect=-signal.SIGINT, fresh=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.stderr == "error: interrupted\n"


@pytest.mark.parametrize("script", DISTRIBUTED_SCRIPTS)
def test_torchrun_swallows_no_flag(script):
    """Up to Python 3.11, torchrun consumes a script flag that is a prefix of one of its flags."""
    fields = importlib.import_module(script).Config.__dataclass_fields__
    flags = [f"--{prefix}{name}" for name in fields for prefix in ("", "no_")]
    parser: argparse.ArgumentParser = get_args_parser()
    theirs = [option for action in parser._actions for option in action.option_strings]
    assert len(theirs) > 30
    assert not [(flag, option) for flag in flags for option in theirs if option.startswith(flag)]
    arguments = [argument for flag in flags for argument in (flag, "1")]
    assert parser.parse_args(["script.py", *arguments]).training_script_args == arguments


def test_memory_tables_are_those_of_the_docs(capsys):
    memory.main()
    lines = capsys.readouterr().out.splitlines()
    docs = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    assert len(lines) == 13 and set(lines) <= set(docs)
