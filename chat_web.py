"""Talk to a chat model in the browser.

    python chat_web.py                                              # runs/dolly, at http://127.0.0.1:7860
    python chat_web.py --checkpoint runs/demo_chat --port 8000
    python chat_web.py --host 0.0.0.0                               # for all who can reach this machine

The page is Gradio's (pip install -r requirements-extra.txt), the answers are those of generate.py --chat.
"""

import functools
import html
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

import cli
from checkpoint import Loaded
from cli import UserError, check
from inference import load_prepared
from sampling import Sampling, answer_prompt, seeded, write

if TYPE_CHECKING:
    import gradio

UPDATE_SECONDS = 0.05  # how often a page hears of new text


@dataclass(frozen=True)
class Config:
    checkpoint: str | None = None
    """A run (its best checkpoint) or a checkpoint of a chat model; None takes runs/dolly."""
    host: str = "127.0.0.1"
    """Who can reach the page: 127.0.0.1 is this machine alone, 0.0.0.0 all machines that reach this one."""
    port: int = 7860
    """Where the page is: http://HOST:PORT."""
    open: bool = True
    """Open the page in the browser, where this is a terminal on a desktop."""
    device: str | None = None
    """cuda, mps or cpu; None takes the best there is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights."""
    quantize: Literal["int8"] | None = None
    """Weights of 8 bits: on a CPU more than twice as fast, and a little less exact."""


def main(config: Config) -> None:
    check_address(config)
    import_gradio()
    loaded, device = load_prepared(config.checkpoint, config.device, config.dtype, config.quantize)
    check(loaded.chat, f"{loaded.source} is not a chat model: finetune it first, or use generate.py --prompt")
    page = chat_page(loaded, device)
    serve(page, config)


def check_address(config: Config) -> None:
    """Raise `UserError` where no page can be at that host and port; warn where others can reach it."""
    cli.check_range("port", config.port, 1, 65535)
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (socket.gaierror, UnicodeError):
        raise UserError(
            f"--host {config.host}: no such address; 127.0.0.1 is this machine, 0.0.0.0 is for all"
        ) from None
    except OSError as error:
        raise UserError(
            f"--host {config.host} --port {config.port}: {error.strerror}; choose another --port, or end what uses this"
        ) from None
    if not (config.host.startswith("127.") or config.host in ("localhost", "::1")):
        print(f"warning: whoever reaches port {config.port} of this machine can use the model", file=sys.stderr)


