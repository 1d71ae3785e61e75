"""chat_web.py in a real browser: an empty page, answers, stop and retry, Markdown, errors, two users, a phone."""

import contextlib
import dataclasses
import http.client
import os
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import pytest
import torch
from conftest import edit_manifest, start
from hypothesis import example, given
from hypothesis import strategies as st
from screenshot import CHROMIUM, DRIVER, Browser, browser, chat_page, free_port

import chat_web
from minigpt.cli import InferenceConfig
from minigpt.inference import load_for_inference
from minigpt.pretrained import PretrainedModel

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-extra.txt")
pytest.importorskip("selenium", reason="selenium is not installed: pip install -r requirements-dev.txt")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium or chromedriver is not installed"
)


@pytest.fixture(scope="module")
def served(chatterbox):
    """Serve a model that never ends its turn; yields the page's address and the process."""
    with chat_page(chatterbox) as page:
        yield page


@pytest.fixture(scope="module")
def shared_browser():
    """Start a browser for several tests, each in its own tab, which has its own session storage."""
    with browser() as opened:
        yield opened


@pytest.fixture
def tab(shared_browser):
    """Open an empty tab; its pages must send no request to another host."""
    first = shared_browser.driver.current_window_handle
    shared_browser.driver.switch_to.new_window("tab")
    shared_browser.resize(1100, 700)
    yield shared_browser
    hosts = shared_browser.requested_hosts()
    shared_browser.driver.close()
    shared_browser.driver.switch_to.window(first)
    assert hosts == {"127.0.0.1"}


@pytest.fixture
def page(served, tab):
    """Open the served page."""
    tab.open(served[0])
    return tab


def load(checkpoint) -> PretrainedModel:
    return load_for_inference(InferenceConfig(checkpoint=str(checkpoint), device="cpu"))[0]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def generate(checkpoint, *args: object, **options) -> str:
    """Run generate.py and return its output."""
    return start("generate.py", "--checkpoint", checkpoint, *args, cwd=checkpoint, **options).stdout.rstrip("\n")


@needs_browser
def test_stop_and_retry(page, served):
    """A stopped answer costs no more CPU time and stays on the page; the next answer replaces or follows it."""
    page.fill("Max tokens", 50_000)
    page.ask("talk")
    lengths = set()
    page.until(lambda: lengths.add(sum(map(len, page.messages("bot")))) or len(lengths) > 4)
    page.find(".stop-button")[0].click()
    page.until(lambda: page.find(".submit-button"))
    stopped = page.messages("bot")
    before = cpu_seconds(served[1].pid)
    time.sleep(1.5)
    assert cpu_seconds(served[1].pid) - before < 0.75
    assert page.messages("bot") == stopped and len(stopped[0]) >= max(lengths)

    page.fill("Max tokens", 20)
    page.find("[aria-label=Retry]")[0].click()
    page.until(lambda: page.messages("bot") != stopped)
    again = page.answer()
    assert page.messages("user") == ["talk"] and len(again) == 20
    page.ask("more")
    page.answer(2)
    assert page.messages("user") == ["talk", "more"] and page.messages("bot")[0] == again
    page.find("[aria-label=Clear]")[0].click()
    page.until(lambda: page.messages("bot") == page.messages("user") == [])


@needs_browser
def test_settings_take_effect(page, chatterbox):
    """Answers equal those of generate.py with the same flags, exactly and in the second turn too."""
    questions = ["a <b>first</b> one:\n    if x &lt; 1 & y", "and more"]
    page.fill("System message", "Be kind.")
    page.fill("Temperature", 0)
    page.fill("Max tokens", 30)
    answers = []
    for number, question in enumerate(questions, 1):
        page.ask(question)
        answers.append(page.answer(number))
    flags = ("--temperature", 0, "--max_tokens", 30, "--system", "Be kind.")
    assert ["".join(message.split()) for message in page.messages("user")] == ["".join(q.split()) for q in questions]
    typed = "".join(question.replace("\n", "\\\n") + "\n" for question in questions)
    terminal = generate(chatterbox, "--chat", *flags, input=typed).partition("\n")[2]
    assert terminal.splitlines() == answers


@needs_browser
def test_same_seed_as_generate(page, chatterbox):
    flags = {"Temperature": 1.3, "Top p": 0.9, "Top k": 7, "Max tokens": 25, "Seed": 3}
    for label, value in flags.items():
        page.fill(label, value)
    page.ask("talk")
    named = [part for label, value in flags.items() for part in ("--" + label.lower().replace(" ", "_"), value)]
    assert page.answer() == generate(chatterbox, "--prompt", "talk", *named)


