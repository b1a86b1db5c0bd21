"""Conversations in the shapes that people have, turns that are masked, and clear refusals."""

import json

import pytest

from nanochat.base.common import UserError
from nanochat.data.conversations import read
from nanochat.data.rendering import checked_messages, conversation_pieces
from nanochat.data.rows import Report
from nanochat.data.shapes import conversation, left_out, shape_of
from nanochat.eval.tasks.common import choice

Q, A = "Is it?", "It is."
WANTED = [("user", Q), ("assistant", A)]


def turns(row):
    return [(m["role"], m["content"]) for m in conversation(row)["messages"]]


def learned(row):
    pieces = conversation_pieces(checked_messages(conversation(row)))
    return "".join(p.text for p in pieces if p.supervised)


def messages(role="role", content="content", user="user", assistant="assistant"):
    return [{role: user, content: Q}, {role: assistant, content: A}]


@pytest.mark.parametrize(
    "row",
    [
        messages(),
        {"messages": messages(), "id": 1},
        {"conversations": messages("from", "value", "human", "gpt")},
        {"conversations": messages()},
        {"conversation": messages("from", "value", "human", "chatgpt")},
        {"messages": messages(user="Human", assistant="Assistant")},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, *messages()[1:]]},
        {"prompt": Q, "response": A},
        {"prompt": Q, "completion": A},
        {"instruction": Q, "input": "", "output": A},
        {"instruction": Q, "context": "", "response": A, "category": "closed_qa"},
        {"question": Q, "answer": A},
        {"input": Q, "output": A},
    ],
)
def test_usual_shapes(row):
    assert turns(row) == WANTED
    assert learned(row) == A + "<|assistant_end|>"


OPTIONS = ["red", "green", "dark blue", "none"]
BY_LETTER = dict(zip("ABCD", OPTIONS, strict=True))


@pytest.mark.parametrize(
    "row",
    [
        {"question": Q, **{f"choice{i}": t for i, t in enumerate(OPTIONS)}, "answer": "2"},  # MMLU
        {"question": Q, "choices": OPTIONS, "answer": 2, "subject": "hues"},  # MMLU of the hub
        {"question": Q, "choices": {"label": [*"ABCD"], "text": OPTIONS}, "answerKey": "C"},  # ARC
        {"question": Q, "choices": {"label": [*"1234"], "text": OPTIONS}, "answerKey": "3"},
        {"Prompt": Q, **BY_LETTER, "E": "", "Answer": "c"},
        {"question": Q, "options": BY_LETTER, "answer": "dark blue", "answer_idx": "C"},  # MedQA
        {"question": Q, **{f"op{c.lower()}": t for c, t in BY_LETTER.items()}, "correct": "C"},
        {"question": Q, **{f"Option {i}": t for i, t in enumerate(OPTIONS, 1)}, "label": "3"},
    ],
)
def test_multiple_choice_keeps_its_options(row):
    asked = choice(Q, OPTIONS, 2)["messages"]
    assert turns(row) == [(m["role"], m["content"]) for m in asked]
    assert "- dark blue=C" in turns(row)[0][1] and learned(row) == "C<|assistant_end|>"
    assert shape_of(row) == "multiple choice"
    assert left_out(row) == [name for name in row if name in ("subject", "answer_idx")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": Q, "choices": OPTIONS, "answer": 4}, "the answer 4 is none of the options 0"),
        ({"question": Q, **BY_LETTER, "answer": "1"}, "none of the options a, b, c, d"),
        ({"question": Q, "choices": ["x", "x"], "answer": "x"}, "give the label of one"),
    ],
)
def test_an_answer_that_is_none_of_the_options_is_refused(row, says):
    with pytest.raises(UserError, match=says):
        conversation(row)


def test_columns_that_are_not_used_are_named(tmp_path):
    row = {"question": Q, "answer": A, "Source": "a book", "weight": 1, "empty": None, "b": "x"}
    assert turns(row) == WANTED
    assert left_out(row) == ["source", "b"]
    assert left_out({"messages": messages(), "id": 5}) == left_out("text") == []
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 3))
    report = Report()
    assert len(list(read(path, report))) == 3
    assert report.notes == {"rows whose columns source, b are not used": 3}


def test_what_belongs_to_the_question():
    row = {"instruction": "Sum up.", "input": "A text.", "output": A}
    assert turns(row) == [("user", "Sum up.\n\nA text."), ("assistant", A)]
    row = {"instruction": Q, "context": "A text.", "response": A}
    assert turns(row)[0] == ("user", f"{Q}\n\nA text.")
    row = {"system": "Be brief.", "conversations": messages("from", "value", "human", "gpt")}
    assert turns(row) == [("system", "Be brief."), *WANTED]
    developer = [{"role": "developer", "content": "Be brief."}, *messages()]
    assert turns(developer) == [("system", "Be brief."), *WANTED]


def test_turns_of_one_side_become_one():
    user, assistant = messages()
    assert turns([user, user, assistant]) == [("user", f"{Q}\n\n{Q}"), ("assistant", A)]
    assert turns([user, assistant, assistant]) == [("user", Q), ("assistant", f"{A}\n\n{A}")]
    assert turns([assistant, user, assistant]) == [("user", ""), ("assistant", A), *WANTED]
    system = {"role": "system", "content": "S"}
    assert turns([system, assistant, user, assistant])[1] == ("user", "")


