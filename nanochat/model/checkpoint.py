"""
Checkpoints: written beside and renamed, hashed, found again; and the only reader of a run's metadata.

    <base>/checkpoints/<stage>/<tag>/step_000120/{model.safetensors, optim.safetensors, meta.json, manifest.json}

The manifest holds the SHA-256 that the other files may have and is written last: a folder without one, or whose files differ from
it, is damaged and passed over with a notice. Tensors are safetensors and everything else is JSON, so no file can run code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat.base.common import UserError, base_dir, notice
from nanochat.base.files import atomic_write, sha256_file
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

STAGES = ("base", "mid", "sft", "rl")
FORMAT = 1


def run_directory(stage: str, tag: str) -> Path:
    """Where the run of a stage under a tag lives; not created here."""
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage!r}: choose one of {', '.join(STAGES)}")
    if not re.fullmatch(r"[\w.-]+", tag) or tag.startswith("."):
        raise UserError(
            f"the model tag {tag!r} cannot be a folder name: use letters, digits, dots, dashes and underscores"
        )
    return base_dir() / "checkpoints" / stage / tag


def folder(directory: Path, step: int) -> Path:
    """Where a run's checkpoint of a step is, there or not."""
    return directory / f"step_{step:06d}"


def save(
    directory: Path,
    step: int,
    model: Mapping[str, Tensor],
    optim: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> Path:
    """Write one checkpoint (on one rank alone) and return its folder. UserError when the disk refuses; what was there before stays."""
    final = folder(directory, step)
    beside = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, tensors in (("model", model), ("optim", optim)):
            save_file(
                {k: t.detach().contiguous() for k, t in tensors.items()},
                beside / f"{name}.safetensors",
            )
        (beside / "meta.json").write_text(
            json.dumps({"format": FORMAT, "step": step, **meta}, indent=1), encoding="utf-8"
        )
        manifest = {p.name: [sha256_file(p)] for p in sorted(beside.iterdir())}
        for p in beside.iterdir():
            _sync(p)
        (beside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(beside / "manifest.json")
        if (
            final.exists()
        ):  # the same step again: the old folder steps aside for the instant between two renames
            os.replace(final, beside.with_suffix(".old.tmp"))
        os.replace(beside, final)
        _sync(directory)
        shutil.rmtree(beside.with_suffix(".old.tmp"), ignore_errors=True)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {final} ({e}): free some space; earlier checkpoints are untouched"
        ) from e
    return final


def amend(path: Path, meta: Mapping[str, Any]) -> None:
    """Replace a checkpoint's metadata, its weights staying. Killed at any moment, it is intact with the old metadata or with the new."""
    old = read_meta(path)
    text = json.dumps({"format": FORMAT, "step": old["step"], **meta}, indent=1)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["meta.json"] = [
        sha256_file(path / "meta.json"),
        hashlib.sha256(text.encode("utf-8")).hexdigest(),
    ]
    atomic_write(path / "manifest.json", json.dumps(manifest, indent=1))
    atomic_write(path / "meta.json", text)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def prune(directory: Path, step: int, keep: int, best: int | None) -> None:
    """
    Delete all but the last `keep` checkpoints up to `step` and the best one; also what crashed writers left behind. Those after `step`
    go too: a run that stands at `step` passed over them as damaged, and they must not crowd out good ones.
    """
    past = [p for p in steps(directory) if _step(p) <= step]
    kept = {*past[-max(1, keep) :], *(p for p in past if _step(p) == best)}
    for path in steps(directory):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    for left in directory.glob(".step_*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def steps(directory: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, damaged ones included."""
    return sorted(
        (p for p in directory.glob("step_*") if p.is_dir() and p.name[5:].isdigit()), key=_step
    )


def _step(path: Path) -> int:
    return int(path.name[5:])  # as a number: step_1000000 comes after step_999999


def damage(path: Path) -> str:
    """What is wrong with a checkpoint folder; '' when it is intact."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name in ("model.safetensors", "optim.safetensors", "meta.json"):
            if sha256_file(path / name) not in manifest[name]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def find(directory: Path, step: int | None = None) -> Path | None:
    """The newest intact checkpoint of a run (or that of `step`), None when there is none; damaged ones are named in a notice."""
    for path in reversed(steps(directory)):
        if step is not None and _step(path) != step:
            continue
        wrong = damage(path)
        if not wrong:
            return path
        notice(f"passing over the damaged checkpoint {path} ({wrong})")
    return None


def locate(stage: str, tag: str = "", step: int | None = None) -> Path:
    """The checkpoint of a stage: by default of the run saved last, at its newest intact step. UserError when there is none."""
    root = base_dir() / "checkpoints" / stage
    if tag:
        runs = [run_directory(stage, tag)]
    else:
        newest = {p: max(s.stat().st_mtime for s in steps(p)) for p in root.glob("*") if steps(p)}
        runs = sorted(
            newest, key=lambda p: (p.suffix != ".old", newest[p]), reverse=True
        )  # a run set aside only if there is no other
    for run in runs:
        if found := find(run, step):
            return found
    what = (
        f"{stage} checkpoint"
        + (f" tagged {tag!r}" if tag else "")
        + (f" at step {step}" if step is not None else "")
    )
    maker = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}[stage]
    raise UserError(f"there is no {what} under {root}: make one with python -m scripts.{maker}")


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's metadata, from the folder that find or locate returned."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(
            f"cannot read {path / 'meta.json'} ({e}): choose another checkpoint with --step"
        ) from e
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {meta.get('format')}, this version reads {FORMAT}: use the version that wrote it"
        )
    return meta


class Tensors(Mapping[str, Tensor]):
    """A safetensors file read one tensor at a time, so that loading never holds a second copy of everything."""

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="pt")
            self._names = list(self._file.keys())
        except (OSError, SafetensorError) as e:
            raise UserError(
                f"cannot read {path} ({e}): the file is damaged or truncated; choose another checkpoint with --step"
            ) from e

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def fill(model: GPT, path: Path) -> None:
    """Copy a checkpoint's weights, and the tables of its prior, into a built model, one tensor at a time."""
    tensors = Tensors(path / "model.safetensors")
    with torch.no_grad():
        for name, p in model.state_dict().items():
            t = tensors.get(name)
            if t is None or t.shape != p.shape:
                got = "nothing" if t is None else tuple(t.shape)
                raise UserError(
                    f"{path} holds {got} for {name} where the model needs {tuple(p.shape)}: it is of another architecture, "
                    "leave the flags of size out or choose another --model_tag"
                )
            p.copy_(t)


def check_tokenizer(meta: Mapping[str, Any], fingerprint: str, path: Path) -> None:
    """UserError when a checkpoint was trained with another tokenizer than the one at hand."""
    if meta["tokenizer"] != fingerprint:
        raise UserError(
            f"{path} was trained with tokenizer {meta['tokenizer'][:12]}, the one in {base_dir() / 'tokenizer'} is {fingerprint[:12]}: "
            "restore that tokenizer, or train the model again with this one"
        )


def load_model(
    path: Path, device: torch.device | str, dtype: torch.dtype, fingerprint: str | None = None
) -> tuple[GPT, dict[str, Any]]:
    """A checkpoint's model with float32 weights, and its metadata; checks the tokenizer where its fingerprint is given."""
    meta = read_meta(path)
    if fingerprint is not None:
        check_tokenizer(meta, fingerprint, path)
    model = GPT.build(GPTConfig.from_dict(meta["config"]), device, dtype)
    fill(model, path)
    if model.prior is not None and not model.prior.spec["learned"] and not model.prior.gates.any():
        model.prior = model.config.rap = (
            None  # annealed to nothing: what goes on from here is a model without
        )
    return model, meta