@needs_browser
def test_stop_before_the_first_token(page, served):
    """The question gets an empty answer, which Retry replaces; the next question does not join it."""
    page.fill("Max tokens", 50_000)
    page.ask("talk")
    page.until(lambda: page.messages("bot"))
    with browser() as waiting:  # for the first user's answer to end
        waiting.open(served[0])
        waiting.fill("Max tokens", 5)
        waiting.ask("first")
        waiting.until(lambda: "queue:" in waiting.find("body")[0].text)
        waiting.find(".stop-button")[0].click()
        waiting.until(lambda: waiting.find("[aria-label=Retry]"))
        assert waiting.messages("bot") == [""] and not waiting.find(".bot.message")[0].is_displayed()
        page.find(".stop-button")[0].click()
        waiting.ask("second")
        waiting.answer(2)
        assert waiting.messages("user") == ["first", "second"] and waiting.messages("bot")[0] == ""
        waiting.find("[aria-label=Undo]")[0].click()
        waiting.until(lambda: waiting.messages("user") == ["first"])
        waiting.find("[aria-label=Retry]")[0].click()
        waiting.until(lambda: len("".join(waiting.messages("bot"))) == 5)
        assert waiting.messages("user") == ["first"]


@needs_browser
def test_a_reload_keeps_the_conversation(page, served, chatterbox):
    """The next answer takes it into account. A reload during an answer keeps the part that was generated."""
    page.fill("Temperature", 0)
    page.fill("Max tokens", 30)
    page.ask("talk")
    first = page.answer()
    page.open(served[0])
    page.until(lambda: page.messages("user") == ["talk"] and page.messages("bot") == [first])
    page.fill("Temperature", 0)
    page.fill("Max tokens", 3000)
    page.ask("more")
    page.until(lambda: len(page.messages("bot")[-1]) > 50)  # longer than the first answer
    saved = "return JSON.parse(Object.values(sessionStorage)[0]).map(message => message.content[0].text)"
    page.until(lambda: len(page.driver.execute_script(saved)[-1]) > 50)
    page.open(served[0])
    page.until(lambda: page.messages("user") == ["talk", "more"] and page.messages("bot")[0] == first)
    typed = generate(chatterbox, "--chat", "--temperature", 0, "--max_tokens", 30, input="talk\nmore\n").splitlines()
    assert typed[1] == first and page.messages("bot")[1].startswith(typed[2])
    page.find("[aria-label=Clear]")[0].click()
    page.until(lambda: not page.messages("user"))
    page.open(served[0])
    assert page.messages("user") == []


@pytest.fixture
def open_page(tab, monkeypatch):
    """Return a function that serves a page in this process and opens it."""
    with contextlib.ExitStack() as stack:

        def open_page(loaded) -> Browser:
            chat_web.import_gradio()
            built, config = chat_web.build_page(loaded, torch.device("cpu")), chat_web.Config(port=free_port())
            monkeypatch.setattr(chat_web, "threading", mock.Mock())  # serve() does not wait
            chat_web.serve(built, config)
            stack.callback(built.close)
            tab.open(built.local_url)
            return tab

        yield open_page


MARKDOWN = """\
- **one** <b>two</b> &amp; <|end|>
- `a < b` ![image](http://elsewhere.invalid/a)

```python
if a < b & c:
    print("<i>")
```

\\`<img src="http://elsewhere.invalid/b" onerror="document.title = 1">\\` <script>document.title = 2</script>

    <s>"""


@needs_browser
def test_answers_are_rendered_as_markdown(open_page, chatterbox, monkeypatch):
    """Lists and code are; HTML is shown as text; images are not loaded; the model's own text is its history."""
    prompts = []
    monkeypatch.setattr(chat_web, "encode_prompt", lambda _, messages, **__: prompts.append(messages) or ([0], 0))
    monkeypatch.setattr(chat_web, "stream_text", lambda *_: iter([[MARKDOWN]]))
    page = open_page(load(chatterbox))
    for number in (1, 2):
        page.ask(MARKDOWN)
        page.answer(number)
    assert [message["content"] for message in prompts[1]] == [MARKDOWN] * 3
    for message in page.find(".message.user, .message.bot"):
        found = [element.text for element in message.find_elements("css selector", "li, strong, li code, pre code")]
        assert found[:4] == ["one <b>two</b> &amp; <|end|>", "one", "a < b\n!image", "a < b"]
        assert found[4].splitlines()[0] == "if a < b & c:" and 'print("<i>")' in found[4]
        assert "<script>document.title = 2</script>" in message.text and "<s>" in message.text
        assert not message.find_elements("css selector", "b, i, s, script")
    assert page.driver.title == "chatterbox0"


