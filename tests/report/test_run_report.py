"""The report of runs has their numbers, opens in a browser without a complaint, and takes what runs really leave."""

import json
import math
import os
import re
import shutil
import subprocess
import time

import pytest
import yaml

from nemo_bluelm.errors import UserError
from nemo_bluelm.report.run_page import differences, summary, write_report
from nemo_bluelm.report.run_plots import POINTS, thinned
from nemo_bluelm.report.runs import find_runs, read_run

ROW = {"think": True, "budget": 8, "accuracy": 0.5, "low": 0.4, "high": 0.6, "thinking_tokens": 8.0}
ROW |= {"answer_tokens": 2.0, "problems": 50}


def write_run(folder, name="probe", steps=30, lr=1e-3, extra=None, **files):
    folder.mkdir(parents=True)
    sources = {"text": {"weight": 1.0}, "photos": {"weight": 3.0}}
    recipe = {
        "name": name,
        "run_dir": str(folder),
        "train": {"steps": 30},
        "optim": {"lr": lr},
        "data": {"sources": sources},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [
        {
            **{"step": step, "loss": 5 / math.sqrt(step), "lr": lr, "grad_norm": 1.0 + step % 3, "tokens": 1000},
            **{
                "tokens_by_source": {"text": 250 * step, "photos": 750 * step},
                "loss_by_source": {"text": 5 / math.sqrt(step), **({"photos": 4 / step} if step % 2 else {})},
                "seconds": 0.5,
                "tokens_per_second": 2000,
            },
            **{"tflops": 0.1, "mfu": 0.41, "bad_samples": 0, **(extra or {})},
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file, content in files.items():
        (folder / file.replace("__", ".")).write_text(content)
    return folder


def page(folders, out):
    write_report(find_runs(folders), out)
    html = out.read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1]
    return html, json.loads(data)


def test_the_numbers_are_those_of_the_metrics(tmp_path):
    run = write_run(tmp_path / "run")
    html, data = page([run], tmp_path / "out" / "report.html")
    (row,) = data["runs"]
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert row["step"] == row["steps"] == 30 and row["complete"]
    assert row["loss"] == pytest.approx(sum(losses[-3:]) / 3)
    assert (row["tokens"], row["seconds"], row["tokens_per_second"], row["mfu"]) == (30000, 15.0, 2000, 0.41)
    for title in (
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Speed",
        "Model FLOPs utilisation",
        "Tokens by source",
        "Loss by source",
    ):
        assert f'aria-label="{title}"' in html, title
    assert re.search(r"photos</td><td>22,500</td><td>75.0%</td><td>75.0%", html)
    assert not re.search(r'(src|href|url)[=(]"?(https?:)?//', html), "it needs nothing from elsewhere"


def test_runs_are_compared_key_by_key(tmp_path):
    first, second = write_run(tmp_path / "a", "one"), write_run(tmp_path / "b", "two", lr=2e-3)
    html, data = page([first, second], tmp_path / "report.html")
    assert data["differences"] == {"optim.lr": [1e-3, 2e-3]}
    assert html.count('aria-label="Loss"') == 1 and ">one<" in html and ">two<" in html
    assert differences([read_run(first)]) == {}
    endless = write_run(tmp_path / "d", "three", lr=math.inf)
    assert page([first, endless], tmp_path / "report.html")[1]["differences"] == {"optim.lr": [1e-3, "inf"]}
    twins = summary(find_runs([first, write_run(tmp_path / "c", "one")]))
    assert [row["name"] for row in twins["runs"]] == [str(first), str(tmp_path / "c")]


def test_a_pipeline_is_shown_stage_by_stage(tmp_path):
    for number, name in enumerate(("pretrain", "sft")):
        run = write_run(tmp_path / "runs" / name)
        os.utime(run / "recipe.yaml", (number, number))
    html, data = page([tmp_path / "runs"], tmp_path / "report.html")
    assert [row["name"] for row in data["runs"]] == ["pretrain", "sft"]
    assert html.count('aria-label="Loss"') == 2
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_what_happened_and_replies_are_shown_safely(tmp_path):
    events = [
        {"time": "2026-01-01T00:00:00+00:00", "event": "start", "step": 0, "detail": "2 ranks"},
        {"time": "2026-01-01T01:00:00+00:00", "event": "left_out", "step": 7, "detail": "its loss is NaN"},
        {"time": "2026-01-01T02:00:00+00:00", "event": "start", "step": 20, "detail": "2 ranks"},
    ]
    run = write_run(tmp_path / "run", extra={"reward/mean": 0.5, "reward/sums/mean": 0.25})
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in [*events, {}]) + '{"time": "cut o')
    (run / "validation.jsonl").write_text(json.dumps({"step": 0, "val/accuracy": 0.25}) + "\n")
    (run / "rollouts").mkdir()
    reply = {"step": 3, "task_name": "sums", "reward": 0.5, "components": {"exact": 1.0}, "reason": "", "thought": None}
    reply |= {"messages": [{"role": "user", "content": "<script>alert(1)</script>"}], "answer": "</script><b>9"}
    (run / "rollouts" / "shown_00000003.jsonl").write_text((json.dumps(reply) + "\n") * 2 + "{}\n")
    html, data = page([run], tmp_path / "report.html")
    assert "step left out" in html and "its loss is NaN" in html and "started again" in html
    assert data["runs"][0]["starts"] == 2 and data["runs"][0]["left_out"] == 1
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)" in html and html.count("&lt;b&gt;9") == 1
    assert 'aria-label="Reward by task"' in html and 'aria-label="On held-out prompts"' in html


