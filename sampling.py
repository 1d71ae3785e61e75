"""Tokens from a model: how the next one is chosen, and the loop that goes on choosing."""

from collections.abc import Iterator

import torch
from torch import Tensor

from model import GPT, KVCache


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one token per row from logits (B, V); returns (B,).

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens can be drawn; None allows all.
        top_p: only the likeliest tokens that together reach this probability can be drawn ("nucleus sampling",
            Holtzman et al., 2020); 1 allows all.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # so that no temperature makes them overflow
    if top_k is None:
        logits, tokens = (logits / temperature).sort(dim=-1, descending=True, stable=True)  # (B, V)
    else:
        logits, tokens = (logits / temperature).topk(min(top_k, logits.size(-1)))  # (B, top_k), 20 times faster
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier tokens have together
        probabilities = probabilities.where(before < top_p, 0.0)  # the first is always kept: nothing is before it
    return tokens.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: list[int],
    n_samples: int,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float = 1.0,
) -> Iterator[Tensor]:
    """Continue a prompt, with no end: yields the next token of every sample, (n_samples,), until the caller stops.

    Where the context is full, generation goes on from its newest half: the cached positions are absolute and cannot
    move, so that half is read again.  A prompt that is longer than the context is cut to its newest part.
    """
    block_size = model.config.block_size
    device, dtype = model.wte.weight.device, model.wte.weight.dtype
    cache = KVCache(model.config, n_samples, device, dtype)
    history = torch.tensor([prompt[-block_size:]], device=device)  # (n_samples, tokens so far); at first one for all
    new = history
    while True:
        if cache.length + new.size(1) > block_size:
            cache.length = 0
            new = history = history[:, -max(1, block_size // 2) :]
        hidden = model.hidden(new, cache=cache)[:, -1]  # (n_samples, C), or (1, C) of the prompt
        logits = model.logits(hidden).expand(n_samples, -1)
        tokens = choose(logits, temperature, top_k, top_p, generator)
        yield tokens
        new = tokens[:, None]
        history = torch.cat([history.expand(n_samples, -1), new], dim=1)
