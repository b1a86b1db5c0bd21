"""Download shards of web text to train on: nanochat dataset -n 15."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.base.common import UserError, base_dir, entry, print0
from nanochat.base.files import locked
from nanochat.base.knobs import knob, parse
from nanochat.data import hub
from nanochat.data.sources import SHARD_SETS


@dataclass
class DownloadKnobs:
    """Download"""

    n: int = knob(
        15,
        "training shards to download; the validation shard is always included",
        alias="-n",
        low=0,
    )
    set: Literal["fineweb-edu", "climbmix"] = knob("fineweb-edu", "name of the data set")
    workers: int = knob(4, "files downloaded at the same time", alias="-w", low=1, high=64)
    revision: str | None = knob(
        None, "branch, tag or commit; by default the commit that the first download pinned"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Download the first n training shards and the validation shard."""
    knobs, _ = parse(DownloadKnobs, argv, command="dataset")
    shard_set, folder = SHARD_SETS[knobs.set], base_dir() / "shards" / knobs.set
    busy = f"another process is downloading into {folder}: waiting for it"
    with locked(folder / ".lock", waiting=busy):
        commit, listed = hub.pin(shard_set.repo, folder, knobs.revision)
        numbers = *range(min(knobs.n, shard_set.last)), shard_set.last
        wanted = [shard_set.file(number) for number in numbers]
        if missing := [name for name in wanted if name not in listed]:
            raise UserError(
                f"{shard_set.repo} has no {missing[0]} at commit {commit}: choose another revision "
                "with --revision"
            )
        hub.download(
            shard_set.repo, commit, [listed[name] for name in wanted], folder, knobs.workers
        )
    print0(
        f"{len(wanted) - 1} training shards and the validation shard are in {folder}, commit "
        f"{commit[:12]}"
    )


if __name__ == "__main__":
    entry(main)
