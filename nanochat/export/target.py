"""
Which foreign class represents a model exactly, and why others cannot.

transformers' NanoChat has this project's numerics. A swiglu model without softcap equals Qwen3, and
a relu2 model without softcap Apertus: RMSNorm without weights commutes with rotation, the norm
after the embedding folds into the table, and the direction of the rotation folds into W_Q and W_K.
llama.cpp supports Qwen3 and Apertus. A model that no class represents is refused; no part is ever
dropped silently.
"""

from dataclasses import dataclass
from typing import Literal

from nanochat.base.common import UserError
from nanochat.model.config import GPTConfig

Destination = Literal["hf", "gguf", "ollama"]
ClassName = Literal["nanochat", "qwen3", "apertus"]
PRE_TOKENIZERS = {1: "qwen2", 3: "llama-bpe"}  # digits per group -> llama.cpp's name for it


@dataclass(frozen=True)
class Target:
    """The class to write, why it was chosen, and how the export deviates from it or the model."""

    name: ClassName
    reason: str
    custom_code: bool = False  # ships a class of its own, with what no class of transformers has
    uncapped: bool = False  # leaves out the softcap of the logits


def layer_windows(config: GPTConfig) -> list[int]:
    """The number of keys that a query of each layer sees; 0 = all."""
    return [config.window(layer) for layer in range(config.n_layer)]


def _matching_class(config: GPTConfig, uncapped: bool) -> tuple[ClassName | None, str]:
    """
    (the class among Qwen3 and Apertus that equals this model, the reason), or (None, why there is
    none). With `uncapped`, the softcap is left out.
    """
    if config.softcap and not uncapped:
        return None, (
            f"softcap {config.softcap:g} (train with --softcap=0, or export with --uncapped: "
            "greedy answers stay equal, sampling becomes sharper)"
        )
    if config.activation == "swiglu":
        return "qwen3", "swiglu without softcap is Qwen3"
    if config.activation == "relu2":
        return "apertus", "relu2 without softcap is Apertus"
    return None, f"activation {config.activation} (train with --activation=relu2 or swiglu)"


def _parts_without_a_class(config: GPTConfig) -> str:
    """The flags of the model's parts that no foreign class has, or ""."""
    parts = "copy_heads", "convolutions", "value_embeddings", "pair_embeddings"
    return " and ".join(f"--{name}" for name in parts if getattr(config, name))


def _gguf_target(config: GPTConfig, digits: int, uncapped: bool) -> Target:
    """The target for llama.cpp. UserError names every knob that it does not support."""
    obstacles = []
    if flags := _parts_without_a_class(config):
        obstacles.append(f"{flags}, which llama.cpp lacks (train with --lookback=off)")
    if config.rap:
        obstacles.append(
            "an attention prior, without which llama.cpp would give wrong answers (train without "
            "--rap, or export with --to hf --with_code)"
        )
    if any(layer_windows(config)):
        obstacles.append(f"windows {config.window_pattern} (train with --window_pattern=L)")
    if digits not in PRE_TOKENIZERS:
        obstacles.append(
            f"a tokenizer with groups of {digits} digits (train it with tok_train --digits=3 or "
            "1, and the model with it)"
        )
    name, reason = _matching_class(config, uncapped)
    if name is None:
        obstacles.append(reason)
    if name is None or obstacles:
        raise UserError(f"this model cannot be exported to GGUF: {'; '.join(obstacles)}")
    return Target(name, reason, uncapped=bool(config.softcap))


def _transformers_target(config: GPTConfig, with_code: bool) -> Target:
    """The target for transformers. UserError names the first knob that no class supports."""

    def refuse(why: str) -> UserError:
        return UserError(f"transformers has no class for this model: {why}")

    has_windows = any(layer_windows(config))
    if flags := _parts_without_a_class(config):
        if config.rap:
            raise refuse(f"none has {flags} and a prior: train without --rap, or --lookback=off")
        if not with_code:
            raise refuse(
                f"none has {flags}: add --with_code to ship the code for them (it loads with "
                "trust_remote_code=True), or train with --lookback=off"
            )
        return Target("nanochat", f"NanoChat with shipped code for {flags}", True)
    if config.rap:
        if config.activation == "swiglu" or has_windows:
            raise refuse(
                "the code shipped for an attention prior supports neither swiglu nor windows: "
                "train without --rap, or with --activation=relu2 --window_pattern=L"
            )
        if ["bias", 0] in config.rap.get("columns", []):
            raise refuse(
                "its prior is a matrix of positions, which the shipped code does not support: "
                "train without --rap, or with a prior from dev/generate_rap_prior.py"
            )
        if not with_code:
            raise refuse(
                "no class supports an attention prior: add --with_code to ship the code for it (it "
                "loads with trust_remote_code=True), or train without --rap"
            )
        return Target("nanochat", "NanoChat with shipped code for the attention prior", True)
    if config.activation == "swiglu":
        if config.softcap:
            raise refuse(
                f"it has --activation=swiglu with --softcap={config.softcap:g}: train with "
                "--softcap=0"
            )
        return Target("qwen3", "swiglu without softcap is Qwen3")
    if has_windows:
        raise refuse(
            f"only Qwen3 has windows and it needs --activation=swiglu --softcap=0 "
            f"(this model has {config.activation}, softcap {config.softcap:g}): "
            "train with these, or with --window_pattern=L"
        )
    return Target("nanochat", "transformers' NanoChat has this model's numerics")


def choose_target(
    config: GPTConfig,
    digits: int,
    to: Destination,
    wanted: ClassName | None = None,
    with_code: bool = False,
    uncapped: bool = False,
) -> Target:
    """
    The class for a model of `config` whose tokenizer has groups of `digits` digits. `wanted` asks
    for one of them by name. A UserError says which knob is the obstacle, and with which flag to
    train a model without it.
    """
    if to != "hf":
        target = _gguf_target(config, digits, uncapped)
    elif uncapped:
        raise UserError(
            "--uncapped works only with --to gguf and --to ollama: leave it out, because "
            "transformers keeps the softcap"
        )
    else:
        target = _transformers_target(config, with_code)
        if wanted == "apertus" and target.name == "nanochat" and not target.custom_code:
            name, reason = _matching_class(config, uncapped=False)
            if name != "apertus":
                raise UserError(
                    "this model is not an Apertus, which needs --activation=relu2 --softcap=0: "
                    "leave --class out, or train with these"
                )
            target = Target("apertus", reason)
    if wanted not in (None, target.name):
        raise UserError(
            f"--class={wanted} cannot represent this model for --to {to}: leave it out to get "
            f"{target.name} ({target.reason})"
        )
    return target


def destinations(config: GPTConfig, digits: int) -> str:
    """
    One line for plans and for the start of a training run: to what the model can be exported, and
    which knobs are obstacles elsewhere.
    """
    reached, others = [], []
    places: dict[str, Destination] = {"transformers": "hf", "GGUF": "gguf"}
    for name, to in places.items():
        try:
            target = choose_target(config, digits, to, with_code=to == "hf")
        except UserError as e:
            others.append(f"not to {name}: {str(e).partition(': ')[2]}")
        else:
            reached.append(f"{name} (with --with_code)" if target.custom_code else name)
    return "; ".join([f"exports to: {', '.join(reached) or 'nothing'}", *others])
