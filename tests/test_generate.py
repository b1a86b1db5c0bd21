"""
Generation: cached decoding equals the full forward, rows are independent of each other, sampling,
the calculator's tool calls, and rows that join a running batch or leave it.
"""

import itertools
import math
import platform
from types import SimpleNamespace

import priors
import pytest
import torch
from torch import nn

from nanochat.base.common import UserError
from nanochat.chat import generate
from nanochat.chat.generate import Batch, Continuation, Engine, Sampling, choose, clip
from nanochat.chat.packed import PackedLinear, packed_copy, quick_norm
from nanochat.chat.reply import Reply, fit_conversation, fit_text
from nanochat.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.model.cache import KVCache
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
    "looks back": {
        "copy_heads": 1,
        "convolutions": True,
        "value_embeddings": True,
        "pair_embeddings": 2,
        "window_pattern": "SL",
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
    """The likeliest continuation by full forward passes without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            tokens.append(int(m.logits(m(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


def with_specials(tokenizer, **ids):
    """A tokenizer with other special ids, as in assistant_end=5; by default -1, never sampled."""
    specials = dict.fromkeys(SPECIAL_TOKENS, -1)
    specials |= {f"<|{name}|>": id for name, id in ids.items()}
    return SimpleNamespace(
        specials=specials,
        never_sampled=(specials["<|output_start|>"], specials["<|output_end|>"]),
        encode=tokenizer.encode,
        decode=tokenizer.decode,
    )


def quiet(tokenizer, m):
    """An engine that nothing stops: random models sample <|bos|> and tool calls at any time."""
    return Engine(m, with_specials(tokenizer))


# --- cached decoding


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decoding_is_the_full_forward_up_to_the_last_position(tokenizer, shape, monkeypatch):
    m = model(tokenizer.vocab_size, **shape)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2]]
    want = [greedy(m, p, 33 - len(p)) for p in prompts]
    for tokens in (8192, 3):  # the prompts in one pass, and in chunks
        monkeypatch.setattr(generate, "PREFILL_TOKENS", tokens)
        monkeypatch.setattr(generate, "PREFILL_CHUNK", 3)
        samples = quiet(tokenizer, m).generate_batch(prompts, max_tokens=None, temperature=0)
        assert [s.tokens for s in samples] == want
        assert [s.finish for s in samples] == ["context"] * 3
    for p, w in zip(prompts, want, strict=True):  # and each alone
        (alone,) = quiet(tokenizer, m).generate_batch([p], max_tokens=None, temperature=0)
        assert alone.tokens == w


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
@pytest.mark.parametrize("copy_heads", [0, 1])
def test_the_packed_copy_computes_the_same_and_leaves_the_model_alone(
    tokenizer, dtype, frozen, copy_heads
):
    m = model(tokenizer.vocab_size, dtype, n_kv_head=2, copy_heads=copy_heads)
    if frozen:
        m.cast_for_inference()
    names = [name for name, _ in m.named_parameters()]
    with torch.inference_mode():
        body, head = packed_copy(m)
        idx = torch.tensor([[1, 2, 3, 4]])
        got = head(body(idx, body.new_cache(1, 8))).float()
        want = torch.nn.functional.linear(m(idx), m.head_weight.to(dtype)).float()
    near = {"atol": 1e-4, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(got, want, **near)
    assert [name for name, _ in m.named_parameters()] == names
    assert {p.dtype for p in m.parameters()} == {dtype if frozen else torch.float32}
    engine = Engine(m, tokenizer)
    # The layout of a CPU is made anew for a model in training; some CPUs have none for bfloat16
    layers = [layer for layer in (*body.modules(), head) if isinstance(layer, PackedLinear)]
    laid_out = {layer.weight is None for layer in layers}
    assert (engine.packed() is engine.packed()) == (frozen or laid_out == {False})


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_the_quick_norm_is_rms_norm(size):
    x = size * torch.randn(3, 2, 48, generator=torch.Generator().manual_seed(1))
    want = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(quick_norm(x).double(), want, atol=1e-6, rtol=1e-5)


def test_training_between_two_calls_is_seen(tokenizer):
    m = model(tokenizer.vocab_size)
    e = quiet(tokenizer, m)
    e.generate_batch([[1, 2, 3]], max_tokens=4, temperature=0)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    (sample,) = e.generate_batch([[1, 2, 3]], max_tokens=20, temperature=0)
    assert sample.tokens == greedy(m, [1, 2, 3], 20)


# --- rows and seeds


def test_rows_do_not_depend_on_their_company(tokenizer):
    e = quiet(tokenizer, model(tokenizer.vocab_size))
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
    alone = [e.generate_batch([p], 4, 12, seed=7) for p in prompts]
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


def test_samples_differ_from_their_first_token_on(tokenizer):
    e = quiet(tokenizer, model(tokenizer.vocab_size))
    rows = e.generate_batch([[1, 2, 3]], num_samples=16, max_tokens=3)
    assert len({r.tokens[0] for r in rows}) > 8 and len({tuple(r.tokens) for r in rows}) == 16


def test_the_stream_brings_what_the_batch_returns(tokenizer):
    e = Engine(model(tokenizer.vocab_size), tokenizer)
    rows = e.generate_batch([[1, 2, 3]], num_samples=5, max_tokens=20, seed=1)
    tokens, finish = [[] for _ in rows], [""] * 5
    for step in e.generate([1, 2, 3], num_samples=5, max_tokens=20, seed=1):
        for t in step:
            assert not finish[t.row]
            finish[t.row] = t.finish
            if t.finish != "stop":
                tokens[t.row].append(t.id)
    assert tokens == [r.tokens for r in rows] and finish == [r.finish for r in rows]


def test_finished_rows_leave_the_batch(tokenizer, monkeypatch):
    """Rows stop at different times; the others continue unchanged, and only they are computed."""
    m = model(tokenizer.vocab_size)
    prompts, seeds = [[i + 1] for i in range(8)], list(range(8))
    endless = quiet(tokenizer, m).generate_batch(prompts, max_tokens=25, seed=seeds)
    ends = {"assistant_end": endless[0].tokens[5], "bos": endless[1].tokens[12]}
    e = Engine(m, with_specials(tokenizer, **ends))
    want = [
        e.generate_batch([p], max_tokens=25, seed=[s])[0]
        for p, s in zip(prompts, seeds, strict=True)
    ]

    passes = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT,
        "forward",
        lambda self, idx, cache: passes.append(len(idx)) or forward(self, idx, cache),
    )
    samples = e.generate_batch(prompts, max_tokens=25, seed=seeds)
    assert samples == want
    lengths = sorted(len(s.tokens) + (s.finish == "stop") for s in samples)
    assert passes == [sum(length > step for length in lengths) for step in range(lengths[-1])]
    stopped = [s for s in samples if s.finish == "stop"]
    assert len(stopped) >= 2 and {s.stop for s in stopped} <= set(ends.values())


# --- joining and leaving a running batch


def requests(vocab_size, prompt_length):
    """Eight requests of different prompts, seeds, samplings and lengths."""
    g = torch.Generator().manual_seed(9)
    samplings = [
        Sampling(0),
        Sampling(0.7, top_k=5),
        Sampling(1.0),
        Sampling(1.3, top_p=0.8),
        Sampling(0.7, top_k=5),
        Sampling(2.0, top_k=40, top_p=0.9),
        Sampling(0.01),
        Sampling(1.0, top_k=1),
    ]
    for i, sampling in enumerate(samplings):
        size = 1 + i * (prompt_length - 1) // 7
        prompt = torch.randint(0, vocab_size, (size,), generator=g).tolist()
        yield {"prompts": [prompt], "seeds": [f"{i}/0"], "sampling": sampling, "max_tokens": 12 - i}


def join(batch, prompts, seeds, sampling, max_tokens=256, num_samples=1):
    return batch.join(
        [
            Continuation(prompt, seed, sampling, max_tokens, num_samples)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    )


def run_alone(engine, request):
    batch = Batch(engine)
    samples = join(batch, **request)
    while len(batch):
        batch.step()
    return list(samples.values())


@pytest.mark.parametrize("prior", [False, True])
def test_requests_that_join_a_running_batch_get_what_they_get_alone(tokenizer, tmp_path, prior):
    if prior:
        path = priors.write(tmp_path / "prior.safetensors", priors.terms())
        m = priors.model_with(path, shape={"window_pattern": "SL"})
    else:
        m = model(tokenizer.vocab_size, n_kv_head=2, window_pattern="SL")
    e = quiet(tokenizer, m)
    asked = list(requests(m.config.vocab_size, m.config.sequence_len - 2))
    want = [run_alone(e, request) for request in asked]

    batch, joined = Batch(e), []
    for wait, request in zip((0, 0, 3, 1, 0, 2, 1, 4), asked, strict=True):
        for _ in range(wait):
            batch.step()
        joined.append(join(batch, **request, num_samples=2))
    sizes = []
    while len(batch):
        sizes.append(len(batch))
        batch.step()
    assert max(sizes) > 4 and min(sizes) < 4
    assert [list(samples.values())[:1] for samples in joined] == want
    numbers = [number for samples in joined for number in samples]
    assert numbers == list(range(16))


@pytest.fixture(params=[1, 2])
def threads(request):
    """Torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have other kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        {"n_head": 1, "n_kv_head": 1},
        {"n_head": 2, "n_kv_head": 1, "window_pattern": "SL"},
        {"copy_heads": 1, "convolutions": True, "value_embeddings": True, "pair_embeddings": 2},
    ],
)
def test_on_a_cpu_a_row_is_the_same_to_the_bit_in_any_company(tokenizer, dtype, shape):
    m = model(320, dtype, n_embd=64, sequence_len=160, **shape)  # 320: whole vectors of numbers
    m.cast_for_inference()
    draw = torch.Generator().manual_seed(3)
    lengths = (3, 90, 17, 40, 5, 64, 130, 33, 2)
    prompts = [torch.randint(300, (n,), generator=draw).tolist() for n in lengths]
    sampling = Sampling(1.3, alternatives=2)  # so that log probabilities are compared as well

    def run(groups):
        batch, got = Batch(Engine(m, tokenizer)), {}
        for group in [*groups, []]:
            join(batch, [prompts[i] for i in group], [str(i) for i in group], sampling, 16)
            for _ in range(4 if group else 20):
                for token in batch.step():
                    got.setdefault(token.row, []).append(token[1:])
        return [got[row] for row in sorted(got)]

    alone = [tokens for i in range(len(prompts)) for tokens in run([[i]])]
    assert run([[0, 1, 2, 3], [4], [5, 6], [7, 8]]) == alone


