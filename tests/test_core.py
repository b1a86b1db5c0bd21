"""CORE: scores equal those of plain full passes; few-shot draws, long prompts, ties, bad bundles."""

import json
import os
from dataclasses import replace
from itertools import chain
from pathlib import Path
from random import Random

import priors
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.base import logbook
from nanochat.base.common import UserError
from nanochat.commands import base_eval, base_train
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval import core_scorer
from nanochat.eval.core import choose, evaluate, summarise
from nanochat.eval.core_bundle import FIELDS, CoreTask, load_bundle
from nanochat.eval.core_items import PROMPTS, prepare
from nanochat.eval.core_scorer import Score, Scorer
from nanochat.eval.scores import accuracy
from nanochat.model import prior_artifact
from nanochat.model.config import AttentionPriorKnobs, GPTConfig
from nanochat.model.gpt import GPT

WORDS = [
    "cat",
    "dog",
    "tree",
    "river",
    "old",
    "green",
    "sings",
    "walks",
    "under",
    "the",
    "a",
    "never",
    "seven",
    "stone",
    "who",
    "what",
]
BUNDLE = (
    Path(
        os.environ.get(
            "NANOCHAT_SHARED_DATA", Path(__file__).resolve().parents[1].parent / "shared" / "data"
        )
    )
    / "eval_bundle"
)
SHAPES = {
    "default": {},
    "grouped, tied, no cap": {"n_kv_head": 1, "tie_embeddings": True, "softcap": 0.0},
    "windows, swiglu": {"window_pattern": "S", "activation": "swiglu", "n_kv_head": 2},
    "copy heads": {"copy_heads": 1, "value_embeddings": True},
    "convolutions": {"convolutions": True},
    "pair embeddings": {"pair_embeddings": 2},
}
CPU = tiny.CPU


def say(rng, low, high):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def made(kind, n=14, shots=3, seed=0, delimiter=" ", low=2, high=9):
    """A task of random words; choices differ in length, and one may begin another."""
    rng = Random(f"{seed}/{kind}")
    rows = []
    for _ in range(n):
        if kind == "multiple_choice":
            first = say(rng, 1, 3)
            options = [first, f"{first} {say(rng, 1, 4)}", say(rng, 1, 6), say(rng, 1, 2)][
                : rng.randint(2, 4)
            ]
            rows.append(
                {
                    "query": say(rng, low, high),
                    "choices": options,
                    "gold": rng.randrange(len(options)),
                }
            )
        elif kind == "schema":
            begin = say(rng, low, high)
            options = [f"{begin} {say(rng, 1, 3)}", f"{begin} {say(rng, 1, 3)}"]
            rows.append(
                {
                    "context_options": options,
                    "continuation": say(rng, 1, 4) + ".",
                    "gold": rng.randrange(2),
                }
            )
        else:
            rows.append({"context": say(rng, low, high) + " ", "continuation": say(rng, 1, 2)})
    return CoreTask(
        kind, kind, shots, delimiter, 0.0 if kind == "language_modeling" else 0.25, rows
    )


TASKS = {kind: made(kind) for kind in FIELDS}


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(
        [" ".join(Random(1).choices(WORDS, k=3000)) + ". Question: Answer:"], 330
    )


def model(tok, sequence_len=64, **shape):
    """A random tiny model, with no matrix at zero as training starts them."""
    config = {
        "sequence_len": sequence_len,
        "vocab_size": tok.vocab_size,
        "n_layer": 3,
        "n_head": 4,
        "n_kv_head": 4,
        "n_embd": 32,
        **shape,
    }
    return tiny.randomise(GPT.build(GPTConfig(**config)), 5)


# --- the judge: straightforward code, a whole forward pass for every whole sequence


def leading(sequences):
    n = 0
    while all(n < len(s) for s in sequences) and len({s[n] for s in sequences}) == 1:
        n += 1
    return n