@needs_browser
def test_an_empty_page_describes_the_model(open_page, finetuned):
    """It shows its name, size and training, and three questions to click, but no path."""
    loaded = load(finetuned)
    page = open_page(loaded)
    text = page.find(".placeholder")[0].text
    assert text.splitlines() == [
        "run",
        f"{loaded.model.config.num_parameters:,} parameters, context of 64 tokens",
        "Trained on data for 12 steps",
        "Finetuned on data for 12 steps",
    ]
    questions = [example.text for example in page.find("button.example")]
    assert len(set(questions)) == 3 and all(question.startswith("After ") for question in questions)
    assert page.driver.title == "run" and str(finetuned.parent) not in page.driver.page_source
    page.driver.execute_script("arguments[0].click()", page.find("button.example")[1])
    page.answer()
    assert page.messages("user") == [questions[1]]


def test_example_questions(finetuned, chat_data, tmp_path):
    """They are the same each time; there are none without the dataset, or if it has another tokenizer."""
    loaded = load(finetuned)
    questions = chat_web.example_questions(loaded)
    assert questions == chat_web.example_questions(loaded) and len(questions) == 3
    shutil.copytree(chat_data, tmp_path / "data")
    loaded.history[-1]["config"]["data"] = str(tmp_path / "data")
    assert chat_web.example_questions(loaded) == questions
    edit_manifest(tmp_path / "data" / "meta.json", tokenizer="gpt2")
    assert chat_web.example_questions(loaded) == []
    shutil.rmtree(tmp_path / "data")
    assert chat_web.example_questions(loaded) == []
    loaded.history[:] = [{"source": "openai-community/gpt2"}]
    assert chat_web.example_questions(loaded) == [] and "Weights of gpt2" in chat_web.describe(loaded)


def test_dataset_names(finetuned):
    """A dataset of the hub has its name there, any other the name of its folder."""
    loaded = load(finetuned)
    loaded.history[0]["source"] = {"dataset": "owner/<name>"}
    assert "Trained on owner/&lt;name&gt; for 12 steps<br>Finetuned on data for" in chat_web.describe(loaded)
    assert chat_web.run_name(loaded) == "run"
    assert chat_web.run_name(dataclasses.replace(loaded, source="/home/me/exported")) == "exported"


@needs_browser
def test_an_error_is_a_notification(page):
    """The conversation can continue after it."""
    page.fill("System message", "long")
    field = page.find("textarea[placeholder='Instructions for the model']")[0]
    page.driver.execute_script(  # 2,400 characters at once
        "arguments[0].value = 'long '.repeat(480); arguments[0].dispatchEvent(new Event('input'))", field
    )
    page.ask("talk")
    page.close_toast("fills the context of 2048 tokens")
    page.fill("System message", "short")
    page.fill("Max tokens", 5)
    page.fill("Temperature", 9)  # the page limits it to 2
    page.ask("more")
    page.until(lambda: len("".join(page.messages("bot"))) == 5)


@pytest.mark.parametrize("max_tokens, seed", [(-1, -1), (5, 1e20)])
def test_values_out_of_range_are_warnings(chatterbox, monkeypatch, max_tokens, seed):
    warnings = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    model = (load(chatterbox), torch.device("cpu"))
    assert list(chat_web.stream_answer(*model, "and", [], "", 0.8, 200, 1.0, max_tokens, seed)) == [""]
    assert len(warnings) == 1 and "it must be at least" in warnings[0] and not warnings[0].startswith("--")


@needs_browser
def test_two_users_at_once(page, served, chatterbox):
    """The second waits for the first, and both get the answer that they would get alone."""
    with browser() as other:
        other.resize(1100, 700)
        other.open(served[0])
        for user, max_tokens in ((page, 300), (other, 40)):
            user.fill("Temperature", 0)
            user.fill("Max tokens", max_tokens)
        page.ask("talk")
        other.ask("and me")
        assert other.answer() == generate(chatterbox, "--prompt", "and me", "--temperature", 0, "--max_tokens", 40)
        assert page.answer() == generate(chatterbox, "--prompt", "talk", "--temperature", 0, "--max_tokens", 300)