def test_every_step_brings_a_token_for_every_row(tokenizer):
    batch, counts = Batch(quiet(tokenizer, model(tokenizer.vocab_size))), {}
    for start in range(3):
        joined = join(batch, [[1, 2], [3]], ["a", "b"], Sampling(), 5)
        counts |= dict.fromkeys(joined, 0)
        tokens = batch.step()
        assert [t.row for t in tokens] == list(range(2 * start + 2))
        for token in tokens:
            counts[token.row] += 1
    while tokens := batch.step():
        for token in tokens:
            counts[token.row] += 1
            assert token.finish == ("length" if counts[token.row] == 5 else "")
    assert set(counts.values()) == {5} and len(batch) == 0


def test_a_cancelled_row_leaves_and_changes_no_other(tokenizer):
    e = quiet(tokenizer, model(tokenizer.vocab_size))
    prompts = [[1], [2, 3], [4, 5, 6]]
    want = e.generate_batch(prompts, max_tokens=9, seed=[0, 1, 2])
    batch = Batch(e)
    samples = join(batch, prompts, ["0/0", "1/0", "2/0"], Sampling(), 9)
    batch.step()
    batch.step()
    batch.cancel(0)
    batch.cancel(77)  # never was in the batch
    assert len(batch) == 2
    while len(batch):
        assert all(token.row != 0 for token in batch.step())
    batch.cancel(1)  # has finished
    assert samples[0].finish == "cancelled" and samples[0].tokens == want[0].tokens[:2]
    assert [samples[1], samples[2]] == want[1:]
    assert batch.step() == []
    again = join(batch, [[4, 5, 6]], ["2/0"], Sampling(), 9)  # an emptied batch serves on
    while len(batch):
        batch.step()
    assert list(again.values()) == want[2:]


