"""export.py as a real process, its folder read by transformers, trl, an OpenAI client and llama.cpp, and back again."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import error_of, make_model, start
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import checkpoint
from cli import UserError
from export import CHAT_TEMPLATE, model_card
from model import IGNORE
from tokenizer import CHAT_TOKENS, ROLES, load_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers reads what is exported")

HELLO = [{"role": "user", "content": "After 5?"}]


@pytest.fixture(scope="module")
def talker(tmp_path_factory, finetuned) -> Path:
    """The `finetuned` run, gone on to learn one answer by heart, and when to stop."""
    loaded = checkpoint.load(str(finetuned))
    tokens, learned = loaded.tokenizer.encode_chat([*HELLO, {"role": "assistant", "content": "Six, of course."}])
    targets = torch.tensor([[t if known else IGNORE for t, known in zip(tokens, learned, strict=True)]])[:, 1:]
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = loaded.model(torch.tensor([tokens])[:, :-1], targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss / learned.count(True) < 0.1
    folder = tmp_path_factory.mktemp("talker") / "run" / "step_000072"
    meta = checkpoint.read_meta(finetuned / "step_000012")
    checkpoint.save(folder, loaded.model, {}, meta)
    return folder.parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory, talker) -> Path:
    """The `talker` as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported")
    start("export.py", "--checkpoint", talker, "--out", "here", cwd=folder)
    return folder / "here"


def load(folder: Path):
    """What transformers makes of a folder: the tokenizer and the model."""
    return transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)


# ---- transformers reads it -----------------------------------------------------------------------------------------


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
        ours, theirs = checkpoint.load(str(source)).model.eval()(tokens), model.eval()(tokens).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["gpt2", "bytes"])
def both_tokenizers(request, tmp_path_factory):
    """(ours, the exported one as transformers reads it)."""
    own = request.getfixturevalue("gpt2_tokenizer") if request.param == "gpt2" else load_tokenizer("bytes")
    folder = tmp_path_factory.mktemp(request.param)
    start("export.py", "--checkpoint", make_model(folder / "run", own, chat=True), "--out", "here", cwd=folder)
    return own, transformers.AutoTokenizer.from_pretrained(folder / "here")


SPECIAL = ("<|endoftext|>", *CHAT_TOKENS)
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\t '’é東🙂 st"), max_size=60)
texts = texts.filter(lambda text: not any(name in text for name in SPECIAL))  # of which the test below is


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
@example(text="  leading\n\n\ttabs and trailing   ")
@example(text="I'll we've <|x|> \u00a0\u3000 ١٢٣ ½ e\u0301 \x00\x85")
def test_the_tokens_are_ours(both_tokenizers, text):
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
def test_the_chat_template_gives_our_tokens(both_tokenizers, messages, reply):
    own, theirs = both_tokenizers
    tokens = theirs.apply_chat_template(messages, add_generation_prompt=reply, return_dict=False)
    assert tokens == own.encode_chat(messages, reply=reply)[0]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=messages)
def test_the_chat_template_marks_what_is_learned(both_tokenizers, messages):
    own, theirs = both_tokenizers
    marked = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
    tokens, learned = own.encode_chat(messages)
    assert (marked["input_ids"], list(map(bool, marked["assistant_masks"]))) == (tokens, learned)


def test_nobody_types_a_special_token_into_the_chat_template(both_tokenizers):
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


def test_the_chat_template_refuses_other_roles(both_tokenizers):
    with pytest.raises(Exception, match="unknown role tool"):
        both_tokenizers[1].apply_chat_template([{"role": "tool", "content": "x"}])
    assert all(f"'{role}'" in CHAT_TEMPLATE for role in ROLES)


def test_the_merges_are_those_of_gpt2(both_tokenizers):
    own, theirs = both_tokenizers
    merges = json.loads(theirs.backend_tokenizer.to_str())["model"]["merges"]
    assert len(merges) == (50_000 if own.name == "gpt2" else 0)
    assert merges[:3] == [["Ġ", "t"], ["Ġ", "a"], ["h", "e"]][: len(merges)]  # the first lines of OpenAI's vocab.bpe


def greedy(run_script, source: Path, prompt: str, *flags: object) -> str:
    """What generate.py answers, always taking the likeliest token."""
    done = run_script("generate.py", "--checkpoint", source, "--prompt", prompt, "--temperature", 0, *flags)
    return done.stdout.removesuffix("\n")


def test_a_pipeline_answers_as_we_do_and_stops(exported, talker, run_script):
    answer = transformers.pipeline("text-generation", model=str(exported))(HELLO, do_sample=False, max_new_tokens=50)
    text = answer[0]["generated_text"][-1]["content"]
    assert text == greedy(run_script, talker, "After 5?") == "Six, of course."


def test_a_text_model_goes_on_as_ours_does(run_script, pretrained, tmp_path):
    run_script("export.py", "--checkpoint", pretrained, "--out", "here")
    write = transformers.pipeline("text-generation", model=str(tmp_path / "here"))
    text = write("<|endoftext|>Document 5", do_sample=False, max_new_tokens=30)[0]["generated_text"]
    ours = greedy(run_script, pretrained, "Document 5", "--max_tokens", 30)
    assert text.removeprefix("<|endoftext|>") == ours


# ---- it comes home -------------------------------------------------------------------------------------------------