def test_accuracy_by_budget(tmp_path):
    (tmp_path / "eval").mkdir()
    table = {"tasks": {"sums": {"rows": [ROW, ROW | {"think": False, "budget": None, "thinking_tokens": 0.0}]}}}
    (tmp_path / "eval" / "table.json").write_text(json.dumps(table))
    html, data = page([tmp_path / "eval"], tmp_path / "report.html")
    assert "sums: accuracy by thinking tokens" in html and "40% to 60%" in html
    assert data["evaluations"]["sums"][0]["accuracy"] == 0.5


def test_names_are_no_formulas(tmp_path):
    """And a name that is markup stays a name."""
    odd = r"x$\frac$y"
    folders = [write_run(tmp_path / "a", odd), write_run(tmp_path / "b", "<b>$1 & $2", extra={"grad_norm": 1e-3})]
    html, _ = page(folders, tmp_path / "report.html")
    html = re.sub("<!--.*?-->", "", html, flags=re.S)
    assert html.count(odd) > 3 and "&lt;b&gt;$1 &amp; $2" in html and "<b>" not in html
    assert r"\$" not in html and "mathdefault" not in html  # neither the names nor the logarithmic axis' ticks
    table = {"tasks": {f'{odd}"<b>': {"rows": [ROW]}}}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "table.json").write_text(json.dumps(table))
    html, _ = page([tmp_path / "eval"], tmp_path / "report.html")
    assert f'aria-label="{odd}&quot;&lt;b&gt;: accuracy' in html and "<b>" not in html


@pytest.mark.parametrize("key", ["thinking_tokens", "answer_tokens", "problems", "low", "rows"])
def test_a_table_that_lacks_something_is_one_line(key, tmp_path, cli):
    table = {"rows": [ROW, {name: value for name, value in ROW.items() if name != key}]}
    table.pop(key, None)
    (tmp_path / "table.json").write_text(json.dumps({"tasks": {"sums": table}}))
    code, out, err = cli("report", str(tmp_path))
    assert code == 2 and not out and err.count("\n") == 1
    assert str(tmp_path / "table.json") in err and "sums" in err and key in err


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": "many"},
        {"seconds": [1]},
        {"mfu": math.nan},
        {"tokens_by_source": {"text": None}},
        {"loss_by_source": 5},
    ],
)
def test_a_step_that_cannot_be_counted_is_one_line(wrong, tmp_path, cli):
    run = write_run(tmp_path / "run", steps=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3} | wrong) + "\n")
    for more in ([], ["--json"]):
        code, out, err = cli("report", str(run), *more)
        assert code == 2 and not out and err.count("\n") == 1
        assert f"{run / 'metrics.jsonl'} line 3: {next(iter(wrong))} is" in err


