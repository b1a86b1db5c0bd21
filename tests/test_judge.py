"""
An independent check of the CORE score: lm-evaluation-harness, offline and with local task files,
scores the same model on ARC-Easy, PIQA, COPA, LAMBADA and BoolQ.

Needs the extra `judge` and the evaluation bundle, and runs with the slow tests:
pytest -m slow tests/test_judge.py

The two differ by design, which decides what is compared:
- The harness's `acc` takes the answer with the highest summed log-likelihood; `acc_norm` divides
  the sum by the answer's characters (`acc_bytes` by its bytes). CORE takes the mean per token. So
  the sums are compared answer by answer, and then the choice by either rule.
- The harness scores an answer from its first token, CORE from the first token that the answers do
  not share. The shared beginning shifts all sums of an item by the same number, which changes no
  choice by sums. It does change means, so it is subtracted first.
- The harness moves the space before an answer from the question to the answer, as CORE does, and
  encodes question and answer in one piece.
- Of tied answers, the harness takes the first and CORE a random one: where a row lists the same
  answer twice, both must report the tie.
- Their few-shot draws differ: the harness gets our examples as part of the question.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.functional import log_softmax

from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.core_bundle import load_bundle
from nanochat.eval.core_items import prepare
from nanochat.eval.core_scorer import Scorer
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

DATA = Path(
    os.environ.get(
        "NANOCHAT_SHARED_DATA", Path(__file__).resolve().parents[1].parent / "shared" / "data"
    )
)
SHOTS = {"arc_easy": 3, "piqa": 0, "copa": 0, "boolq": 0, "lambada_openai": 0}
ITEMS = 100

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tok():
    if not (DATA / "eval_bundle").is_dir():
        pytest.skip(f"there is no {DATA / 'eval_bundle'}; set NANOCHAT_SHARED_DATA")
    return Tokenizer.train([(DATA / "tinyshakespeare.txt").read_text()], 2000)


@pytest.fixture(scope="module")
def model(tok):
    m = GPT.build(
        GPTConfig(
            sequence_len=2048,
            vocab_size=tok.vocab_size,
            n_layer=2,
            n_head=2,
            n_kv_head=2,
            n_embd=64,
        )
    )
    return tiny.randomise(m, 3)


@pytest.fixture(scope="module")
def tasks(tok, model):
    by_name = {t.name: t for t in load_bundle(DATA / "eval_bundle")[0]}
    chosen = {
        name: replace(by_name[name], shots=n, rows=by_name[name].rows[:ITEMS])
        for name, n in SHOTS.items()
    }
    rows = []
    # A random model is never right, so every other row asks for its own greedy continuation
    for i, row in enumerate(chosen["lambada_openai"].rows):
        context = row["context"].strip()
        ids = tok.encode(context)
        with torch.no_grad():
            greedy = tok.decode(
                [int(model.logits(model(torch.tensor([[tok.bos, *ids]])))[0, -1].argmax())]
            )
        usable = (
            greedy.startswith(" ") and greedy.strip() and tok.encode(context + greedy)[:-1] == ids
        )
        rows.append({**row, "continuation": greedy.strip()} if i % 2 and usable else row)
    chosen["lambada_openai"] = replace(chosen["lambada_openai"], rows=rows)
    return chosen


def judged(model, tok, tasks, folder):
    """{task: per item, [(summed log-likelihood, is it the greedy continuation) per answer]}."""
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'nanochat[judge]'"
    )
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    class Wrapped(TemplateLM):
        eot_token_id = tok.bos

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tok.encode(string)

        def _loglikelihood_tokens(self, requests, **kwargs):
            out = []
            for _, context, continuation in requests:
                with torch.no_grad():
                    logits = model.logits(
                        model(torch.tensor([[tok.bos, *context, *continuation[:-1]]]))
                    )[0, -len(continuation) :]
                targets = torch.tensor(continuation)
                nats = log_softmax(logits, -1).gather(1, targets[:, None]).sum()
                out.append((float(nats), bool((logits.argmax(-1) == targets).all())))
            return out

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

        def generate_until(self, requests, disable_tqdm=False):
            raise NotImplementedError

    for name, task in tasks.items():
        items, prompts = prepare(task, tok, model.config.sequence_len)
        rows = []
        for item in items:
            examples = tok.decode((prompts[item.prompt][: item.past] + item.ids[0])[1:])
            rows.append(
                {
                    **task.rows[item.row],
                    "examples": examples[: examples.rindex("\n\n") + 2] if task.shots else "",
                }
            )
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        choice = task.kind == "multiple_choice"
        assert task.delimiter.endswith(" ")
        config = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "test_split": "test",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / f"{name}.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "output_type": "multiple_choice" if choice else "loglikelihood",
            "doc_to_text": "{{examples}}"
            + ("{{query}}" if choice else "{{context|trim}}")
            + task.delimiter[:-1],
            "target_delimiter": " ",
            "doc_to_target": "gold"
            if choice
            else "{{' ' + continuation}}",  # the delimiter is for choices alone
            **({"doc_to_choice": "choices"} if choice else {}),
            "metric_list": [{"metric": "acc"}],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # which is YAML too
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = [f"local_{name}" for name in tasks]
    results = lm_eval.simple_evaluate(
        model=Wrapped(),
        tasks=names,
        num_fewshot=0,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    out = {}
    for name in tasks:
        samples = sorted(results["samples"][f"local_{name}"], key=lambda s: s["doc_id"])
        out[name] = [
            [answer[0] if isinstance(answer[0], (list, tuple)) else answer for answer in s["resps"]]
            for s in samples
        ]
        out[name] = [
            [(float(ll), str(greedy) == "True") for ll, greedy in item] for item in out[name]
        ]
        print(name, results["results"][f"local_{name}"])
    return out


def best(values):
    """The answers with the highest value; several if a row repeats an answer, as in ARC."""
    return {j for j, x in enumerate(values) if max(values) - x < 1e-4}


def test_the_judge_chooses_the_same_answers(tok, model, tasks, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    verdicts = judged(model, tok, tasks, tmp_path)
    apart = {name: 0 for name, task in tasks.items() if task.kind == "multiple_choice"}
    for name, task in tasks.items():
        items, prompts = prepare(task, tok, model.config.sequence_len)
        ours = Scorer(model)(items, prompts)
        assert len(ours) == len(verdicts[name]) == min(ITEMS, len(task.rows))
        assert not any(item.cropped or item.shots < task.shots for item in items)
        for item, mine, theirs in zip(items, ours, verdicts[name], strict=True):
            assert len(mine) == len(theirs)
            if task.kind == "language_modeling":
                assert mine[0].greedy == theirs[0][1], f"{name}, row {item.row}"
                assert -mine[0].nats * mine[0].tokens == pytest.approx(theirs[0][0], abs=1e-3)
                continue
            sums = [-s.nats * s.tokens for s in mine]
            shift = [
                ll - s for (ll, _), s in zip(theirs, sums, strict=True)
            ]  # the beginning that all answers share
            assert shift == pytest.approx([shift[0]] * len(shift), abs=1e-3) and shift[0] < 1e-3, (
                f"{name}, row {item.row}"
            )
            means = [(ll - shift[0]) / s.tokens for (ll, _), s in zip(theirs, mine, strict=True)]
            by_sum, by_mean = best([ll for ll, _ in theirs]), best(means)
            assert by_sum == best(sums), f"{name}, row {item.row}: the answer of acc"
            assert by_mean == best([-s.nats for s in mine]), (
                f"{name}, row {item.row}: the answer of CORE"
            )
            apart[name] += by_sum != by_mean
    greedy = sum(scores[0][1] for scores in verdicts["lambada_openai"])
    assert 5 <= greedy < ITEMS, "some rows are answered greedily, and not all"
    print(f"greedy answers: {greedy} of lambada; items where the rules choose differently: {apart}")
    assert len(apart) == 4 and sum(apart.values()) > 0, (
        "rules that agree everywhere would show little"
    )
