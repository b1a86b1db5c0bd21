"""
Chat with a model in the terminal.

-p asks one question and exits. When standard input or output is not a terminal, each line of
standard input is a question; replies go to standard output, and tool calls and remarks to standard
error. A base model has not learned to chat, so it continues the given text. Nothing is trained.

A line that begins with / and a letter is a command, one of COMMANDS; it never goes to the model.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from nanochat.base.commands import near
from nanochat.base.common import (
    UserError,
    counted,
    decoded,
    entry,
    explained,
    human,
    opening,
    user_path,
)
from nanochat.base.files import atomic_write
from nanochat.base.knobs import LARGEST_SEED, from_text, knob, parse
from nanochat.base.strangers import parse_json, read_bytes
from nanochat.chat.reply import Reply, answer_room, fit_conversation, fit_prompt, fit_text
from nanochat.chat.terminal import Prompt, Screen, in_terminal
from nanochat.data.rendering import checked_messages, visible_content
from nanochat.model.stages import STAGES, split_name
from nanochat.train.knobs import AnyModelKnobs, MachineKnobs, ModelKnobs

if TYPE_CHECKING:
    from nanochat.chat.generate import Engine, Token
    from nanochat.model.checkpoint import Loaded

SETTINGS = ("temperature", "top_k", "top_p", "max_tokens", "seed")  # knobs that commands change
YOU, MODEL, TEXT = "You:", "Model:", "Text:"
NO_QUESTION = "there is no question yet: type one first"


@dataclass(kw_only=True)
class GenerationKnobs(ModelKnobs, MachineKnobs):
    """Sampling"""

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

    def load(self, stage: str) -> tuple["Engine", "Loaded"]:
        from nanochat.chat.generate import Engine
        from nanochat.model.checkpoint import load_for_inference

        loaded = load_for_inference(
            stage, self.model_tag, self.step, self.device_type, self.dtype, self.seed
        )
        return Engine.of(loaded), loaded

    def sampling(self, turn: int) -> dict[str, Any]:
        """Keywords for Engine.generate; every turn has its own seed."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {**values, "seed": (self.seed + turn) % (LARGEST_SEED + 1)}


@dataclass(kw_only=True)
class ChatKnobs(GenerationKnobs, AnyModelKnobs):
    """Chat"""

    prompt: str | None = knob(None, "ask this one question and exit", alias="-p")


class Speed:
    """Counts the tokens that are generated, and measures how fast they come."""

    def __init__(self):
        self.first = self.last = 0.0  # when tokens came
        self.tokens = 0

    def watch(self, steps: Iterable[list["Token"]]) -> Iterator[list["Token"]]:
        """The same steps, counted and timed."""
        for step in steps:
            self.last = time.monotonic()
            self.first = self.first or self.last
            self.tokens += len(step)
            yield step

    def __str__(self) -> str:
        rate = (self.tokens - 1) / max(self.last - self.first, 1e-6)
        tokens = counted(self.tokens, "tokens")
        return f"{tokens}, {human(rate)} tokens/s" if self.tokens > 1 else tokens


def cut_remark(cut: int, kept: int, context: int) -> str:
    """What to say of a text whose first `cut` tokens do not fit into the context."""
    return (
        f"[the context holds {context:,} tokens, including those of the answer: the model sees "
        f"{kept:,} of {cut + kept:,}, because the first {cut:,} of the text were cut]"
    )


def full_remark(context: int) -> str:
    """What to say when a reply ends because the context is full."""
    return f"[stopped: the context of {context:,} tokens is full]"


def show_continuation(
    screen: Screen,
    engine: "Engine",
    text: str,
    sampling: dict[str, Any],
    speed: Speed,
    echo: bool = False,
) -> str:
    """
    Show what a model writes after a text; with `echo`, also the text. Returns why it ended: "stop",
    "length" or "context".
    """
    context = engine.model.config.sequence_len
    room = context - answer_room(context, sampling["max_tokens"])
    prompt, cut = fit_text(engine.tokenizer, text, room)
    if cut:
        screen.remark(cut_remark(cut, len(prompt) - 1, context))
    if echo:
        screen.write(text)
    reply = Reply(engine.tokenizer, plain=True)
    for _, piece in reply.stream(speed.watch(engine.generate(prompt, **sampling))):
        screen.write(piece)
    screen.end()
    return reply.finish


