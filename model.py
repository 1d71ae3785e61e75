"""GPT-2 in one file: configuration, blocks, loss, KV cache, and OpenAI's weights in and out.

The architecture is that of "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019): learned
positions, pre-LayerNorm, tanh GELU, biases everywhere, and an output layer that shares the embedding's weights.
Shapes in comments: B rows, T tokens, C channels (n_embd), nh heads, hs = C / nh, S cached tokens, V vocabulary.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSS_CHUNK = {"cpu": 2**24, "gpu": 2**29}  # logits that are in memory at once when there are targets
IGNORE = -100  # a target with this value is not learned; F.cross_entropy's own default


@dataclass(frozen=True)
class GPTConfig:
    """What makes one GPT-2 differ from another.  The defaults are GPT-2 124M."""

    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50_257  # tokens that exist; the embedding has some rows more, see padded_vocab_size
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    vocab_multiple: int = 128  # round the embedding's rows up to a multiple of this, for speed; 1 adds none
    init_std: float = 0.02  # of the initial weights; narrow models learn faster from about 0.55 / sqrt(n_embd)

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name not in ("dropout", "init_std") and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}: it must be a multiple of n_head, {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        if not self.init_std > 0:
            raise ValueError(f"init_std is {self.init_std}: it must be above 0")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: 50,304 for 50,257 tokens.  The padding is neither sampled nor exported."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def num_parameters(self) -> int:
        """The number of parameters, the embedding's padding left out: 124,439,808 for GPT-2."""
        C = self.n_embd
        block = 12 * C * C + 13 * C  # four matrices and their biases, two norms
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + 2 * C


PRESETS = {
    "tiny": GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32),  # for tests
    "demo": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128, init_std=0.05),  # learns on a laptop
    "gpt2": GPTConfig(),  # 124M parameters
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1,558M
}