# --- sampling


def test_ids_in_the_padding_are_never_sampled(tokenizer):  # even with huge weights
    m = model(tokenizer.vocab_size)
    assert m.config.padded_vocab > m.config.vocab_size
    with torch.no_grad():
        m.head.weight[m.config.vocab_size :] = 1e3
    e = quiet(tokenizer, m)
    for temperature in (0, 1, 100):
        rows = e.generate_batch([[1, 2]], 8, 20, temperature)
        assert max(max(r.tokens) for r in rows) < tokenizer.vocab_size


def test_choose():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    p = torch.softmax(logits.double(), -1)[0]
    assert choose(logits, [0.9], [Sampling(temperature=0)]) == [1]
    assert choose(logits, [0.999], [Sampling(top_k=1)]) == [1]
    assert choose(logits, [0.999], [Sampling(top_p=0.01)]) == [1]
    n = 4000
    uniform = [(i + 0.5) / n for i in range(n)]

    def shares(**sampling):
        ids = choose(logits.expand(n, 4), uniform, [Sampling(**sampling)] * n)
        return torch.bincount(torch.tensor(ids), minlength=4).double() / n

    for top_k in (None, 0, 4, 99):
        torch.testing.assert_close(shares(top_k=top_k), p, atol=1e-3, rtol=0)
    assert shares(top_k=2).nonzero().flatten().tolist() == [1, 3]
    crossing = shares(top_p=float(p[1]) + 0.01)  # the token that crosses the threshold stays
    assert crossing.nonzero().flatten().tolist() == [1, 3]
    assert shares(top_p=float(p[1]) - 0.01)[1] == 1
    assert shares(temperature=1e-4)[1] == 1
    even = torch.full((4,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(shares(temperature=1e4), even, atol=2e-3, rtol=0)


def test_choose_at_the_edges_takes_only_possible_tokens():
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf")], [0.0, -200.0, float("-inf")]])
    for u in (0.0, 1 - 2**-53):
        for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.999)):
            assert choose(logits, [u, u], [sampling] * 2) == [1, 0]


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
            e.generate_batch([[1]], **bad)
    with pytest.raises(ValueError, match="at least one token"):
        e.generate_batch([[1], []])
    with pytest.raises(ValueError, match="at least one sample"):
        e.generate_batch([[1]], num_samples=0)
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
    (row,) = quiet(tokenizer, m).generate_batch([prompt], temperature=0)
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
    assert [(r.finish, r.tokens) for r in e.generate_batch([[1]], max_tokens=0)] == [("length", [])]


