"""
A toy of reinforcement: questions answered with a letter, a policy that replies with random letters,
and its feed.
"""

import functools
from dataclasses import replace

import tiny
import torch

from nanochat.chat.generate import Engine
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.tasks.common import Task, exchange
from nanochat.model.gpt import GPT
from nanochat.train.rollout import RolloutFeed, Sampler

LETTERS = "abcd"
EASY = Task(
    "toy",
    "generative",
    0.0,
    lambda split, n, seed=0, folder=None: [exchange(f"{split} {i}", "b") for i in range(n)],
    lambda item, reply: sum(map(ord, reply)) % 2 == 0,
    max_tokens=6,
)
TOY = replace(
    EASY, evaluate=lambda item, reply: reply == "b"
)  # one letter of four, and then to stop
QUESTIONS = [(EASY, item) for item in EASY.items("train", 10)]


@functools.cache
def words() -> Tokenizer:
    return Tokenizer.train(["train val 0 1 2 3 4 5 6 7 8 9 a b c d"], 270)


@functools.cache
def policy_weights() -> dict[str, torch.Tensor]:
    """A model that imitates random letters, and ends with one chance in five after each."""
    tok = words()
    m, g = (
        tiny.model(vocab_size=tok.vocab_size, sequence_len=32, n_layer=1),
        torch.Generator().manual_seed(0),
    )
    o, letters = tiny.optimizer(m), torch.tensor([tok.encode(c)[0] for c in LETTERS])
    asked = torch.tensor(tok.render_prompt(EASY.prompt(QUESTIONS[0][1])))
    n = len(asked)
    for _ in range(40):
        ids = torch.cat(
            [asked.expand(32, n), letters[torch.randint(0, 4, (32, 31 - n), generator=g)]], dim=1
        )
        ids[:, n + 1 :][torch.rand(32, 30 - n, generator=g) < 0.2] = tok.specials[
            "<|assistant_end|>"
        ]
        targets = ids[:, 1:].clone()
        targets[:, : n - 1] = -1
        o.zero_grad()
        (m.loss(ids[:, :-1], targets) / (targets >= 0).sum()).backward()
        o.step()
    return tiny.weights(m)


def policy(tok: Tokenizer) -> GPT:
    m = tiny.model(vocab_size=tok.vocab_size, sequence_len=32, n_layer=1)
    m.load_state_dict(policy_weights())
    return m


def feed(tok, m=None, questions=QUESTIONS, rows=64, runtime=tiny.CPU, **knobs) -> RolloutFeed:
    sampler = Sampler(Engine(m or policy(tok), tok), rows, 6)
    settings = {"per_step": 4, "samples": 5, "device_rows": 64, "seed": 3, **knobs}
    return RolloutFeed(sampler, questions, runtime, **settings)
