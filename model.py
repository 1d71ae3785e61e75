"""GPT-2 in one file: configuration, transformer blocks, loss and KV cache.

The architecture follows "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019): learned
positions, pre-LayerNorm, tanh GELU, biases in all layers, and an output layer tied to the token embedding.
Shapes in comments: B batch, T tokens, C channels (n_embd), nh heads, hs = C / nh, S cached tokens, V vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = {"cpu": 2**24, "gpu": 2**29}  # the loss holds at most this many logits in memory at once
IGNORE_INDEX = -100  # targets with this value do not count in the loss, as in F.cross_entropy


@dataclass(frozen=True)
class GPTConfig:
    """The architecture of a model. The defaults are GPT-2 124M."""

    block_size: int = 1024  # maximum context length in tokens
    vocab_size: int = 50_257  # without the padding of the embedding, see padded_vocab_size
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    vocab_multiple: int = 128  # the embedding is padded to a multiple of this many rows, for speed
    init_std: float = 0.02  # of the initial weights; narrow models train faster with about 0.55 / sqrt(n_embd)
    gelu: str = "tanh"  # GPT-2's approximation, or "none": the exact GELU; the names are those of F.gelu

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name not in ("dropout", "init_std", "gelu") and not (type(value) is int and value >= 1):
                raise ValueError(f"{name} is {value!r}: expected an integer of at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}: expected a multiple of n_head, which is {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: expected at least 0 and below 1")
        if not self.init_std > 0:
            raise ValueError(f"init_std is {self.init_std}: expected above 0")
        if self.gelu not in ("tanh", "none"):
            raise ValueError(f"gelu is {self.gelu!r}: expected 'tanh' or 'none'")

    @property
    def padded_vocab_size(self) -> int:
        """Return the rows of the embedding: 50,304 for 50,257 tokens. Padding is never sampled and never exported."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters without the padding of the embedding: 124,439,808 for GPT-2."""
        C = self.n_embd
        block = 12 * C * C + 13 * C  # four weight matrices with biases, two LayerNorms
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + 2 * C


PRESETS = {
    "tiny": GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32),  # for tests
    "demo": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128, init_std=0.05),  # for a laptop CPU
    "small": GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, init_std=0.028),  # 30M with GPT-2's vocabulary
    "gpt2": GPTConfig(),  # 124M parameters
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1,558M
}


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside a `with` block and restore the model's mode after it."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


