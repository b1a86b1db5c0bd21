"""Scoring an exported folder through transformers gives the figures of the original model."""

import json
import shutil
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import priors
import pytest
import tiny
import torch
from test_core import bundle, made

from nanochat.base.common import UserError
from nanochat.chat.generate import Engine
from nanochat.commands import base_eval, chat_eval, export
from nanochat.data.shards import prepare
from nanochat.data.sources import training_sources
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.bits_per_byte import shard_bits_per_byte
from nanochat.eval.chat import judge
from nanochat.eval.core import evaluate
from nanochat.eval.core_bundle import FIELDS
from nanochat.eval.core_scorer import Scorer
from nanochat.eval.tasks import tinyworld
from nanochat.eval.tasks.common import Task, exchange
from nanochat.export.target import choose_target
from nanochat.model.gpt import GPT

pytest.importorskip("transformers", reason="transformers is not installed")
from nanochat.export.foreign import load_exported
from nanochat.export.hf import write_folder

RELEASE = Path(__file__).resolve().parent / "golden" / "release_0.1"
CPU = ["--device_type=cpu", "--dtype=float32"]
TEXT = [
    "the cat sat on the mat 12345 times, it's 3.14 and more " * 30,
    "naïve café 東京 😀\n\n " * 9,
]
DOCUMENTS = [*(f"{i} cats sat on {i * i} mats, naïve 😀" for i in range(80)), "<|bos|> is text" * 9]
SAMPLING = {"temperature": 0.6, "top_k": 50}
CLASSES = {
    "nanochat": {},
    "qwen3": {"activation": "swiglu", "softcap": 0.0, "window_pattern": "SL"},
    "apertus": {"softcap": 0.0},
}
LETTERS = replace(tinyworld.TASKS["choice"], kind="choice", evaluate=tinyworld.evaluate)
# A random model answers no question, so that this task takes half of all replies for right.
FREE = replace(tinyworld.TASKS["context"], evaluate=lambda item, reply: len(reply) % 2 == 0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXT, 320)


def random_model(tokenizer: Tokenizer, name: str) -> GPT:
    shape = {"vocab_size": tokenizer.vocab_size, "sequence_len": 256}
    return tiny.randomise(tiny.model(**shape, **CLASSES[name])).requires_grad_(False)


def exported(model: GPT, tokenizer: Tokenizer, folder: Path, name: str, **options):
    """The model as transformers loads it."""
    target = choose_target(model.config, 2, "hf", name, **options)
    write_folder(model, tokenizer, target, folder, "f32", SAMPLING)
    return load_exported(folder, "cpu", "float32", **options)


@pytest.fixture(scope="module", params=CLASSES)
def pair(request, tokenizer, tmp_path_factory) -> SimpleNamespace:
    """A random model as an engine of ours, and its exported folder."""
    model = random_model(tokenizer, request.param)
    folder = tmp_path_factory.mktemp(request.param)
    foreign = exported(model, tokenizer, folder, request.param)
    return SimpleNamespace(ours=Engine(model, tokenizer), foreign=foreign)


@pytest.mark.parametrize("task", [LETTERS, FREE], ids=["letters", "generated"])
def test_the_verdicts_are_equal(pair, task):
    items = task.items("val", 24, 5)
    ours = judge(pair.ours, task, items, rows=10)
    assert judge(pair.foreign, task, items, rows=7) == ours
    assert 0 < sum(ours.right) < len(items)


@pytest.mark.parametrize("kind", FIELDS)
def test_core_is_equal(pair, tokenizer, kind):
    task = made(kind)
    ours = evaluate(Scorer(pair.ours.model), task, tokenizer, tiny.CPU)
    theirs = evaluate(Scorer(pair.foreign.model, 1e5), task, pair.foreign.tokenizer, tiny.CPU)
    assert theirs == ours and ours["n"] == len(task.rows)


