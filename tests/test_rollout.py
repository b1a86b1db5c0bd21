"""
Reinforcement: what a group of replies teaches, one update whatever the memory, resuming, ranks, and
a policy that learns.
"""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from toy import EASY, QUESTIONS, TOY, feed, policy, words

from nanochat.base import hardware, logbook
from nanochat.base.common import UserError
from nanochat.base.files import sha256_file
from nanochat.chat.generate import Sample
from nanochat.commands import chat_eval, chat_rl
from nanochat.model import checkpoint
from nanochat.model.gpt import GPT
from nanochat.model.loss import linear_cross_entropy
from nanochat.model.stages import run_directory
from nanochat.train import rollout
from nanochat.train.rollout import RolloutFeed, survey, weighted_batches
from nanochat.train.schedule import Schedule


@pytest.fixture(scope="module")
def tok():
    return words()


def learn(
    path: Path, m: GPT, f: RolloutFeed, schedule: Schedule | None = None, **rates
) -> list[dict]:
    schedule = schedule or Schedule(momentum_warmup=0)
    tiny.fit(path, m, f, schedule, optimizer=tiny.optimizer(m, **rates))
    return tiny.rows(path)


# ---- what a group teaches


def scripted(f: RolloutFeed, verdicts: list[list[int]]) -> list[list[Sample]]:
    """The feed's next groups: replies of 1, 2, ... tokens that end in b where `verdicts` say 1."""
    tok = f.sampler.engine.tokenizer
    a, b, end = tok.encode("a"), tok.encode("b"), tok.specials["<|assistant_end|>"]
    groups = [
        [
            Sample([1, 2, 3], 0, a * i + (b if v else a), [1] * (i + 1), "stop", end)
            for i, v in enumerate(vs)
        ]
        for vs in verdicts
    ]
    f.sampler.replies = lambda *_: groups
    return groups


