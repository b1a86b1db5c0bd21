"""
The tasks: rows of every layout become items, gold answers are accepted and corrupted ones are not,
data comes from a folder or the hub.
"""

import json
import os
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.base.common import UserError
from nanochat.data import hub
from nanochat.data.rendering import checked_messages
from nanochat.eval import sandbox
from nanochat.eval.tasks import (
    arc,
    gsm8k,
    humaneval,
    identity,
    mmlu,
    smoltalk,
    spellingbee,
)
from nanochat.eval.tasks.common import choice

SHARED = Path(
    os.environ.get("NANOCHAT_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared/data"
)
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the folder with real data is not here"
)
needs_sandbox = pytest.mark.skipif(
    bool(sandbox.missing()), reason=sandbox.missing() or "there is a sandbox"
)

GSM8K = [
    {
        "question": "A hat costs $8. What do 3 cost?",
        "answer": "They cost 3*8 = $<<3*8=24>>24.\n#### 24",
    },
    {
        "question": "Half of 2,500?",
        "answer": "It is 2500/2 = <<2500/2=1250.00>>1,250.\nSo <<which is=>>it is.\n#### 1,250",
    },
    {"question": "And below zero?", "answer": "Simply -3.50.\n#### -3.50"},
]
PROBLEM = '''import math
from typing import List

def area(r: float) -> float:
    """ The area of a circle. """
'''
HUMANEVAL = [
    {
        "prompt": PROBLEM,
        "entry_point": "area",
        "canonical_solution": "    half = math.pi / 2\n    return 2 * half * r * r\n",
        "test": "def check(candidate):\n    assert candidate(0) == 0\n"
        "    assert abs(candidate(1) - 3.14159) < 1e-4\n",
    }
]
MMLU = """question,choice0,choice1,choice2,choice3,answer
What is 2+2?,3,4,5,6,1
"A, or
B?","a
b",c,d,e,0
"""
ARC = [
    {
        "id": question,
        "question": question,
        "choices": {"text": options.split(), "label": list(labels)},
        "answerKey": key,
    }
    for question, options, labels, key in (
        ("Which is wet?", "sand water wood stone", "ABCD", "B"),
        ("Which flies?", "dog cat owl cow", "1234", "3"),
        ("Which one?", "a b c d e", "ABCDE", "E"),
        ("Of three?", "x y z", "123", "1"),
    )
]
BUNDLE = [{"query": "Question: Which is wet?", "choices": ["sand", "water"], "gold": 1}]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """A folder of small files for every task."""
    files = {
        "gsm8k/train.jsonl": lines(GSM8K * 3),
        "gsm8k/test.jsonl": lines(GSM8K),
        "humaneval/HumanEval.jsonl": lines(HUMANEVAL),
        "mmlu/dev/history_dev.csv": MMLU,
        "mmlu/test/history_test.csv": MMLU,
        "mmlu/test/law_test.csv": MMLU,
        "bundle/world/arc_easy.jsonl": lines(BUNDLE),
        "arc_easy/train.jsonl": lines(ARC),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


# --- layouts


def test_items_of_every_layout(folder):  # labels 1-4 and E
    easy, csv_ = arc.EASY.items("train", 0, 0, folder), mmlu.TASK.items("val", 0, 0, folder)
    assert {tuple(i["letters"]) for i in easy} == {tuple("ABCD"), tuple("ABCDE"), tuple("ABC")}, (
        "letters only those that exist"
    )
    by_question = {i["messages"][0]["content"].split("\n")[0]: i["answer"] for i in easy}
    assert by_question == {
        "Which is wet?": "B",
        "Which flies?": "C",
        "Which one?": "E",
        "Of three?": "A",
    }
    (of_bundle,) = arc.EASY.items("val", 0, 0, folder)
    assert (
        of_bundle["messages"][0]["content"].startswith("Which is wet?\n- sand=A\n- water=B\n")
        and of_bundle["answer"] == "B"
    )
    assert len(csv_) == 4 and {i["answer"] for i in csv_} == {"A", "B"}
    assert any("\n- a b=A\n" in i["messages"][0]["content"] for i in csv_), "an option is one line"
    assert len(mmlu.TASK.items("train", 0, 0, folder)) == 2
    assert len(gsm8k.TASK.items("val", 2, 0, folder)) == 2
    assert gsm8k.TASK.items("train", 3, 5, folder) == gsm8k.TASK.items("train", 5, 5, folder)[:3]
    with pytest.raises(UserError, match="humaneval has no train split"):
        humaneval.TASK.items("train", 1, 0, folder)
    with pytest.raises(UserError, match="is not a folder"):
        gsm8k.TASK.items("val", 1, 0, folder / "nowhere")


def test_calculations_become_calls_of_the_tool():
    first, second, third = (gsm8k.item(row)["messages"][1]["content"] for row in GSM8K)
    assert [(p["type"], p["text"]) for p in first] == [
        ("text", "They cost 3*8 = $"),
        ("python", "3*8"),
        ("python_output", "24"),
        ("text", "24.\n#### 24"),
    ]
    assert [p["text"] for p in second if p["type"] != "text"] == ["2500/2", "1250"], (
        "as the calculator says it, or not at all"
    )
    assert third == [{"type": "text", "text": "Simply -3.50.\n#### -3.50"}]


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("#### 1,250", True),
        ("So $1,250.00.\n#### $1250.0", True),
        ("####1250 dollars", True),
        ("#### 1250\n#### 1,250", True),
        ("1250", False),
        ("#### 1251", False),
        ("#### 1250 or 1251", False),
        ("#### 1250\n#### 7", False),
        ("####", False),
        ("#### 12.50", False),
    ],
)
def test_numbers_are_compared_and_hedges_are_wrong(reply, right):
    assert gsm8k.evaluate(gsm8k.item(GSM8K[1]), reply) is right


