"""The command mine: its whole chain at toy size, and what it makes of a text and says of a model."""

import gzip
import itertools
import json
import lzma
import math
import random
import re
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pytest

from nanochat.base.common import UserError
from nanochat.base.logbook import Logbook
from nanochat.commands import mid_train, mine
from nanochat.data.feed import eval_batches
from nanochat.data.shards import prepare
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval import baselines, own_text
from nanochat.eval.own_text import answer_lines, predictor_lines, sample_prompt
from nanochat.eval.tasks import text_questions
from nanochat.eval.tasks.common import Task
from nanochat.eval.tasks.text_questions import TextQuestions
from nanochat.eval.verbatim import longest_overlap, normalised
from nanochat.model.checkpoint import locate
from nanochat.model.stages import run_directory
from nanochat.train import chain, scaling

CPU = ["--device_type=cpu", "--dtype=float32"]


def story(seed: int, sentences: int) -> str:
    """Prose with names and dialogue."""
    rng = random.Random(seed)
    names, places = ["Mira", "Tobin", "Odo"], ["garden", "kitchen", "harbour", "tower"]
    things = ["lantern", "basket", "letter", "hammer", "ribbon", "candle"]
    lines = []
    for _ in range(sentences):
        name, thing, place = rng.choice(names), rng.choice(things), rng.choice(places)
        lines.append(
            rng.choice(
                [
                    f"In the morning {name} carried the old {thing} into the {place}.",
                    f"Nobody saw how the {thing} was left behind in the {place} that night.",
                    f'"Where is the {thing}?" asked {name}.\n"It is in the {place}," said the man.',
                ]
            )
        )
    return "\n".join(lines)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of text and one file of conversations, and toy stages on a fast machine."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(12):
        (texts / f"chapter{i}.txt").write_text(story(i, 40))
    talk = [{"role": "user", "content": "Ho?"}, {"role": "assistant", "content": "Ho."}]
    rows = [{"messages": [{**talk[0], "content": f"Ho {i}?"}, talk[1]]} for i in range(6)]
    (texts / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, value in {
        "CONVERSATIONS": 60,
        "MID_STEPS": 2,
        "SFT_STEPS": 1,
        "STAGE_SECONDS": 0.0,
        "CONVERSATIONS_PER_STEP": 2,
        "QUESTIONS": 3,
        "LEAST_SECONDS": 1.0,
        "LEAST_MINUTES": 1,
        "USEFUL_PASSES": 0.5,
        "EVERYDAY_TOKENS": 2000,
        "expected_speed": lambda knobs, **shape: (1e6, 1e10),
    }.items():
        monkeypatch.setattr(mine, name, value)
    monkeypatch.setattr(scaling, "SHAPES", ((1, 64),))
    monkeypatch.setattr(scaling, "EVERYDAY_TOKENS", 2000)
    return texts


@pytest.mark.usefixtures("offline")
def test_the_whole_chain_is_continued_after_an_interruption(place, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as m:
        m.setattr(mid_train, "main", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mine.main([str(place), "--minutes=3", *CPU])
    began = capsys.readouterr().out
    assert "more than 0.5 passes" in began and "the same command continues" in began
    diary = json.loads((tmp_path / "base/mine/mine.json").read_text())
    assert diary["done"] == ["reading", "conversations", "tokenizer", "base", "data of mid"]
    assert diary["notes"]["documents"] == 12 and diary["notes"]["conversations"] == 6
    (place / "chapter0.txt").write_text("changed")  # what was read is kept
    base = locate("base", "mine").path

    found = mine.main([str(place), "--minutes=3", *CPU])
    assert locate("base", "mine").path == base and locate("sft", "mine").step >= 1
    shown = capsys.readouterr().out
    assert "12 documents" in shown and "conversations: 6" in shown
    assert "nanochat chat_cli -g mine" in shown
    assert shown.count("copied: at most") == 3 and "Held-out questions" in shown
    assert "knobs" not in shown, "what the stages print belongs to the log file"
    assert set(found["bits_per_byte"]) == {"model", "after finetuning", "n-gram", "xz", "gzip"}
    assert found["own"]["kinds"] and found["embedded"]["n"] == 3
    mine.main([str(place), "--minutes=3", "--from=mine", "--model_tag=second", *CPU])
    second, first = locate("base", "second"), locate("sft", "mine")
    assert second.fingerprint == first.fingerprint and locate("sft", "second").step >= 1
    assert "taking over" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"was begun on .*texts: give the same text"):
        mine.main([str(tmp_path), *CPU])


def test_a_chain_that_is_killed_anywhere_continues(place, tmp_path, monkeypatch):
    """Before and after each time that the diary is written, at which nothing else is written."""

    class Killed(BaseException):
        pass

    save = chain.Diary.save
    moments = itertools.cycle([(2, True), (3, False), (3, True), (2, False), (4, False), (4, True)])
    for _ in range(40):
        calls, (moment, after) = itertools.count(1), next(moments)
        dead = []

        def dying(diary, calls=calls, moment=moment, after=after, dead=dead):
            last = next(calls) == moment
            if not dead and (after or not last):
                save(diary)
            if last:
                dead.append(True)
                raise Killed

        with monkeypatch.context() as m:
            m.setattr(chain.Diary, "save", dying)
            m.setattr(mine, "report", lambda knobs, folder: {})
            m.setattr(mine, "verdict", lambda *_: "")
            with suppress(Killed):
                mine.main([str(place), "--minutes=3", *CPU])
                break
    diary = json.loads((tmp_path / "base/mine/mine.json").read_text())
    assert diary["done"][-1] == "sft" and len({*diary["done"]}) == len(diary["done"]) == 8
    for stage, most in (("base", None), ("mid", 2), ("sft", 1)):
        found = locate(stage, "mine")
        assert found.meta["done"] and found.step == (most or found.step)
        assert not found.path.parent.with_name("mine.old").exists(), "no stage was begun twice"


def test_another_budget_plans_what_has_not_begun(place, tmp_path, monkeypatch, capsys):
    knobs = lambda **given: mine.MineKnobs(data=(str(place),), **given)  # noqa: E731
    diary = chain.Diary("mine", "mine")
    assert mine.budget(knobs(minutes=20.0), diary).minutes == 20
    (tmp_path / "base/checkpoints/base/mine/step_000007").mkdir(parents=True)
    (tmp_path / "base/checkpoints/mid/mine/step_000000").mkdir(parents=True)
    diary.lengths = {"base": "--max_minutes=8", "mid": "--max_minutes=5"}
    diary.notes |= {"data of mid": {}}
    diary.done = ["tokenizer", "data of mid"]
    diary.save()
    diary = chain.Diary("mine", "mine")
    assert mine.budget(knobs(), diary).minutes == 20, "as it was begun"
    assert len(diary.lengths) == 2 and "keeps" not in capsys.readouterr().err
    assert mine.budget(knobs(hours=1.0), diary).minutes == 60
    assert diary.lengths == {"base": "--max_minutes=8"} and diary.done == ["tokenizer"]
    assert "data of mid" not in diary.notes and diary.notes["minutes"] == 60
    said = capsys.readouterr().err
    assert "base_train is under way and keeps the length" in said and "(--max_minutes=8)" in said
    assert not (tmp_path / "base/checkpoints/mid/mine").exists(), "a run without a step is aside"


def test_a_dry_run_keeps_the_text_of_a_model(place, tmp_path, capsys):
    kept = tmp_path / "base/mine/mine/text.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    mine.main([str(place), "--dry_run"])
    assert kept.read_text() == "kept" and "12 documents" in capsys.readouterr().out
    assert [*kept.parent.iterdir()] == [kept]


def test_what_cannot_become_a_model_is_refused_at_once(place, tmp_path):
    for tag in ("my book", "../x"):
        with pytest.raises(UserError, match="cannot be a folder name"):
            mine.main([str(place), f"--model_tag={tag}"])
    assert not (tmp_path / "base").exists()
    with pytest.raises(UserError, match=r"chapter1.txt|chapter1 has a weight of 0.9.*leave"):
        mine.main([f"{place / 'chapter1.txt'}:0.9", f"{place / 'chapter2.txt'}:0.1", "--dry_run"])
    (tmp_path / "base/checkpoints/mid/quickstart/step_000007").mkdir(parents=True)
    with pytest.raises(UserError, match=r"mid/quickstart holds a model that nanochat mine has not"):
        mine.main([str(place), "--model_tag=quickstart"])


def test_speed_of_pretraining_where_the_last_start_trained_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with Logbook(run_directory("base", "t"), config={}, step=0) as book:
        book.log(7, kind="train", tok_per_sec=500.0)
        assert mine.pretrained("t") == {"speed": 500.0, "steps": 7}  # killed before its summary
        book.log(7, kind="summary", tok_per_sec=0.0)
        assert mine.pretrained("t") == {"speed": 500.0, "steps": 7}
        book.log(7, kind="summary", tok_per_sec=600.0)
        assert mine.pretrained("t") == {"speed": 600.0, "steps": 7}


def test_what_is_held_out_of_a_chat_is_in_no_conversation(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    rng = random.Random(1)
    nouns = ["sun", "moon", "tree", "river", "stone", "bird", "cloud"]

    def words():
        return " ".join(rng.choices(nouns, k=9))

    days = [
        f"{1 + i % 28:02}.{1 + i // 28:02}.21, 1{i % 9}:00 - Ada: {words()} {i}\n"
        f"{1 + i % 28:02}.{1 + i // 28:02}.21, 1{i % 9}:01 - Ben: {words()} {i}\n"
        for i in range(250)
    ]
    for name in ("chat.txt", "chat (1).txt"):  # a copy, as a phone makes them
        (tmp_path / name).write_text("".join(days))
    knobs = mine.MineKnobs(data=tuple(map(str, sorted(tmp_path.glob("*.txt")))), me="Ben")
    notes = mine.read_all(knobs, tmp_path / "out")
    own = (tmp_path / "out" / "own.jsonl").read_text()
    held_out = "\n".join(own_text.documents(mine.own_source(tmp_path / "out"), "val"))
    lines = [line.partition(": ")[2] for line in held_out.splitlines()]
    assert len(lines) > 4 and not any(line in own for line in lines)
    rows = own.splitlines()
    assert len(rows) == len(set(rows)) == notes["conversations"] > 150
    assert notes["conversation_bytes"] == len(own)


def test_of_much_text_the_first_is_used_and_the_inventory_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "texts").mkdir()
    for i in range(16):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(story(i, 40))
    knobs = mine.MineKnobs(data=(str(tmp_path / "texts"),))
    assert "are used" not in mine.read_all(knobs, tmp_path / "all")["inventory"][-1]
    monkeypatch.setattr(mine, "MOST_CHARACTERS", 25_000)
    for name in ("some", "again"):
        notes = mine.read_all(knobs, tmp_path / name)
        assert 25_000 <= notes["characters"] < 28_500
        assert "only the first 25k characters" in notes["inventory"][-1]
    everything, some, again = (
        (tmp_path / name / "text.jsonl").read_text() for name in ("all", "some", "again")
    )
    assert some == again and everything.startswith(some) and len(everything) > len(some)


@pytest.mark.parametrize("minutes", [10, 142])
def test_a_model_of_own_text_looks_back(minutes, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(mine, "expected_speed", lambda *_, **__: (1e4, 1e12))
    knobs = mine.MineKnobs(data=("x",), minutes=minutes)
    words = mine.plan_base(knobs, mine.Diary("mine", "m"), 10**6, 4096).split()
    assert "--lookback=on" in words, "llama.cpp could not run it anyway: digits are in twos"


def test_too_little_text_and_two_budgets(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "a.txt").write_text("Hello.")
    with pytest.raises(UserError, match="holds only 6 characters of text"):
        mine.main([str(tmp_path / "a.txt"), "--dry_run"])
    with pytest.raises(UserError, match="set two budgets"):
        mine.main([str(tmp_path / "a.txt"), "--minutes=3", "--hours=1"])
    with pytest.raises(UserError, match=r"2 minutes are too few .* --minutes=5 or more"):
        mine.main([str(tmp_path / "a.txt"), "--minutes=2"])
    with pytest.raises(UserError, match="--me=Bob writes in no chat of this text; there is none"):
        mine.main([str(tmp_path / "a.txt"), "--me=Bob"])
    (tmp_path / "a.txt").write_text("1/2/20, 9:00 - Ada: Hi\n1/2/20, 9:01 - Jo: Yes\n" * 9)
    with pytest.raises(UserError, match=r"--me=Bob .* a chat of Ada, Jo: Bob is not among them"):
        mine.main([str(tmp_path / "a.txt"), "--me=Bob", "--model_tag=chat"])
    (tmp_path / "b.txt").write_text(story(1, 90))
    with pytest.raises(UserError, match="--me=Bob writes in no chat"):  # not: begun on a.txt
        mine.main([str(tmp_path / "b.txt"), "--me=Bob"])
    with pytest.raises(UserError, match="needs your text"):
        mine.main([])


# ---- conversations


def made(kinds, count=60, seed=3, texts=None):
    return list(TextQuestions(texts or [story(9, 200)]).conversations(seed, kinds, count))


def test_conversations_are_reproducible_and_different():
    first, again = made(text_questions.KINDS, 300), made(text_questions.KINDS, 300)
    assert first == again != made(text_questions.KINDS, 300, seed=4)
    assert len({json.dumps(item["messages"]) for item in first}) == len(first)
    assert {item["kind"] for item in first} == set(text_questions.KINDS)


ASKED = r'(?:[^"]+?[?.]|[^"]+"[^"]+"\?) (.+)'  # a question about a passage, and the passage


@pytest.mark.parametrize("kind", text_questions.JUDGED)
def test_gold_is_right_and_what_it_is_about_is_in_the_text(kind):
    text = normalised(story(9, 200))
    items = made([kind])
    assert items
    for item in items:
        asked, gold = (message["content"] for message in item["messages"])
        answer = item["answer"]
        assert text_questions.is_right(item, gold) and text_questions.is_right(item, answer)
        assert not text_questions.is_right(item, f"no{answer}") and not text_questions.is_right(
            item, ""
        )
        assert kind == "complete" or not text_questions.is_right(item, f"{gold} or not")
        assert gold in text if kind == "complete" else answer in gold
        if kind == "complete":
            whole = re.split(r"How does this end\? |sentence: ", asked, maxsplit=1)[1]
        else:
            whole = re.fullmatch(ASKED, asked, re.S)[1]
        assert whole in text
        if kind in ("name", "follows", "speaker"):
            assert answer in whole
        if kind == "follows":
            assert gold.removeprefix('It says "').removesuffix('".') in whole.replace('"', "")
        if kind == "speaker":
            assert re.search(rf'" asked {answer}', whole)
        if kind == "complete":
            assert f"{whole} {gold}" in text


def test_a_passage_is_asked_about_several_times():
    several = 0
    for item in made(["passage"], 40):
        contents = [message["content"] for message in item["messages"]]
        passage = re.fullmatch(ASKED, contents[0], re.S)[1]
        asked = contents[0].removesuffix(passage).strip()
        assert passage in normalised(story(9, 200))
        for reply in contents[1::2]:
            (answer,) = re.fullmatch(r'(?:It \w+ "|The name is |It is )(.+?)"?\.', reply).groups()
            assert answer in passage.replace('"', "")
        assert len({asked, *contents[2::2]}) == len(contents) // 2 <= 4
        several += len(contents) > 4
    assert several > 10


def test_tell_begins_with_its_subject_and_who_said_it_is_said():
    for item in made(["tell"], 20):
        asked, reply = (message["content"] for message in item["messages"])
        (subject,) = re.search(r"(Mira|Tobin|Odo|[Tt]he \w+)[.?]$", asked).groups()
        assert subject.lower() in re.split(r"(?<=[.?!])[ \"]", reply)[0].lower()
    for item in made(["said"], 20):
        asked, reply = (message["content"] for message in item["messages"])
        words, name = asked.split('"')[1], reply.removesuffix(" said that.")
        assert f'"{words}" asked {name}' in normalised(story(9, 200))


def test_dialogues_are_turns_of_the_text():
    text = 'He came.\n"Who is it?" she asked.\n"Only me,"\nhe said, "as ever."\n' + "\nProse." * 9
    script = "ADA: Hello there.\nBEN: Good day.\nADA: Is it?\n"
    assert list(text_questions.dialogues(text)) == [["Who is it?", "Only me, as ever."]]
    assert list(text_questions.dialogues(script)) == [["Hello there.", "Good day.", "Is it?"]]
    assert list(text_questions.dialogues('"Alone," he said.\n' + "Prose.\n" * 9 + '"Later."')) == []
    items = made(["dialogue"], 1, texts=[text])
    assert [m["content"] for m in items[0]["messages"]] == ["Who is it?", "Only me, as ever."]


def test_abbreviations_end_no_sentence_and_are_no_names():
    text = (
        "Mr. Tobin met Mrs. Odo at noon. " * 3
        + "They and I spoke to J. Mira of it; I'll ask Mira's. " * 3
    )
    assert text_questions.SENTENCE_END.split(text)[:2] == [
        "Mr. Tobin met Mrs. Odo at noon.",
        "Mr. Tobin met Mrs. Odo at noon.",
    ]
    names = {
        w
        for w in ("Mr", "Mrs", "Tobin", "Mira", "They", "I", "I'll", "Mira's", "noon")
        if TextQuestions([text]).is_name(w)
    }
    assert names == {"Tobin", "Mira"}


def test_text_without_spaces():
    text = "他走进了花园。“你是谁？”她问。今天天气很好！" * 50
    found = list(text_questions.passages(text))
    assert len(found) > 3 and all(0 < len(p) <= text_questions.PASSAGE for p in found)
    assert "".join(found) == text, "whole sentences, and nothing between them"
    assert {*text_questions.SENTENCE_END.split(text)} == {
        "他走进了花园。",
        "“你是谁？”",
        "她问。",
        "今天天气很好！",
    }
    endless = "无" * 1000
    assert list(text_questions.passages(endless)) == [endless[: text_questions.PASSAGE]]
    assert made(["continue"], 5, texts=[text])
    for one in (text, endless, "短"):
        assert sample_prompt([one]) in one and 0 < len(sample_prompt([one])) <= 60
    assert sample_prompt([story(1, 40)]) in normalised(story(1, 40))


def test_texts_without_questions_make_none():
    assert made(text_questions.KINDS, texts=["Oh"]) == []
    assert text_questions.tasks([]) == []


# ---- copying and other predictors


def test_the_longest_overlap_against_all_substrings():
    rng = random.Random(0)
    for _ in range(50):
        corpus = "".join(rng.choices("ab c", k=200))
        sample = normalised("".join(rng.choices("ab c", k=30)))
        runs = {sample[i:j] for i in range(len(sample)) for j in range(i + 1, len(sample) + 1)}
        longest = max((len(run) for run in runs if run in normalised(corpus)), default=0)
        found = longest_overlap(sample, normalised(corpus))
        assert len(found.overlap) == longest and found.overlap in found.passage
        assert found.share == pytest.approx(longest / len(sample))
    assert longest_overlap("", "abc") == ("", 0.0, "")


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A source of 1,000 short documents."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    rows = [json.dumps({"text": f"{i}: {story(i, 2)}"}) for i in range(1000)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    return mine.own_source(tmp_path)


def test_of_a_large_text_documents_from_all_of_it_are_searched(many, monkeypatch):
    everything = own_text.documents(many, "train")
    held_out = own_text.documents(many, "val")
    size = sum(map(len, [*everything, *held_out]))
    assert own_text.share_read(many) == 1 and len(everything) + len(held_out) == 1000
    monkeypatch.setattr(own_text, "MOST_CHARACTERS", size // 10)
    some = own_text.documents(many, "train")
    assert sum(map(len, some)) == pytest.approx(size / 10, rel=0.1)
    for start in range(0, 900, 100):
        assert 5 <= len({*some} & {*everything[start : start + 100]}) <= 15
    assert own_text.documents(many, "val") == held_out
    sample = {"temperature": 1, "prompt": "A", "text": "B", "searched": own_text.share_read(many)}
    sample |= longest_overlap("B", "ABC")._asdict()
    assert "100% of it, looked for in 10% of the text)" in own_text.sample_lines([sample])[-1]
    assert "looked for" not in own_text.sample_lines([{**sample, "searched": 1.0}])[-1]


def test_all_predictors_get_the_same_held_out_text(many, monkeypatch):
    tokenizer = Tokenizer.train([story(1, 50)], 300)
    shards = prepare(many, "val", tokenizer)
    read = []
    monkeypatch.setattr(own_text, "ngram", lambda train, held_out: read.append(held_out) or 1.0)
    monkeypatch.setattr(own_text, "compressors", lambda train, held_out: {})
    for most in (shards.total, shards.total // 2):
        monkeypatch.setattr(own_text, "MOST_TOKENS", most)
        own_text.other_predictors(SimpleNamespace(tokenizer=tokenizer), many)
        targets = [
            batch.targets[batch.targets >= 0].numpy()
            for batch in eval_batches(shards, rows_per_batch=4, sequence_len=64, max_tokens=most)
        ]
        n_bytes = sum(int(tokenizer.token_bytes()[t].sum()) for t in targets)
        assert n_bytes == len(b"".join(read[-1].split(b"\n\n")))
    assert read[0] == "\n\n".join(own_text.documents(many, "val")).encode()
    assert len(read[1]) < 0.8 * len(read[0])


def by_hand(train: bytes, asked: bytes, orders: int) -> float:
    """The n-gram model of eval/baselines.py, count by count."""
    seen, text, bits = bytes(orders) + train, bytes(orders) + asked, 0.0
    for i in range(orders, len(text)):
        p = 1 / 256
        for k in range(orders + 1):
            context = text[i - k : i]
            after = Counter(seen[j] for j in range(orders, len(seen)) if seen[j - k : j] == context)
            if total := sum(after.values()):
                p = (after[text[i]] + len(after) * p) / (total + len(after))
        bits -= math.log2(p)
    return bits / len(asked)


@pytest.mark.parametrize("orders", [0, 1, 3])
def test_the_ngram_model_count_by_count(orders):
    train, asked = b"abracadabra, abracadabra and \xff", b"abra candles \x00"
    assert baselines.ngram(train, asked, orders) == pytest.approx(by_hand(train, asked, orders))


def test_compressors_are_charged_what_the_text_adds():
    train, asked = story(1, 100).encode(), story(2, 20).encode()
    found = baselines.compressors(train, asked)
    added = len(gzip.compress(train + asked, 9)) - len(gzip.compress(train, 9))
    assert found["gzip"] == 8 * added / len(asked)
    assert found["xz"] < 8 * len(lzma.compress(asked)) / len(asked), "it has seen such text"


def test_the_summary_is_honest():
    kinds = {
        "own/name": {"accuracy": 0.9, "n": 100, "lo": 0.82, "chance": 0.05},
        "own/speaker": {"accuracy": 0.45, "n": 100, "lo": 0.36, "chance": 0.4},
    }
    lines = answer_lines(kinds)
    cannot = next(i for i, line in enumerate(lines) if "cannot" in line)
    assert any("find the name" in line for line in lines[:cannot])
    assert any("who speaks" in line for line in lines[cannot:])
    slow = {"speed": 400.0, "expected_speed": 8000}
    assert "400 tokens per second" in mine.slow_lines(slow)[0]
    assert not mine.slow_lines({"speed": 5000.0, "expected_speed": 8000})
    bits = {"model": 2.0, "n-gram": 1.8, "xz": 3.0, "gzip": 3.5}
    text = "\n".join(predictor_lines(bits))
    assert "better than xz (a compressor) by a factor of 1.50" in text
    assert "no better than n-gram" in text


# ---- rules


def test_rules_for_small_corpora():
    sizes = [10**3, 3 * 10**5, 10**6, 3 * 10**6, 10**8, 10**10]
    found = [scaling.vocabulary_for(size) for size in sizes]
    assert found == sorted(found) and found[0] == 512 and found[-1] == 65_536
    assert scaling.shape_for(1e14, 1e5, 1024) == scaling.SHAPES[0], "the text limits it"
    assert scaling.shape_for(1e11, 1e9, 1024) == scaling.SHAPES[0], "the time limits it"
    assert scaling.shape_for(1e20, 1e11, 65_536) == scaling.SHAPES[-1]


def test_a_dash_is_no_word_to_complete():
    text = " ".join(
        f"He went — as it were — to the house number {i} — and came back." for i in range(80)
    )
    questions = TextQuestions([text])
    made = [questions.make_complete(random.Random(i)) for i in range(200)]
    items = [{**item, "kind": "complete"} for item in made if item]
    assert len(items) > 50
    for item in items:
        assert text_questions.is_right(item, Task.gold(item)) and not text_questions.is_right(
            item, ""
        )
