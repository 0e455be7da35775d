"""`msd report`: the file says what the run holds, and works in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msdcli.data.digits import Digits
from msdcli.engine.report import charts as report_charts
from msdcli.engine.report import words as report_words
from msdcli.engine.report.facts import load_runs
from msdcli.engine.report.pictures import SampleRenderer, images, layout, spread
from msdcli.engine.report.report import differences, render
from msdcli.engine.tracking.formatting import short, three_digits
from msdcli.partition import Partition
from msdcli.recipe.data import DigitsSettings
from tests.browser import CHROMIUM, Browser
from tests.conftest import Msd

HOSTILE = '<script>document.title = "taken"</script>'
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run to change."""
    shutil.copytree(finished.parent, tmp_path / "runs")
    return tmp_path / "runs" / finished.name


def rename_a_class(run: Path, name: str) -> None:
    record = json.loads((run / "run.json").read_text())
    record["class_names"][2] = name
    (run / "run.json").write_text(json.dumps(record))


def watched(run: Path) -> None:
    """What `msd fid RUN --watch` leaves."""
    student = {"stage": "dm", "number": 0, "samples": 100, "values": {}}
    lines = [
        {
            "metric": "l1_toy2d",
            "protocol": "histograms",
            "students": {str(k): student | {"step": step, "value": 1.5 - step / 10 + k / 100} for k in range(2)},
            "whole": 1.4 - step / 10,
        }
        for step in (2, 4, 6)
    ]
    (run / "metrics/watch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"metric": "l1')


@needs_chromium
def test_the_report_works_in_a_browser(copy: Path, msd: Msd, tmp_path: Path) -> None:
    """No error, no request, no sideways scrolling on a phone; hover, keys and toggles do what they should."""
    rename_a_class(copy, HOSTILE)
    watched(copy)
    done = msd("report", str(copy))
    assert done.returncode == 0, done.stderr
    page = copy / "report.html"
    assert page.stat().st_size < 5_000_000
    with Browser() as browser:
        browser.open(page, width=360, height=740)
        assert browser.run("document.documentElement.scrollWidth") == 360
        browser.open(page)
        assert browser.run("document.title") == "tiny – msd report"
        assert HOSTILE in browser.run("document.querySelector('#partition table').textContent")
        drawn = browser.run(
            "[...document.querySelectorAll('figure')].map(f => f.querySelector('.plot > svg') !== null)"
        )
        assert len(drawn) >= 8 and all(drawn)

        for selector, said in (
            ("#curves figure:nth-of-type(2) .plot svg", r"student 0 [\d.]+"),
            ("#distances .grid figure .plot svg", r"whole [\d.]+"),
            ("#distances .pair figure .plot svg", r"students [\d.]+"),
            ("#partition .plot svg", r"student 1"),
        ):
            browser.point(selector, 0.7, 0.5)
            tip = f"document.querySelector({selector!r}).parentNode.querySelector('.tip')"
            browser.wait(f"!{tip}.hidden")
            browser.run(f"document.querySelector({selector!r}).focus()")
            browser.press("End")
            assert re.search(said, browser.run("document.getElementById('said').textContent")), selector
        assert browser.messages == []
        assert {r.split(":")[0] for r in browser.requests} <= {"file", "data"}


@needs_chromium
def test_toggles_of_the_report(copy: Path, msd: Msd, tmp_path: Path) -> None:
    """A student's lines, the scale, the figure, the order and the colours can be changed."""
    assert msd("report", str(copy), "--no-pictures").returncode == 0
    with Browser() as browser:
        browser.open(copy / "report.html")
        paper = "getComputedStyle(document.body).backgroundColor"
        light = browser.run(paper)
        browser.click("button[data-theme=dark]")
        dark = browser.run(paper)
        assert dark != light and browser.run("document.querySelector('button[data-theme=dark]').ariaPressed") == "true"
        browser.click("button[data-theme=auto]")
        browser.look(1200, 900, dark=True)
        assert browser.run(paper) == dark

        figure = (
            "[...document.querySelectorAll('#curves figure')].find(f => f.textContent.includes('dm: loss of fake'))"
        )
        browser.run(f"{figure}.id = 'it'")
        assert browser.run("document.querySelectorAll('#it path.curve').length") == 2
        browser.click("#it [aria-label='show student 1']")
        assert browser.run("document.querySelectorAll('#it path.curve').length") == 1
        before = browser.run("document.querySelector('#it path.curve').getAttribute('d')")
        browser.click("#it [aria-label='logarithmic scale']")
        assert browser.run("document.querySelector('#it path.curve').getAttribute('d')") != before

        rows = "[...document.querySelectorAll('#distances figure:nth-of-type(2) .name')].map(e => e.textContent)"
        assert browser.run(rows)[0] == "ring"
        values = {r["group"]: r["values"]["l1_toy2d"] for r in measured(copy) if r["who"] == "students"}
        worst = max(range(8), key=lambda c: values[f"class {c}"])
        browser.click("#distances figure:nth-of-type(2) [aria-label='worst first']")
        names = json.loads((copy / "run.json").read_text())["class_names"]
        assert browser.run(rows)[0] == names[worst]
        assert browser.messages == []


def measured(run: Path) -> list[dict]:
    rows: list[dict] = json.loads((run / "metrics/l1_toy2d.json").read_text())["rows"]
    return rows


def test_figures_of_the_page_are_those_of_the_run(copy: Path, msd: Msd) -> None:
    assert msd("report", str(copy), "--no-pictures", "--out", "r.html").returncode == 0
    page = Path("r.html").read_text()
    assert set(re.findall(r"https?://[^\"'\s<]*", page)) == {"http://www.w3.org/2000/svg"}, "nothing from elsewhere"
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    parts = next(d for d in data["distances"] if d["id"].startswith("parts"))
    whole = next(row for row in parts["rows"] if row["label"] == "whole")
    shown = {mark["who"]: mark["values"]["l1_toy2d"][0] for mark in whole["marks"]}
    stored = {r["who"]: r["values"]["l1_toy2d"] for r in measured(copy) if r["group"] == "whole"}
    assert shown["students"] == pytest.approx(stored["students"], rel=1e-4)
    assert shown["teacher"] == pytest.approx(stored["teacher"], rel=1e-4)
    fake = next(c for c in data["curves"] if c["title"] == "dm: loss of fake")
    lines = [json.loads(line) for line in (copy / "students/1/0-dm/metrics.jsonl").read_text().splitlines()]
    expected = [[line["step"], pytest.approx(line["losses"]["fake"], rel=1e-4)] for line in lines]
    assert next(s for s in fake["series"] if s["label"] == "student 1")["points"] == expected
    sha256 = json.loads((copy / "students/1/0-dm/model.json").read_text())["sha256"]
    assert sha256 in page and "8 classes between them" in page


def test_what_is_hostile_is_text(copy: Path) -> None:
    rename_a_class(copy, HOSTILE)
    (facts,) = load_runs([copy])
    page = render([facts], [None])
    assert HOSTILE not in page and "&lt;script&gt;document.title" in page


def test_an_unfinished_run_says_what_is_missing(copy: Path, msd: Msd) -> None:
    shutil.rmtree(copy / "metrics")
    (copy / "students/0/0-dm/model.json").unlink()
    shutil.rmtree(copy / "students/1")
    done = msd("report", str(copy))
    assert done.returncode == 0, done.stderr
    page = (copy / "report.html").read_text()
    assert "student 0 is not finished: dm at step 6 of 6" in page
    assert "student 1 is not finished: dm not begun" in page
    assert "no measurement yet" in page and "Student 0 is drawn as it is now: dm at step 6." in page
    shutil.rmtree(copy / "students")
    shutil.rmtree(copy / "teacher")
    (copy / "partition.json").unlink()
    (copy / "run.json").unlink()
    done = msd("report", str(copy))
    assert done.returncode == 0, done.stderr
    assert "the classes are not divided yet" in (copy / "report.html").read_text()


def test_a_lost_file_is_a_note(copy: Path, msd: Msd) -> None:
    (copy / "students/1/0-dm/model.safetensors").write_bytes(b"cut off")
    done = msd("report", str(copy))
    assert done.returncode == 0, done.stderr
    assert "No samples of student 1" in (copy / "report.html").read_text()


def test_groups_that_a_user_named_are_lines_of_their_own(copy: Path, msd: Msd) -> None:
    path = copy / "metrics/l1_toy2d.json"
    told = json.loads(path.read_text())
    whole = next(r for r in told["rows"] if (r["who"], r["group"]) == ("students", "whole"))
    told["rows"] += [whole | {"group": name} for name in ("even", "class clowns", "student 0 of runs/other")]
    path.write_text(json.dumps(told))
    assert msd("report", str(copy)).returncode == 0
    (facts,) = load_runs([copy])
    charts = {kind: report_charts.distance_chart(facts, facts.results[0], kind) for kind in ("parts", "classes")}
    assert {"even", "class clowns", "student 0 of runs/other"} <= {row["label"] for row in charts["parts"]["rows"]}
    assert len(charts["classes"]["rows"]) == len(facts.class_names)


def test_runs_side_by_side(copy: Path, msd: Msd) -> None:
    other = copy.parent / "other"
    shutil.copytree(copy, other)
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("fake_updates: 2", "fake_updates: 3"))
    result = json.loads((other / "metrics/l1_toy2d.json").read_text())
    result["samples"] = 7
    (other / "metrics/l1_toy2d.json").write_text(json.dumps(result))
    done = msd("report", str(copy), str(other), "--no-pictures", "--out", "both.html")
    assert done.returncode == 0, done.stderr
    page = Path("both.html").read_text()
    assert "Where the recipes differ" in page and "<code>stages.0.fake_updates</code>" in page
    assert "cannot be compared: the runs differ in number of samples" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert {s["group"] for c in data["curves"] for s in c["series"]} == {"tiny", "other"}
    assert {row["label"] for c in data["distances"] if c["id"] == "compared" for row in c["rows"]} == {"tiny", "other"}


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere"], "nowhere is not a run"), (["RUN", "RUN"], "named twice"), (["RUN", "--out", "."], "is a folder")],
)
def test_what_cannot_be_reported_is_refused(finished: Path, msd: Msd, words: list[str], said: str) -> None:
    done = msd("report", *(str(finished) if word == "RUN" else word for word in words))
    assert done.returncode == 2 and said in done.stderr
    assert not (finished / "report.html").exists()


