"""
Checkpoints: how the state of a run is written, found again, verified and read.

    <base>/checkpoints/<stage>/<tag>/step_000120/
        model.safetensors  optim.safetensors  meta.json  manifest.json

A checkpoint is written to a temporary folder, which is then renamed. The manifest has the SHA-256
of the other files and is written last: a folder without a manifest, or with a file that differs
from it, is damaged, and skipped with a notice. Tensors are stored as safetensors and everything
else as JSON, so loading a checkpoint cannot run code.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.base.common import UserError, base_dir, human, notice
from nanochat.base.files import atomic_write, sha256_file, write_json
from nanochat.base.runtime import Runtime, open_runtime
from nanochat.base.strangers import read_json, shown
from nanochat.data.tokenizer import Tokenizer
from nanochat.model import stored
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.model.header import read_header
from nanochat.model.stages import STAGES, by_preference, stage_directory, step_folders

FORMAT = 2
MODEL, OPTIMIZER, META = "model.safetensors", "optim.safetensors", "meta.json"
MANIFEST = "manifest.json"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """
    The tensors of a safetensors file, mapped to memory: they are read when they are used, and
    loading needs no second copy. UserError for a file that is damaged or cannot be read.
    """
    try:
        read_header(path)
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(
            f"cannot read {path} ({e}): the file is damaged or truncated; "
            "choose another checkpoint with --step"
        ) from e


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint folder. Creating the object reads nothing, and the folder may be damaged or absent;
    newest() and locate() return intact ones.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step_"))

    @property
    def tag(self) -> str:
        """The model tag: the name of the run's folder."""
        return self.path.parent.name

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Everything stored besides tensors, in the present format. UserError if it is damaged."""
        try:
            meta = stored.read_meta(self.path / META)
            if meta.get("format") not in (1, FORMAT):
                raise UserError(
                    f"{self} has checkpoint format {shown(meta.get('format'))}, but this version "
                    f"reads 1 to {FORMAT}: use the version of nanochat that wrote it"
                )
            return stored.checked_meta(upgraded(meta))
        except (OSError, ValueError) as e:
            raise UserError(
                f"cannot read {self.path / META} ({e}): choose another checkpoint with --step"
            ) from e

    @property
    def config(self) -> GPTConfig:
        """The architecture. UserError if the weights do not have its names and shapes."""
        config = GPTConfig.from_dict(self.meta["config"])
        try:
            fault = stored.header_fault(read_header(self.path / MODEL), config)
        except (OSError, ValueError) as e:
            fault = str(e)
        if fault:
            raise UserError(
                f"cannot load {self.path / MODEL} ({fault}): choose another checkpoint with "
                "--step, or get it again from where it came from"
            )
        return config

    @property
    def fingerprint(self) -> str:
        """An identifier of the weights: the beginning of their SHA-256, from the manifest."""
        manifest = read_json(self.path / MANIFEST)
        return "fp_" + str(manifest[MODEL][0])[:16]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's parameters and the tables of its prior."""
        return read_tensors(self.path / MODEL)

    @property
    def optimizer_tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.path / OPTIMIZER)

    def moments(self, model: GPT) -> dict[str, Tensor]:
        """
        The optimizer's tensors by PARAMETER/MOMENT. UserError if the shape of one differs from its
        parameter's, or if it has values that are not finite numbers.
        """
        tensors, parameters = self.optimizer_tensors, dict(model.named_parameters())
        for key, tensor in tensors.items():
            p = parameters.get(key.rpartition("/")[0])
            if p is None or p.shape != tensor.shape or not tensor.is_floating_point():
                fault = f"{shown(key)} is {tensor.dtype} {tuple(tensor.shape)}"
            elif stored.not_finite({key: tensor}):
                fault = f"{shown(key)} is not finite"
            else:
                continue
            raise UserError(
                f"cannot resume from {self.path / OPTIMIZER} ({fault}): "
                "choose an earlier checkpoint"
            )
        return tensors

    def damage(self, optimizer: bool = False) -> str:
        """
        What is wrong with the metadata and the weights (and the optimizer's file, if asked);
        '' when they are intact. Reads and hashes the files.
        """
        try:
            stored.check_sizes(self.path / META, self.path / MODEL)
            manifest = read_json(self.path / MANIFEST)
            for name in (META, MODEL, OPTIMIZER) if optimizer else (META, MODEL):
                if sha256_file(self.path / name) not in manifest[name]:
                    return f"{name} differs from the manifest"
        except (OSError, ValueError, KeyError, TypeError) as e:
            return f"{type(e).__name__}: {e}"
        return ""

    def is_of(self, run: str | None) -> bool:
        """Whether the run with this id wrote this folder, and nobody has added a file."""
        try:
            meta = self.meta
            names = {p.name for p in self.path.iterdir() if p.suffix != ".tmp"}
        except (OSError, UserError, TypeError, AttributeError):
            return False
        ours = names <= {MODEL, OPTIMIZER, META, MANIFEST}
        return ours and (meta.get("run_id"), meta.get("step")) == (run, self.step)

    def load_weights(self, model: GPT) -> None:
        """
        Copy the weights, and the tables of a prior, into a model from GPT.build, one tensor at a
        time. UserError if a tensor is missing, has another shape or is not finite.
        """
        weights = self.weights
        with torch.no_grad():
            for name, p in model.state_dict().items():
                tensor = weights.get(name)
                if tensor is None or tensor.shape != p.shape:
                    shape = "nothing" if tensor is None else tuple(tensor.shape)
                    raise UserError(
                        f"{self} holds {shape} for {name}, but the model needs "
                        f"{tuple(p.shape)}: leave out the flags that set the model's size, or "
                        "choose another --model_tag"
                    )
                p.copy_(tensor)
            if name := stored.not_finite(model.state_dict()):
                raise UserError(
                    f"{self} holds values in {name} that are not finite numbers: choose an "
                    "earlier checkpoint with --step, or train the model again"
                )

    def model(self, device: torch.device | str, dtype: torch.dtype) -> GPT:
        """The stored model on `device`, with float32 weights; it computes in `dtype`."""
        model = GPT.build(self.config, device, dtype)
        self.load_weights(model)
        prior = model.prior
        if prior is not None and not prior.spec["learned"] and not prior.gates.any():
            model.prior = model.config.rap = None  # annealed to 0: it no longer adds anything
        return model

    def tokenizer_folder(self) -> Path:
        """
        The folder of the tokenizer that the model was trained with, if tok_train has moved it
        aside; else that of the present tokenizer, which may be another one.
        """
        present, fingerprint = base_dir() / "tokenizer", self.meta["tokenizer"]
        aside = present.with_name(f"tokenizer_{fingerprint[:8]}")
        with suppress(OSError, ValueError, AttributeError):
            if read_json(aside / "meta.json").get("fingerprint") == fingerprint:
                return aside
        return present

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with; UserError if it is missing."""
        tokenizer = Tokenizer.load(self.tokenizer_folder())
        needed, present = self.meta["tokenizer"], tokenizer.fingerprint
        if present != needed:
            raise UserError(
                f"{self} was trained with tokenizer {needed[:12]}, but the one in "
                f"{base_dir() / 'tokenizer'} is {present[:12]}: restore that tokenizer, "
                "or train the model again with this one"
            )
        return tokenizer

    def amend(self, meta: Mapping[str, Any]) -> None:
        """
        Replace the metadata and keep the tensors. If the process is killed meanwhile, the
        checkpoint stays intact, with the old or the new metadata.
        """
        text = _meta_text(self.step, meta)
        manifest = read_json(self.path / MANIFEST)
        new_hash = hashlib.sha256(text.encode("utf-8")).hexdigest()
        manifest[META] = [sha256_file(self.path / META), new_hash]
        write_json(self.path / MANIFEST, manifest)
        atomic_write(self.path / META, text)
        vars(self).pop("meta", None)  # read it again when it is next needed


def upgraded(meta: Mapping[str, Any]) -> dict[str, Any]:
    """
    The metadata of a checkpoint or of a logbook's first row in the present format, whichever
    version wrote it. Format 1 called the horizon "plan" and evaluated_to "looked".
    """
    meta = {**meta, "format": FORMAT}
    for old, new in (("plan", "horizon"), ("looked", "evaluated_to")):
        if old in meta:
            meta[new] = meta.pop(old)
    return meta


# ---- writing


def save(
    directory: Path,
    step: int,
    model: Mapping[str, Tensor],
    optim: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> Checkpoint:
    """
    Write the checkpoint of a step; call it on one rank only. UserError if it cannot be written;
    earlier checkpoints, even one of the same step, then stay as they were.
    """
    final = at_step(directory, step).path
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    replaced = temporary.with_suffix(".old.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in ((MODEL, model), (OPTIMIZER, optim)):
            dense = {k: t.detach().contiguous() for k, t in tensors.items()}
            save_file(dense, temporary / name)
        (temporary / META).write_text(_meta_text(step, meta), encoding="utf-8")
        manifest = {p.name: [sha256_file(p)] for p in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for p in temporary.iterdir():
            _sync(p)
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
        _sync(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {final} ({e}): free some space; "
            "earlier checkpoints are untouched"
        ) from e
    return Checkpoint(final)


def _meta_text(step: int, meta: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, "step": step, **meta}, indent=1)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def prune(directory: Path, step: int, keep: int, best: int | None, run: str | None = None) -> None:
    """
    Delete the checkpoints of `run` (the "run_id" in their metadata) up to `step`, except that of
    the step `best` and the last `keep`; also delete temporary folders and files of killed
    processes. The checkpoints of other runs stay, and so do folders to which somebody has added a
    file.
    """
    past = [c for c in list_checkpoints(directory) if c.step <= step]
    kept = {*past[-max(1, keep) :], *(c for c in past if c.step == best)}
    for checkpoint in past:
        if checkpoint not in kept and checkpoint.is_of(run):
            shutil.rmtree(checkpoint.path, ignore_errors=True)
    for temporary in directory.glob(".step_*.tmp"):
        if re.fullmatch(r"\.step_\d+\.\d+(\.old)?\.tmp", temporary.name):
            shutil.rmtree(temporary, ignore_errors=True)
    for temporary in directory.glob("step_*/.*.json.*.tmp"):
        temporary.unlink(missing_ok=True)


def drop_after(directory: Path, step: int, run: str | None) -> None:
    """Delete the checkpoints of `run` after `step`, to which the run has returned."""
    for checkpoint in list_checkpoints(directory):
        if checkpoint.step > step and checkpoint.is_of(run):
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def put_aside_after(directory: Path, step: int) -> None:
    """
    Rename the checkpoints after `step` to damaged_step_*: a run resumes from `step` because these
    are damaged, and will write new ones.
    """
    for checkpoint in list_checkpoints(directory):
        if checkpoint.step > step:
            aside = checkpoint.path.with_name(f"damaged_{checkpoint.path.name}")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}_")
            checkpoint.path.rename(aside)
            notice(f"the damaged checkpoint {checkpoint} is now {aside.name}")


# ---- runs with one tag


@contextmanager
def new_run(directory: Path) -> Iterator[None]:
    """
    For opening a new run in `directory`, inside the block: an earlier run there is renamed to
    <tag>.old, or to .old2, .old3, ... because no run is ever deleted. If the block fails, the
    earlier run is restored.
    """
    existed, aside = directory.exists(), None
    try:
        if list_checkpoints(directory):
            names = (f"{directory.name}.old{n if n > 1 else ''}" for n in itertools.count(1))
            aside = next(p for p in map(directory.with_name, names) if not p.exists())
            directory.rename(aside)
        yield
    except BaseException:
        if aside or not existed:
            shutil.rmtree(directory, ignore_errors=True)  # made by the block
        if aside:
            aside.rename(directory)
        raise
    if aside:
        notice(
            f"{directory.name} was trained before: the earlier run is now {aside} "
            "(--resume=auto would have continued it)"
        )


def require_space(directory: Path, size: int) -> None:
    """UserError unless a checkpoint of `size` bytes fits on the disk of `directory`."""
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(
            f"a checkpoint of this run needs {human(size)}B, but {existing} has only "
            f"{human(free)}B free: free some space or set NANOCHAT_BASE_DIR to another disk"
        )


# ---- finding


def at_step(directory: Path, step: int) -> Checkpoint:
    """The checkpoint of a step in a run's folder, whether it exists or not."""
    return Checkpoint(directory / f"step_{step:06d}")


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """The checkpoints in a run's folder, oldest first, including damaged ones."""
    return [Checkpoint(folder) for folder in step_folders(directory)]


