"""A model prepared to generate says what it said before: exactly, or as nearly as its precision allows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import error_of

from inference import Int8Linear, RowLinear, prepare
from model import GPT, GPTConfig, KVCache

CPU = torch.device("cpu")
CONFIG = GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=64, init_std=0.1)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return (one.float() - other).norm() <= tolerance * other.norm()


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "quantize", "tolerance"),
    [(torch.float32, False, 1e-6), (torch.bfloat16, False, 2e-2), (torch.float32, True, 5e-2)],
)
def test_prepared_logits_equal_the_plain_ones(model, rows, dtype, quantize, tolerance):
    """A prompt at once, then token by token, for one row and for several."""
    prepared = prepare(copy.deepcopy(model), CPU, dtype, quantize)
    tokens = torch.randint(CONFIG.vocab_size, (rows, 20))
    expected = model(tokens)
    assert close(prepared(tokens), expected, tolerance)
    cache = KVCache(CONFIG, rows, CPU, dtype)
    pieces = [prepared(piece, cache=cache) for piece in tokens.split([8] + [1] * 12, dim=1)]
    assert close(torch.cat(pieces, dim=1), expected, tolerance)


@pytest.mark.parametrize(
    ("dtype", "quantize", "kind"), [(torch.bfloat16, False, RowLinear), (torch.float32, True, Int8Linear)]
)
def test_every_matrix_is_replaced(model, dtype, quantize, kind):
    prepared = prepare(copy.deepcopy(model), CPU, dtype, quantize)
    assert sum(isinstance(module, kind) for module in prepared.modules()) == 4 * CONFIG.n_layer + 1
    assert not any(isinstance(module, torch.nn.Linear) for module in prepared.modules())


def test_float32_weights_lie_as_in_by_out(model):
    prepared = prepare(copy.deepcopy(model), CPU, torch.float32)
    for name, weight in prepared.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert prepared.h[0].mlp.c_fc.weight.t().is_contiguous() and prepared.wte.weight.t().is_contiguous()


@torch.inference_mode()
def test_the_prompt_is_read_once_for_all_samples(model):
    """One row fills the cache of three."""
    tokens, more = torch.randint(CONFIG.vocab_size, (1, 9)), torch.randint(CONFIG.vocab_size, (3, 1))
    once, thrice = KVCache(CONFIG, 3, CPU, torch.float32), KVCache(CONFIG, 3, CPU, torch.float32)
    first = model(tokens, cache=once)
    assert first.shape[0] == 1 and close(first.expand(3, -1, -1), model(tokens.expand(3, -1), cache=thrice), 1e-5)
    assert close(model(more, cache=once), model(more, cache=thrice), 1e-5)


@torch.inference_mode()
def test_the_loss_is_that_of_the_prepared_logits(model):
    """The 8-bit output layer counts too."""
    prepared = prepare(copy.deepcopy(model), CPU, torch.float32, quantize=True)
    tokens = torch.randint(CONFIG.vocab_size, (2, 20))
    expected = F.cross_entropy(prepared(tokens).flatten(0, 1), tokens.flatten(), reduction="sum")
    assert torch.equal(prepared(tokens, tokens), expected) and not torch.equal(model(tokens, tokens), expected)


def test_generate_quantized(run_script, pretrained):
    args = ("generate.py", "--checkpoint", pretrained, "--prompt", "Document", "--max_tokens", 9, "--temperature", 0)
    assert run_script(*args, "--quantize", "int8").stdout.startswith("Document")
    wrong = run_script(*args, "--quantize", "int8", "--dtype", "bfloat16", expect=2)
    assert "--quantize and --dtype exclude each other" in error_of(wrong)
