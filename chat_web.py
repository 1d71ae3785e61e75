"""Chat with a finetuned model in the browser.

    python chat_web.py                                              # the newest chat run, at http://127.0.0.1:7860
    python chat_web.py --checkpoint runs/demo_chat --port 8000
    python chat_web.py --host 0.0.0.0                               # reachable from other machines

The page needs Gradio (pip install -r requirements-extra.txt) and opens in about ten seconds. With the same settings,
it gives the same answers as generate.py --chat.
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
from typing import TYPE_CHECKING

import torch

from minigpt import cli
from minigpt.chat import encode_prompt
from minigpt.cli import InferenceConfig, UserError
from minigpt.inference import load_for_inference, make_generator, stream_text
from minigpt.pretrained import PretrainedModel
from minigpt.sampling import SamplingParams

if TYPE_CHECKING:
    import gradio

UPDATE_SECONDS = 0.05  # minimum time between two updates of an answer


@dataclass(frozen=True)
class Config(InferenceConfig):
    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1 accepts this machine only, 0.0.0.0 accepts all machines."""
    port: int = 7860
    """Port to listen on."""
    open: bool = True
    """Open the page in a browser when run from a terminal on a desktop."""


def main(config: Config) -> None:
    check_address(config)
    import_gradio()
    loaded, device = load_for_inference(config, chat=True)
    if not loaded.is_chat:
        raise UserError(f"{loaded.source} is not a chat model: finetune it first, or use generate.py --prompt")
    serve(build_page(loaded, device), config)


def check_address(config: Config) -> None:
    """Raise `UserError` if the host and port cannot be used; warn if other machines can connect."""
    cli.check_range("port", config.port, 1, 65535)
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (socket.gaierror, UnicodeError):
        raise UserError(
            f"--host {config.host}: unknown address; use 127.0.0.1 for this machine only, 0.0.0.0 for all machines"
        ) from None
    except OSError as error:
        raise UserError(
            f"--host {config.host} --port {config.port}: {error.strerror}; choose another --port,"
            " or stop the program that uses this one"
        ) from None
    if not (config.host.startswith("127.") or config.host in ("localhost", "::1")):
        print(f"warning: anyone who can connect to port {config.port} of this machine can chat", file=sys.stderr)


def import_gradio() -> None:
    """Import Gradio with its telemetry off. Raise `UserError` if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
    for name in ("NO_PROXY", "no_proxy"):  # Gradio requests its own page to check that it is up
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost,::1")))
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("chat_web.py needs gradio: pip install -r requirements-extra.txt") from None


def build_page(loaded: PretrainedModel, device: torch.device) -> "gradio.Blocks":
    """Build the page: the conversation, and a sidebar with the sampling parameters."""
    import gradio as gr

    defaults = SamplingParams()
    with gr.Blocks(title=loaded.source, fill_height=True, analytics_enabled=False) as page:
        with gr.Sidebar(position="right") as sidebar:
            system = gr.Textbox(label="System message", placeholder="Instructions for the model", lines=2, max_lines=4)
            temperature = gr.Slider(0, 2, defaults.temperature, label="Temperature", info="0: greedy", step=0.05)
            top_p = gr.Slider(0.05, 1, defaults.top_p, label="Top p", info="1: all tokens", step=0.05)
            with gr.Row():
                top_k = gr.Number(defaults.top_k, label="Top k (0: all)", precision=0, min_width=80)
                max_tokens = gr.Number(defaults.max_tokens, label="Max tokens", precision=0, min_width=80)
            seed = gr.Number(-1, label="Seed (-1: random)", precision=0)
        # On a phone, the sidebar would cover the conversation: start with it closed.
        page.load(None, None, sidebar, js="() => ({__type__: 'update', ...(innerWidth > 768 ? {} : {open: false})})")
        gr.ChatInterface(
            functools.partial(stream_answer, loaded, device),
            chatbot=build_chatbot(loaded.source),
            additional_inputs=[system, temperature, top_k, top_p, max_tokens, seed],
            concurrency_limit=1,  # there is one model; other users wait in a queue
            api_visibility="private",
        )
    return page


def stream_answer(
    loaded: PretrainedModel,
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
    """Yield the growing text of the answer. Generation stops when the caller stops iterating."""
    import gradio as gr

    messages = [{"role": "system", "content": system}] if system.strip() else []
    messages += [{"role": message["role"], "content": get_text(message["content"])} for message in history]
    messages += [{"role": "user", "content": question}]
    encode = functools.partial(encode_prompt, loaded.tokenizer, block_size=loaded.model.config.block_size)
    try:
        max_tokens = max_tokens or SamplingParams.max_tokens
        params = SamplingParams(max_tokens, temperature, max(0, top_k or 0) or None, top_p)
        seed = -1 if seed is None else seed
        cli.check_range("seed", seed, -1, 2**63 - 1)
        prompt, n_dropped = encode(messages, max_tokens=params.max_tokens)
    except UserError as error:
        gr.Warning(html.escape(str(error).removeprefix("--")))  # gr.Error would leave the page waiting for an answer
        return
    if n_dropped and encode(messages[:-2], max_tokens=params.max_tokens)[1] == 0:  # the first time only
        gr.Info("The conversation no longer fits the model's context: from now on, its oldest part is dropped.")
    generator = make_generator(None if seed == -1 else seed, device)
    text, updated = "", 0.0
    for [piece] in stream_text(loaded.model, loaded.tokenizer, prompt, params, generator):
        text += piece or ""
        if time.monotonic() - updated > UPDATE_SECONDS:
            yield text
            updated = time.monotonic()
    yield text


def build_chatbot(name: str) -> "gradio.Chatbot":
    """Build a `gradio.Chatbot` that shows every message verbatim.

    Gradio's own chatbot renders messages as HTML, loads the images they name and changes their indentation. This one
    escapes the messages it sends to the browser, and unescapes those it receives.
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
    gradio_preprocess = chatbot.preprocess

    def postprocess(messages: list[dict] | None) -> ChatbotDataMessages:
        escaped = [(message["role"], html.escape(get_text(message["content"]))) for message in messages or []]
        return ChatbotDataMessages(
            root=[Message(role=role, content=[TextMessage(text=text)]) for role, text in escaped]
        )

    def preprocess(payload: ChatbotDataMessages | None) -> list[dict]:
        messages = gradio_preprocess(payload)
        texts = [(message["role"], html.unescape(get_text(message["content"]))) for message in messages]
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts]

    chatbot.postprocess, chatbot.preprocess = postprocess, preprocess
    return chatbot


def get_text(content: str | list[dict]) -> str:
    """Return the text of a Gradio message, whose content is a string or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def serve(page: "gradio.Blocks", config: Config) -> None:
    """Serve the page until Ctrl-C. There is no public link, no upload, and no record of the conversations."""
    page.launch(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open and has_desktop(),
        share=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        max_file_size=0,  # refuse uploads
        quiet=True,
        prevent_thread_lock=True,
    )
    try:
        print(f"Chat with {page.title} at {page.local_url} ; press Ctrl-C to stop.", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print(flush=True)
        os._exit(0)  # a normal exit makes torch abort while another thread is generating


def has_desktop() -> bool:
    """Return whether this is a terminal on a desktop, where a browser can open."""
    return sys.stdout.isatty() and (sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
