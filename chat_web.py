"""Chat with a finetuned model in the browser.

    python chat_web.py                                              # the newest chat run, at http://127.0.0.1:7860
    python chat_web.py --checkpoint runs/demo_chat --port 8000
    python chat_web.py --host 0.0.0.0                               # reachable from other machines

The page needs Gradio (pip install -r requirements-extra.txt) and opens in about ten seconds. With the same settings,
it gives the same answers as generate.py --chat.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import functools
import html
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from minigpt import cli
from minigpt.chat import encode_prompt, max_prompt_length
from minigpt.cli import InferenceConfig, UserError
from minigpt.inference import load_for_inference, make_generator, stream_text
from minigpt.pretrained import PretrainedModel
from minigpt.sampling import SamplingParams
from minigpt.shards import open_arrays, read_meta

if TYPE_CHECKING:
    import gradio

UPDATE_SECONDS = 0.05  # minimum time between two updates of an answer
MAX_ANSWER_SECONDS = 300
MAX_EXAMPLE_CHARS = 100  # length of an example question
# The browser loads nothing from other hosts, such as an image in an answer.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
CSS = ".bot.message:has(.md:empty) { display: none }"  # an answer that was stopped before its first token
# Code in Markdown: fenced, indented after an empty line, or between backticks.
FENCED = r"^[ \t]*(?P<fence>```+|~~~+)(?s:.*?)(?:^[ \t]*(?P=fence)|\Z)"
INDENTED = r"(?:\A|(?<=\n\n))(?: {4}|\t).*(?:\n(?: {4}|\t).*)*"
INLINE = r"(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
CODE = rf"{FENCED}|{INDENTED}|{INLINE}"
ESCAPES = {"&": "&amp;", "<": "&lt;", "!": "&#33;"}
UNESCAPES = {escaped: character for character, escaped in ESCAPES.items()}


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
    with gr.Blocks(title=run_name(loaded), fill_height=True, analytics_enabled=False) as page:
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
        chat = gr.ChatInterface(
            functools.partial(stream_answer, loaded, device),
            chatbot=build_chatbot(loaded),
            additional_inputs=[system, temperature, top_k, top_p, max_tokens, seed],
            examples=[[question] for question in example_questions(loaded)] or None,
            concurrency_limit=1,  # there is one model; other users wait in a queue
            api_visibility="private",
        )
        keep_conversation(page, chat)
    return page


def keep_conversation(page: "gradio.Blocks", chat: "gradio.ChatInterface") -> None:
    """Keep the conversation in the browser's tab for a reload, and add an empty answer to a question without one.

    Without an answer, Gradio shows no Retry button and joins the question to the next one.
    """
    key = f"conversation-{secrets.token_hex(8)}"  # another process may serve another model
    empty_answer = "{role: 'assistant', content: [{type: 'text', text: ''}]}"
    complete = f"[messages.at(-1)?.role == 'user' ? [...messages, {empty_answer}] : messages]"
    chat.textbox.stop(None, chat.chatbot, chat.chatbot, js=f"messages => {complete}")
    # While the page is built, it changes the conversation too.
    save = f"messages => {{ if (window.restored) sessionStorage.setItem('{key}', JSON.stringify(messages)); }}"
    chat.chatbot.change(None, chat.chatbot, None, js=save)
    read = f"window.restored = true; const messages = JSON.parse(sessionStorage.getItem('{key}') ?? '[]')"
    restored = page.load(None, None, chat.chatbot, js=f"() => {{ {read}; return {complete}; }}")
    restored.then(lambda messages: messages, chat.chatbot, chat.chatbot_state)


def run_name(loaded: PretrainedModel) -> str:
    """Return the name of the model's run, or of its folder if that is not a checkpoint of a run."""
    folder = Path(loaded.source).resolve()
    return folder.parent.name if folder.name.startswith("step_") else folder.name


def describe(loaded: PretrainedModel) -> str:
    """Return what an empty page shows: the model's name, its size, and what it was trained on."""
    config = loaded.model.config
    lines = [f"{config.num_parameters:,} parameters, context of {config.block_size:,} tokens"]
    for training in loaded.history:
        source, flags = training.get("source") or {}, training.get("config") or {}
        if isinstance(source, str):
            lines.append(f"Weights of {Path(source).name}")
        elif "data" in flags:
            verb, data = "Finetuned" if "init" in flags else "Trained", source.get("dataset", Path(flags["data"]).name)
            lines.append(f"{verb} on {data} for {training['step']:,} steps")
    text = "<br>".join(map(html.escape, lines))
    return f"<div style='text-align: center; padding: 0 1em'><h2>{html.escape(run_name(loaded))}</h2>{text}</div>"


