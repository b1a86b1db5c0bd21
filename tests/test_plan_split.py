"""plan split: the shares of the quickstart, as a shell reads them."""

import subprocess

import pytest

from nanochat.base.common import UserError
from nanochat.commands import plan


@pytest.mark.parametrize(("minutes", "used"), [(12, 90), (30, 0), (3, 200)])
def test_the_shares_of_the_remaining_time(minutes, used, capsys):
    plan.main(["split", f"--minutes={minutes}", f"--seconds_used={used}"])
    remaining = max(60.0, minutes * 60 * 0.97 - used - 60)
    shares = {"base": 0.27, "mid": 0.5, "sft": 0.11, "rl": 0.12}
    wanted = "".join(f"{name}={remaining * s / 60:.2f}\n" for name, s in shares.items())
    printed = capsys.readouterr().out
    assert printed == wanted
    read = subprocess.run(
        ["bash", "-c", f'eval "{printed}"; echo $base $rl'], capture_output=True, text=True
    )
    assert read.stdout.split() == [line.partition("=")[2] for line in wanted.split()[::3]]


def test_without_a_budget():
    with pytest.raises(UserError, match="add --minutes"):
        plan.main(["split"])
