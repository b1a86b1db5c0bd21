"""Fetch web-text shards: `python -m nanochat.dataset -n 15`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.base.common import UserError, base_dir, entry, print0
from nanochat.base.knobs import knob, parse
from nanochat.data import hub
from nanochat.data.sources import SHARD_SETS


@dataclass
class DownloadKnobs:
    n: int = knob(
        15, "training shards to have; the validation shard comes along", alias="-n", low=0
    )
    set: Literal["fineweb-edu", "climbmix"] = knob("fineweb-edu", "which shards")
    workers: int = knob(4, "files fetched at once", alias="-w", low=1, high=64)
    revision: str | None = knob(
        None,
        "branch, tag or commit; by default the commit of the first download, which a manifest pins",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch web-text shards: `python -m nanochat.dataset -n 15`."""
    args, _ = parse(
        DownloadKnobs, argv, command="dataset", description=(main.__doc__ or "").strip()
    )
    known, folder = SHARD_SETS[args.set], base_dir() / "shards" / args.set
    commit, listed = hub.pin(known.repo, folder, args.revision)
    wanted = [known.file(i) for i in (*range(min(args.n, known.last)), known.last)]
    if missing := [name for name in wanted if name not in listed]:
        raise UserError(
            f"{known.repo} has no {missing[0]} at commit {commit}: name a revision that has it with --revision"
        )
    hub.download(known.repo, commit, [listed[name] for name in wanted], folder, args.workers)
    print0(
        f"{len(wanted) - 1} training shards and the validation shard are in {folder}, commit {commit[:12]}"
    )


if __name__ == "__main__":
    entry(main)
