"""The model: equal to transformers' GPT-2, and to itself computed in another way."""

import math
from dataclasses import replace
from itertools import accumulate
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pretrain
from minigpt.hf import load_hf, save_hf
from minigpt.inference import generate_tokens
from minigpt.sampling import SamplingParams
from model import GPT, IGNORE_INDEX, MAX_LOGITS, PRESETS, GPTConfig, KVCache, eval_mode

SMALL = GPTConfig(block_size=16, vocab_size=37, n_layer=2, n_head=2, n_embd=8, vocab_multiple=16)
few_examples = settings(max_examples=25, deadline=None)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every weight, with biases and LayerNorms, so that each part of the model changes its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.4, generator=generator)
    return model


def small_model(seed: int = 0, **changes) -> GPT:
    return randomize(GPT(replace(SMALL, **changes)), seed).eval()


def random_tokens(*shape: int, vocab_size: int = SMALL.vocab_size, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 128])
@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_gpt2_parameter_counts(preset, expected, multiple):
    with torch.device("meta"):
        model = GPT(replace(PRESETS[preset], vocab_multiple=multiple))
    assert model.config.num_parameters == expected
    if multiple == 1:
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_small_has_ten_million_parameters():
    assert replace(PRESETS["small"], vocab_size=257).num_parameters == 10_844_544
    assert set(PRESETS) == set(get_args(get_type_hints(pretrain.Config)["model"]))


def test_vocabulary_is_padded_to_multiple():
    assert GPTConfig().padded_vocab_size == 50_304
    assert GPTConfig(vocab_multiple=1).padded_vocab_size == 50_257
    assert GPTConfig(vocab_size=256).padded_vocab_size == 256
    assert SMALL.padded_vocab_size == 48


def test_flops_per_token():
    with torch.device("meta"):
        model = GPT(PRESETS["gpt2"])
    assert model.flops_per_token(1024) == model.flops_per_token() == 854_654_976
    assert model.flops_per_token() - model.flops_per_token(512) == 12 * 12 * 768 * 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, "n_layer is 0"),
        ({"block_size": -1}, "block_size is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_multiple": 0}, "vocab_multiple is 0"),
        ({"n_embd": 8.0}, "n_embd is 8.0"),
        ({"n_head": None}, "n_head is None"),
        ({"n_head": 3}, "n_embd is 8: expected a multiple of n_head, which is 3"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": math.nan}, "dropout is nan"),
        ({"init_std": 0.0}, "init_std is 0.0"),
        ({"init_std": math.nan}, "init_std is nan"),
        ({"gelu": "gelu_new"}, "gelu is 'gelu_new': expected 'tanh' or 'none'"),
        ({"gelu": None}, "gelu is None"),
    ],
)
def test_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


# ---- equal to transformers -------------------------------------------------------------------------------------------

SIZES = [
    {"vocab_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16},
    {"vocab_size": 128, "n_layer": 1, "n_head": 1, "n_embd": 12, "n_positions": 20},
    {"vocab_size": 301, "n_layer": 3, "n_head": 5, "n_embd": 20, "n_positions": 33},
]


def hf_model(**changes):
    transformers = pytest.importorskip("transformers")
    config = {"bos_token_id": None, "eos_token_id": None} | SIZES[0] | changes
    return randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))).eval()


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "x".join(map(str, size.values())))
def both_models(request, tmp_path_factory):
    """Return transformers' model, and ours loaded from the files that it saved."""
    folder = tmp_path_factory.mktemp("hf")
    theirs = hf_model(**request.param)
    theirs.save_pretrained(folder)
    return theirs, load_hf(folder).eval()


@torch.no_grad()
def test_logits_and_loss_equal_transformers(both_models):
    theirs, ours = both_models
    tokens = random_tokens(3, ours.config.block_size, vocab_size=ours.config.vocab_size)
    assert_close(ours(tokens), theirs(tokens).logits, 1e-4)
    labels = tokens.masked_fill(random_tokens(*tokens.shape, seed=1) < 9, IGNORE_INDEX)
    n_targets = (labels[:, 1:] != IGNORE_INDEX).sum()
    assert_close(ours(tokens[:, :-1], labels[:, 1:]) / n_targets, theirs(tokens, labels=labels).loss, 1e-4)


