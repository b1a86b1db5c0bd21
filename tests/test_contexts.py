"""Context stages: parsing, the context at each progress, and the mean over a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.base.common import UserError
from nanochat.data.contexts import Contexts


def test_context_stages():
    c = Contexts.parse(("512@0", "1024@0.6", "2048@.9"), 2048)
    assert [c.at(p) for p in (0.0, 0.5999, 0.6, 0.75, 0.9, 1.0)] == [
        512,
        512,
        1024,
        1024,
        2048,
        2048,
    ]
    assert c.lengths == [512, 1024, 2048] and c.longest == 2048
    assert c.mean(float) == pytest.approx(0.6 * 512 + 0.3 * 1024 + 0.1 * 2048)
    assert Contexts.parse(("512@0 1024@0.6 2048@0.9",), 7, fixed=False) == c, (
        "in one text too, and setting the length"
    )
    alone = Contexts.parse((), 300)
    assert alone.stages == ((0.0, 300),) and alone.mean(lambda T: T * 1.1) == 300 * 1.1


@given(n=st.integers(1, 400), tenths=st.lists(st.integers(1, 9), max_size=4, unique=True))
def test_every_stage_begins_at_its_share_of_the_steps(n, tenths):
    begins = [0.0, *(t / 10 for t in sorted(tenths))]
    c = Contexts(tuple((begin, 2 << i) for i, begin in enumerate(begins)))
    met = [c.at(step / n) for step in range(n)]
    assert met == sorted(met)
    for begin, T in c.stages:
        first = next((step for step, t in enumerate(met) if t >= T), n)
        assert first == -(-round(begin * 10) * n // 10)


@pytest.mark.parametrize(
    "texts",
    [
        "512",
        "512@0 1024@x",
        "512@0 1024@-0.5",
        "512@0.1 1024@0.6",
        "512@0 1024@1",
        "512@0 1024@1.5",
        "0@0 1024@0.5",
        "512@0 1024@0.6 2048@0.6",
        "512@0 1024@0.6 2048@0.3",
        "1024@0 512@0.5",
    ],
)
def test_stages_that_make_no_sense(texts):
    with pytest.raises(UserError) as e:
        Contexts.parse(texts.split(), 1024)
    assert f"the context stages {texts} are invalid: write TOKENS@SHARE" in str(e.value)


def test_the_last_stage_must_have_the_whole_context():
    with pytest.raises(UserError, match="has 1024 tokens, but --sequence_len is 2048"):
        Contexts.parse(["512@0", "1024@0.5"], 2048)
