"""The embedded corpus, on real output: golden hashes, speed, variety, grammar, held-out pairings."""

import hashlib
import itertools
import json
import random
import re
import time
from collections import Counter
from functools import cache
from pathlib import Path
from string import ascii_lowercase

import pytest

from nanochat.eval.tasks import tinyworld as task
from nanochat.eval.tasks.common import Task
from nanochat.tinyworld.conversations import EVERYDAY, KINDS, conversations, phrases
from nanochat.tinyworld.documents import documents
from nanochat.tinyworld.world import ATTRIBUTES, Draw, article, choices, held_out, world

# Enough to show every wording; more conversations of val would take long, since it has few facts.
DOCUMENTS, CONVERSATIONS = {"train": 20_000, "val": 3000}, {"train": 20_000, "val": 1500}


@cache
def docs(split="train"):
    return list(itertools.islice(documents(0, split), DOCUMENTS[split]))


@cache
def conversation_list(split="train"):
    return list(itertools.islice(conversations(0, split), CONVERSATIONS[split]))


def sha256(texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def test_the_corpus_has_not_changed_by_a_byte():
    """Models and results are compared across versions only as long as the corpus stays the same."""
    golden = json.loads((Path(__file__).parent / "golden" / "tinyworld.json").read_text())
    found = {}
    for split in ("train", "val"):
        found[f"documents/{split}"] = sha256(docs(split)[:2000])
        mixed = map(json.dumps, conversation_list(split)[:1000])
        found[f"conversations/{split}/all"] = sha256(mixed)
        for kind in KINDS:
            items = itertools.islice(conversations(0, split, [kind]), 50)
            found[f"conversations/{split}/{kind}"] = sha256(map(json.dumps, items))
    assert found == golden


def text_of(item):
    contents = (m["content"] for m in item["messages"])
    return "\n".join(
        c if isinstance(c, str) else "\n".join(part["text"] for part in c) for c in contents
    )


def test_choices_and_articles():
    assert choices("a [b|c[d|]] e") == ["a b e", "a cd e", "a c e"]
    assert choices("x | y z") == ["x", "y z"]
    assert [article(w) for w in ("apple", "kite", "umbrella", "orange ring")] == [
        "an apple",
        "a kite",
        "an umbrella",
        "an orange ring",
    ]


def test_streams_are_seeded_and_reject_unknown_splits():
    again = list(itertools.islice(documents(0, "train"), 300))
    other = list(itertools.islice(documents(1, "train"), 300))
    assert again == docs()[:300] != other
    assert list(itertools.islice(conversations(0, "val"), 100)) == conversation_list("val")[:100]
    with pytest.raises(ValueError, match="'test'"):
        next(documents(0, "test"))
    with pytest.raises(ValueError, match="poetry"):
        next(conversations(0, "train", ["poetry"]))


def test_documents_are_all_different_and_val_is_not_in_train():
    train, val = set(docs()), set(docs("val"))
    assert len(train) == 20_000 and len(val) == 3000 and not train & val
    mean = sum(map(len, train)) / len(train)
    assert 300 < mean < 700 and min(map(len, train)) >= 120 and max(map(len, train)) < 2400


def test_conversations_are_all_different_and_val_is_not_in_train():
    train, val = (
        {text_of(x) for x in conversation_list()},
        {text_of(x) for x in conversation_list("val")},
    )
    assert len(train) == 20_000 and len(val) == 1500 and not train & val


def test_vocabulary_is_wide_and_simple():
    words = set(re.findall(r"[a-z]+", " ".join(docs()).lower()))
    assert 1500 <= len(words) < 3000


def test_speed():
    """Several times faster on an idle core: this only catches a blunder."""
    world(), phrases()
    for stream, size, least in (
        (documents(9), len, 3),
        (conversations(9), lambda x: len(text_of(x)), 1.5),
    ):
        rates = [0.0]  # of up to three measurements: a busy machine is slower
        while max(rates) <= least and len(rates) <= 3:
            start, n = time.process_time(), 0
            while n < 1_000_000:
                n += size(next(stream))
            rates.append(n / 1e6 / (time.process_time() - start))
        assert max(rates) > least, rates


@pytest.mark.parametrize("split", ["train", "val"])
def test_grammar(split):
    text = (
        "\n".join(docs(split)[:5000])
        + "\n"
        + "\n".join(map(text_of, conversation_list(split)[:5000]))
    )
    for pattern in (
        r"(?<!letter )(?<!letters )(?<!=)\b[Aa] [aeiou]\w+",
        r"\b[Aa]n (?!hour)[^aeiou\W]",
        r"%\(",
        r"[{}\[\]|<>]",
        r"  ",
        r" [.,;!?]",
        r"\bone (?!is|was|has)\w+s\b",
        r"\b1 times\b",
        r"\b(\w{2,}) \1\b",
        r"[.!?] [a-z]",
        r"\bNone\b",
        r",,|\.\.|\?\.|!\.",
    ):
        bad = [
            m.group()
            for m in re.finditer(pattern, text)
            if m.group() not in ("A a", "had had", "a one", "a occurs")
        ]
        assert not bad, (
            pattern,
            bad[:5],
            [text[m.start() - 60 : m.end() + 40] for m in re.finditer(pattern, text)][:2],
        )


def test_nobody_meets_themself():
    for text in docs()[:8000]:
        for name, other in re.findall(r"\b([A-Z]\w+) and ([A-Z]\w+)\b", text):
            assert name != other, text
        assert not re.search(
            r'"[^"]*\b([A-Z][a-z]+)[.!?,]+" (?:said|asked) \1\b',
            re.sub(r'"I am [A-Z]\w+', "", text),
        ), text


def test_no_held_out_pairing_is_ever_shown_in_train():
    w = world()
    things, colours, places = w.classes["thing"], w.classes["colour"], w.data["places"]
    coloured = re.compile(rf"\b({'|'.join(colours)}) ({'|'.join(things)})\b")
    lies = re.compile(rf"\b({'|'.join(things)}) (?:is|was) ({'|'.join(w.classes['spot'])})")
    thing = rf"(?:an? |the )(?:(?:{'|'.join(colours)}) )?({'|'.join(things)})\b"
    owns = re.compile(rf"\b({'|'.join(w.people)}) (?:has|had|bought|found|sold|gave away) {thing}")
    at = re.compile(rf"\b({'|'.join(w.people)}) is ({'|'.join(places.values())})")
    where = {v: k for k, v in places.items()}
    seen = 0
    for text in itertools.chain(docs(), map(text_of, conversation_list())):
        for pattern in (coloured, lies, owns):
            for a, b in pattern.findall(text):
                seen += 1
                assert not held_out(a, b), (a, b, text)
        for a, b in at.findall(text):
            assert not held_out(a, where[b]), (a, b, text)
    assert seen > 10_000


def test_no_held_out_question_is_ever_asked_in_train():
    w, p = world(), phrases()
    forbidden = {
        q % {"P": name}
        for name in w.people
        for a in ATTRIBUTES
        if held_out(name, a)
        for q in p["facts"][a][0]
    }
    forbidden |= {
        q % {"w": x} for x in w.words if held_out(x, "spelling") for q in p["spelling"]["ask"]
    }
    forbidden |= {
        q % {"w": x, "l": c}
        for x in w.words
        for c in ascii_lowercase
        if held_out(x, c)
        for q in p["spelling"]["count"]
    }
    kinds = {
        q % {"k": k, "a k": article(k)} for k in w.data["kinds"] for q in p["choice"]["member"]
    }
    lettered = 0
    for text in itertools.chain(docs(), map(text_of, conversation_list())):
        for line in text.split("\n"):
            line = line.removeprefix("Question: ")
            assert line not in forbidden, text
        for a, op, b in re.findall(r"\b(\d+) (plus|minus|times|divided by|[-+*/]) (\d+)", text):
            assert not held_out(a, b), (a, op, b, text)
        asked_and_answered = r"(.*)\n((?:- .*=[A-D]\n)+)(?:[A-Z].*[.?]\n)?(?:Answer: )?(?:.*\. )?The answer is .*=([A-D])\."
        if "The answer is" not in text:
            continue
        for question, options, answer in re.findall(asked_and_answered, text):
            if question.removeprefix("Question: ") in kinds:
                option = re.search(rf"- (.*)={answer}", options)
                assert option and not held_out(option.group(1), w.kind_of[option.group(1)]), text
                lettered += 1
    assert lettered > 500
    val = [x for x in conversation_list("val") if x["kind"] in ("facts", "spelling")]
    # And in val nothing else is asked.
    assert all(x["messages"][-2]["content"] in forbidden for x in val)


def test_no_option_in_train_is_one_that_is_never_right_there():
    """What is never the right option would be learned to be wrong, and val asks for just that."""
    w, wordings, seen = world(), phrases()["choice"], Counter()
    never = {
        "opposite": {x for pair in w.data["opposites"].items() if held_out(*pair) for x in pair},
        "first": {x for x in w.words if held_out(x, "first letter")},
        "member": {x for x, kind in w.kind_of.items() if held_out(x, kind)},
    }
    beginnings = {sort: tuple(x.partition("%")[0] for x in wordings[sort]) for sort in never}
    for item in conversation_list():
        question, *options = item["messages"][-2]["content"].split("\n- ")
        sort = next((sort for sort in never if question.startswith(beginnings[sort])), None)
        if item["kind"] == "choice" and sort:
            seen[sort] += 1
            assert not {x.partition("=")[0] for x in options} & never[sort], item
    assert len(seen) == 3 and min(seen.values()) > 300, seen


def test_every_key_is_accepted_and_every_corruption_is_not():
    rng = random.Random(0)
    w = world()
    others = {
        "context": w.people
        + w.classes["colour"]
        + w.classes["thing"]
        + w.classes["spot"]
        + w.classes["place"]
        + w.classes["number"]
    }
    for item in conversation_list("val") + conversation_list()[:4000]:
        kind, answer, reply = item["kind"], item["answer"], Task.gold(item)
        assert task.evaluate(item, reply), item
        assert Task.prompt(item)["messages"][-1]["role"] == "user"
        wrong = ["", "I do not know.", "."]
        if kind == "choice":
            wrong += [x for x in item["letters"] if x != answer]
            wrong += [
                " ".join(item["letters"]),
                f"{answer} {item['letters'][0]}",
                answer.lower(),
                f"a=A, b=B, c=C, d={answer}",
            ]
            wrong += [reply.replace(f"={answer}", f"={x}") for x in item["letters"] if x != answer]
            wrong += [
                f"The answer is something={answer}.",
                f"={answer}",
            ]  # the right letter of another option
            _, said, option = reply.rpartition("The answer is ")
            asked = item["messages"][-2]["content"] + "\n"
            assert task.evaluate(item, answer) and f"- {option[:-1]}\n" in asked
            assert task.evaluate(item, f"It is easy to see. {said}{option}")
            wrong += [  # two answers, or letters that are no reason
                f"The answer is another. {said}{option}",
                f"{option} {said}{option}",
                f"A. B. {answer}",
            ]
            assert (
                item["letters"] == list("ABCD")[: len(item["letters"])]
                and answer in item["letters"]
            )
        elif kind in ("arithmetic", "twostep", "counting"):
            n = int(answer)
            wrong += [
                reply.replace(answer, str(n + 1)),
                f"{n + 1}",
                f"{n}{n}",
                f"{reply} Or {n + 2}.",
                f"{n - 1} {n} {n + 1}",
            ]
            wrong = [x for x in wrong if x != reply]
            assert item["messages"][-1]["content"][1]["text"] == answer
        elif kind == "spelling":
            wrong += [
                reply.replace(answer, x)
                for x in (answer[:-2], answer + "-s", answer.replace("-", ""), f"{answer} {answer}")
            ]
        else:
            assert re.search(rf"\b{answer}\b", reply, re.I), item
            rivals = [
                x for x in (others.get(kind) or w.people + w.classes["colour"]) if x not in reply
            ]
            wrong += [
                re.sub(rf"\b{answer}\b", "something", reply, flags=re.I),
                f"It is not {answer}.",
            ]
            same = next((c for c in w.classes.values() if answer in c and len(c) < 60), None)
            if same:
                other = rng.choice([x for x in same if x != answer])
                wrong += [reply.replace(answer, other), f"{answer} {other}", f"{answer} or {other}"]
            wrong += [" ".join(rivals)]
        for bad in wrong:
            assert not task.evaluate(item, bad), (item, bad)


def test_sums_in_two_steps_are_shown_with_one_sign_and_asked_with_two_as_well():
    """Two signs are left to RL; a pair of numbers asked in val is summed nowhere in train."""
    shown = [x for x in conversation_list() if x["kind"] == "twostep"]
    asked, val = (task.TASKS["twostep"].items(split, 600) for split in ("train", "val"))
    sums = lambda items: [x["messages"][-1]["content"][0]["text"] for x in items]  # noqa: E731
    mixed = lambda items: sum("+" in s and "-" in s for s in sums(items))  # noqa: E731
    assert len(shown) == 434 and 0 < mixed(shown) < 12
    for items in (asked, val):
        assert {re.sub(r"\d", "", s) for s in sums(items)} == {
            "++",
            "+-",
            "-+",
            "--",
        } and 400 < mixed(items) < 500
        assert all(
            task.evaluate(x, Task.gold(x))
            and not task.evaluate(x, Task.gold(x).replace(x["answer"], "1"))
            for x in items
        )
    pairs = lambda items: [list(itertools.pairwise(re.findall(r"\d+", s))) for s in sums(items)]  # noqa: E731
    assert all(held_out(*first) for first, _ in pairs(val))
    assert not any(held_out(*pair) for both in pairs(shown + asked) for pair in both)


def test_items_are_balanced_and_chance_levels_are_honest():
    got = task.items("val", 800, seed=1)
    assert {k: sum(x["kind"] == k for x in got) for k in task.KINDS} == dict.fromkeys(
        task.KINDS, 100
    )
    letters = task.TASKS["choice"].items("val", 3000, 0)
    assert (
        abs(sum(1 / len(x["letters"]) for x in letters) / len(letters) - task.KINDS["choice"])
        < 0.02
    )
    for n in (2, 3, 4):  # the right letter is uniform
        right = [x["answer"] for x in letters if len(x["letters"]) == n]
        for letter in "ABCD"[:n]:
            assert abs(right.count(letter) / len(right) - 1 / n) < 0.06
    for kind in (
        "facts",
        "smalltalk",
        "counting",
        "arithmetic",
        "twostep",
    ):  # nothing beats chance by always saying the same
        n = 500 if kind == "facts" else 1500  # more different questions about facts are rare
        answers = [x["answer"] for x in task.TASKS[kind].items("val", n, 0)]
        assert (
            max(answers.count(a) for a in set(answers)) / len(answers) <= task.KINDS[kind] + 0.02
        ), kind


def test_the_world_is_consistent():
    w = world()
    assert len(w.people) == 40 and len(set(w.attributes["petname"].values())) == 40
    assert set(w.attributes["home"].values()) == set(w.data["villages"])
    assert sum(held_out(p, a) for p in w.people for a in ATTRIBUTES) in range(12, 45)


def test_everyday_conversations_claim_nothing_of_the_world():
    made = list(itertools.islice(conversations(0, "train", EVERYDAY), 3000))
    assert {item["kind"] for item in made} == set(EVERYDAY)
    said = [
        m["content"] for item in made for m in item["messages"] if isinstance(m["content"], str)
    ]
    assert not [text for text in said if re.search("little world|ten villages|tell stories", text)]
    assert "You are welcome." in said and "I am well, thank you." in said


def test_a_pack_keeps_nothing_that_never_fits():
    def dealt(draw, always):
        rule = lambda n: n % 50 == 0  # noqa: E731
        return [draw.deal("some", range(100), rule, always) for _ in range(60)]

    slow, quick = (Draw(0, "val", "here") for _ in range(2))
    assert dealt(slow, False) == dealt(quick, True)
    assert len(quick.packs["some"]) < 100 < len(slow.packs["some"])


def test_a_kind_ends_when_it_has_no_new_questions(monkeypatch):
    monkeypatch.setattr("nanochat.tinyworld.conversations.FRUITLESS", 2000)
    items = list(conversations(0, "val", kinds=("spelling",)))
    assert 2000 < len(items) <= 2604 and len({item["answer"] for item in items}) == 14
    mixed = list(itertools.islice(conversations(0, "val", kinds=("spelling", "arithmetic")), 6000))
    assert len(mixed) == 6000 and mixed[-1]["kind"] == mixed[-2]["kind"] == "arithmetic"
