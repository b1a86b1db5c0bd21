"""Commands that write one file, killed with SIGKILL at each moment of writing it, and started again."""

import itertools
import json
import os
import signal

import pytest
from test_plan_probe import lab, probed  # noqa: F401 (lab is a fixture)

from nanochat.base.logbook import Logbook
from nanochat.commands import summary
from nanochat.model.stages import run_directory
from nanochat.plan import machine

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def killed(act, moment) -> bool:
    """Whether act(), in a process of its own, is killed before its n-th call that keeps a file."""
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def dying(call):
            def called(*args, **options):
                if next(calls) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return called

        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_plan_probe_keeps_every_point_that_it_has_measured(lab, tmp_path, monkeypatch):  # noqa: F811
    words = ["--depths", "4", "5", "--device_batches", "8", "32", "--vocab=4096", "--minutes=20"]
    expected = probed(*words)["points"]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "killed"))
    file, lengths = tmp_path / "killed" / "plan" / "probe.json", [0]
    for moment in (2, 1, 3, 4, 2, 1, 6, 3, 5):
        assert killed(lambda: probed(*words), moment)
        lengths.append(len(machine.load(file).points) if file.exists() else 0)
    assert lengths == sorted(lengths) and lengths[-1] == 4
    points = probed(*words)["points"]
    assert [p["config"] for p in points] == [p["config"] for p in expected]
    assert all("drift" in p for p in points)


def test_summary_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with Logbook(run_directory("base", "t"), config={}, step=0) as book:
        book.log(9, kind="eval", val_bpb=1.5)
        book.log(9, kind="summary", tokens=1000, seconds=30.0)
    words = ["--model_tag=t", "--samples=0"]
    expected = summary.main(words)
    file = tmp_path / "summary" / "t" / "summary.json"
    for there in (True, False):
        for moment in (1, 2):
            if not there:
                file.unlink(missing_ok=True)
            assert killed(lambda: summary.main(words), moment)
            assert json.loads(file.read_text()) == expected if there else not file.exists()
    assert not killed(lambda: summary.main(words), 3) and json.loads(file.read_text()) == expected