def test_calls_of_a_calculator_as_openai_writes_them():
    function = {"name": "calculator", "arguments": '{"expr": "0+1"}'}
    row = [
        {"role": "user", "content": Q},
        {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": A},
    ]
    parts = [("python", "0+1"), ("python_output", "1"), ("text", A)]
    wanted = [("user", Q), ("assistant", [{"type": k, "text": t} for k, t in parts])]
    assert turns(row) == turns({"messages": row}) == wanted
    assert "0+1" in learned(row) and A in learned(row)
    assert "1<|output_end|>" not in learned(row), "the calculator says its result"
    function["name"] = "weather"
    with pytest.raises(UserError, match=r"message 1 calls a tool \('weather'\)"):
        conversation(row)


def test_lists_of_texts():
    row = [{"role": "user", "content": [Q, Q]}, {"role": "assistant", "content": [A, A]}]
    assert turns(row) == [("user", f"{Q}\n{Q}"), ("assistant", f"{A}\n{A}")]
    part = {"type": "text", "text": A}
    row = [{"role": "user", "content": Q}, {"role": "assistant", "content": [part]}]
    assert turns(row) == [("user", Q), ("assistant", [part])]


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"Weight": 0},
        {"loss_weight": 0},
        {"loss": False},
        {"train": False},
        {"train_on_turn": False},
        {"trainable": False},
    ],
)
def test_masked_turns_are_not_learned(mark):
    wrong = {"role": "assistant", "content": "WRONG", **mark}
    row = [messages()[0], wrong, *messages()]
    assert learned(row) == A + "<|assistant_end|>"
    assert learned({"messages": row}) == learned({"conversations": row})
    assert "WRONG" in str(turns(row)), "it stays in the context"
    assert learned([messages()[0], {**wrong, next(iter(mark)): 1}]) == "WRONG<|assistant_end|>"


@pytest.mark.parametrize("mark", [{"mask": True}, {"masked": 1}, {"weight": 1, "mask": True}])
def test_masks_that_say_the_opposite(mark):
    row = [messages()[0], {"role": "assistant", "content": "WRONG", **mark}, *messages()]
    assert learned(row) == A + "<|assistant_end|>"
    unmasked = {name: name == "weight" for name in mark}
    assert learned([messages()[0], {"role": "assistant", "content": A, **unmasked}]).startswith(A)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": messages(), "weight": 0},
        {"prompt": Q, "response": A, "train": False},
        {"instruction": Q, "output": A, "loss_weight": 0.0},
        {"conversations": messages("from", "value", "human", "gpt"), "weight": False},
    ],
)
def test_a_mark_on_a_row_masks_all_of_it(row):
    assert learned(row) == ""
    mark = next(name for name in row if name in ("weight", "train", "loss_weight"))
    assert learned({**row, mark: 1}) == A + "<|assistant_end|>"
    assert learned({**row, mark: 0.5}) == A + "<|assistant_end|>", "a weight of something else"


def test_one_of_two_replies_in_a_row_may_be_masked():
    user, right = messages()
    wrong = {"role": "assistant", "content": "WRONG", "weight": 0}
    assert learned([user, wrong, right]) == A + "<|assistant_end|>"
    assert learned([user, right, wrong]) == A
    call = {"function": {"name": "calculator", "arguments": '{"expr": "6*7"}'}}
    call = {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0}
    row = [user, call, {"role": "tool", "content": "42"}, right]
    assert learned(row) == A + "<|assistant_end|>"
    assert "6*7" in str(turns(row)) and "42" in str(turns(row)), "they stay in the context"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("text", "expected an object or a list of messages"),
        (5, "expected an object"),
        ({"text": "x"}, '"messages"'),
        ({"prompt": "x"}, '"response"'),
        ({"prompt": 1, "response": 2}, '"prompt"'),
        ([], "needs a user message"),
        ({"messages": ["x"]}, "expected an object with a role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "the role 'robot' is none of"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "the role"),
        ({"messages": [{"content": "x"}]}, "the role None"),
        ({"messages": [{"role": "user", "content": 5}]}, "must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text"),
        ([*messages()[:1], {"role": "assistant", "content": None, "tool_calls": [1]}], "a tool"),
        ([*messages()[:1], {"role": "tool", "content": "1"}], "the role 'tool'"),
        ([*messages()[:1], {**messages()[1], "weight": 0.5}], '"weight" must be 0 or 1'),
        ([*messages()[:1], {**messages()[1], "train": "no"}], '"train" must be 0 or 1'),
    ],
)
def test_what_is_no_conversation_is_refused(row, says):
    with pytest.raises(UserError, match=says):
        conversation(row)


@pytest.mark.parametrize(
    "mark", [{"mask": True}, {"masked": 1}, {"Weight": 0}, {"weight": "0"}, {" weight": "0"}]
)
def test_marks_of_every_form_on_a_row(mark):
    made = conversation({"prompt": "Hi", "response": "Hello", **mark})
    assert [m.get("weight") for m in made["messages"] if m["role"] == "assistant"] == [0]
    plain = conversation({"prompt": "Hi", "response": "Hello", "mask": False, "weight": 1})
    assert all("weight" not in m for m in plain["messages"])


@pytest.mark.parametrize(
    ("answer", "letter"), [("3", "C"), (3, "D"), ("C", "C"), (" 4 ", "D"), ("0", "A")]
)
def test_the_text_of_an_option_comes_before_its_number(answer, letter):
    row = {"question": "2+1?", "choices": ["1", "2", "3", "4"], "answer": answer}
    assert conversation(row)["messages"][-1]["content"] == letter