def serve(page: "gradio.Blocks", config: Config) -> None:
    """Offer the page, and nothing else: no public link, no record of what was said; until Ctrl-C."""
    page.launch(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open and on_desktop(),
        share=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        max_file_size=0,  # nobody sends files to this machine
        quiet=True,
        prevent_thread_lock=True,
    )
    try:
        print(f"{page.title}: talk to it at {page.local_url} ; Ctrl-C ends this", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print(flush=True)
        os._exit(0)  # torch aborts an orderly end while another thread of it is at work on an answer


def import_gradio() -> "gradio":
    """The library of the page, told to keep to itself."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    for name in ("NO_PROXY", "no_proxy"):  # it asks the page that it made whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost,::1")))
    try:
        import gradio
    except ImportError:
        raise UserError("chat_web.py needs gradio: pip install -r requirements-extra.txt") from None
    return gradio


def on_desktop() -> bool:
    """Whether a browser can be opened before the eyes of a person."""
    return sys.stdout.isatty() and (sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)))


def chat_page(loaded: Loaded, device: torch.device) -> "gradio.Blocks":
    """The page: a conversation, and beside it how the next token is chosen."""
    import gradio as gr

    usual = Sampling()
    with gr.Blocks(title=loaded.source, fill_height=True, analytics_enabled=False) as page:
        with gr.Sidebar(position="right") as panel:
            system = gr.Textbox(
                label="System message", placeholder="What the model is told first", lines=2, max_lines=4
            )
            temperature = gr.Slider(0, 2, usual.temperature, label="Temperature", info="0: the likeliest", step=0.05)
            top_p = gr.Slider(0.05, 1, usual.top_p, label="Top p", info="1: all tokens", step=0.05)
            with gr.Row():
                top_k = gr.Number(usual.top_k, label="Top k (0: all)", precision=0, min_width=80)
                max_tokens = gr.Number(usual.max_tokens, label="Max tokens", precision=0, min_width=80)
            seed = gr.Number(-1, label="Seed (-1: another each time)", precision=0)
        # On a phone the panel would hide the conversation: there it opens when it is asked for.
        page.load(None, None, panel, js="() => ({__type__: 'update', ...(innerWidth > 768 ? {} : {open: false})})")
        gr.ChatInterface(
            functools.partial(answer, loaded, device),
            chatbot=plain_chatbot(loaded.source),
            additional_inputs=[system, temperature, top_k, top_p, max_tokens, seed],
            concurrency_limit=1,  # one model: who comes second waits
            api_visibility="private",
        )
    return page


def answer(
    loaded: Loaded,
    device: torch.device,
    question: str,
    history: list[dict],
    system: str,
    temperature: float,
    top_k: int | None,
    top_p: float,
    max_tokens: int | None,
    seed: int | None,
) -> Iterator[str]:
    """The answer to a question as it grows; where the page stops asking for more, no more is computed."""
    import gradio as gr

    said = [{"role": message["role"], "content": plain(message["content"])} for message in history]
    messages = [{"role": "system", "content": system}] * bool(system.strip())
    messages += [*said, {"role": "user", "content": question}]
    try:
        sampling = Sampling(temperature, max(0, top_k or 0) or None, top_p, max_tokens or Sampling.max_tokens)
        prompt, left_out = answer_prompt(loaded.model, loaded.tokenizer, messages, sampling.max_tokens)
        seed = -1 if seed is None else seed
        cli.check_range("seed", seed, -1, 2**63 - 1)
    except UserError as error:
        gr.Warning(html.escape(str(error).removeprefix("--")))  # not gr.Error: it leaves the page waiting for an answer
        return
    if left_out and not answer_prompt(loaded.model, loaded.tokenizer, messages[:-2], sampling.max_tokens)[1]:
        gr.Info("The conversation has outgrown the model's context: from now on its oldest part is left out.")
    generator = seeded(None if seed == -1 else seed, device)
    text, shown = "", 0.0
    for [piece] in write(loaded.model, loaded.tokenizer, prompt, sampling, generator):
        text += piece or ""
        if time.monotonic() - shown > UPDATE_SECONDS:
            yield text
            shown = time.monotonic()
    yield text


def plain_chatbot(name: str) -> "gradio.Chatbot":
    """A conversation that shows what was said letter by letter.

    Gradio's own would take it as HTML (and fetch the pictures that it names), and reindent it: so the browser gets it
    escaped, and what comes back from there is unescaped.
    """
    import gradio as gr
    from gradio.components.chatbot import ChatbotDataMessages, Message, TextMessage

    chatbot = gr.Chatbot(
        show_label=False,
        scale=1,
        render_markdown=False,
        latex_delimiters=[],
        buttons=[],
        placeholder=f"<h3>{html.escape(name)}</h3>",
    )
    read = chatbot.preprocess

    def to_browser(messages: list[dict] | None) -> ChatbotDataMessages:
        escaped = [(message["role"], html.escape(plain(message["content"]))) for message in messages or []]
        return ChatbotDataMessages(
            root=[Message(role=role, content=[TextMessage(text=text)]) for role, text in escaped]
        )

    def from_browser(payload: ChatbotDataMessages | None) -> list[dict]:
        said = [(message["role"], html.unescape(plain(message["content"]))) for message in read(payload)]
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]

    chatbot.postprocess, chatbot.preprocess = to_browser, from_browser
    return chatbot


def plain(content: str | list[dict]) -> str:
    """The text of a message in the page's conversation."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