def plain_prompts(task, r, tok, context, seed=42):
    """(tokens, start of the scored span) of each sequence of row r, encoded as one text."""
    draw = Random(f"{seed}/{task.name}/{r % PROMPTS if task.shots else 0}").sample(
        range(len(task.rows)), min(task.shots + 1, len(task.rows))
    )
    examples, row, d = (
        [task.rows[e] for e in draw if e != r][: task.shots],
        task.rows[r],
        task.delimiter,
    )
    while True:
        if task.kind == "multiple_choice":
            before = "".join(x["query"] + d + x["choices"][x["gold"]] + "\n\n" for x in examples)
            seqs = [tok.encode(before + row["query"] + d + choice) for choice in row["choices"]]
            starts = [min(leading(seqs), min(len(s) for s in seqs) - 1)] * len(seqs)
        elif task.kind == "schema":
            before = "".join(
                x["context_options"][x["gold"]] + d + x["continuation"] + "\n\n" for x in examples
            )
            seqs = [
                tok.encode(before + begin + d + row["continuation"])
                for begin in row["context_options"]
            ]
            own = [tok.encode(begin + d + row["continuation"]) for begin in row["context_options"]]
            starts = [len(s) - leading([x[::-1] for x in own]) for s in seqs]
        else:
            before = "".join(
                x["context"].strip() + d + x["continuation"] + "\n\n" for x in examples
            )
            seqs = [tok.encode(before + row["context"].strip() + d + row["continuation"])]
            starts = [len(tok.encode((before + row["context"].strip() + d).rstrip()))]
        seqs, starts = [[tok.bos, *s] for s in seqs], [s + 1 for s in starts]
        if max(len(s) for s in seqs) <= context + 1:
            return list(zip(seqs, starts, strict=True))
        if not examples:
            cut = max(len(s) for s in seqs) - context - 1
            assert cut < leading(seqs), "a longer answer than the judge is made for"
            return [
                ([tok.bos, *s[1 + cut :]], start - cut)
                for s, start in zip(seqs, starts, strict=True)
            ]
        examples = examples[:-1]


@torch.no_grad()
def plain_scores(m, task, r, tok):
    scores = []
    for tokens, start in plain_prompts(task, r, tok, m.config.sequence_len):
        logits = m.logits(m(torch.tensor([tokens[:-1]])))[0, start - 1 :]
        target = torch.tensor(tokens[start:])
        scores.append(
            Score(
                F.cross_entropy(logits, target).item(),
                len(target),
                bool((logits.argmax(-1) == target).all()),
            )
        )
    return scores


def best(scores):
    return min(range(len(scores)), key=lambda j: scores[j].nats)


def with_prior(tok, tmp_path, context):
    """A model whose attention prior counts for much."""
    path = priors.write(
        tmp_path / "prior.safetensors",
        priors.terms(vocab=tok.vocab_size),
        tokenizer=tok.fingerprint,
    )
    shape = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    config = GPTConfig(sequence_len=context, vocab_size=tok.vocab_size, **shape)
    config.rap, tensors = prior_artifact.prepare(
        AttentionPriorKnobs(rap=path, rap_alpha=3.0), config, tok.fingerprint, CPU.device
    )
    m = tiny.randomise(GPT.build(config), 5)
    m.prior.load_state_dict(tensors)
    return m


@pytest.mark.parametrize("context", [96, 28])  # with room for the examples, and without
@pytest.mark.parametrize("shape", [*SHAPES.values(), None], ids=[*SHAPES, "attention prior"])
def test_scores_are_those_of_plain_passes_by_whatever_batches(tok, tmp_path, shape, context):
    m = with_prior(tok, tmp_path, context) if shape is None else model(tok, context, **shape)
    kinds = set()
    for task in TASKS.values():
        items, prompts = prepare(task, tok, context)
        kinds |= {
            (i.past > 0, i.cropped, i.shots < task.shots, len(set(map(len, i.ids))) > 1)
            for i in items
        }
        want = [plain_scores(m, task, item.row, tok) for item in items]
        for memory in (1, 2e5, 1e9):  # items one at a time, a few, all of a prompt at once
            got = Scorer(m, memory)(items, prompts)
            assert [best(s) for s in got] == [best(s) for s in want]
            for a, b in zip(chain(*got), chain(*want), strict=True):
                assert a.nats == pytest.approx(b.nats, abs=2e-4) and a[1:] == b[1:]
    assert len(kinds) >= 3, "the items must not be all alike"


@pytest.mark.parametrize("kind", TASKS)
def test_a_question_with_too_many_answers_is_scored_in_parts(tok, monkeypatch, kind):
    m, task, longest = model(tok), TASKS[kind], []
    items, prompts = prepare(task, tok, 64)
    want = Scorer(m)(items, prompts)
    monkeypatch.setattr(core_scorer, "MOST_ROW_BYTES", 0)
    real = m.forward
    monkeypatch.setattr(m, "forward", lambda x, *r: (longest.append(x.size(1)), real(x, *r))[1])
    got = Scorer(m, 1)(items, prompts)
    assert max(longest) <= 64 and [best(s) for s in got] == [best(s) for s in want]
    for a, b in zip(chain(*got), chain(*want), strict=True):
        assert a.nats == pytest.approx(b.nats, abs=2e-4) and a[1:] == b[1:]


