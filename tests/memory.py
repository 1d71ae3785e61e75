"""Print the memory tables of docs/scaling.md, which are calculated from the sizes of the models.

python tests/memory.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import PRESETS, GPTConfig

MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TRAINING = 16  # bytes per parameter: weights and gradients 4 each, AdamW's moments 8
BUCKETS = 4  # bytes per parameter that DDP needs in addition
GATHERED = 8  # bytes per parameter that a sharded model gathers: weights and gradients
ACTIVATIONS = 36  # bytes per token, channel and layer, with a residual stream in bfloat16
BLOCK_INPUT = 2  # bytes per token, channel and layer that activation checkpointing keeps
N_GPUS = 8


def main() -> None:
    print("| `--model` | parameters | 20 B per parameter | activations | with `--activation_checkpointing` |")
    print("|---|---|---|---|---|")
    for name in MODELS:
        config = PRESETS[name]
        per_layer = config.block_size * config.n_embd  # of one row
        everything = ACTIVATIONS * per_layer * config.n_layer
        checkpointing = (BLOCK_INPUT * config.n_layer + ACTIVATIONS) * per_layer
        sizes = (f"{size / 1e9:.2f} GB" for size in (everything, checkpointing))
        n = config.num_parameters
        print(f"| {name} | {n / 1e6:,.0f} M | {(TRAINING + BUCKETS) * n / 1e9:.1f} GB | {' | '.join(sizes)} |")
    print("\n| `--model` | DDP | `--shard` |\n|---|---|---|")
    for name in MODELS:
        config = PRESETS[name]
        ddp = (TRAINING + BUCKETS) * config.num_parameters
        sharded = TRAINING * config.num_parameters / N_GPUS + GATHERED * count_gathered(config)
        print(f"| {name} | {ddp / 1e9:.1f} GB | {sharded / 1e9:.1f} GB |")


def count_gathered(config: GPTConfig) -> int:
    """Return the parameters that a sharded model holds whole: the embeddings, and a block and the next one."""
    C = config.n_embd
    return (config.padded_vocab_size + config.block_size) * C + 2 * (12 * C * C + 13 * C)


if __name__ == "__main__":
    main()
