"""Export a checkpoint as a Hugging Face folder that transformers, trl, vLLM and llama.cpp's converter can read.

    python export.py --out exported                                 # the newest run under runs/
    python export.py --checkpoint runs/gpt2 --out exported_gpt2
    hf upload YOU/YOUR-MODEL exported                               # optional: publish it on the Hub

The folder holds the weights, the tokenizer, a model card with the training history and, for a chat model, a chat
template. Every script that has --checkpoint or --init reads such a folder as well, for example a model that was
finetuned elsewhere. Takes about 10 seconds for GPT-2 124M.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minigpt import cli
from minigpt.cli import CheckpointConfig, UserError
from minigpt.files import atomic_rename, fsync, write_file, write_json
from minigpt.hf import save_hf
from minigpt.pretrained import PretrainedModel, load_pretrained
from minigpt.sampling import SamplingParams
from minigpt.tokenizer import TOKENIZER_FILE


@dataclass(frozen=True)
class Config(CheckpointConfig):
    out: Path = Path("exported")
    """Folder to create."""


def main(config: Config) -> None:
    out = config.out
    check_out(out)
    loaded = load_pretrained(config.checkpoint)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as folder:
            write_files(Path(folder), loaded)
            atomic_rename(Path(folder), out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out} could not be written: {error}") from None
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"exported {loaded.source} to {out}: {loaded.model.config.num_parameters:,} parameters, {size:,.1f} MB")
    print(f"serve it with: transformers serve {shlex.quote(str(out))} (other uses: docs/integrations.md)")


def check_out(out: Path) -> None:
    """Raise `UserError` unless `out` is absent or an empty folder."""
    if str(out) == ".":
        raise UserError("--out is empty: name a folder to create")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} already exists: delete it or choose another folder")


def write_files(folder: Path, loaded: PretrainedModel) -> None:
    """Write every file of the exported folder and flush it to disk."""
    save_hf(loaded.model, folder)
    tokenizer = loaded.tokenizer
    stop_tokens = [tokenizer.end_of_text]
    if loaded.is_chat:
        stop_tokens = [tokenizer.end_of_turn, tokenizer.end_of_text, *tokenizer.role_tokens.values()]
    ids = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": stop_tokens[0], "pad_token_id": tokenizer.end_of_text}
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | ids | {"dtype": "float32"})
    defaults = SamplingParams()
    # transformers does not check that prompt and reply fit into the context: leave half of it to the prompt.
    max_tokens = min(defaults.max_tokens, loaded.model.config.block_size // 2)
    generation = ids | {"eos_token_id": stop_tokens, "max_new_tokens": max_tokens}
    generation |= {"do_sample": True, "temperature": defaults.temperature, "top_k": defaults.top_k}
    write_json(folder / "generation_config.json", generation)
    write_file(folder / TOKENIZER_FILE, tokenizer.to_json(chat=loaded.is_chat))
    write_json(folder / "tokenizer_config.json", tokenizer_config(loaded))
    if loaded.is_chat:
        write_file(folder / "chat_template.jinja", CHAT_TEMPLATE)
    write_file(folder / "README.md", model_card(loaded))
    folder.chmod(0o755)  # tempfile and safetensors allow only the owner; a server may run as another user
    for file in folder.iterdir():
        file.chmod(0o644)
        fsync(file)


def tokenizer_config(loaded: PretrainedModel) -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|end|>" if loaded.is_chat else "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": loaded.model.config.block_size,
        "clean_up_tokenization_spaces": False,
    }


# The template gives the same tokens as `encode_chat`. Transformers replaces the names of special tokens anywhere in the
# conversation, so names in a message's text get a space to stay ordinary text. {% generation %} marks the loss mask for
# trl's assistant_only_loss.
CHAT_TEMPLATE = """\
{{- '<|endoftext|>' }}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception('unknown role ' ~ message['role'] ~ ': it must be system, user or assistant') }}
{%- endif %}
{%- set text = namespace(value=message['content']) %}
{%- for name in ['endoftext|>', 'system|>', 'user|>', 'assistant|>', 'end|>'] %}
{%- set text.value = text.value | replace('<|' ~ name, '<| ' ~ name) %}
{%- endfor %}
{{- '<|' ~ message['role'] ~ '|>' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- text.value ~ '<|end|>' }}{%- endgeneration %}
{%- else %}
{{- text.value ~ '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""


def model_card(loaded: PretrainedModel) -> str:
    """Return README.md in the Hub's format, with the checkpoint's training history."""
    from huggingface_hub import ModelCardData

    config, folder = loaded.model.config, Path(loaded.source)
    folder = folder.resolve() if folder.is_dir() else folder
    name = folder.parent.name if folder.name.startswith("step_") else folder.name
    datasets = [dataset for training in loaded.history for dataset in hub_datasets(training["source"])]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=datasets or None,
        tags=["gpt2", "conversational"] if loaded.is_chat else ["gpt2"],
    )
    ability = "answers in conversations" if loaded.is_chat else "continues texts"
    lines = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {name}\n",
        f"A GPT-2 that {ability}: {config.num_parameters:,} parameters in {config.n_layer} layers of {config.n_embd}"
        f" dimensions and {config.n_head} heads, a context of {config.block_size:,} tokens, the {loaded.tokenizer.name}"
        f" tokenizer with {config.vocab_size:,} tokens. Weights in float32.\n",
        "## Use\n",
        "```python\nfrom transformers import pipeline\n",
        'generate = pipeline("text-generation", model="FOLDER OR HUB ID")',
        CHAT_USAGE if loaded.is_chat else TEXT_USAGE,
        "```\n",
        f"Prompt and answer together must fit the context of {config.block_size:,} tokens.\n",
        "## Training\n",
        *map(format_training, loaded.history),
        "## Limits and licences\n",
        "The model is small and often wrong. It has not been tested for safety or bias.\n",
        *(f"{LICENSES[dataset]}\n" for dataset in dict.fromkeys(datasets) if dataset in LICENSES),
    ]
    return "\n".join(lines)


