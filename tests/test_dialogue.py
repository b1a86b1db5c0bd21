"""Conversations as people keep them: chats of messengers, plain text, trees, tables, archives."""

import gzip
import json
import time
import zipfile

import pytest
from test_documents import read as read_text

from nanochat.base.common import UserError
from nanochat.data import conversations, dialogue
from nanochat.data.rows import Report
from nanochat.data.shapes import conversation
from nanochat.eval.tasks.data import read_items

CHAT = (
    "31.12.20, 21:41 - Messages and calls are end-to-end encrypted.\n"
    "31.12.20, 21:41 - Bob: Hello\n"
    "31.12.20, 21:42 - Ada: Hi, Bob\nHow are you?\n"
    "31.12.20, 21:43 - Bob: <Media omitted>\n"
    "31.12.20, 21:43 - Bob: Fine: thanks\n"
    "01.01.21, 09:00 - Ada: Good morning\n"
    "01.01.21, 09:01 - Bob: Happy new year\n"
    "01.01.21, 09:02 - Ada: To you too\n"
)
OTHER_CHAT = (
    "\u200e[12/31/2020, 9:41:05\u202fPM] Bob: Hello\n[12/31/2020, 9:42:00 PM] Ada: Hi, Bob\nHow are you?\n"
    "[12/31/2020, 9:43:00 PM] Bob: \u200eimage omitted\n[12/31/2020, 9:43:01 PM] Bob: Fine: thanks\n"
    "[1/1/2021, 9:00:00 AM] Ada: Good morning\n[1/1/2021, 9:01:00 AM] Bob: Happy new year\n"
    "[1/1/2021, 9:02:00 AM] Ada: To you too\n"
)
MESSAGES = [
    ("2020-12-31T21:41:00", "Bob", "Hello"),
    ("2020-12-31T21:42:00", "Ada", "Hi, Bob\nHow are you?"),
    ("2020-12-31T21:43:00", "Bob", "Fine: thanks"),
    ("2021-01-01T09:00:00", "Ada", "Good morning"),
    ("2021-01-01T09:01:00", "Bob", "Happy new year"),
    ("2021-01-01T09:02:00", "Ada", "To you too"),
]
TELEGRAM = {
    "name": "Bob",
    "type": "personal_chat",
    "messages": [
        {"type": "service", "date": "2020-12-31T20:00:00", "actor": "Bob", "action": "joined"},
        *(
            {
                "type": "message",
                "date": date,
                "from": who,
                "text": ["", {"type": "b", "text": text}],
            }
            for date, who, text in MESSAGES
        ),
        {"type": "message", "date": "2021-01-01T09:03:00", "from": "Bob", "text": ""},
    ],
}
DISCORD = {
    "guild": {"name": "G"},
    "channel": {"name": "c"},
    "messages": [
        {
            "timestamp": f"{date}.123+00:00",
            "content": text,
            "author": {"name": "x", "nickname": who},
        }
        for date, who, text in MESSAGES
    ],
}
SESSIONS = [
    [("user", "Hello"), ("assistant", "Hi, Bob\nHow are you?")],
    [
        ("user", ""),
        ("assistant", "Good morning"),
        ("user", "Happy new year"),
        ("assistant", "To you too"),
    ],
]


def turns(path, me=None, report=None):
    read = lambda p, r: conversations.read(p, r, me)  # noqa: E731
    items = read_items(conversation, [path], report, read)
    return [[(m["role"], m["content"]) for m in item["messages"]] for item in items]


