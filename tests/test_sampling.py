"""How a token is chosen, against the definitions; the generation loop, against the slow one without a cache."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sampling
from cli import UserError
from model import GPT, GPTConfig, KVCache
from sampling import CapturedStep, Sampling, answer_prompt, can_capture, choose, generate, step_at, write
from tokenizer import load_tokenizer

DRAWS = 3000
few_examples = settings(max_examples=40, deadline=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(logits: list[float], temperature=1.0, top_k=None, top_p=1.0, n: int = DRAWS, seed: int = 0) -> Tensor:
    """`n` independent draws from the same logits."""
    return choose(torch.tensor([logits]).expand(n, -1), temperature, top_k, top_p, seeded(seed))


def allowed(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> set[int]:
    """The tokens that may be drawn, by the definition: cut to the k likeliest, then to the smallest set of the
    likeliest of these that together reach `top_p`."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    weights = np.exp(np.array([logits[token] for token in order]) / temperature)
    reached = np.cumsum(weights / weights.sum())
    assume(np.abs(reached - top_p).min() > 1e-4 or top_p == 1)  # on the edge, rounding decides
    size = 1
    while size < len(order) and reached[size - 1] < top_p:
        size += 1
    return set(order[:size])


# Distinct, and close enough that a few thousand draws meet each of them.
logit_lists = st.lists(st.integers(-6, 6).map(lambda i: i / 4), min_size=1, max_size=8, unique=True)


@few_examples
@given(
    logits=logit_lists,
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.floats(0.01, 1.0),
)
def test_exactly_the_allowed_tokens_are_drawn(logits, temperature, top_k, top_p):
    drawn = draw(logits, temperature, top_k, top_p).unique().tolist()
    assert set(drawn) == allowed(logits, temperature, top_k, top_p)


@few_examples
@given(logits=logit_lists)
def test_all_roads_to_the_likeliest_token(logits):
    likeliest = int(np.argmax(logits))
    for choice in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert draw(logits, n=20, **choice).unique().tolist() == [likeliest], choice


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature):
    logits = [0.0, 2.0, -1.0, 1.0, 0.5]
    frequencies = draw(logits, temperature, n=40_000).bincount(minlength=5) / 40_000
    expected = (torch.tensor(logits) / temperature).softmax(dim=0)
    torch.testing.assert_close(frequencies, expected, atol=0.01, rtol=0)


def test_cut_distribution_is_renormalised():
    """With probabilities 1/2, 1/4, 1/8, 1/8, top_k=3 and top_p=0.8 leave two tokens, drawn 2 : 1."""
    logits = torch.tensor([1 / 8, 1 / 2, 1 / 8, 1 / 4]).log().tolist()
    frequencies = draw(logits, top_k=3, top_p=0.8, n=40_000).bincount(minlength=4) / 40_000
    torch.testing.assert_close(frequencies, torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.01, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_every_row_has_its_own_distribution(temperature):
    logits = torch.randn(64, 11, generator=seeded())
    assert torch.equal(choose(logits, temperature, None, 1.0, seeded()), logits.argmax(dim=-1))


def test_draws_depend_on_the_generator_alone():
    logits = [0.0] * 50
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(logits, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(logits, seed=1), first)
    assert not torch.equal(draw(logits, seed=2), first)


def test_draws_are_those_of_multinomial():
    """From the same source of randomness, which is one that others know."""
    logits = torch.randn(DRAWS, 50, generator=seeded())
    ordered, tokens = (logits / 0.7).topk(20)
    expected = tokens.gather(1, torch.multinomial(ordered.softmax(dim=1), 1, generator=seeded())).squeeze(1)
    assert torch.equal(choose(logits, 0.7, 20, 1.0, seeded()), expected)


def test_half_precision_logits_are_drawn_from_in_full_precision():
    logits = torch.randn(DRAWS, 50, generator=seeded()).to(torch.bfloat16)
    drawn = choose(logits, 0.7, 20, 0.9, seeded())
    assert torch.equal(drawn, choose(logits.float(), 0.7, 20, 0.9, seeded())) and drawn.dtype == torch.int64


# ---- the loop ------------------------------------------------------------------------------------------------------


def small_model(block_size: int = 16, dtype: torch.dtype = torch.float32) -> GPT:
    """Random weights, strong enough that every token matters; the padding rows would win if they took part."""
    model = GPT(GPTConfig(block_size=block_size, vocab_size=37, n_layer=2, n_head=2, n_embd=8, vocab_multiple=16))
    generator = seeded()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.4, generator=generator)
        model.wte.weight[37:] = 1e3
    return model.to(dtype).eval()