def test_every_script_takes_an_exported_folder(exported, talker, run_script, chat_data, tmp_path):
    assert greedy(run_script, exported, "After 5?") == "Six, of course."
    home, there = checkpoint.load(str(exported)), checkpoint.load(str(talker))
    assert home.chat and home.tokenizer.name == "bytes"
    for name, weight in there.model.state_dict().items():
        torch.testing.assert_close(home.model.state_dict()[name][:261], weight[:261], rtol=0, atol=0)
    flags = ("--data", chat_data, "--steps", 1, "--batch_tokens", 1024, "--micro_batch_size", 8)
    run_script("finetune.py", "--init", exported, "--run", "again", *flags)
    run_script("export.py", "--checkpoint", "again", "--out", "twice")
    assert "Weights from" in (tmp_path / "twice" / "README.md").read_text()


def test_what_trl_finetunes_comes_home(exported, run_script, tmp_path):
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
    trainer.save_model(str(tmp_path / "home"))
    assert greedy(run_script, tmp_path / "home", "After 5?") == "Trl was here."


@pytest.mark.parametrize(
    "ours, theirs, message",
    [
        ('"<|user|>"', '"<|human|>"', "has another chat format"),
        ('"a": 97', '"a": 98', "has other tokens than bytes"),
        ('"vocab": {', '"vocab": null, "x": {', "is damaged: it has no vocabulary"),
        ('"content": "<|user|>"', '"content": [1]', "is damaged: it has no vocabulary"),
        ('"added_tokens": [', '"added_tokens": null, "x": [', "is damaged: it has no vocabulary"),
    ],
)
def test_another_tokenizer_is_refused(exported, tmp_path, ours, theirs, message):
    shutil.copytree(exported, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    assert ours in file.read_text()
    file.write_text(file.read_text().replace(ours, theirs))
    with pytest.raises(UserError, match=message):
        checkpoint.load(str(tmp_path / "other"))


# ---- it is served --------------------------------------------------------------------------------------------------


def test_transformers_serve_answers_an_openai_client(exported, tmp_path):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    pytest.importorskip("uvicorn", reason="transformers[serving] is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cli = Path(sys.executable).with_name("transformers")
    command = [cli, "serve", exported, "--port", str(port), "--device", "cpu"]
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
    """Until a server answers; fails with its log where it ends before."""
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.25)
    raise AssertionError(f"no answer within a minute\n{log.read_text()}")


def test_llama_cpp_makes_the_same_tokens(gpt2_tokenizer, run_script, tmp_path):
    """Its own converter, and its Python binding, on a model with the gpt2 vocabulary, which GGUF knows."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    converter = Path(os.environ.get("LLAMA_CPP", "")) / "convert_hf_to_gguf.py"
    if not converter.is_file():
        pytest.skip("LLAMA_CPP does not name llama.cpp's source, with its converter")
    source = make_model(tmp_path / "run", gpt2_tokenizer, chat=True)
    run_script("export.py", "--checkpoint", source, "--out", "here")
    command = [sys.executable, converter, "here", "--outfile", "model.gguf", "--outtype", "f32"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, verbose=False)
    text = "The court’s 3 cats  are\n\n東京."
    assert llama.tokenize(text.encode(), add_bos=False) == gpt2_tokenizer.encode(text)
    ours = greedy(run_script, source, "The court’s", "--max_tokens", 20)
    tokens = gpt2_tokenizer.encode_chat([{"role": "user", "content": "The court’s"}], reply=True)[0]
    theirs = []
    for token in llama.generate(tokens, temp=0.0):
        if token >= gpt2_tokenizer.end_of_text or len(theirs) == 20:
            break
        theirs.append(token)
    assert gpt2_tokenizer.decode(theirs) == ours
    answer = llama.create_chat_completion([{"role": "user", "content": "The court’s"}], temperature=0, max_tokens=20)
    assert answer["choices"][0]["message"]["content"] == ours


# ---- the card, and what can go wrong -------------------------------------------------------------------------------


def test_the_card_tells_how_the_model_was_trained(exported, finetuned):
    card = (exported / "README.md").read_text()
    loss = checkpoint.load(str(finetuned)).history[-1]["metrics"]["val_loss"]
    assert "Pretrained on local files: text.jsonl." in card and "Finetuned on local files: chat.jsonl." in card
    assert f"| validation loss, nats per token | {loss:.4f} |" in card and "| tokens | 12,288 |" in card
    assert "| lr | 0.003 |" in card


def test_the_card_names_hub_datasets_and_their_licences(finetuned):
    loaded = checkpoint.load(str(finetuned))
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


def test_the_folder_appears_whole_or_not_at_all(exported, fails, run_script, finetuned, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("mine")
    assert "is there already" in fails("export.py", "--checkpoint", finetuned, "--out", "here")
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["mine.txt"]
    assert "no checkpoint there" in fails("export.py", "--checkpoint", "./nothing", "--out", "new")
    done = run_script("export.py", "--checkpoint", finetuned, "--out", "deep/new")
    assert re.search(r"next: transformers serve deep/new", done.stdout)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["new"]
    assert (tmp_path / "deep" / "new").stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "deep" / "new").iterdir()} == {0o644}


def test_without_the_tokenizers_package_one_line_says_so(run_script, finetuned, tmp_path):
    (tmp_path / "tokenizers.py").write_text("raise ImportError")
    out = ("--checkpoint", finetuned, "--out", "here")
    done = run_script("export.py", *out, env={"PYTHONPATH": str(tmp_path)}, expect=2)
    assert "pip install -r requirements-extra.txt" in error_of(done) and [p.name for p in tmp_path.iterdir()] == [
        "tokenizers.py"
    ]