CHAT_USAGE = """\
messages = [{"role": "user", "content": "Why is the sky blue?"}]
print(generate(messages)[0]["generated_text"][-1]["content"])"""
TEXT_USAGE = 'print(generate("Once upon a time")[0]["generated_text"])'

LICENSES = {  # hub dataset -> what its licence requires
    "HuggingFaceFW/fineweb-edu": "FineWeb-Edu is under ODC-By 1.0: attribute it in published derivatives.",
    "databricks/databricks-dolly-15k": "databricks-dolly-15k is under CC BY-SA 3.0: attribute it and share alike.",
}


def hub_datasets(source: Any) -> list[str]:
    """Return the hub datasets in the "source" entry of a dataset's meta.json."""
    if not isinstance(source, dict):
        return []
    own = [source["dataset"]] if source.get("dataset") else []
    return own + [dataset for part in source.get("mix") or [] for dataset in hub_datasets(part)]


def format_training(training: dict) -> str:
    """Format one training run as a sentence and a table of results and hyperparameters."""
    config = training.get("config")
    if not config:
        return f"Weights from {format_source(training['source'])}.\n"
    verb = "Finetuned" if "init" in config else "Pretrained"
    step, loss = training.get("step") or 0, (training.get("metrics") or {}).get("val_loss")
    rows = {
        "steps": f"{step:,}",
        "tokens": f"{step * (config.get('batch_tokens') or 0):,}",
        "validation loss, nats per token": f"{loss:.4f}" if loss is not None else "not measured",
    }
    config = config | (training.get("schedule") or {})  # the default warmup is not a flag's value
    names = ("batch_tokens", "optimizer", "lr", "embedding_lr", "schedule", "warmup_steps", "weight_decay", "grad_clip")
    names += ("decay_fraction", "dropout", "seed") if config.get("schedule") == "wsd" else ("dropout", "seed")
    rows |= {name: config[name] for name in names if config.get(name) is not None}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"{verb} on {format_source(training['source'])}.\n\n| | |\n|---|---|\n{table}"


def format_source(source: Any) -> str:
    """Format a "source" entry: that of a dataset's meta.json, or the folder or hub id of downloaded weights."""
    if isinstance(source, str) or not source:
        return f"`{source}`" if source else "an unknown source"
    if source.get("dataset"):
        revision = f" at revision {source['revision'][:12]}" if source.get("revision") else ""
        return f"{source['dataset']}{'/' + source['name'] if source.get('name') else ''}{revision}"
    if source.get("files"):
        return f"local files: {', '.join(Path(file['file']).name for file in source['files'])}"
    return "; ".join(f"{part.get('weight', 1):g} x {format_source(part)}" for part in source.get("mix") or [])


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
