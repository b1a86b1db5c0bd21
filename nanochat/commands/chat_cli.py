"""
Chat with a model in the terminal.

-p asks one question and exits. When standard input or output is not a terminal, each line of
standard input is a question; replies go to standard output, and tool calls and remarks to standard
error. A base model has not learned to chat, so it continues the given text. Nothing is trained.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nanochat.base import knobs
from nanochat.base.common import UserError, base_dir, entry, opening, printable
from nanochat.base.knobs import LARGEST_SEED, knob
from nanochat.chat.reply import Reply, continue_text, fit_conversation
from nanochat.model.stages import STAGES

if TYPE_CHECKING:
    from nanochat.chat.generate import Engine
    from nanochat.model.checkpoint import Loaded

HELP = """/clear          forget the conversation
/system TEXT    start a new conversation with this instruction
/quit           exit, as do Ctrl+D and Ctrl+C; during a reply, Ctrl+C stops it"""
GREY, NORMAL = "\033[90m", "\033[0m"


@dataclass(kw_only=True)
class GenerationKnobs:
    """Model and sampling"""

    model_tag: str = knob("", "tag of the model (default: the one saved last)", alias="-g")
    step: int | None = knob(None, "step of the checkpoint (default: the newest)", alias="-s")
    temperature: float = knob(
        0.6, "sampling temperature (0 = always the likeliest token)", alias="-t", low=0
    )
    top_k: int = knob(
        50, "sample from only this many of the likeliest tokens (0 = all)", alias="-k", low=0
    )
    top_p: float = knob(
        1.0,
        "sample from the smallest set of likely tokens that holds this share of the probability",
        low=1e-6,
        high=1,
    )
    max_tokens: int = knob(256, "maximum length of a reply in tokens", alias="-m", low=1)
    seed: int = knob(42, "seed for sampling", low=0, high=LARGEST_SEED)
    device_type: Literal["auto", "cpu", "cuda", "mps"] = knob("auto", "device to compute on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "precision of weights and computation"
    )

    def load(self, stage: str) -> tuple["Engine", "Loaded"]:
        from nanochat.chat.generate import Engine
        from nanochat.model.checkpoint import load_for_inference

        loaded = load_for_inference(
            stage, self.model_tag, self.step, self.device_type, self.dtype, self.seed
        )
        return Engine(loaded.model.cast_for_inference(), loaded.tokenizer), loaded

    def sampling(self, turn: int) -> dict[str, Any]:
        """Keywords for Engine.generate; every turn has its own seed."""
        names = ("max_tokens", "temperature", "top_k", "top_p")
        return {**{name: getattr(self, name) for name in names}, "seed": self.seed + turn}


@dataclass(kw_only=True)
class ChatKnobs(GenerationKnobs):
    """Chat"""

    prompt: str | None = knob(None, "ask this one question and exit", alias="-p")
    source: Literal["auto", "base", "mid", "sft", "rl"] = knob(
        "auto", "stage of the model; auto = the furthest one of the tag", alias="-i"
    )


class Chat:
    """A conversation and its display; `styled` when it is shown in a terminal."""

    def __init__(self, options: ChatKnobs, engine: "Engine", chats: bool, styled: bool):
        self.options, self.engine, self.chats, self.styled = options, engine, chats, styled
        self.messages: list[dict[str, Any]] = []
        self.turn = 0

    def remark(self, text: str) -> None:
        """Show something that is not part of the conversation: in grey, or on standard error."""
        if self.styled:
            print(f"{GREY}{printable(text)}{NORMAL}", flush=True)
        else:
            print(printable(text), file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        print(printable(text), end="", flush=True)

    def run(self, lines: Iterable[str]) -> None:
        """Obey or answer each line, until /quit."""
        for line in map(str.strip, lines):
            if line in ("/quit", "/exit"):
                return
            if line and not self.command(line):
                self.answer(line)

    def command(self, line: str) -> bool:
        """Obey a line such as /clear; False if it is not a command."""
        name, _, text = line.partition(" ")
        if name == "/help" or line == "/system":
            self.remark(HELP)
        elif name in ("/clear", "/system"):
            self.messages = [{"role": "system", "content": text.strip()}] if text.strip() else []
            self.remark("[new conversation]")
        elif re.fullmatch(r"/[a-z]+", line):
            self.remark(f"there is no command {line}\n{HELP}")
        else:
            return False
        return True

    def answer(self, question: str) -> None:
        """Show the answer as it is generated; Ctrl+C stops it and keeps what there is."""
        sampling = self.options.sampling(self.turn)
        self.turn += 1
        try:
            if self.chats:
                self._reply(question, sampling)
            else:
                self.write(question)
                for piece in continue_text(self.engine, question, **sampling):
                    self.write(piece)
                print(flush=True)
        except KeyboardInterrupt:
            if not self.styled:
                raise
            self.remark("\n[stopped]")

    def _reply(self, question: str, sampling: dict[str, Any]) -> None:
        tokenizer, context = self.engine.tokenizer, self.engine.model.config.sequence_len
        conversation, dropped = fit_conversation(
            tokenizer,
            {"messages": [*self.messages, {"role": "user", "content": question}]},
            context - min(self.options.max_tokens, context // 2),
        )
        if dropped:
            self.remark(
                f"[the context holds {context} tokens: forgot the oldest messages ({2 * dropped})]"
            )
        prompt = tokenizer.render_prompt(conversation)
        if len(prompt) > context - 1:
            self.remark(
                f"[the message exceeds the context of {context} tokens: "
                "the model sees only its end]"
            )
        reply = Reply(tokenizer)
        try:
            self._show(reply.stream(self.engine.generate(prompt, **sampling)))
        finally:  # also when it was stopped
            answer = {"role": "assistant", "content": reply.content}
            self.messages = [*conversation["messages"], answer]
        if self.styled and reply.finish == "length":
            self.remark(f"[stopped after {reply.tokens} tokens: see --max_tokens]")
        elif self.styled and reply.finish == "context":
            self.remark("[stopped: the context is full]")

    def _show(self, pieces: Iterator[tuple[str, str]]) -> None:
        call, line_start = "", True
        for kind, text in pieces:
            if kind == "text":
                self.write(text)
                line_start = text.endswith("\n")
            elif kind == "python":
                call = text
            else:
                if not line_start and self.styled:
                    print()
                self.remark(f"calculator: {call} = {text}")
                line_start = True
        print(flush=True)


def in_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def typed(history: str, style: dict[str, str]) -> Iterator[str]:
    """
    What the user types at the prompt "> ", until Ctrl+D or Ctrl+C; a paste of several lines comes
    as one text. Lines can be edited; `history` is the file in the base folder that keeps them.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.styles import Style

    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(base_dir() / history)), style=Style.from_dict(style)
    )
    while True:
        try:
            text = session.prompt("> ")
        except (EOFError, KeyboardInterrupt):
            return
        yield text


def main(argv: Sequence[str] | None = None) -> None:
    options, _ = knobs.parse(
        ChatKnobs, argv, command="chat_cli", description="Chat with a model in the terminal."
    )
    opening("chat_cli")
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("--prompt is empty: write a question after it, or leave it out to chat")
    engine, loaded = options.load(options.source)
    chats, interactive = STAGES[loaded.stage].chats, options.prompt is None and in_terminal()
    styled = interactive or (options.prompt is not None and sys.stdout.isatty())
    chat = Chat(options, engine, chats, styled)
    if interactive:
        chat.remark(f"{loaded.describe()}; /help lists the commands, Ctrl+D exits")
    if not chats:
        chat.remark("a base model has not learned to chat: it continues your text")
    if interactive:
        chat.run(typed("chat_history", {}))
    else:
        chat.run(sys.stdin if options.prompt is None else [options.prompt])


if __name__ == "__main__":
    entry(main)
