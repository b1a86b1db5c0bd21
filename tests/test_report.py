"""The report: one page that needs no other file, with the right numbers and nothing invented."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from nanochat.base.common import UserError
from nanochat.base.logbook import Logbook
from nanochat.commands import report
from nanochat.study.page import INK
from nanochat.study.report import find_runs, load, write_report


@pytest.fixture
def runs(tmp_path):
    directories = []
    for stage, loss, accuracy in (("base", 4.0, 0.1), ("sft", 1.0, 0.9)):
        directory = tmp_path / "checkpoints" / stage / "d4"
        with Logbook(directory, config={"depth": 4}, step=0) as book:
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
            book.log(kind="sample", step=1000, **{"sample/The": " <script>alert(1)</script>"})
        directories.append(directory)
    return directories


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_says_where_the_time_went(runs, tmp_path):
    text = write_report(runs, tmp_path / "page.html").read_text()
    part = text[text.index("<h2>Time</h2>") : text.index("<h2>Curves</h2>")]
    assert part.count("90.0%") == 2 and part.count("2.0%") == 2 and "training steps" in part
    assert "<b>" not in part and "nan" not in part


def test_the_page_needs_no_other_file_and_shows_what_was_measured(runs, tmp_path):
    text = write_report(runs, tmp_path / "out" / "page.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 6 and not {"script", "img", "link", "iframe"} & set(tags)
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
    assert "90.0%" in text and "sums &lt;&amp;&gt;" in text and "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text and INK not in text and "currentColor" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert len(text) < 400_000


def test_a_missing_measurement_has_no_curve(tmp_path):
    with Logbook(tmp_path / "base" / "d1") as book:
        book.log(step=1, tokens=10, seconds=1.0, loss=2.0)
    text = write_report([tmp_path / "base" / "d1"], tmp_path / "page.html").read_text()
    assert text.count("<svg") == 2 and "<h2>Accuracy" not in text and "<h2>Samples" not in text


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "page.html")
    with pytest.raises(UserError, match="no run"):
        write_report([], tmp_path / "page.html")


def test_the_command_finds_runs_or_takes_folders(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    report.main([])
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert find_runs() == runs  # base before sft
    report.main([str(runs[0]), "-o", str(tmp_path / "one.html")])
    assert "nanochat: base/d4" in (tmp_path / "one.html").read_text()


def test_long_curves_are_averaged_and_bad_points_dropped(runs):
    (log,) = load(runs[:1])
    xs, ys = log.curve("train", "loss", "tokens")
    assert len(xs) <= 250 and xs == sorted(xs) and all(4.0 < y <= 5.0 for y in ys)
    assert log.last("val_bpb", "eval") == 2.0
