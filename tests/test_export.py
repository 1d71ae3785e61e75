"""export.py as a real process; transformers, trl, an OpenAI client, llama.cpp and our own scripts read its folder."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, start
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import prepare_tokenizer
from export import CHAT_TEMPLATE, model_card
from minigpt import checkpoint, runs
from minigpt.chat import encode_chat
from minigpt.cli import UserError
from minigpt.pretrained import load_pretrained
from minigpt.tokenizer import CHAT_TOKENS, ROLES, load_tokenizer
from model import GPT, IGNORE_INDEX, PRESETS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

HELLO = [{"role": "user", "content": "After 5?"}]


@pytest.fixture(scope="module")
def memorized(tmp_path_factory, finetuned) -> Path:
    """Return a run with a trained vocabulary. Its model has memorized one answer and its end."""
    folder = tmp_path_factory.mktemp("memorized")
    (folder / "text.txt").write_text("After five comes six, of course.\n\n" * 200)
    source = {"files": (str(folder / "text.txt"),), "out": folder / "tokenizer", "vocab_size": 270}
    prepare_tokenizer.main(prepare_tokenizer.Config(**source))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    model = GPT(replace(PRESETS["tiny"], vocab_size=tokenizer.chat_vocab_size))
    messages = [*HELLO, {"role": "assistant", "content": "Six, of course."}]
    tokens, loss_mask = encode_chat(tokenizer, messages)
    targets = torch.tensor([[t if m else IGNORE_INDEX for t, m in zip(tokens, loss_mask, strict=True)]])[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(torch.tensor([tokens])[:, :-1], targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss / sum(loss_mask) < 0.1
    meta = runs.read_meta(finetuned / "step_000012")
    checkpoint.save(folder / "run" / "step_000072", model.config, model.state_dict(), tokenizer, {}, meta)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, memorized) -> Path:
    """Export the `memorized` run."""
    folder = tmp_path_factory.mktemp("exported")
    start("export.py", "--checkpoint", memorized, "--out", "here", cwd=folder)
    return folder / "here"


def load(folder: Path):
    """Load the tokenizer and the model with transformers."""
    return transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
@pytest.mark.parametrize("chat", [False, True])
def test_transformers_computes_the_same_logits(run_script, tmp_path, name, chat, request):
    own = request.getfixturevalue("gpt2_tokenizer") if name == "gpt2" else load_tokenizer("bytes")
    source = make_model(tmp_path / "run", own, chat)
    run_script("export.py", "--checkpoint", source, "--out", "here")
    tokenizer, model = load(tmp_path / "here")
    size = own.chat_vocab_size if chat else own.vocab_size
    assert len(tokenizer) == model.config.vocab_size == len(model.transformer.wte.weight) == size
    tokens = torch.randint(0, size, (2, 64))
    with torch.no_grad():
        ours, theirs = load_pretrained(str(source)).model.eval()(tokens), model.eval()(tokens).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["gpt2", "bytes"])
def both_tokenizers(request, tmp_path_factory):
    """Return (our tokenizer, the exported one loaded by transformers)."""
    own = request.getfixturevalue("gpt2_tokenizer") if request.param == "gpt2" else load_tokenizer("bytes")
    folder = tmp_path_factory.mktemp(request.param)
    start("export.py", "--checkpoint", make_model(folder / "run", own, chat=True), "--out", "here", cwd=folder)
    return own, transformers.AutoTokenizer.from_pretrained(folder / "here")


SPECIAL = ("<|endoftext|>", *CHAT_TOKENS)
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\t '’é東🙂 st"), max_size=60)
texts = texts.filter(lambda text: not any(name in text for name in SPECIAL))  # a test below covers these


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
@example(text="  leading\n\n\ttabs and trailing   ")
@example(text="I'll we've <|x|> \u00a0\u3000 ١٢٣ ½ e\u0301 \x00\x85")
def test_same_tokens_as_ours(both_tokenizers, text):
    own, theirs = both_tokenizers
    tokens = theirs(text)["input_ids"]
    assert tokens == own.encode(text)
    assert theirs.decode(tokens) == text


messages = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(ROLES), texts), min_size=1
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=messages, reply=st.booleans())
@example(messages=[{"role": "user", "content": "  {{ 1 + 1 }} {% if %} \n"}], reply=True)
def test_chat_template_gives_our_tokens(both_tokenizers, messages, reply):
    own, theirs = both_tokenizers
    tokens = theirs.apply_chat_template(messages, add_generation_prompt=reply, return_dict=False)
    assert tokens == encode_chat(own, messages, add_generation_prompt=reply)[0]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=messages)
def test_chat_template_marks_the_loss_mask(both_tokenizers, messages):
    own, theirs = both_tokenizers
    batch = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
    assert (batch["input_ids"], list(map(bool, batch["assistant_masks"]))) == encode_chat(own, messages)


def test_chat_template_escapes_special_tokens(both_tokenizers):
    own, theirs = both_tokenizers
    for token in SPECIAL:
        message = {"role": "user", "content": f"a{token}b<{token}|>"}
        tokens = theirs.apply_chat_template([message], return_dict=False)
        assert [t for t in tokens if t >= own.end_of_text] == [
            own.end_of_text,
            own.role_tokens["user"],
            own.end_of_turn,
        ]
        name = token.removeprefix("<")
        assert theirs.decode(tokens[2:-1]) == f"a<{name.replace('|', '| ', 1)}b<<{name.replace('|', '| ', 1)}|>"


def test_chat_template_rejects_other_roles(both_tokenizers):
    with pytest.raises(Exception, match="unknown role tool"):
        both_tokenizers[1].apply_chat_template([{"role": "tool", "content": "x"}])
    assert all(f"'{role}'" in CHAT_TEMPLATE for role in ROLES)


def test_merges_are_those_of_gpt2(both_tokenizers):
    own, theirs = both_tokenizers
    merges = json.loads(theirs.backend_tokenizer.to_str())["model"]["merges"]
    assert len(merges) == (50_000 if own.name == "gpt2" else 0)
    assert merges[:3] == [["Ġ", "t"], ["Ġ", "a"], ["h", "e"]][: len(merges)]  # the first lines of OpenAI's vocab.bpe


def greedy(run_script, source: Path, prompt: str, *flags: object) -> str:
    """Return the output of generate.py with greedy decoding."""
    done = run_script("generate.py", "--checkpoint", source, "--prompt", prompt, "--temperature", 0, *flags)
    return done.stdout.removesuffix("\n")


def test_chat_pipeline_gives_our_answer(exported, memorized, run_script):
    answer = transformers.pipeline("text-generation", model=str(exported))(HELLO, do_sample=False, max_new_tokens=50)
    text = answer[0]["generated_text"][-1]["content"]
    assert text == greedy(run_script, memorized, "After 5?") == "Six, of course."


def test_text_pipeline_gives_our_continuation(run_script, pretrained, tmp_path):
    run_script("export.py", "--checkpoint", pretrained, "--out", "here")
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "here"))
    text = pipeline("<|endoftext|>Document 5", do_sample=False, max_new_tokens=30)[0]["generated_text"]
    ours = greedy(run_script, pretrained, "Document 5", "--max_tokens", 30)
    assert text.removeprefix("<|endoftext|>") == ours


# ---- back to our scripts ---------------------------------------------------------------------------------------------


def test_our_scripts_read_an_exported_folder(exported, memorized, run_script, tmp_path):
    assert greedy(run_script, exported, "After 5?") == "Six, of course."
    loaded, original = load_pretrained(str(exported)), load_pretrained(str(memorized))
    assert loaded.is_chat and loaded.tokenizer.name == original.tokenizer.name
    for name, weight in original.model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name][:274], weight[:274], rtol=0, atol=0)
    (tmp_path / "chat.csv").write_text("question,answer\n" + "".join(f"After {i}?,{i + 1}\n" for i in range(50)))
    data = ("--files", "chat.csv", "--tokenizer", exported, "--block_size", 64, "--val_fraction", 0.2)
    run_script("prepare_dolly.py", *data, "--out", "data/chat")
    flags = ("--data", "data/chat", "--steps", 1, "--batch_tokens", 1024, "--micro_batch_size", 8)
    run_script("finetune.py", "--init", exported, "--out", "runs/again", *flags)
    run_script("export.py", "--checkpoint", "runs/again", "--out", "twice")
    assert "Weights from" in (tmp_path / "twice" / "README.md").read_text()


def test_our_scripts_read_what_trl_finetuned(exported, run_script, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    conversation = [*HELLO, {"role": "assistant", "content": "Trl was here."}]
    trainer = trl.SFTTrainer(
        model=str(exported),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"), max_steps=60, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False,
            per_device_train_batch_size=4, save_strategy="no", logging_strategy="no", disable_tqdm=True,
            lr_scheduler_type="constant", assistant_only_loss=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"messages": conversation}] * 240),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    assert greedy(run_script, tmp_path / "tuned", "After 5?") == "Trl was here."


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"<|user|>"', '"<|human|>"', "has another chat format"),
        ('"a": 97', '"a": 98', "its ids have gaps"),
        ('"use_regex": true', '"use_regex": "x", "add_prefix_space": true', "splits text by another pattern"),
        ('"vocab": {', '"vocab": null, "x": {', "is corrupt or not a byte-level BPE vocabulary"),
        ('"content": "<|user|>"', '"content": [1]', "is corrupt or not a byte-level BPE vocabulary"),
        ('"added_tokens": [', '"added_tokens": null, "x": [', "is corrupt or not a byte-level BPE vocabulary"),
    ],
)
def test_another_tokenizer_is_rejected(exported, tmp_path, old, new, message):
    shutil.copytree(exported, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        load_pretrained(str(tmp_path / "other"))


# ---- servers ---------------------------------------------------------------------------------------------------------


def test_transformers_serve_answers_an_openai_client(exported, tmp_path):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    pytest.importorskip("uvicorn", reason="transformers[serving] is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transformers_cli = Path(sys.executable).with_name("transformers")
    command = [transformers_cli, "serve", exported, "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log.txt", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HOME": str(tmp_path)})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log.txt")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
        answer = client.chat.completions.create(model=str(exported), messages=HELLO, temperature=0, max_tokens=50)
        assert answer.choices[0].message.content == "Six, of course."
        pieces = client.chat.completions.create(
            model=str(exported), messages=HELLO, temperature=0, max_tokens=50, stream=True
        )
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "Six, of course."
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers; if it exits before, fail with its log."""
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.25)
    raise AssertionError(f"no answer within a minute\n{log.read_text()}")


