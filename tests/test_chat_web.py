"""chat_web.py in a real browser: answers, stop and retry, settings, escaping, errors, two users, a phone."""

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import start
from screenshot import CHROMIUM, DRIVER, browser, chat_page, free_port

import chat_web
from minigpt.cli import InferenceConfig
from minigpt.inference import load_for_inference

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


@pytest.fixture
def page(served):
    """Open the page in a new browser; it must send no request to another host."""
    with browser() as opened:
        opened.resize(1100, 700)
        opened.open(served[0])
        yield opened
        assert opened.requested_hosts() == {"127.0.0.1"}


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
    assert page.messages("user") == questions
    typed = "".join(question.replace("\n", "\\\n") + "\n" for question in questions)
    terminal = generate(chatterbox, "--chat", *flags, input=typed).partition("\n")[2]
    assert [line.removeprefix("> ").removeprefix("... ") for line in terminal.splitlines()[:2]] == answers


@needs_browser
def test_same_seed_as_generate(page, chatterbox):
    flags = {"Temperature": 1.3, "Top p": 0.9, "Top k": 7, "Max tokens": 25, "Seed": 3}
    for label, value in flags.items():
        page.fill(label, value)
    page.ask("talk")
    named = [part for label, value in flags.items() for part in ("--" + label.lower().replace(" ", "_"), value)]
    assert page.answer() == generate(chatterbox, "--prompt", "talk", *named)


@needs_browser
def test_messages_are_shown_verbatim(page):
    """Tags stay text, no image is fetched (the fixture checks this), and special tokens are visible."""
    question = "<b>bold</b> <img src=http://elsewhere.invalid/a.png> <|end|> *a* $$x$$ ![](http://elsewhere.invalid/b)"
    page.fill("Max tokens", 5)
    page.ask(question)
    page.answer()
    assert page.messages("user") == [question]
    assert not page.find("[data-testid=user] b, [data-testid=user] img, [data-testid=user] em")


@needs_browser
def test_an_error_is_a_notification(page):
    """The conversation can continue after it."""
    page.fill("System message", "long " * 120)
    page.ask("talk")
    page.close_toast("fills the context of 512 tokens")
    page.fill("System message", "short")
    page.fill("Max tokens", 5)
    page.fill("Temperature", 9)  # the page limits it to 2
    page.ask("more")
    page.until(lambda: len("".join(page.messages("bot"))) == 5)


@pytest.mark.parametrize("max_tokens, seed", [(-1, -1), (5, 1e20)])
def test_values_out_of_range_are_warnings(chatterbox, monkeypatch, max_tokens, seed):
    warnings = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    model = load_for_inference(InferenceConfig(checkpoint=str(chatterbox), device="cpu"))
    assert list(chat_web.stream_answer(*model, "and", [], "", 0.8, 200, 1.0, max_tokens, seed)) == []
    assert len(warnings) == 1 and "it must be at least" in warnings[0] and not warnings[0].startswith("--")


@needs_browser
def test_two_users_at_once(page, served, chatterbox):
    """The second waits for the first, and both get the answer that they would get alone."""
    with browser() as other:
        other.resize(1100, 700)
        other.open(served[0])
        for user, max_tokens in ((page, 600), (other, 40)):
            user.fill("Temperature", 0)
            user.fill("Max tokens", max_tokens)
        page.ask("talk")
        other.ask("and me")
        assert other.answer() == generate(chatterbox, "--prompt", "and me", "--temperature", 0, "--max_tokens", 40)
        assert page.answer() == generate(chatterbox, "--prompt", "talk", "--temperature", 0, "--max_tokens", 600)


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


def test_messages_are_escaped_for_the_browser():
    """Both roles' messages are, and they return unchanged."""
    texts = {"user": "<i>a</i>\n    b", "assistant": " <img src=x onerror=alert(1)> &lt; \n"}
    chatbot = chat_web.build_chatbot("model")
    sent = chatbot.postprocess([{"role": role, "content": text} for role, text in texts.items()])
    assert not {"<", ">"} & set("".join(message.content[0].text for message in sent.root))
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
    without_gradio = {"env": {"PYTHONPATH": str(tmp_path)}}
    assert "pip install -r requirements-extra.txt" in fails("chat_web.py", *port, **without_gradio)
