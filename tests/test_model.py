"""The model against transformers' GPT-2, against itself computed in another way, and against damaged files."""

import json
import math
import pickle
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import GPT, IGNORE, LOSS_CHUNK, PRESETS, GPTConfig, KVCache
from sampling import generate

SMALL = GPTConfig(block_size=16, vocab_size=37, n_layer=2, n_head=2, n_embd=8, vocab_multiple=16)
few_examples = settings(max_examples=25, deadline=None)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every weight, biases and norms too, so that no part of the model is too weak to be noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.4, generator=generator)
    return model


def small_model(seed: int = 0, **changes) -> GPT:
    return randomize(GPT(replace(SMALL, **changes)), seed).eval()


def random_tokens(*shape: int, vocab_size: int = SMALL.vocab_size, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- sizes ---------------------------------------------------------------------------------------------------------


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
def test_presets_have_gpt2s_number_of_parameters(preset, expected, multiple):
    with torch.device("meta"):
        model = GPT(replace(PRESETS[preset], vocab_multiple=multiple))
    assert model.config.num_parameters == expected
    if multiple == 1:
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_vocabulary_is_padded_to_a_multiple():
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
    ("changes", "named"),
    [
        ({"n_layer": 0}, "n_layer is 0"),
        ({"block_size": -1}, "block_size is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_multiple": 0}, "vocab_multiple is 0"),
        ({"n_embd": 8.0}, "n_embd is 8.0"),
        ({"n_head": None}, "n_head is None"),
        ({"n_head": 3}, "multiple of n_head, 3"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": math.nan}, "dropout is nan"),
    ],
)
def test_config_is_checked(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(SMALL, **changes)


# ---- transformers is the oracle ------------------------------------------------------------------------------------

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
def both(request, tmp_path_factory):
    """transformers' model, and ours from the files that it saved."""
    folder = tmp_path_factory.mktemp("hf")
    theirs = hf_model(**request.param)
    theirs.save_pretrained(folder)
    return theirs, GPT.from_pretrained(folder).eval()


@torch.no_grad()
def test_logits_and_loss_equal_transformers(both):
    theirs, ours = both
    tokens = random_tokens(3, ours.config.block_size, vocab_size=ours.config.vocab_size)
    close(ours(tokens), theirs(tokens).logits, 1e-4)
    labels = tokens.masked_fill(random_tokens(*tokens.shape, seed=1) < 9, IGNORE)
    learned = (labels[:, 1:] != IGNORE).sum()
    close(ours(tokens[:, :-1], labels[:, 1:]) / learned, theirs(tokens, labels=labels).loss, 1e-4)


def test_gradients_equal_transformers(both):
    theirs, ours = both
    tokens = random_tokens(2, 10, vocab_size=ours.config.vocab_size)
    (ours(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()).backward()
    theirs(tokens, labels=tokens).loss.backward()
    close(ours.wpe.weight.grad, theirs.transformer.wpe.weight.grad, 1e-4)
    close(ours.wte.weight.grad[: ours.config.vocab_size], theirs.transformer.wte.weight.grad, 1e-4)
    close(ours.h[0].attn.c_attn.weight.grad.t(), theirs.transformer.h[0].attn.c_attn.weight.grad, 1e-4)


def test_dropout_strikes_where_transformers_does(both, tmp_path):
    """The same seed drops the same elements only if dropout stands in the same places, in the same order."""
    theirs, ours = both
    tokens = random_tokens(2, 12, vocab_size=ours.config.vocab_size)
    folder = tmp_path / "ours"
    ours.adapt(ours.config.vocab_size, dropout=0.3).save_pretrained(folder)
    theirs = type(theirs).from_pretrained(folder, attn_implementation="sdpa").train()
    ours = ours.adapt(ours.config.vocab_size, dropout=0.3).train()
    torch.manual_seed(5)
    expected = theirs(tokens).logits
    torch.manual_seed(5)
    close(ours(tokens), expected, 1e-4)


def test_greedy_generation_equals_transformers(both):
    theirs, ours = both
    prompt = random_tokens(1, 5, vocab_size=ours.config.vocab_size)
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=11, do_sample=False, pad_token_id=0
    )
    tokens = generate(ours, prompt[0].tolist(), 1, torch.Generator(), temperature=0)
    assert [next(tokens).item() for _ in range(11)] == expected[0, 5:].tolist()


@pytest.mark.parametrize("vocab_size", [37, 48])
@torch.no_grad()
def test_transformers_reads_what_we_save(tmp_path, vocab_size):
    transformers = pytest.importorskip("transformers")
    ours = small_model(vocab_size=vocab_size, dropout=0.25)
    ours.save_pretrained(tmp_path / "new" / "folder")
    theirs, loading = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    tokens = random_tokens(2, 16)
    close(theirs(tokens).logits, ours(tokens), 1e-4)
    assert theirs.config.vocab_size == vocab_size
    assert theirs.config.attn_pdrop == theirs.config.embd_pdrop == theirs.config.resid_pdrop == 0.25
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == vocab_size - 1
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # older versions of transformers insist on it


def test_saved_and_loaded_is_the_same(tmp_path):
    ours = small_model()
    ours.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path).eval()
    assert (again.config.block_size, again.config.vocab_size, again.config.n_head) == (16, 37, 2)
    for name, weight in ours.state_dict().items():
        own = SMALL.vocab_size if name == "wte.weight" else len(weight)
        assert torch.equal(again.state_dict()[name][:own], weight[:own]), name
    assert len(load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]) == SMALL.vocab_size
    assert all(parameter.requires_grad for parameter in again.parameters())


