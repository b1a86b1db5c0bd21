"""plan day: one page with every figure and its source, as text, HTML and JSON; what does not suffice stops a run."""

import html
import itertools
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from nanochat.base import knobs
from nanochat.base.common import UserError
from nanochat.commands import base_train, plan
from nanochat.data.tokenizer import Tokenizer
from nanochat.model.config import GPTConfig
from nanochat.plan import choice, day, machine, probe
from nanochat.plan.machine import Machine
from nanochat.plan.shapes import SizeKnobs, counts
from nanochat.train.scaling import (
    LEAST_FOR_PILOT,
    PILOT,
    bytes_per_token,
    pilot_seconds,
    stage_seconds,
    text_for,
    vocabulary_for,
)

CARD = ["--gpu=rtx4090", "--depth=8"]


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def test_a_day_on_a_card(capsys, tmp_path):
    made = plan.main(["day", "--hours=24", "--gpu=rtx4090", "--html", str(tmp_path / "day.html")])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 50, "one screen"
    written = (tmp_path / "day.html").read_text(encoding="utf-8")
    stored = json.loads(json.dumps(made))
    for rows in stored["sections"].values():
        for what, figure, source in rows:
            assert source, f"{what} has no source"
            for page in (text, written):
                assert what in page and figure in html.unescape(page)
    for name in ("smaller", "chosen", "larger"):
        assert name in text and name in written
    assert "bash runs/one_day.sh --hours 24" in text and "bash runs/one_day.sh" in written
    need, chosen = stored["needs"], stored["chosen"]
    assert need["shards"] * day.SHARD_TEXT >= chosen["tokens"] * bytes_per_token(32_768)
    assert need["shards"] * day.SHARD_TEXT < 1.1 * chosen["tokens"] * bytes_per_token(32_768)
    inside = [s for name, s, _ in stored["schedule"] if name in day.STAGES.values()]
    assert sum(inside) == pytest.approx(24 * 3600) and len(inside) == 6
    assert need["kwh"] == pytest.approx(0.55 * 24), "450 W as rated, and 100 W beside it"


@pytest.mark.parametrize("name", ["my texts", "it's", "a $(b) & c", 'the "best"'])
def test_printed_commands_can_be_typed(base, tmp_path, monkeypatch, name):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / name))
    sources = [f"own={tmp_path / name}:0.5#{{title}} {{body}}", "tinyworld:0.5"]
    knobs = day.DayKnobs(minutes=20, data=tuple(sources), vocab=4096)
    monkeypatch.setattr(day, "needs", lambda plan: {"web": {}})
    lines = day.commands(SimpleNamespace(knobs=knobs, primary=None), "runs/one_day.sh")
    typed = [shlex.split(line, comments=True) for line in lines]
    assert sum(words.count(sources[0]) for words in typed) == 3
    recipe = str(tmp_path / name / "plan" / "recipe.toml")
    assert [words for words in typed if "--recipe" in words] == [
        ["nanochat", command, "--recipe", recipe]
        for command in ("base_train", "mid_train", "chat_sft")
    ]


