"""
Files of strangers, by kind: each must be refused in one sentence, or work. The attacks lie in tests/hostile_*.py; dev/attacks.py
tries them in processes of their own, with limits of time and memory, and prints a table.
"""

import shutil
from pathlib import Path

import hostile_checkpoints as checkpoints
import pytest

from nanochat.base.common import UserError

RELEASE = Path(__file__).resolve().parent / "golden" / "release_0.1"


@pytest.fixture
def release(tmp_path, monkeypatch):
    """The base folder of an earlier release, with a small finetuned model."""
    shutil.copytree(RELEASE, tmp_path / "release")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "release"))
    monkeypatch.chdir(tmp_path / "release")
    return tmp_path / "release"


@pytest.mark.parametrize("name", sorted(checkpoints.CHECKPOINTS.keys() - checkpoints.BOMBS))
def test_a_checkpoint_of_a_stranger(release, name):
    step = release / "checkpoints/sft/old/step_000003"
    checkpoints.CHECKPOINTS[name](step)
    checkpoints.seal(step)
    try:
        checkpoints.load()
    except UserError as e:
        assert len(str(e)) < 1500 and "\n" not in str(e)
