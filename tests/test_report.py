"""The report: one page that needs no other file, with the right numbers and nothing invented."""

import json
import os
import re
import shutil
import time
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from nanochat.base.common import UserError
from nanochat.base.files import release, reserve
from nanochat.base.logbook import Logbook
from nanochat.commands import report, summary
from nanochat.model.stages import lock_file
from nanochat.study.page import INK
from nanochat.study.report import find_runs, labels, load, write_report
from nanochat.study.report import train_and_report as write_after

CONFIG = {
    "knobs": {"depth": 4, "data": ["<u>", "b"], "seed": 42, "deep": [[[]]]},
    "origins": {"depth": "command line", "data": "recipe <u>.toml", "seed": "default"},
    "config": {"n_layer": 4, "n_embd": 256},
    "machine": {"processor": "<u> 9000"},
    "dtype": "bfloat16",
}


@pytest.fixture
def runs(tmp_path):
    directories = []
    for stage, loss, accuracy in (("base", 4.0, 0.1), ("sft", 1.0, 0.9)):
        directory = tmp_path / "checkpoints" / stage / "d4"
        with Logbook(directory, config=CONFIG, step=0) as book:
            for step in range(1, 1001):
                nll = float("nan") if step == 500 else loss + 1 / step
                rates = {"lr_mult": 1 - step / 1000, "tok_per_sec": 2000.0, "peak_share": 0.5}
                book.log(step=step, tokens=step * 1000, seconds=step * 0.5, loss=nll, **rates)
            for step in (0, 500, 1000):
                book.log(
                    kind="eval",
                    step=step,
                    tokens=step * 1000,
                    seconds=step * 0.5,
                    val_bpb=loss / (1 + step / 1000),
                )
            spent = {"steps": 450.0, "eval": 10.0, "<b>": 9.0, "save": float("nan")}
            book.log(kind="summary", step=1000, seconds=500.0, spent=spent)
            kinds = {
                "sums <&>": {"accuracy": accuracy, "n": 50, "chance": 0.25, "lo": 0.0, "hi": 1.0}
            }
            book.log(
                kind="chat_eval", step=1000, stage=stage, accuracy=accuracy, n=500, kinds=kinds
            )
            for step in range(0, 1001, 100):
                said = {"sample/The <i>": f" <script>alert({step})</script>"}
                book.log(kind="sample", step=step, **said)
        directories.append(directory)
    return directories


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_says_where_the_time_went(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.study.report.gallery", lambda plots: "")
    text = write_report(runs, tmp_path / "page.html").read_text()
    part = text[text.index("<h2>Time and energy</h2>") : text.index("<h2>Settings</h2>")]
    assert part.count("90.0%") == 2 and part.count("2.0%") == 2 and "training steps" in part
    assert "<b>" not in part and ">nan" not in part and "Energy is not measured" in part
    assert "16m40s" in part  # of both stages
    text = write_report(runs, tmp_path / "page.html", watts=36).read_text()
    assert text.count("5 Wh") == 2 and "10 Wh" in text and "36 W, as stated" in text


def test_the_page_needs_no_other_file_and_shows_what_was_measured(runs, tmp_path):
    text = write_report(runs, tmp_path / "out" / "page.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 5 and not {"script", "img", "link", "iframe"} & set(tags)
    assert not any(
        attrs.get("src") or str(attrs.get("href", "#"))[0] != "#"
        for _, attrs in page.tags
        if "src" in attrs or "href" in attrs
    )
    urls = set(re.findall(r"https?://[^\"' )<]+", text))
    assert all("w3.org" in u for u in urls), urls  # XML namespaces, never fetched
    assert (
        "base/d4" in text
        and "2.0000" in text
        and "1,000" in text
        and "8m20s" in text
        and "50%" in text
    )
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'") and "<u>" not in text and "<i>" not in text
    assert "90.0%" in text and "sums &lt;&amp;&gt;" in text and "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text and INK not in text and "currentColor" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert len(text) < 400_000


def test_a_missing_measurement_has_no_curve(tmp_path):
    with Logbook(tmp_path / "base" / "d1") as book:
        book.log(step=1, tokens=10, seconds=1.0, loss=2.0)
    text = write_report([tmp_path / "base" / "d1"], tmp_path / "page.html").read_text()
    assert text.count("<svg") == 1 and "<h2>Accuracy" not in text and "<h2>Samples" not in text


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "page.html")
    with pytest.raises(UserError, match="no run"):
        write_report([], tmp_path / "page.html")


def test_the_command_finds_runs_or_takes_folders(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("nanochat.study.report.gallery", lambda plots: "")
    report.main([])
    assert str(tmp_path / "report" / "d4.html") in capsys.readouterr().out
    assert find_runs([]) == find_runs(["d4"]) == runs  # base before sft
    other = runs[0].with_name("d6")
    shutil.copytree(runs[0], other)
    os.utime(other / "metrics.jsonl", (1, 1))
    assert find_runs([]) == runs and find_runs(["d6"]) == [other]  # the newest
    (other / "step_000001").mkdir()
    assert find_runs([]) == [other]  # the tag that was saved last, whatever was evaluated since
    (other / "step_000001").rmdir()
    report.main(["d4", "d6"])
    assert "nanochat: 3 runs" in (tmp_path / "report.html").read_text()
    report.main([str(runs[0]), "-o", str(tmp_path / "one.html")])
    assert "nanochat: d4" in (tmp_path / "one.html").read_text()
    with pytest.raises(UserError, match=r"no metrics\.jsonl with data in d9"):
        report.main(["d9"])


def test_stages_follow_one_another_on_one_clock(runs):
    base, sft = load(reversed(runs))
    assert (base.name, sft.name, sft.before) == (
        "base/d4",
        "sft/d4",
        {"seconds": 500.0, "tokens": 1e6},
    )
    assert base.curve("eval", "val_bpb", "seconds")[0] == [0, 250, 500]
    assert sft.curve("eval", "val_bpb", "seconds")[0] == [500, 750, 1000]
    assert sft.curve("eval", "val_bpb", "tokens")[0] == [1e6, 1.5e6, 2e6]


def test_every_stage_has_a_line_with_its_name_and_samples_over_time(runs, tmp_path):
    text = write_report(runs, tmp_path / "page.html").read_text()
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert all(">base</text>" in svg and ">sft</text>" in svg for svg in svgs)
    base, sft = text.index("<h2>Samples"), text.index("<h2>Conversations")
    assert sft < base and text.count("alert(0)") == text.count("alert(1000)") == 2
    assert text.count("alert(") == 12  # six of eleven moments for each run
    assert "4 layers, width 256" in text and "recipe &lt;u&gt;.toml" in text
    fold = text[text.index("<details>") : text.index("</details>")]
    assert "seed" in fold and "depth" not in fold


def test_reinforcement_shows_reward_and_answers_by_task_but_no_loss(tmp_path):
    with Logbook(tmp_path / "rl" / "d4", config=CONFIG, step=0) as book:
        for step in (1, 2):
            clock = {"step": step, "tokens": 9 * step, "seconds": 1.0 * step}
            book.log(**clock, loss=-0.5, reward=0.25)
            for name in ("sums", "spelling"):
                shares = {f"{name}/pass@1": 0.5, f"{name}/pass@1_lo": 0.4, f"{name}/pass@1_hi": 0.6}
                book.log(kind="eval", task=name, **clock, **shares)
    (log,) = load([tmp_path / "rl" / "d4"])
    assert log.curve("train", "loss", "seconds") == ([], []) and log.state() == "stopped, starting"
    text = write_report([tmp_path / "rl" / "d4"], tmp_path / "page.html").read_text()
    titles = re.findall(r"<text[^>]*>([^<]+[a-z]{4} [^<]*)</text>", text)
    assert [t for t in titles if "," in t or "reward" in t][:2] == [
        "Mean reward of sampled replies",
        "Held-out questions, share answered",
    ]
    assert "rl, sums/pass@1" in text and "rl, spelling/pass@1" in text


def test_a_run_says_whether_it_is_at_work(tmp_path):
    directory = tmp_path / "sft" / "d4"
    with Logbook(directory, config=CONFIG, step=0) as book:
        book.log(step=1, seconds=1.0, progress=0.25, loss=2.0)
        reserve(lock_file(directory), "the run")
        assert load([directory])[0].state() == "training, 25%"
        release()
        assert load([directory])[0].state() == "stopped, 25%"
        book.log(kind="summary", step=1, seconds=1.0)
    assert load([directory])[0].state() == "finished"


def test_watching_follows_a_run_until_ctrl_c(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("nanochat.study.report.gallery", lambda plots: "")
    page, seen = tmp_path / "report" / "d4.html", []

    def nap(seconds):
        text = page.read_text()
        assert re.search(r'<meta http-equiv="refresh" content="\d{2,}">', text)  # by its cost
        seen.append(("tokens, later" in text, page.stat().st_mtime_ns))
        if len(seen) == 2:
            with Logbook(runs[0]) as book:
                book.log(kind="sample", step=1000, **{"sample/x": "tokens, later"})
        elif len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", nap)
    assert report.main(["--watch"]) == page
    changed = [later for later, _ in seen]
    assert changed == [False, False, True, True]
    assert len({when for _, when in seen}) == 2  # nothing is written while nothing grows
    assert 'http-equiv="refresh"' not in page.read_text()


def test_runs_of_one_tag_in_two_base_folders_are_two_chains(runs, tmp_path):
    other = tmp_path / "other" / "checkpoints" / "sft" / "d4"
    shutil.copytree(runs[1], other)
    logs = load([runs[1], other])
    assert [log.before["tokens"] for log in logs] == [0.0, 0.0]
    assert labels(logs) == [str(log.directory) for log in logs]
    assert labels(load(runs)) == ["base", "sft"]


def test_a_log_book_without_rows_is_no_run_yet(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    empty = runs[0].parent.parent / "mid" / "d4"
    empty.mkdir(parents=True)
    (empty / "metrics.jsonl").touch()
    assert find_runs([]) == find_runs(["d4"]) == runs


def test_ctrl_c_before_there_is_a_run_to_watch(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report.main(["--watch"])


# ---- at the end of a stage


@pytest.fixture
def trained(runs, tmp_path, monkeypatch):
    """A stage that stage.train has just finished: (what train_and_report is given, its page)."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("nanochat.study.report.gallery", lambda plots: "")
    monkeypatch.setattr("nanochat.train.stage.train", lambda run, *parts: {"seconds": parts[0]})
    run = SimpleNamespace(directory=runs[1], runtime=SimpleNamespace(is_main=True))
    return run, tmp_path / "report" / "d4.html"


def test_a_stage_ends_with_the_page_of_its_chain(trained, capsys):
    run, page = trained
    assert write_after(run, 5.0) == {"seconds": 5.0}
    assert not page.exists()  # a stage of seconds has none
    assert write_after(run, 500.0) == {"seconds": 500.0}
    assert f"report: {page}" in capsys.readouterr().out and "base/d4" in page.read_text()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a bug")])
def test_a_page_that_fails_does_not_fail_the_stage(trained, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("nanochat.study.report._costs_table", fail)
    assert write_after(trained[0], 500.0) == {"seconds": 500.0}
    assert f"the report was not written ({type(error).__name__}: " in capsys.readouterr().err


def test_ctrl_c_while_the_page_is_written_leaves_the_old_page(trained, monkeypatch):
    run, page = trained
    write_after(run, 500.0)
    before = page.read_text()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_after(run, 500.0)
    assert page.read_text() == before and [p.name for p in page.parent.iterdir()] == ["d4.html"]


def test_long_curves_are_averaged_and_bad_points_dropped(runs):
    (log,) = load(runs[:1])
    xs, ys = log.curve("train", "loss", "tokens")
    assert len(xs) <= 250 and xs == sorted(xs) and all(4.0 < y <= 5.0 for y in ys)
    assert log.last("val_bpb", "eval") == 2.0


# ---- which stages belong together


def begin(folder, stage, day, **knobs):
    """Write the logbook of a stage that was begun on a day of January and is finished."""
    directory = folder / "checkpoints" / stage / "d4"
    directory.mkdir(parents=True)
    start = {"step": 0, "time": f"2026-01-{day:02d}T12:00:00", "config": {"knobs": knobs}}
    rows = {"start": start, "summary": {"step": 9, "tokens": 100, "seconds": 60.0}}
    lines = [json.dumps({"kind": kind, **row}) + "\n" for kind, row in rows.items()]
    (directory / "metrics.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    ("days", "kept"),
    [
        ({"base": 1, "mid": 2, "sft": 2, "rl": 3}, ["base", "mid", "sft", "rl"]),
        ({"base": 4, "mid": 2, "sft": 3}, ["base"]),
        ({"base": 1, "mid": 3, "sft": 2, "rl": 4}, ["base", "mid"]),
        ({"mid": 2, "sft": 3}, ["mid", "sft"]),
    ],
)
def test_stages_of_an_earlier_model_are_left_out(base, monkeypatch, capsys, days, kept):
    monkeypatch.setattr("nanochat.study.report.gallery", lambda plots: "")
    for stage, day in days.items():
        begin(base, stage, day, **({"source": "sft"} if stage == "rl" else {}))
    logs = load(find_runs(["d4"]))
    assert [log.stage for log in logs] == kept == [*summary.stage_figures("d4")]
    assert logs[-1].before["seconds"] == 60.0 * (len(kept) - 1)
    noticed = capsys.readouterr().err
    left_out = ", ".join(f"{stage}/d4" for stage in days if stage not in kept)
    assert noticed.count(f"skipped them: {left_out}\n") == 2 * bool(left_out)
    write_report(find_runs(["d4"]), base / "page.html", refresh=10)
    assert not capsys.readouterr().err, "a page that is written again and again repeats no notice"


def test_a_stage_that_a_later_one_skipped_is_left_out(base):
    for day, stage in enumerate(("base", "mid", "sft"), 1):
        begin(base, stage, day)
    begin(base, "rl", 4, source="mid")
    assert [log.stage for log in load(find_runs(["d4"]))] == ["base", "mid", "rl"]


def test_seconds_that_are_not_finite_leave_their_cells_empty(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.study.report.gallery", lambda plots: "")
    with Logbook(runs[0]) as book:
        book.log(kind="summary", step=1000, seconds=float("nan"))
    text = write_report(runs, tmp_path / "page.html", watts=36).read_text()
    part = text[text.index("<h2>Time and energy</h2>") : text.index("<h2>Machine and model</h2>")]
    assert "nan" not in part and part.count("8m20s") == 2  # of the other stage, and of all
