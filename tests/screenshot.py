"""Open chat_web.py in a headless browser, for its tests and for the picture in the README.

python tests/screenshot.py runs/demo_chat docs/chat.png
"""

import contextlib
import json
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from forked import ForkedProcess

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
def chat_page(checkpoint: object, *args: object) -> Iterator[tuple[str, ForkedProcess]]:
    """Run chat_web.py; yields the address of its page and the process, and kills the process at the end."""
    port = free_port()
    process = ForkedProcess([SCRIPT, "--checkpoint", checkpoint, "--port", port, *args])
    try:
        line = process.first_line()
        assert f":{port}/ ;" in line, line + process.stderr.read_text()
        yield f"http://127.0.0.1:{port}/", process
    finally:
        process.kill()


@dataclass
class Browser:
    """A browser that shows a chat page."""

    driver: object

    def find(self, css: str) -> list:
        """Return the elements that match a CSS selector."""
        return self.driver.find_elements("css selector", css)

    def until(self, condition, seconds: float = 60):
        """Wait until `condition()` is true, polling ten times a second, and return its result."""
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"still false after {seconds} s; the page: {self.find('body')[0].text!r}")
            time.sleep(0.1)
        return result

    def open(self, url: str) -> None:
        """Open a page and wait until nothing in it has changed for 1.5 seconds.

        Before that, the page may still be setting itself up and can discard what is typed.
        """
        self.driver.get(url)
        self.until(lambda: self.find(".submit-button"))
        self.driver.execute_script(
            "window.quiet = 0; setInterval(() => window.quiet++, 100); new MutationObserver(() => window.quiet = 0)"
            ".observe(document, {subtree: true, childList: true, attributes: true, characterData: true})"
        )
        self.until(lambda: self.driver.execute_script("return window.quiet > 15"))

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def fill(self, label: str, value: object) -> None:
        """Type a value into a field of the sidebar."""
        css = f"input[aria-label*='{label}']"
        if label == "System message":
            css = "textarea[placeholder='Instructions for the model']"
        field = self.until(lambda: next(filter(self.on_screen, self.find(css)), None))
        select_all = "\ue009a\ue000"  # Ctrl-A
        field.send_keys(select_all, str(value), "\t")
        time.sleep(0.5)  # time for the page to restore the old value, if it does
        assert field.get_attribute("value") in (str(value), "2")  # the page limits the temperature to 2

    def on_screen(self, element) -> bool:
        """Return whether an element is visible and inside the window."""
        script = "const r = arguments[0].getBoundingClientRect(); return r.width > 0 && r.right <= innerWidth"
        return self.driver.execute_script(script, element)

    def ask(self, text: str) -> None:
        """Send a message; line breaks are typed with Shift-Enter."""
        boxes = "textarea:not([disabled]):not([placeholder^='Instructions'])"
        box = self.until(lambda: next(filter(self.on_screen, self.find(boxes)), None))
        box.send_keys(text.replace("\n", "\ue008\n\ue000"), "\n")

    def messages(self, role: str) -> list[str]:
        """Return the text of all messages of "user" or "bot", without the line break after each."""
        script = "return [...document.querySelectorAll(`[data-testid=${arguments[0]}] .md`)].map(e => e.textContent)"
        return [text.removesuffix("\n") for text in self.driver.execute_script(script, role)]

    def answer(self, number: int = 1) -> str:
        """Wait until answer `number` is complete and return it."""
        self.until(lambda: len(self.messages("bot")) == number and not self.find(".stop-button"))
        return self.messages("bot")[-1]

    def close_toast(self, text: str) -> None:
        """Wait for a notification that contains `text`, and close it."""
        toast = self.until(lambda: next((toast for toast in self.find(".toast-body") if text in toast.text), None))
        self.driver.execute_script("arguments[0].querySelector('.toast-close').click()", toast)
        self.until(lambda: not self.find(".toast-body"))

    def requested_hosts(self) -> set[str]:
        """Return the hosts that the page has sent requests to, without those that its security policy blocked."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        blocked = [m["params"]["requestId"] for m in messages if m["params"].get("blockedReason") == "csp"]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        urls = [request["request"]["url"] for request in sent if request["requestId"] not in blocked]
        return {urlsplit(url).hostname for url in urls if url.startswith(("http", "ws"))}


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser with an empty profile."""
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
    """Ask two questions, wait for the answers, and save a picture of the page."""
    if CHROMIUM is None or DRIVER is None:
        sys.exit("error: chromium or chromedriver is not installed: apt install chromium chromium-driver")
    with chat_page(checkpoint) as (url, _), browser() as page:
        page.resize(1100, 700)
        page.open(url)
        for label, value in {"Seed": 1, "Temperature": 0.6}.items():
            page.fill(label, value)
        for number, question in enumerate(("What does json.dumps do?", "How do I open a file?"), 1):
            page.ask(question)
            page.answer(number)
        page.driver.save_screenshot(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
