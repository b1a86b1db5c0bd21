"""Feeds: the order of rows, resuming anywhere, ranks and micro-batches, context stages, threads."""

import gc
import json
import threading
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.base.common import UserError
from nanochat.data import order
from nanochat.data.contexts import Contexts
from nanochat.data.feed import RowFeed, eval_batches, row_width
from nanochat.data.shards import prepare_conversations
from nanochat.data.summary import survey

BOS = 0


class Plain:
    """Renders what it is given: {"ids": ..., "mask": ...}."""

    fingerprint, vocab_size, bos = "plain", 50_000, BOS

    def render_conversation(self, conversation):
        return conversation["ids"], conversation["mask"]


def make(path, lengths, name="a", masked=False, first=1):
    """Documents <|bos|> n n+1 ..., with no token twice, so that rows show where each is from."""
    rows, n = [], first
    for length in lengths:
        ids = [BOS, *range(n, n + length - 1)]
        rows.append(
            {
                "ids": ids,
                "mask": [
                    int(masked and 2 * i >= length) if masked else int(i > 0) for i in range(length)
                ],
            }
        )
        n += length - 1
    return prepare_conversations(
        name, rows, Plain(), path, identity=f"{name} {list(lengths)} {masked} {first}"
    )


@pytest.fixture
def data(tmp_path):
    return make(tmp_path, np.random.default_rng(0).integers(2, 60, 300).tolist())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(order, "BLOCK_TOKENS", 2000)


def feed(*shards, **changes):
    knobs = {"rows": 8, "device_rows": 3, "sequence_len": 32, "seed": 1, "epochs": 2}
    return RowFeed(
        [s if isinstance(s, tuple) else (s, None) for s in shards], **{**knobs, **changes}
    )


def rows(batches):
    return [
        (tuple(i.tolist()), tuple(t.tolist()))
        for b in batches
        for i, t in zip(b.inputs, b.targets, strict=True)
    ]


