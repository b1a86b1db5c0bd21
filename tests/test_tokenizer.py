"""
The tokenizer: exact and lossless for any text, safe files, the interchange format, and what a
conversation supervises.
"""

import json
import pickle
import random
import time

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.base.common import UserError
from nanochat.data.rendering import SPECIAL_TOKENS
from nanochat.data.tokenizer import (
    DIGITS,
    WINDOW,
    StreamDecoder,
    Tokenizer,
    fast_pattern,
    segments,
    split_pattern,
)

WORDS = (
    "the cat sat on a warm stone while rain fell and Anna's dog didn't see 12 or 345 birds; naïve café — 東京の猫 😀 déjà vu\n\n"
    "  def f(x):\n    return x"
)


def texts(n: int = 400) -> list[str]:
    rng = random.Random(0)
    made_up = [
        "".join(rng.choices(["ka", "lo", "mi", "ren", "st", "u"], k=rng.randint(1, 5)))
        for _ in range(300)
    ]
    return [" ".join(rng.choices(WORDS.split(" ") * 5 + made_up, k=40)) for _ in range(n)]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(texts(), 512)


@pytest.fixture(scope="module")
def hf(tok, tmp_path_factory):
    from tokenizers import Tokenizer as HFTokenizer

    directory = tmp_path_factory.mktemp("tok")
    tok.save(directory)
    read = HFTokenizer.from_file(str(directory / "tokenizer.json"))
    read.encode_special_tokens = True  # what spells a special token is text, as with encode()
    return read


ODD = [
    "",
    " ",
    "a",
    "\x00",
    "\x00\x00 \x00",
    "\ufeff",
    "\r\n\r\n",
    " \n \n x",
    "\t\t x\u00a0\u3000y",
    "😀",
    "👩\u200d👧🏽 é e\u0301",
    "東京の猫。\nはい",
    "𝕏𐍈",
    "\U0010ffff",
    "I'm you'LL we'Ve it'ſ",
    "1234567 ١٢٣ ½",
    "=== ---\n\n",
    "x" * 5000,
    "<|bos|><|assistant_end|>",
]


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_survive(tok, hf, text):
    assert tok.decode(tok.encode(text)) == text
    assert hf.encode(text).ids == tok.encode(text)


