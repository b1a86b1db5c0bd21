"""
Chat with a model in the terminal.

-p asks one question and leaves. Without a terminal on both sides, questions are read one a line and answers written as they are, with tool
calls and notices on standard error. A base model knows no chat: it goes on with the text that it is given. Nothing is trained here.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanochat.base import knobs
from nanochat.base.common import UserError, base_dir, entry, notice
from nanochat.base.knobs import knob
from nanochat.chat.generate import Engine, Reply, fit_conversation
from nanochat.data.tokenizer import StreamDecoder
from nanochat.model.checkpoint import Loaded, load_for_inference
from nanochat.model.stages import STAGES

HELP = """/clear          forget the conversation
/system TEXT    begin a new conversation with this instruction
/quit           leave, as do Ctrl+D and Ctrl+C; while it speaks, Ctrl+C stops the reply"""
GREY, NORMAL = "\033[90m", "\033[0m"
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)  # what a model's text could play with a terminal


@dataclass(kw_only=True)
class ModelKnobs:
    """Model and sampling"""

    model_tag: str = knob("", "tag of the model (default: the one saved last)", alias="-g")
    step: int | None = knob(None, "step of the checkpoint (default: the newest)", alias="-s")
    temperature: float = knob(0.6, "0 = always the likeliest token", alias="-t", low=0)
    top_k: int = knob(50, "sample among so many likeliest tokens (0 = all)", alias="-k", low=0)
    top_p: float = knob(
        1.0, "sample among the likeliest tokens that hold this share", low=1e-6, high=1
    )
    max_tokens: int = knob(256, "longest answer in tokens", alias="-m", low=1)
    seed: int = knob(42, "seed of the sampling")
    device_type: Literal["auto", "cpu", "cuda", "mps"] = knob("auto", "where to compute")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "precision of weights and computation"
    )

    def sampling(self, turn: int) -> dict[str, Any]:
        """What generate() takes; every turn draws anew."""
        named = {
            name: getattr(self, name) for name in ("max_tokens", "temperature", "top_k", "top_p")
        }
        return {**named, "seed": self.seed + turn}


@dataclass(kw_only=True)
class Knobs(ModelKnobs):
    """Chat"""

    prompt: str | None = knob(None, "one question: answer it and leave", alias="-p")
    source: Literal["auto", "base", "mid", "sft", "rl"] = knob(
        "auto", "stage of the model; auto = the furthest there is", alias="-i"
    )


def open_engine(k: ModelKnobs, source: str) -> tuple[Engine, Loaded]:
    """The engine of a stage's checkpoint, and what was loaded."""
    loaded = load_for_inference(source, k.model_tag, k.step, k.device_type, k.dtype, k.seed)
    return Engine(loaded.model.cast_for_inference(), loaded.tokenizer), loaded


