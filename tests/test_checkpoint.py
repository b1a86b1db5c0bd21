"""Checkpoints: round trips, damage, kills and full disks; loading cannot run code."""

import ast
import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from nanochat.base.common import UserError
from nanochat.data.tokenizer import Tokenizer
from nanochat.model import checkpoint
from nanochat.model.checkpoint import Checkpoint
from nanochat.model.config import GPTConfig
from nanochat.model.stages import run_directory

ROOT = Path(__file__).resolve().parent.parent


def write(directory: Path, step: int, value: float = 1.0, **meta) -> Checkpoint:
    tensors = {"w": torch.full((64, 64), value), "b": torch.arange(7.0) + step}
    return checkpoint.save(
        directory,
        step,
        tensors,
        {"w/momentum": torch.full((64, 64), -value)},
        {**tiny.meta(tiny.model()), **meta},
    )


def newest_intact(directory: Path) -> int | None:
    stored = checkpoint.newest(directory, optimizer=True)
    return None if stored is None else stored.meta["step"]


# ---- round trip


def test_what_is_written_comes_back(tmp_path):
    stored = write(tmp_path, 120, tokens=5, last={"eval": {"val_bpb": 0.9}})
    assert stored.path.name == "step_000120"
    assert sorted(p.name for p in stored.path.iterdir()) == [
        "manifest.json",
        "meta.json",
        "model.safetensors",
        "optim.safetensors",
    ]
    meta, tensors = stored.meta, stored.weights
    assert meta["step"] == 120 and meta["last"] == {"eval": {"val_bpb": 0.9}}
    assert set(tensors) == {"w", "b"} and len(tensors) == 2
    assert torch.equal(tensors["b"], torch.arange(7.0) + 120)
    with pytest.raises(KeyError):
        tensors["absent"]
    assert [p.name for p in tmp_path.iterdir()] == ["step_000120"]


def test_the_same_step_again(tmp_path):
    write(tmp_path, 3, 1.0)
    stored = write(tmp_path, 3, 2.0)
    assert stored.weights["w"][0, 0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"] and not stored.damage(
        optimizer=True
    )


def test_amended_metadata(tmp_path):
    stored = write(tmp_path, 3, done=False)
    for done in (False, True):
        stored.amend({**tiny.meta(tiny.model()), "done": done, "text": "añ"})
        assert not stored.damage(optimizer=True)
        assert stored.meta["done"] is done and stored.meta["step"] == 3


def test_amending_is_safe_at_every_moment(tmp_path, monkeypatch):
    stored = write(tmp_path, 3, done=False)
    real = os.replace
    for killed_before in (1, 2):
        calls = []

        def replace_or_die(old, new, calls=calls, killed_before=killed_before):
            calls.append(new)
            if len(calls) == killed_before:
                raise KeyboardInterrupt
            real(old, new)

        monkeypatch.setattr(os, "replace", replace_or_die)
        with pytest.raises(KeyboardInterrupt):
            stored.amend({"done": True})
        assert not stored.damage(optimizer=True) and stored.meta["done"] is False


def test_a_model_comes_back(tmp_path):
    m = tiny.model(tie_embeddings=True)
    stored = checkpoint.save(tmp_path, 0, dict(m.named_parameters()), {}, tiny.meta(m))
    again = stored.model("cpu", torch.float32)
    assert tiny.same(tiny.weights(again), tiny.weights(m)) and stored.meta["stage"] == "base"


def test_a_model_finds_a_tokenizer_that_was_moved_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    own, other = (Tokenizer.train([text] * 9, 280) for text in ("own words here", "other ones"))
    m = tiny.model()
    meta = {**tiny.meta(m), "tokenizer": own.fingerprint}
    stored = checkpoint.save(tmp_path / "run", 0, dict(m.named_parameters()), {}, meta)
    other.save(tmp_path / "tokenizer")
    refusal = (
        f"trained with tokenizer {own.fingerprint[:12]}, but the one in .* is "
        f"{other.fingerprint[:12]}: restore that tokenizer"
    )
    with pytest.raises(UserError, match=refusal):
        stored.tokenizer()
    own.save(tmp_path / f"tokenizer_{own.fingerprint[:8]}")
    assert stored.tokenizer().fingerprint == own.fingerprint
    other.save(tmp_path / f"tokenizer_{own.fingerprint[:8]}")
    with pytest.raises(UserError, match=refusal):
        stored.tokenizer()