def test_choice_refuses_what_is_no_question():
    for bad in (
        ("q", ["a"], 0),
        ("q", ["a", "b"], 2),
        ("q", ["a", "b"], -1),
        ("q", ["a", 3], 0),
        (None, ["a", "b"], 0),
    ):
        with pytest.raises(ValueError, match=r"not text|2 to 26 options|counted from 0"):
            choice(*bad)


# --- a malformed row stops the reading


@pytest.mark.parametrize(
    ("task", "split", "file", "text", "says"),
    [
        (
            gsm8k.TASK,
            "val",
            "gsm8k/test.jsonl",
            lines(GSM8K[:1]) + "{]\n",
            "test.jsonl, line 2: invalid JSON",
        ),
        (
            gsm8k.TASK,
            "val",
            "gsm8k/test.jsonl",
            "\n" + lines(GSM8K[:1]) + "[1]\n",
            "test.jsonl, line 3: expected an object, got a list",
        ),
        (
            gsm8k.TASK,
            "val",
            "gsm8k/test.jsonl",
            lines([*GSM8K[:2], {"question": "q"}]),
            "line 3: it has no 'answer'",
        ),
        (
            gsm8k.TASK,
            "train",
            "gsm8k/train.jsonl",
            lines([*GSM8K, {**GSM8K[0], "answer": "5"}]),
            "train.jsonl, line 4: the answer must",
        ),
        (
            mmlu.TASK,
            "val",
            "mmlu/test/law_test.csv",
            MMLU + "Which?,a,b,c,d,7\n",
            "law_test.csv, line 6: the answer is option 7 of 4",
        ),
        (
            mmlu.TASK,
            "val",
            "mmlu/test/law_test.csv",
            MMLU + "Which?,a,b,c,d\n",
            "law_test.csv, line 6: expected 6 fields",
        ),
        (
            mmlu.TASK,
            "val",
            "mmlu/test/law_test.csv",
            MMLU + "Which?,a,b,c,d,A\n",
            "law_test.csv, line 6: invalid literal",
        ),
        (
            arc.EASY,
            "train",
            "arc_easy/train.jsonl",
            lines([*ARC, {**ARC[0], "answerKey": "F"}]),
            "train.jsonl, line 5: 'F' is not in list",
        ),
        *(
            (arc.EASY, "train", "arc_easy/train.jsonl", lines([*ARC, row]), "line 5: ")
            for row in (
                {**ARC[0], "answerKey": "99"},
                {**ARC[0], "answerKey": "²"},
                {**ARC[0], "answerKey": 7},
                {**ARC[0], "choices": {"label": [1, 2], "text": ["a", "b"]}},
            )
        ),
        (
            arc.EASY,
            "val",
            "bundle/world/arc_easy.jsonl",
            lines([{**BUNDLE[0], "gold": 2}]),
            "arc_easy.jsonl, line 1: the answer is option 2",
        ),
        (
            humaneval.TASK,
            "val",
            "humaneval/HumanEval.jsonl",
            lines([{**HUMANEVAL[0], "test": ""}]),
            "HumanEval.jsonl, line 1: the prompt must",
        ),
    ],
)
def test_a_malformed_row_is_named_and_goes_no_further(folder, task, split, file, text, says):
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(says)):
        task.items(split, 1, 0, folder)


