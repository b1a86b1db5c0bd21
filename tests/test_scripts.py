"""
The shell scripts of runs/: odd characters in every path and option arrive whole, and other languages
change no number. A stand-in for Python records each command line; nothing is trained.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORDER = f"""#!{sys.executable} -SE
import json, os, sys
if sys.argv[1] == "-V":
    print("Python 3.11.2")
    sys.exit()
if not os.path.isdir("runs") and not os.environ.get("PYTHONSAFEPATH"):
    sys.exit("it would import from the folder of the user")
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1].endswith(".py") and os.environ.get("PYTHONSAFEPATH"):
    if os.path.dirname(sys.argv[1]) not in os.environ["PYTHONPATH"].split(":"):
        sys.exit("it would not find the modules beside it")
if sys.argv[2].startswith(("scripts", "nanochat")):  # as Python finds it: here, or on the path
    module = sys.argv[2].replace(".", "/") + ".py"
    folders = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(":")]
    if not any(os.path.exists(os.path.join(folder, module)) for folder in folders if folder):
        sys.exit(f"No module named {{sys.argv[2]}}")
if sys.argv[1] == "-c":
    print(os.environ.get("REPLAN", ""))
if "--shell" in sys.argv:
    web = "--data" not in sys.argv or "fineweb-edu" in sys.argv
    print("shards=7\\nvocab=900\\nrows=5\\nweb=" + web * "fineweb-edu:7" + "\\ntext=fineweb-edu")
    sys.exit(2 if os.environ.get("REFUSE") else 0)
if sys.argv[3:4] == ["pilot"]:
    sys.exit(int(os.environ.get("PILOT", 0)))