def put(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return path


CHATS = {
    "one.txt": CHAT,
    "other.txt": OTHER_CHAT,
    "telegram.json": TELEGRAM,
    "all.json": {"about": "x", "chats": {"list": [TELEGRAM]}},
    "discord.json": DISCORD,
}


@pytest.mark.parametrize("name", CHATS)
def test_a_person_of_a_chat_becomes_the_assistant(tmp_path, name):
    path = put(tmp_path / name, CHATS[name])
    assert turns(path, "ada") == SESSIONS
    with pytest.raises(UserError, match=r"a chat of Ada, Bob: say who .* --me \"Ada\""):
        turns(path)
    with pytest.raises(UserError, match="Eve is not among them"):
        turns(path, "Eve")


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_text_too(tmp_path, name):
    text = read_text(put(tmp_path / name, CHATS[name]))
    assert text == [
        "Bob: Hello\nAda: Hi, Bob\nHow are you?\nBob: Fine: thanks",
        "Ada: Good morning\nBob: Happy new year\nAda: To you too",
    ]


def test_the_others_of_a_group_keep_their_names(tmp_path):
    path = put(tmp_path / "a.txt", CHAT.replace("09:01 - Bob", "09:01 - Eve"))
    assert turns(path, "Ada")[0][0] == ("user", "Bob: Hello")
    assert turns(path, "Ada")[1][2] == ("user", "Eve: Happy new year")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "User: Hi\nAssistant: Hello.\nYou again?\n\nUser: Yes\nAssistant: Good\n---\n"
            "User: Next\nAssistant: One\n",
            [
                [
                    ("user", "Hi"),
                    ("assistant", "Hello.\nYou again?"),
                    ("user", "Yes"),
                    ("assistant", "Good"),
                ],
                [("user", "Next"), ("assistant", "One")],
            ],
        ),
        (
            "Q: 1?\nA: 1\n\n\nQ: 2?\nA: 2",
            [[("user", "1?"), ("assistant", "1")], [("user", "2?"), ("assistant", "2")]],
        ),
        ("**Human:** Hi\n**AI:** Yo", [[("user", "Hi"), ("assistant", "Yo")]]),
    ],
)
def test_lines_that_begin_with_the_speaker(tmp_path, text, wanted):
    assert turns(put(tmp_path / "a.txt", text)) == wanted


def test_text_that_is_no_dialogue(tmp_path):
    for text in (
        "Once upon a time.",
        "Note: this is\nUser: nothing\nAssistant: x\n",
        "User: Hi\n",
        "",
    ):
        with pytest.raises(UserError, match="holds no conversations"):
            turns(put(tmp_path / "a.txt", text))
    with pytest.raises(UserError, match="holds text, not conversations"):
        turns(put(tmp_path / "a.jsonl", '{"text": "x"}\n'))


def test_names_of_a_script(tmp_path):
    path = put(tmp_path / "a.md", "Romeo: Hi\nJuliet: Hello\n")
    assert turns(path, "Juliet") == [[("user", "Hi"), ("assistant", "Hello")]]


