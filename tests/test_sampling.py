"""The choice of the next token, against its definition."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigpt.cli import UserError
from minigpt.sampling import SamplingParams, sample_token

DRAWS = 3000
few_examples = settings(max_examples=40, deadline=None)


def cpu_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(logits: list[float], temperature=1.0, top_k=None, top_p=1.0, n: int = DRAWS, seed: int = 0) -> Tensor:
    """Return `n` independent draws from the same logits."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    return sample_token(torch.tensor([logits]).expand(n, -1), params, cpu_generator(seed))


def allowed_tokens(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> set[int]:
    """Return the tokens that can be drawn, by definition: of the k most likely tokens, the smallest set of the most
    likely ones that together reach `top_p`."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    weights = np.exp(np.array([logits[token] for token in order]) / temperature)
    cumulative = np.cumsum(weights / weights.sum())
    assume(np.abs(cumulative - top_p).min() > 1e-4 or top_p == 1)  # at equality, rounding decides
    size = 1
    while size < len(order) and cumulative[size - 1] < top_p:
        size += 1
    return set(order[:size])


# Distinct, and so close that a few thousand draws include each token.
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
    assert set(drawn) == allowed_tokens(logits, temperature, top_k, top_p)


@few_examples
@given(logits=logit_lists)
def test_strict_parameters_take_the_most_likely_token(logits):
    most_likely = int(np.argmax(logits))
    for params in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert draw(logits, n=20, **params).unique().tolist() == [most_likely], params


@pytest.mark.parametrize("temperature", [1e-40, 1e-8])
def test_tiny_temperature_is_greedy(temperature):
    assert set(draw([1.0, 3.0, 2.0], temperature, n=20).tolist()) == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_equal_probabilities(temperature):
    logits = [0.0, 2.0, -1.0, 1.0, 0.5]
    frequencies = draw(logits, temperature, n=40_000).bincount(minlength=5) / 40_000
    expected = (torch.tensor(logits) / temperature).softmax(dim=0)
    torch.testing.assert_close(frequencies, expected, atol=0.01, rtol=0)


def test_truncated_distribution_is_renormalized():
    """With probabilities 1/2, 1/4, 1/8, 1/8, top_k=3 and top_p=0.8 leave two tokens, drawn 2 : 1."""
    logits = torch.tensor([1 / 8, 1 / 2, 1 / 8, 1 / 4]).log().tolist()
    frequencies = draw(logits, top_k=3, top_p=0.8, n=40_000).bincount(minlength=4) / 40_000
    torch.testing.assert_close(frequencies, torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.01, rtol=0)


def test_top_p_of_one_allows_every_token():
    """The rounding of a cumulative sum excludes no token, however small its probability."""
    logits = torch.zeros(1, 50_257)
    logits[0, 0] = 20.0
    draws = sample_token(logits.expand(64, -1), SamplingParams(temperature=100.0, top_k=None), cpu_generator())
    assert draws.max() > 49_000


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_every_row_has_its_own_distribution(temperature):
    logits = torch.randn(64, 11, generator=cpu_generator())
    assert torch.equal(
        sample_token(logits, SamplingParams(temperature=temperature, top_k=None), cpu_generator()),
        logits.argmax(dim=-1),
    )


def test_draws_depend_on_the_generator_only():
    logits = [0.0] * 50
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(logits, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(logits, seed=1), first)
    assert not torch.equal(draw(logits, seed=2), first)


def test_draws_equal_multinomial():
    """With the same generator, torch.multinomial draws the same tokens."""
    logits = torch.randn(DRAWS, 50, generator=cpu_generator())
    ordered, tokens = (logits / 0.7).topk(20)
    expected = tokens.gather(1, torch.multinomial(ordered.softmax(dim=1), 1, generator=cpu_generator())).squeeze(1)
    assert torch.equal(sample_token(logits, SamplingParams(temperature=0.7, top_k=20), cpu_generator()), expected)


def test_half_precision_logits_are_sampled_in_float32():
    logits = torch.randn(DRAWS, 50, generator=cpu_generator()).to(torch.bfloat16)
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.9)
    drawn = sample_token(logits, params, cpu_generator())
    assert torch.equal(drawn, sample_token(logits.float(), params, cpu_generator())) and drawn.dtype == torch.int64


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"max_tokens": 0}])
def test_sampling_params_are_checked(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))} is"):
        SamplingParams(**wrong)
