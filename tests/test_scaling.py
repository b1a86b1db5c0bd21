"""From depth to shape, batch and rates; figures that make no model are refused in one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.base.common import UserError
from nanochat.model.config import GPTConfig
from nanochat.train.scaling import (
    Shape,
    batch_for,
    compile_pays,
    split_budget,
    width_scale,
)


@pytest.mark.parametrize(
    ("shape", "layers", "width", "heads", "kv"),
    [
        (Shape(depth=4), 4, 256, 2, 2),
        (Shape(depth=20), 20, 1280, 10, 10),
        (Shape(depth=4, model_dim=512, head_dim=64), 4, 512, 8, 8),
        (Shape(depth=5), 5, 384, 3, 3),  # 320 is rounded up to whole heads
        (Shape(depth=1, aspect_ratio=1.5, head_dim=16), 1, 16, 1, 1),
        (Shape(depth=4, model_dim=512, head_dim=64, kv_ratio=0.25), 4, 512, 8, 2),
        (Shape(depth=4, model_dim=512, head_dim=64, kv_ratio=0.01), 4, 512, 8, 1),
        (
            Shape(depth=4, model_dim=576, head_dim=64, kv_ratio=0.25),
            4,
            576,
            9,
            3,
        ),  # 2.25 of 9 is no whole group
        (Shape(depth=4, model_dim=448, head_dim=64, kv_ratio=0.25), 4, 448, 7, 1),
    ],
)
def test_shapes(shape, layers, width, heads, kv):
    assert shape.dimensions() == {
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "n_kv_head": kv,
    }


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (
            Shape(depth=4, model_dim=500, head_dim=64),
            "model_dim 500 is not a multiple of head_dim 64: try --model_dim=512",
        ),
        (Shape(depth=4, model_dim=10, head_dim=64), "try --model_dim=64"),
        (Shape(depth=0), r"depth must .* \(got 0\b"),
        (Shape(depth=-3), r"depth must .* \(got -3\b"),
        (Shape(head_dim=0), r"head_dim must .* \(got 0\b"),
        (Shape(model_dim=-256), r"model_dim must .* \(got -256\b"),
        (Shape(aspect_ratio=float("nan")), r"aspect_ratio must .* \(got nan\b"),
        (Shape(aspect_ratio=float("inf")), r"aspect_ratio must .* \(got inf\b"),
        (Shape(kv_ratio=float("nan")), r"kv_ratio must .* \(got nan\b"),
    ],
)
def test_impossible_shapes(shape, says):
    with pytest.raises(UserError, match=says):
        shape.dimensions()


def test_an_odd_head():
    with pytest.raises(UserError, match="12 cannot be divided into 4 heads of an even width"):
        GPTConfig(**Shape(depth=2, model_dim=12, head_dim=3).dimensions())


@given(
    depth=st.integers(1, 64),
    ratio=st.floats(1, 200),
    half=st.integers(1, 128),
    kv=st.sampled_from([1.0, 0.5, 0.25, 0.125]),
)
def test_what_is_accepted_makes_a_model(depth, ratio, half, kv):
    try:
        d = Shape(depth=depth, aspect_ratio=ratio, head_dim=2 * half, kv_ratio=kv).dimensions()
    except UserError:
        return
    c = GPTConfig(**d)
    assert c.head_dim == 2 * half and depth * ratio <= c.n_embd < depth * ratio + 2 * half


def test_batches_are_powers_of_two_within_bounds():
    sizes = [batch_for(10.0**e) for e in range(13)]
    assert all(s & (s - 1) == 0 and 2**12 <= s <= 2**19 for s in sizes)
    assert sizes == sorted(sizes)
    assert batch_for(11.2e9) == 2**19 and batch_for(0) == 2**12


def test_width_scale():
    assert width_scale(768) == 1
    assert width_scale(4 * 768) == pytest.approx(0.5)


def test_a_cpu_compiles_only_long_runs_and_more_shapes_need_more_time():
    assert compile_pays("cuda", 1.0)
    assert not compile_pays("cpu", 119.0) and compile_pays("cpu", 120.0)
    assert not compile_pays("cpu", 300.0, shapes=3) and compile_pays("cpu", 360.0, shapes=3)


@given(
    seconds=st.floats(1, 1e6),
    shares=st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 10), min_size=1),
)
def test_the_stages_share_the_whole_budget(seconds, shares):
    parts = split_budget(seconds, shares)
    assert sum(parts.values()) == pytest.approx(seconds)
    first = next(iter(shares))
    for stage, part in parts.items():
        assert part / parts[first] == pytest.approx(shares[stage] / shares[first])


@pytest.mark.parametrize(("seconds", "share"), [(0.0, 1.0), (-5.0, 1.0), (60.0, 0.0)])
def test_a_budget_that_cannot_be_split(seconds, share):
    with pytest.raises(UserError, match="give positive seconds and positive shares"):
        split_budget(seconds, {"base": share})
