"""chat_web.py in a real browser: what is asked and answered, stopped and repeated, set and kept apart."""

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
from inference import load_prepared

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-extra.txt")
pytest.importorskip("selenium", reason="selenium is not installed: pip install -r requirements-dev.txt")
needs_browser = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver here")


@pytest.fixture(scope="module")
def served(chatterbox):
    """The page of a model that talks without end, and its process."""
    with chat_page(chatterbox) as page:
        yield page


@pytest.fixture
def page(served):
    """The page in a browser of its own, which in the end has asked no other host for anything."""
    with browser() as opened:
        opened.size(1100, 700)
        opened.open(served[0])
        yield opened
        assert opened.hosts() == {"127.0.0.1"}


def cpu_seconds(pid: int) -> float:
    """The time that a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def generated(checkpoint, *args: object, **options) -> str:
    return start("generate.py", "--checkpoint", checkpoint, *args, cwd=checkpoint, **options).stdout.rstrip("\n")


@needs_browser
def test_an_answer_grows_is_stopped_and_made_again(page, served):
    """Stopped, the model computes no more; what was said stays, and is what the next answer replaces or follows."""
    page.fill("Max tokens", 50_000)
    page.ask("talk")
    lengths = set()
    page.until(lambda: lengths.add(sum(map(len, page.said("bot")))) or len(lengths) > 4)
    page.find(".stop-button")[0].click()
    page.until(lambda: page.find(".submit-button"))
    stopped = page.said("bot")
    before = cpu_seconds(served[1].pid)
    time.sleep(1.5)
    assert cpu_seconds(served[1].pid) - before < 0.75
    assert page.said("bot") == stopped and len(stopped[0]) >= max(lengths)

    page.fill("Max tokens", 20)
    page.find("[aria-label=Retry]")[0].click()
    page.until(lambda: page.said("bot") != stopped)
    again = page.answer()
    assert page.said("user") == ["talk"] and len(again) == 20
    page.ask("more")
    page.answer(2)
    assert page.said("user") == ["talk", "more"] and page.said("bot")[0] == again
    page.find("[aria-label=Clear]")[0].click()
    page.until(lambda: page.said("bot") == page.said("user") == [])


@needs_browser
def test_settings_take_effect(page, chatterbox):
    """The answers are those of generate.py with the same flags, of the second turn too, letter by letter."""
    questions = ["a <b>first</b> one:\n    if x &lt; 1 & y", "and more"]
    page.fill("System message", "Be kind.")
    page.fill("Temperature", 0)
    page.fill("Max tokens", 30)
    answers = []
    for number, question in enumerate(questions, 1):
        page.ask(question)
        answers.append(page.answer(number))
    flags = ("--temperature", 0, "--max_tokens", 30, "--system", "Be kind.")
    assert page.said("user") == questions
    typed = "".join(question.replace("\n", "\\\n") + "\n" for question in questions)
    terminal = generated(chatterbox, "--chat", *flags, input=typed).partition("\n")[2]
    assert [line.removeprefix("> ").removeprefix("... ") for line in terminal.splitlines()[:2]] == answers


@needs_browser
def test_a_seed_is_that_of_the_terminal(page, chatterbox):
    flags = {"Temperature": 1.3, "Top p": 0.9, "Top k": 7, "Max tokens": 25, "Seed": 3}
    for label, value in flags.items():
        page.fill(label, value)
    page.ask("talk")
    named = [part for label, value in flags.items() for part in ("--" + label.lower().replace(" ", "_"), value)]
    assert page.answer() == generated(chatterbox, "--prompt", "talk", *named)


@needs_browser
def test_text_is_text(page):
    """No tag becomes an element, no picture is fetched (the fixture looks), no special token is hidden."""
    question = "<b>bold</b> <img src=http://elsewhere.invalid/a.png> <|end|> *a* $$x$$ ![](http://elsewhere.invalid/b)"
    page.fill("Max tokens", 5)
    page.ask(question)
    page.answer()
    assert page.said("user") == [question]
    assert not page.find("[data-testid=user] b, [data-testid=user] img, [data-testid=user] em")


@needs_browser
def test_what_cannot_be_is_told(page):
    """A message in the page, and the conversation can go on."""
    page.fill("System message", "long " * 120)
    page.ask("talk")
    page.told("fills the context of 512 tokens")
    page.fill("System message", "short")
    page.fill("Max tokens", 5)
    page.fill("Temperature", 9)  # the most that it can be is 2
    page.ask("more")
    page.until(lambda: len("".join(page.said("bot"))) == 5)


@pytest.mark.parametrize("max_tokens, seed", [(-1, -1), (5, 1e20)])
def test_values_out_of_range_are_told(chatterbox, monkeypatch, max_tokens, seed):
    told = []
    monkeypatch.setattr(gradio, "Warning", told.append)
    model = load_prepared(str(chatterbox), "cpu", "float32", None)
    assert list(chat_web.answer(*model, "and", [], "", 0.8, 200, 1.0, max_tokens, seed)) == []
    assert len(told) == 1 and "it must be at least" in told[0] and not told[0].startswith("--")


@needs_browser
def test_two_at_once_are_kept_apart(page, served, chatterbox):
    """The second waits for the first, and each has the answer that it would have alone."""
    with browser() as other:
        other.size(1100, 700)
        other.open(served[0])
        for one, count in ((page, 600), (other, 40)):
            one.fill("Temperature", 0)
            one.fill("Max tokens", count)
        page.ask("talk")
        other.ask("and me")
        assert other.answer() == generated(chatterbox, "--prompt", "and me", "--temperature", 0, "--max_tokens", 40)
        assert page.answer() == generated(chatterbox, "--prompt", "talk", "--temperature", 0, "--max_tokens", 600)


@needs_browser
def test_on_a_phone(page, served):
    """The conversation is there, the panel only when it is asked for, and nothing is wider than the screen."""
    page.size(390, 844)
    page.open(served[0])
    box = page.until(lambda: next(b for b in page.find("textarea") if b.is_displayed()))
    assert box.rect["x"] >= 0 and box.rect["x"] + box.rect["width"] <= 390 and 700 < box.rect["y"] < 844
    x, y = box.rect["x"] + box.rect["width"] / 2, box.rect["y"] + box.rect["height"] / 2
    time.sleep(1)  # a panel that comes would have come
    assert page.driver.execute_script("return document.elementFromPoint(arguments[0], arguments[1])", x, y) == box
    page.ask("talk")
    page.answer()
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
    page.find("[aria-label='Toggle Sidebar']")[0].click()
    page.fill("Max tokens", 5)


def test_the_conversation_goes_to_the_browser_escaped():
    """The assistant's messages as the user's, and they come back as they were."""
    from chat_web import plain_chatbot

    texts = {"user": "<i>a</i>\n    b", "assistant": " <img src=x onerror=alert(1)> &lt; \n"}
    chatbot = plain_chatbot("model")
    sent = chatbot.postprocess([{"role": role, "content": text} for role, text in texts.items()])
    assert not {"<", ">"} & set("".join(message.content[0].text for message in sent.root))
    back = chatbot.preprocess(sent)
    assert {message["role"]: message["content"][0]["text"] for message in back} == texts


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("display", [{"DISPLAY": ":0"}, {"WAYLAND_DISPLAY": "wayland-0"}, {}])
def test_a_browser_is_opened_before_a_person_alone(monkeypatch, terminal, display):
    import chat_web

    monkeypatch.setattr(chat_web.os, "environ", display)
    monkeypatch.setattr(chat_web.sys, "platform", "linux")
    monkeypatch.setattr(chat_web.sys.stdout, "isatty", lambda: terminal)
    assert chat_web.on_desktop() == (terminal and bool(display))


def test_a_proxy_is_not_asked_for_the_page_and_no_file_is_taken(chatterbox, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with chat_page(chatterbox) as (url, _):
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc\r\n--x--\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        request = urllib.request.Request(f"{url}gradio_api/upload", body, headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
        assert refused.value.code == 413


def test_ctrl_c_ends_it(chatterbox):
    """Quietly, as that is how it is meant to end; one line has said before that others can reach it."""
    with chat_page(chatterbox, "--host", "0.0.0.0") as (_, process):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors.startswith("warning: whoever reaches port")
    assert len(errors.splitlines()) == 1


def test_mistakes(fails, pretrained, chatterbox, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = f"--port {server.getsockname()[1]}: Address already in use; choose another --port"
        assert words in fails("chat_web.py", "--port", server.getsockname()[1])
    assert "--port is 0" in fails("chat_web.py", "--port", 0)
    assert "--host nowhere.invalid" in fails("chat_web.py", "--host", "nowhere.invalid")
    port = ("--port", free_port())
    assert "is not a chat model: finetune it first" in fails("chat_web.py", "--checkpoint", pretrained, *port)
    (tmp_path / "gradio.py").write_text("raise ImportError")
    absent = {"env": {"PYTHONPATH": str(tmp_path)}}
    assert "pip install -r requirements-extra.txt" in fails("chat_web.py", *port, **absent)