@needs_browser
def test_on_a_phone(page, served):
    """The conversation is visible, the sidebar opens on request, and nothing is wider than the screen."""
    page.resize(390, 844)
    page.open(served[0])
    box = page.until(lambda: next(b for b in page.find("textarea") if b.is_displayed()))
    assert box.rect["x"] >= 0 and box.rect["x"] + box.rect["width"] <= 390 and 700 < box.rect["y"] < 844
    x, y = box.rect["x"] + box.rect["width"] / 2, box.rect["y"] + box.rect["height"] / 2
    time.sleep(1)  # time for a sidebar to open, if it does
    assert page.driver.execute_script("return document.elementFromPoint(arguments[0], arguments[1])", x, y) == box
    page.ask("talk")
    page.answer()
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
    page.find("[aria-label='Toggle Sidebar']")[0].click()
    page.fill("Max tokens", 5)


@given(st.text("ab`~<&![]\n \t;", max_size=60))
@example(MARKDOWN)
@example("    a < b\n\n~~~\n&lt;&amp;&#33;[")
def test_messages_are_escaped_for_the_browser(text):
    """They return unchanged."""
    assert chat_web.unescape(chat_web.escape(text)) == text


def test_messages_of_the_chatbot(chatterbox):
    """Both roles' are escaped, with their spaces, and return unchanged."""
    texts = {"user": "<i>a</i>\n    b", "assistant": " <img src=x onerror=alert(1)> &lt; \n"}
    chatbot = chat_web.build_chatbot(load(chatterbox))
    sent = chatbot.postprocess([{"role": role, "content": text} for role, text in texts.items()])
    assert [message.content[0].text for message in sent.root] == [chat_web.escape(text) for text in texts.values()]
    assert "<" not in "".join(message.content[0].text for message in sent.root)
    back = chatbot.preprocess(sent)
    assert {message["role"]: message["content"][0]["text"] for message in back} == texts


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("display", [{"DISPLAY": ":0"}, {"WAYLAND_DISPLAY": "wayland-0"}, {}])
def test_has_desktop(monkeypatch, terminal, display):
    monkeypatch.setattr(chat_web.os, "environ", display)
    monkeypatch.setattr(chat_web.sys, "platform", "linux")
    monkeypatch.setattr(chat_web.sys.stdout, "isatty", lambda: terminal)
    assert chat_web.has_desktop() == (terminal and bool(display))


def test_the_page_bypasses_proxies_and_refuses_uploads(chatterbox, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with chat_page(chatterbox) as (url, _):
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc\r\n--x--\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        request = urllib.request.Request(f"{url}gradio_api/upload", body, headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
        assert refused.value.code == 413


def test_ctrl_c_stops_the_server(chatterbox):
    """It exits with code 0; the only line on stderr is the warning that other machines can connect."""
    with chat_page(chatterbox, "--host", "0.0.0.0") as (_, process):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors.startswith("warning: anyone who can connect to port")
    assert len(errors.splitlines()) == 1


def test_errors(fails, pretrained, chatterbox, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        error = f"--port {server.getsockname()[1]}: Address already in use; choose another --port"
        assert error in fails("chat_web.py", "--port", server.getsockname()[1])
    assert "--port is 0" in fails("chat_web.py", "--port", 0)
    assert "--host nowhere.invalid" in fails("chat_web.py", "--host", "nowhere.invalid")
    port = ("--port", free_port())
    assert "is not a chat model: finetune it first" in fails("chat_web.py", "--checkpoint", pretrained, *port)
    (tmp_path / "gradio.py").write_text("raise ImportError")
    without_gradio = {"env": {"PYTHONPATH": str(tmp_path)}, "fresh": True}
    assert "pip install -r requirements-extra.txt" in fails("chat_web.py", *port, **without_gradio)


def test_a_foreign_host_name_is_refused(served, chatterbox):
    """A website whose name points to this machine (DNS rebinding) does not reach the page. No name shows a path."""
    port = urlsplit(served[0]).port
    for host, status in ((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), (f"evil.example:{port}", 400)):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/config", headers={"Host": host})
        response = connection.getresponse()
        assert response.status == status
        assert status != 200 or str(chatterbox.parent) not in response.read().decode()


def test_an_answer_is_bounded(finetuned, monkeypatch):
    """The context limits its tokens, and MAX_ANSWER_SECONDS its time."""
    loaded = load(finetuned)
    asked = []
    monkeypatch.setattr(chat_web, "stream_text", lambda *args: asked.append(args[3].max_tokens) or iter([["a"]] * 9))
    values = (chat_web.torch.device("cpu"), "Hi", [], "", 0.8, 50, 1.0, 10**12, -1)
    assert list(chat_web.stream_answer(loaded, *values))[-1] == "a" * 9 and asked == [64]
    monkeypatch.setattr(chat_web, "MAX_ANSWER_SECONDS", -1)
    assert list(chat_web.stream_answer(loaded, *values))[-1] == "a"