# --- the calculator


class Script(nn.Module):
    """A model that follows a script, which the first token of the prompt names."""

    def __init__(self, vocab_size, scripts, prompt_length, context=200):
        super().__init__()
        self.config = SimpleNamespace(
            sequence_len=context,
            softcap=0.0,
            n_embd=vocab_size,
            copy_heads=0,
            n_head=1,
            n_kv_head=1,
        )
        self.scripts, self.start = scripts, prompt_length
        self.blocks, self.compute_dtype = nn.ModuleList(), torch.float32
        self.cos = self.sin = torch.zeros(0, 0)
        self.head_weight = torch.eye(vocab_size)  # hidden states are logits

    def new_cache(self, batch, capacity):
        return KVCache(1, batch, 1, capacity, 1, "cpu", torch.float32)

    def forward(self, idx, cache):
        cache.begin(idx.size(1))
        cache.with_earlier_tokens(idx, 0, 0)
        out = torch.zeros(*idx.shape, len(self.head_weight))
        for b, length in enumerate(cache.lengths):
            for t in range(idx.size(1)):
                seen = cache.tokens[0, b, 0, : length + t + 1, 0].tolist()
                script = self.scripts.get(seen[0], [])
                at = len(seen) - self.start
                out[b, t, script[at] if 0 <= at < len(script) else 0] = 100.0
        return out


def scripted(tokenizer, scripts, prompt_length=1, context=200):
    return Engine(Script(tokenizer.vocab_size, scripts, prompt_length, context), tokenizer)


def call(tokenizer, expression):
    s = tokenizer.specials
    return [s["<|python_start|>"], *tokenizer.encode(expression), s["<|python_end|>"]]


def output(tokenizer, text):
    s = tokenizer.specials
    return [s["<|output_start|>"], *tokenizer.encode(text), s["<|output_end|>"]]


