"""runtime: halving a batch until it fits."""

import weakref

import pytest

from nanochat.base.common import UserError
from nanochat.base.runtime import halve_until_it_fits, out_of_memory


class Activations:
    """Stands for the memory that a failed attempt holds."""


def test_a_batch_is_halved_until_it_fits(capsys):
    tried = []

    def attempt(rows: int) -> str:
        tried.append(rows)
        if rows > 3:
            raise RuntimeError("CUDA out of memory")
        return f"{rows} rows"

    assert halve_until_it_fits(attempt, 13, "a validation batch") == ("3 rows", 3)
    assert tried == [13, 6, 3]
    assert "a validation batch of 6 rows: continuing with 3" in capsys.readouterr().err


def test_memory_of_a_failed_attempt_is_free_before_the_next():
    alive = []

    def attempt(rows: int) -> int:
        assert [a() for a in alive if a() is not None] == []
        activations = Activations()
        alive.append(weakref.ref(activations))
        if rows > 1:
            raise RuntimeError("out of memory")
        return rows

    assert halve_until_it_fits(attempt, 4) == (1, 1)
    assert len(alive) == 3


def test_one_row_that_does_not_fit_is_an_error_that_says_what_to_do():
    def attempt(rows: int) -> None:
        raise RuntimeError("not enough memory")

    with pytest.raises(UserError, match=r"a reply batch of 1 row.*smaller model"):
        halve_until_it_fits(attempt, 2, "a reply batch")


def test_other_errors_pass_through():
    error = RuntimeError("shapes do not match")
    assert not out_of_memory(error)

    def attempt(rows: int) -> None:
        raise error

    with pytest.raises(RuntimeError, match="shapes"):
        halve_until_it_fits(attempt, 8)