def test_what_greedy_decoding_says_is_right(tok):
    """Half the answers are what the model would say: these and only these are right."""
    m, rng, rows = model(tok), Random(3), []
    while len(rows) < 24:
        context, token = say(rng, 2, 6), None
        ids = tok.encode(context)
        with torch.no_grad():
            token = int(m.logits(m(torch.tensor([[tok.bos, *ids]])))[0, -1].argmax())
        text = " sings" if len(rows) % 2 else tok.decode([token])
        if tok.encode(context + text)[:-1] == ids and text.strip() and "\ufffd" not in text:
            rows.append({"context": context, "continuation": text})
    task = CoreTask("said", "language_modeling", 0, "", 0.0, rows)
    found = [scores[0].greedy for scores in Scorer(m)(*prepare(task, tok, 64))]
    assert found == [i % 2 == 0 for i in range(24)]
    assert evaluate(Scorer(m), task, tok, CPU)["accuracy"] == 0.5


def test_shared_beginnings_are_computed_once(tok, monkeypatch):
    task = made("multiple_choice", n=200, shots=8)
    m = model(tok, 256)
    items, prompts = prepare(task, tok, 256)
    seen, forward = [], m.forward
    monkeypatch.setattr(
        m, "forward", lambda idx, *rest: (seen.append(idx.numel()), forward(idx, *rest))[1]
    )
    Scorer(m, 1e6)(items, prompts)
    alone = sum(item.past + len(s) - 1 for item in items for s in item.ids)
    assert sum(seen) * 6 < alone, "padding and prompts included"


def test_memory_that_runs_out_halves_the_pass_and_changes_nothing(tok, monkeypatch, capsys):
    m, task = model(tok), TASKS["multiple_choice"]
    items, prompts = prepare(task, tok, 64)
    want, forward, asked = Scorer(m, 1e9)(items, prompts), m.forward, []

    def limited(idx, *rest):
        asked.append(idx.size(0))
        if idx.size(0) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(idx, *rest)

    monkeypatch.setattr(m, "forward", limited)
    got = Scorer(m, 1e9)(items, prompts)
    assert [best(s) for s in got] == [best(s) for s in want]
    assert asked[:3] == [1, 4, 2] and sum(n > 2 for n in asked) == 2, (
        "what it learned holds for the other prompts too"
    )
    assert (
        capsys.readouterr().err.splitlines()[0]
        == "notice: out of memory with CORE items of 4 rows: continuing with 2"
    )
    calls = []

    def prompt_only(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments)

    monkeypatch.setattr(m, "forward", prompt_only)
    with pytest.raises(UserError, match="out of memory with CORE items of 1 row"):
        Scorer(m)(items, prompts)


# --- few-shot examples


def test_more_examples_than_data_are_clamped_and_counted(tok):
    task = replace(made("multiple_choice", n=5), shots=10)
    items, _ = prepare(task, tok, 512)
    assert [item.shots for item in items] == [4] * 5
    found = evaluate(Scorer(model(tok, 512)), task, tok, CPU)
    assert (
        found["shots"] == 10 and found["fewer"] == 5 and found["cropped"] == found["overlong"] == 0
    )
    assert [i.shots for i in prepare(replace(task, rows=task.rows[:1]), tok, 512)[0]] == [0]


@pytest.mark.parametrize("kind", TASKS)
def test_no_row_is_its_own_example_and_the_seed_decides(tok, kind):
    task = made(kind, n=30, shots=6)
    whole = {}
    for seed in (1, 2):
        items, prompts = prepare(task, tok, 512, seed)
        whole[seed] = [tok.decode(prompts[i.prompt][: i.past] + i.ids[0]) for i in items]
        for item, text in zip(items, whole[seed], strict=True):
            shown = text.removeprefix("<|bos|>").split("\n\n")
            solved = [task.texts(row)[row.get("gold", 0)] for row in task.rows]
            numbers = [solved.index(example) for example in shown[:-1]]
            assert len(set(numbers)) == 6 == item.shots and item.row not in numbers
        assert prepare(task, tok, 512, seed) == (items, prompts)
        assert sum(item.past == len(prompts[item.prompt]) for item in items) == 0
    assert whole[1] != whole[2]


