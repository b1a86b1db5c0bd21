"""
Files of strangers, by kind: each must be refused in one sentence, or work. The attacks lie in tests/hostile_*.py.
"""

import re

import hostile_checkpoints as checkpoints
import hostile_files as files
import hostile_hub
import hostile_logbooks as logbooks
import hostile_programs as programs
import priors
import pytest
from test_core import bundle

from nanochat.base import knobs
from nanochat.base.common import UserError, printable
from nanochat.commands import models
from nanochat.commands.base_train import PretrainKnobs
from nanochat.data import hub
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval import sandbox
from nanochat.eval.core_bundle import load_bundle
from nanochat.model import prior_artifact
from nanochat.model.stored import checked_meta

needs_sandbox = pytest.mark.skipif(bool(sandbox.missing()), reason=sandbox.missing())


@pytest.mark.parametrize(
    "fields",
    [{"best": {}}, {"sizes": {"eval": 0}}, {"stale": "x"}, {"evaluated_to": []}, {"spent": []}],
)
def test_what_a_run_could_not_resume_from_is_refused(fields):
    with pytest.raises(ValueError):
        checked_meta(fields)


@pytest.mark.parametrize("name", sorted(checkpoints.CHECKPOINTS))
def test_a_checkpoint_of_a_stranger(release, name, capsys):
    step = release / "checkpoints/sft/old/step_000003"
    checkpoints.CHECKPOINTS[name](step)
    checkpoints.seal(step)
    assert "sft/old" in [record.name for record in models.main([])]
    out = capsys.readouterr().out
    assert "\x1b" not in out and len(out) < 3000
    try:
        checkpoints.load()
    except UserError as e:
        assert len(str(e)) < 1500 and "\n" not in str(e)


def test_what_nobody_has_spoiled_is_read(release, tmp_path, drawn_once):
    """The files that the attacks spoil, by the functions that judge them here."""
    checkpoints.seal(release / "checkpoints/sft/old/step_000003")
    checkpoints.load()
    tasks, absent = load_bundle(bundle(tmp_path / "bundle"))
    assert len(tasks) == 3 and not absent
    prior = priors.write(tmp_path / "prior.safetensors", priors.terms())
    tensors, _ = prior_artifact.load(prior, priors.V, priors.PRINT)
    assert set(tensors) == set(priors.terms())
    assert Tokenizer.load().vocab_size > 256
    (tmp_path / "recipe.toml").write_text("[base_train]\ndepth = 7\n")
    words = ["--recipe", str(tmp_path / "recipe.toml")]
    assert knobs.parse(PretrainKnobs, words, command="base_train")[0].depth == 7
    logbooks.read_everything(release / "checkpoints/base/old", release / "report.html")
    runs = [logbooks.line(**{**logbooks.RUN, "seed": seed}) for seed in (1, 2)]
    (tmp_path / "runs.jsonl").write_bytes(b"".join(runs))
    logbooks.compare(tmp_path / "runs.jsonl")


def one_sentence(read) -> None:
    """It works, or it says in one line why not, and nothing in that line moves a terminal."""
    try:
        read()
    except UserError as e:
        assert len(str(e)) < 1500 and "\n" not in str(e), str(e)[:300]


@pytest.mark.parametrize("name", files.BUNDLES)
def test_a_bundle_of_a_stranger(tmp_path, name):
    folder = bundle(tmp_path / "bundle")
    (tmp_path / "secret.jsonl").write_text('{"context": "secret", "continuation": "x"}\n')
    files.BUNDLES[name](folder)

    def read() -> None:
        tasks, _ = load_bundle(folder)
        assert "secret" not in str([task.rows for task in tasks])

    one_sentence(read)


@pytest.mark.parametrize("name", files.PRIORS)
def test_a_prior_of_a_stranger(tmp_path, name):
    path = files.PRIORS[name](tmp_path)
    with pytest.raises(UserError):  # none of them is a prior
        prior_artifact.load(str(path), priors.V, priors.PRINT)
    one_sentence(lambda: prior_artifact.load(str(path), priors.V, priors.PRINT))


@pytest.mark.parametrize("name", files.TOKENIZERS)
def test_a_tokenizer_of_a_stranger(release, name):
    files.TOKENIZERS[name](release / "tokenizer")
    with pytest.raises(UserError):
        Tokenizer.load()
    one_sentence(Tokenizer.load)


@pytest.mark.parametrize("name", files.RECIPES)
def test_a_recipe_of_a_stranger(tmp_path, name):
    path = tmp_path / "recipe.toml"
    files.RECIPES[name](path)
    words = ["--recipe", str(path)]
    one_sentence(lambda: knobs.parse(PretrainKnobs, words, command="base_train"))


