"""chat_eval: intervals, pass@k, letters, independence of the batch, long prompts, little memory."""

import hashlib
import itertools
import math
import threading
import time
from dataclasses import replace

import pytest
import torch

from nanochat.base import logbook
from nanochat.base.common import UserError
from nanochat.chat.generate import Engine
from nanochat.commands import chat_eval as script
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval import chat as chat_eval
from nanochat.eval import sandbox as execution
from nanochat.eval import scores
from nanochat.eval.tasks.common import Task, choice, exchange, is_answer
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.model.stages import STAGES, run_directory
from nanochat.tinyworld.conversations import KINDS


@pytest.fixture(scope="module")
def engine():
    """An engine of a random tiny model, with no matrix at zero."""
    tok = Tokenizer.train(
        ["Which one is it? Answer with the letter alone. A B C D - one=A two=B three=C"], 300
    )
    model = GPT.build(
        GPTConfig(
            sequence_len=192, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32
        )
    )
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=g)
    return Engine(model.requires_grad_(False), tok)


def parity(item, reply):
    """A verdict that changes with every character of a reply."""
    return hashlib.sha256(reply.encode()).digest()[0] % 2 == 0


CHOICES = [
    choice("Which one?" + " Well?" * (i % 7), [f"{'x' * i}{j}" for j in range(2 + i % 4)], 0)
    for i in range(13)
]
FREE = [exchange("Say something" + ", please" * (i % 5), "!", answer="!") for i in range(13)]
CHOOSE = Task("choose", "choice", 0.25, lambda *_: CHOICES, is_answer)
SAY = Task("say", "generative", 0.5, lambda *_: FREE, parity, max_tokens=12)


def test_wilson_interval():
    assert scores.wilson(0, 0) == (0.0, 1.0)
    assert scores.wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)  # published
    assert scores.wilson(100, 100)[1] == 1.0 and scores.wilson(100, 100)[0] > 0.96


def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_one():
    for n, right in itertools.product((1, 4, 6), range(7)):
        for k in range(1, n + 1) if right <= n else ():
            draws = list(itertools.combinations([i < right for i in range(n)], k))
            assert scores.pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_results_of_several_samples():
    found = chat_eval.Verdicts([0, 3, 6, 1], samples=6, clipped=1, unfinished=2).result(chance=0.1)
    assert (
        found["accuracy"] == pytest.approx(10 / 24)
        and found["n"] == 4
        and found["lo"] < 10 / 24 < found["hi"]
    )
    assert list(found["pass"]) == ["2", "4", "6"] and (
        found["samples"],
        found["clipped"],
        found["unfinished"],
    ) == (6, 1, 2)
    assert found["pass"]["6"]["accuracy"] == 0.75 and found["pass"]["2"]["chance"] == pytest.approx(
        0.19
    )
    assert found["pass"]["2"]["accuracy"] == pytest.approx(
        (0 + (1 - 3 / 15) + 1 + (1 - 10 / 15)) / 4
    )
    assert "pass" not in chat_eval.Verdicts([1, 0], 1, 0).result(0.25)


def test_shares_of_right_samples_are_not_rounded_together():
    ten = scores.accuracy([0.25] * 10, 0.0)
    summary = scores.summarise({"a": ten, "b": scores.accuracy([0.5, 1.0], 0.0)})
    assert summary["accuracy"] == pytest.approx(4 / 12)
    assert scores.summarise({"a": ten})["accuracy"] == 0.25
    assert (summary["lo"], summary["hi"]) == pytest.approx(scores.wilson(4, 12))


def test_a_question_in_several_wordings_counts_once_in_the_interval():
    plain = scores.accuracy([1.0] * 82 + [0.0] * 18, 0.0)
    few = scores.accuracy([1.0] * 82 + [0.0] * 18, 0.0, different=22)
    assert few["accuracy"] == plain["accuracy"] == 0.82 and few["n"] == 100
    assert few["different"] == 22 and "different" not in plain
    assert (few["lo"], few["hi"]) == pytest.approx(scores.wilson(0.82 * 22, 22))
    assert few["lo"] < plain["lo"] < plain["hi"] < few["hi"]
    both = scores.summarise({"facts": few, "others": plain})
    same = scores.summarise({"facts": plain, "others": plain})
    assert both["accuracy"] == same["accuracy"] and both["hi"] - both["lo"] > 1.3 * (
        same["hi"] - same["lo"]
    )


def test_guessing_with_many_samples_hides_no_task():
    verdicts = chat_eval.Verdicts([3, 5], samples=64, clipped=0)
    result = verdicts.result(0.5)
    assert result["pass"]["64"]["chance"] == 1.0
    rows = [{"kind": "chat_eval", "step": 1, "kinds": {"counting": result}}]
    assert scores.stage_results({"sft": rows})["sft"]["kinds"] == {"counting": result}