@torch.no_grad()
def slow_generate(model: GPT, prompt: list[int], n: int, samples: int, temperature: float, seed: int = 0) -> Tensor:
    """The same rule with no cache: read the whole window for each token; when it outgrows the context, keep the newest
    half of a context.  Returns (n, samples)."""
    generator, block_size = seeded(seed), model.config.block_size
    windows = torch.tensor([prompt[-block_size:]] * samples)
    drawn = []
    for _ in range(n):
        if windows.size(1) > block_size:
            windows = windows[:, windows.size(1) - block_size // 2 :]
        drawn.append(choose(model(windows)[:, -1], temperature, None, 1.0, generator))
        windows = torch.cat([windows, drawn[-1][:, None]], dim=1)
    return torch.stack(drawn)


def fast_generate(model: GPT, prompt: list[int], n: int, samples: int, temperature: float, seed: int = 0) -> Tensor:
    return torch.stack([*islice(generate(model, prompt, samples, seeded(seed), temperature, top_k=None), n)])


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block_size", [2, 9, 16])
@pytest.mark.parametrize("prompt_length", [1, 5, 16, 20])
def test_cached_generation_equals_uncached(block_size, prompt_length, temperature):
    """Within the context, from its last place, with a prompt that overflows it, and several contexts further on."""
    model, prompt = small_model(block_size), PROMPT[:prompt_length]
    expected = slow_generate(model, prompt, 40, 3, temperature)
    assert torch.equal(fast_generate(model, prompt, 40, 3, temperature), expected)


class UncapturedStep(CapturedStep):
    """The same without a GPU: what the graph has recorded is computed instead."""

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache, self.graph = model, cache, self
        self.tokens = torch.zeros(cache.keys.size(1), 1, dtype=torch.long)
        self.position = torch.zeros(1, dtype=torch.long)
        cache.keys[:, :, :, cache.length :] = 1e4  # what lies behind the newest token must not matter

    def replay(self) -> None:
        self.logits = step_at(self.model, self.tokens, self.position, self.cache)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block_size", [2, 9, 16])
@pytest.mark.parametrize("prompt_length", [1, 5, 20])
def test_generation_by_the_captured_step_equals_uncached(block_size, prompt_length, temperature, monkeypatch):
    monkeypatch.setattr(sampling, "can_capture", lambda model: True)
    monkeypatch.setattr(sampling, "CapturedStep", UncapturedStep)
    model, prompt = small_model(block_size), PROMPT[:prompt_length]
    expected = slow_generate(model, prompt, 40, 3, temperature)
    assert torch.equal(fast_generate(model, prompt, 40, 3, temperature), expected)


@pytest.mark.parametrize(("device", "training", "expected"), [("cuda", 0, 1), ("cuda", 1, 0), ("cpu", 0, 0)])
def test_a_step_is_captured_on_a_gpu_outside_of_training(device, training, expected):
    weight = SimpleNamespace(device=torch.device(device))
    assert can_capture(SimpleNamespace(wte=SimpleNamespace(weight=weight), training=bool(training))) == bool(expected)


def test_a_long_prompt_is_cut_to_its_end():
    model = small_model()
    assert torch.equal(fast_generate(model, PROMPT, 8, 2, 1.0), fast_generate(model, PROMPT[-16:], 8, 2, 1.0))
    assert not torch.equal(fast_generate(model, PROMPT, 8, 2, 1.0), fast_generate(model, PROMPT[:16], 8, 2, 1.0))


def test_samples_differ_unless_greedy():
    model = small_model()
    sampled = fast_generate(model, PROMPT[:3], 20, 4, 1.0)
    assert sampled.shape == (20, 4) and len(sampled.unique(dim=1).t()) == 4
    greedy = fast_generate(model, PROMPT[:3], 20, 4, 0.0)
    assert torch.equal(greedy, fast_generate(model, PROMPT[:3], 20, 1, 0.0).expand(20, 4))


def test_generation_is_reproducible():
    model = small_model()
    assert torch.equal(
        fast_generate(model, PROMPT, 20, 2, 1.0, seed=3), fast_generate(model, PROMPT, 20, 2, 1.0, seed=3)
    )
    assert not torch.equal(
        fast_generate(model, PROMPT, 20, 2, 1.0, seed=3), fast_generate(model, PROMPT, 20, 2, 1.0, seed=4)
    )


def test_limits_reach_the_choice():
    model = small_model()
    greedy = fast_generate(model, PROMPT, 10, 2, 0.0)
    for limits in ({"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(torch.stack([*islice(generate(model, PROMPT, 2, seeded(), 1.0, **limits), 10)]), greedy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_never_drawn(dtype):
    drawn = fast_generate(small_model(dtype=dtype), PROMPT, 30, 8, 5.0)
    assert 30 < drawn.max() < 37


def test_the_caller_keeps_its_gradients():
    model = small_model()
    assert next(generate(model, PROMPT, 1, seeded())).is_inference()
    assert torch.is_grad_enabled() and model(torch.tensor([PROMPT[:5]])).requires_grad


def test_top_p_of_one_allows_every_token():
    """However small a token's share: the rounding of a cumulative sum cuts none off."""
    logits = torch.zeros(1, 50_257)
    logits[0, 0] = 20.0
    draws = choose(logits.expand(64, -1), 100.0, None, 1.0, seeded())
    assert draws.max() > 49_000


@pytest.mark.parametrize("temperature", [1e-40, 1e-8])
def test_a_tiny_temperature_is_greedy(temperature):
    assert set(draw([1.0, 3.0, 2.0], temperature, n=20).tolist()) == {1}


def test_a_context_of_one_token_goes_on():
    model = GPT(GPTConfig(block_size=1, vocab_size=9, n_layer=1, n_head=1, n_embd=4)).eval()
    assert len(list(islice(generate(model, [1, 2], 2, seeded()), 5))) == 5


# ---- text as it comes ----------------------------------------------------------------------------------------------

BYTES = load_tokenizer("bytes")


def bytes_model(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=BYTES.chat_vocab_size, n_layer=2, n_head=2, n_embd=16, dropout=dropout)
    return GPT(config).eval()


def scripted(monkeypatch, *rows: list[int]) -> None:
    """`generate` gives these tokens of each sample, and it is an error to ask for more."""

    def tokens(*_):
        yield from map(torch.tensor, zip(*rows, strict=True))
        raise AssertionError("a token too many was asked for")

    monkeypatch.setattr(sampling, "generate", tokens)


def written(max_tokens: int, n_samples: int) -> list[list[str | None]]:
    return [*write(bytes_model(), BYTES, [BYTES.end_of_text], Sampling(max_tokens=max_tokens), seeded(), n_samples)]


def test_text_comes_in_whole_characters(monkeypatch):
    scripted(monkeypatch, [*"aé€".encode()])
    assert written(6, 1) == [["a"], [""], ["é"], [""], [""], ["€"], [""]]


def test_each_sample_ends_by_itself(monkeypatch):
    """At the end of its turn or document, also in the middle of a character; what it says after that is not heard."""
    scripted(monkeypatch, [97, BYTES.end_of_turn, 98, 99], [0xC3, 0xC3, BYTES.end_of_text, 97])
    assert written(9, 2) == [["a", ""], ["", "\ufffd"], [None, "\ufffd"], [None, None]]


def test_samples_end_with_their_tokens(monkeypatch):
    scripted(monkeypatch, [97, 98, 99], [BYTES.end_of_turn, 98, 0xC3])
    assert written(2, 2) == [["a", ""], ["b", None], ["", None]]
    scripted(monkeypatch, [97, 0xC3])
    assert written(2, 1) == [["a"], [""], ["\ufffd"]]


def test_text_is_that_of_the_tokens():
    """Against the loop below it, and with a generator of the same seed the same again."""
    model, settings = bytes_model(), Sampling(1.3, 50, 0.9, 40)
    tokens = torch.stack([*islice(generate(model, [256, 65], 3, seeded(5), 1.3, 50, 0.9), 40)]).t().tolist()
    expected = []
    for row in tokens:
        ends = [i for i, token in enumerate(row) if token >= BYTES.end_of_text]
        expected.append(BYTES.decode(row[: min(ends, default=40)]))
    pieces = [*write(model, BYTES, [256, 65], settings, seeded(5), 3)]
    assert ["".join(piece or "" for piece in sample) for sample in zip(*pieces, strict=True)] == expected


def test_a_model_in_training_is_left_as_it_is():
    """Dropout is off, the mode is as before between any two tokens, and no draw of the training's own is taken."""
    model, evaluated = bytes_model(dropout=0.5), bytes_model()
    settings = Sampling(temperature=0, max_tokens=30)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    pieces = []
    for piece in write(model, BYTES, [256, 65], settings, seeded()):
        assert all(module.training for module in model.modules())
        pieces.append(piece)
    assert pieces == [*write(evaluated, BYTES, [256, 65], settings, seeded())]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()  # and it can still learn


def test_a_seed_gives_the_same_draws():
    device = torch.device("cpu")
    first, same, other, any_, another = (
        torch.rand(3, generator=sampling.seeded(seed, device)).tolist() for seed in (1, 1, 2, None, None)
    )
    assert first == same != other and any_ != another


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"max_tokens": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))} is"):
        Sampling(**wrong)


