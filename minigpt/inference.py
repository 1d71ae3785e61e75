"""Inference: a model prepared for generation, the decoding loop, and its text as a stream.

Decoding one token of one sequence uses every weight once, so on a CPU its time is that of reading the weights from
memory. docs/performance.md has the measurements behind the choices here.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.cli import InferenceConfig, UserError
from minigpt.distributed import find_device
from minigpt.pretrained import PretrainedModel, load_pretrained
from minigpt.sampling import SamplingParams, sample_token
from minigpt.tokenizer import StreamDecoder, Tokenizer
from model import GPT, KVCache, eval_mode

LinearKernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, weight, bias) -> x @ weight.t() + bias
MIN_TIMED_BYTES = 2**24  # smaller weights stay in the caches, where the times are close


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    params: SamplingParams,
    generator: torch.Generator,
    n_samples: int = 1,
) -> Iterator[list[str | None]]:
    """Continue a prompt until the end of the document or turn, for at most `params.max_tokens` tokens.

    Nothing is computed after the caller stops iterating. The model is not changed.

    Args:
        model: the raw model, neither compiled nor wrapped, in train or eval mode.
        prompt: tokens; see `encode_prompt` for those of a conversation.
        generator: the random generator, on the model's device; see `make_generator`.

    Yields:
        after each token, the new text of every sample: "" inside a character, None for a sample that has ended. One
        more item follows at the end: None for a sample that ended, else the text of an incomplete character.
    """
    decoders = [StreamDecoder(tokenizer) for _ in range(n_samples)]
    ended = [False] * n_samples
    for tokens in islice(generate_tokens(model, prompt, params, generator, n_samples), params.max_tokens):
        pieces: list[str | None] = [None] * n_samples
        for i, token in enumerate(tokens.tolist()):
            if not ended[i]:
                ended[i] = token >= tokenizer.end_of_text  # or a chat token
                pieces[i] = decoders[i].flush() if ended[i] else decoders[i].decode(token)
        yield pieces
        if all(ended):
            break
    yield [None if done else decoder.flush() for done, decoder in zip(ended, decoders, strict=True)]


def make_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return a random generator; None seeds it randomly."""
    generator = torch.Generator(device)
    return generator.manual_seed(generator.seed() if seed is None else seed)