ROWS = {
    "messages": {
        "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    },
    "ShareGPT": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "Alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "Dolly": {"instruction": "Q", "context": "", "response": "A", "category": "x"},
    "prompt and response": {"prompt": "Q", "response": "A"},
    "question and answer": {"question": "Q", "answer": "A"},
}


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("form", ["jsonl", "json", "gz", "zip"])
def test_shapes_are_counted(tmp_path, shape, form):
    path = tmp_path / f"a.{form if form != 'gz' else 'jsonl.gz'}"
    lines = "\n".join([json.dumps(ROWS[shape])] * 3)
    if form == "json":
        path.write_text(json.dumps([ROWS[shape]] * 3))
    elif form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("b/a.jsonl", lines)
            archive.writestr("README.txt", "Read me.")
    else:
        path.write_bytes(gzip.compress(lines.encode()) if form == "gz" else lines.encode())
    report = Report(limit=9)
    assert turns(path, report=report) == [[("user", "Q"), ("assistant", "A")]] * 3
    assert len(report.skipped) == (form == "zip")
    report = Report(limit=9)
    assert conversations.survey(path, report) == {shape: 3} and not report.problems


def test_a_table_of_questions_and_answers(tmp_path):
    path = put(tmp_path / "a.csv", 'Question,Answer\n"One?\nOr two?",Two\nB,C\n')
    assert turns(path) == [
        [("user", "One?\nOr two?"), ("assistant", "Two")],
        [("user", "B"), ("assistant", "C")],
    ]


def node(role, text, *replies, **more):
    return {"message_id": text, "role": role, "text": text, "replies": list(replies), **more}


TREE = node(
    "prompter",
    "Q",
    node(
        "assistant", "A", node("prompter", "Q2", node("assistant", "A2"), node("assistant", "A3"))
    ),
    node("assistant", "B", node("prompter", "never answered")),
)


def flat(message, parent=None):
    rest = {k: v for k, v in message.items() if k != "replies"}
    yield {**rest, "parent_id": parent, "message_tree_id": "Q"}
    for reply in message["replies"]:
        yield from flat(reply, message["message_id"])


@pytest.mark.parametrize("form", ["trees", "messages"])
def test_trees_of_openassistant(tmp_path, form):
    rows = [{"message_tree_id": "Q", "prompt": TREE}] if form == "trees" else list(flat(TREE))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    items = list(read_items(conversation, [path], None, conversations.read))
    said = [[(m["content"], m.get("weight", 1)) for m in item["messages"]] for item in items]
    assert said == [
        [("Q", 1), ("A", 1), ("Q2", 1), ("A2", 1)],
        [("Q", 1), ("A", 0), ("Q2", 1), ("A3", 1)],
        [("Q", 1), ("B", 1)],
    ], "each answer is learned once"


def test_replies_of_one_wording_in_a_tree_without_names_are_all_learned():
    again = {"role": "assistant", "text": "Yes."}
    question = {"role": "prompter", "text": "Sure?", "replies": [again]}
    tree = {"role": "prompter", "text": "Is it?", "replies": [{**again, "replies": [question]}]}
    (row,) = dialogue.tree_conversations(tree)
    assert [m.get("weight", 1) for m in row["messages"]] == [1, 1, 1, 1]


def test_all_problems_are_in_one_report(tmp_path):
    rows = [
        ROWS["messages"],
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [1]}]},
        {"nothing": 1},
        [],
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{broken")
    report = Report(limit=99)
    assert conversations.survey(path, report) == {"messages": 1}
    assert len(report.problems) == 7
    for line, reason in (
        (2, "the role 'robot'"),
        (3, "only text can be trained on"),
        (4, "must be text"),
        (5, "calls a tool"),
        (6, "a conversation is a list of messages"),
        (8, "invalid JSON"),
    ):
        assert any(f"line {line}: " in p and reason in p for p in report.problems), line


def test_times_of_a_chat_divide_it():
    chat = [dialogue.Message("a", "x", time) for time in (None, 0, 10, 30_000, None, 30_001)]
    assert [len(part) for part in dialogue.sessions(chat)] == [3, 3]
    assert dialogue.sessions([]) == []


def test_a_long_chat_becomes_several_conversations(tmp_path):
    lines = [f"1/2/20, 9:{i:02d} - {'Ada' if i % 3 else 'Bob'}: {i} {'x' * 300}" for i in range(60)]
    got = turns(put(tmp_path / "a.txt", "\n".join(lines)), "Ada")
    assert len(got) == 20, "18,000 characters"
    assert all(chat[0][0] == "user" and chat[-1][0] == "assistant" for chat in got)
    assert [text for chat in got for _, said in chat for text in said.split("\n\n")] == [
        line.split(": ", 1)[1] for line in lines
    ], "nothing is lost"


@pytest.mark.parametrize(
    "row",
    [
        {"type": "chat", "messages": [{"role": "user", "content": "Q"}, {"role": "x"}]},
        {"guild": {}, "channel": {}, "messages": []},
        {"type": "personal_chat", "messages": [{"type": "service", "action": "joined"}]},
        {"question": "q", "choices": {"label": None, "text": None}, "answerKey": "A"},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": "calculator"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": 3}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "weight": []}]},
        {"message_id": ["a"], "parent_id": None, "role": "prompter", "text": "Q"},
        {"message_id": "a", "parent_id": ["b"], "role": "prompter", "text": "Q"},
        {"message_id": None, "parent_id": None, "role": "prompter", "text": "Q"},
        {"messages": [{"role": "user", "content": "Q", "mask": {}}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("me", [None, "Ada"])
def test_a_row_that_nobody_meant_is_a_problem_and_no_crash(tmp_path, row, me):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [ROWS["messages"], row])))
    surveyed, read = Report(limit=99), Report(limit=99)
    assert conversations.survey(path, surveyed, me) == {"messages": 1}
    assert len(surveyed.problems) == 1 and "a.jsonl, line 2: " in surveyed.problems[0]
    assert len(turns(path, me, read)) == 1 and len(read.problems) == 1


