"""The engine: cached decoding is the full forward, rows are independent, sampling does what it says, the tool loop, replies."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from nanochat.base.common import UserError
from nanochat.chat import generate as engine_module
from nanochat.chat.generate import Engine, Reply, choose, clip, fit_conversation
from nanochat.data.tokenizer import Tokenizer
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

TEXT = "The cat sat on the mat. What is 12+30? It is 42. Grüße, 世界 😀😀. " * 20
SHAPES = {
    "default": {},
    "grouped, tied": {"n_kv_head": 1, "tie_embeddings": True},
    "windows, swiglu": {"window_pattern": "SSL", "activation": "swiglu", "softcap": 0.0},
    "grouped windows, silu, narrow": {
        "n_kv_head": 2,
        "window_pattern": "S",
        "activation": "silu",
        "mlp_ratio": 2.5,
    },
    "gelu, another rotation": {
        "activation": "gelu",
        "rope_base": 500.0,
        "tie_embeddings": True,
        "softcap": 30.0,
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


def model(vocab_size, dtype=torch.float32, seed=0, **shape):
    """A random tiny model, with no matrix at zero as training starts them."""
    config = GPTConfig(
        **{
            "sequence_len": 32,
            "vocab_size": vocab_size,
            "n_layer": 3,
            "n_head": 4,
            "n_kv_head": 4,
            "n_embd": 32,
            **shape,
        }
    )
    m = GPT.build(config, compute_dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.3, generator=g)
    return m


def greedy(m, prompt, n):
    """The likeliest continuation by whole forward passes, without a cache: the judge of the engine."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            tokens.append(int(m.logits(m(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


def quiet(tokenizer, m):
    """An engine that nothing stops: random models say <|bos|> and call tools at any time."""
    e = Engine(m, tokenizer)
    e._stops, e._call = set(), (-1, -1)
    return e


# --- cached decoding


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decoding_is_the_full_forward_up_to_the_last_position(
    tokenizer, shape, monkeypatch
):  # trap 20
    m = model(tokenizer.vocab_size, **shape)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2]]
    want = [greedy(m, p, 33 - len(p)) for p in prompts]
    for passes in (8192, 3):  # the prompts in one pass, and in chunks
        monkeypatch.setattr(engine_module, "PREFILL_TOKENS", passes)
        monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 3)
        rows = quiet(tokenizer, m).generate_batch(prompts, max_tokens=None, temperature=0)
        assert [r.tokens for r in rows] == want
        assert [r.finish for r in rows] == ["context"] * 3
    for p, w in zip(prompts, want, strict=True):  # and each alone
        assert quiet(tokenizer, m).generate_batch(p, max_tokens=None, temperature=0)[0].tokens == w


