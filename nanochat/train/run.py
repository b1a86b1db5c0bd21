"""
How the training commands open a run: the knobs and what they inherit from a checkpoint, the
runtime, the tokenizer, the model and the optimizer.

This file, horizon.py and stage.py have what the training commands share; each command adds its own
data, feed and evaluations.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nanochat.base import hardware, logbook
from nanochat.base.common import UserError, counted, human, notice, print0, rank
from nanochat.base.files import reserve, reserved
from nanochat.base.runtime import Runtime, compiler_missing, emulates_bfloat16, open_runtime
from nanochat.data.contexts import Contexts
from nanochat.data.tokenizer import Tokenizer
from nanochat.model.attention import has_flash
from nanochat.model.checkpoint import Checkpoint, list_checkpoints, locate, newest_to_resume
from nanochat.model.gpt import GPT
from nanochat.model.stages import (
    STAGES,
    lock_file,
    run_directory,
    saved_last,
    stage_directory,
)
from nanochat.train import resume
from nanochat.train.knobs import K, LaterStageKnobs, inherit
from nanochat.train.loop import from_main
from nanochat.train.optim import Group, MuonAdamW
from nanochat.train.polynomials import chosen_polynomials
from nanochat.train.scaling import width_scale

INHERITED = (  # knobs that a later stage takes from its parent
    "dtype",
    "compile",
    "matmul",
    "device_batch_size",
    "embedding_lr",
    "unembedding_lr",
    "matrix_lr",
    "gate_lr",
    "embedding_beta2",
    "unembedding_beta2",
    "polynomials",
    "lr_scale",
    "run",
    "sinks",
    "seed",
    "name",
    "task_dir",
)
# Values of knobs that checkpoints of earlier versions do not store, as those versions had them
EARLIER = {"embedding_beta2": 0.95, "unembedding_beta2": 0.95, "polynomials": "jordan"}


@dataclass
class OpenRun:
    """An open run, from which a training command makes its feed and its evaluations."""

    stage: str
    knobs: Any
    origins: dict[str, str]
    runtime: Runtime
    tokenizer: Tokenizer
    model: GPT
    directory: Path
    resume_from: Checkpoint | None
    peak_flops: float  # of all devices together
    began: float  # when the run's clock started, by time.monotonic()
    parent: Any = None  # the Checkpoint where a later stage starts
    # What data/summary.py says of the data, as lines to print and for the checkpoint
    data_lines: Sequence[str] = ()
    data_summary: dict[str, Any] = field(default_factory=dict)

    @property
    def budget_seconds(self) -> float:
        """The time budget; 0 if there is none."""
        return self.knobs.max_minutes * 60 or self.knobs.max_hours * 3600

    @property
    def contexts(self) -> Contexts:
        """The context stages of the run: one, unless base_train was given more."""
        stages = getattr(self.knobs, "context_stages", ())
        return Contexts.parse(stages, self.model.config.sequence_len)

    def stored(self, name: str) -> Any:
        """
        A value of the horizon in the checkpoint to resume from; None if the run does not resume, or
        does so with --new_horizon.
        """
        if self.resume_from is None or self.knobs.new_horizon:
            return None
        return self.resume_from.meta["horizon"].get(name)

    @property
    def stored_progress(self) -> float:
        """The share of the run that is over at the checkpoint to resume from; 0 at the start."""
        return self.resume_from.meta.get("progress", 0.0) if self.resume_from else 0.0

    def resolve(self, **values: Any) -> None:
        """Set knobs that a rule decides; checkpoints store "rule" as their origin."""
        self.knobs = replace(self.knobs, **values)
        self.origins |= dict.fromkeys(values, "rule")


def reserve_run(stage: str, tag: str) -> None:
    """Reserve a run's folder for this process; UserError if another process is training there."""
    if rank() == 0:
        directory = run_directory(stage, tag)
        reserve(lock_file(directory), f"the run {tag} in {directory}")


