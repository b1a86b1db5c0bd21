"""
Decoding by steps of fixed memory, which are CUDA graphs on a GPU: here the same steps run without a
graph on a CPU. Every test of generation that decides what is written runs again with them.
"""

import itertools

import priors
import pytest
import torch
from test_generate import (  # noqa: F401
    SHAPES,
    join,
    model,
    quiet,
    requests,
    run_alone,
    test_a_cancelled_row_leaves_and_changes_no_other,
    test_every_step_brings_a_token_for_every_row,
    test_ids_in_the_padding_are_never_sampled,
    test_lengths_and_reasons,
    test_only_the_calculator_writes_outputs,
    test_requests_that_join_a_running_batch_get_what_they_get_alone,
    test_rows_do_not_depend_on_their_company,
    test_samples_differ_from_their_first_token_on,
    test_the_stream_brings_what_the_batch_returns,
    test_training_between_two_calls_is_seen,
    tokenizer,
)

from nanochat.chat import graphs
from nanochat.chat.generate import Batch, Engine, Sampling
from nanochat.chat.graphs import Step


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """The numbers of rows of every step that ran, as (in use, rows, slots); no patience."""
    ran, run = [], Step.run

    def counted(step, cache, tokens, *rest):
        ran.append((len(tokens), step.given.size(1), step.view.slots))
        return run(step, cache, tokens, *rest)

    made = Engine.__init__

    def on_any_device(engine, *rest):
        made(engine, *rest)
        engine._use_graphs = True

    monkeypatch.setattr(Engine, "__init__", on_any_device)
    monkeypatch.setattr(graphs, "PATIENCE", 0)
    monkeypatch.setattr(graphs, "LEAST_SLOTS", 8)
    monkeypatch.setattr(Step, "run", counted)
    return ran


def without(engine):
    """The engine, which never uses steps."""
    engine._use_graphs = False
    return engine


DRAWS = itertools.cycle([Sampling(0), Sampling(0.8, 20), Sampling(1.1, top_p=0.7)])


@pytest.mark.parametrize(("shape", "sampling"), [*zip([*SHAPES, "prior"], DRAWS, strict=False)])
def test_tokens_do_not_depend_on_steps(tokenizer, tmp_path, shape, sampling, steps):  # noqa: F811
    if shape == "prior":
        path = priors.write(tmp_path / "prior.safetensors", priors.terms())
        m = priors.model_with(path, shape={"window_pattern": "SL"})
    else:
        m = model(tokenizer.vocab_size, **SHAPES[shape])
    most = m.config.sequence_len
    prompts, seeds = [[3, 1, 4, 1, 5], [9, 2, 6], [2]], ["0/0", "1/0", "2/0"]
    samples = []
    for engine in (quiet(tokenizer, m), without(quiet(tokenizer, m))):
        batch = Batch(engine)
        samples.append(join(batch, prompts, seeds, sampling, most, 2))
        while len(batch):
            batch.step()
    assert samples[0] == samples[1]
    assert {rows for _, rows, _ in steps} == {8, 4, 2}
    assert {slots for *_, slots in steps} == ({8, 16} if shape == "prior" else {8, 16, 32})


def test_rows_that_read_a_tool_take_the_other_path_meanwhile(tokenizer, steps, monkeypatch):  # noqa: F811
    m = model(tokenizer.vocab_size, convolutions=True)
    answer = lambda calls, id: [id % 7, 8, 9] if id % 5 == 0 else []  # noqa: E731
    monkeypatch.setattr("nanochat.chat.tools.ToolCalls.answer", answer)
    got, want = (
        engine.generate_batch([[1, 2], [3]], 2, 25, temperature=1.0)
        for engine in (quiet(tokenizer, m), without(quiet(tokenizer, m)))
    )
    assert got == want and any(0 in sample.mask for sample in got)
    assert 5 < len(steps) < 25


