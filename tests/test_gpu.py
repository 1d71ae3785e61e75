"""What only a GPU can show: the whole pipeline in bfloat16 and compiled, resumed and sampled."""

import re
import shutil
from itertools import islice

import pytest
import torch
from conftest import TRAIN, TUNE, read_log

import checkpoint
import sampling
from model import GPT, GPTConfig, KVCache
from runs import peak_flops
from sampling import CapturedStep, generate, seeded
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
    assert "1024 rows x 64 tokens x 1 processes x 1 micro-batches" in run_script(*args).stdout
    told = run_script(*args, "--dry_run").stdout
    assert re.search(r"memory +\d+% of the cuda's at most", told)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_captured_step_says_what_the_model_says(dtype, tolerance):
    """At every place of the context, for three texts."""
    device = torch.device("cuda", 0)
    config = GPTConfig(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=64, init_std=0.1)
    model = GPT(config).to(device, dtype).eval()
    tokens = torch.randint(300, (3, 64), device=device)
    cache = KVCache(config, 3, device, dtype)
    expected = model(tokens)
    model(tokens[:, :5], cache=cache)
    step = CapturedStep(model, cache)
    for place in range(5, 64):
        logits = step(tokens[:, place, None])
        assert (logits - expected[:, place]).norm() <= tolerance * expected[:, place].norm()
    assert cache.length == 64


def test_generation_uses_the_captured_step(monkeypatch):
    """And the text of a seed stays that of the steps one by one."""
    device = torch.device("cuda", 0)
    model = GPT(GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=64, init_std=0.1)).to(device)

    def text() -> torch.Tensor:
        return torch.stack([*islice(generate(model.eval(), [1, 2, 3], 2, seeded(0, device)), 100)])

    captured = text()
    monkeypatch.setattr(sampling, "can_capture", lambda model: False)
    assert torch.equal(text(), captured)


def test_peak_comes_from_the_data_sheet_or_a_measurement():
    device = torch.device("cuda", 0)
    procs = Processes(0, 1, device, find_dtype(None, device))
    flops, source = peak_flops(procs)
    assert 1e12 < flops < 1e16 and ("data sheet" in source or "measured" in source)
