"""Opening a stage: bad input in one line and status 2, horizons, rates, what is printed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from nanochat.base import hardware, logbook
from nanochat.base.common import UserError, entry
from nanochat.base.knobs import parse
from nanochat.base.runtime import Runtime
from nanochat.commands import base_train
from nanochat.commands.base_train import PretrainKnobs
from nanochat.commands.chat_rl import ReinforceKnobs
from nanochat.commands.chat_sft import FinetuneKnobs
from nanochat.commands.mid_train import MidtrainKnobs
from nanochat.data.contexts import Contexts
from nanochat.model.checkpoint import Checkpoint, locate
from nanochat.model.gpt import GPT
from nanochat.model.stages import run_directory
from nanochat.train import run as train_run
from nanochat.train import stage
from nanochat.train.horizon import (
    Horizon,
    choose_horizon,
    conversation_horizon,
    within_passes,
)
from nanochat.train.resume import HORIZONS, same_horizons
from nanochat.train.run import OpenRun, _check_kernels, table_of_counts
from nanochat.train.scaling import batch_for

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    return base, tiny.workplace(base)


@pytest.fixture
def flags(made, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(made[0]))
    monkeypatch.setattr(hardware, "measured_peak", lambda device, dtype: 1e12)
    return made[1]


# ---- bad input


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--model_dim=30"], "model_dim 30 is not a multiple of head_dim 8: try --model_dim=32"),
        (["--model_dim=28", "--head_dim=7"], "28 cannot be divided into 4 heads of an even width"),
        (["--kv_ratio=2"], "--kv_ratio must be at most 1"),
        (["--depth=0"], "depth must be a number above 0 (got 0)"),
        (["--softcap=-1"], "softcap must be 0 (no cap) or above (got -1"),
        (["--mlp_ratio=nan"], "mlp_ratio must be a number above 0 (got nan)"),
        (["--window_pattern=XL"], "'XL'"),
        (["--activation=tanh"], "activation"),
        (["--modeldim=32"], "model_dim"),
        (["--depth=four"], "depth"),
        (
            ["--total_batch_size=1000"],
            "not a whole number of rows of 32 tokens: try --total_batch_size=992",
        ),
        (["--num_iterations=-1", "--target_param_data_ratio=-1"], "no length is given"),
        (["--target_flops=1e9"], "two lengths for one run"),
        (["--max_minutes=1", "--max_hours=1"], "two budgets"),
        (["--data=mine=/nowhere.txt"], "/nowhere.txt"),
        (["--model_tag=../x"], "cannot be a folder name"),
        (["--device_batch_size=0"], "device_batch_size"),
        pytest.param(["--device_type=cuda"], "use --device_type=cpu", marks=no_gpu),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_status_2(flags, wrong, says, capsys):
    with pytest.raises(SystemExit) as e:
        entry(lambda: base_train.main([*flags, "--num_iterations=2", *wrong]))
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not (Path(os.environ["NANOCHAT_BASE_DIR"]) / "checkpoints").exists()


def test_no_tokenizer(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="tok_train"):
        base_train.main([*flags, "--num_iterations=2"])


def test_as_a_process(made):
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(made[0]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "scripts.base_train",
        "--",
        *made[1],
        "--model-dim=30",
        "--num-iterations=2",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: model_dim 30 is not a multiple of head_dim 8: try --model_dim=32"
    )
    assert done.stderr.count("\n") == 1


def test_memory_that_does_not_suffice_is_one_sentence():
    too_big = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    with (
        pytest.raises(UserError, match="out of memory: use a smaller model, a shorter context"),
        stage.session(),
    ):
        raise too_big
    with pytest.raises(RuntimeError, match="a bug"), stage.session():
        raise RuntimeError("a bug")


# ---- horizons


def opened(tmp_path, cls=PretrainKnobs, **given) -> OpenRun:
    """An open run of the tiny model (16 tokens of context) with these flags."""
    k = cls(**given)
    origins = {name: "command line" if name in given else "default" for name in vars(k)}
    m, tokenizer = tiny.model(), None
    fields = "base", k, origins, tiny.CPU, tokenizer, m, tmp_path, None, 1e12, 0.0
    return OpenRun(*fields)  # pyright: ignore


def test_a_number_of_steps(tmp_path):
    run = opened(tmp_path, num_iterations=954, target_param_data_ratio=-1.0)
    assert choose_horizon(run) == Horizon((1 << 19) // 16, 954)
    run = opened(tmp_path, num_iterations=1, total_batch_size=64)
    assert choose_horizon(run) == Horizon(4, 1)


def test_tokens_per_parameter(tmp_path):
    run = opened(tmp_path, target_param_data_ratio=10.0, total_batch_size=160)
    tokens = 10 * run.model.counts()["total"]
    assert choose_horizon(run) == Horizon(10, round(tokens / 160))
    by_rule = choose_horizon(opened(tmp_path))
    assert by_rule.rows * 16 == batch_for(2 * tokens)
    assert by_rule.steps == round(2 * tokens / (by_rule.rows * 16))


def test_flops(tmp_path):
    run = opened(tmp_path, target_flops=1e12, total_batch_size=160)
    horizon = choose_horizon(run)
    flops = horizon.rows * 16 * horizon.steps * run.model.flops_per_token()
    assert flops == pytest.approx(1e12, rel=0.01)


def test_time(tmp_path):
    horizon = choose_horizon(opened(tmp_path, max_minutes=2.0))
    assert horizon.steps is None and horizon.rows >= 1
    both = opened(tmp_path, max_minutes=2.0, num_iterations=5, total_batch_size=32)
    assert choose_horizon(both) == Horizon(2, 5), "the first of the two ends the run"
    assert opened(tmp_path, max_minutes=2.0).budget_seconds == 120
    assert opened(tmp_path, max_hours=2.0).budget_seconds == 7200


def test_tokens_per_parameter_with_a_time_limit(tmp_path):
    run = opened(tmp_path, max_minutes=2.0, target_param_data_ratio=10.0, total_batch_size=160)
    assert choose_horizon(run) == Horizon(10, round(10 * run.model.counts()["total"] / 160))


def test_text_is_read_three_times_at_most(tmp_path, capsys):
    timed, steps = opened(tmp_path, max_minutes=2.0), opened(tmp_path, num_iterations=100)
    assert within_passes(timed, Horizon(2), 7.5) == Horizon(2, 22)
    assert "at most 22 steps: 3 passes over the text" in capsys.readouterr().out
    assert within_passes(timed, Horizon(2, 9), 7.5) == Horizon(2, 9), "it is shorter"
    assert within_passes(steps, Horizon(2, 100), 7.5) == Horizon(2, 100), "that was asked for"
    more = opened(tmp_path, num_iterations=100, max_passes=5.0)
    assert within_passes(more, Horizon(2, 100), 7.5) == Horizon(2, 37)
    assert within_passes(timed, Horizon(2), 0.1) == Horizon(2, 1), "at least one step"


def test_little_text_has_small_batches(tmp_path):
    """A batch for the tokens that are worth reading, not for those that the time would allow."""
    unlimited, limited = (opened(tmp_path, max_hours=100.0) for _ in range(2))
    large, small = choose_horizon(unlimited).rows, choose_horizon(limited, 1e6).rows
    assert large > 8 * small and small * 16 == batch_for(3 * 1e6 / 4)


def test_the_whole_command_stops_after_three_passes(made, flags, tmp_path, capsys):
    text = tmp_path / "few.jsonl"  # some twenty steps
    text.write_text("\n".join((made[0] / "text.jsonl").read_text().splitlines()[:120]))
    flags = [f"--data=own={text}", *(f for f in flags if not f.startswith("--data"))]
    long = ["--max_minutes=60", "--model_tag=passes", "--compile=off", "--sample_every=0"]
    base_train.main([*flags, *long])
    out = capsys.readouterr().out
    assert "3 passes over the text, beyond which" in out and "learns it by heart" not in out
    meta = locate("base", "passes").meta
    (source,) = meta["data_summary"]["sources"]
    assert meta["done"] and 2.5 < source["passes"] <= 3 and meta["step"] > 3
    rows = logbook.read(run_directory("base", "passes"))
    sampled = [row["step"] for row in rows if row["kind"] == "sample"]
    assert sampled == [0, meta["step"]], "one to know what it costs, and one at the end"


def test_a_limit_of_passes_that_time_does_not_allow_is_no_length(flags, capsys):
    """A run of six minutes was said to have 13,198 steps and to read its text 3.4 times."""
    few = ["--max_minutes=0.1", "--max_passes=1e9", "--compile=off", "--model_tag=timed"]
    base_train.main([*flags, *few])
    assert "rows of 32 tokens per step, until the time is over" in capsys.readouterr().out
    (source,) = locate("base", "timed").meta["data_summary"]["sources"]
    assert source["passes"] is None and source["steps_per_pass"] > 0


def test_the_batch_by_rule_is_stored_as_such(tmp_path):
    run = opened(tmp_path)
    rows = choose_horizon(run).rows
    assert run.knobs.total_batch_size == rows * 16 and run.origins["total_batch_size"] == "rule"
    given = opened(tmp_path, total_batch_size=64)
    choose_horizon(given)
    assert (given.knobs.total_batch_size, given.origins["total_batch_size"]) == (64, "command line")


def test_a_context_that_is_long_for_the_budget_is_mentioned(tmp_path, capsys):
    run = opened(tmp_path, max_minutes=10.0)
    run.model.config.sequence_len = 2048
    choose_horizon(run)
    assert "with --sequence_len=512 the run would train on more tokens" in capsys.readouterr().err
    run.origins["sequence_len"] = "command line"
    choose_horizon(run)
    assert capsys.readouterr().err == ""


def test_a_new_length_keeps_the_batch(tmp_path):
    (tmp_path / "meta.json").write_text('{"format": 1, "plan": {"rows": 7, "steps": 20}}')
    stored = Checkpoint(tmp_path)
    for given, rows in ((0, 7), (48, 3)):
        run = opened(tmp_path, max_minutes=600.0, new_horizon="stretch", total_batch_size=given)
        run.resume_from = stored
        assert choose_horizon(run) == Horizon(rows, None)


def test_a_new_length_renews_what_the_old_one_decided(monkeypatch):
    stored = {"eval_every": 0.5, "eval_tokens": 4096, "sample_every": 3.0, "keep": 5}
    by_rule = dict.fromkeys(("eval_every", "eval_tokens"), "rule")
    meta = {"knobs": stored, "origins": {**dict.fromkeys(stored, "command line"), **by_rule}}
    monkeypatch.setattr(train_run, "newest_to_resume", lambda run: SimpleNamespace(meta=meta))
    knobs = PretrainKnobs(resume="auto", new_horizon="stretch", max_hours=10)
    knobs, _, _ = train_run.resume_knobs("base", "t", knobs, dict.fromkeys(vars(knobs), "default"))
    assert (knobs.eval_every, knobs.eval_tokens, knobs.sample_every, knobs.keep) == (-1, 0, 3, 5)


def test_lengths_of_a_conversation_stage(tmp_path):
    def horizon(**given):
        return conversation_horizon(opened(tmp_path, MidtrainKnobs, **given), 3)

    assert horizon(epochs=3) == Horizon(3, epochs=3)
    assert horizon(epochs=1, max_minutes=2.0) == Horizon(3)
    assert horizon(num_iterations=5) == Horizon(3, steps=5)
    for given, says in [
        ({"epochs": 2, "max_minutes": 2.0}, "--epochs=2 and a time budget set two lengths"),
        ({"epochs": 2, "num_iterations": 5}, "--epochs=2 and --num_iterations=5 set two lengths"),
        (
            {"epochs": 1, "num_iterations": 5, "max_hours": 1.0},
            "--num_iterations=5 and a time budget set two lengths",
        ),
        ({"num_iterations": 0}, r"--num_iterations must be positive, or -1 for none \(got 0\)"),
    ]:
        with pytest.raises(UserError, match=says):
            horizon(**given)


@pytest.mark.parametrize("knobs", [PretrainKnobs, MidtrainKnobs, FinetuneKnobs, ReinforceKnobs])
def test_every_horizon_is_known_to_the_resume(knobs):
    lengths = "num_iter", "target_", "max_", "total_batch", "context", "epochs", "samples"
    names = [n for n in vars(knobs()) if n.startswith(lengths) or n.endswith("_per_step")]
    assert {*names} - {"max_tokens"} <= set(HORIZONS)


def test_a_change_of_replies_per_question_is_refused():
    stored = {**vars(ReinforceKnobs()), "samples": 8}
    with pytest.raises(UserError, match="started with samples=8, not 4"):
        same_horizons(stored, {**stored, "samples": 4})
    stored = {**vars(FinetuneKnobs()), "conversations_per_step": 8}
    with pytest.raises(UserError, match="started with conversations_per_step=8, not 4"):
        same_horizons(stored, {**stored, "conversations_per_step": 4})


# ---- rates, counts


@pytest.mark.parametrize("tied", [False, True])
def test_rates_follow_width_and_part(tied):
    m = tiny.model(tie_embeddings=tied, n_embd=192)
    optimizer = tiny.optimizer(m, lr_scale=0.5, weight_decay=0.1)
    groups = {next(iter(g.params)): g for g in optimizer.groups}
    table, matrices = groups["embed.weight"], groups["blocks.0.attn.q.weight"]
    assert table.lr == pytest.approx((0.004 if tied else 0.2) * 2 * 0.5)  # (192 / 768)^-0.5 = 2
    assert (table.optimizer, table.weight_decay) == ("adamw", 0.0)
    assert (matrices.optimizer, matrices.lr, matrices.weight_decay) == ("muon", 0.01, 0.1)
    assert table.betas == (0.8, 0.96 if tied else 0.995)
    if not tied:
        assert groups["head.weight"].lr == pytest.approx(0.004)
        assert groups["head.weight"].betas == (0.8, 0.96)
    assert sum(len(g.params) for g in groups.values()) == len(list(m.parameters()))


@pytest.mark.parametrize(("width", "steps"), [(512, 3), (576, 5)])
def test_wide_models_take_five_polynomials(width, steps):
    m = GPT.build(tiny.config(n_embd=width, n_head=8, n_kv_head=8), "meta")
    assert len(tiny.optimizer(m).polynomials) == steps
    assert len(tiny.optimizer(m, polynomials="jordan").polynomials) == 5


@pytest.mark.parametrize(
    ("capability", "dtype", "said"),
    [(8, torch.bfloat16, False), (8, torch.float32, True), (7, torch.float16, True)],
)
def test_windows_that_save_no_time_are_said(monkeypatch, capsys, capability, dtype, said):
    """Flash takes them in half precision from Ampere on."""
    card = SimpleNamespace(major=capability, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    runtime = Runtime(torch.device("cuda", 0), dtype, 0, 1, 42)
    _check_kernels(tiny.model(window_pattern="SL"), "float", runtime)
    assert ("--window_pattern=SL saves no time here" in capsys.readouterr().err) == said
    _check_kernels(tiny.model(), "float", runtime)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "one_shape", "seconds", "epoch_tokens", "compiles"),
    [
        ("cuda", False, 1, 0, True),
        ("cuda", True, 1, 0, True),
        ("cpu", False, 9000, 0, False),
        ("cpu", True, 0, 10_000, False),
        ("cpu", True, 0, 10**12, True),
    ],
)
def test_what_is_compiled_unasked(monkeypatch, device, one_shape, seconds, epoch_tokens, compiles):
    """
    On a GPU also finetuning and reinforcement, whose batches have several widths; on a CPU what
    takes minutes, as its time or its text says.
    """
    prepared, m = [], tiny.model()
    monkeypatch.setattr(stage, "compiler_missing", lambda device: "")
    monkeypatch.setattr(stage.compiler, "prepare", prepared.append)
    monkeypatch.setattr(stage.compiler, "Ahead", lambda *given: None)
    run = SimpleNamespace(
        knobs=SimpleNamespace(compile="auto", device_batch_size=8),
        stored=lambda name: None,
        contexts=Contexts.parse((), 16),
        model=m,
        budget_seconds=seconds,
        peak_flops=1e12,
        stored_progress=0.0,
        runtime=Runtime(torch.device(device), torch.float32, 0, 1, 42),
    )
    horizon = Horizon(8, None, 1) if epoch_tokens else Horizon(8, 10)
    stage.compile_if_it_pays(run, horizon, one_shape, epoch_tokens)
    assert prepared == [m] * compiles


def test_the_table_of_counts():
    text = table_of_counts(tiny.model(n_embd=64))
    assert (
        "embedding" in text
        and "4,096" in text
        and "2 layers, width 64, 4 heads of 16 (2 key-value), MLP 256, context 16" in text
    )
    shares = [float(word[:-1]) for word in text.split() if word.endswith("%")]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.2)
    assert "share one table" in table_of_counts(tiny.model(tie_embeddings=True))


# ---- parts by rule


@pytest.mark.parametrize(
    ("argv", "on_cpu", "expected"),
    [
        (["--max_minutes=4"], True, (1, True, True, 5)),
        (["--max_hours=0.2"], True, (1, True, True, 5)),
        (["--max_minutes=4", "--depth=2"], True, (0, True, True, 5)),  # one head knows positions
        (["--max_minutes=4", "--copy_heads=0"], True, (0, True, True, 5)),
        (["--max_minutes=4", "--no-convolutions"], True, (1, False, True, 5)),
        (["--max_minutes=4", "--no-value_embeddings"], True, (1, True, False, 5)),
        (["--max_minutes=4", "--pair_embeddings=3"], True, (1, True, True, 3)),
        (["--max_minutes=4", "--lookback=off"], True, (0, False, False, 0)),
        (["--max_minutes=4", "--rap=prior.safetensors"], True, (0, False, False, 0)),
        (["--max_minutes=4"], False, (0, False, False, 0)),
        (["--max_hours=30"], True, (1, True, True, 5)),
        (["--num_iterations=50"], True, (0, False, False, 0)),
        (["--num_iterations=50", "--lookback=on"], False, (1, True, True, 5)),
    ],
    ids=str,
)
def test_lookback_by_rule(argv, on_cpu, expected):
    typed = parse(PretrainKnobs, argv, command="base_train")
    k, origins = base_train.with_lookback(*typed, on_cpu, vocab_size=8192)
    parts = "copy_heads", "convolutions", "value_embeddings", "pair_embeddings"
    assert tuple(getattr(k, name) for name in parts) == expected
    given = [flag for flag in parts if flag in " ".join(argv)]
    assert all(origins[flag] == "command line" for flag in given)
    large, _ = base_train.with_lookback(*typed, on_cpu, vocab_size=8193)  # no table by rule
    assert large.pair_embeddings == (expected[3] if "pair_embeddings" in given else 0)
    assert large.value_embeddings == k.value_embeddings