@pytest.mark.parametrize("name", ["a | b", "a\nb", "a\r\u2028b", "# a"])
def test_a_source_of_any_name_is_in_one_row_of_the_page(base, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("some words here " * 500_000)
    words = ["--hours=1", *CARD, "--vocab=4096", "--data", str(tmp_path / name)]
    rows = plan.main(["day", *words])["sections"]["What you get"]
    (figure,) = (figure for what, figure, _ in rows if what == "text")
    assert " ".join(str(tmp_path / name).split()) in figure
    plan.main(["recipe", *words])
    recipe = tomllib.loads((base / "plan" / "recipe.toml").read_text(encoding="utf-8"))
    assert recipe["base_train"]["data"] == [str(tmp_path / name)]


def test_a_short_budget_generates_the_text_that_it_reads():
    def made(minutes, peak):
        here = Machine("a CPU", "cpu", "bfloat16", 16 * machine.GIB, peak)
        knobs = choice.ChoiceKnobs(minutes=minutes, vocab=2048, data=("tinyworld",))
        return choice.Plan(knobs, here)

    for minutes, peak in ((10, 2e11), (30, 2e11), (30, 4e11)):
        plan = made(minutes, peak)
        spec = day.generated_text(plan)
        read = plan.primary.tokens * bytes_per_token(2048, simple=True) / 1e6
        assert read <= float(spec.removeprefix("tinyworld@")) < read + 10 or spec == "tinyworld@20"
    assert day.generated_text(made(55, 1e15)) == f"tinyworld@{day.MOST_GENERATED}"
    for data, planned in ((), ["tinyworld@400"]), (("tinyworld",), ["tinyworld"]):
        found = day.planned(day.PlanKnobs(minutes=30, gpu="rtx3090", data=data))
        assert [*found.knobs.data] == planned and found.simple, "what is given stays"


def test_sizes_that_are_given_are_in_the_commands():
    lines = plan.main(["day", "--hours=24", *CARD, "--tie_embeddings"])["commands"]
    (recipe,) = (line for line in lines if "plan recipe" in line)
    assert "--depth=8 --tie_embeddings=true" in recipe
    assert not any("one_day.sh" in line for line in lines), "it would choose its own sizes"


@pytest.mark.parametrize("words", [["--tie_embeddings", "--sequence_len=1024"], ["--lookback=on"]])
def test_the_command_for_so_many_tokens_trains_the_model_of_the_page(words):
    words = ["--depth=4", "--head_dim=64", "--kv_ratio=0.5", "--tokens=1e8", *words]
    made = plan.main(["day", "--gpu=rtx4090", *words])
    (line,) = (line for line in made["commands"] if "base_train" in line)
    typed = shlex.split(line)[2:]
    k, origins = knobs.parse(base_train.PretrainKnobs, typed, command="base_train")
    k, _ = base_train.with_lookback(k, origins, on_cpu=False, vocab_size=65_536)
    assert asdict(k.model_config(65_536)) == made["chosen"]["config"]
    assert k.total_batch_size * k.num_iterations == pytest.approx(1e8, rel=0.02)


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("--hours=24", "--hours 24"),
        ("--hours=1.5", "--minutes 90"),
        ("--minutes=8", ""),
        ("--hours=2 --lookback=off", "--hours 2 --lookback=off"),
    ],
)
def test_the_script_takes_what_the_page_says(budget, line):
    lines = plan.main(["day", *budget.split(), "--gpu=rtx4090", "--data", "tinyworld"])["commands"]
    script = [words.split("    #")[0] for words in lines if "one_day.sh" in words]
    assert script == [f"bash runs/one_day.sh {line} --vocab 2048 --data tinyworld"] * bool(line)


def test_a_run_from_the_start_makes_its_own_tokenizer(tmp_path, monkeypatch):
    """What the quickstart has left in the base folder decides nothing."""
    words = ["day", "--hours=12.5", "--data", "tinyworld"]
    here = Machine("Some CPU", "cpu", "float32", 2**33, 1e12)
    monkeypatch.setattr(machine, "named", lambda knobs: here)
    monkeypatch.setattr(probe, "run", lambda knobs: None)
    before = plan.main(words)
    Tokenizer.train(["some words here"] * 9, 300).save(tmp_path / "base" / "tokenizer")
    after = plan.main(words)
    assert after["commands"] == before["commands"] and after["chosen"] == before["chosen"]
    assert "one_day.sh --minutes 750 --vocab" in after["commands"][0]


def test_web_text_is_fetched_by_its_share(tmp_path):
    (tmp_path / "a.txt").write_text("some words here " * 1_000_000)
    words = ["day", "--hours=24", *CARD]
    whole = plan.main([*words, "--data", "fineweb-edu"])["needs"]
    tenth = plan.main([*words, "--data", f"own={tmp_path}:0.9", "fineweb-edu:0.1"])["needs"]
    assert tenth["web"]["fineweb-edu"] == pytest.approx(whole["shards"] / 10, abs=1)
    made = plan.main([*words, "--data", "fineweb-edu:0.5", "climbmix:0.5"])
    assert list(made["needs"]["web"]) == ["fineweb-edu", "climbmix"]
    fetched = [line.split("--set ")[1] for line in made["commands"] if " dataset " in line]
    assert fetched == ["fineweb-edu", "climbmix"]