def test_recipes_differ_where_they_do() -> None:
    one = {"name": "a", "stages": [{"objective": "dm", "steps": 5}], "betas": [0, 1], "data": {"name": "x"}}
    two = {"name": "b", "stages": [*one["stages"], {"objective": "adm", "steps": 4}], "betas": [0, 2], "data": None}
    assert differences([one, two]) == [
        ("stages.1", ["", "objective adm, steps 4"]),
        ("betas", ["[0, 1]", "[0, 2]"]),
        ("data", ["name x", ""]),
    ]
    assert differences([one, one | {"name": "c"}]) == []


def test_the_verdict_follows_the_intervals() -> None:
    def line(value: float, *span: float) -> dict:
        intervals = {"fd": {"low": span[0], "high": span[1]}} if span else {}
        return {"values": {"fd": value}, "intervals": intervals}

    assert "closer, by a factor of 2." in report_words.verdict(line(1, 0.9, 1.1), line(2, 1.9, 2.1), "fd")
    assert "overlap" in report_words.verdict(line(1, 0.5, 1.5), line(1.2, 1, 1.4), "fd")
    assert "farther, by a factor of 4 (no intervals" in report_words.verdict(line(4), line(1), "fd")


def test_a_page_does_not_grow_with_the_prompts(finished: Path) -> None:
    (facts,) = load_runs([finished])
    many = Partition([list(range(0, 50_000, 2)), list(range(1, 50_000, 2))], 50_000, "quadrants")
    page = render([replace(facts, class_names=[f"prompt {i:07d}" for i in range(50_000)], partition=many)], [None])
    assert "and 24,700 more" in page and len(page) < 500_000