def test_bfloat16_and_turned_tensors(tmp_path):
    whole = torch.randn(8, 8).bfloat16()
    stored = checkpoint.save(tmp_path, 0, {"whole": whole, "turned": whole.t()}, {}, {})
    tensors = stored.weights
    assert torch.equal(tensors["whole"], whole) and torch.equal(tensors["turned"], whole.t())


# ---- finding and pruning


def test_the_newest_is_found_by_number(tmp_path):
    for step in (999_999, 1_000_000, 5):
        write(tmp_path, step)
    (tmp_path / "step_notes").mkdir()
    assert newest_intact(tmp_path) == 1_000_000
    assert [p.meta["step"] for p in checkpoint.list_checkpoints(tmp_path)] == [
        5,
        999_999,
        1_000_000,
    ]
    assert checkpoint.newest(tmp_path, 5).path.name == "step_000005"
    assert checkpoint.newest(tmp_path, 6) is None and checkpoint.newest(tmp_path / "absent") is None


def test_pruning_keeps_the_last_and_the_best(tmp_path):
    for step in range(0, 60, 10):
        write(tmp_path, step)
    (tmp_path / ".step_000060.77.tmp").mkdir()
    checkpoint.prune(tmp_path, 50, keep=2, best=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_000010",
        "step_000040",
        "step_000050",
    ]
    checkpoint.prune(tmp_path, 50, keep=1, best=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000050"]


@pytest.mark.parametrize("foreign", ["another run", "a copy", "a file of the user", "no metadata"])
def test_pruning_touches_only_what_the_run_wrote(tmp_path, foreign):
    for step in range(0, 60, 10):
        write(tmp_path, step, run_id="ours")
    path = checkpoint.at_step(tmp_path, 20).path
    if foreign == "another run":
        write(tmp_path, 20, run_id="theirs")
    elif foreign == "a copy":
        shutil.rmtree(path)
        shutil.copytree(checkpoint.at_step(tmp_path, 30).path, path)
    elif foreign == "a file of the user":
        (path / "notes.txt").write_text("the good one")
    else:
        (path / "meta.json").unlink()
    (tmp_path / ".step_mine.tmp").mkdir()
    checkpoint.prune(tmp_path, 40, 1, None, "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".step_mine.tmp",
        "step_000020",
        "step_000040",
        "step_000050",
    ]


def test_damaged_later_checkpoints_do_not_crowd_out_good_ones(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    for step in (20, 30):
        (checkpoint.at_step(tmp_path, step).path / "meta.json").write_text("{")
    assert newest_intact(tmp_path) == 10
    checkpoint.put_aside_after(tmp_path, 10)
    write(tmp_path, 15)
    checkpoint.prune(tmp_path, 15, keep=1, best=None)
    assert newest_intact(tmp_path) == 15
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "damaged_step_000020",
        "damaged_step_000030",
        "step_000015",
    ]


def test_locating(base):
    with pytest.raises(
        UserError,
        match=r"there is no base checkpoint under .*: make one with nanochat base_train",
    ):
        checkpoint.locate("base")
    old, new = (
        write(run_directory("base", "d4"), 7),
        write(run_directory("base", "d2"), 3),
    )
    os.utime(old.path, (1, 1))
    assert checkpoint.locate("base") == new
    assert checkpoint.locate("base", "d4") == old
    assert checkpoint.locate("base", "d4", 7) == old
    with pytest.raises(UserError, match="no base checkpoint tagged 'd4' at step 8"):
        checkpoint.locate("base", "d4", 8)
    for wrong in ("", "../evil", "a/b", ".hidden"):
        with pytest.raises(UserError, match="cannot be a folder name"):
            run_directory("base", wrong)
    with pytest.raises(UserError, match="no stage 'bass'"):
        run_directory("bass", "d4")


# ---- damage


@pytest.mark.parametrize("seed", range(12))
def test_any_damage_is_noticed_and_passed_over(tmp_path, seed, capsys):
    write(tmp_path, 10)
    stored, rng = write(tmp_path, 20), random.Random(seed)
    victim = stored.path / rng.choice(
        ["model.safetensors", "optim.safetensors", "meta.json", "manifest.json"]
    )
    data = bytearray(victim.read_bytes())
    at = rng.randrange(len(data))
    if seed % 3 == 0:
        victim.write_bytes(data[:at])  # truncated
    elif seed % 3 == 1:
        data[at] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        if victim.name == "manifest.json":  # a flipped space harms nothing; a flipped hash does
            victim.write_bytes(b"[]")
    else:
        victim.unlink()
    assert newest_intact(tmp_path) == 10
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "skipping the damaged checkpoint" in said
        and "step_000020" in said
    )