def test_odd_runs(tmp_path):
    one = write_run(tmp_path / "one", steps=1)
    with (one / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # the run goes on
    gaps = write_run(tmp_path / "Zähler 数", "数 & <name>", extra={"loss": None, "mfu": None})
    nan = write_run(tmp_path / "nan", "not a number", extra={"loss": math.nan})
    html, data = page([one, gaps, nan], tmp_path / "report.html")
    assert data["runs"][0]["step"] == 1 and not data["runs"][0]["complete"]
    assert data["runs"][1]["loss"] is data["runs"][2]["loss"] is None and "数 &amp; &lt;name&gt;" in html


@pytest.mark.parametrize("case", ["missing", "no run", "empty", "broken line", "broken recipe"])
def test_what_is_no_run_is_one_line(case, tmp_path, cli):
    folder = tmp_path / "run"
    if case != "missing":
        write_run(folder)
    if case == "no run":
        (folder / "metrics.jsonl").unlink()
    elif case == "empty":
        (folder / "metrics.jsonl").write_text("")
    elif case == "broken line":
        (folder / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    elif case == "broken recipe":
        (folder / "recipe.yaml").write_text("a: [")
    code, out, err = cli("report", str(folder))
    assert code == 2 and not out and err.count("\n") == 1 and str(folder) in err
    with pytest.raises(UserError):
        find_runs([folder])


def test_places_that_cannot_be_written(tmp_path, cli):
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    code, _, err = cli("report", str(run), "--out", str(tmp_path / "file" / "report.html"))
    assert code == 2 and err.count("\n") == 1 and "choose another place" in err


def test_the_charts_are_files_too_and_numbers_go_to_programs(tmp_path, cli):
    run = write_run(tmp_path / "run")
    code, out, _ = cli("report", str(run), "--png", str(tmp_path / "png"))
    assert code == 0 and out.strip() == str(run / "report.html")
    names = {file.name for file in (tmp_path / "png").iterdir()}
    assert {"01_probe_loss.png", "01_probe_mixture.png"} <= names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (tmp_path / "png").iterdir())
    code, out, _ = cli("report", str(run), "--json")
    assert code == 0 and json.loads(out)["runs"][0]["step"] == 30


def test_many_steps_are_averaged_and_the_page_stays_small(tmp_path):
    run = write_run(tmp_path / "run", steps=100_000)
    begun = time.perf_counter()
    page([run], tmp_path / "report.html")
    print(f"100,000 steps: {time.perf_counter() - begun:.1f} s, {(tmp_path / 'report.html').stat().st_size:,} bytes")
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    xs, ys = thinned(range(1, 10_001), [float(step) for step in range(1, 10_001)])
    assert len(xs) == POINTS and xs == ys and sum(ys) / POINTS == pytest.approx(5000.5)


# ---- a browser


@pytest.fixture(scope="module")
def chromium():
    """Debian's Chromium; it is installed where it is missing and may be."""
    if shutil.which("chromium") is None:
        if os.geteuid() or shutil.which("apt-get") is None:
            pytest.skip("Chromium is not installed: apt-get install chromium")
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", *command], env=environment, check=True, capture_output=True)

    def look(url, *flags):
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=4000", *flags, "--dump-dom", url]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return look


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_a_complaint_or_a_scroll_bar(width, chromium, tmp_path):
    write_run(tmp_path / "runs" / "first", extra={"reward/mean": 0.5, "a_key_of_a_long_name/mean": 1.0})
    write_run(tmp_path / "runs" / "a_stage_of_a_rather_long_name_without_any_space_in_it")
    page([tmp_path / "runs"], tmp_path / "report.html")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe src=report.html style='width:{width}px;height:900px;border:0' onload=\"let page = contentDocument"
        ".documentElement; document.title = [page.scrollWidth, page.clientWidth, contentDocument.querySelectorAll("
        "'figure svg path').length, getComputedStyle(contentDocument.body).backgroundColor].join()\"></iframe>"
    )
    seen = chromium(frame.as_uri(), f"--window-size={width + 40},1000")
    assert seen.returncode == 0, seen.stderr[-2000:]
    scroll, client, paths, colour = re.search(r"<title>(\d+),(\d+),(\d+),(.*?)</title>", seen.stdout).groups()
    assert int(scroll) <= int(client), "it scrolls sideways"
    assert int(paths) > 100 and colour == "rgb(251, 250, 248)"
    assert ":CONSOLE" not in seen.stderr, seen.stderr[-2000:]