def test_numbers_are_no_powers_of_ten() -> None:
    assert [three_digits(v) for v in (0.0123, 9.996, 99.96, 3671, 1.5e6)] == [
        "0.0123",
        "10",
        "100",
        "3,671",
        "1,500,000",
    ]
    assert (short(999_700), short(7.03e12)) == ("1,000 k", "7.03 T")


def test_pictures_fit_their_budget_and_are_the_samples() -> None:
    for parts, image_bytes, budget in (
        ([2] * 5, 64, 2e6),
        ([1000], 12288, 2e6),
        ([250] * 4, 12288, 1e6),
        ([1] * 100, 12288, 1e6),
    ):
        students, columns, per_student = layout(parts, image_bytes, int(budget))
        drawn = sum(min(per_student, size) for size in parts[:students]) * 3 * columns + 4 * columns * students
        assert drawn * image_bytes <= budget and min(students, per_student) >= 1
    assert layout([2] * 5, 64, 10**6) == (5, 8, 2)
    assert spread(range(1000), 4) == [0, 250, 500, 750] and spread([1, 2], 5) == [1, 2]
    row = images("x", torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8))
    with Image.open(io.BytesIO(base64.b64decode(row.image.split(",")[1]))) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (8, 17, 2)
    assert pixels[0, 0].tolist() == [0, 255] and pixels[7, 16].tolist() == [255, 255] and not pixels[:, 8, 1].any()