def resume_knobs(
    stage: str, tag: str, knobs: K, origins: dict[str, str]
) -> tuple[K, dict[str, str], Checkpoint | None]:
    """
    (knobs, origins, checkpoint to resume from or None). When a run resumes, knobs that are not
    given keep the values with which it was started. UserError for two time budgets, or for another
    length without --new_horizon.
    """
    if knobs.max_minutes and knobs.max_hours:
        raise UserError(
            f"--max_minutes={knobs.max_minutes:g} and --max_hours={knobs.max_hours:g} set two "
            "budgets: give only one of them"
        )
    directory = run_directory(stage, tag)
    checkpoint = newest_to_resume(directory) if knobs.resume == "auto" else None
    if checkpoint is None:
        return knobs, origins, None
    stored = EARLIER | checkpoint.meta["knobs"]
    dropped = {"resume", "new_horizon"}
    if knobs.new_horizon:  # what a rule derived from the old length
        by_length = {"eval_every", "eval_tokens", "sample_every"}
        dropped |= {n for n in by_length if checkpoint.meta["origins"].get(n) == "rule"}
    if knobs.max_minutes or knobs.max_hours:  # a new budget replaces one in the other unit
        dropped |= {"max_minutes", "max_hours"}
    lengths = {"num_iterations", "epochs", "max_minutes", "max_hours"}
    if isinstance(knobs, LaterStageKnobs) and any(origins.get(n) != "default" for n in lengths):
        dropped |= lengths  # a length that is given replaces one of another kind
    kept = {name: value for name, value in stored.items() if name not in dropped}
    knobs, origins = inherit(knobs, origins, kept)
    for name in kept:
        if origins.get(name) == "inherited":
            origins[name] = checkpoint.meta["origins"].get(name, "inherited")
    if not knobs.new_horizon:
        resume.same_horizons(stored, asdict(knobs))
    return knobs, origins, checkpoint


def open_run(
    stage: str,
    tag: str,
    knobs: Any,
    origins: dict[str, str],
    build: Callable[[Runtime, Tokenizer], GPT],
    resume_from: Checkpoint | None,
    began: float,
    parent: Checkpoint | None = None,
) -> OpenRun:
    """
    Open runtime, tokenizer and model, and print what was opened. `build` returns the model as it is
    before the first step; the clock of the run started at `began`, by time.monotonic(). UserError
    for flags that cannot be used here, or with the checkpoint to resume from.
    """
    logbook.needed_trackers(knobs.sinks, knobs.run)  # an error should come early
    # A resumed run keeps its dtype: "auto" depends on a measurement on CPUs
    dtype = resume_from.meta["dtype"] if resume_from else knobs.dtype
    if knobs.dtype not in ("auto", dtype):
        notice(
            f"--dtype={knobs.dtype} is ignored: the run was started in {dtype} and continues in it"
        )
    runtime = open_runtime(knobs.device_type, dtype, knobs.seed)
    earlier = resume_from or parent
    tokenizer = earlier.tokenizer() if earlier else Tokenizer.load()
    model = build(runtime, tokenizer)
    if resume_from:
        resume.same_architecture(model.config, resume_from)
    _check_kernels(model, knobs.matmul, runtime)
    model.set_matmul(knobs.matmul)
    # the horizon depends on the peak: all ranks use the figure of rank 0
    peak = from_main(hardware.measured_peak(runtime.device, runtime.dtype), runtime)
    peak *= runtime.world_size if runtime.device.type == "cuda" else 1
    print0(
        f"{STAGES[stage].command}: {tag} on {runtime.device.type} x{runtime.world_size}, "
        f"{runtime.dtype_name}, measured peak {peak / 1e12:.3g} TFLOP/s"
    )
    if hardware.in_container():
        memory = human(hardware.total_memory())
        print0(f"  memory: {memory}B, the limit of this container or service")
    if parent:
        print0(f"  from {parent}")
    print0(table_of_counts(model))
    directory = run_directory(stage, tag)
    return OpenRun(
        stage,
        knobs,
        origins,
        runtime,
        tokenizer,
        model,
        directory,
        resume_from,
        peak,
        began,
        parent,
    )


def _check_kernels(model: GPT, matmul: str, runtime: Runtime) -> None:
    """UserError if --matmul=int8 cannot run here; a notice if windows save no time."""
    config, device = model.config, runtime.device
    on_gpu = device.type == "cuda"
    if matmul == "int8" and device.type != "cpu":
        missing = compiler_missing(device)
        if not missing and torch.cuda.get_device_properties(device).major < 8:
            missing = "this GPU is older than the RTX 30 series"
        if missing:
            raise UserError(f"--matmul=int8 cannot run here ({missing}): choose --matmul=float")
    has_windows = any(config.window(layer) for layer in range(config.n_layer))
    if has_windows and on_gpu and not has_flash(device, runtime.dtype, config.head_dim):
        notice(
            f"--window_pattern={config.window_pattern} saves no time here: the kernel for windows "
            f"does not support {runtime.dtype_name} heads of width {config.head_dim} on this GPU, "
            "so all scores are computed"
        )


