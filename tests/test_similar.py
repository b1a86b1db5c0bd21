"""Nearly equal documents: sketches against exact sets of 5-word sequences."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.similar import SHORTEST, SIMILAR, Similar, sketched, sketches

WORDS = [f"{'größer' if i % 7 == 0 else 'word'}{i}" for i in range(3000)]


def prose(seed, words=1000):
    return random.Random(seed).choices(WORDS, k=words)


def changed(words, share, seed):
    rng = random.Random(seed)
    return [f"new{rng.random()}" if rng.random() < share else word for word in words]


def exact(a, b):
    first, second = ({tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (a, b))
    return len(first & second) / len(first | second)


def sketch(*documents):
    return sketches([" ".join(words) for words in documents])


def removed(documents):
    similar = Similar()
    items = ((" ".join(words), i) for i, words in enumerate(documents))
    return [i for _, i, sketch in sketched(items) if similar.to_an_earlier_one(sketch)]


@given(
    st.lists(
        st.sampled_from(["a", "b", "cd", "éé", "東京", "extraordinarily", "extraordinary"]),
        max_size=130,
    )
)
@settings(max_examples=60, deadline=None)
def test_of_up_to_128_sequences_the_similarity_is_exact(words):
    base = prose(1, 60)
    a, b = base + words, words + base
    first, second = sketch(a, b)
    if len({tuple(a[i : i + 5]) for i in range(len(a) - 4)}) <= 120:
        assert first.similarity(second) == pytest.approx(exact(a, b))


def test_of_long_documents_it_is_near():
    errors = []
    for seed, share in enumerate([0, 0.005, 0.01, 0.02, 0.04, 0.1] * 5):
        a = prose(seed, 1000 + 400 * seed)
        b = changed(a, share, seed)[: len(a) - 20 * seed]
        first, second = sketch(a, b)
        errors.append(first.similarity(second) - exact(a, b))
        assert len(first.hashes) < 200
    assert max(map(abs, errors)) < 0.15
    assert abs(sum(errors)) / len(errors) < 0.02


def test_neighbours_and_white_space_do_not_matter():
    texts = [" ".join(prose(i, 40 + 25 * i)) for i in range(12)]
    together = sketches(["", "short", *texts, "\n"])
    assert [s is None for s in together] == [True, True, True] + [False] * 11 + [True]
    for text, one in zip(texts, together[2:], strict=False):
        (alone,) = sketches(["\r\n " + text.replace(" ", " \n\t") + " "])
        assert (alone is None) == (one is None) == (len(text.split()) < SHORTEST)
        assert alone is None or (alone.hashes.tolist(), alone.limit) == (
            one.hashes.tolist(),
            one.limit,
        )


def test_near_duplicates_are_found_and_others_stay():
    kept = [prose(i, 60 + 40 * i) for i in range(60)]
    near = [changed(words, 0.01, i) for i, words in enumerate(kept)]
    far = [changed(words, 0.15, i) for i, words in enumerate(kept)]
    certain = [120 + i for i, words in enumerate(kept) if exact(words, near[i]) > SIMILAR + 0.1]
    assert len(certain) > 40 and all(exact(*pair) < 0.65 for pair in zip(kept, far, strict=True))
    found = removed([*kept, *far, *near])
    assert set(found) >= set(certain) and all(i >= 120 for i in found)


def test_what_many_documents_have_in_common_hides_no_duplicate():
    letterhead = prose("letterhead", 200)
    kept = [letterhead + prose(i, 300) for i in range(100)]
    again = [changed(words, 0.005, i) for i, words in enumerate(kept)]
    certain = {100 + i for i in range(100) if exact(kept[i], again[i]) > SIMILAR + 0.1}
    found = set(removed([*kept, *again]))
    assert len(certain - found) <= 2 and min(found) >= 100


def test_texts_that_repeat_themselves():
    def lines(seed, times=2000):
        return prose(seed, 20) * times

    assert removed([lines(1), lines(2), lines(3), lines(1, 1999), lines(4)]) == [3]
    (one,) = sketch(lines(1))
    assert len(one.hashes) == 20
