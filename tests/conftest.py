"""What the tests share: the repository's modules on the import path, the gpt2 vocabulary, scripts as real processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from forked import ForkedProcess
from screenshot import free_port

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; tiny tensors gain nothing from more
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # for the tests themselves: on tensors this small, threads cost more than they give

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigpt import checkpoint  # noqa: E402
from minigpt.cli import UserError  # noqa: E402
from minigpt.files import write_manifest  # noqa: E402
from minigpt.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

VOCABULARY = os.environ.get("TIKTOKEN_CACHE_DIR")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hide the gpt2 vocabulary from tests that do not ask for it: they must pass on a machine without it."""
    if VOCABULARY:
        asks = "gpt2_tokenizer" in item.fixturenames or "gpt2" in item.nodeid.partition("[")[2]
        os.environ["TIKTOKEN_CACHE_DIR"] = VOCABULARY if asks else os.path.join(VOCABULARY, "hidden")


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> Tokenizer:
    """Return the gpt2 vocabulary; skip the test if it can be neither downloaded nor found on disk."""
    try:
        return load_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))


def start(
    script: str,
    *args: object,
    cwd: Path,
    expect: int | None = 0,
    processes: int = 1,
    gpu: bool = False,
    torchrun: bool = False,
    fresh: bool = False,
    env: dict | None = None,
    input: str = "",
) -> subprocess.CompletedProcess:
    """Run a script in a separate process, or in several, and check its exit code.

    Several processes have the environment of torchrun, or are started by it with `torchrun`, which takes longer; their
    outputs are joined. `env` adds variables and `input` is its stdin. `fresh` starts a new interpreter instead of
    forking one. GPUs are hidden unless `gpu`.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if torchrun else []
    command = [*launcher, str(ROOT / script), *map(str, args)]
    env = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}) | (env or {})
    if fresh or gpu:
        options = {"env": env, "cwd": cwd, "input": input, "capture_output": True, "text": True, "timeout": 180}
        done = subprocess.run([sys.executable, *command], **options)
    else:
        envs = [env] if torchrun or processes == 1 else [env | rank for rank in distributed_env(processes)]
        started = [ForkedProcess(command, cwd, rank_env, input) for rank_env in envs]
        try:
            outputs = [process.communicate(timeout=180) for process in started]
        finally:
            for process in started:
                process.kill()
        code = next((process.returncode for process in started if process.returncode != 0), 0)
        done = subprocess.CompletedProcess(command, code, *map("".join, zip(*outputs, strict=True)))
    result = f"{script} ended with code {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}"
    assert expect is None or done.returncode == expect, result
    return done


def distributed_env(world_size: int) -> list[dict[str, str]]:
    """Return the variables by which processes find each other, as torchrun sets them on one machine."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