def test_gradients_equal_transformers(both_models):
    theirs, ours = both_models
    tokens = random_tokens(2, 10, vocab_size=ours.config.vocab_size)
    (ours(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()).backward()
    theirs(tokens, labels=tokens).loss.backward()
    assert_close(ours.wpe.weight.grad, theirs.transformer.wpe.weight.grad, 1e-4)
    assert_close(ours.wte.weight.grad[: ours.config.vocab_size], theirs.transformer.wte.weight.grad, 1e-4)
    assert_close(ours.h[0].attn.c_attn.weight.grad.t(), theirs.transformer.h[0].attn.c_attn.weight.grad, 1e-4)


def test_dropout_masks_equal_transformers(both_models, tmp_path):
    """With the same seed, only the same dropout layers in the same order drop the same elements."""
    theirs, ours = both_models
    tokens = random_tokens(2, 12, vocab_size=ours.config.vocab_size)
    weights = ours.state_dict()
    ours = GPT(replace(ours.config, dropout=0.3)).train()
    ours.load_state_dict(weights)
    save_hf(ours, tmp_path)
    theirs = type(theirs).from_pretrained(tmp_path, attn_implementation="sdpa").train()
    torch.manual_seed(5)
    expected = theirs(tokens).logits
    torch.manual_seed(5)
    assert_close(ours(tokens), expected, 1e-4)


def test_greedy_generation_equals_transformers(both_models):
    theirs, ours = both_models
    prompt = random_tokens(1, 5, vocab_size=ours.config.vocab_size)
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=11, do_sample=False, pad_token_id=0
    )
    tokens = generate_tokens(ours, prompt[0].tolist(), SamplingParams(temperature=0), torch.Generator())
    assert [next(tokens).item() for _ in range(11)] == expected[0, 5:].tolist()


# ---- equal to itself computed in another way -------------------------------------------------------------------------


@few_examples
@given(st.lists(st.integers(1, 16), min_size=1, max_size=16).filter(lambda chunks: sum(chunks) <= 16))
@torch.no_grad()
def test_cached_logits_equal_uncached(chunks):
    model, tokens = small_model(), random_tokens(2, sum(chunks))
    cache = KVCache(model.config, 2, tokens.device, torch.float32)
    cached = torch.cat([model(chunk, cache=cache) for chunk in tokens.split(chunks, dim=1)], dim=1)
    assert_close(cached, model(tokens))
    assert cache.length == sum(chunks)


@torch.no_grad()
def test_shorter_cache_length_drops_newest_tokens():
    model, tokens = small_model(), random_tokens(1, 9)
    cache = KVCache(model.config, 1, tokens.device, torch.float32)
    model(random_tokens(1, 14, seed=1).index_copy(1, torch.arange(4), tokens[:, :4]), cache=cache)
    cache.length = 4
    assert_close(model(tokens[:, 4:], cache=cache), model(tokens)[:, 4:])


documents = st.lists(st.integers(1, 8), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) <= 16)