class Chat:
    """
    A conversation with a model, and its display. The model can be replaced on the way. A base model
    has no messages: it continues each text on its own.
    """

    def __init__(self, options: ChatKnobs, screen: Screen, prompt: Prompt | None = None):
        self.options, self.screen, self.prompt = options, screen, prompt
        self.instruction = ""  # the system message, with which the conversation begins
        self.messages: list[dict[str, Any]] = []  # questions and answers, in turns
        self.text = ""  # what a base model continued last
        self.unanswered = ""  # a question whose answer was stopped before its first word
        self.turn = 0  # answers so far; each has a seed of its own
        self.dropped = 0  # exchanges that the context no longer holds
        self.leaving = False  # /quit was typed
        self.speed = Speed()
        self.use(*options.load(options.source))

    def use(self, engine: "Engine", loaded: "Loaded") -> None:
        self.engine, self.loaded = engine, loaded
        self.chats = STAGES[loaded.stage].chats
        self.context = engine.model.config.sequence_len
        if self.prompt:
            self.prompt.label = f"{YOU if self.chats else TEXT} "

    def introduce(self) -> None:
        if self.screen.styled:
            self.screen.remark(f"{self.loaded.describe()}; /help lists the commands")
        if not self.chats:
            self.screen.remark("a base model has not learned to chat: it continues your text")

    def run(self, texts: Iterable[str], forgiving: bool = True) -> None:
        """
        Run each text if it is a command, else answer it, until /quit. A UserError, or memory that
        runs out, is shown or, without `forgiving`, raised; Ctrl+C in a terminal stops the current
        command or answer.
        """
        from nanochat.base.runtime import release_memory

        for text in map(str.strip, texts):
            full = None
            try:
                self.handle(text)
            except UserError as e:
                if not forgiving:
                    raise
                self.screen.remark(f"error: {e}")
            except (MemoryError, RuntimeError) as e:
                full = explained(e)
                if not full or not forgiving:
                    raise
            except KeyboardInterrupt:
                if not self.screen.styled:
                    raise
                self.screen.remark("[stopped]")
            if full:
                self.screen.end()  # the line of a reply that has begun
                self.screen.remark(f"error: {full}")
                release_memory()  # only now is the traceback gone that kept tensors alive
            if self.leaving:
                return

    def handle(self, text: str) -> None:
        """Run a command, or answer a text; "//text" is the text "/text"."""
        if re.match(r"/[A-Za-z]", text):
            self.run_command(text)
            return
        if re.match(r"//[A-Za-z]", text):
            text = text[1:]
        if text and self.prompt and self.prompt.editing:
            self.replace_exchange(text)
        elif text:
            self.answer(text)

    def run_command(self, line: str) -> None:
        """Run a line "/NAME ARGUMENT". UserError if it is none of COMMANDS, or not usable."""
        name, *rest = line.split(maxsplit=1)
        text = rest[0] if rest else ""
        command = COMMANDS.get(name)
        if command is None:
            raise UserError(
                f"there is no command {name}{near(name.lower(), COMMANDS)}: /help lists all; to "
                f"send the text itself, begin with // instead of /"
            )
        if text and not command.argument:
            raise UserError(f"{name} takes no argument (got {text[:60]!r})")
        if not text and command.argument and not command.argument.startswith("["):
            raise UserError(f"{name} needs an argument: {name} {command.argument}")
        if command.chats and not self.chats:
            raise UserError(
                f"{name} needs a chat model: a base model continues each text on its own "
                "(/model sft loads a chat model, if there is one)"
            )
        command.function(self, text)

    # ---- answers

    def answer(self, question: str) -> None:
        """Show the answer as it is generated; if it is stopped, the part shown is kept."""
        sampling = self.options.sampling(self.turn)
        self.turn += 1
        self.speed = Speed()
        if self.chats:
            finish = self._reply(question, sampling)
        else:
            self.text = question
            finish = show_continuation(
                self.screen, self.engine, question, sampling, self.speed, echo=True
            )
        if finish == "context":
            self.screen.remark(full_remark(self.context))
        elif finish == "length" and self.screen.styled:
            self.screen.remark(f"[stopped after {self.speed}: see /max_tokens]")
        elif self.screen.styled:
            self.screen.remark(f"[{self.speed}]")

    def _reply(self, question: str, sampling: dict[str, Any]) -> str:
        """
        Reply to a question and add both to the conversation. Returns why the reply ended: "stop",
        "length" or "context".
        """
        tokenizer = self.engine.tokenizer
        room = self.context - answer_room(self.context, sampling["max_tokens"])
        user = {"role": "user", "content": question}
        conversation, dropped = fit_conversation(tokenizer, self.conversation(user), room)
        if dropped > self.dropped:
            self.screen.remark(
                f"[the context holds {self.context:,} tokens: the model forgot the oldest messages "
                f"({2 * dropped})]"
            )
        self.dropped = dropped
        prompt, cut = fit_prompt(tokenizer, conversation["messages"], room)
        if cut:
            self.screen.remark(cut_remark(cut, len(prompt), self.context))
        self.screen.label(MODEL)
        reply, self.unanswered = Reply(tokenizer), question
        try:
            steps = self.engine.generate(prompt, **sampling)
            self._show(reply.stream(self.speed.watch(steps)))
        finally:  # even if it was stopped
            if reply.finish or reply.content:
                answer = {"role": "assistant", "content": reply.content}
                self.messages = [*self.messages, user, answer]
                self.unanswered = ""
        return reply.finish

    def _show(self, pieces: Iterable[tuple[str, str]]) -> None:
        call = ""
        for kind, text in pieces:
            if kind == "text":
                self.screen.write(text)
            elif kind == "python":
                call = text
            else:
                self.screen.remark(f"calculator: {call} = {text}")
        self.screen.end()

    # ---- the conversation

    def conversation(self, *following: dict[str, Any]) -> dict[str, Any]:
        """The instruction, the messages and those `following`, as finetuning reads them."""
        first = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return {"messages": [*first, *self.messages, *following]}

    def last_question(self) -> str:
        """The text that was asked last. UserError if there is none."""
        last = self.unanswered if self.chats else self.text
        if last:
            return last
        if not self.chats or not self.messages:
            raise UserError(NO_QUESTION)
        return self.messages[-2]["content"]

    def drop_exchange(self) -> None:
        """Remove the last question and its answer, if there are any."""
        if self.unanswered:
            self.unanswered = ""
        elif self.chats and self.messages:
            self.messages = self.messages[:-2]

    def replace_exchange(self, question: str) -> None:
        """Answer a question in place of the last one, which stays if the answer does not begin."""
        before = self.messages
        self.drop_exchange()
        shortened = self.messages
        try:
            self.answer(question)
        finally:
            # self.messages is still the shortened list if nothing was answered
            if self.messages is shortened and shortened is not before:
                self.messages, self.unanswered = before, ""

    def begin(
        self, remark: str, instruction: str = "", messages: Iterable[dict[str, Any]] = ()
    ) -> None:
        """Begin a new conversation, with these messages, and show a remark."""
        self.instruction, self.messages = instruction, [*messages]
        self.text, self.unanswered, self.dropped = "", "", 0
        self.screen.remark(f"[{remark}]")


