"""
Export a model to transformers (and vLLM), to GGUF for llama.cpp, or to Ollama, and compare the
result with the original.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanochat.base import logbook
from nanochat.base.common import (
    UserError,
    base_dir,
    entry,
    notice,
    opening,
    optional,
    print0,
    user_path,
)
from nanochat.base.files import atomic_write, sha256_file, write_json
from nanochat.base.knobs import knob, parse
from nanochat.export import card
from nanochat.export.target import Target, choose_target
from nanochat.train.knobs import AnyModelKnobs

if TYPE_CHECKING:
    from nanochat.model.checkpoint import Loaded

SAMPLING = {"temperature": 0.6, "top_k": 50}  # the defaults of chat_cli, for the exported files
GREEDY_TOKENS = 64  # of each reply that is compared with llama.cpp


@dataclass(kw_only=True)
class ExportKnobs(AnyModelKnobs):
    """Export"""

    to: Literal["hf", "gguf", "ollama"] = knob(
        "hf",
        "hf: a folder for transformers and vLLM; gguf: a file for llama.cpp; "
        "ollama: GGUF and Modelfile",
    )
    out: str = knob(
        "",
        "folder to write (default: exports/<tag>-<stage>-<to> in the base folder, and -<dtype> "
        "unless that is f32)",
    )
    dtype: Literal["f32", "bf16", "f16", "q8_0"] = knob(
        "f32", "type of the weights; q8_0 is for gguf and ollama"
    )
    target_class: Literal["", "nanochat", "qwen3", "apertus"] = knob(
        "", "class of the exported model (default: chosen for the model)", alias="--class"
    )
    with_code: bool = knob(
        False,
        "hf: ship the code for an attention prior, or for the parts of --lookback, which loads "
        "with trust_remote_code=True",
    )
    uncapped: bool = knob(
        False,
        "gguf, ollama: leave out the softcap; greedy answers stay the same, sampling "
        "becomes sharper",
    )
    name: str = knob("", "name of the model in its files (default: the tag)")
    license: str = knob(
        "other", "licence in the model card, as the hub names it: mit, apache-2.0 ..."
    )


def _folder_to_write(knobs: ExportKnobs, loaded: "Loaded") -> Path:
    """The folder to write; UserError when it holds something that export did not write."""
    name = f"{loaded.checkpoint.tag}-{loaded.stage}-{knobs.to}"
    if knobs.dtype != "f32":
        name += f"-{knobs.dtype}"
    folder = user_path(knobs.out).resolve() if knobs.out else base_dir() / "exports" / name
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: choose a folder with --out")
    about = folder / "nanochat.json"
    ours = json.loads(about.read_text(encoding="utf-8")).get("files", []) if about.is_file() else []
    if foreign := sorted({path.name for path in folder.iterdir()} - {*ours, about.name}):
        raise UserError(
            f"{folder} holds {foreign[0]}, which export did not write: "
            "choose another folder with --out"
        )
    return folder


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """
    Yields the path of a new folder, which replaces `folder` when the block ends; if the block
    fails, `folder` stays as it was. What a killed export left behind is deleted.
    """
    new = folder.with_name(f"{folder.name}.unfinished")
    old = folder.with_name(f"{folder.name}.replaced")
    shutil.rmtree(new, ignore_errors=True)
    try:
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:  # leave no model that was not checked
        shutil.rmtree(new, ignore_errors=True)


def _checked_hf(loaded: "Loaded", target: Target, folder: Path, dtype: str) -> str:
    """
    Write the folder without its card, reload it, and return how far its logits are from the
    original's, in words. UserError if that is beyond the tolerance.
    """
    from nanochat.export.hf import TOLERANCE, compare_logits, write_folder

    write_folder(loaded.model, loaded.tokenizer, target, folder, "f32", SAMPLING)
    difference, largest = compare_logits(loaded.model, folder, target.custom_code)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the exported model differs from the original by {difference:.2g} in its logits "
            f"(allowed: {TOLERANCE:g}); this is a bug: please report it with the model's knobs"
        )
    checked = (
        f"largest difference of a logit in float32 {difference:.1e} (largest logit {largest:.1f})"
    )
    if dtype != "f32":
        shutil.rmtree(folder)
        write_folder(loaded.model, loaded.tokenizer, target, folder, dtype, SAMPLING)
        rounded, _ = compare_logits(loaded.model, folder, target.custom_code)
        checked += f"; {rounded:.1e} with weights in {dtype}"
    return checked


def _greedy_agreement(loaded: "Loaded", file: Path) -> tuple[int, int]:
    """
    (greedy tokens of llama.cpp that equal those of the original, tokens compared). A reply that is
    longer than the other counts with all its tokens.
    """
    from nanochat.chat.generate import Engine
    from nanochat.export.gguf_file import LlamaCpp

    tokenizer = loaded.tokenizer
    engine = Engine(loaded.model.requires_grad_(False), tokenizer)
    prompts = [
        tokenizer.render_prompt({"messages": [{"role": "user", "content": text}]})
        for text in ("Hello!", "What is 12 + 30?", "Tell me a story.", "Spell the word apple.")
    ]
    equal = total = 0
    context = loaded.model.config.sequence_len
    with LlamaCpp(file, context) as llama:
        for prompt in prompts:
            most = min(GREEDY_TOKENS, context - len(prompt))  # beyond, each ends in its own way
            if most < 1:
                continue
            ours = engine.generate_batch([prompt], max_tokens=most, temperature=0.0)[0]
            theirs = llama.greedy(prompt, most, tokenizer.never_sampled)
            stop = theirs.index(ours.stop) if ours.stop in theirs else len(theirs)
            # Only up to where the calculator answers here, which llama.cpp does not have
            count = ours.mask.index(0) if 0 in ours.mask else max(len(ours.tokens), stop)
            pairs = zip(ours.tokens[:count], theirs[:stop], strict=False)
            equal += sum(a == b for a, b in pairs)
            total += count
    return equal, total


def _checked_gguf(loaded: "Loaded", target: Target, file: Path, dtype: str, name: str) -> str:
    """
    Write the GGUF file, compare it with the original if llama.cpp is installed, and return the
    result in words. UserError if weights in f32 give other tokens.
    """
    from nanochat.export.gguf_file import write_gguf

    write_gguf(loaded.model, loaded.tokenizer, target, file, dtype, name)
    try:
        import xllamacpp  # noqa: F401  # pyright: ignore[reportMissingImports]

        equal, total = _greedy_agreement(loaded, file)
    except ModuleNotFoundError:
        notice(
            "the file was not compared with the original, because llama.cpp is not installed: "
            "run pip install xllamacpp"
        )
        return "not compared: llama.cpp was not installed"
    except (ImportError, OSError) as e:
        notice(f"the file was not compared with the original, because llama.cpp failed: {e}")
        return f"not compared: llama.cpp failed ({type(e).__name__})"
    if not total:
        return "not compared: the original answers the test questions with nothing in its context"
    checked = f"{equal} of {total} greedy tokens equal in llama.cpp"
    if equal == total:
        return checked
    if dtype == "f32":
        raise UserError(
            f"the exported file differs from the original (only {checked}); this is a bug: "
            "please report it with the model's knobs"
        )
    rounded = f"with weights in {dtype} (after one difference, the rest of an answer differs)"
    return f"{checked} {rounded}"


def _describe(
    knobs: ExportKnobs, loaded: "Loaded", target: Target, folder: Path, checked: str, name: str
) -> None:
    """Write the model card, and nanochat.json, which says where the export came from."""
    checkpoint = loaded.checkpoint
    readme = card.model_card(
        loaded.model.config,
        loaded.model.counts()["total"],
        checkpoint.meta,
        logbook.read(checkpoint.path.parent),
        target,
        name,
        knobs.license,
        checked,
        knobs.to,
    )
    atomic_write(folder / "README.md", readme)
    about = {
        "model": name,
        "stage": loaded.stage,
        "step": checkpoint.step,
        "checkpoint_sha256": sha256_file(checkpoint.path / "model.safetensors"),
        "class": target.name,
        "uncapped": target.uncapped,
        "compared": checked,
        "files": sorted(path.name for path in folder.iterdir()),
    }
    write_json(folder / "nanochat.json", about)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    knobs, _ = parse(ExportKnobs, argv, command="export")
    opening("export")
    to_hf = knobs.to == "hf"
    if to_hf and knobs.dtype == "q8_0":
        raise UserError(
            "--dtype=q8_0 works only with --to gguf and --to ollama: choose f32, bf16 or f16"
        )

    from nanochat.export.gguf_file import modelfile
    from nanochat.export.hf import require_transformers
    from nanochat.model.checkpoint import load_for_inference

    if to_hf:
        require_transformers()
    else:
        optional("gguf", "export")
    loaded = load_for_inference(knobs.source, knobs.model_tag, knobs.step, "cpu", "float32")
    config = loaded.model.config
    target = choose_target(
        config,
        loaded.tokenizer.digits,
        knobs.to,
        knobs.target_class or None,
        knobs.with_code,
        knobs.uncapped,
    )
    print0(f"{loaded.describe()} -> {target.name}: {target.reason}")
    if target.uncapped:
        config.softcap = 0.0
        notice("the softcap is left out: greedy answers stay the same, sampling becomes sharper")
    folder = _folder_to_write(knobs, loaded)
    name = knobs.name or loaded.checkpoint.tag
    with _replacing(folder) as new:
        if to_hf:
            checked = _checked_hf(loaded, target, new, knobs.dtype)
        else:
            plain = re.sub(r"^\.+|[^\w.-]+", "_", name)[:60]  # a name may look like a path
            file = new / f"{plain}-{knobs.dtype}.gguf"
            checked = _checked_gguf(loaded, target, file, knobs.dtype, name)
            if knobs.to == "ollama":
                text = modelfile(file.name, config.sequence_len, SAMPLING)
                atomic_write(new / "Modelfile", text)
        _describe(knobs, loaded, target, new, checked, name)
    print0(f"compared with the original: {checked}")
    print0(f"wrote {folder}; README.md there shows how to use it")
    return {"folder": str(folder), "class": target.name, "compared": checked}


if __name__ == "__main__":
    entry(main)