def example_questions(loaded: PretrainedModel) -> list[str]:
    """Return three short questions from the model's training conversations; fewer if they or their folder are gone."""
    flags, tokenizer = loaded.history[-1].get("config") or {}, loaded.tokenizer
    folder, questions = Path(flags.get("data", "")), []
    try:
        meta = read_meta(folder, "chat")
        tokens, _, offsets = open_arrays(folder, meta)["train"]
    except (UserError, OSError):
        return []
    if meta["tokenizer"] != tokenizer.name:
        return []
    lengths = np.diff(offsets)
    for third in np.array_split(np.arange(len(lengths)), 3):
        by_length = third[np.argsort(lengths[third], kind="stable")]
        for i in by_length[len(third) // 10 :]:  # the shortest are often poor examples
            message = tokens[offsets[i] + 1 : offsets[i + 1]].tolist()  # the first one, and those after it
            question = tokenizer.decode(message[1 : message.index(tokenizer.end_of_turn)]).strip()
            is_user = message[0] == tokenizer.role_tokens["user"]
            if is_user and 0 < len(question) <= MAX_EXAMPLE_CHARS and question not in questions:
                questions.append(question)
                break
    return questions


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
        max_tokens = min(max_tokens or SamplingParams.max_tokens, loaded.model.config.block_size)
        params = SamplingParams(max_tokens, temperature, max(0, top_k or 0) or None, top_p)
        seed = -1 if seed is None else seed
        cli.check_range("seed", seed, -1, 2**63 - 1)
        prompt, n_dropped = encode(messages, max_tokens=params.max_tokens)
    except UserError as error:
        gr.Warning(html.escape(str(error).removeprefix("--")))  # gr.Error would leave the page waiting for an answer
        yield ""
        return
    if n_dropped and encode(messages[:-2], max_tokens=params.max_tokens)[1] == 0:  # the first time only
        available = max_prompt_length(loaded.model.config.block_size, params.max_tokens)
        gr.Info(
            f"The conversation has {len(prompt) + n_dropped} tokens, of which {available} fit into the model's context:"
            " from now on, its oldest part is dropped."
        )
    generator = make_generator(None if seed == -1 else seed, device)
    text, updated, started = "", 0.0, time.monotonic()
    for [piece] in stream_text(loaded.model, loaded.tokenizer, prompt, params, generator):
        text += piece or ""
        if time.monotonic() - started > MAX_ANSWER_SECONDS:  # others wait
            break
        if time.monotonic() - updated > UPDATE_SECONDS:
            yield text
            updated = time.monotonic()
    yield text


def build_chatbot(loaded: PretrainedModel) -> "gradio.Chatbot":
    """Build a `gradio.Chatbot` that renders messages as Markdown, but leaves the HTML in them as text.

    Gradio removes dangerous HTML and interprets the rest. It also changes the indentation of messages.
    """
    import gradio as gr

    chatbot = gr.Chatbot(
        show_label=False,
        scale=1,
        latex_delimiters=[],
        buttons=[],
        placeholder=describe(loaded),
    )
    postprocess, preprocess = chatbot.postprocess, chatbot.preprocess
    chatbot.postprocess = lambda messages: postprocess(map_text(escape, messages))
    chatbot.preprocess = lambda payload: map_text(unescape, preprocess(payload))
    return chatbot


def map_text(function: Callable[[str], str], messages: list[dict] | None) -> list[dict]:
    """Apply a function to the text of Gradio messages."""
    texts = [(message["role"], function(get_text(message["content"]))) for message in messages or []]
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts]


def escape(text: str) -> str:
    """Escape HTML and images in Markdown, except in code, where Markdown escapes them itself."""
    return re.sub(rf"{CODE}|[&<]|!(?=\[)", lambda match: ESCAPES.get(match[0], match[0]), text, flags=re.M)


def unescape(text: str) -> str:
    """Undo `escape`."""
    return re.sub(rf"{CODE}|&(?:amp|lt|#33);", lambda match: UNESCAPES.get(match[0], match[0]), text, flags=re.M)


def get_text(content: str | list[str | dict]) -> str:
    """Return the text of a Gradio message, whose content is a string or a list of parts."""
    parts = [content] if isinstance(content, str) else content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)


def serve(page: "gradio.Blocks", config: Config) -> None:
    """Serve the page until Ctrl-C. There is no public link, no upload, and no record of the conversations."""
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # With bold faces that have all characters; those of the default theme have few.
    font = [gr.themes.LocalFont("Source Sans Pro", (400, 700)), "system-ui", "sans-serif"]
    page.launch(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open and has_desktop(),
        share=False,
        footer_links=[],
        head=HEAD,
        css=CSS,
        theme=gr.themes.Default(font=font),
        run_history=False,
        enable_monitoring=False,
        max_file_size=0,  # refuse uploads
        quiet=True,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(config.host))]},
    )
    try:
        print(f"Chat with {page.title} at {page.local_url} ; press Ctrl-C to stop.", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print(flush=True)
        os._exit(0)  # a normal exit makes torch abort while another thread is generating


def allowed_hosts(host: str) -> list[str]:
    """Return the names by which browsers may address the page.

    A page for this machine only refuses other names, which a foreign website could let point to this machine (DNS
    rebinding).
    """
    return ["localhost", host] if host.startswith("127.") or host == "localhost" else ["*"]


def has_desktop() -> bool:
    """Return whether this is a terminal on a desktop, where a browser can open."""
    return sys.stdout.isatty() and (sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