def test_a_part_of_the_items_is_drawn_by_the_seed(tok):
    task = TASKS["schema"]
    rows = [i.row for i in prepare(task, tok, 64, 42, 10)[0]]
    assert len(set(rows)) == 10 and rows == sorted(rows)
    assert (
        rows
        == [i.row for i in prepare(task, tok, 64, 42, 10)[0]]
        != [i.row for i in prepare(task, tok, 64, 43, 10)[0]]
    )
    assert len(prepare(task, tok, 64, 42, 99)[0]) == 14 == len(prepare(task, tok, 64)[0])


# --- beyond the context


def test_long_questions_keep_bos_their_end_and_what_is_scored(tok):
    for kind in TASKS:
        task = made(kind, n=12, shots=2, low=40, high=60)
        items, _ = prepare(task, tok, 32)
        long, _ = prepare(task, tok, 2000)
        assert all(item.cropped and not item.overlong and item.shots == 0 for item in items)
        for item, whole in zip(items, long, strict=True):
            for j, s in enumerate(item.ids):
                assert item.past == 0 and s[0] == tok.bos and len(s) <= 33
                kept = whole.ids[j][whole.starts[j] :]
                assert s[item.starts[j] :] == kept and s[1:] == whole.ids[j][1 - len(s) :]
            assert max(map(len, item.ids)) == 33, "no more than needed is cut"
        found = evaluate(Scorer(model(tok, 32)), task, tok, CPU)
        assert (found["fewer"], found["cropped"], found["overlong"]) == (12, 12, 0)


def test_an_answer_longer_than_the_context_is_scored_on_its_end_and_counted(tok):
    rng = Random(0)
    long = [
        {"query": "who", "choices": [say(rng, 60, 80), say(rng, 1, 3)], "gold": 1} for _ in range(3)
    ]
    tasks = [
        CoreTask("a", "multiple_choice", 1, " ", 0.5, long),
        made("language_modeling", n=3, shots=0),
    ]
    tasks[1].rows[0]["continuation"] = say(rng, 60, 80)
    tasks.append(
        CoreTask(
            "b",
            "schema",
            0,
            " ",
            0.5,
            [{"context_options": ["cat", "dog"], "continuation": say(rng, 60, 80), "gold": 0}],
        )
    )
    for task, n in zip(tasks, (3, 1, 1), strict=True):
        items, _ = prepare(task, tok, 16)
        assert max(len(s) for item in items for s in item.ids) == 17 and all(
            s[0] == tok.bos for item in items for s in item.ids
        )
        assert all(1 <= item.shared <= min(item.starts) for item in items)
        found = evaluate(Scorer(model(tok, 16)), task, tok, CPU)
        assert found["overlong"] == n <= found["cropped"]


# --- verdicts


def test_ties_are_decided_by_lot(tok):
    """A model whose answers are all alike gains nothing by where the right answer stands."""
    m = model(tok)
    with torch.no_grad():
        m.head.weight.zero_()
    rows = [
        {"query": "what", "choices": ["cat", "dog", "tree sings", "river of stone"], "gold": 0}
    ] * 400
    found = evaluate(Scorer(m), CoreTask("tied", "multiple_choice", 0, " ", 0.25, rows), tok, CPU)
    assert found["lo"] <= 0.25 <= found["hi"] and found["guess"] == 0.25
    picked = [
        choose([Score(1.0, 1, False), Score(2.0, 1, False), Score(1.0 + 1e-7, 3, False)], Random(i))
        for i in range(200)
    ]
    assert set(picked) == {0, 2} and 70 < picked.count(0) < 130
    with pytest.raises(UserError, match="not finite"):
        choose([Score(float("nan"), 1, False), Score(1.0, 1, False)], Random(0))


def test_a_fresh_model_scores_what_guessing_does(tok):
    m = GPT.build(
        GPTConfig(
            sequence_len=128, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32
        )
    )
    m.init_weights(1)
    tasks = [made(kind, n=400, shots=shots, seed=shots) for kind in TASKS for shots in (0, 2)]
    results = {f"{t.name}{t.shots}": evaluate(Scorer(m), t, tok, CPU) for t in tasks}
    whole = summarise(results)
    assert abs(whole["score"] - whole["guess"]) < whole["margin"] < 0.05