def test_files_that_cannot_be_read(folder):
    (folder / "gsm8k/test.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: invalid JSON"):
        gsm8k.TASK.items("val", 0, 0, folder)
    (folder / "mmlu/all").mkdir()
    (folder / "mmlu/all/test-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"cannot read .*parquet"):
        mmlu.TASK.items("val", 0, 0, folder)
    pq.write_table(
        pa.Table.from_pylist(
            [{"question": "q", "choices": ["a", "b"], "answer": a} for a in (0, 1, 2)]
        ),
        folder / "mmlu/all/test-00000-of-00001.parquet",
    )
    with pytest.raises(UserError, match="parquet, row 3: the answer is option 2 of 2"):
        mmlu.TASK.items("val", 0, 0, folder)


# --- gold is accepted, corrupted gold is not


def wrong_answers(task, item):
    """Replies that are near the gold one and wrong."""
    gold = task.gold(item)
    if task.kind == "choice":
        others = [x for x in item["letters"] if x != gold]
        return [
            "",
            *others,
            gold.lower(),
            f"{gold}{others[0]}",
            f"{gold} or {others[0]}",
            " ".join(item["letters"]),
            "Z",
        ]
    if task is gsm8k.TASK:
        n = gsm8k.Decimal(item["answer"])
        said = (
            gold.replace("####", ""),
            f"{gold}\n#### {n + 1}",
            re.sub(r"####.*", f"#### {n + 1}", gold),
        )
        return ["", *said, f"#### -{abs(n) + 1}", gold + "1"]
    answer = item["answer"]
    if item["kind"] == "count":
        return [
            "",
            gold.replace(answer, str(int(answer) + 1)),
            f"{gold} Or {int(answer) + 1}.",
            f"{answer}{answer}1",
            "none",
        ]
    return [
        "",
        gold.replace(answer, answer[:-2]),
        gold.replace(answer, answer + "-q"),
        f"{gold} {answer}",
        answer.replace("-", ""),
    ]


def check_all(task, items):
    assert items
    for item in items:
        gold = task.gold(item)
        assert task.evaluate(item, gold) and task.evaluate(item, f" {gold}\n"), item
        assert task.prompt(item) == {"messages": item["messages"][:-1]} and checked_messages(
            task.prompt(item)
        )
        for wrong in wrong_answers(task, item):
            assert not task.evaluate(item, wrong), (item, wrong)


def test_every_gold_answer_is_accepted_and_every_corruption_is_not(folder):
    check_all(arc.EASY, arc.EASY.items("train", 0, 0, folder) + arc.EASY.items("val", 0, 0, folder))
    check_all(mmlu.TASK, mmlu.TASK.items("val", 0, 0, folder))
    check_all(gsm8k.TASK, gsm8k.TASK.items("train", 0, 0, folder))
    check_all(
        spellingbee.TASK,
        spellingbee.TASK.items("val", 0) + spellingbee.TASK.items("train", 2000, 1),
    )


@needs_shared
@pytest.mark.parametrize(
    ("task", "split", "rows"),
    [
        (arc.EASY, "val", 2376),
        (arc.CHALLENGE, "val", 1172),
        (mmlu.TASK, "val", 14_042),
        (mmlu.TASK, "train", 285),
        (gsm8k.TASK, "val", 1319),
        (gsm8k.TASK, "train", 7473),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_the_same_over_all_rows(task, split, rows):
    items = task.items(split, 0, 0, SHARED)
    assert len(items) == rows
    check_all(task, items)


@needs_shared
def test_mmlu_has_57_subjects():
    assert len(mmlu.DATA.files("val", SHARED)) == 57


def code_of(item):
    """The gold program without its fence, and its body."""
    code = humaneval.TASK.gold(item).removeprefix("```python\n").removesuffix("```")
    return code, code.removeprefix(item["messages"][0]["content"])


def replies(item):
    """The gold solution in the forms that a model may give it in."""
    code, body = code_of(item)
    start = code.index("def ")
    return {
        "fenced": f"Sure:\n```python\n{code}```\nIt is right.",
        "not closed": f"```\n{code}",
        "plain": code,
        "prose": f"So:\n\n{code}",
        "no imports": code[start:],
        "body": body,
        "fenced body": f"```py\n{body}```",
        "body, first line not indented": body.strip(),
        "second block": f"```\npip install\n```\nthen\n```python\n{code}```",
        "fenced, a constant first": f"```python\nLIMIT = 3\n\n{code}\nassert LIMIT\n```",
        "fenced, a script": f"```python\n{code}\nif __name__ == '__main__':\n    input()\n```",
    }


def test_a_code_block_is_kept_whole_and_prose_around_a_program_is_cut_off():
    item = humaneval.item(HUMANEVAL[0])
    forms = {form: humaneval.program(item, reply) for form, reply in replies(item).items()}
    assert "LIMIT = 3" in forms["fenced, a constant first"]
    assert "Sure" not in forms["fenced"] and "So:" not in forms["prose"]


@needs_sandbox
def test_programs_are_found_in_replies_and_run():
    item = humaneval.item(HUMANEVAL[0])
    for form, reply in replies(item).items():
        assert humaneval.evaluate(item, reply), form
    dedented = "half = math.pi / 2\nreturn 2 * half * r * r"
    assert humaneval.evaluate(item, dedented)
    code, _ = code_of(item)
    for wrong in (
        "",
        "pass",
        code.replace("2 *", "3 *"),
        code + "\nexit(0)\n",
        "import os\nos._exit(0)",
        "no code",
        "```python\n```",
    ):
        assert not humaneval.evaluate(item, wrong), wrong


@needs_shared
def test_every_form_of_every_humaneval_solution_is_a_program():
    items = humaneval.TASK.items("val", 0, 0, SHARED)
    assert len(items) == 164
    for item in items:
        for form, reply in replies(item).items():
            if "def " in reply or form == "fenced body":
                compile(humaneval.program(item, reply), form, "exec")


@pytest.mark.slow
@needs_shared
@needs_sandbox
def test_humaneval_solutions_pass_and_empty_bodies_fail():
    items = humaneval.TASK.items("val", 0, 0, SHARED)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert all(pool.map(lambda i: humaneval.evaluate(i, humaneval.TASK.gold(i)), items))
        assert not any(pool.map(lambda i: humaneval.evaluate(i, "    pass\n"), items))


# --- what is generated


def test_spelling_bee_is_seeded_and_no_word_is_in_both_splits():
    train, val = (
        list(islice(spellingbee.conversations(3, split), 3000)) for split in ("train", "val")
    )
    assert (
        train
        == list(islice(spellingbee.conversations(3, "train"), 3000))
        != list(islice(spellingbee.conversations(4, "train"), 3000))
    )
    words = {split: set(spellingbee.words(split)) for split in ("train", "val")}
    assert (
        not words["train"] & words["val"] and len(words["train"]) > 1000 and len(words["val"]) > 100
    )
    for items, split in ((train, "train"), (val, "val")):
        for item in items:
            assert words[split] & set(
                re.findall(r"[a-z]{3,}", item["messages"][0]["content"].lower())
            ), item
    counts = [i["answer"] for i in val if i["kind"] == "count"]
    assert max(counts.count(a) for a in set(counts)) / len(val) < spellingbee.TASK.chance + 0.02, (
        "always the same answer is chance"
    )
    with pytest.raises(ValueError, match="split"):
        next(spellingbee.conversations(0, "test"))


def test_identity_says_the_name_that_it_is_given():
    train, val = (
        list(islice(identity.conversations(0, split, "Ada"), 1000)) for split in ("train", "val")
    )
    assert train == list(islice(identity.conversations(0, "train", "Ada"), 1000))
    texts = [checked_messages(c)[-1]["content"] for c in train]
    assert sum("Ada" in t for t in texts) > 700 and not any(
        re.search(r"[{}\[\]|]|  |nanochat,? am|Claude", t) for t in texts
    )
    asked = [{c["messages"][0]["content"] for c in part} for part in (train, val)]
    assert len(asked[0]) > 250 and not asked[0] & asked[1]
    assert not any(
        "Claude" in q["messages"][0]["content"]
        for q in islice(identity.conversations(0, "train", "claude"), 2000)
    )


# --- from the hub


class Hub(ThreadingHTTPServer):
    """The hub's API as far as a fetch needs it; `files` holds {repository: {path: bytes}}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests = {}, []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        if m := re.fullmatch(r"/api/datasets/([\w-]+/[\w-]+)/revision/(\w{40})", self.path):
            body = json.dumps({"id": m[1], "sha": m[2]}).encode()
        elif m := re.fullmatch(
            r"/api/datasets/([\w-]+/[\w-]+)/tree/\w{40}\?recursive=true.*", self.path
        ):
            files = self.server.files[m[1]]
            body = json.dumps(
                [
                    {"type": "file", "path": path, "size": len(b), "oid": "0"}
                    for path, b in files.items()
                ]
            ).encode()
        elif m := re.fullmatch(r"/datasets/([\w-]+/[\w-]+)/resolve/\w{40}/(.+)", self.path):
            body = self.server.files[m[1]][m[2]]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Hub()
    questions = [
        {"question": f"q{i}", "subject": "", "choices": list("abcd"), "answer": i % 4}
        for i in range(6)
    ]
    conversations = [
        {
            "messages": [
                {"content": "Hi", "role": "user"},
                {"content": str(i), "role": "assistant"},
            ],
            "source": "x",
        }
        for i in range(3)
    ]
    server.files = {
        "openai/gsm8k": {
            f"main/{s}-00000-of-00001.parquet": parquet(GSM8K) for s in ("train", "test")
        }
        | {"socratic/test-0.parquet": b""},
        "allenai/ai2_arc": {
            f"ARC-{c}/{s}-00000-of-00001.parquet": parquet(ARC)
            for c in ("Easy", "Challenge")
            for s in ("train", "test")
        },
        "cais/mmlu": {
            f"all/{s}-00000-of-00001.parquet": parquet(questions)
            for s in ("test", "auxiliary_train", "dev")
        },
        "openai/openai_humaneval": {
            "openai_humaneval/test-00000-of-00001.parquet": parquet(HUMANEVAL)
        },
        "HuggingFaceTB/smol-smoltalk": {
            f"data/train-{i:05d}-of-00002.parquet": parquet(conversations) for i in range(2)
        },
    }
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(hub, "BACKOFF", 0.001)
    monkeypatch.setattr(
        "time.sleep", lambda seconds: None
    )  # huggingface_hub waits before it retries
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_data_sets_come_from_the_hub_once_at_the_pinned_commit(server, tmp_path, monkeypatch):
    tasks = {gsm8k.TASK: 3, arc.EASY: 4, arc.CHALLENGE: 4, mmlu.TASK: 6, humaneval.TASK: 1}
    for task, n in tasks.items():
        assert len(task.items("val", 0)) == n
    assert [i["answer"] for i in arc.EASY.items("train", 0)].count("E") == 1
    conversations = smoltalk.DATA.items("train", 0)
    assert len(conversations) == 6 and checked_messages(conversations[0])
    assert not any(
        "socratic" in path or "dev-" in path for path in server.requests if "/resolve/" in path
    ), "only what is needed"
    for d in (gsm8k.DATA, mmlu.DATA, humaneval.DATA, smoltalk.DATA, *arc.DATA.values()):
        assert (
            json.loads((tmp_path / "base/task_data" / d.name / "manifest.json").read_text())[
                "commit"
            ]
            == d.commit
        )
        assert any(f"{d.repo}/revision/{d.commit}" in path for path in server.requests)
    server.requests.clear()
    assert len(gsm8k.TASK.items("val", 0)) == 3 and server.requests == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert len(mmlu.TASK.items("val", 0)) == 6, "what is here needs no network"
    (tmp_path / "base/task_data/gsm8k/main/train-00000-of-00001.parquet").unlink(missing_ok=True)
    with pytest.raises(
        UserError, match=r"cannot fetch .*; or name a folder that holds gsm8k with --task_dir"
    ):
        gsm8k.TASK.items("train", 1)


def test_a_folder_comes_first_and_the_hub_fills_what_it_lacks(server, folder, capsys):
    assert len(gsm8k.TASK.items("train", 0, 0, folder)) == 9 and server.requests == []
    assert len(arc.CHALLENGE.items("val", 0, 0, folder)) == 4
    assert "arc_challenge.jsonl: using allenai/ai2_arc from the hub" in capsys.readouterr().err
    del server.files["cais/mmlu"]["all/test-00000-of-00001.parquet"]
    with pytest.raises(UserError, match="cais/mmlu has no all/test-"):
        mmlu.TASK.items("val", 0)


def test_items_are_drawn_alike(folder):
    random.seed(1)
    one = mmlu.TASK.items("val", 3, 7, folder)
    random.seed(2)
    assert one == mmlu.TASK.items("val", 3, 7, folder) != mmlu.TASK.items("val", 3, 8, folder)
