"""progress: quick work is silent, slow work leaves one line in a log, and only rank 0 prints."""

import itertools
from types import SimpleNamespace

import pytest

from nanochat.base import progress as module
from nanochat.base.progress import StatusLine, progress


def test_quick_work_is_silent(capsys):
    with progress(3, "reading", "files") as bar:
        for _ in range(3):
            bar.advance()
    assert capsys.readouterr() == ("", "")


def test_slow_work_leaves_one_line_in_a_log(capsys, monkeypatch):
    clock = itertools.count(100.0, 90.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress(None, "reading", "bytes") as bar:
        bar.update(1_000, note="40 tokens")
        bar.update(12_582_912, total=30e6)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "reading: 12.6M of 30M bytes, 40 tokens in 1m30s" in err


def test_a_failure_ends_the_bar_without_a_closing_line(capsys, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", -1)
    with pytest.raises(ValueError), progress(3, "reading") as bar:
        bar.advance()
        raise ValueError
    assert capsys.readouterr() == ("", "")


def test_other_ranks_print_nothing(capsys, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", -1)
    monkeypatch.setenv("RANK", "1")
    with progress(3, "reading") as bar:
        bar.advance(3)
    StatusLine().show("step 1")
    assert capsys.readouterr() == ("", "")


def test_a_status_line_is_an_occasional_line_in_a_log(capsys):
    status = StatusLine(log_seconds=100)
    status.show("step 1")
    status.show("step 2")
    status.print("evaluated")
    assert capsys.readouterr().out == "step 1\nevaluated\n"
