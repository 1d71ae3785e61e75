"""Generation: the decoding loop equals an uncached one, and prepared weights give the same logits up to precision."""

import copy
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import error_of
from test_sampling import cpu_generator
from torch import Tensor

from minigpt import inference
from minigpt.inference import (
    CUDAGraphStep,
    HalfLinear,
    Int8Linear,
    StaticKVCache,
    can_use_cuda_graph,
    choose_row_kernel,
    cpu_times,
    decode_step,
    generate_tokens,
    linear_addmv,
    make_generator,
    optimize_for_inference,
    stream_text,
)
from minigpt.sampling import SamplingParams, sample_token
from minigpt.tokenizer import load_tokenizer
from model import GPT, IGNORE_INDEX, GPTConfig, KVCache

CPU = torch.device("cpu")

# ---- the decoding loop -----------------------------------------------------------------------------------------------

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


def small_model(block_size: int = 16, dtype: torch.dtype = torch.float32) -> GPT:
    """Return a model of large random weights, so that every token matters. If padding rows counted, they would win."""
    model = GPT(GPTConfig(block_size=block_size, vocab_size=37, n_layer=2, n_head=2, n_embd=8, vocab_multiple=16))
    generator = cpu_generator()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.4, generator=generator)
        model.wte.weight[37:] = 1e3
    return model.to(dtype).eval()


