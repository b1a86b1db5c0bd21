"""
Train a small chat model from nothing on the embedded corpus, and ask it questions.

    nanochat quickstart                   all planned steps, 30 minutes at most
    nanochat quickstart --minutes 8       stops after 8 minutes; the model learns less
    nanochat quickstart --minutes 25      after a shorter run has ended: trains its model further

The four stages run in this process, and what they print goes to a log file. If interrupted, the
same command continues. From midtraining on, talk to the newest stage in another terminal at any
time: nanochat chat_cli
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

from nanochat.base import logbook
from nanochat.base.common import UserError, entry, human, print0
from nanochat.base.knobs import knob, parse
from nanochat.model.stages import STAGES, run_directory, step_folders
from nanochat.train.chain import Chain, Diary, expected_speed
from nanochat.train.knobs import MachineKnobs
from nanochat.train.scaling import split_budget


class Lesson(NamedTuple):
    """A stage of the chain."""

    title: str
    steps: int
    step_tokens: int  # tokens of pretraining that take as long as one of these steps
    flags: str

    @property
    def work(self) -> int:
        """The work of the stage, in tokens of pretraining; a time budget is split by it."""
        return self.steps * self.step_tokens


STEP_TOKENS = 4096
LESSONS = {
    "base": Lesson(
        "pretraining",
        375,
        STEP_TOKENS,
        "--data tinyworld@9 --depth=4 --model_dim=256 --head_dim=64 --sequence_len=256 "
        f"--total_batch_size={STEP_TOKENS} --lookback=on --warmdown_ratio=1 --final_lr_frac=0",
    ),
    "mid": Lesson(
        "midtraining",
        540,
        STEP_TOKENS,
        "--data tinyworld@32000:0.6 --text tinyworld@9:0.4 "
        f"--total_batch_size={STEP_TOKENS} --lr_scale=0.5 --warmdown_ratio=1",
    ),
    "sft": Lesson(
        "finetuning",
        112,
        2 * STEP_TOKENS,
        "--data tinyworld@10000 --conversations_per_step=64 --init_lr_frac=0.5 --warmdown_ratio=1",
    ),
    "rl": Lesson(
        "reinforcement",
        30,
        3 * STEP_TOKENS,
        "--tasks tinyworld/twostep --questions_per_step=16 --samples=8 --init_lr_frac=0.1 "
        "--eval_items=64",
    ),
}
# (share of the steps above, accuracy on held-out questions), as measured (dev/LOG.md)
LEARNED = (0.5, 0.90), (1.0, 0.95)
SPREAD = 0.03  # another seed may answer this much less
TOKENIZER = "--data tinyworld@4 --vocab_size=2048"
QUESTIONS = 800
BUDGET = "minutes", "target"
MOST_MINUTES = 30.0
OPENING_SECONDS = 75.0  # of all stages together: imports, data, compiling
CLOSING_SECONDS = 25.0  # questions at the end
ASKED = "context", "facts", "arithmetic"  # a question of each kind after every stage


@dataclass(kw_only=True)
class QuickstartKnobs(MachineKnobs):
    """Quickstart"""

    minutes: float = knob(
        0.0, "time for everything (0 = what --target takes, at most 30 minutes)", low=0, high=1e5
    )
    target: float = knob(
        0.9, "share of the questions that it should answer; not with --minutes", low=0.3, high=0.95
    )
    seconds_used: float = knob(0.0, "seconds spent before this command started", low=0)
    model_tag: str = knob("quickstart", "name of the model's folders")


# ---- what is planned


def speed_here(knobs: QuickstartKnobs) -> tuple[float, float]:
    """As expected_speed, for the model that this command trains."""
    return expected_speed(knobs, vocab_size=2048, sequence_len=256, n_head=4, n_kv_head=4)


def expectation(share: float) -> str:
    """What can be expected of a run with this share of the steps, as text to print."""
    known = ", ".join(f"{part:.0%} of the steps gave {accuracy:.0%}" for part, accuracy in LEARNED)
    return f"{share:.0%} of the planned steps (right answers when it was measured: {known})"


def budget(
    knobs: QuickstartKnobs, origins: dict[str, str], diary: Diary
) -> tuple[QuickstartKnobs, bool]:
    """
    (knobs, whether the budget has changed). If neither --minutes nor --target is given now, they
    are those with which the chain was begun. The diary stores them.
    """
    given = [name for name in BUDGET if origins[name] != "default"]
    if len(given) > 1 and knobs.minutes:
        raise UserError(
            f"--minutes={knobs.minutes:g} and --target={knobs.target:g} set two budgets: give one"
        )
    if not given:
        knobs = replace(knobs, **diary.notes.get("budget", {}))
    asked = {name: getattr(knobs, name) for name in BUDGET}
    changed = diary.notes.get("budget", asked) != asked
    diary.notes["budget"] = asked
    return knobs, changed


def seconds_left(stage: str, tag: str) -> float:
    """The seconds that a stage still takes at its speed so far; 0 if it has no step."""
    row = logbook.newest(run_directory(stage, tag), "train")
    return row["seconds"] * (1 / row["progress"] - 1) if row.get("progress") else 0.0


def plan(
    knobs: QuickstartKnobs, diary: Diary, stages: Sequence[str] = tuple(LESSONS)
) -> dict[str, str]:
    """
    {stage: flag of its length}: minutes with --minutes or on a slow machine, else steps. Prints
    what to expect. UserError if the time is too short.
    """
    speed, peak = speed_here(knobs)
    seconds = sum(LESSONS[stage].work for stage in stages) / speed
    seconds += OPENING_SECONDS * len(stages) / len(LESSONS)
    under_way = [stage for stage in LESSONS if stage not in (*stages, *diary.done)]
    fixed = diary.seconds + CLOSING_SECONDS
    fixed += sum(seconds_left(stage, diary.tag) for stage in under_way)
    share = next((s for s, accuracy in LEARNED if accuracy - SPREAD >= knobs.target), 1.0)
    minutes = knobs.minutes or (fixed + share * seconds) / 60
    print0(
        f"this machine: {peak / 1e12:.2g} TFLOP/s of matrix products, about {human(speed)} tokens "
        "per second"
    )
    if not knobs.minutes and minutes <= MOST_MINUTES:
        print0(f"about {minutes:.0f} minutes for {expectation(share)}")
        steps = {stage: max(1, round(share * LESSONS[stage].steps)) for stage in stages}
        return {stage: f"--num_iterations={count}" for stage, count in steps.items()}
    minutes = min(minutes, knobs.minutes or MOST_MINUTES)
    share = (60 * minutes - fixed) / seconds
    if share <= 0:
        raise UserError(
            f"{minutes:g} minutes are too few, because {fixed / 60:.1f} are already used or needed "
            "for the questions at the end: give more with --minutes"
        )
    print0(f"{minutes:g} minutes are enough for {expectation(share)}")
    return by_time(60 * minutes - fixed, stages)


def by_time(seconds: float, stages: Sequence[str] = tuple(LESSONS)) -> dict[str, str]:
    """{stage: --max_minutes of it} in a time budget; never 0, which would mean no limit."""
    split = split_budget(seconds, {stage: LESSONS[stage].work for stage in stages})
    return {stage: f"--max_minutes={max(0.01, t / 60):.2f}" for stage, t in split.items()}


def plan_further(knobs: QuickstartKnobs, diary: Diary) -> dict[str, str]:
    """
    {stage: flags of its length} to train a finished chain further: midtraining becomes longer, and
    the later stages start again. UserError without enough time, or without the pretrained model.
    """
    from nanochat.model.checkpoint import new_run

    seconds = 60 * knobs.minutes - diary.seconds - CLOSING_SECONDS
    if seconds < 60:
        raise UserError(
            f"the model {knobs.model_tag} has trained for {diary.seconds / 60:.1f} minutes: to "
            f"train it further, give --minutes of at least {diary.seconds / 60 + 3:.0f}, which "
            "includes these"
        )
    base = run_directory("base", knobs.model_tag)
    if not step_folders(base):
        raise UserError(
            f"the pretrained model, from which it would be trained further, is not in {base} any "
            "more: begin another one with --model_tag=NAME"
        )
    lengths = by_time(seconds)
    flag, _, before = diary.lengths["mid"].partition("=")
    added_minutes = sum(float(lengths[stage].split("=")[1]) for stage in ("base", "mid"))
    before = float(before.split()[0])  # without the --new_horizon of an earlier such command
    if flag == "--max_minutes":
        longer = f"{before + added_minutes:.2f}"
    else:
        rows = logbook.by_kind(run_directory("mid", knobs.model_tag))
        row = rows.get("summary", rows["train"])  # no summary if it was killed at the end
        steps_per_second = row["step"] / row["seconds"]
        longer = f"{before + 60 * added_minutes * steps_per_second:.0f}"
    for stage in ("sft", "rl"):
        with new_run(run_directory(stage, knobs.model_tag)):
            pass  # the stage will open the new run
    return {**lengths, "mid": f"{flag}={longer} --new_horizon=stretch"}


# ---- what a person sees


def sample_answers(knobs: QuickstartKnobs, stage: str) -> str:
    """What the newest checkpoint of a stage answers to a question of each kind in ASKED."""
    from nanochat.commands.summary import exchanges
    from nanochat.eval.tasks import tinyworld

    items = [tinyworld.TASKS[kind].items("val", 1, seed=1)[0] for kind in ASKED]
    return "\n".join(
        f"    {' '.join(question.split())}\n    > {' '.join(reply.split())}"
        for question, reply, _ in exchanges(knobs, stage, knobs.model_tag, items)
    )


def verdict(summary: dict[str, Any], knobs: QuickstartKnobs, minutes: float) -> str:
    """What works and what does not, and how to go on, as text to print."""
    kinds = sorted(summary["kinds"].items(), key=lambda kind: -kind[1]["accuracy"])
    lines = ["", f"It answers {summary['accuracy']:.1%} of {summary['n']} questions it never saw."]
    lines += [
        f"    {name:<11} {result['accuracy']:4.0%}   (guessing: {result['chance']:.0%})"
        for name, result in kinds
    ]
    tag = short_tag = ""
    if knobs.model_tag != QuickstartKnobs.model_tag:
        tag, short_tag = f" --model_tag {knobs.model_tag}", f" -g {knobs.model_tag}"
    if not knobs.minutes and summary["accuracy"] < knobs.target:
        weak = ", ".join(name for name, r in kinds if r["accuracy"] < knobs.target)
        lines.append(f"That is below the target of {knobs.target:.0%}: it is weak in {weak}.")
    lines += [
        "",
        f"to train it further:  nanochat quickstart --minutes {1.5 * minutes:.0f}{tag}",
        f"to talk to it:        nanochat chat_cli{short_tag}     (in a browser: "
        f"nanochat serve{short_tag})",
    ]
    return "\n".join(lines)


# ---- the chain


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    knobs, origins = parse(QuickstartKnobs, argv, command="quickstart")
    print0("loading torch")
    tag = knobs.model_tag
    diary = Diary("quickstart", tag, knobs.seconds_used)
    knobs, changed = budget(knobs, origins, diary)
    if "questions" in diary.done and origins["minutes"] != "default" and knobs.minutes:
        diary.lengths, diary.done = plan_further(knobs, diary), ["tokenizer", "base"]
    elif changed or len(diary.lengths) < len(LESSONS):
        diary.replan()
    if missing := [stage for stage in LESSONS if stage not in diary.lengths]:
        diary.lengths |= plan(knobs, diary, missing)
    chain = Chain(diary)
    print0(f"(details: {diary.log})\n")
    from nanochat.commands import chat_eval, tok_train

    tok_train.in_chain(chain, lambda: tok_train.main(TOKENIZER.split()))
    for stage, lesson in LESSONS.items():
        command = import_module(f"nanochat.commands.{STAGES[stage].command}").main
        trained = chain.train(stage, lesson.title, command, knobs, tag, lesson.flags)
        if trained and STAGES[stage].chats:
            print0(sample_answers(knobs, stage))
    ask = ["-i", "rl", "-g", tag, f"--num_items={QUESTIONS}"]
    if "questions" in diary.done:  # nothing is left to train, so they are asked again
        diary.done.remove("questions")
    summary = chain.step("questions", "questions", lambda: chat_eval.main(ask)) or {}
    print0(verdict(summary, knobs, diary.seconds / 60))
    return summary


if __name__ == "__main__":
    entry(main)