class Chat:
    """A conversation and how it is shown."""

    def __init__(self, k: ModelKnobs, engine: Engine, base: bool, styled: bool):
        self.k, self.engine, self.base, self.styled = k, engine, base, styled
        self.messages: list[dict[str, Any]] = []
        self.turn = 0

    def aside(self, text: str) -> None:
        """Something beside the conversation: grey in a terminal, else on standard error."""
        print(f"{GREY}{text}{NORMAL}", flush=True) if self.styled else print(
            text, file=sys.stderr, flush=True
        )

    def write(self, text: str) -> None:
        print(CONTROL.sub("", text) if self.styled else text, end="", flush=True)

    def answer(self, question: str) -> None:
        """Answer and show it as it comes; Ctrl+C stops the reply and keeps what was said."""
        try:
            self._continue(question) if self.base else self._reply(question)
        except KeyboardInterrupt:
            if not self.styled:
                raise
            self.aside("\n[stopped]")
        self.turn += 1

    def _continue(self, text: str) -> None:
        self.write(text)
        for piece in completion(self.engine, text, self.k.sampling(self.turn)):
            self.write(piece)
        print(flush=True)

    def _reply(self, question: str) -> None:
        context = self.engine.model.config.sequence_len
        asked = {"messages": [*self.messages, {"role": "user", "content": question}]}
        asked, dropped = fit_conversation(
            self.engine.tokenizer, asked, context - min(self.k.max_tokens, context // 2)
        )
        if dropped:
            what = "exchange is" if dropped == 1 else f"{dropped} exchanges are"
            self.aside(f"[the context holds {context} tokens: the oldest {what} forgotten]")
        reply = Reply(self.engine, asked, **self.k.sampling(self.turn))
        if len(reply.prompt) > context - 1:
            self.aside(
                f"[the message is longer than the context of {context} tokens: only its end is read]"
            )
        try:
            self._show(reply)
        finally:  # also when it was stopped
            self.messages = [*asked["messages"], {"role": "assistant", "content": reply.content}]

    def _show(self, reply: Reply) -> None:
        call, fresh = "", True  # fresh: at the beginning of a line
        for kind, text in reply:
            if kind == "text":
                self.write(text)
                fresh = text.endswith("\n")
            elif kind == "python":
                call = text
            if kind == "python_output":
                if not fresh and self.styled:
                    print()
                self.aside(f"calculator: {CONTROL.sub('', call)} = {CONTROL.sub('', text)}")
                fresh = True
        print(flush=True)
        if reply.finish != "stop" and self.styled:
            self.aside(
                "[cut: "
                + (
                    f"{reply.tokens} tokens, see --max_tokens]"
                    if reply.finish == "length"
                    else "the context is full]"
                )
            )

    def command(self, line: str) -> bool:
        """Obey /clear and the like; False when the line is none of them."""
        name, _, rest = line.partition(" ")
        if name == "/help" or line == "/system":
            self.aside(HELP)
        elif name == "/clear" or (name == "/system" and rest.strip()):
            self.messages = (
                [{"role": "system", "content": rest.strip()}] if name == "/system" else []
            )
            self.aside("[a new conversation]")
        elif re.fullmatch(r"/[a-z]+", line):
            self.aside(f"there is no command {line}\n{HELP}")
        else:
            return False
        return True


def completion(engine: Engine, text: str, sampling: dict[str, Any]) -> Iterator[str]:
    """What a base model writes after a text, in pieces of whole characters."""
    decoder = StreamDecoder(engine.tokenizer)
    special = set(engine.tokenizer.specials.values())
    for step in engine.generate(engine.tokenizer.encode(text, bos=True), **sampling):
        for token in step:
            if token.id not in special:
                yield decoder.push(token.id)
    yield decoder.flush()


def terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def forgiving_streams() -> None:
    """Bytes that are no text come in and go out as U+FFFD or '?' instead of ending the program."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")


def asker(shown: str, history: str, style: dict[str, str] | None = None) -> Callable[[], str]:
    """A function that asks for a line in the terminal, with editing, a history kept in the base folder, and pastes of several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.styles import Style

    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(base_dir() / history)), style=Style.from_dict(style or {})
    )
    return lambda: session.prompt(shown)


def converse(chat: Chat, name: str) -> None:
    """Ask and answer in the terminal until the user leaves."""
    chat.aside(f"{name}; /help lists the commands, Ctrl+D leaves")
    if chat.base:
        chat.aside("a base model has not learned to chat: it goes on with your text as it stands")
    ask = asker("> ", "chat_history")
    while True:
        try:
            line = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/quit", "/exit"):
            return
        if line and not chat.command(line):
            chat.answer(line)


def main(argv: Sequence[str] | None = None) -> None:
    k, _ = knobs.parse(
        Knobs, argv, command="chat_cli", description="Chat with a model in the terminal."
    )
    if k.prompt is not None and not k.prompt.strip():
        raise UserError("--prompt is empty: write a question after it, or leave it out to chat")
    engine, loaded = open_engine(k, k.source)
    forgiving_streams()
    base, talking = not STAGES[loaded.stage].chats, k.prompt is None and terminal()
    chat = Chat(k, engine, base, styled=sys.stdout.isatty() if k.prompt is not None else talking)
    if talking:
        return converse(chat, loaded.describe())
    if base:
        notice("a base model has not learned to chat: it goes on with the text as it stands")
    for line in sys.stdin if k.prompt is None else [k.prompt]:
        if line.strip() in ("/quit", "/exit"):
            return None
        if line.strip() and not chat.command(line.strip()):
            chat.answer(line.strip())
    return None


if __name__ == "__main__":
    entry(main)
