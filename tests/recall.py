"""Ask a finetuned model questions that it was trained on, and some that it was not; count the answers that are equal.

python tests/recall.py runs/demo_chat                       # after `make demo`
python tests/recall.py runs/mine --sample data/sample --n 200 --turns 3
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minigpt import cli
from minigpt.chat import encode_prompt
from minigpt.inference import make_generator, stream_text
from minigpt.pretrained import PretrainedModel, load_pretrained
from minigpt.sampling import SamplingParams


@dataclass(frozen=True)
class Config:
    run: tyro.conf.Positional[str] = "runs/demo_chat"
    """The run or checkpoint."""
    sample: Path = Path("data/sample")
    """The folder that prepare_sample.py wrote."""
    n: int = 60
    """Number of questions of each kind."""
    turns: int = 1
    """Ask this number of questions in one conversation, as a person does with --chat."""
    temperature: float = 0.8
    """Temperature of the answers; the seed is fixed."""


def main(config: Config) -> None:
    loaded = load_pretrained(config.run)
    print(f"{loaded.source}, temperature {config.temperature}")
    for name in ("chat", "chat_val"):
        lines = (config.sample / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
        pairs = sorted(set(zip(texts[::2], texts[1::2], strict=True)))
        chosen = random.Random(0).sample(pairs, min(config.n, len(pairs)))
        misses = []
        for start in range(0, len(chosen), config.turns):
            misses += ask(loaded, chosen[start : start + config.turns], config.temperature)
        kind = "trained" if name == "chat" else "held-out"
        print(f"{kind} questions: {len(chosen) - len(misses)} of {len(chosen)} answers are equal")
        for question, answer, expected in misses[:5]:
            print(f"    {question}\n        answer    {answer}\n        expected  {expected}")


def ask(loaded: PretrainedModel, pairs: list[tuple[str, str]], temperature: float) -> list[tuple[str, str, str]]:
    """Ask questions in one conversation; return the (question, answer, expected answer) that differ."""
    params = SamplingParams(temperature=temperature, max_tokens=100)
    generator = make_generator(0, loaded.model.wte.weight.device)
    messages, misses = [], []
    for question, expected in pairs:
        messages.append({"role": "user", "content": question})
        block_size = loaded.model.config.block_size
        prompt, _ = encode_prompt(loaded.tokenizer, messages, block_size, params.max_tokens)
        pieces = stream_text(loaded.model, loaded.tokenizer, prompt, params, generator)
        answer = "".join(piece or "" for [piece] in pieces)
        messages.append({"role": "assistant", "content": answer})
        if answer != expected:
            misses.append((question, answer, expected))
    return misses


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
