"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minigpt.cli import check_range

if TYPE_CHECKING:  # generate.py --help does not wait for torch
    import torch


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters, also the flags of generate.py. Raises `UserError` if a value is out of range."""

    max_tokens: int = 256
    """Maximum number of new tokens per sample or answer."""
    temperature: float = 0.8
    """Sampling temperature: lower is more predictable, 0 always takes the most likely token."""
    top_k: int | None = 200
    """Sample from the k most likely tokens; None: from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together reach this probability; 1: from all."""

    def __post_init__(self):
        check_range("max_tokens", self.max_tokens, 1)
        check_range("temperature", self.temperature, 0, 100)
        check_range("top_p", self.top_p, 0, 1, open_low=True)
        check_range("top_k", self.top_k, 1)


def sample_token(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> torch.Tensor:
    """Sample one token per row of logits (B, V); returns (B,). top_p is "nucleus sampling" (Holtzman et al., 2020)."""
    temperature, top_k, top_p = params.temperature, params.top_k, params.top_p
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # avoids overflow at low temperatures
    if top_k is None:
        logits, tokens = (logits / temperature).sort(dim=-1, descending=True, stable=True)  # (B, V)
    else:  # 20 times faster than sorting
        logits, tokens = (logits / temperature).topk(min(top_k, logits.size(-1)))  # (B, top_k)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        cumulative = probs.cumsum(dim=-1) - probs  # of the more likely tokens
        probs = probs.where(cumulative < top_p, 0.0)  # always keeps the first token
    # Exponential race: with rates `probs`, token i arrives first with probability probs[i]. torch.multinomial samples
    # in the same way, but waits for the GPU to check its arguments.
    arrival = probs.new_empty(probs.shape).exponential_(generator=generator)
    return tokens.gather(1, (probs / arrival).argmax(dim=-1, keepdim=True)).squeeze(1)