def open_from_parent(
    stage: str,
    parent_stage: str,
    knobs: LaterStageKnobs,
    origins: dict[str, str],
    began: float,
) -> OpenRun:
    """
    Open a run that starts from a checkpoint of an earlier stage, its parent: the newest, or that of
    --step. It has the parent's model and tag and, unless it resumes, the parent's values of the
    knobs in INHERITED.
    """
    if knobs.resume == "auto" and not knobs.model_tag:
        knobs = replace(knobs, model_tag=_interrupted(stage, parent_stage))
    # Unless --source is given, a run resumes with the parent with which it was started
    keeps_parent = knobs.resume == "auto" and knobs.model_tag and origins.get("source") == "default"
    if keeps_parent and (own := newest_to_resume(run_directory(stage, knobs.model_tag))):
        parent_stage = own.meta["knobs"].get("source", parent_stage)
    parent = locate(parent_stage, knobs.model_tag, knobs.step)
    reserve_run(stage, parent.tag)
    knobs, origins, resume_from = resume_knobs(stage, parent.tag, knobs, origins)
    if not resume_from:
        inherited = {n: value for n, value in parent.meta["knobs"].items() if n in INHERITED}
        knobs, origins = inherit(knobs, origins, inherited)

    def build(runtime: Runtime, tokenizer: Tokenizer) -> GPT:
        return parent.model(runtime.device, runtime.dtype)

    return open_run(stage, parent.tag, knobs, origins, build, resume_from, began, parent)


def _interrupted(stage: str, parent_stage: str) -> str:
    """
    The tag of the run of a stage that was saved last, if it has not ended and was saved after all
    runs of its parent's stage; "" if not.
    """
    last = max(stage_directory(stage).glob("*"), key=saved_last, default=None)
    parent = max(map(saved_last, stage_directory(parent_stage).glob("*")), default=(False, 0.0))
    # It is reserved if another process trains it
    if last is None or saved_last(last) <= parent or reserved(lock_file(last)):
        return ""
    with suppress(UserError, IndexError):  # its checkpoint is damaged, or there is none
        if not list_checkpoints(last)[-1].meta["done"]:
            return last.name
    return ""


def table_of_counts(model: GPT) -> str:
    """A model's size, its parameters by part, and its FLOPs per token, as lines to print."""
    c, counts = model.config, model.counts()
    lines = [
        f"  {counted(c.n_layer, 'layers')}, width {c.n_embd}, {c.n_head} heads of {c.head_dim} "
        f"({c.n_kv_head} key-value), MLP {c.hidden}, context {c.sequence_len}, "
        f"vocabulary {c.vocab_size:,}"
    ]
    for part in ("embedding", "transformer", "head"):
        if counts[part]:
            share = counts[part] / counts["total"]
            lines.append(f"  {part:<12} {counts[part]:>13,}  {share:6.1%}")
    if model.prior:
        lines.append(f"  prior        {model.prior.describe()}")
    tied = "  (embedding and head share one table)" if c.tie_embeddings else ""
    flops = human(model.flops_per_token())
    lines.append(f"  {'total':<12} {counts['total']:>13,}  {flops} FLOPs per token{tied}")
    return "\n".join(lines)


def make_optimizer(model: GPT, knobs: Any, runtime: Runtime, rate_scale: float = 1.0) -> MuonAdamW:
    """
    The optimizer of a model, with one group per (optimizer, rate) of the roster. AdamW's rates are
    scaled with the model's width, and all rates with lr_scale and rate_scale. beta2 is larger for
    embeddings: as few of their rows occur in a step, squared gradients are averaged over more.
    """
    by_width = width_scale(model.config.n_embd)
    rates = {
        "embedding": knobs.embedding_lr * by_width,
        "value": knobs.embedding_lr * by_width / 2,  # as in karpathy/nanochat
        "head": knobs.unembedding_lr * by_width,
        "matrix": knobs.matrix_lr,
        "gate": knobs.gate_lr,
    }
    beta2 = {
        "embedding": knobs.embedding_beta2,
        "value": knobs.embedding_beta2,
        "head": knobs.unembedding_beta2,
    }
    groups: dict[tuple[str, str], Group] = {}
    for name, p, spec in model.roster():
        key = spec.optimizer, spec.rate
        if key not in groups:
            decay = knobs.weight_decay if spec.optimizer == "muon" else 0.0
            rate = rates[spec.rate] * knobs.lr_scale * rate_scale
            betas = 0.8, beta2.get(spec.rate, 0.95)
            groups[key] = Group(spec.optimizer, {}, rate, decay, betas)
        groups[key].params[name] = p
    exact = runtime.dtype is torch.float32 and runtime.device.type == "cpu"
    ns_dtype = torch.bfloat16
    if exact or emulates_bfloat16(runtime.device):
        ns_dtype = torch.float32
    polynomials = chosen_polynomials(knobs.polynomials, model.config.n_embd)
    return MuonAdamW(groups.values(), ns_dtype, polynomials)