@torch.no_grad()
def generate_uncached(model: GPT, prompt: list[int], n: int, n_samples: int, temperature: float) -> Tensor:
    """Generate by the same rule without a cache: each token from the whole window. If the window exceeds the context,
    keep its last half context. Returns (n, n_samples)."""
    generator, block_size = cpu_generator(), model.config.block_size
    windows = torch.tensor([prompt[-block_size:]] * n_samples)
    drawn = []
    for _ in range(n):
        if windows.size(1) > block_size:
            windows = windows[:, windows.size(1) - block_size // 2 :]
        drawn.append(
            sample_token(model(windows)[:, -1], SamplingParams(temperature=temperature, top_k=None), generator)
        )
        windows = torch.cat([windows, drawn[-1][:, None]], dim=1)
    return torch.stack(drawn)


def generate(model: GPT, prompt: list[int], n: int, n_samples: int, temperature: float, seed: int = 0) -> Tensor:
    """Return the first `n` tokens of every sample: (n, n_samples)."""
    params = SamplingParams(temperature=temperature, top_k=None)
    return torch.stack([*islice(generate_tokens(model, prompt, params, cpu_generator(seed), n_samples), n)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block_size", [2, 9, 16])
@pytest.mark.parametrize("prompt_length", [1, 5, 16, 20])
def test_cached_generation_equals_uncached(block_size, prompt_length, temperature):
    """Within the context, at its end, after a prompt that is too long, and several contexts later."""
    model, prompt = small_model(block_size), PROMPT[:prompt_length]
    expected = generate_uncached(model, prompt, 40, 3, temperature)
    assert torch.equal(generate(model, prompt, 40, 3, temperature), expected)


class EagerStep(CUDAGraphStep):
    """A step without a GPU: it computes what the graph would replay."""

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache, self.graph = model, cache, self
        self.tokens = torch.zeros(cache.keys.size(1), 1, dtype=torch.long)
        self.position = torch.zeros(1, dtype=torch.long)
        cache.keys[:, :, :, cache.length :] = 1e4  # keys after the newest token must not matter

    def replay(self) -> None:
        self.logits = decode_step(self.model, self.tokens, self.position, self.cache)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block_size", [2, 9, 16])
@pytest.mark.parametrize("prompt_length", [1, 5, 20])
def test_generation_by_graph_steps_equals_uncached(block_size, prompt_length, temperature, monkeypatch):
    steps = []

    def make_step(model: GPT, cache: KVCache) -> EagerStep:
        steps.append(EagerStep(model, cache))
        return steps[-1]

    monkeypatch.setattr(inference, "can_use_cuda_graph", lambda model: True)
    monkeypatch.setattr(inference, "CUDAGraphStep", make_step)
    model, prompt = small_model(block_size), PROMPT[:prompt_length]
    expected = generate_uncached(model, prompt, 40, 3, temperature)
    assert torch.equal(generate(model, prompt, 40, 3, temperature), expected)
    assert len(steps) == 1  # captured once


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 8, 15])
def test_static_cache_equals_kv_cache(length):
    """One decoding step by each kind of cache, from the same cached tokens."""
    model, tokens = small_model(), torch.tensor([PROMPT[: length + 1]]).expand(2, -1)
    cache, static = (KVCache(model.config, 2, CPU, torch.float32) for _ in range(2))
    for each in (cache, static):
        model.hidden(tokens[:, :-1], cache=each)
    static.keys[:, :, :, length + 1 :] = 1e4
    expected = model.logits(model.hidden(tokens[:, -1:], cache=cache)[:, -1])
    position = torch.tensor([length])
    torch.testing.assert_close(decode_step(model, tokens[:, -1:], position, static), expected)
    end = length + 1
    torch.testing.assert_close(static.keys[:, :, :, :end], cache.keys[:, :, :, :end])
    torch.testing.assert_close(static.values[:, :, :, :end], cache.values[:, :, :, :end])
    view = StaticKVCache(static, position)
    assert view.keys is static.keys and view.values is static.values and isinstance(view, KVCache)


@pytest.mark.parametrize(("device", "training", "expected"), [("cuda", 0, 1), ("cuda", 1, 0), ("cpu", 0, 0)])
def test_cuda_graph_is_used_on_a_gpu_outside_training(device, training, expected):
    wte = SimpleNamespace(weight=SimpleNamespace(device=torch.device(device)))
    assert can_use_cuda_graph(SimpleNamespace(wte=wte, training=bool(training))) == bool(expected)


def test_long_prompt_loses_its_beginning():
    model = small_model()
    assert torch.equal(generate(model, PROMPT, 8, 2, 1.0), generate(model, PROMPT[-16:], 8, 2, 1.0))
    assert not torch.equal(generate(model, PROMPT, 8, 2, 1.0), generate(model, PROMPT[:16], 8, 2, 1.0))


def test_samples_differ_unless_greedy():
    model = small_model()
    sampled = generate(model, PROMPT[:3], 20, 4, 1.0)
    assert sampled.shape == (20, 4) and len(sampled.unique(dim=1).t()) == 4
    greedy = generate(model, PROMPT[:3], 20, 4, 0.0)
    assert torch.equal(greedy, generate(model, PROMPT[:3], 20, 1, 0.0).expand(20, 4))


def test_generation_is_reproducible():
    model = small_model()
    assert torch.equal(generate(model, PROMPT, 20, 2, 1.0, seed=3), generate(model, PROMPT, 20, 2, 1.0, seed=3))
    assert not torch.equal(generate(model, PROMPT, 20, 2, 1.0, seed=3), generate(model, PROMPT, 20, 2, 1.0, seed=4))


def test_top_k_and_top_p_are_used():
    model = small_model()
    greedy = generate(model, PROMPT, 10, 2, 0.0)
    for limits in ({"top_k": 1}, {"top_p": 1e-6}):
        tokens = torch.stack(
            [*islice(generate_tokens(model, PROMPT, SamplingParams(temperature=1.0, **limits), cpu_generator(), 2), 10)]
        )
        assert torch.equal(tokens, greedy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vocabulary_padding_is_never_sampled(dtype):
    drawn = generate(small_model(dtype=dtype), PROMPT, 30, 8, 5.0)
    assert 30 < drawn.max() < 37


def test_inference_mode_does_not_reach_the_caller():
    model = small_model()
    assert next(generate_tokens(model, PROMPT, SamplingParams(), cpu_generator())).is_inference()
    assert torch.is_grad_enabled() and model(torch.tensor([PROMPT[:5]])).requires_grad


def test_context_of_one_token_generates():
    model = GPT(GPTConfig(block_size=1, vocab_size=9, n_layer=1, n_head=1, n_embd=4)).eval()
    assert len(list(islice(generate_tokens(model, [1, 2], SamplingParams(), cpu_generator(), 2), 5))) == 5


# ---- text ------------------------------------------------------------------------------------------------------------

BYTES = load_tokenizer("bytes")


def bytes_model(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=BYTES.chat_vocab_size, n_layer=2, n_head=2, n_embd=16, dropout=dropout)
    return GPT(config).eval()


def script_tokens(monkeypatch, *rows: list[int]) -> None:
    """Replace `generate_tokens`: it yields these tokens of each sample, and one more token is an error."""

    def tokens(*_):
        yield from map(torch.tensor, zip(*rows, strict=True))
        raise AssertionError("one token too many")

    monkeypatch.setattr(inference, "generate_tokens", tokens)


def streamed(max_tokens: int, n_samples: int) -> list[list[str | None]]:
    params = SamplingParams(max_tokens=max_tokens)
    return [*stream_text(bytes_model(), BYTES, [BYTES.end_of_text], params, cpu_generator(), n_samples)]


def test_text_is_streamed_in_whole_characters(monkeypatch):
    script_tokens(monkeypatch, [*"aé€".encode()])
    assert streamed(6, 1) == [["a"], [""], ["é"], [""], [""], ["€"], [""]]


def test_each_sample_ends_independently(monkeypatch):
    """A sample ends with its turn or document, even inside a character. Its later tokens are dropped."""
    script_tokens(monkeypatch, [97, BYTES.end_of_turn, 98, 99], [0xC3, 0xC3, BYTES.end_of_text, 97])
    assert streamed(9, 2) == [["a", ""], ["", "\ufffd"], [None, "\ufffd"], [None, None]]


def test_samples_end_after_max_tokens(monkeypatch):
    script_tokens(monkeypatch, [97, 98, 99], [BYTES.end_of_turn, 98, 0xC3])
    assert streamed(2, 2) == [["a", ""], ["b", None], ["", None]]
    script_tokens(monkeypatch, [97, 0xC3])
    assert streamed(2, 1) == [["a"], [""], ["\ufffd"]]


def test_streamed_text_equals_decoded_tokens():
    """The text is that of `generate_tokens` with the same parameters and seed."""
    model, params = bytes_model(), SamplingParams(max_tokens=40, temperature=1.3, top_k=50, top_p=0.9)
    tokens = torch.stack([*islice(generate_tokens(model, [256, 65], params, cpu_generator(5), 3), 40)]).t().tolist()
    expected = []
    for row in tokens:
        ends = [i for i, token in enumerate(row) if token >= BYTES.end_of_text]
        expected.append(BYTES.decode(row[: min(ends, default=40)]))
    pieces = [*stream_text(model, BYTES, [256, 65], params, cpu_generator(5), 3)]
    assert ["".join(piece or "" for piece in sample) for sample in zip(*pieces, strict=True)] == expected


def test_generation_does_not_change_a_model_in_training():
    """Dropout is off, the mode is restored between tokens, and torch's random state is not used."""
    model, eval_model = bytes_model(dropout=0.5), bytes_model()
    params = SamplingParams(temperature=0, max_tokens=30)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    pieces = []
    for piece in stream_text(model, BYTES, [256, 65], params, cpu_generator()):
        assert all(module.training for module in model.modules())
        pieces.append(piece)
    assert pieces == [*stream_text(eval_model, BYTES, [256, 65], params, cpu_generator())]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()  # the model can still be trained


def test_generator_is_seeded_or_random():
    seeds = (1, 1, 2, None, None)
    one, same, other, first, second = (torch.rand(3, generator=make_generator(s, CPU)).tolist() for s in seeds)
    assert one == same != other and first != second


# ---- weights prepared for inference ----------------------------------------------------------------------------------

CONFIG = GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=64, init_std=0.1)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


def is_close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether the relative error in norm is at most `tolerance`."""
    return bool((actual.float() - expected).norm() <= tolerance * expected.norm())


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "int8", "tolerance"),
    [
        (torch.float32, False, 1e-6),
        (torch.bfloat16, False, 2e-2),
        (torch.float16, False, 3e-3),
        (torch.float32, True, 5e-2),
    ],
)
def test_prepared_logits_equal_plain_logits(model, rows, dtype, int8, tolerance):
    """For a whole prompt, then token by token, with one row and with several."""
    prepared = optimize_for_inference(copy.deepcopy(model), CPU, dtype, int8)
    tokens = torch.randint(CONFIG.vocab_size, (rows, 20))
    expected = model(tokens)
    assert is_close(prepared(tokens), expected, tolerance)
    cache = KVCache(CONFIG, rows, CPU, dtype)
    pieces = [prepared(piece, cache=cache) for piece in tokens.split([8] + [1] * 12, dim=1)]
    assert is_close(torch.cat(pieces, dim=1), expected, tolerance)


@pytest.mark.parametrize(
    ("dtype", "int8", "linear_class"),
    [(torch.bfloat16, False, HalfLinear), (torch.float16, False, HalfLinear), (torch.float32, True, Int8Linear)],
)
def test_every_linear_layer_is_replaced(model, dtype, int8, linear_class):
    prepared = optimize_for_inference(copy.deepcopy(model), CPU, dtype, int8)
    assert sum(isinstance(module, linear_class) for module in prepared.modules()) == 4 * CONFIG.n_layer + 1
    assert not any(isinstance(module, torch.nn.Linear) for module in prepared.modules())


@torch.inference_mode()
@pytest.mark.parametrize("kernel", [F.linear, linear_addmv])
@pytest.mark.parametrize("shape", [(70,), (1, 70), (1, 1, 70), (1, 3, 70), (4, 1, 70)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_kernels_are_exact_up_to_rounding(kernel, shape, dtype, tolerance):
    """The error is that of one rounding of the exact result. The first three shapes are a single row."""
    weight, bias, x = (torch.randn(size, generator=cpu_generator()).to(dtype) for size in ((90, 70), 90, shape))
    y = HalfLinear(weight, bias, kernel)(x)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert y.dtype == dtype and y.shape == exact.shape
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize(("addmv", "expected"), [(0.5, linear_addmv), (0.95, F.linear), (1.5, F.linear)])
def test_the_faster_kernel_computes_single_rows(model, monkeypatch, addmv, expected):
    """By a margin, and by medians: one slow call does not count."""
    threads, calls = torch.get_num_threads(), []

    def scripted_times(kernel, layers):
        calls.append((kernel, torch.get_num_threads(), len(layers)))
        seconds = {F.linear: 1.0, linear_addmv: addmv}[kernel]
        return [seconds if len(calls) > 2 else 99.0] * len(layers)

    monkeypatch.setattr(inference, "cpu_times", scripted_times)
    monkeypatch.setattr(inference, "MIN_TIMED_BYTES", 0)
    prepared = optimize_for_inference(copy.deepcopy(model), CPU, torch.bfloat16)
    assert {layer.row_kernel for layer in prepared.modules() if isinstance(layer, HalfLinear)} == {expected}
    assert calls[:4] == [(kernel, 1, CONFIG.n_layer) for kernel in (F.linear, linear_addmv)] * 2
    assert torch.get_num_threads() == threads


def test_kernels_are_timed_on_the_models_layers(model, monkeypatch):
    half = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)
    times = cpu_times(F.linear, [block.mlp.c_fc for block in half.h])
    assert len(times) == CONFIG.n_layer and min(times) >= 0
    monkeypatch.setattr(inference, "MIN_TIMED_BYTES", 0)
    assert choose_row_kernel(half) in (F.linear, linear_addmv)


def test_small_models_are_not_timed(model, monkeypatch):
    monkeypatch.setattr(inference, "cpu_times", None)
    assert choose_row_kernel(copy.deepcopy(model).to(torch.bfloat16)) is F.linear


@torch.inference_mode()
def test_rows_of_a_batch_use_the_kernel_for_many_rows():
    def fail(*_):
        raise AssertionError("the kernel for a single row")

    layer = HalfLinear(torch.ones(3, 2).bfloat16(), torch.zeros(3).bfloat16(), fail)
    assert layer(torch.ones(2, 1, 2).bfloat16()).tolist() == [[[2.0] * 3]] * 2
    with pytest.raises(AssertionError, match="single row"):
        layer(torch.ones(1, 1, 2).bfloat16())


def test_float32_weights_are_stored_as_in_by_out(model):
    prepared = optimize_for_inference(copy.deepcopy(model), CPU, torch.float32)
    for name, weight in prepared.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert prepared.h[0].mlp.c_fc.weight.t().is_contiguous() and prepared.wte.weight.t().is_contiguous()


@torch.inference_mode()
def test_prompt_is_computed_once_for_all_samples(model):
    """A batch of one fills the cache of three rows."""
    tokens, more = torch.randint(CONFIG.vocab_size, (1, 9)), torch.randint(CONFIG.vocab_size, (3, 1))
    shared, separate = KVCache(CONFIG, 3, CPU, torch.float32), KVCache(CONFIG, 3, CPU, torch.float32)
    first = model(tokens, cache=shared)
    assert first.shape[0] == 1
    assert is_close(first.expand(3, -1, -1), model(tokens.expand(3, -1), cache=separate), 1e-5)
    assert is_close(model(more, cache=shared), model(more, cache=separate), 1e-5)


@torch.inference_mode()
def test_loss_is_that_of_the_prepared_logits(model):
    """The loss includes the 8-bit output layer."""
    prepared = optimize_for_inference(copy.deepcopy(model), CPU, torch.float32, int8=True)
    tokens = torch.randint(CONFIG.vocab_size, (2, 20))
    expected = F.cross_entropy(prepared(tokens).flatten(0, 1), tokens.flatten(), reduction="sum")
    assert torch.equal(prepared(tokens, tokens), expected) and not torch.equal(model(tokens, tokens), expected)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "int8"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)])
def test_loss_of_many_tokens_is_summed_over_chunks(model, dtype, int8):
    """Ignored targets do not count, in any chunk of 1,024 tokens."""
    prepared = optimize_for_inference(copy.deepcopy(model), CPU, dtype, int8)
    tokens = torch.randint(CONFIG.vocab_size, (70, 32))
    targets = tokens.masked_fill(torch.rand(70, 32) < 0.3, IGNORE_INDEX)
    logits = prepared(tokens).flatten(0, 1).float()
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    loss = prepared(tokens, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_generate_quantized(run_script, pretrained):
    args = ("generate.py", "--checkpoint", pretrained, "--prompt", "Document", "--max_tokens", 9, "--temperature", 0)
    assert run_script(*args, "--quantize", "int8").stdout.startswith("Document")
    wrong = run_script(*args, "--quantize", "int8", "--dtype", "bfloat16", expect=2)
    assert "--quantize and --dtype cannot be combined" in error_of(wrong)