# ---- the commands: each function takes the chat and the text after the command


def show_help(chat: Chat, _: str) -> None:
    lines = [(f"{name} {c.argument}".rstrip(), c.help) for name, c in COMMANDS.items()]
    width = max(len(line) for line, _ in lines)
    chat.screen.remark("\n".join(f"{line:<{width}}  {help}" for line, help in lines))
    chat.screen.remark(
        "//text sends /text. Alt+Enter, or a backslash before Enter, begins a new line.\n"
        "Ctrl+C stops a reply or clears the line; twice on an empty line it exits, as Ctrl+D does."
    )


def retry(chat: Chat, _: str) -> None:
    question = chat.last_question()
    if chat.options.temperature == 0:
        chat.screen.remark("[at temperature 0 the answer stays the same: see /temperature]")
    chat.replace_exchange(question)


def undo(chat: Chat, _: str) -> None:
    question = chat.last_question()
    chat.drop_exchange()
    chat.screen.remark(f"[took back {brief(question)} and its answer]")


def edit(chat: Chat, text: str) -> None:
    question = chat.last_question()
    if text:
        chat.replace_exchange(text)
    elif chat.prompt is None:
        raise UserError("/edit needs the new question here: /edit TEXT")
    else:
        chat.prompt.prefilled = question


def save(chat: Chat, text: str) -> None:
    """Write the conversation as a line of JSON, which finetuning reads."""
    name = text.removeprefix("--overwrite ")
    overwrite, path = name != text, user_path(name)
    if not chat.messages:
        raise UserError(NO_QUESTION)
    conversation = chat.conversation()
    line = json.dumps(conversation, ensure_ascii=False) + "\n"
    data = line.encode("utf-8", "replace")  # an unpaired surrogate becomes "?"
    try:
        if overwrite and not path.is_dir():
            atomic_write(path, data)
        else:
            with open(path, "xb") as file:
                file.write(data)
    except FileExistsError:
        raise UserError(
            f"{path} exists: choose another name, or write /save --overwrite {path}"
        ) from None
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): choose another file") from None
    chat.screen.remark(f"[wrote {len(conversation['messages'])} messages to {path}]")


