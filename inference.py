"""A model made ready to generate: its linear layers in the form that is fastest for a few rows at a time.

One token of one text multiplies every weight once, so on a CPU its time is that of reading the weights from memory:
what counts is how many bytes they are and how well they are read.  The figures are in docs/performance.md.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from checkpoint import Loaded
from cli import check
from model import GPT
from training import find_device


class RowLinear(nn.Module):
    """A linear layer for bfloat16: `addmv` for a single row, for which it is 1.5 times faster than `F.linear`."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.size(-1):
            return F.linear(x, self.weight, self.bias)
        return torch.addmv(self.bias, self.weight, x.flatten()).view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, each output with a scale of its own, and activations rounded to 7 bits with a
    scale per call: torch's dynamic quantisation."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12).double() / 127  # (out,)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch will drop these tensors one day; the version here is pinned
            quantized = torch.quantize_per_channel(weight.float(), scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias.float())

    def forward(self, x: Tensor) -> Tensor:
        # Activations of 7 bits: on x86 CPUs without VNNI, sums of products of 8 bits would overflow.
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)


@torch.no_grad()
def prepare(model: GPT, device: torch.device, dtype: torch.dtype, quantize: bool = False) -> GPT:
    """Move a model to where it generates, in place, and lay out its weights for that; it can no longer be trained.

    float32 on a CPU: the weights as (in, out) in memory, seen as (out, in).  `quantize`: 8-bit weights,
    on a CPU only.
    """
    model.to(device, dtype=dtype).eval().requires_grad_(False)
    if device.type != "cpu":
        torch.backends.cuda.enable_cudnn_sdp(
            False
        )  # cuDNN's attention would be planned anew for every length of a text
        return model
    no_bias = torch.zeros(model.config.padded_vocab_size, dtype=dtype)
    if quantize or dtype != torch.float32:
        kind = Int8Linear if quantize else RowLinear
        model.head = kind(model.wte.weight, no_bias)
        for block in model.h:
            for part in (block.attn, block.mlp):
                for name, layer in list(part.named_children()):
                    setattr(part, name, kind(layer.weight, layer.bias))
    else:
        for module in model.modules():
            if isinstance(module, nn.Linear) or module is model.wte:
                module.weight.data = module.weight.data.t().contiguous().t()
    return model


def load_prepared(
    source: str | None, device: str | None, dtype: str, quantize: str | None
) -> tuple[Loaded, torch.device]:
    """A model as the flags --checkpoint, --device, --dtype and --quantize describe it, prepared, and where it is.

    Raises `UserError`: there is no such model or device, or the flags exclude each other.
    """
    exact = dtype == "float32"
    check(quantize is None or exact, "--quantize and --dtype exclude each other: 8-bit weights have no other")
    found = find_device(device)
    check(quantize is None or found.type == "cpu", "--quantize is for CPUs: add --device cpu, or leave it out")
    loaded = checkpoint.load(source)
    prepare(loaded.model, found, getattr(torch, dtype), quantize is not None)
    return loaded, found
