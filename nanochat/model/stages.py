"""The stages of training, in order, and the folders of their runs. Imports no torch."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from nanochat.base.common import UserError, base_dir

StageName = Literal["base", "mid", "sft", "rl"]


class Stage(NamedTuple):
    """One stage of training."""

    command: str  # the command that trains it
    chats: bool  # whether its models answer chat messages, or only continue text


STAGES: dict[str, Stage] = {  # by the name of their folder under checkpoints/
    "base": Stage("base_train", chats=False),
    "mid": Stage("mid_train", chats=True),
    "sft": Stage("chat_sft", chats=True),
    "rl": Stage("chat_rl", chats=True),
}


def stage_directory(stage: str) -> Path:
    """The folder with all runs of a stage."""
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage!r}: choose one of {', '.join(STAGES)}")
    return base_dir() / "checkpoints" / stage


def run_directory(stage: str, tag: str) -> Path:
    """The folder of the run with this tag, whether it exists or not."""
    if not re.fullmatch(r"[\w-][\w.-]*", tag):
        raise UserError(
            f"the model tag {tag!r} cannot be a folder name: "
            "use letters, digits, dashes, underscores and, except at the start, dots"
        )
    return stage_directory(stage) / tag


def split_name(name: str) -> tuple[str, str]:
    """
    The stage and the tag that a person means with STAGE, TAG, STAGE/TAG or TAG/STAGE: "auto" for
    the stage and "" for the tag where the name leaves them out.
    """
    first, slash, second = name.strip().partition("/")
    if first in (*STAGES, "auto"):
        return first, second
    if not slash:
        return "auto", first
    if second not in STAGES:
        raise UserError(
            f"there is no stage in {name!r}: write STAGE/TAG, with one of {', '.join(STAGES)}"
        )
    return second, first