def test_long_curves_are_means_of_neighbours() -> None:
    points = [(i, float(i % 2)) for i in range(2400)] + [(2400, float("nan"))]
    thin = report_charts.thinned(points)
    assert len(thin) == 240 and thin[-1] == (2399, 0.5) and {v for _, v in thin} == {0.5}


PICTURES = """
name: pictures
threads: 1
workers: 1
data: {name: digits}
teacher:
  network: {kind: unet, channels: 8, multipliers: [1], blocks: 1, embedding: 8}
  training: {steps: 2, batch: 8, log_every: 1}
  solver: {steps: 2}
partition: {students: 2}
pairs: {count: 64, shard: 64}
stages:
  - {objective: dm, steps: 2, batch: 8, fake_updates: 1, log_every: 1}
evaluation: {judge: off}
"""


def test_pictures_of_a_run_of_images(msd: Msd, tmp_path: Path) -> None:
    """Every class of the finished student beside data and teacher; the same noise before and after training."""
    (tmp_path / "pictures.yaml").write_text(PICTURES)
    assert msd("distill", "pictures.yaml", "--student", "0").returncode == 0
    done = msd("report", "runs/pictures")
    assert done.returncode == 0, done.stderr
    page = Path("runs/pictures/report.html").read_text()
    strips = dict.fromkeys(re.findall(r'src="data:image/png;base64,([^"]+)"[^>]*alt="\d+ images?: ([^"]+)"', page))
    kinds = [what for _, what in strips]
    assert kinds.count("student 0") == 5 and kinds.count("teacher") >= 5 and kinds.count("data") == 10
    assert {"before training", "after dm, 2 steps", "teacher, 3 evaluations"} <= set(kinds)
    shown = next(picture for picture, what in strips if what == "data")
    with Image.open(io.BytesIO(base64.b64decode(shown))) as picture:
        pixels = np.asarray(picture)[:, :8, 0]
    data = Digits(DigitsSettings())
    renderer = SampleRenderer(load_runs([Path("runs/pictures")])[0], [])
    renderer.labels = torch.where(data.labels(range(len(data))) == 3, 4, data.labels(range(len(data))))
    drawn = renderer.rows([3, 4], 2)
    assert "data" not in [strip.what for strip in drawn[3].strips] != []
    assert drawn[4].strips[0].what == "data", "a class without pictures has no line of them"
    first = data.images([int((data.labels(range(50)) == 0).nonzero()[0])])
    assert np.abs(pixels.astype(float) - (first[0, 0].numpy() + 1) * 127.5).max() <= 1