def test_the_summary_by_hand(tok):
    def row(share, n, chance, guess):
        right = round(share * n)
        return {
            **accuracy([True] * right + [False] * (n - right), chance),
            "guess": guess,
        }

    results = {"a": row(0.5, 100, 0.25, 0.25), "b": row(0.2, 50, 0.0, 0.0)}
    for name, (share, chance) in {"a": (0.5, 0.25), "b": (0.2, 0.0)}.items():
        results[name]["centred"] = (share - chance) / (1 - chance)
    whole = summarise(results)
    assert (
        whole["name"] == "mean centred accuracy of 2 of 2 tasks"
        and whole["score"] == pytest.approx((1 / 3 + 0.2) / 2)
        and whole["guess"] == 0
    )
    many = {str(i): results["a"] for i in range(22)}
    assert summarise(many)["name"] == "CORE"
    assert summarise(many, ["coqa"])["name"] == "mean centred accuracy of 22 of 23 tasks"
    assert whole["margin"] == pytest.approx(((0.0964 / 0.75) ** 2 + 0.1095**2) ** 0.5 / 2, rel=0.02)
    part = summarise(results, ["coqa"])
    assert (
        part["name"] == "mean centred accuracy of 2 of 3 tasks" and part["score"] == whole["score"]
    )


def test_ranks_share_the_items(tok, monkeypatch):
    m, task, parts = model(tok), TASKS["multiple_choice"], []
    want = evaluate(Scorer(m), task, tok, CPU)
    ranks = [replace(CPU, rank=r, world_size=3) for r in range(3)]
    monkeypatch.setattr(dist, "all_gather_object", lambda out, mine: parts.append(mine))
    for rt in ranks:
        with pytest.raises(TypeError):  # nobody answered
            evaluate(Scorer(m), task, tok, rt)
    assert [len(p) for p in parts] == [5, 5, 4]
    monkeypatch.setattr(
        dist, "all_gather_object", lambda out, mine: out.__setitem__(slice(None), parts)
    )
    assert evaluate(Scorer(m), task, tok, ranks[0]) == want


# --- bundles


def bundle(folder, missing=()):
    """A bundle of the three tasks, the data of some of them missing."""
    tasks = TASKS.values()
    (folder / "eval_data" / "some").mkdir(parents=True)
    lines = ["icl_tasks:"]
    for t in tasks:
        fields = {
            "label": t.name,
            "dataset_uri": f"some/{t.name}.jsonl",
            "num_fewshot": [t.shots],
            "icl_task_type": t.kind,
        }
        lines += ["-", *(f"  {name}: {value}" for name, value in fields.items())]
        if t.name not in missing:
            (folder / "eval_data" / "some" / f"{t.name}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in t.rows)
            )
    (folder / "core.yaml").write_text("\n".join(lines))
    table = ["Eval Task,Random baseline", *(f"{t.name},{100 * t.chance:g}" for t in tasks)]
    (folder / "eval_meta_data.csv").write_text("\n".join(table))
    return folder


def test_a_bundle_is_read_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (bundle(tmp_path, missing=("schema",)), "~"):
        tasks, absent = load_bundle(folder)
        assert tasks == [TASKS["multiple_choice"], TASKS["language_modeling"]]
        assert absent == ["schema"]