def test_advantages_of_a_group_made_by_hand(tok):
    task = replace(TOY, evaluate=lambda item, reply: reply.endswith("b"))
    f = feed(tok, questions=[(task, item) for _, item in QUESTIONS], per_step=3, samples=4)
    scripted(f, [[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    (b,) = next(f)
    # replies of 2, 3, 4 and 5 tokens with their ends: 14 per group; the group without variance
    # counts, but has no row
    assert b.inputs.shape == (8, 32) and int((b.targets >= 0).sum()) == 28
    per_row = [w[t >= 0].unique().tolist() for w, t in zip(b.weights, b.targets, strict=True)]
    assert per_row == [
        [pytest.approx(a * 28 / 42)] for a in (0.75, -0.25, -0.25, -0.25, 0.5, -0.5, 0.5, -0.5)
    ]
    seen = {k: v for k, v in f.numbers.items() if k != "rollout_seconds"}
    assert seen == pytest.approx(
        {"reward": 7 / 12, "zero_variance": 1 / 3, "truncated": 0.0, "length": 2.5}
    )


def test_the_loss_is_the_mean_over_all_sampled_tokens(tok, tmp_path):
    task = replace(TOY, evaluate=lambda item, reply: reply.endswith("b"))
    m = policy(tok)
    f = feed(tok, m, [(task, item) for _, item in QUESTIONS], per_step=2, samples=2, total=2)
    groups = scripted(f, [[1, 0], [0, 0]])
    expected = 0.0
    for row, advantage in zip(groups[0], (0.5, -0.5), strict=True):
        ids = torch.tensor([[*row.prompt, *row.tokens, row.stop]])
        expected += advantage * float(m.token_losses(ids[:, :-1], ids[:, 1:])[0, 2:].sum())
    (row,) = learn(tmp_path, m, f)
    assert row["loss"] == pytest.approx(expected / 10, rel=1e-4)
    assert row["reward"] == 0.25 and row["zero_variance"] == 0.5


def test_replies_that_are_the_same_are_one_row(tok, tmp_path):
    """The gradient is that of all of them, for fewer products."""
    task = replace(TOY, evaluate=lambda item, reply: reply.endswith("b"))
    moved = []
    for copies in (1, 3):
        m = policy(tok)
        f = feed(
            tok, m, [(task, item) for _, item in QUESTIONS], per_step=1, samples=2 * copies, total=1
        )
        (group,) = scripted(f, [[1, 0]])
        f.sampler.replies = lambda *_, group=group, copies=copies: [group * copies]
        (b,) = next(f)
        assert b.inputs.size(0) == 2 and int((b.targets >= 0).sum()) == 5
        torch.testing.assert_close(b.weights.amax(1) + b.weights.amin(1), torch.tensor([0.5, -0.5]))
        (m.loss(b.inputs, b.targets, b.weights) / 5).backward()
        moved.append({n: p.grad for n, p in m.named_parameters()})
    assert all(torch.allclose(moved[0][n], g) for n, g in moved[1].items())


def test_groups_without_variance_change_nothing(tok, tmp_path):
    m = policy(tok)
    f = feed(
        tok,
        m,
        [(replace(TOY, evaluate=lambda item, reply: True), QUESTIONS[0][1])],
        per_step=2,
        samples=2,
        total=2,
    )
    scripted(f, [[1, 1], [0, 0]])
    before = tiny.weights(m)
    (row,) = learn(tmp_path, m, f)
    assert row["loss"] == 0 and row["zero_variance"] == 1 and tiny.same(before, tiny.weights(m))


def test_gradient_at_every_sampled_token_and_nowhere_else(tok):
    """The end token and the tool's call learn; prompt, tool output and padding do not."""
    s, x = tok.specials, tok.encode("3")[0]
    call = [s["<|python_start|>"], x, s["<|python_end|>"]]
    output = [s["<|output_start|>"], x, s["<|output_end|>"]]
    called = Sample(
        [5, 6, 7, 8], 0, [*call, *output, x], [1, 1, 1, 0, 0, 0, 1], "stop", s["<|assistant_end|>"]
    )
    cut = Sample([5, 6], 0, [x, x, x], [1, 1, 1], "length")
    (b,) = weighted_batches([(called, 0.5), (cut, -0.5)], 8, tok.bos, 32)
    m = policy(tok)
    hidden = m(b.inputs)
    hidden.retain_grad()
    linear_cross_entropy(hidden, m.head_weight, b.targets, b.weights, m.config.softcap).backward()
    felt = (hidden.grad.abs().sum(-1) > 0).tolist()
    assert felt[0] == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 2 + [False] * 21, (
        "the last True is where the end token is said"
    )
    assert felt[1] == [False] + [True] * 3 + [False] * 28
    assert (
        b.inputs[0, :11].tolist() == [*called.prompt, *called.tokens]
        and b.targets[0, 10] == s["<|assistant_end|>"]
    )
    assert ((b.weights != 0) == (b.targets >= 0)).all()


def test_only_a_reply_that_ended_itself_is_right(tok):
    b, s = tok.encode("b"), tok.specials
    question = (TOY, QUESTIONS[0][1])
    assert (
        rollout.reward(tok, question, Sample([1], 0, b, [1], "stop", s["<|assistant_end|>"])) == 1
    )
    assert rollout.reward(tok, question, Sample([1], 0, b, [1], "length")) == 0
    assert rollout.reward(tok, question, Sample([1], 0, b, [1], "context")) == 0
    assert rollout.reward(tok, question, Sample([1], 0, b, [1], "stop", s["<|bos|>"])) == 0
    assert (
        rollout.reward(tok, question, Sample([1], 0, b * 2, [1, 1], "stop", s["<|assistant_end|>"]))
        == 0
    )


def test_rows_of_like_width_share_a_batch(tok):
    rows = [(Sample([1] * n, 0, [2], [1], "stop", 3), 1.0) for n in (10, 100, 20, 63, 64, 30)]
    made = weighted_batches(rows, 3, tok.bos, 101)
    assert [tuple(b.inputs.shape) for b in made] == [(3, 64), (1, 64), (2, 101)]
    assert sum(int((b.targets >= 0).sum()) for b in made) == 12
    assert all(b.valid == (b.targets >= 0).sum() for b in made), "counted before they are sent"
    (nothing,) = weighted_batches([], 3, tok.bos, 100)
    assert nothing.inputs.shape == (1, 1) and (nothing.targets == -1).all()


# ---- one update whatever the memory


def drawn(f: RolloutFeed) -> list:
    """The rows of a step, cut as they may be, as a set that can be compared."""
    rows = [
        (b.inputs[i].tolist(), b.targets[i].tolist(), b.weights[i].tolist())
        for b in next(f)
        for i in range(b.inputs.size(0))
    ]
    return sorted(rows)


def test_the_cut_of_a_step_changes_no_update(tok, tmp_path):
    start, moved = tiny.weights(policy(tok)), {}
    for cut in (64, 3, 1):
        m = policy(tok)
        rows = learn(tmp_path / str(cut), m, feed(tok, m, device_rows=cut, total=4))
        moved[cut] = {n: w - start[n] for n, w in tiny.weights(m).items()}
        assert len(rows) == 1 and rows[0]["loss"] != 0
    for cut in (3, 1):
        for name, d in moved[cut].items():
            assert (d - moved[64][name]).norm() < 1e-3 * moved[64][name].norm(), name


def test_what_is_sampled_does_not_depend_on_memory(tok, capsys):
    expected = drawn(feed(tok))
    assert len(expected) > 5
    for rows in (1, 7, 10, 1000):
        assert drawn(feed(tok, rows=rows)) == expected
    f = feed(tok)
    real = f.sampler.engine.generate_batch

    def limited(prompts, *args, **kwargs):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(prompts, *args, **kwargs)

    f.sampler.engine.generate_batch = limited
    assert drawn(f) == expected
    assert f.sampler.rows == 5, "one question with its five replies"
    notices = capsys.readouterr().err.splitlines()
    assert [line.partition(": out of memory with ")[2] for line in notices] == [
        "a batch of questions of 4 rows: continuing with 2",
        "a batch of questions of 2 rows: continuing with 1",
    ]


def test_micro_batches_may_shrink_between_steps(tok):
    a, b = feed(tok), feed(tok)
    for cut in (64, 2, 1):
        a.device_rows = cut
        assert drawn(a) == drawn(b)


# ---- order, end, going on


def test_every_question_once_an_epoch_and_a_short_last_step(tok):
    f, asked = feed(tok, per_step=4, total=18), []
    real = f.sampler.replies
    f.sampler.replies = lambda questions, *rest: (
        asked.append([i["messages"][0]["content"] for _, i in questions]) or real(questions, *rest)
    )
    shares = [f.progress for _ in iter(lambda: next(f, None), None)]
    assert shares == [pytest.approx(n / 18) for n in (4, 8, 12, 16, 18)]
    order = [question for step in asked for question in step]
    assert [len(step) for step in asked] == [4, 4, 4, 4, 2]
    assert (
        sorted(order[:10]) == [f"train {i}" for i in range(10)]
        and len(set(order[10:])) == 8
        and order[:8] != order[10:]
    )
    assert feed(tok).progress == 0.0, "endless"


def test_other_questions_or_another_seed_are_refused(tok):
    state = feed(tok).state_dict()
    with pytest.raises(UserError, match="the seed of this run changed"):
        feed(tok, seed=4).load_state_dict(state)
    with pytest.raises(UserError, match="the questions of this run changed"):
        feed(tok, questions=QUESTIONS[1:]).load_state_dict(state)
    with pytest.raises(UserError, match="no question leaves room"):
        feed(tok, questions=[])


def test_the_summary_of_what_is_practised():
    other = replace(EASY, name="other")
    asked = [*((EASY, i) for i in range(30)), *((other, i) for i in range(10))]
    kept = asked[:20] + asked[30:]
    lines, record = survey(asked, kept, {EASY: [1, 2], other: [3]}, 4, 8, 60)
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]] == [
        ["toy", "20", "10", "66.7%", "2.00", "2"],
        ["other", "10", "0", "33.3%", "2.00", "1"],
    ]
    assert lines[-1] == "this run: 15 steps of 4 questions with 8 replies each"
    assert json.loads(json.dumps(record))["tasks"][0]["too_long"] == 10
    by_clock = "\n".join(survey(asked, kept, {EASY: [1]}, 4, 8, None)[0])
    assert "1 in 8 steps" in by_clock and "4 questions with 8 replies each per step" in by_clock


@pytest.mark.parametrize(
    ("kept", "held_out", "says"),
    [
        ([], {EASY: [1]}, "toy has no training question that fits into the context"),
        ([(EASY, 1)], {EASY: []}, "toy has no held-out question"),
        ([(EASY, 1)], {EASY: [1], replace(EASY, name="other"): [1]}, "other has no training"),
    ],
)
def test_nothing_to_practise_is_refused(kept, held_out, says):
    with pytest.raises(UserError, match=says):
        survey([(EASY, 1)], kept, held_out, 4, 8, 60)


@pytest.fixture
def sft(tok, tmp_path, monkeypatch):
    """A finetuned model that nobody finetuned, and a task that it sometimes gets right."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(hardware, "measured_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(chat_eval, "named_tasks", lambda names, folder: [EASY])
    tok.save(tmp_path / "tokenizer")
    m = policy(tok)
    meta = {
        **tiny.meta(m),
        "stage": "sft",
        "tokenizer": tok.fingerprint,
        "knobs": {"device_batch_size": 16, "dtype": "float32"},
    }
    checkpoint.save(
        run_directory("sft", "t"),
        1,
        dict(m.named_parameters()),
        tiny.optimizer(m).state_tensors(),
        meta,
    )
    return tmp_path / "checkpoints" / "rl" / "t"


def test_ten_and_ten_are_twenty(sft, monkeypatch):
    """A run that was stopped and resumed ends with the bits of one that was not; what it logs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order
    flags = [
        "--device_type=cpu",
        "--num_iterations=20",
        "--num_items=30",
        "--questions_per_step=4",
        "--samples=4",
        "--eval_items=6",
        "--eval_every=8",
        "--init_lr_frac=0.3",
    ]
    summary = chat_rl.main(flags)
    rows = logbook.read(sft)
    train, looks = (
        [
            {
                k: v
                for k, v in r.items()
                if k not in ("seconds", "tok_per_sec", "peak_share", "rollout_seconds")
            }
            for r in rows
            if r["kind"] == kind
        ]
        for kind in ("train", "eval")
    )
    assert (
        len(train) == 20 and {"reward", "zero_variance", "truncated", "length"} <= train[0].keys()
    )
    assert [r["step"] for r in looks] == [0, 8, 16, 20] and summary["eval"]["n"] == 6
    for r in looks:
        assert (
            0 <= r["pass@1_lo"] <= r["pass@1"] <= r["pass@1_hi"] <= 1 and r["pass@1"] <= r["pass@4"]
        )
    whole = checkpoint.newest(sft)
    hashes = [sha256_file(whole.path / f"{name}.safetensors") for name in ("model", "optim")]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.act_in_step(patch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        chat_rl.main(flags)
    assert checkpoint.newest(sft).path.name == "step_000010"
    with pytest.raises(
        UserError,
        match=r"started with questions_per_step=4, not 8: .* learning rate",
    ):
        chat_rl.main([*flags, "--resume=auto", "--questions_per_step=8"])
    chat_rl.main([*flags, "--resume=auto", "--rollout_batch_size=4"])
    again = [{k: r[k] for k in train[0]} for r in logbook.read(sft) if r["kind"] == "train"]
    assert again == train
    assert [
        sha256_file(checkpoint.newest(sft).path / f"{name}.safetensors")
        for name in ("model", "optim")
    ] == hashes
    assert checkpoint.locate("rl").meta["stage"] == "rl"
    torch.set_num_threads(threads)


# ---- ranks


def test_two_ranks_share_out_what_one_does(tok, monkeypatch):
    """Without processes: the test exchanges what the ranks would tell each other."""
    whole = feed(tok, per_step=5)
    ranks = [replace(tiny.CPU, rank=rank, world_size=2) for rank in (0, 1)]
    parts = [feed(tok, runtime=runtime, per_step=5) for runtime in ranks]
    for _ in range(2):
        expected, counts = drawn(whole), []
        before = [f.state_dict() for f in parts]
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "sum_over_ranks", lambda c, _, to=counts: to.append(c) or c)
            for f in parts:
                next(f)
        sums = [sum(c) for c in zip(*counts, strict=True)]
        rows = []
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "sum_over_ranks", lambda *_, sums=sums: sums)
            for f, state in zip(parts, before, strict=True):
                f.load_state_dict(state)
                rows += [row for row in drawn(f) if any(t >= 0 for t in row[1])]
                assert {**f.numbers, "rollout_seconds": 0} == {
                    **whole.numbers,
                    "rollout_seconds": 0,
                }
        assert sorted(rows) == expected


# ---- it learns


def test_a_policy_learns_the_answer_and_to_stop(tok, tmp_path):
    """From replies of random letters, a seventh of them truncated, to the right letter alone."""
    m = policy(tok)
    f = feed(
        tok,
        m,
        [(TOY, item) for item in TOY.items("train", 50)],
        per_step=8,
        samples=8,
        total=8 * 40,
    )
    rows = learn(tmp_path, m, f, Schedule(decay=1.0, momentum_warmup=0), lr_scale=0.3)
    first, last = (
        {k: sum(r[k] for r in part) / 5 for k in ("reward", "truncated", "length")}
        for part in (rows[:5], rows[-5:])
    )
    assert first["reward"] < 0.2 and first["truncated"] > 0.1, first
    assert last["reward"] > 0.7 and last["truncated"] < 0.03 and last["length"] < 1.4, last
