"""What only a GPU can show: the whole pipeline in bfloat16 and compiled, resumed and sampled."""

import re
import shutil

import pytest
import torch
from conftest import TRAIN, TUNE, read_log

import checkpoint
from runs import peak_flops
from training import Processes, find_dtype

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_pipeline_in_bfloat16_and_compiled(run_script, text_data, chat_data, tmp_path):
    """No flag names the device: it is found, with bfloat16 and compilation.  The losses agree with the CPU's."""
    often = ("--val_every", 4, "--save_every", 6)
    run_script("pretrain.py", "--data", text_data, "--run", "./gpu", *TRAIN, *often)
    cpu = ("--device", "cpu", "--no_compile")
    run_script("pretrain.py", "--data", text_data, "--run", "./cpu", *TRAIN, *often, *cpu)
    losses = [[row["loss"] for row in read_log(tmp_path / run) if "loss" in row] for run in ("gpu", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)

    shutil.rmtree(tmp_path / "gpu" / "step_000012")
    done = run_script("pretrain.py", "--data", text_data, "--run", "./gpu", *TRAIN, *often)
    assert "6 steps done" in done.stdout and "bfloat16 on cuda, compiled" in done.stdout
    resumed = [row["loss"] for row in read_log(tmp_path / "gpu") if "loss" in row]
    assert resumed == pytest.approx(losses[0], rel=1e-2)

    run_script("finetune.py", "--init", "./gpu", "--data", chat_data, "--run", "./chat", *TUNE)
    assert checkpoint.load(str(tmp_path / "chat")).chat
    run_script("generate.py", "--checkpoint", "./chat", "--prompt", "After 7?", "--num_samples", 4)


def test_a_micro_batch_size_is_found_and_kept(run_script, text_data, tmp_path):
    args = ("pretrain.py", "--data", text_data, "--run", "./run", "--model", "tiny", "--batch_tokens", 65_536)
    args = (*args, "--steps", 2, "--no_compile")
    assert "1,024 rows x 64 tokens x 1 processes x 1 micro-batches" in run_script(*args).stdout
    told = run_script(*args, "--dry_run").stdout
    assert re.search(r"memory +\d+% of the cuda's at most", told)


def test_peak_comes_from_the_data_sheet_or_a_measurement():
    device = torch.device("cuda", 0)
    procs = Processes(0, 1, device, find_dtype(None, device))
    flops, source = peak_flops(procs)
    assert 1e12 < flops < 1e16 and ("data sheet" in source or "measured" in source)
