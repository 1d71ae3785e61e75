"""Text from a model: how the next token is chosen, the loop that goes on choosing, the text as it comes, and the prompt
after which a chat model answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from cli import check, check_range
from model import GPT, KVCache
from tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many are made.  Raises `UserError` where a value is out of range."""

    temperature: float = 0.8  # divides the logits; 0 takes the likeliest token
    top_k: int | None = 200  # only the k likeliest tokens can be drawn; None allows all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability; 1 allows all
    max_tokens: int = 256

    def __post_init__(self):
        check_range("temperature", self.temperature, 0, 100)
        check_range("top_p", self.top_p, 0, 1, open_low=True)
        check_range("max_tokens", self.max_tokens, 1)
        if self.top_k is not None:
            check_range("top_k", self.top_k, 1)


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
    # An exponential race: the first of independent times with these rates is each token's with its probability.  It is
    # what torch.multinomial draws, too, but that waits for the GPU to check its arguments.
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    return tokens.gather(1, (probabilities / times).argmax(dim=-1, keepdim=True)).squeeze(1)


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

    The model may be in the middle of its training: dropout is off while a token is made, and its mode is as before
    whenever the caller has the word.
    """
    block_size = model.config.block_size
    device, dtype = model.wte.weight.device, model.wte.weight.dtype
    cache = KVCache(model.config, n_samples, device, dtype)
    step = None
    history = torch.tensor([prompt[-block_size:]], device=device)  # (n_samples, tokens so far); at first one for all
    new = history
    while True:
        if cache.length + new.size(1) > block_size:
            cache.length = 0
            new = history = history[:, -max(1, block_size // 2) :]
        if cache.length and new.size(1) == 1 and can_capture(model):
            step = step or CapturedStep(model, cache)
            logits = step(new)
        else:
            hidden = evaluated(model, new, cache)[:, -1]  # (n_samples, C), or (1, C) of the prompt
            logits = model.logits(hidden).expand(n_samples, -1)
        tokens = choose(logits, temperature, top_k, top_p, generator)
        yield tokens
        new = tokens[:, None]
        history = torch.cat([history.expand(n_samples, -1), new], dim=1)


def evaluated(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """`model.hidden` without dropout, whatever mode the model is in."""
    training = model.training
    if training:
        model.eval()
    try:
        return model.hidden(tokens, cache=cache)
    finally:
        if training:
            model.train()


def can_capture(model: GPT) -> bool:
    """On a GPU; not in the middle of training, where samples are few and the memory is the training's."""
    return model.wte.weight.device.type == "cuda" and not model.training


class CapturedStep:
    """The step from one token to the next, captured as a CUDA graph: one launch instead of some 150, each of
    which would take the host longer than the device needs for it.

    Capturing takes the work of a few steps, and the memory of one.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.cache, device = cache, cache.keys.device
        self.tokens = torch.zeros(cache.keys.size(1), 1, dtype=torch.long, device=device)  # (n_samples, 1)
        self.position = torch.full((1,), cache.length, device=device)
        stream = torch.cuda.Stream(device)  # its own: a graph takes its cuBLAS workspace along (pytorch issue 193402)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries set themselves up when first called, which cannot be captured
            for _ in range(2):
                step_at(model, self.tokens, self.position, cache)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.logits = step_at(model, self.tokens, self.position, cache)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits (n_samples, V) after tokens (n_samples, 1), which are valid until the next call."""
        self.tokens.copy_(tokens)
        self.position.fill_(self.cache.length)
        self.cache.length += 1
        self.graph.replay()
        return self.logits


def step_at(model: GPT, tokens: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """The logits (B, V) after one more token (B, 1) at a position (1,): what `model.hidden` and `model.logits` say, by
    the same operations on the same memory wherever that is."""
    return model.logits(model.hidden(tokens, cache=FixedCache(cache, position))[:, -1])


class FixedCache:
    """A `KVCache` for one new token whose place is a tensor: all keys are offered to it, and those behind it masked."""

    length = 0  # the place of the new token is not known to the host

    def __init__(self, cache: KVCache, position: Tensor):
        self.keys, self.values, self.position = cache.keys, cache.values, position

    def advance(self, T: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(self.keys.size(3), device=self.keys.device)
        mask = torch.zeros(len(places), dtype=self.keys.dtype, device=places.device)  # added to what each layer sees
        return self.position, mask.masked_fill(places > self.position, -torch.inf)[None]  # (1,), (1, block_size)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.position, k)
        self.values[layer].index_copy_(2, self.position, v)
        return self.keys[layer], self.values[layer]


def seeded(seed: int | None, device: torch.device) -> torch.Generator:
    """A source of randomness: the same seed gives the same text, None another each time."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def write(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
    generator: torch.Generator,
    n_samples: int = 1,
) -> Iterator[list[str | None]]:
    """Continue a prompt to the end of the document or of the assistant's turn, or for `sampling.max_tokens` tokens.

    Nothing of the model is changed, and nothing is computed once the caller stops asking.

    Args:
        model: the raw model, neither compiled nor wrapped, in whatever mode, on whatever device.
        prompt: its tokens; see `answer_prompt` for those of a conversation.
        generator: where chance comes from, on the model's device; see `seeded`.

    Yields:
        after each token the new text of every sample: "" in the middle of a character, None for one that has ended.
        When all is done, a last time: None for a sample that ended by itself, and for one that ran out of tokens the
        text of a character that it left unfinished.
    """
    streams = [TextStream(tokenizer) for _ in range(n_samples)]
    ended = [False] * n_samples
    sampled = generate(model, prompt, n_samples, generator, sampling.temperature, sampling.top_k, sampling.top_p)
    for tokens in islice(sampled, sampling.max_tokens):
        pieces: list[str | None] = [None] * n_samples
        for i, token in enumerate(tokens.tolist()):
            if not ended[i]:
                ended[i] = token >= tokenizer.end_of_text  # and the chat tokens behind it
                pieces[i] = streams[i].end() if ended[i] else streams[i].add(token)
        yield pieces
        if all(ended):
            break
    yield [None if done else stream.end() for done, stream in zip(ended, streams, strict=True)]


def answer_prompt(model: GPT, tokenizer: Tokenizer, messages: Sequence[dict], max_tokens: int) -> tuple[list[int], int]:
    """The tokens after which the assistant speaks, shortened where they leave no room for an answer: the oldest turns
    go first, the system message stays.

    Args:
        messages: {"role": "system" | "user" | "assistant", "content": text} each, the last of them the user's.
        max_tokens: of the answer; room is kept for it, though no more than a quarter of the context.

    Returns:
        (tokens, left_out): `left_out` is how many tokens the whole conversation has more.

    Raises:
        UserError: the system message alone fills the context.
    """
    block_size = model.config.block_size
    room = block_size - min(max_tokens, block_size // 4)
    whole, _ = tokenizer.encode_chat(messages, reply=True)
    if len(whole) <= room:
        return whole, 0
    shortened = tokenizer.encode_chat(messages, max_length=room, reply=True)
    check(shortened is not None, f"the system message alone fills the context of {block_size} tokens: shorten it")
    return shortened[0], len(whole) - len(shortened[0])