# ---- the prompt of a conversation ----------------------------------------------------------------------------------


def prompt_of(*messages: tuple[str, str], max_tokens: int = 256) -> tuple[str, int]:
    pairs = [{"role": role, "content": content} for role, content in messages]
    tokens, left_out = answer_prompt(bytes_model(), BYTES, pairs, max_tokens)
    return BYTES.decode(tokens), left_out


def test_a_conversation_that_fits_is_the_prompt():
    text, left_out = prompt_of(("system", "Be."), ("user", "a"), ("assistant", "b"), ("user", "c"))
    turns = "<|system|>Be.<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert text == "<|endoftext|>" + turns and left_out == 0


def test_the_oldest_turns_make_room():
    """Of 64 tokens a quarter is kept for the answer, or less where the answer is to be shorter."""
    messages = (("system", "Be."), ("user", "1" * 14), ("assistant", "2" * 14), ("user", "3" * 14))
    whole = 1 + 5 + 3 * 16 + 1
    text, left_out = prompt_of(*messages)
    newest = f"<|endoftext|><|system|>Be.<|end|><|user|>{'3' * 14}<|end|><|assistant|>"
    assert (text, left_out) == (newest, 32)
    assert prompt_of(*messages, max_tokens=64 - whole)[1] == 0
    with pytest.raises(UserError, match="system message alone fills the context of 64 tokens"):
        prompt_of(("system", "Be." * 30), ("user", "a"))
