"""The optimisers, AdamW and Muon, and the schedule of the learning rate."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.cli import UserError
from minigpt.parallel import is_sharded
from model import GPT

MOMENTUM = 0.95
UPDATE_RMS = 0.2  # root mean square of a Muon update divided by the learning rate, about that of AdamW
# Coefficients of a quintic polynomial whose iteration moves singular values towards 1 (Jordan, "Muon", 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def build_optimizer(
    model: GPT, lr: float, weight_decay: float, name: str = "adamw", embedding_lr: float | None = None
) -> torch.optim.AdamW:
    """Return fused AdamW (Loshchilov & Hutter, 2019) with GPT-3's betas, or `Muon` for the matrices of the blocks.

    Args:
        weight_decay: applied to 2-D parameters only; with Muon, to the matrices of the blocks only.
        name: "adamw" or "muon".
        embedding_lr: the learning rate of embeddings, biases and LayerNorms; default: `lr`, with Muon twice `lr`.
    """
    is_muon = name == "muon"
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    matrices = [p for p in model.parameters() if p.dim() >= 2 and not any(p is weight for weight in embeddings)]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # biases and LayerNorms
    lr_ratio = embedding_lr / lr if embedding_lr else 2.0 if is_muon else 1.0
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "is_muon": is_muon},
        {"params": embeddings, "weight_decay": 0.0 if is_muon else weight_decay, "lr_ratio": lr_ratio},
        {"params": vectors, "weight_decay": 0.0, "lr_ratio": lr_ratio},
    ]
    options = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    if not is_muon:
        return torch.optim.AdamW(groups, **options)
    n_splits = {block.attn.c_attn.weight: 3 for block in model.h}  # query, key and value are matrices of their own
    return Muon(groups, n_splits, **options)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for the parameter groups with "is_muon", AdamW for the others.

    Muon updates a matrix by its Nesterov momentum with all singular values set to about 1. The update is scaled to the
    root mean square of AdamW's (Liu et al., "Muon is scalable for LLM training", 2025), so that one learning rate fits
    matrices of all shapes. `found_inf`, a tensor, is as for fused AdamW: 1 leaves weights and momentum unchanged.

    Args:
        n_splits: maps a parameter to the number of matrices stacked along its first dimension; default: 1.
    """

    def __init__(self, groups: Iterable[dict], n_splits: dict[nn.Parameter, int], **options):
        super().__init__(groups, **options)
        self.n_splits = n_splits

    @torch.no_grad()
    def step(self) -> None:
        """Do one step. Gradients of the matrices are consumed."""
        for group in self.param_groups:
            if group.get("is_muon"):
                by_shape = defaultdict(list)
                for p in group["params"]:
                    if p.grad is not None:
                        by_shape[p.shape, self.n_splits.get(p, 1)].append(p)
                for (_, n_splits), matrices in by_shape.items():
                    self._update(matrices, n_splits, group["lr"], group["weight_decay"])
        super().step()

    def _update(self, matrices: Sequence[nn.Parameter], n_splits: int, lr: float, weight_decay: float) -> None:
        """Update matrices of equal shape."""
        # A skipped step (applied = 0) leaves weights and momentum unchanged, without a host sync.
        applied = 1 - getattr(self, "found_inf", torch.zeros((), device=matrices[0].device))
        directions = []
        for p in matrices:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            gradient, momentum = torch.where(applied > 0, local_rows(p.grad), 0), local_rows(state["momentum"])
            p.grad = None
            momentum.lerp_(gradient, (1 - MOMENTUM) * applied)
            directions.append(gradient.lerp(momentum, MOMENTUM))
        rows, columns = matrices[0].shape
        if is_sharded(matrices[0]):
            updates = orthogonalize_sharded(torch.stack(directions), rows, n_splits)
        else:
            stacked = torch.stack(directions).view(-1, rows // n_splits, columns)
            updates = orthogonalize_distributed(stacked).view(-1, rows, columns)
        scale = UPDATE_RMS * math.sqrt(max(rows // n_splits, columns))
        for p, update in zip(matrices, updates, strict=True):
            local_rows(p).mul_(1 - lr * weight_decay * applied)
            local_rows(p).add_(update * (applied * -lr * scale))


def local_rows(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor; other tensors are returned unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def orthogonalize_distributed(matrices: Tensor) -> Tensor:
    """Return `orthogonalize(matrices)`; each process computes a share and receives those of the others.

    By calculation, this saves 2 to 3 % of a GPT-2 124M step on eight GPUs, see docs/recipe.md.
    """
    if not dist.is_initialized():
        return orthogonalize(matrices).to(matrices.dtype)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = math.ceil(len(matrices) / world_size)
    own = matrices[rank * share : (rank + 1) * share]
    own = F.pad(own, (0, 0, 0, 0, 0, share - len(own)))  # all shares have the same size
    own = orthogonalize(own).contiguous()
    shares = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(shares, own)
    return torch.cat(shares)[: len(matrices)].to(matrices.dtype)


def orthogonalize_sharded(parts: Tensor, rows: int, n_splits: int) -> Tensor:
    """Return this process's rows of the orthogonalised matrices, each of which is sharded by rows.

    Each process receives all rows of its share of the matrices, orthogonalises them and sends the rows back.

    Args:
        parts: (n, own rows, columns), this process's rows of all matrices.
        rows: the rows of a whole matrix, which is `n_splits` matrices, stacked.
    """
    world_size, (n, _, columns) = dist.get_world_size(), parts.shape
    share, part = math.ceil(n / world_size), math.ceil(rows / world_size)  # matrices and rows per process, at most
    padded = F.pad(parts, (0, 0, 0, part - parts.size(1), 0, share * world_size - n))
    received = all_to_all(padded.view(world_size, share, part, columns)).transpose(0, 1)
    whole = received.reshape(share, -1, columns)[:, :rows]
    whole = orthogonalize(whole.reshape(share * n_splits, -1, columns)).reshape(share, rows, columns)
    whole = F.pad(whole, (0, 0, 0, world_size * part - rows)).view(share, world_size, part, columns)
    returned = all_to_all(whole.transpose(0, 1)).view(-1, part, columns)
    return returned[:n, : parts.size(1)].to(parts.dtype)


def all_to_all(tensor: Tensor) -> Tensor:
    """Send row i of a tensor to process i; return the rows received, in the order of the processes."""
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor)
    return received


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices (n, A, B) with their singular values moved to between about 0.7 and 1.2.

    This is Newton-Schulz iteration (Jordan et al., 2024). On a GPU with bfloat16, it computes and returns bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    has_bf16 = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.bfloat16() if has_bf16 else matrices
    x = x.mT if x.size(1) > x.size(2) else x  # the smaller side first: its products are cheaper
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.size(1) > matrices.size(2) else x


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: linear warmup to `lr`, then a cosine, or a constant rate with a final decay.

    "cosine" decays to a tenth of `lr` along a cosine. "wsd" (warmup, stable, decay; Hu et al., "MiniCPM", 2024) stays
    constant and decays linearly to 0 in the last `decay_fraction` of the steps. The learning rate before the decay does
    not depend on the number of steps, which can change until then.
    """

    name: str
    lr: float
    steps: int
    warmup_steps: int
    decay_fraction: float

    def __str__(self) -> str:
        decay_start = self.decay_start or self.warmup_steps
        return f"peak {self.lr:g} after {self.warmup_steps:,} steps, {self.name} decay from step {decay_start:,}"

    @property
    def decay_start(self) -> int:
        """The number of steps before the decay; 0 for "cosine"."""
        return self.steps - self.decay_steps if self.name == "wsd" else 0

    @property
    def decay_steps(self) -> int:
        """The number of steps with linear decay."""
        return max(1, round(self.decay_fraction * self.steps))

    def check(self) -> None:
        """Raise `UserError` if the warmup does not end before the decay starts."""
        last = self.decay_start or self.steps
        if self.warmup_steps > last:
            raise UserError(
                f"the {self.warmup_steps:,} steps of the warmup are more than the {last:,} before the decay or the end:"
                " use fewer --warmup_steps, or more steps"
            )

    def get_lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.name == "wsd":
            return self.lr * min(1.0, (self.steps - step) / self.decay_steps)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