def test_chatcore_is_the_mean_of_its_six_tasks_alone():
    by_task = {name: scores.accuracy([True, False], 0.25) for name in scores.CHATCORE}
    assert scores.summarise(by_task)["chatcore"] == pytest.approx(1 / 3)
    assert scores.summarise({**by_task, "facts": scores.accuracy([True], 0.0)})[
        "chatcore"
    ] == pytest.approx(1 / 3)
    del by_task["MMLU"]
    assert "chatcore" not in scores.summarise(by_task) and scores.summarise(by_task)[
        "centred"
    ] == pytest.approx(1 / 3)


def test_a_letter_is_scored_as_the_token_that_the_gold_reply_begins_with(engine):
    tok, model = engine.tokenizer, engine.model
    prompts = [tok.render_prompt(Task.prompt(item)) for item in CHOICES]
    chosen = chat_eval.choose_letters(engine, prompts, [item["letters"] for item in CHOICES])
    for item, ids, letter in zip(CHOICES, prompts, chosen, strict=True):
        ends = {
            x: {"messages": [*item["messages"][:-1], {"role": "assistant", "content": x}]}
            for x in item["letters"]
        }
        whole = {x: tok.render_conversation(conversation)[0] for x, conversation in ends.items()}
        assert all(w[: len(ids)] == ids for w in whole.values())
        logits = model.logits(model(torch.tensor([ids])))[0, -1]
        assert letter == max(item["letters"], key=lambda x: float(logits[whole[x][len(ids)]])), item
    assert len(set(chosen)) > 1


def test_a_letter_is_chosen_among_the_items_own_whatever_the_batch(engine):
    prompts = [engine.tokenizer.render_prompt(Task.prompt(item)) for item in CHOICES[:4]]
    letters = [["A", "B"], ["C"], ["B", "C", "D"], ["D", "A"]]
    alone = [
        chat_eval.choose_letters(engine, [ids], [row])[0]
        for ids, row in zip(prompts, letters, strict=True)
    ]
    assert chat_eval.choose_letters(engine, prompts, letters) == alone
    assert all(letter in row for letter, row in zip(alone, letters, strict=True))


def test_no_result_depends_on_how_many_are_asked_at_a_time(engine):
    for task, items, more in (
        (CHOOSE, CHOICES, {}),
        (SAY, FREE, {}),
        (SAY, FREE, {"num_samples": 3, "temperature": 1.0}),
        (SAY, FREE[:7], {"temperature": 0.7}),
    ):
        seen = [chat_eval.judge(engine, task, items, rows=rows, **more) for rows in (1, 4, 64)]
        assert seen[0] == seen[1] == seen[2]
        assert 0 < sum(seen[0].right) < len(items) * seen[0].samples
    sampled = {"num_samples": 3, "temperature": 1.0}
    few, many = (chat_eval.judge(engine, SAY, FREE[:n], **sampled).right for n in (5, 13))
    assert few == many[:5], "an item's samples are its own"
    assert chat_eval.judge(engine, SAY, FREE, seed=1, **sampled) != chat_eval.judge(
        engine, SAY, FREE, seed=2, **sampled
    )


def test_long_prompts_keep_their_end_and_are_counted(engine, capsys):
    context, tok = engine.model.config.sequence_len, engine.tokenizer
    items = [exchange("abc " * n, "!", answer="!") for n in (1, 20, 200)]
    lengths = [len(tok.render_prompt(Task.prompt(item))) for item in items]
    assert lengths[1] < context // 2 and lengths[2] > context
    seen: list[list[int]] = []

    class Spy(Engine):
        def generate_batch(self, prompts, *args, **kwargs):
            seen.extend(prompts)
            return super().generate_batch(prompts, *args, **kwargs)

    found = chat_eval.judge(Spy(engine.model, tok), SAY, items, max_tokens=1000)
    assert found.clipped == 1 and "1 of 3 prompts of say" in capsys.readouterr().err
    kept = max(seen, key=len)
    assert (
        len(kept) == context - context // 4
        and kept[0] == tok.bos
        and kept[-1] == tok.specials["<|assistant_start|>"]
    )
    assert found.result(0)["clipped"] == 1
    long = choice("Which? " * 200, ["a", "b"], 0)
    assert chat_eval.judge(engine, CHOOSE, [long, *CHOICES[:2]]).clipped == 1