def test_the_calculator_answers_in_every_row(tokenizer):
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
    forced = output(tokenizer, "99980001")
    e = scripted(tokenizer, {1: said})
    (sample,) = e.generate_batch([[1]], max_tokens=len(said) + 2, temperature=0)
    assert sample.tokens == said + forced[:2] and sample.finish == "length"
    assert sample.mask == [1] * len(said) + [0, 0]
    e = scripted(tokenizer, {1: said}, context=len(said) + 1)
    (sample,) = e.generate_batch([[1]], max_tokens=99, temperature=0)
    assert sample.tokens == said + forced[:1] and sample.finish == "context"


def test_the_model_sees_the_output_of_the_calculator(tokenizer):
    """A real model, ragged rows: each row equals full forward passes, forced tokens included."""
    m = model(tokenizer.vocab_size, n_kv_head=2, sequence_len=48)
    prompts = [[1], [2, 3, 4], [5, 6], [7, 8, 9, 10]]
    plain = greedy(m, prompts[0], 16)
    start, end = plain[0], next(t for t in plain if t != plain[0])
    words = with_specials(tokenizer, python_start=start, python_end=end, output_start=11)
    words.specials["<|output_end|>"] = 12
    words.decode = lambda ids: "6*7"
    forced = [11, *tokenizer.encode("42"), 12]
    samples = Engine(m, words).generate_batch(prompts, max_tokens=16, temperature=0)
    calls = 0
    for prompt, sample in zip(prompts, samples, strict=True):
        tokens, is_open = list(prompt), False
        while len(tokens) - len(prompt) < 16:
            tokens += greedy(m, tokens, 1)
            if is_open and tokens[-1] == end:
                tokens += forced
                calls += 1
            is_open = tokens[-1] == start or (is_open and tokens[-1] not in (end, 12))
        assert sample.tokens == tokens[len(prompt) : len(prompt) + 16]
    assert calls > 0


# --- replies


def reply_to(tokenizer, script, **sampling):
    """(the reply of a scripted model to a question, its pieces, the prompt)."""
    prompt = tokenizer.render_prompt({"messages": [{"role": "user", "content": "What is 12+30?"}]})
    e = scripted(tokenizer, {tokenizer.bos: script}, len(prompt))
    reply = Reply(tokenizer)
    return reply, list(reply.stream(e.generate(prompt, temperature=0, **sampling))), prompt


def test_a_reply_streams_text_and_tool_calls(tokenizer):
    said = [
        *tokenizer.encode("It is "),
        *call(tokenizer, "12+30"),
        *output(tokenizer, "42"),
        *tokenizer.encode("42. 😀"),
        tokenizer.specials["<|assistant_end|>"],
    ]
    reply, pieces, prompt = reply_to(tokenizer, said)
    assert "".join(text for kind, text in pieces if kind == "text") == "It is 42. 😀"
    assert [p for p in pieces if p[0] != "text"] == [("python", "12+30"), ("python_output", "42")]
    parts = [("text", "It is "), ("python", "12+30"), ("python_output", "42"), ("text", "42. 😀")]
    assert reply.content == [{"type": kind, "text": text} for kind, text in parts]
    assert reply.finish == "stop" and reply.tokens == len(said)
    question = {"role": "user", "content": "What is 12+30?"}
    whole = [question, {"role": "assistant", "content": reply.content}]
    # what the model said is what it is shown in the next turn
    assert tokenizer.render_conversation({"messages": whole})[0] == prompt + said


def test_a_reply_never_splits_a_character(tokenizer):
    text = "Grüße 😀🦄 世界"
    said = [tokenizer.ranks[bytes([b])] for b in text.encode()]  # every byte a token of its own
    reply, pieces, _ = reply_to(tokenizer, [*said, tokenizer.bos])
    texts = [piece for _, piece in pieces]
    assert "".join(texts) == text == reply.content and len(texts) == len(text)
    assert all("�" not in piece for piece in texts)
    reply, pieces, _ = reply_to(tokenizer, said, max_tokens=9)
    assert "".join(piece for _, piece in pieces) == "Grüße �" and reply.finish == "length"


def test_a_reply_that_stops_inside_a_call_loses_nothing(tokenizer):
    said = [tokenizer.specials["<|user_start|>"], *call(tokenizer, "1+1")[:-1], tokenizer.bos]
    reply, pieces, _ = reply_to(tokenizer, said)
    assert pieces == [("python", "1+1")] and reply.finish == "stop"


