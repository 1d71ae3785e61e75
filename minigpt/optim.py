"""The optimiser and the learning-rate schedule."""

import math

import torch

from model import GPT


def build_optimizer(model: GPT, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return fused AdamW (Loshchilov & Hutter, 2019) with GPT-3's betas. Weight decay is for 2-D parameters only."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]  # biases and LayerNorms
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def get_lr(step: int, steps: int, lr: float, warmup_fraction: float, min_lr_fraction: float = 0.1) -> float:
    """Return the learning rate of a step, counted from 0: linear warmup to `lr`, then cosine decay to a fraction."""
    warmup_steps = max(1, round(warmup_fraction * steps))
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * (min_lr_fraction + (1 - min_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