@given(
    st.text(
        alphabet=st.one_of(
            st.characters(exclude_categories=["Cs"]), st.sampled_from("ab '\n\r19.é東😀")
        ),
        max_size=200,
    )
)
@settings(max_examples=300, deadline=None)
def test_lossless_and_the_same_through_tokenizers(tok, hf, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text and tok.decode_bytes(ids) == text.encode()
    assert tok.encode(text, bos=True) == [tok.bos, *ids]
    assert hf.encode(text).ids == ids and hf.decode(ids) == text
    assert tok.token_bytes()[ids].sum() == len(text.encode())


@given(
    st.text(
        alphabet=st.one_of(
            st.sampled_from("aéß東'sLl 1٣²\n\r\t\u00a0\u3000.!-–\u0301"), st.characters()
        )
    )
)
@settings(max_examples=300, deadline=None)
def test_the_fast_pattern_splits_as_the_definition_does(text):
    for digits in DIGITS:
        expected = regex.findall(split_pattern(digits), text)
        assert regex.findall(fast_pattern(digits), text) == expected


@given(st.text(alphabet=st.characters(categories=["Cs", "Lu", "Zs"]), max_size=50))
@settings(max_examples=200, deadline=None)
def test_lone_surrogates_become_replacement_characters(tok, text):
    back = tok.decode(tok.encode(text))
    assert back == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_surrogates(tok):
    assert tok.decode(tok.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tok.encode("\ud83d\ude00") == tok.encode("😀")
    trained = Tokenizer.train(["a\ud800 b"] * 9, 300)
    assert trained.decode(trained.encode("a\ud800 b")) == "a\ufffd b"


@pytest.mark.parametrize(
    "unit", [" ", "\n", "a", "=", "7", "\x00", " \n", "猫", "😀", "\t ", "ab", "a "]
)
def test_megabytes_of_one_thing(tok, unit):
    text = unit * (2_000_000 // len(unit.encode()))
    start = time.thread_time()  # of the processor, because the machine may be busy
    ids = tok.encode(text)
    assert time.thread_time() - start < 5  # it takes 0.05 to 0.3 s
    assert tok.decode(ids) == text and tok.token_bytes()[ids].sum() == len(text.encode())
    assert tok.encode("x" + text + "y")[0] == tok.encode("x")[0]


def test_cuts_change_nothing_where_the_pattern_splits_anyway(tok, hf):
    rng = random.Random(1)
    words = [
        "word",
        "x1",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "...",
        "'s",
        "é",
        "猫",
        ")\n",
        " 7",
        "12345",
        "\r\n",
        "\x1c",
        "\x85",
        "😀!",
    ]
    text = "".join(rng.choices(words, k=60_000)) + "".join(rng.choices(words, k=10)) * 3000
    assert len(list(segments(text))) > 1 and "".join(segments(text)) == text
    assert hf.encode(text).ids == tok.encode(text)


def test_forced_cuts_are_where_the_definition_says(tok):
    text = "z" * (2 * WINDOW + 5)
    assert [len(s) for s in segments(text)] == [WINDOW, WINDOW, 5]
    assert [len(s) for s in segments("z" * 1000 + " " + "z" * (WINDOW - 1))] == [1000, WINDOW]
    assert list(segments("ab")) == ["ab"] and list(segments("")) == [""]
    assert tok.encode(text) == 2 * tok.encode("z" * WINDOW) + tok.encode("z" * 5)


def test_pairs_list_makes_tokenizers_agree_on_adversarial_vocabularies(tmp_path):
    from tokenizers import Tokenizer as HFTokenizer

    for seed, alphabet in enumerate(["a", "ab", "abc", "ab ", " \n=", "aé"]):
        rng = random.Random(seed)
        words = ["".join(rng.choices(alphabet, k=rng.randint(1, 100))) for _ in range(300)]
        tok = Tokenizer.train(words[:100], 509)
        tok.save(tmp_path)
        hf = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in words[100:]:
            assert hf.encode(text).ids == tok.encode(text)


# --- training


def test_vocabulary_size_and_special_ids(tok):
    assert tok.vocab_size == 512 and len(tok.ranks) == 512 - 9
    assert list(tok.specials) == list(SPECIAL_TOKENS) and list(tok.specials.values()) == list(
        range(503, 512)
    )
    assert tok.bos == 503 and tok.decode([tok.bos, 511]) == "<|bos|><|output_end|>"
    sizes = tok.token_bytes()
    assert (
        sizes.dtype == np.int32
        and sizes.shape == (512,)
        and (sizes[:503] > 0).all()
        and (sizes[503:] == 0).all()
    )


def test_training_is_deterministic():
    assert (
        Tokenizer.train(texts(50), 400).fingerprint
        == Tokenizer.train(iter(texts(50)), 400).fingerprint
    )


def test_learns_the_pattern(tok):
    assert all(len(piece) <= 2 for piece in tok.ranks if piece.isdigit())
    assert len(tok.encode(" the")) == 1 and len(tok.encode("1234")) == 2


def test_too_small_a_vocabulary_or_text(capsys):
    with pytest.raises(UserError, match=r"100.*265"):
        Tokenizer.train(["text"], 100)
    for nothing in ([], ["", ""]):
        with pytest.raises(UserError, match="no text"):
            Tokenizer.train(nothing, 1000)
    small = Tokenizer.train(["one two three"], 10_000)
    assert 265 < small.vocab_size < 300 and "10000" in capsys.readouterr().err
    bytes_only = Tokenizer.train(["one two three"], 265)
    assert bytes_only.vocab_size == 265 and len(bytes_only.encode("été")) == 5


def test_batch(tok):
    many = [*texts(50), "", "\ud800", "<|bos|> x <|assistant_end|>", " a" * WINDOW, *SPECIAL_TOKENS]
    for bos in (True, False):
        batch = tok.encode_batch(many, bos=bos)
        assert [ids.tolist() for ids in batch] == [tok.encode(text, bos=bos) for text in many]
        assert all(ids.dtype == np.uint32 for ids in batch)
    assert tok.encode_batch([]) == []


# --- files


def test_save_and_load(tok, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"no tokenizer in .*tok_train"):
        Tokenizer.load()
    tok.save(tmp_path / "tokenizer")
    again = Tokenizer.load()
    assert (
        again.fingerprint == tok.fingerprint
        and again.ranks == tok.ranks
        and again.specials == tok.specials
    )
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == [
        "meta.json",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "tokenizer" / "meta.json").read_text())["vocab_size"] == 512
    assert pickle.loads(pickle.dumps(tok)).encode("the cat") == tok.encode(
        "the cat"
    )  # travels to worker processes


def test_interchange_knows_the_special_tokens(tok, hf):
    assert hf.get_vocab_size() == tok.vocab_size
    assert all(hf.token_to_id(name) == i for name, i in tok.specials.items())
    hf.encode_special_tokens = False
    assert hf.encode("<|bos|>hi").ids == [tok.bos, *tok.encode("hi")]
    hf.encode_special_tokens = True


def test_fingerprint_tells_tokenizers_apart(tok):
    ranks = list(tok.ranks)
    ranks[-1], ranks[-2] = ranks[-2], ranks[-1]
    assert Tokenizer({token: i for i, token in enumerate(ranks)}).fingerprint != tok.fingerprint
    assert Tokenizer.train(texts(), 511).fingerprint != tok.fingerprint


def test_damaged_files_are_refused(tok, tmp_path):
    tok.save(tmp_path)
    good = {name: (tmp_path / name).read_bytes() for name in ("tokenizer.json", "meta.json")}
    data = json.loads(good["tokenizer.json"])

    def changed(**model):
        return json.dumps({**data, "model": {**data["model"], **model}}).encode()

    swapped = dict(data["model"]["vocab"])
    a, b = list(swapped)[300:302]
    swapped[a], swapped[b] = swapped[b], swapped[a]
    raw = good["tokenizer.json"]
    bad = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        raw[:1000],
        raw[:-1],
        raw[: len(raw) // 2],
    ]
    bad += [raw.replace(b"{1,2}", b"{1,3}")]
    bad += [
        changed(vocab=swapped),
        changed(vocab={}),
        changed(vocab=[]),
        changed(vocab={**data["model"]["vocab"], "日": 503}),
    ]
    bad += [
        changed(vocab={**data["model"]["vocab"], a: "1"}),
        json.dumps({**data, "added_tokens": []}).encode(),
        pickle.dumps({"a": 1}),
    ]
    cases = [("tokenizer.json", content) for content in bad]
    cases += [("meta.json", content) for content in (b"", b"{}", b"3", good["meta.json"][:40])]
    for name, content in cases:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"damaged.*tok_train") as e:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(e.value) and len(str(e.value)) < 400
        (tmp_path / name).write_bytes(good[name])
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.load(tmp_path)
    (tmp_path / "meta.json").write_bytes(good["meta.json"])
    assert Tokenizer.load(tmp_path).fingerprint == tok.fingerprint


def test_files_of_a_stranger_cannot_run_code(tok, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    tok.save(tmp_path)
    for name in ("tokenizer.json", "meta.json"):
        keep = (tmp_path / name).read_bytes()
        for content in (
            pickle.dumps(Bomb()),
            b"__import__('os').abort()",
            b'{"model": {"vocab": "__import__(\'os\').abort()"}}',
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match="damaged"):
                Tokenizer.load(tmp_path)
        (tmp_path / name).write_bytes(keep)
    assert not (tmp_path / "exploded").exists()


# --- conversations

GOLDEN = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many e in letter?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me count. "},
                {"type": "python", "text": "'letter'.count('e')"},
                {"type": "python_output", "text": "2"},
                {"type": "text", "text": "There are 2."},
            ],
        },
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You're welcome 😀"},
    ]
}