def test_a_truncated_file_read_directly_is_one_sentence(tmp_path):
    stored = write(tmp_path, 1)
    file = stored.path / "model.safetensors"
    for size in (0, 4, 100, file.stat().st_size - 1):
        os.truncate(file, size)
        with pytest.raises(
            UserError, match=r"cannot read .*model.safetensors .*damaged or truncated"
        ):
            _ = stored.weights
    for text in ("", "{", "\xff"):
        (stored.path / "meta.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"cannot read .*meta.json"):
            _ = stored.meta
    (stored.path / "meta.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="has checkpoint format 99, but this version reads 1 to 2"):
        _ = stored.meta


def test_metadata_of_format_1_is_upgraded(tmp_path):
    stored = write(tmp_path, 1)
    meta = {**stored.meta, "format": 1, "plan": {"rows": 7}}
    del meta["horizon"]
    (stored.path / "meta.json").write_text(json.dumps(meta))
    upgraded = Checkpoint(stored.path).meta
    assert upgraded["horizon"] == {"rows": 7} and "plan" not in upgraded
    assert upgraded["format"] == checkpoint.FORMAT


def test_only_resuming_needs_the_optimizer(tmp_path):
    stored = write(tmp_path, 1)
    (stored.path / "optim.safetensors").unlink()
    assert checkpoint.newest(tmp_path) == stored
    assert checkpoint.newest(tmp_path, optimizer=True) is None


def test_unknown_architecture_knobs():
    meta = tiny.meta(tiny.model())
    meta["config"] = {**meta["config"], "mixture_of": 8}
    with pytest.raises(
        UserError,
        match=r"knobs that this version does not have \(mixture_of\): use the version that",
    ):
        GPTConfig.from_dict(meta["config"])


def test_another_architecture(tmp_path):
    m = tiny.model()
    stored = checkpoint.save(tmp_path, 0, dict(m.named_parameters()), {}, tiny.meta(m))
    with pytest.raises(
        UserError,
        match=r"holds \(64, 32\) for embed.weight, but the model needs \(64, 64\)",
    ):
        stored.load_weights(tiny.model(n_embd=64))
    with pytest.raises(UserError, match=r"holds nothing for blocks.2"):
        stored.load_weights(tiny.model(n_layer=3))


# ---- full disks and kills


@pytest.mark.parametrize("fails_at", ["model", "optim", "meta"])
@pytest.mark.parametrize("again", [False, True])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, fails_at, again):
    write(tmp_path, 10, 1.0)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(tensors, path):
        if Path(path).stem == fails_at:
            Path(path).write_bytes(b"half")
            raise full
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    if fails_at == "meta":
        monkeypatch.setattr(checkpoint, "_sync", lambda path: (_ for _ in ()).throw(full))
    step = 10 if again else 20
    with pytest.raises(
        UserError,
        match=rf"cannot write the checkpoint .*step_0000{step} .*No space left.*: free some space",
    ):
        write(tmp_path, step, 2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000010"]
    assert newest_intact(tmp_path) == 10
    assert checkpoint.at_step(tmp_path, 10).weights["w"][0, 0] == 1


def start_writer(directory: Path, step: int) -> tuple[int, int]:
    """
    (a process that writes one checkpoint after the other, from `step` on; the end of a pipe with a
    line for each that it has written). The process is a copy of this one, which starts at once.
    """
    reports, written = os.pipe()
    writer = os.fork()
    if writer:
        os.close(written)
        return writer, reports
    try:
        os.close(reports)
        torch.set_num_threads(1)  # the threads of this process are not copied
        os.write(written, b"ready\n")
        while True:
            w = torch.full((400, 400), float(step))
            stored = checkpoint.save(directory, step, {"w": w}, {"m": -w}, {"done": False})
            stored.amend({"done": True})
            checkpoint.prune(directory, step, 2, None)
            os.write(written, f"{step}\n".encode())
            step += 1
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_any_moment_of_writing(tmp_path):
    """After kill -9 in a loop of saves, the last reported checkpoint or a newer one is intact."""
    rng, step = random.Random(0), 0
    for _ in range(6):
        writer, reports = start_writer(tmp_path, step)
        with open(reports, encoding="ascii") as lines:
            assert lines.readline() == "ready\n"
            time.sleep(rng.uniform(0.05, 0.4))
            os.kill(writer, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
            reported = lines.read().split()
        now = newest_intact(tmp_path)
        if reported:
            assert now is not None and now >= int(reported[-1])
        if now is not None:
            stored = checkpoint.newest(tmp_path)
            assert (stored.weights["w"] == now).all()
            assert (stored.optimizer_tensors["m"] == -now).all()
            step = now
    assert step > 0
    write(tmp_path, step + 1)
    checkpoint.prune(tmp_path, step + 1, 2, None)
    assert not list(tmp_path.glob(".*")), "what crashed writers left is swept up"


def test_every_cut_of_a_write_leaves_the_previous_one(tmp_path):
    """A writer that stopped after any file leaves no manifest, or only a temporary folder."""
    good = write(tmp_path, 10)
    names = ["model.safetensors", "optim.safetensors", "meta.json", "manifest.json"]
    for n in range(len(names)):
        for name in ("step_000020", ".step_000020.1.tmp"):
            part = tmp_path / name
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for file in names[:n]:
                shutil.copy(good.path / file, part / file)
            assert newest_intact(tmp_path) == 10
            shutil.rmtree(part)


# ---- memory and safety


def test_loading_holds_no_second_copy(tmp_path):
    """Reading tensors maps the file: the memory of this process does not grow by their size."""

    def allocated() -> int:
        status = Path("/proc/self/status")
        if not status.exists():
            pytest.skip("only Linux tells mapped memory from allocated memory")
        (line,) = [s for s in status.read_text().splitlines() if s.startswith("RssAnon")]
        return 1024 * int(line.split()[1])

    size = 64 << 20
    stored = checkpoint.save(tmp_path, 0, {"w": torch.ones(size // 4)}, {}, {})
    before, tensors = allocated(), stored.weights
    assert tensors["w"].min() == 1
    assert allocated() - before < size // 4


def test_nothing_that_is_loaded_can_run_code():
    for file in [*ROOT.glob("nanochat/**/*.py"), *ROOT.glob("scripts/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {n.split(".")[0] for n in names} & {
                    "pickle",
                    "dill",
                    "joblib",
                    "shelve",
                    "marshal",
                }, file
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
            ):
                plain = any(
                    k.arg == "weights_only" and ast.unparse(k.value) == "True"
                    for k in node.keywords
                )
                assert plain or (node.func.value.id, node.func.attr) not in {
                    ("torch", "load"),
                    ("torch", "save"),
                }, file


def test_a_strangers_metadata_is_data(tmp_path):
    stored = write(tmp_path, 0)
    meta = json.loads((stored.path / "meta.json").read_text())
    meta["config"]["activation"] = "__import__('os').abort()"
    with pytest.raises(UserError, match="activation"):
        GPTConfig.from_dict(meta["config"])
