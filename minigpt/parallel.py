"""Compilation, DDP and sharding of the model."""

import contextlib
import gc
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minigpt.distributed import Processes
from model import GPT


def parallelize(model: GPT, procs: Processes, compile: bool) -> nn.Module:
    """Compile the model and wrap it for DDP, as needed. A sharded model is not wrapped."""
    if compile:
        compile_blocks(model)
    wrapped: nn.Module = model
    if procs.world_size > 1 and not is_sharded_model(model):
        device_ids = [procs.device.index] if procs.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
    gc.collect()
    gc.freeze()  # all objects so far live to the end: exclude them from later garbage collections
    return wrapped


def compile_blocks(model: GPT) -> None:
    """Compile the blocks and the loss of a model in place, which must not be copied afterwards.

    All blocks share one compiled graph, which more than halves the compile time. Only `forward` is compiled: the hooks
    of a sharded block run around it.
    """
    if "loss" in vars(model):  # compiled by the search of the micro-batch size
        return
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # float32 products are exact by choice
    options = {"fullgraph": True, "dynamic": False}
    torch._dynamo.config.recompile_limit = 32  # shapes, also those of the micro-batch search; the default is 8
    for block in model.h:
        block.forward = torch.compile(block.forward, **options)
    model.loss = torch.compile(model.loss, **options)


@contextlib.contextmanager
def eager_model(model: GPT) -> Iterator[None]:
    """Let `hidden` and `logits` of a training model be called inside a `with` block, for generation and HellaSwag.

    Their many shapes are not compiled. The embeddings and `ln_f` of a sharded model are gathered.
    """
    compiled = {block: vars(block).pop("forward") for block in model.h if "forward" in vars(block)}
    if is_sharded_model(model):
        model.unshard()
    yield
    if is_sharded_model(model):
        model.reshard()
    for block, forward in compiled.items():
        block.forward = forward


def shard(model: GPT, procs: Processes) -> None:
    """Shard weights, gradients and optimiser state by rows over the processes, in place (ZeRO stage 3, by FSDP2).

    The parameters become `DTensor`s. Each block gathers its weights for its forward and backward pass. With one
    process, this does nothing.
    """
    if procs.world_size == 1:
        return
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    mesh = dist.device_mesh.init_device_mesh(procs.device.type, (procs.world_size,))
    for module in (*model.h, model):
        fully_shard(module, mesh=mesh)


def is_sharded_model(model: GPT) -> bool:
    return hasattr(model, "unshard")  # a method of FSDPModule


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a `DTensor`, whose import takes a second."""
    return hasattr(tensor, "to_local")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with the rows of all processes, which must all call this; a whole tensor is returned as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor on the device of another one, and sharded like it."""
    tensor = tensor.to(other.device)
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
