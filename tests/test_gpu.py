"""Tests that need a GPU: the pipeline in bfloat16 with torch.compile, micro-batch search, CUDA graphs, peak FLOP/s."""

import re
import shutil
from itertools import islice

import pytest
import torch
from conftest import TRAIN, TUNE, read_log

from minigpt import inference
from minigpt.distributed import Processes, find_dtype
from minigpt.inference import CUDAGraphStep, generate_tokens, make_generator
from minigpt.metrics import peak_flops
from minigpt.pretrained import load_pretrained
from minigpt.sampling import SamplingParams
from model import GPT, GPTConfig, KVCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_pipeline_in_bfloat16_and_compiled(run_script, text_data, chat_data, tmp_path):
    """Without flags, the GPU, bfloat16 and compilation are chosen. The losses agree with the CPU's."""
    often = ("--val_every", 4, "--save_every", 6)
    run_script("pretrain.py", "--data", text_data, "--out", "gpu", *TRAIN, *often)
    cpu = ("--device", "cpu", "--no_compile")
    run_script("pretrain.py", "--data", text_data, "--out", "cpu", *TRAIN, *often, *cpu)
    losses = [[row["loss"] for row in read_log(tmp_path / run) if "loss" in row] for run in ("gpu", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)

    shutil.rmtree(tmp_path / "gpu" / "step_000012")
    done = run_script("pretrain.py", "--data", text_data, "--out", "gpu", *TRAIN, *often)
    assert "6 completed" in done.stdout and "bfloat16 on cuda, compiled" in done.stdout
    resumed = [row["loss"] for row in read_log(tmp_path / "gpu") if "loss" in row]
    assert resumed == pytest.approx(losses[0], rel=1e-2)

    run_script("finetune.py", "--init", "gpu", "--data", chat_data, "--out", "chat", *TUNE)
    assert load_pretrained(str(tmp_path / "chat")).is_chat
    run_script("generate.py", "--checkpoint", "chat", "--prompt", "After 7?", "--num_samples", 4)


def test_micro_batch_size_is_found_and_kept(run_script, text_data, tmp_path):
    args = ("pretrain.py", "--data", text_data, "--out", "run", "--model", "tiny", "--batch_tokens", 65_536)
    args = (*args, "--steps", 2, "--no_compile")
    assert "1024 rows x 64 tokens x 1 process x 1 micro-batch" in run_script(*args).stdout
    output = run_script(*args, "--dry_run").stdout
    assert re.search(r"memory +[\d.]+ GB at peak per process, \d+% of the device's memory", output)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_cuda_graph_logits_equal_the_models(dtype, tolerance):
    """For three samples, at every position of the context."""
    device = torch.device("cuda", 0)
    config = GPTConfig(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=64, init_std=0.1)
    model = GPT(config).to(device, dtype).eval()
    tokens = torch.randint(300, (3, 64), device=device)
    cache = KVCache(config, 3, device, dtype)
    expected = model(tokens)
    model(tokens[:, :5], cache=cache)
    step = CUDAGraphStep(model, cache)
    for position in range(5, 64):
        logits = step(tokens[:, position, None])
        assert (logits - expected[:, position]).norm() <= tolerance * expected[:, position].norm()
    assert cache.length == 64


def test_generation_uses_the_cuda_graph(monkeypatch):
    """The tokens of a seed are the same with and without it."""
    device = torch.device("cuda", 0)
    model = GPT(GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=64, init_std=0.1)).to(device)

    def sample() -> torch.Tensor:
        return torch.stack(
            [*islice(generate_tokens(model.eval(), [1, 2, 3], SamplingParams(), make_generator(0, device), 2), 100)]
        )

    with_graph = sample()
    monkeypatch.setattr(inference, "can_use_cuda_graph", lambda model: False)
    assert torch.equal(sample(), with_graph)


def test_peak_flops_come_from_the_data_sheet_or_a_measurement():
    device = torch.device("cuda", 0)
    procs = Processes(0, 1, device, find_dtype(None, device))
    flops, source = peak_flops(procs)
    assert 1e12 < flops < 1e16 and ("data sheet" in source or "measured" in source)