class KVCache:
    """The keys and values of the tokens so far, preallocated, so that a new token costs one token's work.

    keys, values: (n_layer, B, nh, block_size, hs).  `length` tokens of them are filled; setting it back to a smaller
    number forgets the newest ones.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def advance(self, T: int) -> tuple[Tensor, Tensor | None]:
        """Make room for T new tokens; returns their positions (T,), and which of the S keys each may see, (T, S), or
        None where that is as without a cache."""
        start, self.length = self.length, self.length + T
        positions = torch.arange(start, self.length, device=self.keys.device)
        if start and T > 1:  # new tokens after cached ones: query t sees keys 0 ... start + t
            return positions, torch.ones(T, self.length, dtype=torch.bool, device=self.keys.device).tril(diagonal=start)
        return positions, None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values (B, nh, T, hs) of the new tokens; return all of that layer's (B, nh, S, hs).

        A single row is stored for all rows of the cache, whose texts begin alike.
        """
        start, end = self.length - k.size(2), self.length
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        return self.keys[layer, : len(k), :, :end], self.values[layer, : len(k), :, :end]


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and at the tokens before it, with `n_head` heads (Vaswani et al., 2017)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))  # (B,nh,T,hs)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, nh, S, hs)
        dropout = self.dropout if self.training else 0.0
        # A single query is the newest token and sees all keys; is_causal would show it the oldest key alone.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward half of a block: out to 4 C, GELU in its tanh form (Hendrycks & Gimpel, 2016), back to C."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention, then MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class SummedCrossEntropy(torch.autograd.Function):
    """The output layer and its loss, without all logits in memory at once.

    The logits of 1,024 tokens over GPT-2's vocabulary take 206 MB in float32, and autograd would keep several such.
    So the rows go through in chunks, and each chunk's gradient, softmax(logits) - onehot(target), is worked out while
    its logits are there: the backward pass has only to scale what the forward pass has found.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, learn: bool) -> Tensor:
        """The loss in nats, summed, in float32.

        hidden: (N, C); weight: (V, C) with its padding, of the same type; targets: (N,), some of them `IGNORE`;
        learn: whether a backward pass will follow.
        """
        rows = max(1, LOSS_CHUNK["cpu" if hidden.device.type == "cpu" else "gpu"] // weight.size(0))
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if learn else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if learn else None
        for begin in range(0, hidden.size(0), rows):
            x, target = hidden[begin : begin + rows], targets[begin : begin + rows, None]
            ignored, target = target == IGNORE, target.clamp(min=0)  # (rows, 1)
            logits = F.linear(x, weight).float()  # (rows, V)
            logits[:, vocab_size:] = -math.inf  # the padding has no probability
            log_probs = F.log_softmax(logits, dim=1)
            # Not in place: torch 2.11 would compile that to gradients of 0 (pytorch issue 180642).
            loss = loss - log_probs.gather(1, target).masked_fill(ignored, 0).sum()
            if learn:
                if torch.compiler.is_compiling():  # fused into one pass, with no float32 gradient in memory
                    onehot = torch.arange(weight.size(0), device=x.device) == target  # (rows, V)
                    d_logits = log_probs.exp() - onehot.float()
                else:
                    d_logits = log_probs.exp_()
                    d_logits.scatter_add_(1, target, d_logits.new_full(target.shape, -1))
                # Rows that are not learned get no gradient: what goes into these products and comes out, (rows, C),
                # is cheaper to clear than the gradient of the logits, (rows, V).
                d_logits, x = d_logits.to(x.dtype), x.masked_fill(ignored, 0)
                torch.mm(d_logits, weight, out=d_hidden[begin : begin + rows])
                if d_weight.dtype == x.dtype:
                    d_weight.addmm_(d_logits.t(), x)
                else:
                    d_weight += torch.mm(d_logits.t(), x)
        if learn:
            d_hidden.masked_fill_((targets == IGNORE)[:, None], 0)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, (d_weight * d_loss).to(d_hidden.dtype), None, None, None


def packed_mask(positions: Tensor) -> Tensor:
    """Which key each query may see when several documents share a row: the earlier tokens of its own document.

    positions: (B, T) places within the documents; every 0 begins a document.  Returns (B, 1, T, T), True where seen.
    """
    document = (positions == 0).cumsum(dim=1)  # (B, T)
    same = document[:, :, None] == document[:, None, :]  # (B, T, T)
    return same.tril()[:, None]


class GPT(nn.Module):
    """The language model.  Parameter names are GPT-2's own."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # token embedding, and the output layer
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embedding
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head: nn.Module | None = None  # the output layer where it is not the token embedding; see inference.py
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        # N(0, init_std); the layers that write to the residual stream are scaled by 1/sqrt(their number), as the GPT-2
        # paper has it (section 2.3), so that the stream does not grow with depth.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.init_std)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, Block):  # apply() comes here after the block's own layers
            for layer in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(layer.weight, std=self.config.init_std / math.sqrt(2 * self.config.n_layer))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The final normalised hidden states (B, T, C); the arguments are those of `forward`."""
        T = tokens.size(1)
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit the context of {self.config.block_size}")
        if cache is not None:
            positions, mask = cache.advance(T)
        elif positions is not None:
            mask = packed_mask(positions)
        else:
            positions, mask = torch.arange(T, device=tokens.device), None
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x, mask, cache)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) to logits (..., V).  The product runs over the padded rows, which are then cut off."""
        logits = F.linear(hidden, self.wte.weight) if self.head is None else self.head(hidden)
        return logits[..., : self.config.vocab_size]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits, or the summed loss where targets are given.

        Args:
            tokens: (B, T) int64 token ids.
            targets: (B, T) int64 ids of the next tokens; `IGNORE` marks those that are not learned.
            positions: (B, T) places within packed documents, each of which sees itself alone; None for plain rows.
            cache: keys and values of the tokens before these; the new ones are appended.  It excludes `positions`.

        Returns:
            without targets: (B, T, V) logits.
            with targets: the cross-entropy in nats *summed* over the learned tokens, a float32 scalar, so that micro-
            batches with different numbers of learned tokens add up exactly; the caller divides by their count.

        Raises:
            ValueError: the tokens do not fit the context.
        """
        hidden = self.hidden(tokens, positions, cache)
        if targets is None:
            return self.logits(hidden)
        if self.head is not None:  # of a model that only generates, and has no gradients
            logits = self.logits(hidden).flatten(0, 1).float()
            return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
        weight = self.wte.weight
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        learn = torch.is_grad_enabled()
        return SummedCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten(), self.config.vocab_size, learn)

    def flops_per_token(self, T: int | None = None) -> int:
        """Floating-point operations of one training step per token of a T-token row: 6 N + 12 L C T.

        N counts the weights that take part in a matrix product, the (padded) output layer included, the embedding
        look-ups not: "PaLM" (Chowdhery et al., 2022), appendix B.  854.7 million for GPT-2 124M at T = 1024.
        """
        config = self.config
        n_matmul = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab_size * config.n_embd
        return 6 * n_matmul + 12 * config.n_layer * config.n_embd * (T or config.block_size)

    @torch.no_grad()
    def adapt(self, vocab_size: int, dropout: float) -> "GPT":
        """The same weights with more tokens (in the padding where there is room) and another dropout, for finetuning.

        New tokens start as the mean of all others: unlike random rows, the mean neither attracts nor repels.
        """
        old = self.config
        assert vocab_size >= old.vocab_size
        config = replace(old, vocab_size=vocab_size, dropout=dropout)
        weight = self.wte.weight.new_zeros(config.padded_vocab_size, config.n_embd)
        weight[: old.vocab_size] = self.wte.weight[: old.vocab_size]
        weight[old.vocab_size : vocab_size] = self.wte.weight[: old.vocab_size].mean(dim=0)
        with torch.device("meta"):
            adapted = GPT(config)
        adapted.load_state_dict(self.state_dict() | {"wte.weight": weight}, assign=True)
        return adapted

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "GPT":
        """A model from a Hugging Face GPT-2 folder (`config.json` + `model.safetensors`) or hub id ("gpt2").

        Raises:
            FileNotFoundError: no such folder, and no such model within reach on the hub.
            ValueError: the files are damaged, or describe something other than a GPT-2.
        """
        config_file, weights_file = (hf_file(source, name) for name in ("config.json", "model.safetensors"))
        try:
            config = _config_from_hf(json.loads(config_file.read_text()))
            if weights_file.stat().st_size < 2 * config.num_parameters:  # before memory is taken on the file's word
                raise ValueError(f"{weights_file.name} is too small for the model of {config_file.name}")
            model = cls(config)
            model.load_state_dict(_weights_from_hf(model, weights_file))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{source} is not a GPT-2 that can be read: {' '.join(str(error).split())}") from None
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` as `transformers.GPT2LMHeadModel` reads them, without padding."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, weight in self.state_dict().items():
            weight = weight[: self.config.vocab_size] if name == "wte.weight" else weight
            weight = weight.t() if _is_linear(name) else weight
            weights[f"transformer.{name}"] = weight.contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_config_to_hf(self.config), indent=2) + "\n")


# ---- Hugging Face's form of the same model -------------------------------------------------------------------------
# Its linear layers are "Conv1D": the weight is stored as (in, out), where nn.Linear has (out, in).


def _is_linear(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _config_to_hf(config: GPTConfig) -> dict:
    eot = min(config.vocab_size - 1, 50_256)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # its name of old, which llama.cpp's converter asks for
        "layer_norm_epsilon": 1e-5,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": config.init_std,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "tie_word_embeddings": True,
    }


def _config_from_hf(config: dict) -> GPTConfig:
    required = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "add_cross_attention": False,
    }
    for name, value in required.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}, and this model knows {value!r} alone")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ValueError(f"n_inner is {config['n_inner']}, and this model knows 4 * n_embd alone")
    shape = {name: config[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return GPTConfig(block_size=config.get("n_positions", 1024), **shape)


def hf_file(source: str | Path, name: str) -> Path:
    """A file of a Hugging Face folder or a hub id, downloaded once.  Raises `FileNotFoundError` where it has none."""
    if Path(source).is_dir():
        file = Path(source) / name
        if not file.is_file():
            raise FileNotFoundError(f"{source} has no {name}: a Hugging Face GPT-2 folder has one")
        return file
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(str(source), name))
    except Exception as error:  # bad name, no such model, no network: the hub's client has a class for each
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"{source} is neither a folder nor a model on the hub: {reason}") from None


def _weights_from_hf(model: GPT, file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{file.name} is damaged: {error}") from None
    weights = {}
    for name, own in model.state_dict().items():
        if name not in stored:
            raise ValueError(f"{file.name} has no {name}")
        weight = stored[name].t() if _is_linear(name) else stored[name]
        expected = (model.config.vocab_size, *own.shape[1:]) if name == "wte.weight" else tuple(own.shape)
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name} in {file.name} has shape {tuple(weight.shape)}, expected {expected}")
        weights[name] = weight
    padding = torch.zeros(model.config.padded_vocab_size - model.config.vocab_size, model.config.n_embd)
    weights["wte.weight"] = torch.cat([weights["wte.weight"].float(), padding])
    return weights