@pytest.mark.parametrize(
    ("kind", "line", "says"),
    [
        ("schema", "{", "invalid JSON"),
        ("schema", "[]", "expected an object"),
        ("schema", '{"context_options": ["a"], "continuation": "b", "gold": 0}', "2 to 256 texts"),
        (
            "schema",
            '{"context_options": ["a", "b"], "continuation": 3, "gold": 0}',
            "continuation must be a text",
        ),
        (
            "schema",
            '{"context_options": ["a", "b"], "continuation": " ", "gold": 0}',
            "an answer is empty",
        ),
        ("multiple_choice", '{"query": "q", "choices": ["a", "b"]}', "gold is None"),
        ("multiple_choice", '{"query": "q", "choices": ["a", "b"], "gold": 2}', "from 0 to 1"),
        ("multiple_choice", '{"query": "q", "choices": ["a", "b"], "gold": true}', "gold is True"),
        ("multiple_choice", '{"query": "q", "choices": ["a", 4], "gold": 0}', "2 to 256 texts"),
        (
            "multiple_choice",
            '{"query": "q", "choices": ["a", ""], "gold": 0}',
            "an answer is empty",
        ),
        ("language_modeling", '{"context": "q"}', "continuation must be a text"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, kind, line, says):
    path = bundle(tmp_path) / "eval_data" / "some" / f"{kind}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], line, *lines[4:]]))
    with pytest.raises(UserError) as e:
        load_bundle(tmp_path)
    assert f"{kind}.jsonl, line 5" in str(e.value) and says in str(e.value)


def test_a_bundle_that_is_none_says_why(tmp_path):
    with pytest.raises(UserError, match=r"no .*core\.yaml"):
        load_bundle(tmp_path)
    bundle(tmp_path)
    listed, figures = tmp_path / "core.yaml", tmp_path / "eval_meta_data.csv"
    good, chances = listed.read_text(), figures.read_text()
    for bad, says in [
        ("icl_tasks: [", "core.yaml must have a list"),
        ("tasks: []", "lacks icl_tasks"),
        ("icl_tasks: 3", "is 3, not a list"),
        ("icl_tasks: []", "none of the 0 tasks"),
        (good.replace("schema", "scheme"), "icl_task_type 'scheme'"),
        (good.replace("[3]", "[-1]"), r"num_fewshot is \[-1\]"),
        (good + good.removeprefix("icl_tasks:"), "the same label"),
        (good.replace("label: schema", "label: other"), "no row for the task other"),
        (good.replace("uri: some", "uri: none"), "none of the 3 tasks"),
    ]:
        listed.write_text(bad)
        with pytest.raises(UserError, match=says):
            load_bundle(tmp_path)
    listed.write_text(good)
    for bad, says in [
        (chances.replace("25", "x"), "line 2"),
        (chances.replace("25", "100"), "below 100 %"),
        ("a,b\n1,2\n", "line 2"),
    ]:
        figures.write_text(bad)
        with pytest.raises(UserError, match=says):
            load_bundle(tmp_path)


def test_the_command(tmp_path, monkeypatch, capsys):
    """base_eval --core: a table, a row in the metrics, and the name CORE only with all data."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    base_train.main([*tiny.workplace(tmp_path), "--num_iterations=2"])
    capsys.readouterr()
    flags = [
        "--device_type=cpu",
        "--dtype=float32",
        "--eval_tokens=2000",
        "--max_tokens=2",
        "--max_per_task=10",
    ]
    with pytest.raises(UserError, match="there is no nowhere"):
        base_eval.main([*flags, "--core=nowhere"])
    folder = bundle(tmp_path / "bundle", missing=("schema",))
    found = base_eval.main([*flags, f"--core={folder}"])["core"]
    assert found["name"] == "mean centred accuracy of 2 of 3 tasks" and found["absent"] == [
        "schema"
    ]

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as m:  # what cannot be stored is measured all the same
        m.setattr(logbook.Logbook, "_open", refuse)
        again = base_eval.main([*flags, f"--core={folder}", "--core_memory=0.001"])["core"]
    assert {**again, "seconds_taken": 0} == {**found, "seconds_taken": 0}
    (row,) = [
        r for r in logbook.read(tmp_path / "checkpoints" / "base" / "t") if r["kind"] == "core_eval"
    ]
    assert (
        row["score"] == found["score"]
        and row["tasks"]["multiple_choice"]["n"] == 10
        and row["step"] == 2
    )
    said, noticed = capsys.readouterr()
    assert "base_eval was not stored" in noticed and "core_eval was not stored" in noticed
    assert (
        "2 of 3 tasks: " in said
        and "CORE" not in said
        and "absent" in said
        and "multiple_choice" in said
    )


def test_the_real_bundle(tok):
    if not BUNDLE.is_dir():
        pytest.skip(f"there is no {BUNDLE}; set NANOCHAT_SHARED_DATA")
    tasks, absent = load_bundle(BUNDLE)
    assert len(tasks) == 21 and absent == ["coqa"]
    for task in tasks:
        items, prompts = prepare(task, tok, 1 << 20, max_items=6)
        for item in (
            items
        ):  # examples encoded apart are those encoded in one piece, and the spans are the judge's
            want = plain_prompts(task, item.row, tok, 1 << 20)
            assert [
                (prompts[item.prompt][: item.past] + s, item.past + a)
                for s, a in zip(item.ids, item.starts, strict=True)
            ] == want