def test_text_is_continued_in_whole_characters_without_special_tokens(tokenizer):
    said = [tokenizer.ranks[bytes([b])] for b in "é 😀".encode()]
    said.insert(2, tokenizer.specials["<|user_start|>"])
    prompt, _ = fit_text(tokenizer, "The cat", 100)
    e = scripted(tokenizer, {tokenizer.bos: [*said, tokenizer.bos]}, len(prompt))
    reply = Reply(tokenizer, plain=True)
    pieces = [piece for _, piece in reply.stream(e.generate(prompt, temperature=0))]
    assert "".join(pieces) == "é 😀" and all("�" not in piece for piece in pieces)


def test_a_long_text_keeps_its_end(tokenizer):
    bos, *tokens = tokenizer.encode("The cat sat on the mat.", bos=True)
    for limit in range(2, len(tokens) + 3):
        kept = tokens[-(limit - 1) :]
        wanted = [bos, *kept], len(tokens) - len(kept)
        assert fit_text(tokenizer, "The cat sat on the mat.", limit) == wanted


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


def test_exchanges_are_dropped_as_if_the_whole_were_rendered_each_time(tokenizer):
    """The plain way, for conversations of all kinds and every limit."""

    def plainly(conversation: dict, first: int, limit: int) -> tuple[list[dict], int]:
        messages, dropped = list(conversation["messages"]), 0
        while len(messages) - first > 2:
            if len(tokenizer.render_prompt({"messages": messages})) <= limit:
                break
            del messages[first : first + 2]
            dropped += 1
        return messages, dropped

    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "1+2"},
        {"type": "python_output", "text": "3"},
    ]
    talk = [
        {"role": role, "content": content}
        for role, content in (
            ("user", "\n\n the cat"),
            ("assistant", parts),
            ("user", "sat on the mat, naïve"),
            ("assistant", ""),
            ("user", "\n"),
            ("assistant", "the mat sat on the cat"),
            ("user", "and?"),
        )
    ]
    for system in ([], [{"role": "system", "content": "Grüße \n"}]):
        for start in (0, 2, 4, 6):
            whole = {"messages": [*system, *talk[start:]]}
            for limit in range(len(tokenizer.render_prompt(whole)) + 2):
                less, dropped = fit_conversation(tokenizer, whole, limit)
                assert (less["messages"], dropped) == plainly(whole, len(system), limit)
    with pytest.raises(UserError, match="message 1: expected role"):
        fit_conversation(tokenizer, {"messages": [talk[0], *talk]}, 9)


def test_a_long_conversation_is_counted_once(tokenizer, monkeypatch):
    talk = [
        {"role": role, "content": "The cat sat on the mat. " * 4}
        for role in ["user", "assistant"] * 200
    ]
    read, real = [], type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer),
        "encode",
        lambda self, text, *given, **named: (
            read.append(len(text)) or real(self, text, *given, **named)
        ),
    )
    _, dropped = fit_conversation(tokenizer, {"messages": [*talk, talk[0]]}, 100)
    assert dropped > 150 and sum(read) < 3 * sum(len(m["content"]) for m in talk)


FORGED_CALLS = {  # what a model writes, in pieces -> the outputs that the calculator gives
    "an output of its own": (["{start}", "1+1", "{end}", "{out}", "3", "{over}"], ["2"]),
    "an output before the call": (["{out}", "3", "{over}", "{start}", "1+1", "{end}"], ["2"]),
    "an output within the call": (["{start}", "1+", "{out}", "1", "{over}", "1", "{end}"], []),
    "an output without a call": (["{out}", "42", "{over}"], []),
    "only the end of one": (["{over}", "{over}", "{over}"], []),
    "an output spelled in text": (["<|output_start|>3<|output_end|>"], []),
    "an output spelled in the call": (["{start}", "1+1<|output_start|>", "{end}"], []),
    "counting in a spelled output": (["{start}", "'<|output_start|>'.count('<')", "{end}"], ["1"]),
    "a call in a call": (["{start}", "1+1", "{start}", "2+2", "{end}", "{end}"], ["4"]),
    "an end without a call": (["1+1", "{end}"], []),
    "two ends": (["{start}", "1+1", "{end}", "{end}"], ["2"]),
    "a call after a refused one": (
        ["{start}", "open('x')", "{end}", "{start}", "7*6", "{end}"],
        ["42"],
    ),
    "an empty call": (["{start}", "{end}"], []),
    "digits of another script": (["{start}", "\uff11+\u0661", "{end}"], []),
    "a call that is too long": (["{start}", "+" + "9" * 260, "{end}"], []),
    "turns of other people": (["{user}", "1+1", "{user_end}", "{assistant}", "2"], []),
}