def test_every_logit_of_cached_passes_is_that_of_the_whole(tokenizer):
    for shape in SHAPES.values():
        m = model(tokenizer.vocab_size, **shape)
        idx = torch.randint(
            0, tokenizer.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1)
        )
        with torch.no_grad():
            want = m.logits(m(idx))
            cache, at = m.new_cache(2), 0
            for n in (5, 1, 17, 1, 8):
                torch.testing.assert_close(
                    m.logits(m(idx[:, at : at + n], cache)),
                    want[:, at : at + n],
                    atol=1e-4,
                    rtol=1e-3,
                )
                cache.advance(n)
                at += n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_fast_copy_computes_the_same_and_leaves_the_model_alone(tokenizer, dtype, frozen):
    m = model(tokenizer.vocab_size, dtype, n_kv_head=2)
    if frozen:
        m.cast_for_inference()
    names = [name for name, _ in m.named_parameters()]
    e = Engine(m, tokenizer)
    with torch.inference_mode():
        body, head = e._prepared()
        idx = torch.tensor([[1, 2, 3, 4]])
        got = head(body(idx, body.new_cache(1, 8))).float()
        want = torch.nn.functional.linear(m(idx), m.head_weight.to(dtype)).float()
    near = {"atol": 1e-4, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(got, want, **near)
    assert [name for name, _ in m.named_parameters()] == names
    assert {p.dtype for p in m.parameters()} == {dtype if frozen else torch.float32}
    assert (
        e._prepared()[0] is body
    ) == frozen  # a model in training is read anew, one at rest is prepared once


def test_training_between_two_calls_is_seen(tokenizer):
    m = model(tokenizer.vocab_size)
    e = quiet(tokenizer, m)
    e.generate_batch([1, 2, 3], max_tokens=4, temperature=0)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    assert e.generate_batch([1, 2, 3], max_tokens=20, temperature=0)[0].tokens == greedy(
        m, [1, 2, 3], 20
    )


# --- rows and seeds


def test_rows_do_not_depend_on_their_company(tokenizer):  # trap 23
    e = quiet(tokenizer, model(tokenizer.vocab_size))
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
    alone = [e.generate_batch(p, 4, 12, seed=7) for p in prompts]
    for n in (1, 2, 4):
        rows = e.generate_batch(prompts, n, 12, seed=[7, 7, 7])
        for p, s in itertools.product(range(3), range(n)):
            assert rows[p * n + s] == alone[p][s]
    some = e.generate_batch(prompts, 2, 12, seed=3)
    assert e.generate_batch(prompts[:2], 1, 12, seed=3) == [
        some[0],
        some[2],
    ]  # one seed for all: a prompt's number tells it apart
    assert some != e.generate_batch(prompts, 2, 12, seed=4)


def test_samples_differ_from_their_first_token_on(tokenizer):  # trap 23
    rows = quiet(tokenizer, model(tokenizer.vocab_size)).generate_batch(
        [1, 2, 3], num_samples=16, max_tokens=3
    )
    assert len({r.tokens[0] for r in rows}) > 8 and len({tuple(r.tokens) for r in rows}) == 16


def test_the_stream_brings_what_the_batch_returns(tokenizer):
    e = Engine(model(tokenizer.vocab_size), tokenizer)
    rows = e.generate_batch([1, 2, 3], num_samples=5, max_tokens=20, seed=1)
    tokens, finish = [[] for _ in rows], [""] * 5
    for step in e.generate([1, 2, 3], num_samples=5, max_tokens=20, seed=1):
        for t in step:
            assert not finish[t.row]
            finish[t.row] = t.finish
            if t.finish != "stop":
                tokens[t.row].append(t.id)
    assert tokens == [r.tokens for r in rows] and finish == [r.finish for r in rows]


def test_finished_rows_leave_the_batch(tokenizer):
    """Rows stop at different times; the rest go on unmoved and the cache holds them alone."""
    m, want = model(tokenizer.vocab_size), {}
    e = quiet(tokenizer, m)
    e._stops = set(range(0, tokenizer.vocab_size, 9))
    sizes = []
    forward = engine_module._forward

    def watched(body, cache, tokens):
        sizes.append(len(tokens))
        return forward(body, cache, tokens)

    for i in range(8):
        want[i] = e.generate_batch([i + 1], max_tokens=25, seed=[i])[0]
    engine_module._forward = watched
    try:
        rows = e.generate_batch([[i + 1] for i in range(8)], max_tokens=25, seed=list(range(8)))
    finally:
        engine_module._forward = forward
    assert rows == list(want.values())
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 8 and sizes[-1] < 4
    assert {r.finish for r in rows} >= {"stop"} and all(
        r.stop in e._stops for r in rows if r.finish == "stop"
    )


# --- sampling


def test_ids_in_the_padding_are_never_sampled(tokenizer):  # trap 14, even with huge weights
    m = model(tokenizer.vocab_size)
    assert m.config.padded_vocab > m.config.vocab_size
    with torch.no_grad():
        m.head.weight[m.config.vocab_size :] = 1e3
    e = quiet(tokenizer, m)
    for temperature in (0, 1, 100):
        rows = e.generate_batch([1, 2], 8, 20, temperature)
        assert max(max(r.tokens) for r in rows) < tokenizer.vocab_size


def test_choose():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    p = torch.softmax(logits.double(), -1)[0]
    assert (
        choose(logits, [0.9], temperature=0)
        == [1]
        == choose(logits, [0.999], top_k=1)
        == choose(logits, [0.999], top_p=0.01)
    )
    n = 4000
    u = [(i + 0.5) / n for i in range(n)]
    for top_k in (None, 0, 4, 99):
        share = (
            torch.bincount(torch.tensor(choose(logits.expand(n, 4), u, top_k=top_k)), minlength=4)
            / n
        )
        torch.testing.assert_close(share.double(), p, atol=1e-3, rtol=0)
    assert set(choose(logits.expand(n, 4), u, top_k=2)) == {1, 3}
    assert set(choose(logits.expand(n, 4), u, top_p=float(p[1]) + 0.01)) == {
        1,
        3,
    }  # the token that crosses the threshold stays
    assert set(choose(logits.expand(n, 4), u, top_p=float(p[1]) - 0.01)) == {1}
    assert set(choose(logits.expand(n, 4), u, temperature=1e-4)) == {1}
    hot = (
        torch.bincount(torch.tensor(choose(logits.expand(n, 4), u, temperature=1e4)), minlength=4)
        / n
    )
    torch.testing.assert_close(hot, torch.full((4,), 0.25), atol=2e-3, rtol=0)


def test_choose_at_the_edges_takes_only_possible_tokens():
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf")], [0.0, -200.0, float("-inf")]])
    for u in (0.0, 1 - 2**-53):
        assert choose(logits, [u, u]) == [1, 0]
        assert choose(logits, [u, u], top_k=3) == [1, 0] == choose(logits, [u, u], top_p=0.999)


def test_senseless_sampling_is_refused(tokenizer):
    e = Engine(model(tokenizer.vocab_size), tokenizer)
    for bad in (
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": float("nan")},
    ):
        with pytest.raises(UserError, match="top_p above 0"):
            e.generate_batch([1], **bad)
    with pytest.raises(ValueError, match="at least one token"):
        e.generate_batch([[1], []])
    assert e.generate_batch([]) == []


# --- the context's limit


def test_clip():
    assert (
        clip([1, 2, 3], 3) == [1, 2, 3]
        and clip([1, 2, 3, 4, 5], 3) == [1, 4, 5]
        and clip([1, 2, 3], 1) == [1]
    )


def test_long_prompts_keep_bos_and_their_end(tokenizer):
    m = model(tokenizer.vocab_size)
    prompt = [tokenizer.bos, *range(60)]
    row = quiet(tokenizer, m).generate_batch(prompt, temperature=0)[0]
    assert row.prompt == [tokenizer.bos, *range(30, 60)] and row.dropped == 30
    assert row.finish == "context" and row.tokens == greedy(m, row.prompt, 2)


def test_lengths_and_reasons(tokenizer):
    e = quiet(tokenizer, model(tokenizer.vocab_size))
    assert [(r.finish, len(r.tokens)) for r in e.generate_batch([[1, 2]] * 2, 2, 5)] == [
        ("length", 5)
    ] * 4
    assert [(r.finish, len(r.tokens)) for r in e.generate_batch([[1] * 30, [1] * 20], 1, 10)] == [
        ("context", 3),
        ("length", 10),
    ]
    assert [(r.finish, r.tokens) for r in e.generate_batch([1], max_tokens=0)] == [("length", [])]


# --- the calculator


class Script:
    """A model whose row says what its script holds after the prompt; the first token of the prompt names the script."""

    class Cache:
        def __init__(self, rows):
            self.rows, self.new, self.k = rows, [], torch.zeros(1)

        def advance(self, counts):
            self.rows = [
                row + new[:n] for row, new, n in zip(self.rows, self.new, counts, strict=True)
            ]

        def expand(self, rows):
            return Script.Cache([list(self.rows[r]) for r in rows])

        def drop(self, row):
            self.rows[row] = self.rows[-1]
            self.rows.pop()

    def __init__(self, vocab_size, scripts, prompt_length, context=200):
        self.config = SimpleNamespace(sequence_len=context, vocab_size=vocab_size, softcap=0.0)
        self.scripts, self.start, self.histories = scripts, prompt_length, set()

    def new_cache(self, batch, capacity):
        return self.Cache([[] for _ in range(batch)])

    def __call__(self, idx, cache):
        cache.new = idx.tolist()
        out = torch.zeros(*idx.shape, self.config.vocab_size)
        for b, new in enumerate(cache.new):
            for t in range(len(new)):
                seen = cache.rows[b] + new[: t + 1]
                self.histories.add(tuple(seen))
                script = self.scripts.get(seen[0], [])
                at = len(seen) - self.start
                out[b, t, script[at] if 0 <= at < len(script) else 0] = 100.0
        return out


def scripted(tokenizer, scripts, prompt_length=1, context=200):
    m = Script(tokenizer.vocab_size, scripts, prompt_length, context)
    e = Engine(m, tokenizer)
    e._prepared = lambda: (m, torch.nn.Identity())
    return e


def call(tokenizer, expression):
    s = tokenizer.specials
    return [s["<|python_start|>"], *tokenizer.encode(expression), s["<|python_end|>"]]


def output(tokenizer, text):
    s = tokenizer.specials
    return [s["<|output_start|>"], *tokenizer.encode(text), s["<|output_end|>"]]


@pytest.mark.parametrize("feed", [1, 64])  # what is forced a token a step, or at once
def test_the_calculator_answers_in_every_row(tokenizer, feed, monkeypatch):
    monkeypatch.setattr(engine_module, "FEED_TOKENS", feed)
    end = [tokenizer.specials["<|assistant_end|>"]]
    word = tokenizer.encode("The cat sat on the mat.")
    square = call(tokenizer, "9999*9999") + output(tokenizer, "99980001")
    scripts = {
        1: call(tokenizer, "12+30") + output(tokenizer, "42") + word + end,
        2: word + end,
        3: word + square + call(tokenizer, "1/3") + output(tokenizer, "0.333333333333333") + end,
        4: call(tokenizer, "9**9**9") + word + end,  # refused: no output
        5: [tokenizer.specials["<|python_end|>"], *word, *end],  # no call was open
    }
    prompts = [[1], [2], [3], [4], [5], [1]]
    rows = scripted(tokenizer, scripts).generate_batch(prompts, max_tokens=150, temperature=0)
    for (name,), row in zip(prompts, rows, strict=True):
        assert row.tokens == scripts[name][:-1] and row.finish == "stop" and row.stop == end[0]
        assert len(row.mask) == len(row.tokens)
        forced, inside = [], False
        for t in row.tokens:
            inside = inside or t == tokenizer.specials["<|output_start|>"]
            forced.append(inside)
            inside = inside and t != tokenizer.specials["<|output_end|>"]
        assert row.mask == [int(not f) for f in forced]


def test_forced_tokens_end_at_the_limit(tokenizer):
    said = call(tokenizer, "9999*9999")
    rows = scripted(tokenizer, {1: said}).generate_batch(
        [1], max_tokens=len(said) + 2, temperature=0
    )
    assert rows[0].tokens == said + output(tokenizer, "99980001")[:2] and rows[0].finish == "length"
    assert rows[0].mask == [1] * len(said) + [0, 0]
    rows = scripted(tokenizer, {1: said}, context=len(said) + 1).generate_batch(
        [1], max_tokens=99, temperature=0
    )
    assert (
        rows[0].tokens == said + output(tokenizer, "99980001")[:1] and rows[0].finish == "context"
    )


@pytest.mark.parametrize("feed", [1, 64])
def test_the_model_sees_what_the_calculator_said(tokenizer, feed, monkeypatch):
    """A real model, ragged rows, several forced tokens at once: every row's tokens are those of full forwards."""
    monkeypatch.setattr(engine_module, "FEED_TOKENS", feed)
    m = model(tokenizer.vocab_size, n_kv_head=2, sequence_len=48)
    e = Engine(m, tokenizer)
    e._stops = set()
    prompts = [[1], [2, 3, 4], [5, 6], [7, 8, 9, 10]]
    first = [greedy(m, p, 1)[0] for p in prompts]
    e._call = (-1, first[0])  # what row 0 says first ends a call that we open by hand
    opened = e._open

    def open_with_a_call(*args):
        rows, live = opened(*args)
        for r in live:
            r.call = tokenizer.encode("6*7")
        return rows, live

    e._open = open_with_a_call
    answer = output(tokenizer, "42")
    for p, row in zip(
        prompts, e.generate_batch(prompts, max_tokens=16, temperature=0), strict=True
    ):
        tokens, called = list(p), False
        while len(tokens) - len(p) < 16:
            tokens += greedy(m, tokens, 1)
            if tokens[-1] == first[0] and not called:
                tokens += answer
                called = True
        assert row.tokens == tokens[len(p) : len(p) + 16]


# --- replies


def test_a_reply_streams_text_and_tool_calls(tokenizer):
    said = [
        *tokenizer.encode("It is "),
        *call(tokenizer, "12+30"),
        *output(tokenizer, "42"),
        *tokenizer.encode("42. 😀"),
    ]
    said.append(tokenizer.specials["<|assistant_end|>"])
    conversation = {"messages": [{"role": "user", "content": "What is 12+30?"}]}
    prompt = tokenizer.render_prompt(conversation)
    r = Reply(scripted(tokenizer, {tokenizer.bos: said}, len(prompt)), conversation, temperature=0)
    pieces = list(r)
    assert "".join(text for kind, text in pieces if kind == "text") == "It is 42. 😀"
    assert [p for p in pieces if p[0] != "text"] == [("python", "12+30"), ("python_output", "42")]
    parts = [("text", "It is "), ("python", "12+30"), ("python_output", "42"), ("text", "42. 😀")]
    assert r.content == [{"type": kind, "text": text} for kind, text in parts]
    assert r.finish == "stop" and r.tokens == len(said) and r.prompt == prompt
    whole = [*conversation["messages"], {"role": "assistant", "content": r.content}]
    assert (
        tokenizer.render_conversation({"messages": whole})[0] == prompt + said
    )  # what it said is what it will be shown


def test_a_reply_never_splits_a_character(tokenizer):  # trap 16
    text = "Grüße 😀🦄 世界"
    said = [tokenizer.ranks[bytes([b])] for b in text.encode()]  # every byte a token of its own
    conversation = {"messages": [{"role": "user", "content": "hi"}]}
    prompt = tokenizer.render_prompt(conversation)
    r = Reply(
        scripted(tokenizer, {tokenizer.bos: [*said, tokenizer.bos]}, len(prompt)),
        conversation,
        temperature=0,
    )
    pieces = [p for _, p in r]
    assert (
        "".join(pieces) == text == r.content
        and all("�" not in p for p in pieces)
        and len(pieces) == len(text)
    )
    cut = Reply(
        scripted(tokenizer, {tokenizer.bos: said}, len(prompt)),
        conversation,
        temperature=0,
        max_tokens=9,
    )
    assert "".join(p for _, p in cut) == "Grüße �" and cut.finish == "length"


def test_a_reply_that_stops_inside_a_call_loses_nothing(tokenizer):
    said = [tokenizer.specials["<|user_start|>"], *call(tokenizer, "1+1")[:-1], tokenizer.bos]
    conversation = {"messages": [{"role": "user", "content": "hi"}]}
    r = Reply(
        scripted(tokenizer, {tokenizer.bos: said}, len(tokenizer.render_prompt(conversation))),
        conversation,
        temperature=0,
    )
    assert list(r) == [("python", "1+1")] and r.finish == "stop"


def test_long_conversations_lose_their_oldest_exchanges(tokenizer):
    turn = [
        {"role": "user", "content": "The cat sat"},
        {"role": "assistant", "content": "on the mat."},
    ]
    system = {"role": "system", "content": "Grüße"}
    whole = {"messages": [system, *turn * 5, turn[0]], "kind": "x"}
    size = len(tokenizer.render_prompt(whole))
    assert fit_conversation(tokenizer, whole, size) == (whole, 0)
    less, dropped = fit_conversation(tokenizer, whole, size - 1)
    assert dropped == 1 and less == {"messages": [system, *turn * 4, turn[0]], "kind": "x"}
    last, dropped = fit_conversation(tokenizer, whole, 1)
    assert dropped == 5 and last["messages"] == [system, turn[0]]
    assert len(whole["messages"]) == 12  # the caller's is left alone