def test_llama_cpp_gives_our_tokens_and_answer(gpt2_tokenizer, run_script, tmp_path):
    """Use its converter and its Python binding; GGUF supports only the gpt2 vocabulary."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    converter = Path(os.environ.get("LLAMA_CPP", "")) / "convert_hf_to_gguf.py"
    if not converter.is_file():
        pytest.skip("LLAMA_CPP is not set to a folder with llama.cpp's source")
    source = make_model(tmp_path / "run", gpt2_tokenizer, chat=True)
    run_script("export.py", "--checkpoint", source, "--out", "here")
    command = [sys.executable, converter, "here", "--outfile", "model.gguf", "--outtype", "f32"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, verbose=False)
    text = "The court’s 3 cats  are\n\n東京."
    assert llama.tokenize(text.encode(), add_bos=False) == gpt2_tokenizer.encode(text)
    ours = greedy(run_script, source, "The court’s", "--max_tokens", 20)
    messages = [{"role": "user", "content": "The court’s"}]
    tokens = encode_chat(gpt2_tokenizer, messages, add_generation_prompt=True)[0]
    theirs = []
    for token in llama.generate(tokens, temp=0.0):
        if token >= gpt2_tokenizer.end_of_text or len(theirs) == 20:
            break
        theirs.append(token)
    assert gpt2_tokenizer.decode(theirs) == ours
    answer = llama.create_chat_completion(messages, temperature=0, max_tokens=20)
    assert answer["choices"][0]["message"]["content"] == ours


# ---- model card and errors -------------------------------------------------------------------------------------------


def test_model_card_describes_the_training(exported, finetuned):
    card = (exported / "README.md").read_text()
    loss = load_pretrained(str(finetuned)).history[-1]["metrics"]["val_loss"]
    assert "Pretrained on local files: text.jsonl." in card and "Finetuned on local files: chat.jsonl." in card
    assert f"| validation loss, nats per token | {loss:.4f} |" in card and "| tokens | 12,288 |" in card
    assert "| lr | 0.003 |" in card


def test_model_card_names_hub_datasets_and_licences(finetuned):
    loaded = load_pretrained(str(finetuned))
    edu = {"dataset": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "revision": "0123456789abcdef"}
    dolly = {"dataset": "databricks/databricks-dolly-15k", "name": None, "revision": None}
    loaded.history[0]["source"], loaded.history[1]["source"] = edu, dolly
    card = model_card(loaded)
    assert "HuggingFaceFW/fineweb-edu/sample-10BT at revision 0123456789ab" in card
    assert "ODC-By 1.0" in card and "CC BY-SA 3.0" in card
    loaded.history[1]["source"] = {"mix": [{"weight": 2.0} | edu, {"weight": 0.5, "files": [{"file": "a/mine.jsonl"}]}]}
    mixed = model_card(loaded)
    assert "2 x HuggingFaceFW/fineweb-edu/sample-10BT" in mixed and "0.5 x local files: mine.jsonl" in mixed
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.datasets == [edu["dataset"], dolly["dataset"]]


def test_the_folder_is_complete_or_absent(exported, fails, run_script, finetuned, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("mine")
    assert "already exists" in fails("export.py", "--checkpoint", finetuned, "--out", "here")
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["mine.txt"]
    assert "no checkpoint found" in fails("export.py", "--checkpoint", "./nothing", "--out", "new")
    done = run_script("export.py", "--checkpoint", finetuned, "--out", "deep/new")
    assert "transformers serve deep/new" in done.stdout
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["new"]
    assert (tmp_path / "deep" / "new").stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "deep" / "new").iterdir()} == {0o644}