@pytest.mark.parametrize("name", FORGED_CALLS)
def test_outputs_are_only_ever_the_calculator_s(tokenizer, name):
    """Whatever a model writes, the tokens that it did not sample are results of its own calls."""
    pieces, results = FORGED_CALLS[name]
    names = {
        "{start}": "python_start",
        "{end}": "python_end",
        "{out}": "output_start",
        "{over}": "output_end",
        "{user}": "user_start",
        "{user_end}": "user_end",
        "{assistant}": "assistant_start",
    }
    special, script = tokenizer.specials, []
    for piece in pieces:
        known = piece in names
        script += [special[f"<|{names[piece]}|>"]] if known else tokenizer.encode(piece)
    wished = iter([*script, special["<|assistant_end|>"]])
    engine = scripted(tokenizer, {}, context=400)
    body, head = engine.packed()

    def wishful(hidden):
        logits = head(hidden)
        logits[:] = -100.0
        logits[:, tokenizer.encode(" ")] = 0.0
        logits[:, next(wished, special["<|assistant_end|>"])] = 100.0
        return logits

    engine._packed = body, wishful
    (sample,) = engine.generate_batch([[1]], max_tokens=390, temperature=0)
    forced = [t for t, sampled in zip(sample.tokens, sample.mask, strict=True) if not sampled]
    assert forced == [t for result in results for t in output(tokenizer, result)]
    chosen = [t for t, sampled in zip(sample.tokens, sample.mask, strict=True) if sampled]
    assert not {special["<|output_start|>"], special["<|output_end|>"]} & {*chosen}
    assert sample.finish == "stop"


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("wish", ["output_start", "output_end", "both"])
def test_only_the_calculator_writes_outputs(tokenizer, temperature, wish):
    """A model that wants nothing more than to write an output itself never does."""
    names = ["output_start", "output_end"] if wish == "both" else [wish]
    ids = [tokenizer.specials[f"<|{name}|>"] for name in names]
    engine = Engine(model(tokenizer.vocab_size, softcap=0.0).requires_grad_(False), tokenizer)
    body, head = engine.packed()

    def wishful(hidden):
        logits = head(hidden)
        logits[:, ids] = 1e3
        return logits

    engine._packed = body, wishful
    samples = engine.generate_batch([[1], [2]], 3, max_tokens=20, temperature=temperature, top_k=0)
    for sample in samples:
        assert sample.tokens or sample.finish == "stop"
        assert not set(sample.tokens) & set(ids)


def test_a_softcap_gives_no_chance_back_to_an_output(tokenizer):
    """Capped, what is forbidden is as likely as any token that is very unlikely."""
    engine = Engine(model(tokenizer.vocab_size, softcap=1.0).requires_grad_(False), tokenizer)
    body, head = engine.packed()

    def wishful(hidden):
        logits = head(hidden)
        logits[:] = -1e3
        logits[:, list(tokenizer.never_sampled)] = 1e3
        return logits

    engine._packed = body, wishful
    samples = engine.generate_batch([[1]], 32, max_tokens=30, temperature=0.2)
    drawn = [
        id
        for sample in samples
        for id, sampled in zip(sample.tokens, sample.mask, strict=True)
        if sampled
    ]
    assert len(drawn) > 300 and not set(drawn) & set(tokenizer.never_sampled)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(1.0), Sampling(1.0, 5), Sampling(1.0, None, 0.5)]
)
def test_outputs_that_are_no_numbers_are_an_error(bad, sampling):
    logits = torch.zeros(2, 9)
    logits[1, 3] = bad
    with pytest.raises(UserError, match="not numbers"):
        choose(logits, [0.5, 0.5], [sampling] * 2)