def test_generated_tokens_are_equal_at_both_limits(pair, tokenizer):
    prompts = [tokenizer.encode(text, bos=True) for text in (*TEXT, "the cat", "12345", "a 😀")]
    ours = pair.ours.generate_batch(prompts, max_tokens=40, temperature=0.0)
    assert pair.foreign.generate_batch(prompts, max_tokens=40) == ours
    assert {"length", "context"} <= {sample.finish for sample in ours}


def test_bits_per_byte_are_equal(pair, tokenizer, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (source,) = training_sources([f"own={file}"])

    def measured(engine) -> float:
        own = engine.tokenizer
        shards = prepare(source, "train", own, tmp_path / own.fingerprint)
        return shard_bits_per_byte(engine.model, shards, own.token_bytes(), tiny.CPU, 4)

    ours = measured(pair.ours)
    assert measured(pair.foreign) == pytest.approx(ours, rel=1e-5) and ours > 1


def test_the_tokenizers_agree(pair, tokenizer):
    foreign = pair.foreign.tokenizer
    assert foreign.vocab_size == tokenizer.vocab_size and foreign.bos == tokenizer.bos
    assert foreign.token_bytes().tolist() == tokenizer.token_bytes().tolist()
    for ours, theirs in zip(
        tokenizer.encode_batch(DOCUMENTS, bos=True),
        foreign.encode_batch(DOCUMENTS, bos=True),
        strict=True,
    ):
        assert theirs.tolist() == ours.tolist()
    half_a_character = tokenizer.encode("a 😀")[:-1]
    assert foreign.decode(half_a_character) == tokenizer.decode(half_a_character)


def reciting_model(tokenizer: Tokenizer, name: str, *runs: list[int]) -> GPT:
    """A model that says the tokens of each run one after another; none occurs in two places."""
    shape = {"vocab_size": tokenizer.vocab_size, "sequence_len": 256, "n_embd": 64}
    model = tiny.model(**shape, **CLASSES[name])  # its blocks add nothing
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.embed.weight.normal_(0, 1, generator=generator)
        for before, after in chain.from_iterable(map(pairwise, runs)):
            model.head.weight[after] = model.embed.weight[before]
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", CLASSES)
def test_the_calculator_answers_in_both(tokenizer, tmp_path, name):
    special, byte = tokenizer.specials, tokenizer.ranks
    call = [special["<|assistant_start|>"], special["<|python_start|>"]]
    call += [byte[b"1"], byte[b"2"], byte[b"+"], byte[b"3"], special["<|python_end|>"]]
    unanswered = [special["<|python_end|>"], byte[b"n"]]  # what the model says without an output
    answered = [special["<|output_end|>"], byte[b"y"], special["<|assistant_end|>"]]
    model = reciting_model(tokenizer, name, call, unanswered, answered)
    foreign = exported(model, tokenizer, tmp_path, name)
    questions = [exchange(text, "y") for text in ("12+3?", "What is twelve and three?")]
    prompts = [tokenizer.render_prompt(Task.prompt(item)) for item in questions]
    ours = Engine(model, tokenizer).generate_batch(prompts, temperature=0.0)
    assert foreign.generate_batch(prompts) == ours
    spoken = "<|python_start|>12+3<|python_end|><|output_start|>15<|output_end|>y"
    assert [tokenizer.decode(sample.tokens) for sample in ours] == [spoken, spoken]
    assert 0 in ours[0].mask and ours[0].finish == "stop"
    short = Engine(model, tokenizer).generate_batch(prompts, max_tokens=7, temperature=0.0)
    assert foreign.generate_batch(prompts, max_tokens=7) == short
    task = Task("yes", "generative", 0.0, lambda *_: questions, lambda item, reply: reply == "y")
    assert judge(foreign, task, questions).right == [1, 1]


def test_a_folder_with_code_needs_permission(tokenizer, tmp_path, capfd):
    vocab, length = tokenizer.vocab_size, 64
    artifact = priors.write(tmp_path / "prior.safetensors", priors.terms(reach=length, vocab=vocab))
    shape = {"vocab_size": vocab, "sequence_len": length, "n_layer": 3}
    model = priors.model_with(artifact, shape=shape).requires_grad_(False)
    foreign = exported(model, tokenizer, tmp_path / "out", "nanochat", with_code=True)
    printed = "".join(capfd.readouterr())
    assert "Do you wish" not in printed, "it was given once"
    with pytest.raises(UserError, match="--with_code"):
        load_exported(tmp_path / "out", "cpu", "float32")
    ids = torch.randint(vocab, (3, length), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    expected = model.token_losses(ids, targets)
    torch.testing.assert_close(foreign.model.token_losses(ids, targets), expected)
    torch.testing.assert_close(foreign.model(ids), model(ids), rtol=1e-4, atol=1e-4)
    prompts = [tokenizer.encode(text, bos=True) for text in ("the cat sat", "on the mat 12345")]
    ours = Engine(model, tokenizer).generate_batch(prompts, max_tokens=20, temperature=0.0)
    assert foreign.generate_batch(prompts, max_tokens=20) == ours


def test_incomplete_folders_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no exported model"):
        load_exported(tmp_path / "absent", "cpu", "float32")
    folder = tmp_path / "out"
    exported(random_model(tokenizer, "nanochat"), tokenizer, folder, "nanochat")
    config = json.loads((folder / "config.json").read_text())
    larger = {**config, "num_hidden_layers": config["num_hidden_layers"] + 1}
    (folder / "config.json").write_text(json.dumps(larger))
    with pytest.raises(UserError, match="the weights lack"):
        load_exported(folder, "cpu", "float32")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cannot load"):
        load_exported(folder, "cpu", "float32")


# ---- the commands


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The models of an old release in a base folder, and their exports in the folders base and sft."""
    base = tmp_path_factory.mktemp("foreign") / "release"
    shutil.copytree(RELEASE, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        for stage in ("base", "sft"):
            export.main(["-i", stage, "--to=hf", f"--out={base / stage}"])
        yield base


@pytest.mark.usefixtures("offline")
def test_chat_eval_of_an_export(released, capsys):
    flags = ["-n", "24", "-m", "20", *CPU]
    ours = chat_eval.main(["-i", "sft", *flags])
    metrics = released / "checkpoints/sft/old/metrics.jsonl"
    before = metrics.read_bytes()
    assert chat_eval.main(["--hf", str(released / "sft"), *flags]) == ours
    assert metrics.read_bytes() == before, "the figures of an export are no figures of the run"
    assert "in transformers" in capsys.readouterr().out
    with pytest.raises(UserError, match="greedily"):
        chat_eval.main(["--hf", str(released / "sft"), *flags, "-t", "1", "--num_samples=2"])


def test_base_eval_of_an_export(released, tmp_path, capsys):
    data = f"own={released / 'text.jsonl'}"
    flags = ["--data", data, "--eval_tokens=2000", "-m", "12", f"--core={bundle(tmp_path)}", *CPU]
    ours = base_eval.main(flags)
    theirs = base_eval.main(["--hf", str(released / "base"), *flags])
    assert theirs["bpb"] == pytest.approx(ours["bpb"], rel=1e-5) and theirs["bpb"].keys()
    assert theirs["samples"] == {prompt: texts[:1] for prompt, texts in ours["samples"].items()}
    assert theirs["core"]["tasks"] == ours["core"]["tasks"] != {}
    assert capsys.readouterr().out.count("guessing scores") == 2


@pytest.mark.parametrize("words", [["-i", "sft"], ["-g", "old"], ["-s", "3"]], ids=" ".join)
@pytest.mark.parametrize("command", [base_eval, chat_eval])
def test_a_checkpoint_and_a_folder_exclude_each_other(command, words):
    with pytest.raises(UserError, match="cannot be combined with --hf"):
        command.main(["--hf", "folder", *words])


def test_flags_that_need_or_exclude_an_export():
    with pytest.raises(UserError, match="cannot be combined with --hf"):
        base_eval.main(["--hf", "folder", "-t", "1"])
    with pytest.raises(UserError, match="no effect without --hf"):
        chat_eval.main(["--with_code"])
