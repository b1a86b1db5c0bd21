"""
The knobs that commands share: for a model, the machine, a training run, and the stages after
pretraining. The first sentence of a class's docstring is the heading of its knobs in -h.

Importing this needs no torch, so that every command shows its help at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from nanochat.base.common import UserError
from nanochat.base.knobs import LARGEST_SEED, knob, stored_values

K = TypeVar("K", bound="TrainKnobs")


@dataclass(kw_only=True)
class ModelKnobs:
    """Model"""

    model_tag: str = knob("", "tag of the model (default: the one saved last)", alias="-g")
    step: int | None = knob(None, "step of the checkpoint (default: the newest)", alias="-s")


@dataclass(kw_only=True)
class AnyModelKnobs(ModelKnobs):
    """Model"""

    source: Literal["auto", "base", "mid", "sft", "rl"] = knob(
        "auto", "stage of the model; auto = the furthest one of the tag", alias="-i"
    )


@dataclass(kw_only=True)
class DeviceKnobs:
    """Machine"""

    device_type: Literal["auto", "cpu", "cuda", "mps"] = knob("auto", "device to compute on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "precision of the computation; in training, weights stay in float32"
    )


@dataclass(kw_only=True)
class MachineKnobs(DeviceKnobs):
    """Machine"""

    seed: int = knob(42, "seed of weights, data order and samples", low=0, high=LARGEST_SEED)


@dataclass(kw_only=True)
class ExportedModelKnobs:
    """Exported model"""

    hf: str = knob(
        "", "exported folder (export --to hf) to score with transformers, in place of a checkpoint"
    )
    with_code: bool = knob(
        False,
        "with --hf: run the Python code that the folder ships, for a prior or parts that look back",
    )

    def check_hf(self, origins: Mapping[str, str], replaced: Sequence[str]) -> None:
        """UserError for a knob in `replaced` that is set together with --hf."""
        if self.with_code and not self.hf:
            raise UserError("--with_code has no effect without --hf: add --hf DIR or leave it out")
        for name in replaced if self.hf else ():
            if origins[name] != "default":
                raise UserError(f"--{name} cannot be combined with --hf: leave one of them out")


@dataclass(kw_only=True)
class TrainKnobs(MachineKnobs):
    """Run"""

    compile: Literal["auto", "on", "off"] = knob(
        "auto",
        "torch.compile; auto = on a GPU, and on a CPU in base_train and mid_train of two minutes "
        "or more for each shape of their batches",
    )
    matmul: Literal["float", "int8"] = knob(
        "float",
        "int8 = multiply the blocks' matrices by 8-bit integers in the forward pass and for the "
        "gradients of inputs: for GeForce cards from the RTX 30 series on; slow on a CPU",
    )
    run: str = knob(
        "dummy", "name of the run in the trackers of --sinks (dummy = log to metrics.jsonl only)"
    )
    sinks: tuple[str, ...] = knob(
        ("wandb",), "trackers that also log a named run: wandb trackio tensorboard"
    )
    model_tag: str = knob(
        "",
        "name of the model's folder (default: d<depth>; later stages keep the tag of the "
        "model they start from)",
    )
    resume: Literal["", "auto"] = knob(
        "", "auto = continue from this run's newest intact checkpoint, or start if there is none"
    )
    new_horizon: Literal["", "stretch", "redecay"] = knob(
        "",
        "when resuming with a different length: stretch fits the schedule to the new length, "
        "redecay lowers the current rate to the floor",
    )
    keep: int = knob(2, "checkpoints to keep, besides the best", low=1)
    save_every: float = knob(
        0.0,
        "steps between extra checkpoints (below 1: a share of the run; 0 = only before "
        "evaluations and at the end)",
        low=0,
    )
    save_minutes: float = knob(
        15.0, "minutes between saves by the clock, besides the others (0 = none)", low=0, high=1e7
    )
    eval_every: float = knob(
        -1.0,
        "steps between evaluations (below 1: a share of the run; 0 = only at the end; -1 = set "
        "by the length of the run: 2 evaluations in 4 minutes, 10 in 100 minutes or more)",
        low=-1,
    )
    eval_tokens: int = knob(
        0,
        "validation tokens per source in an evaluation (0 = as many as 4 % of the run's time "
        "allow for all evaluations together, at most 1,048,576)",
        low=0,
    )
    sample_every: float = knob(
        -1.0,
        "steps between samples (below 1: a share of the run; 0 = only at the end; -1 = set by "
        "the length of the run)",
        low=-1,
    )
    max_minutes: float = knob(
        0.0,
        "end after this many minutes, including evaluation and saving (0 = no limit)",
        low=0,
        high=1e7,
    )
    max_hours: float = knob(0.0, "the same in hours", low=0, high=1e5)
    device_batch_size: int = knob(
        32, "maximum rows of a micro-batch on one device; halved when memory runs out", low=1
    )
    embedding_lr: float = knob(
        0.0,
        "AdamW's rate for the token embedding, at width 768; 0 = set by the batch: 0.05 for "
        "4,096 tokens, growing with its square root up to 0.2; value and pair embeddings have half",
        low=0,
    )
    unembedding_lr: float = knob(
        0.004, "AdamW's rate for the head (and a tied table), at width 768", low=0
    )
    matrix_lr: float = knob(0.02, "Muon's rate for the matrices", low=0)
    gate_lr: float = knob(0.05, "AdamW's rate for the gates of an attention prior", low=0)
    embedding_beta2: float = knob(
        0.995, "AdamW's beta2 for all embeddings: token, value and pair", low=0, high=0.99999
    )
    unembedding_beta2: float = knob(
        0.96, "AdamW's beta2 for the head (and a tied table)", low=0, high=0.99999
    )
    polynomials: Literal["auto", "minimax", "jordan"] = knob(
        "auto",
        "Muon's polynomials: three minimax ones, or Jordan's five as in version 0.1; auto = "
        "minimax up to width 512",
    )
    lr_scale: float = knob(1.0, "factor for all learning rates", low=0)
    weight_decay: float = knob(0.0, "decoupled weight decay of the matrices", low=0)
    warmup_ratio: float = knob(
        0.0, "share of the run over which the learning rates rise", low=0, high=1
    )
    warmdown_ratio: float = knob(
        0.4, "share of the run over which the learning rates fall", low=0, high=1
    )
    final_lr_frac: float = knob(
        0.0, "learning rates at the end of the run, as a share of the peak", low=0, high=1
    )


@dataclass(kw_only=True)
class LaterStageKnobs(TrainKnobs):
    """Start and length"""

    step: int | None = knob(None, "step of the checkpoint to start from (default: the newest)")
    num_iterations: int = knob(-1, "optimizer steps (-1 = set by epochs)")
    epochs: int = knob(1, "passes over the conversations or questions", low=1)
    task_dir: str = knob(
        "", "folder with the data sets (default: fetched from the hub into the base folder)"
    )


def inherit(k: K, origins: Mapping[str, str], stored: Mapping[str, Any]) -> tuple[K, dict]:
    """
    (knobs, origins) with the stored values for knobs that are still at their defaults: a recipe and
    the command line have precedence over a checkpoint.
    """
    unset = {name: value for name, value in stored.items() if origins.get(name) == "default"}
    values = stored_values(type(k), unset, "in the checkpoint")
    return replace(k, **values), {**origins, **dict.fromkeys(values, "inherited")}