class KVCache:
    """Preallocated keys and values of the tokens so far, so that each new token costs the work of one token.

    keys, values: (n_layer, B, nh, block_size, hs). The first `length` positions are filled; setting `length` to a
    smaller number drops the newest tokens.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def advance(self, T: int) -> tuple[Tensor, Tensor | None]:
        """Reserve space for T new tokens.

        Returns their positions (T,) and an attention mask (T, S), or None where plain causal attention is enough.
        Raises `ValueError` if the cache is full.
        """
        start, self.length = self.length, self.length + T
        if self.length > self.keys.size(3):
            self.length = start
            raise ValueError(f"{start + T} tokens do not fit the context of {self.keys.size(3)}")
        positions = torch.arange(start, self.length, device=self.keys.device)
        if start and T > 1:  # new tokens after cached ones: query t attends to keys 0 ... start + t
            return positions, torch.ones(T, self.length, dtype=torch.bool, device=self.keys.device).tril(diagonal=start)
        return positions, None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values (B, nh, T, hs) of the new tokens; return all of that layer (B, nh, S, hs).

        A batch of one is stored for every row of the cache: the prompt that all samples share.
        """
        start, end = self.length - k.size(2), self.length
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        return self.keys[layer, : len(k), :, :end], self.values[layer, : len(k), :, :end]


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and to the tokens before it (Vaswani et al., 2017)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one projection
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))  # (B,nh,T,hs)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, nh, S, hs)
        dropout = self.dropout if self.training else 0.0
        # A single query is the newest token and attends to all keys; is_causal would let it see the first key only.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward layer: C to 4 C, GELU (Hendrycks & Gimpel, 2016), back to C."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout, self.gelu = config.dropout, config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """One transformer layer: attention, then MLP, each with a LayerNorm before and a residual connection around."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class LinearCrossEntropy(torch.autograd.Function):
    """The output layer and its cross-entropy, computed in chunks so that not all logits are in memory at once.

    The logits of 1,024 tokens over GPT-2's vocabulary take 206 MB in float32, and autograd would keep several copies.
    Each chunk's gradient, softmax(logits) - onehot(target), is computed while its logits are in memory. The backward
    pass only scales the result.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, needs_grad: bool) -> Tensor:
        """Return the summed loss in nats, in float32.

        hidden: (N, C); weight: (V, C) with padding, of the same dtype; targets: (N,), where `IGNORE_INDEX` does not
        count; needs_grad: whether a backward pass follows.
        """
        chunk = max(1, MAX_LOGITS["cpu" if hidden.device.type == "cpu" else "gpu"] // weight.size(0))
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_grad else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for begin in range(0, hidden.size(0), chunk):
            x, target = hidden[begin : begin + chunk], targets[begin : begin + chunk, None]
            ignored, target = target == IGNORE_INDEX, target.clamp(min=0)  # (chunk, 1)
            logits = F.linear(x, weight).float()  # (chunk, V)
            logits[:, vocab_size:] = -math.inf  # padding has no probability
            log_probs = F.log_softmax(logits, dim=1)
            # Not in place: torch 2.11 compiles `loss -= ...` to gradients of 0 (pytorch issue 180642).
            loss = loss - log_probs.gather(1, target).masked_fill(ignored, 0).sum()
            if needs_grad:
                if torch.compiler.is_compiling():  # fused into one pass, with no float32 gradient in memory
                    onehot = torch.arange(weight.size(0), device=x.device) == target  # (chunk, V)
                    d_logits = log_probs.exp() - onehot.float()
                else:
                    d_logits = log_probs.exp_()
                    d_logits.scatter_add_(1, target, d_logits.new_full(target.shape, -1))
                # Ignored targets have no gradient. Clearing rows of (chunk, C) is cheaper than rows of (chunk, V).
                d_logits, x = d_logits.to(x.dtype), x.masked_fill(ignored, 0)
                torch.mm(d_logits, weight, out=d_hidden[begin : begin + chunk])
                if d_weight.dtype == x.dtype:
                    d_weight.addmm_(d_logits.t(), x)
                else:
                    d_weight += torch.mm(d_logits.t(), x)
        if needs_grad:
            d_hidden.masked_fill_((targets == IGNORE_INDEX)[:, None], 0)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, (d_weight * d_loss).to(d_hidden.dtype), None, None, None


def document_mask(positions: Tensor) -> Tensor:
    """Return the causal attention mask of packed rows, in which each document attends to itself only.

    positions: (B, T) positions within the documents; each 0 starts a document. Returns (B, 1, T, T), True to attend.
    """
    document = (positions == 0).cumsum(dim=1)  # (B, T)
    same = document[:, :, None] == document[:, None, :]  # (B, T, T)
    return same.tril()[:, None]


class GPT(nn.Module):
    """The language model. Parameters have GPT-2's names."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # token embedding, tied to the output layer
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embedding
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.activation_checkpointing = False  # compute each block's activations again in the backward pass
        self.lm_head: nn.Module | None = None  # an output layer that replaces the tied one, see minigpt/inference.py
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        # N(0, init_std). Layers that write to the residual stream are scaled by 1/sqrt(number of such layers), so that
        # the stream does not grow with depth (GPT-2 paper, section 2.3).
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.init_std)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, Block):  # apply() visits a block after its layers
            for layer in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(layer.weight, std=self.config.init_std / math.sqrt(2 * self.config.n_layer))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return logits, or the summed loss if targets are given.

        Args:
            tokens: (B, T) int64 token ids.
            targets: (B, T) int64 ids of the next tokens; `IGNORE_INDEX` excludes a position from the loss.
            positions: (B, T) positions within packed documents, each of which attends to itself only; None for rows of
                one document. Cannot be combined with `cache`.
            cache: keys and values of the tokens before these; the new ones are appended.

        Returns:
            without targets: (B, T, V) logits.
            with targets: the cross-entropy in nats, *summed* over all targets that count, as a float32 scalar. The
            caller divides by their number, so micro-batches with different numbers of targets add up exactly.

        Raises:
            ValueError: the tokens do not fit the context.
        """
        hidden = self.hidden(tokens, positions, cache)
        if targets is None:
            return self.logits(hidden)
        return self.loss(hidden.flatten(0, 1), targets.flatten())

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Return the final hidden states (B, T, C), after the last LayerNorm. Arguments are those of `forward`."""
        length = tokens.size(1)
        if cache is not None:
            positions, mask = cache.advance(length)
        elif length > self.config.block_size:
            raise ValueError(f"{length} tokens do not fit the context of {self.config.block_size}")
        elif positions is not None:
            mask = document_mask(positions)
        else:
            positions, mask = torch.arange(length, device=tokens.device), None
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        if torch.is_autocast_enabled(x.device.type):  # keep the residual stream in half precision
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.h:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, cache, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., C), without the padding of the vocabulary."""
        logits = F.linear(hidden, self.wte.weight) if self.lm_head is None else self.lm_head(hidden)
        return logits[..., : self.config.vocab_size]

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy in nats, summed over the targets that count. hidden: (N, C); targets: (N,)."""
        if self.lm_head is not None:  # prepared for inference: no gradients
            chunks = zip(hidden.split(1024), targets.split(1024), strict=True)
            losses = [F.cross_entropy(self.logits(h).float(), t, reduction="sum") for h, t in chunks]
            return torch.stack(losses).sum()
        weight = self.wte.weight
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return LinearCrossEntropy.apply(hidden, weight, targets, self.config.vocab_size, torch.is_grad_enabled())

    def flops_per_token(self, T: int | None = None) -> int:
        """Return the floating-point operations of one training step per token of a T-token row: 6 N + 12 L C T.

        N counts the weights of all matrix products, including the padded output layer and excluding the embeddings:
        "PaLM" (Chowdhery et al., 2022), appendix B.  854.7 million for GPT-2 124M at T = 1024.
        """
        config = self.config
        n_matmul = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab_size * config.n_embd
        return 6 * n_matmul + 12 * config.n_layer * config.n_embd * (T or config.block_size)
