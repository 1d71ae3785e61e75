"""Write a checkpoint as a Hugging Face folder, which transformers, trl, vLLM, llama.cpp's converter and others read.

    python export.py --out exported                                 # runs/dolly if it is there, else runs/gpt2
    python export.py --checkpoint runs/gpt2 --out exported_gpt2
    hf upload YOU/YOUR-MODEL exported                               # to the Hub, if you like

The folder has the weights, the tokenizer, for a chat model its chat template, and a model card with what is known of
its training.  Every script here takes such a folder as --checkpoint or --init: what was finetuned elsewhere comes home.
"""

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import checkpoint
import cli
from checkpoint import Loaded
from cli import UserError, check
from files import flush, publish, write_json
from sampling import Sampling
from tokenizer import CHAT_TOKENS, Tokenizer

# A message's text must not become a special token, and these libraries look for the tokens' names in the whole
# conversation: a name that somebody typed gets a space in it.  Otherwise the tokens are those of `encode_chat`, and
# {% generation %} holds those that are learned, for trl's assistant_only_loss.
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

# What the sources ask for, by their names on the hub.
LICENSES = {
    "HuggingFaceFW/fineweb-edu": "FineWeb-Edu is under ODC-By 1.0: name it where you publish what is made of it.",
    "databricks/databricks-dolly-15k": "databricks-dolly-15k is under CC BY-SA 3.0: name it, and share alike.",
}


@dataclass(frozen=True)
class Config:
    checkpoint: str | None = None
    """A run (its best checkpoint), a checkpoint, a GPT-2 folder or hub id; None takes runs/dolly, else runs/gpt2."""
    out: Path = Path("exported")
    """The folder to make."""


def main(config: Config) -> None:
    taken = config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir()))
    check(not taken, f"--out {config.out} is there already: delete it, or choose another")
    check(str(config.out) != ".", "--out is empty: name a folder")
    loaded = checkpoint.load(config.checkpoint)
    temporary = None
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{config.out.name}.", dir=config.out.parent))
        write_folder(temporary, loaded)
        publish(temporary, config.out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {config.out} could not be written: {error}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in config.out.iterdir())
    out = shlex.quote(str(config.out))
    print(f"{loaded.source} -> {config.out}, {size / 1e6:,.1f} MB: {loaded.model.config.num_parameters:,} parameters")
    print(f"next: transformers serve {out}; or hf upload YOU/YOUR-MODEL {out}; see 'Use it elsewhere' in README.md")


def write_folder(folder: Path, loaded: Loaded) -> None:
    """All of the files, flushed to disk."""
    tokenizer = loaded.tokenizer
    ends = [tokenizer.end_of_text]
    if loaded.chat:
        ends = [tokenizer.end_of_turn, *ends, *tokenizer.role_tokens.values()]
    loaded.model.save_pretrained(folder)
    ids = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": ends[0], "pad_token_id": tokenizer.end_of_text}
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | ids | {"dtype": "float32"})
    usual = Sampling()
    sampling = {"do_sample": True, "temperature": usual.temperature, "top_k": usual.top_k}
    # transformers makes so many tokens without asking whether they fit the context behind the prompt.
    most = min(usual.max_tokens, loaded.model.config.block_size // 2)
    generation = ids | {"eos_token_id": ends, "max_new_tokens": most} | sampling
    write_json(folder / "generation_config.json", generation)
    build_tokenizer(tokenizer, loaded.chat).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(loaded))
    if loaded.chat:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "README.md").write_text(model_card(loaded))
    folder.chmod(0o755)  # it was made for the owner alone, as safetensors' files are; a server may be somebody else
    for file in folder.iterdir():
        file.chmod(0o644)
        flush(file)


# ---- the tokenizer -------------------------------------------------------------------------------------------------