def test_golden_conversation(tok):
    ids, mask = tok.render_conversation(GOLDEN)
    assert len(ids) == len(mask) and set(mask) == {0, 1}
    assert tok.decode(ids) == (
        "<|bos|><|user_start|>Be brief.\n\nHow many e in letter?<|user_end|>"
        "<|assistant_start|>Let me count. <|python_start|>'letter'.count('e')<|python_end|><|output_start|>2<|output_end|>"
        "There are 2.<|assistant_end|><|user_start|>Thanks<|user_end|><|assistant_start|>You're welcome 😀<|assistant_end|>"
    )
    runs = []  # of supervised ids, as text
    for token, supervised, before in zip(ids, mask, [0, *mask], strict=False):
        if supervised:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
    assert [tok.decode(run) for run in runs] == [
        "Let me count. <|python_start|>'letter'.count('e')<|python_end|>",
        "There are 2.<|assistant_end|>",
        "You're welcome 😀<|assistant_end|>",
    ]


def test_prompt_is_the_start_of_the_rendered_conversation(tok):
    ids, mask = tok.render_conversation(GOLDEN)
    prompt = tok.render_prompt({"messages": GOLDEN["messages"][:-1]})
    assert ids[: len(prompt)] == prompt and prompt[-1] == tok.specials["<|assistant_start|>"]
    assert mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
    with pytest.raises(UserError, match="must end with a message from the user"):
        tok.render_prompt(GOLDEN)