@torch.inference_mode()
def generate_tokens(
    model: GPT, prompt: list[int], params: SamplingParams, generator: torch.Generator, n_samples: int = 1
) -> Iterator[Tensor]:
    """Continue a prompt without end: yield the next token of every sample, (n_samples,), until the caller stops.

    If the context is full, its newer half becomes the new prompt: cached positions are absolute and cannot be shifted.
    A prompt longer than the context loses its beginning.
    """
    block_size = model.config.block_size
    device, dtype = model.wte.weight.device, model.wte.weight.dtype
    cache = KVCache(model.config, n_samples, device, dtype)
    graph_step = None
    history = torch.tensor([prompt[-block_size:]], device=device)  # (n_samples, tokens so far); the prompt: (1, T)
    new = history
    while True:
        if cache.length + new.size(1) > block_size:
            cache.length = 0
            new = history = history[:, -max(1, block_size // 2) :]
        if cache.length and new.size(1) == 1 and can_use_cuda_graph(model):
            graph_step = graph_step or CUDAGraphStep(model, cache)
            logits = graph_step(new)
        else:
            with eval_mode(model):  # generation may happen during training
                hidden = model.hidden(new, cache=cache)[:, -1]  # (n_samples, C), or (1, C) for the prompt
            logits = model.logits(hidden).expand(n_samples, -1)
        tokens = sample_token(logits, params, generator)
        yield tokens
        new = tokens[:, None]
        history = torch.cat([history.expand(n_samples, -1), new], dim=1)


def can_use_cuda_graph(model: GPT) -> bool:
    """Return whether to capture the decoding step: on a GPU, but not during training, which needs the memory."""
    return model.wte.weight.device.type == "cuda" and not model.training


class CUDAGraphStep:
    """One decoding step, captured as a CUDA graph.

    It replaces about 150 kernel launches, which take the host longer than the GPU needs to run them, by one. Capturing
    costs the time of a few steps and the memory of one.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.cache, device = cache, cache.keys.device
        self.tokens = torch.zeros(cache.keys.size(1), 1, dtype=torch.long, device=device)  # (n_samples, 1)
        self.position = torch.full((1,), cache.length, device=device)
        # A separate stream: a graph keeps the cuBLAS workspace of its stream (pytorch issue 193402).
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # warmup: the first call of a library initialises it, which cannot be captured
            for _ in range(2):
                decode_step(model, self.tokens, self.position, cache)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.logits = decode_step(model, self.tokens, self.position, cache)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (n_samples, V) after tokens (n_samples, 1). They are valid until the next call."""
        self.tokens.copy_(tokens)
        self.position.fill_(self.cache.length)
        self.cache.length += 1
        self.graph.replay()
        return self.logits


def decode_step(model: GPT, tokens: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """Return the logits (B, V) after one token (B, 1) at a position (1,).

    The operations and their memory are the same for every position, as a CUDA graph requires.
    """
    return model.logits(model.hidden(tokens, cache=StaticKVCache(cache, position))[:, -1])


class StaticKVCache(KVCache):
    """A view of a `KVCache` for one new token whose position is a tensor on the device.

    Every step attends to all keys; those after the position are masked.
    """

    def __init__(self, cache: KVCache, position: Tensor):
        self.keys, self.values, self.position = cache.keys, cache.values, position

    def advance(self, T: int) -> tuple[Tensor, Tensor]:
        keys = torch.arange(self.keys.size(3), device=self.keys.device)
        mask = torch.zeros(len(keys), dtype=self.keys.dtype, device=keys.device)  # added to the attention scores
        return self.position, mask.masked_fill(keys > self.position, -torch.inf)[None]  # (1,), (1, block_size)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.position, k)
        self.values[layer].index_copy_(2, self.position, v)
        return self.keys[layer], self.values[layer]


def load_for_inference(config: InferenceConfig, chat: bool = False) -> tuple[PretrainedModel, torch.device]:
    """Load the model that the flags name and optimise it for inference; return it with its device.

    Without --checkpoint it is that of the newest run, with `chat` of the newest chat run.

    Raises `UserError` if the model or device does not exist, or if flags contradict each other.
    """
    if config.quantize and config.dtype != "float32":
        raise UserError("--quantize and --dtype cannot be combined: 8-bit weights have no other precision")
    device = find_device(config.device)
    if config.quantize and device.type != "cpu":
        raise UserError("--quantize runs on CPUs only: add --device cpu, or omit it")
    loaded = load_pretrained(config.checkpoint, chat)
    optimize_for_inference(loaded.model, device, getattr(torch, config.dtype), int8=config.quantize is not None)
    return loaded, device


@torch.no_grad()
def optimize_for_inference(model: GPT, device: torch.device, dtype: torch.dtype, int8: bool = False) -> GPT:
    """Move a model to its device and convert its weights for inference, in place. It cannot be trained afterwards.

    `int8` quantises the linear layers; it is for CPUs.
    """
    model.to(device, dtype=dtype).eval().requires_grad_(False)
    if device.type != "cpu":
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN attention would build a new plan for every length
    elif int8 or dtype != torch.float32:
        new_linear = Int8Linear if int8 else partial(HalfLinear, row_kernel=choose_row_kernel(model))
        model.lm_head = new_linear(model.wte.weight, torch.zeros(model.config.padded_vocab_size, dtype=dtype))
        for block in model.h:
            for part in (block.attn, block.mlp):
                for name, layer in list(part.named_children()):
                    setattr(part, name, new_linear(layer.weight, layer.bias))
    else:  # float32 weights are read faster in (in, out) layout
        for module in model.modules():
            if isinstance(module, nn.Linear) or module is model.wte:
                module.weight.data = module.weight.data.t().contiguous().t()
    return model


class HalfLinear(nn.Module):
    """A linear layer in bfloat16 or float16. `row_kernel` computes a single row, see `choose_row_kernel`."""

    def __init__(self, weight: Tensor, bias: Tensor, row_kernel: LinearKernel):
        super().__init__()
        self.weight, self.bias, self.row_kernel = weight, bias, row_kernel

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.row_kernel if x.numel() == x.size(-1) else F.linear
        return kernel(x, self.weight, self.bias)


def choose_row_kernel(model: GPT) -> LinearKernel:
    """Time the kernels for a single row on this CPU and return the faster one; small models are not timed.

    They round differently, so every run has to choose the same one, or a seed would give different texts. The times
    are therefore CPU times of one thread, and `addmv` is chosen only if it takes less than 0.9 of the other's time.
    """
    layers = [block.mlp.c_fc for block in model.h[:12]]
    if sum(layer.weight.nbytes for layer in layers) < MIN_TIMED_BYTES:
        return F.linear
    times: dict[LinearKernel, list[float]] = {F.linear: [], linear_addmv: []}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(84 // len(layers)):  # 0.2 s for GPT-2 124M
            for kernel in times:
                times[kernel] += cpu_times(kernel, layers)
    finally:
        torch.set_num_threads(n_threads)
    linear, addmv = map(statistics.median, times.values())
    return linear_addmv if addmv < 0.9 * linear else F.linear


def linear_addmv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `F.linear(x, weight, bias)` for a single row x (..., C) as the product of a matrix and a vector."""
    return torch.addmv(bias, weight, x.flatten()).view(*x.shape[:-1], -1)


def cpu_times(kernel: LinearKernel, layers: list[nn.Linear]) -> list[float]:
    """Return the CPU seconds of one row through each layer. As in decoding, the weights are not in a cache."""
    row = torch.ones_like(layers[0].weight[:1])  # (1, C)
    times = []
    for layer in layers:
        started = time.thread_time()
        kernel(row, layer.weight, layer.bias)
        times.append(time.thread_time() - started)
    return times


class Int8Linear(nn.Module):
    """A linear layer with torch's dynamic quantisation: 8-bit weights with one scale per output, 7-bit activations."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12).double() / 127  # (out,)
        zero_points = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantised tensors are deprecated; the torch version is pinned
            quantized = torch.quantize_per_channel(weight.float(), scales, zero_points, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias.float())

    def forward(self, x: Tensor) -> Tensor:
        # reduce_range: on x86 CPUs without VNNI, sums of 8-bit products can overflow, so activations have 7 bits.
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)