def test_it_asks_fewer_at_a_time_when_memory_runs_out(engine, monkeypatch, capsys):
    expected, real, sizes = chat_eval.judge(engine, SAY, FREE), Engine.generate_batch, []

    def short_of_memory(self, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise RuntimeError("out of memory")
        return real(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate_batch", short_of_memory)
    assert chat_eval.judge(engine, SAY, FREE, rows=8) == expected
    assert sizes[:3] == [8, 4, 2] and "continuing with 2" in capsys.readouterr().err
    monkeypatch.setattr(
        Engine,
        "generate_batch",
        lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory")),
    )
    with pytest.raises(UserError, match="out of memory"):
        chat_eval.judge(engine, SAY, FREE, rows=2)


def test_tasks_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(execution, "missing", lambda: "")
    assert [
        t.name for t in script.named_tasks(["gsm8k", "ARC-Easy", "TinyWorld/Facts", "mmlu", "MMLU"])
    ] == [
        "GSM8K",
        "ARC-Easy",
        "tinyworld/facts",
        "MMLU",
    ]
    assert len(script.named_tasks(["tinyworld"])) == len(KINDS) == 8
    with pytest.raises(UserError, match=r"no task 'gsm9k' \(did you mean gsm8k\?\)"):
        script.named_tasks(["gsm9k"])
    with pytest.raises(UserError, match="is not a folder"):
        script.named_tasks(["gsm8k"], str(tmp_path / "x"))[0].items("val", 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/x is not a folder"):
        script.named_tasks(["gsm8k"], "~/x")[0].items("val", 1)
    without = [
        replace(t, missing=lambda: "get a sandbox") if t.name == "HumanEval" else t
        for t in script.TASKS
    ]
    monkeypatch.setattr(script, "TASKS", without)
    monkeypatch.setattr(script, "CHATCORE", without[:6])
    assert tuple(t.name for t in script.named_tasks(["all"])) == tuple(
        n for n in scores.CHATCORE if n != "HumanEval"
    )
    assert "skipping HumanEval: get a sandbox" in capsys.readouterr().err
    with pytest.raises(UserError, match="HumanEval: get a sandbox"):
        script.named_tasks(["humaneval"])
    with pytest.raises(UserError, match="samples the same answer"):
        script.main(["--num_samples=2"])


def logs(tag):
    return {stage: logbook.read(run_directory(stage, tag)) for stage in STAGES}


def test_the_table_shows_the_last_result_of_every_task_and_stage(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for stage, step, task, verdicts in (
        ("mid", 5, "MMLU", [1, 1]),
        ("sft", 8, "old", [1, 1]),
        ("sft", 9, "MMLU", [1, 0]),
        ("sft", 9, "MMLU", [0, 0]),
        ("sft", 9, "GSM8K", [3, 1]),
    ):
        samples = 4 if task == "GSM8K" else 1
        summary = scores.summarise({task: chat_eval.Verdicts(verdicts, samples, 0).result(0.25)})
        with logbook.Logbook(tmp_path / "checkpoints" / stage / "t") as log:
            log.log(kind="chat_eval", step=step, stage=stage, task=task, **summary)
    head, lines = scores.stage_table(scores.stage_results(logs("t")))
    assert head == ["task", "questions", "chance", "mid", "sft"]
    rows = {name: [cell.split(" ")[0] for cell in cells] for name, *cells in lines}
    assert rows["MMLU"] == ["2", "25%", "100.0%", "0.0%"] and rows["GSM8K"] == [
        "2",
        "25%",
        "",
        "50.0%",
    ]
    best = (1 + (1 - math.comb(3, 2) / math.comb(4, 2))) / 2
    assert rows["GSM8K pass@2"][3] == f"{best:.1%}" and "old" not in rows and "all" not in rows
    assert scores.stage_results(logs("nobody")) == {}


@pytest.mark.parametrize(("trained", "head"), [(1500, "sft"), (2000, "sft, step 1,500")])
def test_a_result_of_an_earlier_step_is_labelled(trained, head):
    result = chat_eval.Verdicts([1, 0], 1, 0).result(0.25)
    rows = [
        {"kind": "chat_eval", "step": 1500, "kinds": {"MMLU": result}},
        {"kind": "train", "step": trained},
    ]
    assert scores.stage_table(scores.stage_results({"sft": rows}))[0][3:] == [head]


def test_programs_are_judged_on_the_cpus_that_this_process_may_use(engine, monkeypatch):
    monkeypatch.setattr(chat_eval, "usable_cpus", lambda: 1)
    judges = set()

    def evaluate(item, reply):
        judges.add(threading.get_ident())
        time.sleep(0.005)  # during which another thread would begin
        return True

    chat_eval.judge(engine, replace(SAY, evaluate=evaluate), FREE)
    assert len(judges) == 1


def test_no_task_is_a_mistake():
    with pytest.raises(UserError, match="--tasks names no task: choose from all, tinyworld"):
        script.main(["-a", ""])