def test_a_lone_surrogate_in_an_export(tmp_path):
    chat = json.dumps(TELEGRAM).replace("Happy new", "Happy \\ud83d new")
    (tmp_path / "a.json").write_text(chat)
    texts = read_text(tmp_path / "a.json")
    assert "Bob: Happy \ufffd new year" in texts[1] and "\n".join(texts).encode()


DIARY = """[2021-03-05 18:30] Went for a walk along the river and saw a heron.
[2021-03-06 19:10] Dinner at 19:30 with everybody from the house.
It rained all evening, so we stayed in.
[2021-03-07 08:15] Slept badly. The heron was there again.
[2021-03-08 21:00] Nothing happened today.
"""
LOG = """[2021-03-01 18:04:05] <bob> is anybody here: no
[2021-03-01 18:04:09] <ann> yes
[2021-03-01 18:05:00] * ann waves
[2021-03-01 18:06:00] <bob> see https://example.org
[2021-03-01 18:07:00] <ann> thanks
"""


@pytest.mark.parametrize("text", [DIARY, LOG], ids=["diary", "log"])
def test_what_has_times_and_no_speakers_stays_as_it_is(tmp_path, text):
    assert dialogue.chats_in_text(text) == [] == dialogue.chats_in_text(text, "Dinner at 19")
    (tmp_path / "a.txt").write_text(text)
    assert "".join(read_text(tmp_path / "a.txt")).strip() == text.strip()


def test_a_group_that_many_join_is_a_chat():
    joined = [f"01.03.21, 18:{i:02} - P{i} joined using this group's link" for i in range(35)]
    said = [f"02.03.21, 18:{i % 60:02} - Ada: message {i}" for i in range(50)]
    (chat,) = dialogue.chats_in_text("\n".join([*joined, *said]))
    assert len(chat) == 50


def test_a_dialogue_of_user_and_assistant_needs_nobody_of_that_name(tmp_path):
    path = tmp_path / "qa.txt"
    path.write_text("User: Hi\nAssistant: Hello!\n\n\nUser: Bye\nAssistant: See you.\n")
    for me in (None, "Ada"):
        rows = [row for _, row in conversations.read(path, Report(), me)]
        assert len(rows) == 2 and rows[0]["messages"][1]["content"] == "Hello!"


def test_a_long_reply_is_joined_once():
    line = "It was a quiet day, and nobody said a word about the boat that was gone by then."
    lines = ["Q: Why?", "A: So.", *[line] * 80_000]
    began = time.process_time()
    ((question, answer),) = dialogue.chats_in_text("\n".join(lines))
    assert question.text == "Why?" and answer.text == "\n".join(["So.", *lines[2:]])
    assert time.process_time() - began < 5, "to copy it for each line takes far longer"


def test_a_survey_of_other_rows_ends_early(tmp_path):
    talk, others = json.dumps(ROWS["messages"]), ['{"post": {"body": "x"}}'] * 2000
    path, report = tmp_path / "a.jsonl", Report(limit=9999)
    put(path, "\n".join([*others, talk]))
    assert conversations.survey(path, report) == {} and not report.problems
    put(path, "\n".join([talk, *others]))
    assert conversations.survey(path, report) == {"messages": 1} and len(report.problems) == 2000


def test_a_survey_names_no_more_problems_than_its_report_may_have(tmp_path):
    path, report = tmp_path / "a.jsonl", Report()
    put(path, '{"messages": [{"role": "robot", "content": "x"}]}\n' * 3000)
    assert conversations.survey(path, report) == {} and len(report.problems) < 1100


def test_a_file_that_is_deleted_while_it_is_read(tmp_path):
    path = put(tmp_path / "a.jsonl", json.dumps(ROWS["messages"]))
    rows = conversations.read(path, Report())
    next(rows)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        next(rows)