# ---- files from elsewhere ------------------------------------------------------------------------------------------


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    """A Hugging Face folder of the small model."""
    small_model().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def rewrite(folder: Path, change) -> None:
    """Replace a folder's weights by `change(weights)`."""
    weights = {name: weight.clone() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(change(weights), folder / "model.safetensors")


def reconfigure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


def bare_names(weights: dict) -> dict:
    return {name.removeprefix("transformer."): weight for name, weight in weights.items()}


def with_extras(weights: dict) -> dict:
    """What old files hold beside the weights: the causal mask of each layer, and the tied output layer again."""
    extras = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    return weights | extras | {"lm_head.weight": bare_names(weights)["wte.weight"].clone()}


def half_precision(weights: dict) -> dict:
    return {name: weight.half() for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (bare_names, 0),
        (with_extras, 0),
        (lambda weights: with_extras(bare_names(weights)), 0),
        (half_precision, 0.05),
    ],
    ids=["no prefix", "extra tensors", "no prefix, extra tensors", "float16"],
)
def test_other_forms_of_the_weights_are_read(hf_folder, change, tolerance):
    rewrite(hf_folder, change)
    loaded = GPT.from_pretrained(hf_folder).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    with torch.no_grad():
        close(loaded(random_tokens(1, 8)), small_model()(random_tokens(1, 8)), tolerance)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"n_inner": 24}, "n_inner is 24"),
        ({"n_embd": "absent"}, "n_embd"),
        ({"vocab_size": "absent"}, "vocab_size"),
        ({"n_head": 3}, "multiple of n_head"),
        ({"n_layer": "two"}, "n_layer is 'two'"),
    ],
)
def test_a_config_of_something_else_is_rejected(hf_folder, changes, named):
    reconfigure(hf_folder, **changes)
    with pytest.raises(ValueError, match=named) as caught:
        GPT.from_pretrained(hf_folder)
    assert str(hf_folder) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "", "[]", "null", "\x00\xff"])