@given(st.text(max_size=40), st.text(max_size=40), st.sampled_from(SPECIAL_TOKENS))
@settings(max_examples=100, deadline=None)
def test_text_that_spells_a_special_token_stays_text(tok, before, after, name):
    text = before + name + after
    assert all(i < tok.bos for i in tok.encode(text))
    ids, mask = tok.render_conversation(
        {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": [{"type": "python", "text": text}]},
            ]
        }
    )
    special = [name for name, i in tok.specials.items() for j in ids if i == j]
    assert sorted(special) == sorted(
        [
            "<|bos|>",
            "<|user_start|>",
            "<|user_end|>",
            "<|assistant_start|>",
            "<|python_start|>",
            "<|python_end|>",
            "<|assistant_end|>",
        ]
    )
    assert sum(mask) == len(tok.encode(text)) + 3


USER, REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "needs a user message"),
        ([{"role": "system", "content": "s"}], "needs a user message"),
        ([REPLY], "message 0: expected role 'user', got 'assistant'"),
        ([USER, USER], "message 1: expected role 'assistant', got 'user'"),
        ([USER, REPLY, REPLY], "message 2: expected role 'user', got 'assistant'"),
        (
            [{"role": "system", "content": "s"}, REPLY],
            "message 1: expected role 'user', got 'assistant'",
        ),
        (
            [USER, {"role": "system", "content": "s"}],
            "message 1: expected role 'assistant', got 'system'",
        ),
        ([{"role": "human", "content": "s"}], "message 0: expected role 'user', got 'human'"),
        ([{"content": "s"}], "message 0: expected role 'user', got None"),
        (
            [{"role": "user"}],
            "message 0: the content of a message with role 'user' must be text, not None",
        ),
        (
            [{"role": "user", "content": ["x" * 999]}],
            "message 0: the content .* must be text, not .*\\.\\.\\.",
        ),
        (
            [USER, {"role": "assistant", "content": 3}],
            "message 1: the content .* must be text, not 3",
        ),
        ([USER, {"role": "assistant", "content": ["a"]}], "message 1: a part must be .* not 'a'"),
        (
            [USER, {"role": "assistant", "content": [{"type": "image", "text": "a"}]}],
            "message 1: a part must be .*image",
        ),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "message 1: a part must be"),
        (["hello"], "a conversation must be"),
        ("hello", "a conversation must be"),
        (None, "a conversation must be"),
    ],
)
def test_misshapen_conversations_are_refused(tok, messages, match):
    with pytest.raises(UserError, match=match) as e:
        tok.render_conversation({"messages": messages})
    assert len(str(e.value)) < 200
    for other in (messages, [messages], {}):
        with pytest.raises(UserError):
            tok.render_conversation(other)


def test_rendering_leaves_the_conversation_as_it_was(tok):
    before = json.dumps(GOLDEN)
    tok.render_conversation(GOLDEN)
    assert json.dumps(GOLDEN) == before


# --- streaming


@given(st.lists(st.integers(0, 511), max_size=60))
@settings(max_examples=300, deadline=None)
def test_stream_of_any_ids_is_their_decoding(tok, ids):
    decoder = StreamDecoder(tok)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == tok.decode(ids)
    assert decoder.flush() == ""


@given(
    st.text(
        alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("é東😀👩‍👧")),
        max_size=60,
    )
)
@settings(max_examples=200, deadline=None)
def test_stream_never_emits_half_a_character(tok, text):
    decoder = StreamDecoder(tok)
    shown = ""
    for i in tok.encode(text):
        shown += decoder.push(i)
        assert text.startswith(shown)
    assert shown + decoder.flush() == text


def test_stream_holds_back_half_a_character(tok):
    decoder = StreamDecoder(tok)
    halves = [tok.ranks[bytes([b])] for b in "🦀".encode()]
    assert [decoder.push(i) for i in halves] == ["", "", "", "🦀"]
    assert [decoder.push(i) for i in halves[:2]] == ["", ""] and decoder.flush() == "\ufffd"
    assert decoder.push(halves[0]) + decoder.push(tok.ranks[b"a"]) == "\ufffda"