def newest(directory: Path, step: int | None = None, optimizer: bool = False) -> Checkpoint | None:
    """
    The newest intact checkpoint in a run's folder, or that of `step`; None if there is none.
    Damaged ones are skipped with a notice. With `optimizer`, the optimizer's file must be intact,
    too, which resuming needs.
    """
    for checkpoint in reversed(list_checkpoints(directory)):
        if step is None or checkpoint.step == step:
            damage = checkpoint.damage(optimizer)
            if not damage:
                return checkpoint
            notice(f"skipping the damaged checkpoint {checkpoint} ({damage})")
    return None


def newest_to_resume(directory: Path) -> Checkpoint | None:
    """
    The newest checkpoint that training can resume from, or None in a folder without checkpoints.
    UserError if all checkpoints are damaged, so that a new run does not start by accident.
    """
    checkpoint = newest(directory, optimizer=True)
    if checkpoint is None and (damaged := list_checkpoints(directory)):
        raise UserError(
            f"cannot resume: no checkpoint in {directory} is intact ({len(damaged)} damaged); "
            "restore one from a backup, or leave out --resume to start a new run (the folder of "
            "this one is then renamed)"
        )
    return checkpoint


def choose(stage: str = "auto", tag: str = "", step: int | None = None) -> tuple[str, Checkpoint]:
    """
    (stage, checkpoint) of the model that commands use: by default that of the furthest stage of the
    tag that was saved last; runs that were set aside come last. `stage`, `tag` and `step` limit the
    choice. UserError if no such model has an intact checkpoint.
    """
    for name, run in by_preference(tag, stage):
        if checkpoint := newest(run, step):
            return name, checkpoint
    which = f" tagged {tag!r}" if tag else ""
    which += f" at step {step}" if step is not None else ""
    if stage == "auto":
        raise UserError(
            f"there is no model{which} under {base_dir() / 'checkpoints'}: "
            "train one with nanochat base_train or nanochat quickstart"
        )
    raise UserError(
        f"there is no {stage} checkpoint{which} under {stage_directory(stage)}: "
        f"make one with nanochat {STAGES[stage].command}"
    )