"""
ODD = ["my texts", "First Last's", 'say "hi"', "two\nlines", "täxte", "a:b", "$HOME", "*", "a;b&c"]


@pytest.fixture
def checkout(tmp_path):
    """runs/ in a folder with an odd name, with an environment that is already made."""

    def make(name="some code"):
        repo = tmp_path / name
        for folder in ("runs", "scripts"):
            shutil.copytree(ROOT / folder, repo / folder)
        (repo / "nanochat").mkdir()
        for name in ("dataset", "report"):
            shutil.copy(ROOT / f"nanochat/{name}.py", repo / "nanochat")
        shutil.copy(ROOT / "pyproject.toml", repo)
        (repo / ".venv/bin").mkdir(parents=True)
        files = [ROOT / "pyproject.toml", ROOT / "runs/constraints.txt"]
        described = "".join(file.read_text() for file in files)
        (repo / ".venv/installed").write_text(described + "Python 3.11\n")
        (repo / ".venv/bin/activate").write_text(
            f"export PATH={shlex.quote(str(repo))}/.venv/bin:$PATH\n"
        )
        for tool in ("python", "torchrun"):
            (repo / ".venv/bin" / tool).write_text(RECORDER)
            (repo / ".venv/bin" / tool).chmod(0o755)
        return repo

    return make


def run(script, *words, base, cwd=None, status=0, **environment):
    """-> the command lines that a script gave, by the last word of their module or their subcommand."""
    record = Path(base) / "record"
    record.parent.mkdir(parents=True, exist_ok=True)
    others = "LC_", "LANG", "PYTHONPATH", "PYTHONSAFEPATH"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    variables = {"NANOCHAT_BASE_DIR": str(base), "RECORD": str(record), **environment}
    done = subprocess.run(
        ["bash", str(script), *words],
        cwd=cwd,
        env={**kept, "HOME": str(base), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return {name_of(words): words for words in lines}


def name_of(words):
    name = words[words.index("-m") + 1].split(".")[-1] if "-m" in words else words[0]
    return words[words.index("-m") + 2] if name == "plan" else name


def values(words, flag):
    """The values of a flag that takes several."""
    at = words.index(flag) + 1
    end = next((i for i in range(at, len(words)) if words[i].startswith("--")), len(words))
    return words[at:end]


@pytest.mark.parametrize("name", ODD)
def test_paths_arrive_whole(checkout, tmp_path, name):
    # Python makes no environment in a folder whose name has a colon
    repo, texts = checkout(name.replace(":", "_")), tmp_path / "t" / name
    for kind in ("wikipedia", "books", "reddit", "dialog"):
        (texts / kind).mkdir(parents=True)
    made = run(
        repo / "runs/english_chat.sh", str(texts), "--minutes", "30", base=tmp_path / "b" / name
    )
    wanted = [f"wikipedia={texts}/wikipedia:0.45", f"books={texts}/books:0.40"]
    wanted.append(f"reddit={texts}/reddit:0.15")
    assert values(made["tok_train"], "--data") == wanted
    talks = [f"dialog={texts}/dialog:1", "identity:0.02"]
    assert all(values(made[step], "--conversations") == talks for step in ("day", "recipe"))
    recipe = made["base_train"][made["base_train"].index("--recipe") + 1]
    assert recipe == f"{tmp_path}/b/{name}/day/30-minutes/recipe.toml"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("english_chat.sh", ["My Texts"]),
        ("one_day.sh", ["--minutes", "30", "--data", "own=My Texts:1"]),
        ("rap.sh", ["--data", "own=My Texts:1"]),
        ("mine.sh", ["My Texts"]),
    ],
)
def test_scripts_start_in_the_folder_of_the_texts(checkout, tmp_path, script, words):
    repo, here = checkout("a checkout"), tmp_path / "home of the texts"
    for kind in ("wikipedia", "books", "reddit", "dialog"):
        (here / "My Texts" / kind).mkdir(parents=True)
    made = run(repo / "runs" / script, *words, base=tmp_path / "base", cwd=here)
    assert {"mine"} & made.keys() or {"tok_train", "tok_data"} <= made.keys()


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "a=My Texts/a:1"],
        ["--data=a=My Texts/a:1"],
        ["--data", "a=My Texts/a:1", "b=My Texts/b:2#body", "--vocab", "900"],
        ["--data", "My Texts/a", "--data", "My Texts/b"],
        ["--data", "a=x:1 b=y:2"],  # several in one value, as before
        ["--data=a=x:1 b=y:2"],
        ["--data", "a=x:1", "b=y:2"],
    ],
)
def test_sources_with_and_without_spaces(checkout, tmp_path, words):
    for name in ("My Texts/a", "My Texts/b", "x", "y"):
        (tmp_path / name).mkdir(parents=True)
    script = checkout() / "runs/one_day.sh"
    made = run(script, "--minutes", "10", *words, base=tmp_path / "base", cwd=tmp_path)
    given = [w.removeprefix("--data=") for w in words if "/" in w or "=" in w]
    whole = [v for w in given for v in (w.split() if "=y" in w else [w])]
    assert values(made["tok_train"], "--data") == whole


@pytest.mark.parametrize("name", [*ODD, "\\ back", "-dash", "#5", "a=b"])
def test_words_that_shlex_reads_back(name):
    code = f'source {ROOT}/runs/values.sh; quoted "$1" "$1"'
    done = subprocess.run(["bash", "-c", code, "x", name], capture_output=True, text=True)
    assert shlex.split(done.stdout) == [name, name]


@pytest.mark.parametrize("name", ['it\'s "a" run'])
@pytest.mark.parametrize("script", ["ittybitty.sh", "speedrun.sh", "run1000.sh"])
def test_the_name_of_a_run_arrives_whole(checkout, tmp_path, script, name):
    made = run(checkout(name) / "runs" / script, base=tmp_path / "base", WANDB_RUN=name)
    for command in ("base_train", "mid_train", "chat_sft"):
        assert f"--run={name}" in made[command]


@pytest.mark.parametrize(
    ("script", "tag"),
    [("ittybitty", "ittybitty"), ("speedrun", "speedrun-d20"), ("run1000", "run1000-d32")],
)
def test_a_script_takes_its_own_models_in_all_stages(checkout, tmp_path, script, tag):
    """And never goes on with another run of base_train, whose tag is d20 by default."""
    made = run(checkout() / f"runs/{script}.sh", base=tmp_path / "b")
    trains = ["base_train", "mid_train", "chat_sft"]
    for command in [*trains, "base_loss", "base_eval", "chat_eval", "chat_cli"]:
        assert f"--model_tag={tag}" in made[command], command
    assert script == "ittybitty" or tag in made["report"]


LONG = ["one_day.sh", "english_chat.sh", "ittybitty.sh", "speedrun.sh", "run1000.sh"]


@pytest.fixture
def words_of(tmp_path):
    """-> the first words that a script needs: english_chat.sh takes a folder of texts."""

    def make(script):
        for kind in ("wikipedia", "books", "reddit", "dialog"):
            (tmp_path / "texts" / kind).mkdir(parents=True, exist_ok=True)
        return [str(tmp_path / "texts")] if script == "english_chat.sh" else []

    return make


@pytest.mark.parametrize("script", LONG)
def test_a_dry_run_prints_the_page_and_stops(checkout, tmp_path, words_of, script):
    file = checkout() / "runs" / script
    made = run(file, *words_of(script), "--dry_run", base=tmp_path / "b")
    assert list(made) == ["day"] and "--shell" not in made["day"]


@pytest.mark.parametrize("script", LONG)
def test_a_plan_that_does_not_suffice_stops_before_anything_starts(
    checkout, tmp_path, words_of, script
):
    file = checkout() / "runs" / script
    made = run(file, *words_of(script), base=tmp_path / "b", status=2, REFUSE="1")
    assert list(made) == ["day"] and "--shell" in made["day"]
    again = run(file, *words_of(script), base=tmp_path / "c")
    if script != "english_chat.sh":
        assert again["dataset"][again["dataset"].index("-n") + 1] == "7", "what the plan needs"
    assert "--vocab_size=900" in again["tok_train"]
    if script == "ittybitty.sh":
        assert "--device_batch_size=5" in again["base_train"], "what the plan found to fit"


@pytest.mark.parametrize(("status", "goes_on"), [(0, True), (3, True), (2, False), (130, False)])
def test_a_day_goes_on_without_a_pilot_only_if_that_was_refused(
    checkout, tmp_path, status, goes_on
):
    script, base = checkout() / "runs/one_day.sh", tmp_path / "b"
    ends = 0 if goes_on else status
    made = run(script, "--minutes", "30", base=base, status=ends, PILOT=str(status))
    assert ("base_train" in made) == goes_on
    assert (base / "day/30-minutes/pilot.done").exists() == goes_on


@pytest.mark.parametrize("target", ["", "0,9", "low", "-1"])
def test_a_target_is_a_number(checkout, tmp_path, target):
    command = ["bash", str(checkout() / "runs/one_day.sh"), "--dry_run", f"--target={target}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"(got '{target}')" in done.stderr


def test_a_slow_machine_gets_shorter_stages(checkout, tmp_path):
    script = checkout() / "runs/one_day.sh"
    flag = "--max_minutes=1.5"
    made = run(script, "--minutes", "10", base=tmp_path / "b", REPLAN=flag)
    for stage in ("base_train", "mid_train", "chat_sft"):
        assert made[stage][-1] == flag
    again = run(script, "--minutes", "10", base=tmp_path / "c")
    assert not any(flag in words for words in again.values())
    file, stage, left = again["-c"][-3:]
    assert file.endswith("recipe.toml") and stage == "evaluation" and 500 < int(left) <= 600


@pytest.mark.parametrize(
    ("flag", "value", "others"),
    [("--lookback", "off", []), ("--device_type", "cpu", ["base_eval", "chat_eval"])],
)
def test_what_a_plan_decides_is_told_to_every_part(checkout, tmp_path, flag, value, others):
    made = run(checkout() / "runs/one_day.sh", "--minutes", "30", flag, value, base=tmp_path / "b")
    for name in ("day", "probe", "recipe", *others):
        assert values(made[name], flag)[:1] == [value]


@pytest.mark.parametrize("words", [["--device_type", "cpu"], ["--device_type=cpu"]])
def test_a_quickstart_takes_the_device(checkout, tmp_path, words):
    made = run(checkout() / "runs/quickstart.sh", *words, base=tmp_path / "b")
    assert "--device_type=cpu" in made["quickstart"]


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        (["tinyworld"], "tinyworld"),
        (["tinyworld:1"], "tinyworld"),
        (["tinyworld@5:0.5", "more=tinyworld@5:0.5"], "tinyworld"),
        (["tinyworld:0.5", "a=x:0.5"], "ARC-Easy"),
        (["tinyworlds"], "ARC-Easy"),
    ],
)
def test_a_model_of_the_embedded_corpus_is_asked_about_that(checkout, tmp_path, data, asked):
    words = ["--minutes", "10", "--data", *data]
    made = run(checkout() / "runs/one_day.sh", *words, base=tmp_path / "b")
    assert made["chat_eval"][made["chat_eval"].index("-a") + 1] == asked


def test_a_plan_knows_the_conversations(checkout, tmp_path):
    """The recipe holds them, so that the later stages need no flags."""
    words = ["--minutes", "30", "--conversations", "identity:1", "gsm8k:2", "--task_dir", "My Sets"]
    made = run(checkout() / "runs/one_day.sh", *words, base=tmp_path / "b")
    for name in ("day", "recipe"):
        assert values(made[name], "--conversations") == ["identity:1", "gsm8k:2"]
        assert values(made[name], "--task_dir") == ["My Sets"]


@pytest.mark.parametrize("script", LONG)
def test_help_says_what_a_script_does(checkout, tmp_path, script):
    done = subprocess.run(
        ["bash", str(checkout() / "runs" / script), "-h"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--dry_run" in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize(
    "script",
    ["quickstart", "mine", "one_day", "english_chat", "rap", "ittybitty", "run1000", "test"],
)
def test_help_comes_at_once(script):
    """Nothing is installed first; the help is the comment at the top of the script, and no code."""
    command = ["bash", f"runs/{script}.sh", "-h"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and f"bash runs/{script}.sh" in done.stdout
    assert "#" not in done.stdout and "set -" not in done.stdout and not done.stderr


def test_a_card_for_a_dry_run_replaces_the_one_of_the_script(checkout, tmp_path):
    file = checkout() / "runs/speedrun.sh"
    made = run(file, "--dry_run", "--gpu", "rtx4090", base=tmp_path / "b")["day"]
    assert made[made.index("--gpu") + 1] == "rtx4090" and "--gpu=H100 SXM" not in made
    assert "--gpu=H100 SXM" in run(file, "--dry_run", base=tmp_path / "c")["day"]
    four = run(file, "--dry_run", "--gpus", "4", base=tmp_path / "d")["day"]
    assert "--gpu=H100 SXM" in four and "--gpus=8" not in four and four[-1] == "4"


@pytest.mark.parametrize("script", ["ittybitty.sh", "speedrun.sh", "one_day.sh"])
def test_a_script_plans_once(checkout, tmp_path, words_of, script):
    """Started again, it would find a part of what it needs on the disk, and too little room."""
    file = checkout() / "runs" / script
    first = run(file, *words_of(script), base=tmp_path / "b")
    (tmp_path / "b" / "record").unlink()
    again = run(file, *words_of(script), base=tmp_path / "b", REFUSE="1")
    assert "--shell" in first["day"] and "day" not in again
    if script == "speedrun.sh":  # another run is another plan
        other = run(file, *words_of(script), base=tmp_path / "b", DEPTH="12")
        assert "--depth=12" in other["day"]


def test_a_number_may_begin_with_0(checkout, tmp_path):
    made = run(checkout() / "runs/one_day.sh", "--hours", "08", "--dry_run", base=tmp_path / "b")
    assert "--minutes=480" in made["day"]


@pytest.mark.parametrize(
    ("variable", "locale"),
    [
        ("LC_ALL", "de_DE.UTF-8"),
        ("LC_ALL", "POSIX"),
        ("LC_ALL", "ru_RU.KOI8-R"),
        ("LC_ALL", ""),
        ("LANG", "fr_FR.UTF-8"),
        ("LANG", "C"),
        ("LANG", ""),
        ("LC_NUMERIC", "de_DE.UTF-8"),
        ("LC_NUMERIC", ""),
    ],
)
def test_numbers_have_a_point_in_every_language(checkout, tmp_path, variable, locale):
    # Few machines have these locales; what the scripts set decides, whether or not they do
    repo = checkout()
    shows = 'source runs/environment.sh >/dev/null; echo "${LC_ALL-none} $LC_NUMERIC $LC_CTYPE"'
    environment = {"PATH": os.environ["PATH"], variable: locale}
    done = subprocess.run(
        ["bash", "-c", shows], cwd=repo, env=environment, capture_output=True, text=True, check=True
    )
    unset, numeric, characters = done.stdout.split()
    assert (unset, numeric) == ("none", "C")
    assert characters == (locale if locale and variable != "LC_NUMERIC" else "C")
    if (variable, locale) != ("LC_ALL", "de_DE.UTF-8"):  # the others would show the same
        return
    made = run(
        repo / "runs/one_day.sh", "--minutes", "10", base=tmp_path / "b", **{variable: locale}
    )
    minutes = next(w for w in made["recipe"] if w.startswith("--minutes="))
    assert float(minutes.removeprefix("--minutes=")) > 0


@pytest.mark.parametrize("script", sorted((ROOT / "runs").glob("*.sh")), ids=lambda p: p.name)
def test_no_script_counts_with_awk_or_splits_words(script):
    text = script.read_text(encoding="utf-8")
    assert "read -ra" not in text, "it splits paths at spaces"
    assert "printf '%q" not in text, "its quoting is bash's own: use quoted of values.sh"
    assert not [n for n in text.split("awk")[1:] if "%" in n.splitlines()[0]], "LC_NUMERIC"


NEWER = {  # than bash 3.2, which macOS has
    "extended patterns": r"[?@+*!]\(",
    "upper and lower case": r"\$\{\w+(\[.\])?[,^]",
    "other expansions": r"\$\{\w+(\[.\])?@[A-Za-z]\}|\$\{!\w+[@*]\}",
    "counted from the end": r"\$\{\w+:[^}=+?-][^}]*:\s*-|\[-\d+\]",
    "dictionaries and references": r"\b(declare|local|typeset) -[a-z]*[Agn]",
    "commands": r"\b(mapfile|readarray|coproc|compopt|wait -n)\b|\[\[? -v\b",
    "redirections": r"&>>|\|&|;;?&",
}


@pytest.mark.parametrize("script", sorted(ROOT.glob("*/*.sh")), ids=lambda p: p.name)
def test_the_bash_of_a_mac_runs_a_script(script):
    """It reads a line only when it comes to it, which may be after days of training."""
    text = re.sub(r"(^|\s)#.*", "", script.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if "=~" not in line]  # regular expressions
    for name, form in NEWER.items():
        assert not [line for line in lines if re.search(form, line)], name


NEWER_CODE = """
[[ $a == b?(@*) ]]
case $a in @(b|c)) ;; esac
echo ${a,,}
echo ${a@Q}
echo ${!a@}
echo ${a:0:-1}
echo ${a[-1]}
declare -A a
local -n a=$1
mapfile -t a
[ -v a ]
a &>>b
a |& b
"""


@pytest.mark.parametrize("line", NEWER_CODE.strip().splitlines())
def test_newer_bash_is_recognised(line):
    assert any(re.search(form, line) for form in NEWER.values())


def test_the_installation_takes_pinned_packages_and_their_hashes(checkout, tmp_path):
    repo, record = checkout(), tmp_path / "record"
    installed = repo / ".venv/installed"
    wanted = installed.read_text()
    installed.write_text(wanted.replace("\nPython 3.11\n", "\nPython 3.10\n"))
    uv = repo / ".venv/bin/uv"
    uv.write_text("#!/bin/sh\nexit 1\n")  # so that pip installs
    uv.chmod(0o755)
    for _ in range(2):
        subprocess.run(
            ["bash", "-c", "source runs/environment.sh"],
            cwd=repo,
            env=os.environ | {"RECORD": str(record)},
            capture_output=True,
            check=True,
        )
    pinned, project = [shlex.join(json.loads(line)) for line in record.read_text().splitlines()]
    assert "--require-hashes --no-deps -r .venv/pinned.txt" in pinned
    assert project.endswith("-e '.[serve,documents]'") and installed.read_text() == wanted
    names = (repo / ".venv/pinned.txt").read_text()
    assert "\nnumpy==" in names and "\npytest==" not in names and "\ntorch==" not in names


def test_a_run_of_a_day_refuses_other_flags(checkout, tmp_path):
    script, base = checkout() / "runs/one_day.sh", tmp_path / "b"
    run(script, "--minutes", "10", "--data", "a=x:1", base=base)
    again = run(script, "--minutes", "10", "--data", "a=x:1", base=base)
    assert "base_train" in again  # of the first start; nothing more is recorded
    done = subprocess.run(
        ["bash", str(script), "--minutes", "10", "--data", "b=y:1"],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "HOME": str(base)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "was begun with other flags" in done.stderr
    assert "a=x:1" in done.stderr


@pytest.mark.parametrize("script", ["rap.sh", "one_day.sh"])
def test_the_same_words_in_another_folder_are_another_text(checkout, tmp_path, script):
    repo, base = checkout(), tmp_path / "base"
    for name in ("a", "b"):
        (tmp_path / name / "texts").mkdir(parents=True)

    def started_in(name, source, **more):
        words = ["--minutes", "10"] if script == "one_day.sh" else []
        file, here = repo / "runs" / script, tmp_path / name
        return run(file, *words, "--data", source, base=base, cwd=here, **more)

    def prior_of(name, source):
        return values(started_in(name, source)[f"{repo}/dev/generate_rap_prior.py"], "--out")

    if script == "one_day.sh":
        started_in("a", "own=texts")
        started_in("a", "own=texts")
        started_in("b", "own=texts", status=2)
    else:
        assert prior_of("a", "own=texts") != prior_of("b", "own=texts")
        whole = f"own={tmp_path}/a/texts"
        assert prior_of("a", whole) == prior_of("b", whole)


@pytest.mark.parametrize(
    ("script", "folder"), [("one_day.sh", "day"), ("rap.sh", "rap"), ("ittybitty.sh", "plan")]
)
def test_a_quoted_tilde_in_the_base_folder_is_the_home_folder(checkout, tmp_path, script, folder):
    words = {"one_day.sh": ["--minutes", "10"]}.get(script, [])
    home, file = tmp_path / "home", checkout() / "runs" / script
    run(file, *words, base=home, NANOCHAT_BASE_DIR="~/my data")
    assert (home / "my data" / folder).is_dir()


def test_conversations_are_looked_at_before_the_clock_starts(checkout, tmp_path):
    script = checkout() / "runs/one_day.sh"
    made = run(script, "--minutes", "10", "--conversations", "c=z:1", base=tmp_path / "b")
    assert values(made["tok_data"], "--conversations") == ["c=z:1"]
    made = run(script, "--minutes", "10", "--task_dir", "T", base=tmp_path / "c")
    assert values(made["tok_data"], "--conversations") == ["default"]
    assert values(made["tok_data"], "--task_dir") == ["T"]


@pytest.mark.parametrize("script", ["ittybitty.sh", "one_day.sh"])
def test_a_script_trains_its_own_tokenizer_whatever_is_there(checkout, tmp_path, words_of, script):
    base = tmp_path / "b"
    (base / "tokenizer").mkdir(parents=True)
    (base / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "tok_train" in run(checkout() / "runs" / script, *words_of(script), base=base)


@pytest.mark.parametrize("change", ["moved", "another Python", "no Python"])
def test_an_environment_that_no_longer_fits_is_made_anew(checkout, tmp_path, change):
    """The checkout was moved, or the system has replaced or removed its Python."""
    repo = checkout()
    python, library = repo / ".venv/bin/python", repo / ".venv/lib/python3.11"
    library.mkdir(parents=True)
    (repo / ".venv/pyvenv.cfg").touch()
    run(repo / "runs/one_day.sh", "--minutes", "10", "--dry_run", base=tmp_path / "b")
    (repo / ".venv" / "mark").touch()
    run(repo / "runs/one_day.sh", "--minutes", "10", "--dry_run", base=tmp_path / "b")
    assert (repo / ".venv" / "mark").exists()
    if change == "moved":
        (repo / ".venv" / "home").write_text("/somewhere/else\n")
    elif change == "another Python":
        library.rename(library.with_name("python3.10"))
    else:
        python.unlink()
        python.symlink_to(tmp_path / "gone")
    tools = tmp_path / "tools"  # without a Python that could make a new one
    tools.mkdir()
    for tool in ("bash", "cat", "rm", "dirname", "sed"):
        (tools / tool).symlink_to(shutil.which(tool))
    script, there = repo / "runs/one_day.sh", {"base": tmp_path / "b", "PATH": str(tools)}
    run(script, "--minutes", "10", "--dry_run", status=2, **there)
    assert not (repo / ".venv").exists()