@few_examples
@given(st.lists(documents, min_size=1, max_size=3))
@torch.no_grad()
def test_packed_documents_equal_separate_documents(rows):
    """Logits and loss of packed rows, padded at the end, equal those of each document alone."""
    model, B, T = small_model(), len(rows), max(map(sum, rows))
    tokens, positions = random_tokens(B, T), torch.zeros(B, T, dtype=torch.long)
    targets = random_tokens(B, T, seed=1).masked_fill(random_tokens(B, T, seed=2) < 7, IGNORE_INDEX)
    spans = [
        (row, slice(end - length, end))
        for row, lengths in enumerate(rows)
        for length, end in zip(lengths, accumulate(lengths), strict=True)
    ]
    for row, lengths in enumerate(rows):
        positions[row, : sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
        targets[row, sum(lengths) :] = IGNORE_INDEX
    packed = model(tokens, positions=positions)
    for row, span in spans:
        assert_close(packed[row, span], model(tokens[row, span][None])[0])
    separate = sum(model(tokens[row, span][None], targets[row, span][None]) for row, span in spans)
    assert_close(model(tokens, targets, positions), separate)


@torch.no_grad()
def test_positions_of_single_documents_change_nothing():
    model, tokens = small_model(), random_tokens(2, 16)
    assert_close(model(tokens, positions=torch.arange(16).expand(2, 16)), model(tokens))


@torch.no_grad()
def test_loss_is_the_sum_over_targets():
    model = small_model()
    tokens, targets = random_tokens(3, 10), random_tokens(3, 10, seed=1)
    targets[0, :4] = targets[2] = IGNORE_INDEX
    expected = 0.0
    for row, column in (targets != IGNORE_INDEX).nonzero():
        expected -= F.log_softmax(model(tokens)[row, column].double(), dim=-1)[targets[row, column]].item()
    loss = model(tokens, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert model(tokens, torch.full_like(targets, IGNORE_INDEX)).item() == 0


@few_examples
@given(st.integers(1, 15), st.integers(0, 99))
@torch.no_grad()
def test_attention_is_causal(t, seed):
    model, tokens = small_model(), random_tokens(2, 16)
    changed = tokens.clone()
    changed[:, t:] = (tokens[:, t:] + 1 + random_tokens(2, 16 - t, vocab_size=36, seed=seed)) % 37
    before, after = model(tokens), model(changed)
    assert_close(after[:, :t], before[:, :t], 1e-6)
    assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize(("cached", "new"), [(0, 17), (1, 16), (16, 1)])
@torch.no_grad()
def test_more_tokens_than_the_context_are_rejected(cached, new):
    model = small_model()
    cache = KVCache(model.config, 1, torch.device("cpu"), torch.float32)
    if cached:
        model(random_tokens(1, cached), cache=cache)
    with pytest.raises(ValueError, match="17 tokens do not fit the context of 16"):
        model(random_tokens(1, new), cache=cache if cached else None)


def test_full_cache_rejects_tokens_and_stays_unchanged():
    cache = KVCache(SMALL, 1, torch.device("cpu"), torch.float32)
    cache.advance(15)
    with pytest.raises(ValueError, match="17 tokens do not fit the context of 16"):
        cache.advance(2)
    assert cache.length == 15
    positions, mask = cache.advance(1)
    assert positions.tolist() == [15] and mask is None


def test_vocabulary_padding_has_no_effect():
    model, tokens = small_model(), random_tokens(2, 12)
    logits, loss = model(tokens), model(tokens, tokens)
    with torch.no_grad():
        model.wte.weight[SMALL.vocab_size :] = 1e3
    assert torch.equal(model(tokens), logits) and logits.shape == (2, 12, SMALL.vocab_size)
    assert torch.equal(model(tokens, tokens), loss)
    model(tokens, tokens).backward()
    assert not model.wte.weight.grad[SMALL.vocab_size :].any()
    assert model.wte.weight.grad[: SMALL.vocab_size].any(dim=1).all()


@torch.no_grad()
def test_bfloat16_autocast_is_close():
    model, tokens = small_model(), random_tokens(4, 16)
    expected_logits, expected_loss = model(tokens), model(tokens, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(tokens), model(tokens, tokens)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (logits.float() - expected_logits).norm() < 0.03 * expected_logits.norm()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.03)


@pytest.mark.parametrize("rows", [1, 7, 60, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_equals_cross_entropy(monkeypatch, rows, dtype):
    """For any chunk size, loss and gradients are those of F.cross_entropy, with ignored targets and padding."""
    model, tokens = GPT(SMALL), torch.randint(SMALL.vocab_size, (5, 12))
    targets = torch.randint(SMALL.vocab_size, (5, 12))
    targets[0, :7] = targets[3] = IGNORE_INDEX
    monkeypatch.setitem(MAX_LOGITS, "cpu", rows * SMALL.padded_vocab_size)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        loss, logits = model(tokens, targets), model(tokens)
        plain = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        with torch.no_grad():
            assert torch.equal(model(tokens, targets), loss)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert loss.dtype == torch.float32 and abs(loss - plain) < tolerance * plain
    chunked, whole = (torch.autograd.grad(value / 41, list(model.parameters())) for value in (loss, plain))
    for one, other in zip(chunked, whole, strict=True):
        assert one.dtype == other.dtype and (one - other).norm() <= tolerance * other.norm()


def test_activation_checkpointing_saves_the_input_of_each_block_only():
    """The bytes that wait for the backward pass; the peak of a process depends on the memory allocator too."""
    model, tokens = GPT(replace(SMALL, n_layer=6)), torch.randint(SMALL.vocab_size, (5, 12))

    def saved_bytes() -> int:
        storages = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens, tokens)
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        assert loss.requires_grad
        return sum(size for pointer, size in storages.items() if pointer not in weights)

    plain, model.activation_checkpointing = saved_bytes(), True
    assert saved_bytes() < plain / 4


def test_model_and_loss_compile_to_one_graph():
    """torch.compile needs no graph break, and loss and gradients stay the same."""
    torch.compiler.reset()  # shapes of other tests would make these dynamic
    model, tokens = GPT(SMALL), torch.randint(SMALL.vocab_size, (5, 12))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [forward(tokens, tokens) for forward in (model, compiled)]
    assert_close(losses[1], losses[0])
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


@torch.no_grad()
def test_loss_of_bfloat16_model_is_summed_in_float32():
    model, tokens = small_model().to(torch.bfloat16), random_tokens(4, 16)
    loss = model(tokens, tokens)
    assert loss.dtype == torch.float32
    assert_close(loss, F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten(), reduction="sum"))


# ---- initial weights and dropout -------------------------------------------------------------------------------------


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=200, n_layer=8, n_head=2, n_embd=64))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "ln_" in name:
            assert (weight == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(weight.mean().item()) < 0.05 * std, name


@torch.no_grad()
def test_dropout_is_active_in_training_only():
    tokens = random_tokens(1, 16)
    dropping, plain = small_model(dropout=0.5), small_model(dropout=0.0)
    expected = plain(tokens)
    assert torch.equal(dropping(tokens), expected)
    assert torch.equal(plain.train()(tokens), expected)
    dropping.train()
    assert not torch.allclose(dropping(tokens), expected)
    assert not torch.allclose(dropping(tokens), dropping(tokens))


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_restores_the_mode(training):
    model = small_model().train(training)
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training == training for module in model.modules())
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        raise ZeroDivisionError
    assert all(module.training == training for module in model.modules())