def test_conversations_of_ones_own_are_not_fetched(tmp_path):
    """A page said that they take a download of 1 GB, and its commands left them out."""
    (tmp_path / "talks.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    words = ["--hours=24", *CARD, "--data", "climbmix"]
    public = plan.main(["day", *words])["needs"]["disk_bytes"]["questions"]
    folder = plan.main(["day", *words, "--task_dir", "my sets"])["needs"]["disk_bytes"]["questions"]
    assert public > 0 == folder
    own = ["identity:1", f"mine={tmp_path}/talks.jsonl:1"]
    made = plan.main(["day", *words, "--conversations", *own])
    assert made["needs"]["disk_bytes"]["questions"] == 0
    assert plan.main(["day", *words, "--conversations", "identity", "gsm8k"])["needs"][
        "disk_bytes"
    ]["questions"]
    recipe = next(line for line in made["commands"] if "plan recipe" in line)
    file = tmp_path / "recipe.toml"
    plan.main([*shlex.split(recipe.split(" plan ")[1]), "--gpu=rtx4090", f"--out={file}"])
    tables = tomllib.loads(file.read_text())
    assert tables["mid_train"]["data"] == tables["chat_sft"]["data"] == own
    assert "task_dir" not in tables["mid_train"] and tables["base_train"]["data"] == ["climbmix"]


def test_a_run_under_way_is_told_what_is_left(capsys, tmp_path):
    """Its recipe promised the download, the tokenizer and the probe again, and so a later end."""
    words = ["recipe", "--hours=8", *CARD, "--data", "climbmix", "--pilot", f"--out={tmp_path}/r"]
    over = ("download of", day.STAGES["probe"])
    plan.main(words)
    assert over[0] in capsys.readouterr().out
    plan.main([*words, "--used=600"])
    text = capsys.readouterr().out
    assert not any(name in text for name in over) and day.STAGES["pilot"] in text
    assert re.search(r"\n  all +7h50m,", text)


def test_only_what_a_shell_reads_goes_to_standard_output(capsys, monkeypatch):
    """A machine without a probe is measured first, which prints a table."""
    cpu = Machine("Some CPU", "cpu", "float32", 2**33, 1e12)
    monkeypatch.setattr(machine, "named", lambda knobs: cpu)
    monkeypatch.setattr(probe, "run", lambda knobs: print("measuring"))
    plan.main(["day", "--hours=1", "--data", "tinyworld", "--shell"])
    printed = capsys.readouterr()
    assert all(re.fullmatch(r"\w+=\S*", line) for line in printed.out.splitlines())
    assert "measuring" in printed.err


def test_more_of_something_is_never_told_to_be_worse():
    """Of predictions that count as equal, another may be taken, which is not news."""
    made = plan.main(["day", "--hours=24", *CARD, "--data", "tinyworld"])
    for what, figure, _ in made["sections"]["What would change the choice"]:
        assert "(+" not in figure and ("no better" in figure or "(-" in figure), what


def test_more_time_is_never_planned_to_end_worse(monkeypatch):
    """From an hour on, plans had a vocabulary and a model that cost 0.2 bits per byte."""
    cpu = Machine("Some CPU", "cpu", "float32", 2**35, 2e11)
    monkeypatch.setattr(machine, "named", lambda knobs: cpu)
    monkeypatch.setattr(probe, "run", lambda knobs: None)
    budgets = [day.PlanKnobs(minutes=m, data=("climbmix",)) for m in (30, 59, 61, 300, 1430, 1450)]
    ends = [day.planned(knobs).primary.bpb[0] for knobs in budgets]
    assert all(later < 1.002 * before for before, later in itertools.pairwise(ends)), ends


def test_the_disk_of_a_d16():
    """The checkpoints of three stages took about 22 GB, and nobody said so."""
    size = ["--depth=16", "--aspect_ratio=64", "--vocab=65536"]
    made = plan.main(["day", "--hours=24", "--gpu=rtx4090", *size])
    assert 20e9 < made["needs"]["disk_bytes"]["checkpoints"] < 24e9
    n = counts(SizeKnobs(depth=16).config())
    state = 4 * n["transformer"] + 8 * (n["total"] - n["transformer"])
    assert made["needs"]["disk_bytes"]["checkpoints"] == 7 * (4 * n["total"] + state)


def test_a_run_of_so_many_tokens():
    size = ["--depth=4", "--model_dim=512", "--head_dim=64", "--vocab=24576", "--gpu=rtx3090"]
    made = plan.main(["day", *size, "--tokens=500170752", "--script=runs/ittybitty.sh"])
    assert made["chosen"]["tokens"] == pytest.approx(500_170_752, rel=0.01)
    assert made["needs"]["web"] == {"fineweb-edu": 10} and made["commands"] == [
        "bash runs/ittybitty.sh"
    ]
    assert 0.9e9 < made["needs"]["disk_bytes"]["text"] < 1.7e9


def test_what_a_shell_reads(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    plan.main(["day", "--hours=24", *CARD, "--data", "tinyworld", "--shell"])
    printed = capsys.readouterr()
    code = f'{printed.out}echo "$shards/$vocab/$web/$text/$rows"'
    read = subprocess.run(["bash", "-c", code], capture_output=True, text=True).stdout
    assert read == "0/2048//tinyworld/32\n" and "What you get" in printed.err


def test_disk_and_text_that_do_not_suffice(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    words = ["day", "--hours=24", *CARD, "--shell"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"needs \d.*GB of disk at its peak, and .* has 1GB free"):
        plan.main(words)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**13))
    plan.main(words)
    (tmp_path / "a.txt").write_text("a few words " * 1000)
    with pytest.raises(UserError, match=r"read 3 times, it makes only \d+ steps. Add text"):
        plan.main([*words, "--data", str(tmp_path / "a.txt")])


def test_a_script_for_eight_cards_stops_where_there_are_fewer(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    words = ["day", "--depth=12", "--vocab=4096", "--tokens=4e9", "--gpu=rtx4090", "--gpus=8"]
    plan.main(words)
    with pytest.raises(UserError, match=r"for 8 GPUs, and this machine has 2: set GPUS"):
        plan.main([*words, "--shell"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--hours=1", "--tokens=1e9", "--depth=4"], "set two lengths"),
        (["--tokens=1e9"], "--tokens=1e\\+09 needs a model: add --depth"),
        ([], "give --hours or --minutes"),
        (["--hours=1", "--gpu=rtx3060", "--depth=40"], "RTX 3060 has too little memory"),
        (["--hours=1", "--data", "nowhere"], "nowhere does not exist"),
        (["--hours=1", "--data", "caf\udce9"], r"name .caf.udce9., which is not UTF-8: rename"),
        (["--hours=1", "--dtype=float32"], "known in bfloat16, not in float32: leave --dtype out"),
        (["--hours=1", "--device_type=cpu"], "--device_type=cpu has no effect beside --gpu"),
        (["--hours=1", "--total_batch_size=500000"], "not a whole number of rows"),
    ],
)
def test_what_is_refused(words, says):
    with pytest.raises(UserError, match=says):
        plan.main(["day", "--gpu=rtx4090", *words])


def test_a_source_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        plan.main(["day", "--hours=1", *CARD, "--data", f"notes={tmp_path}/empty.txt"])


def test_repeated_text_is_counted(tmp_path):
    (tmp_path / "a.txt").write_text("some words here " * 500_000)
    words = ["--hours=1", *CARD, "--vocab=4096"]
    values = knobs.parse(day.DayKnobs, [*words, "--data", str(tmp_path)], command="plan day")[0]
    text = day.planned(values).text
    assert text == [(1.0, pytest.approx(8e6 / bytes_per_token(4096)))]
    once = plan.main(["day", *words, "--data", "fineweb-edu"])["chosen"]
    often = plan.main(["day", *words, "--data", str(tmp_path)])
    assert often["needs"]["passes"] == pytest.approx(3), "as often as base_train reads it"
    assert often["chosen"]["bpb"][0] > 1.1 * once["bpb"][0]
    (took,) = (s for name, s, _ in often["schedule"] if name == day.STAGES["base_train"])
    assert took < 60 and "less than its time" in str(often["sections"])
    freely = ["day", "--hours=8", "--gpu=rtx4090", "--vocab=4096", "--data", str(tmp_path)]
    chosen = plan.main(freely)["chosen"]
    n = counts(GPTConfig(**chosen["config"]))["transformer"]
    assert n <= chosen["tokens"] / 1.2, "a model that this text can teach"
    mixture = [f"a={tmp_path}:0.25", "fineweb-edu:0.75"]
    shares = [share for share, _ in day.text_sizes(mixture)]
    assert shares == [0.25, 0.75]


def test_better_models_get_better_words():
    def words(bpb, data="fineweb-edu"):
        plan = choice.Plan(day.DayKnobs(data=(data,)), machine.of_card("rtx4090"))
        return day.in_words(plan, SimpleNamespace(bpb=(bpb,)))[0]

    assert len({words(bpb) for bpb in (0.7, 0.8, 1.0, 1.2, 1.6, 2.0, 3.0)}) == 7
    assert "GPT-2 124M" in words(0.95)
    assert "GPT-2" not in words(0.8, "tinyworld"), "the embedded corpus is no web text"


# ---- the rules that page, recipe and scripts share


def test_a_budget_is_split_in_one_way():
    stages = stage_seconds(1000)
    assert sum(stages.values()) == pytest.approx(1000)
    assert stages["base_train"] == pytest.approx(850) and stages["mid_train"] > stages["chat_sft"]
    assert stage_seconds(1000, 1.0) == {
        "base_train": 1000, "mid_train": 0.0, "chat_sft": 0.0, "evaluation": 0.0
    }  # fmt: skip
    assert pilot_seconds(LEAST_FOR_PILOT - 1) == 0
    assert pilot_seconds(86_400) == 3600, "plan pilot takes no more than an hour"
    for pretrain in (0.85, 0.5):  # what a plan leaves for a pilot is what plan pilot takes
        stages = choice.ChoiceKnobs(hours=3, pilot=True, pretrain=pretrain).stages
        assert stages["pilot"] == pytest.approx(PILOT * stages["base_train"])
    web = [vocabulary_for(1e12, flops) for flops in (3e13, 1e15, 1e19, 1e20)]
    assert web == [4096, 8192, 32_768, 65_536] and vocabulary_for(1e12, 1e20, simple=True) == 2048
    assert vocabulary_for(3e5) == vocabulary_for(3e5, 1e18) == 2048, "however long it is read"
    assert [text_for(60 * m) for m in (59, 60)] == ["tinyworld", "fineweb-edu"]
    assert bytes_per_token(65_536) == 4.8 > bytes_per_token(8192)