@pytest.fixture
def drawn_once(monkeypatch):
    """Curves are drawn in other tests; here the numbers that would be drawn suffice."""
    monkeypatch.setattr("nanochat.study.report.gallery", lambda plots: "")


@pytest.mark.parametrize("name", logbooks.LOGBOOKS)
def test_a_log_book_of_a_stranger(release, name, drawn_once):
    run = release / "checkpoints/base/old"
    logbooks.spoil(logbooks.LOGBOOKS[name], run / "metrics.jsonl")
    try:
        logbooks.read_everything(run, release / "report.html")
    except UserError as e:
        assert len(str(e)) < 1500 and "\n" not in str(e)


DRAWN = [
    name
    for name in logbooks.LOGBOOKS
    if re.match("a (thousand )?source|a band|times|losses|no speed", name)
]


@pytest.mark.parametrize(
    "name", [*DRAWN, "seconds 1e308 in a training row", "tokens negative in an evaluation"]
)
def test_curves_of_a_stranger_can_be_drawn(release, name):
    run = release / "checkpoints/base/old"
    logbooks.spoil(logbooks.LOGBOOKS[name], run / "metrics.jsonl")
    logbooks.read_everything(run, release / "report.html")


@pytest.mark.parametrize("name", logbooks.RECORDS)
def test_a_comparison_of_a_stranger(tmp_path, name):
    (tmp_path / "runs.jsonl").write_bytes(logbooks.line(**logbooks.RUN) + logbooks.RECORDS[name])
    try:
        logbooks.compare(tmp_path / "runs.jsonl")
    except UserError as e:
        assert len(str(e)) < 1500 and "\n" not in str(e)


@needs_sandbox
@pytest.mark.parametrize("name", programs.FORGERIES)
def test_no_program_forges_its_verdict(name):
    program = programs.FORGERIES[name]
    assert not sandbox.judge(program, "f", programs.PROBLEM, programs.TEST, 2.0).passed


@needs_sandbox
@pytest.mark.parametrize("name", programs.HONEST)
def test_honest_programs_pass(name):
    outcome = sandbox.judge(programs.HONEST[name], "f", programs.PROBLEM, programs.TEST, 20.0)
    assert outcome.passed and not outcome.reason


@needs_sandbox
def test_values_keep_their_types_between_the_sandboxes():
    program = "def f(*values, **named): return [*values, sorted(named.items())]"
    test = """
def check(candidate):
    values = [None, True, 1, -10**5000, 0.1, float("inf"), 1e-320, 2j, "ä\\ud800\\n", b"x\\0", (1, (2,)), [], {}, {1}, frozenset(),
              {"a": [1], (1, 2): {3: None}}]
    back = candidate(*values, named=1)
    assert back.pop() == [("named", 1)]
    assert back == values and [type(v) for v in back] == [type(v) for v in values]
    assert candidate(float("nan"))[0] != candidate(float("nan"))[0]
"""
    outcome = sandbox.judge(program, "f", "", test, 20.0)
    assert outcome.passed, outcome


@pytest.mark.parametrize("name", hostile_hub.ATTACKS)
def test_a_hub_of_a_stranger(tmp_path, monkeypatch, name):
    """It is refused, or exactly the listed files arrive; nothing appears outside the folder."""
    server = hostile_hub.Hub()
    for setting, value in {
        "BACKOFF": 0.0,
        "STALL": 20.0 if name == "nothing" else 0.2,
        "ATTEMPTS": 2,
        "MOST_PAGES": 5,
        "MOST_PAGE": 2**20,
        "MOST_FILES": 50,
    }.items():
        monkeypatch.setattr(hub, setting, value)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    folder, elsewhere = tmp_path / "base/data", tmp_path / "elsewhere"
    folder.mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "link").symlink_to(elsewhere)
    hostile_hub.ATTACKS[name](server)
    try:
        files = hostile_hub.fetch(folder)
        assert all(file.resolve().is_relative_to(folder) and file.is_file() for file in files)
        assert name != "a wrong git blob"
        assert all(file.read_bytes() == hostile_hub.DATA for file in files)
        assert name != "nothing" or len(files) == 1
    except UserError as e:
        assert name != "nothing", e
        assert "\x1b" not in printable(str(e)) and "\n" not in str(e)
    finally:
        server.shutdown()
        server.server_close()
    assert not any(elsewhere.iterdir()) and {p.name for p in tmp_path.iterdir()} == {
        "base",
        "elsewhere",
    }
    assert {p.name for p in (tmp_path / "base").iterdir()} == {"data"}
    assert server.asked < 30