def test_steps_need_one_way_of_drawing_and_their_memory_is_kept(tokenizer, steps):  # noqa: F811
    engine = quiet(tokenizer, model(tokenizer.vocab_size).requires_grad_(False))
    first = engine.generate_batch([[1, 2, 3]], 4, 10, seed=1)
    held = engine._graphs._cache.address
    assert engine.generate_batch([[1, 2, 3]], 4, 10, seed=1) == first
    assert engine._graphs._cache.address == held and len(engine._graphs._steps) == 2
    steps.clear()
    batch = Batch(engine)
    join(batch, [[1]], ["0/0"], Sampling(0), 5)
    join(batch, [[2]], ["1/0"], Sampling(1.0), 9)
    while len(batch):
        batch.step()
    assert [used for used, *_ in steps] == [1] * 4  # once the other has left


def test_the_memory_of_graphs_that_are_gone_is_not_shared(tokenizer, steps, monkeypatch):  # noqa: F811
    engine = quiet(tokenizer, model(tokenizer.vocab_size).requires_grad_(False))
    engine.generate_batch([[1, 2, 3]], 1, 6)
    held = engine.graphs()
    held.pool = "of the graphs so far"
    engine.generate_batch([[1, 2, 3]], 1, 6)
    assert held.pool
    engine.generate_batch([[1, 2, 3]], 16, 6)  # the rows need a larger cache
    assert held.pool is None
    held.pool = "of the graphs so far"

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "__init__", full)
    engine.generate_batch([[1, 2, 3]], 8, 6)
    assert held.pool is None


def test_a_batch_that_is_given_up_does_not_hold_the_memory(tokenizer, steps):  # noqa: F811
    engine = quiet(tokenizer, model(tokenizer.vocab_size).requires_grad_(False))
    (want,) = engine.generate_batch([[1, 2, 3]], 1, 12, seed=5)
    stream = engine.generate([7, 8], 1, 12)
    list(itertools.islice(stream, 3))
    held = engine._graphs._cache.address
    got = engine.generate_batch([[1, 2, 3]], 1, 12, seed=5)
    assert got == [want] and engine._graphs._cache.address != held  # both go on
    assert len(list(stream)) == 9
    del stream
    held = engine._graphs._cache.address
    assert engine.generate_batch([[1, 2, 3]], 1, 12, seed=5) == [want]
    assert engine._graphs._cache.address == held


def test_too_many_rows_and_too_little_memory_take_the_other_path(tokenizer, steps, monkeypatch):  # noqa: F811
    engine = quiet(tokenizer, model(tokenizer.vocab_size).requires_grad_(False))
    want = engine.generate_batch([[1, 2, 3]], 3, 6)
    steps.clear()
    monkeypatch.setattr(graphs, "MOST_ROWS", 2)
    assert engine.generate_batch([[1, 2, 3]], 3, 6) == want and steps == []
    monkeypatch.setattr(graphs, "MOST_ROWS", 32)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "__init__", full)
    engine = quiet(tokenizer, model(tokenizer.vocab_size).requires_grad_(False))
    assert engine.generate_batch([[1, 2, 3]], 3, 6) == want and steps == []


def test_requests_of_one_kind_that_join_get_what_they_get_alone(tokenizer, steps):  # noqa: F811
    parts = {"copy_heads": 1, "convolutions": True, "pair_embeddings": 2}
    m = model(tokenizer.vocab_size, n_kv_head=2, **parts)
    engine, plain = quiet(tokenizer, m), without(quiet(tokenizer, m))
    asked = [
        {**r, "sampling": Sampling(0.9, 7), "max_tokens": 12}
        for r in requests(m.config.vocab_size, 20)
    ]
    want = [run_alone(plain, request) for request in asked]
    batch, joined = Batch(engine), []
    for wait, request in zip((0, 0, 3, 1, 0, 2, 1, 4), asked, strict=True):
        for _ in range(wait):
            batch.step()
        joined.append(join(batch, **request))
    while len(batch):
        batch.step()
    assert [list(samples.values()) for samples in joined] == want
    assert {rows for _, rows, _ in steps} >= {2, 4, 8}