@pytest.fixture
def run_script(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`run_script("pretrain.py", "--steps", 3)` runs a script in the test's own folder; see `start`."""

    def run(script: str, *args: object, cwd: Path | None = None, **options) -> subprocess.CompletedProcess:
        gpu = request.node.get_closest_marker("gpu") is not None
        return start(script, *args, cwd=cwd or tmp_path, gpu=gpu, **options)

    return run


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line that a script which ended with exit code 2 wrote to stderr, without its "error: "."""
    assert done.returncode == 2, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), f"not one line of error:\n{done.stderr}"
    return lines[0].removeprefix("error: ")


@pytest.fixture
def fails(run_script) -> Callable[..., str]:
    """Runs a script that must end with exit code 2 and one line on stderr; returns that line."""

    def run(*args: object, **options) -> str:
        return error_of(run_script(*args, expect=2, **options))

    return run


@pytest.fixture
def prepare_in_process(tmp_path, monkeypatch) -> Callable[..., None]:
    """Return a function that runs a preparation script in this process, on files in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])  # in the working directory
    monkeypatch.setattr("minigpt.shards.lock_folder", lambda folder: folder.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr("shutil.which", lambda name: None)  # no GPU

    def run(script: ModuleType, *files: str, **flags) -> None:
        flags = {"tokenizer": "bytes", "out": "out"} | flags
        script.main(script.Config(files=files, **flags | {"out": Path(flags["out"])}))

    return run


# ---- a tiny pipeline, made once: data, a pretrained model, a chat model --------------------------------------------

TRAIN = ("--model", "tiny", "--steps", 12, "--batch_tokens", 1024, "--micro_batch_size", 8, "--decay_fraction", 0.5)
TRAIN += ("--lr", 3e-3)
TUNE = ("--steps", 12, "--batch_tokens", 1024, "--micro_batch_size", 8, "--lr", 3e-3)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory) -> Path:
    """A small dataset folder of byte tokens to pretrain on."""
    folder = tmp_path_factory.mktemp("text")
    texts = [f"Document {i} counts {i}, {i + 1}, {i + 2} and so on until it is tired. " * 8 for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = ("--files", folder / "text.jsonl", "--tokenizer", "bytes", "--val_fraction", 0.2, "--shard_tokens", 9999)
    start("prepare_fineweb.py", *data, "--out", folder / "data", cwd=folder)
    return folder / "data"


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory) -> Path:
    """A small dataset folder of byte-token conversations to finetune on."""
    folder = tmp_path_factory.mktemp("chat")
    pairs = [{"instruction": f"After {i}?", "context": "", "response": f"{i + 1}" * (1 + i % 5)} for i in range(200)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = ("--files", folder / "chat.jsonl", "--tokenizer", "bytes", "--val_fraction", 0.2, "--block_size", 64)
    start("prepare_dolly.py", *data, "--out", folder / "data", cwd=folder)
    return folder / "data"


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, text_data) -> Path:
    """A run of pretrain.py: 12 steps, validated every 4 and saved every 6."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    often = ("--val_every", 4, "--save_every", 6)
    start("pretrain.py", "--data", text_data, "--out", folder, *TRAIN, *often, cwd=folder.parent)
    return folder


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory, pretrained, chat_data) -> Path:
    """A run of finetune.py from `pretrained`: 12 steps, validated every 4 and saved every 6."""
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    often = ("--val_every", 4, "--save_every", 6)
    start("finetune.py", "--init", pretrained, "--data", chat_data, "--out", folder, *TUNE, *often, cwd=folder.parent)
    return folder


def make_model(folder: Path, tokenizer: Tokenizer, chat: bool) -> Path:
    """A checkpoint of random weights, so large that its logits differ."""
    torch.manual_seed(1)
    size = tokenizer.chat_vocab_size if chat else tokenizer.vocab_size
    model = GPT(GPTConfig(block_size=64, vocab_size=size, n_layer=2, n_head=2, n_embd=32, init_std=0.3))
    checkpoint.save(folder / "step_000001", model.config, model.state_dict(), tokenizer, {}, {"step": 1})
    return folder / "step_000001"


@pytest.fixture(scope="session")
def chatterbox(tmp_path_factory) -> Path:
    """A chat model that knows letters and spaces alone: it never ends its turn, and is slow enough to be watched."""
    folder = tmp_path_factory.mktemp("chatterbox") / "step_000001"
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=2048, vocab_size=tokenizer.chat_vocab_size, n_layer=8, n_head=4, n_embd=256))
    silent = [token for token in range(tokenizer.chat_vocab_size) if token not in {32, *range(97, 113)}]  # a to p
    with torch.no_grad():
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[silent] = -1.0  # against that bias: their logits are far below all others
    checkpoint.save(folder, model.config, model.state_dict(), tokenizer, {}, {"step": 1})
    return folder


def edit_manifest(file: Path, **changes: object) -> None:
    """Change fields of a meta.json, whose checksum stays right; "absent" deletes a field."""
    value = {name: field for name, field in (json.loads(file.read_text()) | changes).items() if field != "absent"}
    write_manifest(file, {name: field for name, field in value.items() if name != "checksum"})


def read_log(run: Path) -> list[dict]:
    """The rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