def targets(steps):
    return [t for batches in steps for b in batches for t in b.targets.flatten().tolist() if t > 0]


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_resume_anywhere_gives_the_same_batches(data, mode):
    """Trap 8, the feed's half: from any step on, through JSON, over block and epoch borders."""
    whole, states = [], []
    f = feed(data, mode=mode)
    for batches in f:
        whole.append(rows(batches))
        states.append(json.loads(json.dumps(f.state_dict())))
    assert states[-1]["epoch"] == 1 and max(s["block"] for s in states) > 1
    for at in {0, 1, 5, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
        g = feed(data, mode=mode)
        g.load_state_dict(states[at])
        assert g.step == at + 1
        rest = [rows(batches) for batches in g]
        assert rest == whole[at + 1 :]
        assert g.state_dict() == states[-1]


def test_a_feed_rewinds(data):
    f = feed(data)
    state = f.state_dict()
    first = [rows(next(f)) for _ in range(4)]
    f.load_state_dict(state)
    assert [rows(next(f)) for _ in range(4)] == first


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_an_epoch_has_every_document_once(data, mode):
    f = feed(data, mode=mode, epochs=1, sequence_len=64)
    seen = targets(f)
    assert sorted(seen) == list(range(1, data.total - len(data) + 1))
    assert f.progress == 1.0 and f.state_dict()["epoch"] == 0
    with pytest.raises(StopIteration):
        next(f)


def test_two_epochs_differ_in_order_only(data):
    steps = list(feed(data, rows=1, device_rows=1, epochs=2))
    flat = targets(steps)
    half = len(flat) // 2
    assert sorted(flat[:half]) == sorted(flat[half:]) and flat[:half] != flat[half:]


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_of_a_step_depend_on_no_memory_knob(data, mode, world_size):
    """Trap 25: ranks and micro-batches divide the same rows, in the same order."""
    one = [rows(b) for b in feed(data, mode=mode, device_rows=8)]
    for device_rows in (1, 3, 100):
        ranks = [
            feed(data, mode=mode, device_rows=device_rows, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        for step in one:
            parts = [next(f) for f in ranks]
            assert all(len(b.inputs) <= device_rows for p in parts for b in p)
            assert [
                row
                for p in parts
                for row in rows(p)
                if len(step) >= world_size or any(t >= 0 for t in row[1])
            ] == step


def test_micro_batches_are_even_and_may_shrink_in_flight(data):
    f, g = feed(data, rows=10, device_rows=4), feed(data, rows=10, device_rows=10)
    assert [len(b.inputs) for b in next(f)] == [4, 3, 3]
    f.device_rows = 2
    second = next(f)
    assert [len(b.inputs) for b in second] == [2, 2, 2, 2, 2]
    next(g)
    assert rows(second) == rows(next(g))


def test_a_rank_without_rows_gets_an_ignored_one(tmp_path):
    f = feed(make(tmp_path, [5]), rank=1, world_size=2, epochs=1, mode="padded")
    g = feed(make(tmp_path, [5]), rank=0, world_size=2, epochs=1, mode="padded")
    idle, busy = sorted((next(f), next(g)), key=lambda b: int(b[0].targets.max()))
    assert idle[0].inputs.shape == busy[0].inputs.shape == (1, 32) and (idle[0].targets == -1).all()
    assert (busy[0].targets >= 0).sum() == 4


def test_next_token_targets_and_padding(tmp_path):
    (batch,) = next(feed(make(tmp_path, [4, 3]), sequence_len=9, epochs=1))
    i, t = batch.inputs[0].tolist(), batch.targets[0].tolist()
    assert i == [0, 1, 2, 3, 0, 4, 5, 0, 0] and t == [
        1,
        2,
        3,
        -1,
        4,
        5,
        -1,
        -1,
        -1,
    ]  # this tokenizer's mask leaves <|bos|> out
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64 and batch.weights is None


def test_split_documents_lose_no_target(tmp_path):
    shards = make(tmp_path, [200, 7, 150, 90, 3])
    steps = list(feed(shards, epochs=1))
    assert sorted(targets(steps)) == list(range(1, shards.total - len(shards) + 1))
    assert all((b.inputs[:, 0] == BOS).all() for batches in steps for b in batches)


def test_masks_decide_the_targets(tmp_path):
    shards = make(tmp_path, [6, 40, 11], masked=True)
    wanted = sorted(
        int(x) for i in range(3) for x, m in zip(shards.tokens(i), shards.mask(i), strict=True) if m
    )
    assert sorted(targets(feed(shards, epochs=1))) == wanted


def test_only_over_long_conversations(tmp_path):
    """Trap 2: a feed of over-long conversations only, with no answer left, runs on and counts."""
    shards = make(tmp_path, [100] * 20, masked=True)
    f = feed(shards, mode="padded", epochs=2)
    assert survey(f.order, [], f.rows).sources[0].longer == 20
    steps = list(f)
    assert sum(len(b.inputs) for s in steps for b in s) == 40 and len(steps) == 5
    assert all(b.inputs.shape[1] == 32 and (b.targets == -1).all() for s in steps for b in s)
    assert f.progress == 1.0


def test_padded_rows_are_as_wide_as_the_step_needs(tmp_path):
    f = feed(
        make(tmp_path, [5, 70, 65, 66, 200]), mode="padded", rows=1, epochs=1, sequence_len=150
    )
    widths = {b.valid: b.inputs.shape[1] for (b,) in f}  # targets are counted before they are sent
    assert widths == {4: 64, 64: 64, 65: 128, 69: 128, 150: 150}


def test_a_compiled_model_meets_few_widths():
    for most in (512, 2048, 2000):
        widths = {row_width(n, most, few=True) for n in range(1, most + 1)}
        assert len(widths) <= 5 and max(widths) == most
        assert all(n <= row_width(n, most, few=True) < max(2 * n, 129) for n in range(1, most + 1))
    assert [row_width(n, 512) for n in (1, 64, 65, 512)] == [64, 64, 128, 512]


def test_weights_are_shares_of_the_tokens(tmp_path):
    a = make(tmp_path, [20] * 500, "a")
    b = make(tmp_path, [30] * 50, "b", first=20_000)
    steps = [next(f) for f in [feed((a, 0.75), (b, 0.25), epochs=None, rows=50)] for _ in range(8)]
    seen = targets(steps)
    assert sum(t >= 20_000 for t in seen) / len(seen) == pytest.approx(0.25, abs=0.03)
    without = targets(feed(a, b, epochs=1))
    assert len(without) == a.total + b.total - len(a) - len(b) == len(set(without))


def test_ends(data):
    f = feed(data, epochs=None, total_steps=7)
    seen = [f.progress]
    for _ in f:
        seen.append(f.progress)
    assert f.step == 7 and seen == pytest.approx([i / 7 for i in range(8)])
    endless = feed(data, epochs=None)
    for _ in range(200):
        next(endless)
    assert endless.progress == 0.0 and endless.state_dict()["epoch"] > 2
    endless.close()


def test_progress_by_epochs_rises_to_one(data):
    f = feed(data, epochs=3)
    seen = []
    for _ in f:
        seen.append(f.progress)
        assert f.state_dict()["epoch"] == min(2, int(f.progress * 3 - 1e-9))
    assert seen == sorted(seen) and seen[-1] == 1.0 and seen[0] < 0.05


def test_resume_refuses_other_data_and_seeds(data, tmp_path):
    state = feed(data).state_dict()
    with pytest.raises(UserError, match="seed"):
        feed(data, seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="documents"):
        feed(make(tmp_path, [5, 6])).load_state_dict(state)


@pytest.mark.parametrize("then", [16, 64])
def test_resume_with_another_context_loses_and_repeats_nothing(data, then):
    f = feed(data, epochs=1, sequence_len=32, rows=4)
    seen = targets(next(f) for _ in range(10))
    g = feed(data, epochs=1, sequence_len=then, rows=4)
    g.load_state_dict(f.state_dict())
    assert sorted(seen + targets(g)) == list(range(1, data.total - len(data) + 1))


# ---- context stages

STAGES = Contexts(((0.0, 8), (0.3, 16), (0.8, 32)))


def staged(data, **changes):
    return feed(data, **{"rows": 2, "device_rows": 1, "epochs": 1, "contexts": STAGES, **changes})


def run(f, shares=None):
    """The steps of a feed whose progress (or the shares given) is set before each of them."""
    for share in shares if shares is not None else iter(lambda: f.progress, None):
        f.set_progress(share)
        try:
            yield next(f)
        except StopIteration:
            return


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    first=st.integers(0, 40),
    second=st.integers(0, 40),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=60),
)
def test_stages_lose_and_repeat_nothing(tmp_path, first, second, lengths):
    """Every target of the epoch comes once, wherever in a block or document the context grows."""
    data = make(tmp_path / f"{len(lengths)}_{sum(lengths)}_{hash(tuple(lengths))}", lengths)
    steps = list(run(staged(data), [0.0] * first + [0.5] * second + [0.9] * 1000))
    assert sorted(targets(steps)) == list(range(1, data.total - len(data) + 1))
    assert all((b.inputs[:, 0] == BOS).all() for s in steps for b in s)
    widths = [s[0].inputs.size(1) for s in steps]
    assert widths == ([8] * first + [16] * second + [32] * 1000)[: len(widths)]


def test_a_longer_context_joins_the_pieces_of_a_document(tmp_path):
    f = staged(make(tmp_path, [65] * 4, first=100), rows=1)
    assert len(targets([next(f)])) == 4 * 8
    f.set_progress(0.9)
    longest = max(sum(j - i == 1 for i, j in pairwise(t)) for s in f for _, t in rows(s))
    assert longest >= 30, "rows of 32 hold runs of a document that were apart in rows of 8"


def test_stages_keep_the_tokens_of_steps_and_micro_batches(data):
    f = staged(data, rows=6, device_rows=2)
    for progress, T in (
        (0.0, 8),
        (0.2, 8),
        (0.3, 16),
        (0.79, 16),
        (0.8, 32),
        (0.1, 32),
    ):  # a context once reached is kept
        change = f.set_progress(progress)
        step = next(f)
        assert [tuple(b.inputs.shape) for b in step] == [(64 // T, T)] * 3 and f.numbers == {
            "context": T
        }
        assert change == {
            0.3: "context 8 -> 16, 12 rows a step",
            0.8: "context 16 -> 32, 6 rows a step",
        }.get(progress, "")
    g = staged(data, rows=4, device_rows=4)
    next(g)
    g.device_rows = 4  # lowered from 16, as when memory runs out
    g.set_progress(0.8)
    assert [len(b.inputs) for b in next(g)] == [1] * 4, "the tokens that fit are kept"
    assert feed(data).numbers == {}


def test_resume_anywhere_in_the_stages(data):
    """Trap 8 with stages: from any step, also in a block that was packed two or three times."""
    whole, states, f = [], [], staged(data)
    for batches in run(f):
        whole.append(rows(batches))
        states.append(json.loads(json.dumps(f.state_dict())))
    assert (
        len({s["sequence_len"] for s in states}) == 3 and max(len(s["cuts"]) for s in states) >= 1
    )
    progress = [s["progress"] for s in states]
    assert progress == sorted(progress) and progress[-1] == 1.0
    for at in {
        0,
        5,
        *(
            i
            for i in range(len(whole) - 1)
            if states[i]["sequence_len"] != states[i + 1]["sequence_len"]
        ),
        len(whole) - 3,
    }:
        for step in (at, at + 1):
            g = staged(data)
            g.load_state_dict(states[step])
            assert [rows(batches) for batches in run(g)] == whole[step + 1 :]


def test_a_finished_stage_of_a_block_counts_once(data, monkeypatch):
    """Two switches within one block, the second before a row was taken after the first."""
    monkeypatch.setattr(order, "BLOCK_TOKENS", 1 << 21)
    steps = list(run(staged(data), [0.0] * 9 + [0.5, 0.9] + [0.9] * 1000))
    assert sorted(targets(steps)) == list(range(1, data.total - len(data) + 1))
    f = staged(data)
    next(f)
    f.set_progress(0.5)
    f.set_progress(0.9)
    assert f.state_dict()["cuts"] == [[8, 8], [16, 0]]
    first = targets(staged(data).__next__() for _ in range(1))
    assert sorted(first + targets(f)) == list(range(1, data.total - len(data) + 1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_stages_depend_on_no_memory_knob(data, world_size):
    one = [rows(b) for b in run(staged(data, rows=4, device_rows=8))]
    ranks = [
        run(staged(data, rows=4, device_rows=1, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    for step in one:
        parts = [rows(next(f)) for f in ranks]
        assert [
            row
            for p in parts
            for row in p
            if len(step) >= world_size or any(t >= 0 for t in row[1])
        ] == step


def test_errors_in_the_thread_surface(data, monkeypatch):
    f = feed(data)
    monkeypatch.setattr(
        type(data), "tokens", lambda self, i: (_ for _ in ()).throw(OSError("disk gone"))
    )
    with pytest.raises(OSError, match="disk gone"):
        next(f)


def test_threads_end(data):
    others = {*threading.enumerate()}  # also of feeds that nobody has closed

    def reading() -> list[str]:
        mine = [t.name for t in threading.enumerate() if t not in others]
        return [name for name in mine if name.startswith("read ahead")]

    f = feed(data, epochs=None)
    next(f)
    assert reading()
    f.close()
    g = feed(data, epochs=None)
    next(g)
    del g
    gc.collect()
    tiny.wait_until(lambda: not reading())


def test_eval_reads_the_same_rows_always(data):
    def read(**changes):
        knobs = {"rows_per_batch": 8, "sequence_len": 32, "max_tokens": 3000}
        return list(eval_batches(data, **{**knobs, **changes}))

    first = rows(read())
    assert first == rows(read())
    real = sorted(r for r in first if any(t >= 0 for t in r[1]))
    assert 2800 < sum(t != -1 for r in real for t in r[1]) < 3100
    ranks = [r for k in range(3) for r in rows(read(rank=k, world_size=3, rows_per_batch=5))]
    assert sorted(r for r in ranks if any(t >= 0 for t in r[1])) == real
    assert len({b.inputs.shape for b in read()}) == 1
    assert sorted(t for r in rows(read(max_tokens=None)) for t in r[1] if t > 0) == list(
        range(1, data.total - len(data) + 1)
    )
    assert (
        list(
            eval_batches(
                data, rows_per_batch=4, sequence_len=32, max_tokens=5, rank=1, world_size=2
            )
        )
        == []
    )