def load(chat: Chat, text: str) -> None:
    """Continue the conversation in a file that save() wrote. A question at its end is answered."""
    path = user_path(text)
    try:
        conversation = parse_json(decoded(read_bytes(path)))
        checked_messages(conversation)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, UserError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise UserError(
            f"cannot load {path} ({reason}): it must hold one conversation, as /save writes it"
        ) from None
    messages = [{"role": m["role"], "content": m["content"]} for m in conversation["messages"]]
    remark = f"read {len(messages)} messages from {path}"
    instruction = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    question = messages.pop()["content"] if messages[-1]["role"] == "user" else ""
    chat.begin(remark, instruction, messages)
    if chat.screen.styled:
        for message in chat.conversation()["messages"][-2:]:
            chat.screen.label({"user": YOU, "assistant": MODEL}.get(message["role"], "System:"))
            chat.screen.write(visible_content(message["content"]))
            chat.screen.end()
    if question:
        chat.answer(question)


def system(chat: Chat, text: str) -> None:
    if text:
        chat.begin("new conversation with this instruction", text)
    else:
        absent = "there is no instruction: /system TEXT gives one"
        chat.screen.remark(f"[{chat.instruction or absent}]")


def clear(chat: Chat, _: str) -> None:
    chat.begin("new conversation")


def setting(name: str, chat: Chat, text: str) -> None:
    """Show the setting of this name, or change it within the bounds of its knob."""
    if text:
        value = from_text(ChatKnobs, name, text, f"/{name}")
        chat.options = replace(chat.options, **{name: value})
        if name == "seed":
            chat.turn = 0
    chat.screen.remark(f"[{name} {getattr(chat.options, name)}]")


def model(chat: Chat, text: str) -> None:
    if text:
        stage, tag = split_name(text)
        chosen = replace(chat.options, model_tag=tag, step=None)
        chat.use(*chosen.load(stage))
        chat.dropped = 0
    chat.introduce()


def stats(chat: Chat, _: str) -> None:
    """Show how full the context is, how fast the last answer came, and the settings."""
    messages, tokens = chat.messages if chat.chats else [], 0
    if messages:
        tokens = len(chat.engine.tokenizer.render_conversation(chat.conversation())[0])
    settings = ", ".join(f"{name} {getattr(chat.options, name)}" for name in SETTINGS)
    chat.screen.remark(
        f"{chat.loaded.describe()}\n"
        f"{len(messages) // 2} questions and answers, {tokens:,} tokens; "
        f"the context holds {chat.context:,}\n"
        f"last answer: {chat.speed}\n{settings}"
    )


def leave(chat: Chat, _: str) -> None:
    chat.leaving = True


class Command(NamedTuple):
    """A command of the chat."""

    argument: str  # as the help shows it; one in brackets may be left out
    help: str
    function: Callable[[Chat, str], object]
    chats: bool = False  # whether it needs a chat model


COMMANDS = {
    "/help": Command("", "list the commands", show_help),
    "/retry": Command("", "answer the last question again, with another seed", retry),
    "/undo": Command("", "take back the last question and its answer", undo, chats=True),
    "/edit": Command("[TEXT]", "ask this instead of the last question (default: edit it)", edit),
    "/save": Command(
        "FILE", "write the conversation as JSON for chat_sft --data", save, chats=True
    ),
    "/load": Command("FILE", "continue the conversation in a file", load, chats=True),
    "/system": Command(
        "[TEXT]", "begin anew with this instruction, or show it", system, chats=True
    ),
    "/clear": Command("", "forget the conversation and the instruction", clear),
    **{
        f"/{f.name}": Command("[VALUE]", f.metadata["help"], partial(setting, f.name))
        for f in fields(GenerationKnobs)
        if f.name in SETTINGS
    },
    "/model": Command("[STAGE[/TAG]]", "use another model, or show which one answers", model),
    "/stats": Command("", "show the context, the speed and the settings", stats),
    "/quit": Command("", "exit", leave),
    "/exit": Command("", "the same", leave),
}


def brief(text: str) -> str:
    """A text in one short line, in quotation marks."""
    line = " ".join(text.split())
    return f'"{line if len(line) <= 40 else line[:37] + "..."}"'


def main(argv: Sequence[str] | None = None) -> None:
    options, _ = parse(
        ChatKnobs, argv, command="chat_cli", description="Chat with a model in the terminal."
    )
    opening("chat_cli")
    question = options.prompt
    if question is None:
        styled = in_terminal()
        prompt = Prompt(YOU, "chat_history", words=COMMANDS) if styled else None
    elif question.strip():
        styled, prompt = sys.stdout.isatty(), None
    else:
        raise UserError("--prompt is empty: write a question after it, or leave it out to chat")
    chat = Chat(options, Screen(styled), prompt)
    chat.introduce()
    if question is None:
        chat.run(prompt or sys.stdin)
    else:
        chat.run([question], forgiving=False)


if __name__ == "__main__":
    entry(main)
