"""
nanochat for one machine. In a notebook:

    chat = nanochat.load("sft")
    run = nanochat.train("base", depth=4, max_minutes=10)

Importing the package is quick: torch is loaded when a model is.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nanochat.base.common import before_torch

if TYPE_CHECKING:
    from nanochat.notebook import Chat, Run


def load(
    stage: str = "auto",
    model_tag: str = "",
    step: int | None = None,
    device_type: str = "auto",
    dtype: str = "auto",
) -> "Chat":
    """
    A trained model, ready to chat, of a `stage` ("base", "mid", "sft" or "rl"; "auto" is the
    furthest stage of its tag). By default it is the newest checkpoint of the tag saved last;
    `model_tag` and `step` choose another. UserError if there is no such model.
    """
    before_torch()
    from nanochat.model.checkpoint import load_for_inference
    from nanochat.notebook import Chat

    return Chat(load_for_inference(stage, model_tag, step, device_type, dtype))


class _TrainRoom(ModuleType):
    """The package nanochat.train, which can also be called: see __call__."""

    def __call__(self, stage: str, **knobs: Any) -> "Run":
        """
        Train a stage ("base", "mid", "sft" or "rl") in this process. The keywords are the flags of
        its command: `train("base", depth=4)` is `nanochat base_train --depth=4`. Raises UserError
        for a wrong keyword or value, as the command does.
        """
        before_torch()
        from nanochat.notebook import train

        return train(stage, **knobs)


importlib.import_module("nanochat.train").__class__ = _TrainRoom