def build_tokenizer(tokenizer: Tokenizer, chat: bool) -> Any:
    """The same tokenizer as the `tokenizers` library's byte-level BPE; `chat` adds the roles and the end of a turn.

    That library writes each byte as a visible character: those that are one in Latin-1 as themselves, the others as
    the characters from U+0100 on.
    """
    try:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError:
        raise UserError("export.py needs the tokenizers package: pip install -r requirements-extra.txt") from None
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    character = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}

    def written(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    ranks = {tokenizer.text_bytes(token): token for token in range(tokenizer.end_of_text)}
    vocab = {written(token): rank for token, rank in ranks.items()}
    merges = [(written(left), written(right)) for left, right in find_merges(ranks)]
    built = HFTokenizer(models.BPE(vocab=vocab, merges=merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=tokenizer.name == "gpt2")
    built.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", *(CHAT_TOKENS if chat else ()))
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return built


def find_merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two tokens that each token of several bytes was merged from, in the order of the merges.

    They are what byte-pair encoding makes of its bytes with the tokens before it alone.
    """
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def tokenizer_config(loaded: Loaded) -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|end|>" if loaded.chat else "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": loaded.model.config.block_size,
        "clean_up_tokenization_spaces": False,
    }


# ---- the model card ------------------------------------------------------------------------------------------------


def model_card(loaded: Loaded) -> str:
    """README.md: what the checkpoint knows of its training, in the Hub's form."""
    from huggingface_hub import ModelCardData

    config, folder = loaded.model.config, Path(loaded.source)
    folder = folder.resolve() if folder.is_dir() else folder
    name = folder.parent.name if folder.name.startswith("step_") else folder.name
    datasets = [dataset for training in loaded.history for dataset in hub_datasets(training["source"])]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=datasets or None,
        tags=["gpt2", "conversational"] if loaded.chat else ["gpt2"],
    )
    kind = "answers in conversations" if loaded.chat else "continues texts"
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        f"A GPT-2 that {kind}: {config.num_parameters:,} parameters in {config.n_layer} layers of {config.n_embd}"
        f" dimensions and {config.n_head} heads, a context of {config.block_size:,} tokens, the {loaded.tokenizer.name}"
        f" tokenizer with {config.vocab_size:,} tokens.  Weights in float32.\n",
        "## Use\n",
        "```python\nfrom transformers import pipeline\n",
        'generate = pipeline("text-generation", model="FOLDER OR HUB ID")',
        USE_CHAT if loaded.chat else USE_TEXT,
        "```\n",
        f"Prompt and answer together must fit the context of {config.block_size:,} tokens.\n",
        "## Training\n",
        *map(describe_training, loaded.history),
        "## Limits and licences\n",
        "A small model: it says what is likely, not what is true.  It was not tested for safety or bias.\n",
        *(f"{LICENSES[dataset]}\n" for dataset in dict.fromkeys(datasets) if dataset in LICENSES),
    ]
    return "\n".join(lines)


USE_CHAT = """\
messages = [{"role": "user", "content": "Why is the sky blue?"}]
print(generate(messages)[0]["generated_text"][-1]["content"])"""
USE_TEXT = 'print(generate("Once upon a time")[0]["generated_text"])'


def hub_datasets(source: Any) -> list[str]:
    """The datasets on the hub that a manifest's "source" names."""
    if not isinstance(source, dict):
        return []
    own = [source["dataset"]] if "dataset" in source else []
    return own + [dataset for part in source.get("mix", []) for dataset in hub_datasets(part)]


def describe_source(source: Any) -> str:
    """A manifest's "source", or that of someone else's weights, in words."""
    if isinstance(source, str) or not source:
        return f"`{source}`" if source else "an unknown source"
    if "dataset" in source:
        revision = f" at revision {source['revision'][:12]}" if source.get("revision") else ""
        return f"{source['dataset']}{'/' + source['name'] if source.get('name') else ''}{revision}"
    if "files" in source:
        return f"local files: {', '.join(Path(file['file']).name for file in source['files'])}"
    return "; ".join(f"{part.get('weight', 1):g} x {describe_source(part)}" for part in source.get("mix", []))


def describe_training(training: dict) -> str:
    """One training as a paragraph and a table of its figures and its recipe."""
    config = training.get("config")
    if not config:
        return f"Weights from {describe_source(training['source'])}.\n"
    verb = "Finetuned" if "init" in config else "Pretrained"
    loss = training["metrics"].get("val_loss")
    figures = {
        "steps": f"{training['step']:,}",
        "tokens": f"{training['step'] * config['batch_tokens']:,}",
        "validation loss, nats per token": f"{loss:.4f}" if loss is not None else "not measured",
    }
    recipe = ("batch_tokens", "lr", "warmup_fraction", "weight_decay", "grad_clip", "dropout", "seed")
    rows = figures | {name: str(config[name]) for name in recipe}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"{verb} on {describe_source(training['source'])}.\n\n| | |\n|---|---|\n{table}"


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
