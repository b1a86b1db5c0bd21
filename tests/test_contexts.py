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
    ("texts", "says"),
    [
        ("512", "'512' is not TOKENS@SHARE: write for example 512@0 1024@0.6"),
        ("512@0 1024@x", "'1024@x' is not TOKENS@SHARE"),
        ("512@0 1024@-0.5", "is not TOKENS@SHARE"),
        (
            "512@0.1 1024@0.6",
            "no context is given for the run before 512@0.1: let the first stage begin at 0, as in 512@0",
        ),
        ("512@0 1024@1", "1024@1 never trains"),
        ("512@0 1024@1.5", "1024@1.5 never trains"),
        ("0@0 1024@0.5", "0@0 never trains"),
        ("512@0 1024@0.6 2048@0.6", "2048@0.6 follows 1024@0.6: let tokens and shares rise"),
        ("512@0 1024@0.6 2048@0.3", "2048@0.3 follows 1024@0.6"),
        ("1024@0 512@0.5", "512@0.5 follows 1024@0"),
        ("512@0 1024@0.5", "the last context stage has 1024 tokens, but --sequence_len is 2048"),
    ],
)
def test_stages_that_make_no_sense(texts, says):
    with pytest.raises(UserError) as e:
        Contexts.parse(texts.split(), 2048)
    assert says in str(e.value)
