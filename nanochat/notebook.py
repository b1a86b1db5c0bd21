"""What `nanochat.load` and `nanochat.train` return: a Chat with a model, and a finished Run."""

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanochat.base import logbook
from nanochat.base.common import UserError, human, notice
from nanochat.chat.generate import Engine
from nanochat.chat.reply import Reply, fit_conversation, fit_prompt, fit_text
from nanochat.model.checkpoint import Loaded, load_for_inference
from nanochat.model.stages import STAGES, stage_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLING = {"max_tokens": 256, "temperature": 0.6, "top_k": 50, "top_p": 1.0, "seed": 42}


class Chat:
    """
    A trained model. The methods that generate take max_tokens, temperature, top_k, top_p and seed
    as keywords, with the defaults of SAMPLING.
    """

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self.model = loaded.model.cast_for_inference()
        self.tokenizer = loaded.tokenizer
        self.engine = Engine(self.model, self.tokenizer)

    def __repr__(self) -> str:
        checkpoint, parameters = self.loaded.checkpoint, self.model.counts()["total"]
        return (
            f"<nanochat {self.loaded.stage} model {checkpoint.tag}, step {checkpoint.step:,}, "
            f"{parameters / 1e6:.1f} M parameters>"
        )

    def __call__(self, message: str | Sequence[dict[str, Any]], **sampling: Any) -> str:
        """
        The model's reply to a message, or to a conversation: a list of {"role": "user" or
        "assistant", "content": text} that ends with a message of the user.
        """
        return "".join(self.stream(message, **sampling))

    def stream(self, message: str | Sequence[dict[str, Any]], **sampling: Any) -> Iterator[str]:
        """The same reply, piece by piece as it is generated."""
        if not STAGES[self.loaded.stage].chats:
            raise UserError(f"{self!r} has not learned to chat: use .complete(text)")
        messages = [{"role": "user", "content": message}] if isinstance(message, str) else message
        settings, room = self._settings(sampling)
        conversation = {"messages": list(messages)}
        conversation, dropped = fit_conversation(self.tokenizer, conversation, room)
        prompt, cut = fit_prompt(self.tokenizer, conversation["messages"], room)
        self._tell_lost("oldest messages", 2 * dropped)
        self._tell_lost("first tokens of the text", cut)
        steps = self.engine.generate(prompt, **settings)
        return (text for kind, text in Reply(self.tokenizer).stream(steps) if kind == "text")

    def complete(self, text: str, **sampling: Any) -> str:
        """The text that the model writes after `text`."""
        settings, room = self._settings(sampling)
        prompt, cut = fit_text(self.tokenizer, text, room)
        self._tell_lost("first tokens of the text", cut)
        steps = self.engine.generate(prompt, **settings)
        return "".join(piece for _, piece in Reply(self.tokenizer, plain=True).stream(steps))

    def _settings(self, sampling: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """All settings of sampling, and how many tokens of the context a prompt may take."""
        settings: dict[str, Any] = {**SAMPLING, **sampling}
        context = self.model.config.sequence_len
        return settings, context - min(settings["max_tokens"] or context, context // 2)

    def _tell_lost(self, things: str, n: int) -> None:
        if n:
            notice(
                f"the context holds {self.model.config.sequence_len:,} tokens, including those of "
                f"the answer: the model does not see the {things} ({n:,})"
            )

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """
        The logits (T, vocab_size) of the token after each of T tokens, in float32. UserError unless
        the context holds them.
        """
        context = self.model.config.sequence_len
        if len(tokens) == 0:
            raise UserError("there are no tokens: give at least one, for example tokenizer.bos")
        if len(tokens) > context:
            raise UserError(
                f"the model reads 1 to {context:,} tokens at a time (got {len(tokens):,}): give "
                "fewer, for example the last ones"
            )
        row = torch.tensor([list(tokens)], device=self.loaded.runtime.device)
        return self.model.logits(self.model(row))[0]


class Run:
    """A finished training run."""

    def __init__(self, stage: str, tag: str, summary: dict[str, Any]):
        self.stage, self.tag, self.summary = stage, tag, summary
        self.directory = stage_directory(stage) / tag

    def __repr__(self) -> str:
        tokens = human(self.summary["tokens"])
        return f"<nanochat {self.stage} run {self.tag}, {tokens} tokens, in {self.directory}>"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, one dict per row: pandas.DataFrame(run.metrics)."""
        return logbook.read(self.directory)

    def plot(self) -> "Figure":
        """The training loss and the validation bits per byte over the steps, as a figure."""
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
        curves = ("train", "loss", "training loss"), ("eval", "val_bpb", "validation bits per byte")
        for ax, (kind, name, title) in zip(axes, curves, strict=True):
            rows = [row for row in self.metrics if row["kind"] == kind and name in row]
            ax.plot([row["step"] for row in rows], [row[name] for row in rows])
            ax.set(title=title, xlabel="step")
        pyplot.close(figure)  # a notebook shows the returned figure, and would show an open one too
        return figure

    def load(self) -> Chat:
        """The model that this run trained."""
        return Chat(load_for_inference(self.stage, self.tag))


def train(stage: str, **knobs: Any) -> Run:
    """Run the command of a stage with the keywords as its flags; see nanochat.train."""
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage!r}: choose one of {', '.join(STAGES)}")
    argv = []
    for name, value in knobs.items():
        values = value if isinstance(value, list | tuple) else [value]
        argv += [f"--{name}={v}" for v in values or [""]]
    summary = importlib.import_module(f"nanochat.commands.{STAGES[stage].command}").main(argv)
    return Run(stage, summary["tag"], summary)