def test_a_malformed_config_is_rejected(hf_folder, text):
    (hf_folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is not a GPT-2 that can be read"):
        GPT.from_pretrained(hf_folder)


@pytest.mark.parametrize(
    ("name", "weight", "named"),
    [
        ("h.1.mlp.c_fc.weight", None, "has no h.1.mlp.c_fc.weight"),
        ("wpe.weight", None, "has no wpe.weight"),
        ("wte.weight", torch.ones(48, 8), r"wte.weight .* has shape \(48, 8\), expected \(37, 8\)"),
        ("wpe.weight", torch.ones(15, 8), r"wpe.weight .* has shape \(15, 8\), expected \(16, 8\)"),
        ("h.0.attn.c_attn.weight", torch.ones(24, 8), r"c_attn.weight .* has shape \(8, 24\), expected \(24, 8\)"),
    ],
)
def test_missing_and_misshapen_weights_are_rejected(hf_folder, name, weight, named):
    name = f"transformer.{name}"
    rewrite(hf_folder, lambda weights: {k: w for k, w in weights.items() if k != name})
    if weight is not None:
        rewrite(hf_folder, lambda weights: weights | {name: weight})
    with pytest.raises(ValueError, match=named):
        GPT.from_pretrained(hf_folder)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights_are_rejected(hf_folder, length):
    file = hf_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is (damaged|too small)"):
        GPT.from_pretrained(hf_folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_file_is_rejected(hf_folder, name):
    (hf_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        GPT.from_pretrained(hf_folder)


class Intruder:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_never_opened(hf_folder):
    (hf_folder / "model.safetensors").unlink()
    (hf_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Intruder(hf_folder / "intruded")))
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        GPT.from_pretrained(hf_folder)
    assert not (hf_folder / "intruded").exists()


def test_a_hub_id_is_fetched(hf_folder, monkeypatch):
    fetched = []

    def download(repository: str, name: str) -> str:
        fetched.append((repository, name))
        return str(hf_folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = GPT.from_pretrained("someone/gpt2-small")
    assert torch.equal(model.wpe.weight, small_model().wpe.weight)
    assert fetched == [("someone/gpt2-small", "config.json"), ("someone/gpt2-small", "model.safetensors")]


@pytest.mark.parametrize("error", [ConnectionError("no route\nto the hub"), OSError("no such model")])
def test_a_hub_id_out_of_reach_is_rejected(monkeypatch, error):
    def download(*_):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(
        FileNotFoundError, match="nobody/nothing is neither a folder nor a model on the hub: no"
    ) as caught:
        GPT.from_pretrained("nobody/nothing")
    assert "\n" not in str(caught.value)


# ---- the model is its own oracle -----------------------------------------------------------------------------------


@few_examples
@given(st.lists(st.integers(1, 16), min_size=1, max_size=16).filter(lambda chunks: sum(chunks) <= 16))
@torch.no_grad()
def test_cached_logits_equal_uncached(chunks):
    model, tokens = small_model(), random_tokens(2, sum(chunks))
    cache = KVCache(model.config, 2, tokens.device, torch.float32)
    cached = torch.cat([model(chunk, cache=cache) for chunk in tokens.split(chunks, dim=1)], dim=1)
    close(cached, model(tokens))
    assert cache.length == sum(chunks)


@torch.no_grad()
def test_a_shortened_cache_forgets_the_newest_tokens():
    model, tokens = small_model(), random_tokens(1, 9)
    cache = KVCache(model.config, 1, tokens.device, torch.float32)
    model(random_tokens(1, 14, seed=1).index_copy(1, torch.arange(4), tokens[:, :4]), cache=cache)
    cache.length = 4
    close(model(tokens[:, 4:], cache=cache), model(tokens)[:, 4:])


documents = st.lists(st.integers(1, 8), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) <= 16)


@few_examples
@given(st.lists(documents, min_size=1, max_size=3))
@torch.no_grad()
def test_packed_documents_equal_separate_ones(rows):
    """Rows of documents, ended by padding whose targets are ignored, against each document by itself."""
    model, B, T = small_model(), len(rows), max(map(sum, rows))
    tokens, positions = random_tokens(B, T), torch.zeros(B, T, dtype=torch.long)
    targets = random_tokens(B, T, seed=1).masked_fill(random_tokens(B, T, seed=2) < 7, IGNORE)
    spans = [
        (row, slice(end - length, end))
        for row, lengths in enumerate(rows)
        for length, end in zip(lengths, accumulate(lengths), strict=True)
    ]
    for row, lengths in enumerate(rows):
        positions[row, : sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
        targets[row, sum(lengths) :] = IGNORE
    packed = model(tokens, positions=positions)
    for row, span in spans:
        close(packed[row, span], model(tokens[row, span][None])[0])
    separate = sum(model(tokens[row, span][None], targets[row, span][None]) for row, span in spans)
    close(model(tokens, targets, positions), separate)


@torch.no_grad()
def test_positions_of_plain_rows_change_nothing():
    model, tokens = small_model(), random_tokens(2, 16)
    close(model(tokens, positions=torch.arange(16).expand(2, 16)), model(tokens))


@torch.no_grad()
def test_loss_is_the_sum_over_learned_tokens():
    model = small_model()
    tokens, targets = random_tokens(3, 10), random_tokens(3, 10, seed=1)
    targets[0, :4] = targets[2] = IGNORE
    expected = 0.0
    for row, column in (targets != IGNORE).nonzero():
        expected -= F.log_softmax(model(tokens)[row, column].double(), dim=-1)[targets[row, column]].item()
    loss = model(tokens, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert model(tokens, torch.full_like(targets, IGNORE)).item() == 0


@few_examples
@given(st.integers(1, 15), st.integers(0, 99))
@torch.no_grad()
def test_a_token_never_changes_what_comes_before_it(t, seed):
    model, tokens = small_model(), random_tokens(2, 16)
    changed = tokens.clone()
    changed[:, t:] = (tokens[:, t:] + 1 + random_tokens(2, 16 - t, vocab_size=36, seed=seed)) % 37
    before, after = model(tokens), model(changed)
    close(after[:, :t], before[:, :t], 1e-6)
    assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize(("cached", "new"), [(0, 17), (1, 16), (16, 1)])
@torch.no_grad()
def test_too_many_tokens_are_rejected(cached, new):
    model = small_model()
    cache = KVCache(model.config, 1, torch.device("cpu"), torch.float32)
    if cached:
        model(random_tokens(1, cached), cache=cache)
    with pytest.raises(ValueError, match="17 tokens do not fit the context of 16"):
        model(random_tokens(1, new), cache=cache if cached else None)


def test_padding_rows_take_no_part():
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
def test_loss_in_chunks_equals_the_plain_one(monkeypatch, rows, dtype):
    """The loss and all gradients, whatever the size of the chunks, with ignored targets and padding."""
    model, tokens = GPT(SMALL), torch.randint(SMALL.vocab_size, (5, 12))
    targets = torch.randint(SMALL.vocab_size, (5, 12))
    targets[0, :7] = targets[3] = IGNORE
    monkeypatch.setitem(LOSS_CHUNK, "cpu", rows * SMALL.padded_vocab_size)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        loss, logits = model(tokens, targets), model(tokens)
        plain = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        with torch.no_grad():
            assert torch.equal(model(tokens, targets), loss)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert loss.dtype == torch.float32 and abs(loss - plain) < tolerance * plain
    chunked, whole = (torch.autograd.grad(value / 41, list(model.parameters())) for value in (loss, plain))
    for one, other in zip(chunked, whole, strict=True):
        assert one.dtype == other.dtype and (one - other).norm() <= tolerance * other.norm()


def test_model_and_loss_are_one_graph():
    """torch.compile finds nothing that it would have to leave, and the same numbers come out."""
    model, tokens = GPT(SMALL), torch.randint(SMALL.vocab_size, (5, 12))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [forward(tokens, tokens) for forward in (model, compiled)]
    close(losses[1], losses[0])
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for one, other in zip(*gradients, strict=True):
        close(one, other)


@torch.no_grad()
def test_loss_of_a_bfloat16_model_is_summed_in_float32():
    model, tokens = small_model().to(torch.bfloat16), random_tokens(4, 16)
    loss = model(tokens, tokens)
    assert loss.dtype == torch.float32
    close(loss, F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten(), reduction="sum"))


# ---- initial weights, dropout, adapt -------------------------------------------------------------------------------


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
def test_dropout_acts_in_training_alone():
    tokens = random_tokens(1, 16)
    dropping, plain = small_model(dropout=0.5), small_model(dropout=0.0)
    expected = plain(tokens)
    assert torch.equal(dropping(tokens), expected)
    assert torch.equal(plain.train()(tokens), expected)
    dropping.train()
    assert not torch.allclose(dropping(tokens), expected)
    assert not torch.allclose(dropping(tokens), dropping(tokens))


@pytest.mark.parametrize("vocab_size", [37, 41, 48, 60])
@torch.no_grad()
def test_adapt_adds_tokens_and_keeps_the_rest(vocab_size):
    """The old vocabulary has 37 tokens in 48 rows: new tokens go into the padding, or need more rows."""
    model, tokens = small_model(dropout=0.1), random_tokens(2, 16)
    model.wte.weight[37:] = 1e3  # the padding must count neither in the mean nor in the logits
    expected = model(tokens)
    adapted = model.adapt(vocab_size, dropout=0.3).eval()
    assert adapted.config == replace(model.config, vocab_size=vocab_size, dropout=0.3)
    assert adapted(tokens).shape[-1] == vocab_size
    close(adapted(tokens)[..., :37], expected, 1e-6)
    close(adapted.wte.weight[37:vocab_size], model.wte.weight[:37].mean(dim=0).expand(vocab_size - 37, -1), 1e-6)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in adapted.parameters())
    assert model.config.vocab_size == 37 and torch.equal(model(tokens), expected)


def test_adapted_model_learns():
    adapted = small_model().adapt(41, dropout=0.0)
    tokens = random_tokens(2, 8, vocab_size=41)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
    before = adapted(tokens, tokens)
    before.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters())
    optimizer.step()
    assert adapted(tokens, tokens) < before


@pytest.mark.parametrize("size", [{"n_layer": 10**9}, {"n_embd": 10**9, "n_head": 1}, {"n_positions": 10**12}])
def test_no_memory_is_taken_on_the_word_of_a_config(tmp_path, size):
    GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | size
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="too small for the model"):
        GPT.from_pretrained(tmp_path)