def locate(stage: str, tag: str = "", step: int | None = None) -> Checkpoint:
    """The checkpoint that `choose` finds for a stage."""
    return choose(stage, tag, step)[1]


# ---- use


@dataclass
class Loaded:
    """A model ready for use, where it came from and where it runs."""

    stage: str
    checkpoint: Checkpoint
    model: GPT
    tokenizer: Tokenizer
    runtime: Runtime

    def describe(self) -> str:
        """For example "sft model d4, step 1,200, bfloat16 on cuda"."""
        runtime = self.runtime
        name = f"{self.stage} model {self.checkpoint.tag}, step {self.checkpoint.step:,}"
        return f"{name}, {runtime.dtype_name} on {runtime.device.type}"


def load_for_inference(
    stage: str = "auto",
    tag: str = "",
    step: int | None = None,
    device_type: str = "auto",
    dtype: str = "auto",
    seed: int = 42,
) -> Loaded:
    """
    Load a trained model, as chosen by `choose`. The weights are in float32: generation should cast
    them (GPT.cast_for_inference), scoring need not. UserError if there is no such model, or if its
    tokenizer is missing.
    """
    stage, checkpoint = choose(stage, tag, step)
    runtime = open_runtime(device_type, dtype, seed)
    tokenizer = checkpoint.tokenizer()
    model = checkpoint.model(runtime.device, runtime.dtype)
    return Loaded(stage, checkpoint, model, tokenizer, runtime)
