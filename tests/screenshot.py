"""A chat page in a headless browser: what the tests of chat_web.py use, and the README's picture of it.

python tests/screenshot.py runs/demo_chat docs/chat.png
"""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

SCRIPT = Path(__file__).resolve().parent.parent / "chat_web.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def chat_page(checkpoint: object, *args: object) -> Iterator[tuple[str, subprocess.Popen]]:
    """chat_web.py at work: the address of its page, and its process, which is ended behind it."""
    port = free_port()
    command = [sys.executable, SCRIPT, "--checkpoint", checkpoint, "--port", port, *args]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert f":{port}/ ;" in line, line + process.stderr.read()
        yield f"http://127.0.0.1:{port}/", process
    finally:
        process.kill()
        process.communicate()


@dataclass
class Browser:
    """A browser with a chat page in it."""

    driver: object

    def find(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def until(self, condition, seconds: float = 60):
        """Wait until a condition holds, looking ten times a second; returns what it returned."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.1).until(lambda _: condition())

    def open(self, url: str) -> None:
        """Open a page, and wait until it has been set up: until it has been at leisure, and nothing in it changed,
        for 1.5 seconds (what is typed before that, it may take back)."""
        self.driver.get(url)
        self.until(lambda: self.find(".submit-button"))
        self.driver.execute_script(
            "window.quiet = 0; setInterval(() => window.quiet++, 100); new MutationObserver(() => window.quiet = 0)"
            ".observe(document, {subtree: true, childList: true, attributes: true, characterData: true})"
        )
        self.until(lambda: self.driver.execute_script("return window.quiet > 15"))

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def fill(self, label: str, value: object) -> None:
        """Type a value into a field of the panel."""
        found = f"input[aria-label*='{label}']"
        if label == "System message":
            found = "textarea[placeholder='What the model is told first']"
        field = self.until(lambda: next(filter(self.on_screen, self.find(found)), None))
        select_all = "\ue009a\ue000"  # Ctrl-A
        field.send_keys(select_all, str(value), "\t")
        time.sleep(0.5)  # a page that takes back what is typed would have done so
        assert field.get_attribute("value") in (str(value), "2")  # 2 is the most that the temperature can be

    def on_screen(self, element) -> bool:
        script = "const r = arguments[0].getBoundingClientRect(); return r.width > 0 && r.right <= innerWidth"
        return self.driver.execute_script(script, element)

    def ask(self, text: str) -> None:
        """Send a message; a line break in it is typed with Shift."""
        boxes = "textarea:not([disabled]):not([placeholder^='What the model'])"
        box = self.until(lambda: next(filter(self.on_screen, self.find(boxes)), None))
        box.send_keys(text.replace("\n", "\ue008\n\ue000"), "\n")

    def said(self, role: str) -> list[str]:
        """What user or bot has said, letter by letter."""
        script = "return [...document.querySelectorAll(`[data-testid=${arguments[0]}] .md`)].map(e => e.textContent)"
        return self.driver.execute_script(script, role)

    def answer(self, number: int = 1) -> str:
        """The answer of that number, when it is complete."""
        self.until(lambda: len(self.said("bot")) == number and not self.find(".stop-button"))
        return self.said("bot")[-1]

    def told(self, words: str) -> None:
        """Wait until the page tells of something, and put that away."""
        toast = self.until(lambda: next((one for one in self.find(".toast-body") if words in one.text), None))
        self.driver.execute_script("arguments[0].querySelector('.toast-close').click()", toast)
        self.until(lambda: not self.find(".toast-body"))

    def hosts(self) -> set[str]:
        """The hosts that were asked for anything."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).hostname for url in asked if url.startswith(("http", "ws"))}


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, with nothing in it."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            yield Browser(driver)
        finally:
            driver.quit()


def main(checkpoint: str, picture: str) -> None:
    """Ask a question, wait for the answer, and save what the page looks like."""
    if CHROMIUM is None or DRIVER is None:
        sys.exit("error: no chromium or no chromedriver here: apt install chromium chromium-driver")
    with chat_page(checkpoint) as (url, _), browser() as page:
        page.size(1100, 700)
        page.open(url)
        for label, value in {"Seed": 1, "Temperature": 0.6}.items():
            page.fill(label, value)
        for number, question in enumerate(("What does json.dumps do?", "How do I open a file?"), 1):
            page.ask(question)
            page.answer(number)
        page.driver.save_screenshot(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
