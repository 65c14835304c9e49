"""The leaderboard: what is ranked with what, the CSV, and the page in a real browser."""

from __future__ import annotations

import csv
import html
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from erasebench import leaderboard, rows
from erasebench.contracts import ErasebenchError

EVIL = "</script><script>alert(1)</script>"
QUOTES = "qu\"ote's <b>bold</b> & {{ 7*7 }}"
NAMES = ["bell", EVIL, QUOTES, "new\nline", "ünïcode 消去 \u202eevil", "../../etc/passwd"]
GROUPS = {
    "acc_e": ("forget", False),
    "acc_s": ("keep", True),
    "h": ("overall", True),
    "fd": ("quality", False),
    "asr": ("attack", False),
    "seconds_per_success": ("attack", True),
}


def row(metric: str, value: float | None, half: float = 0.05, **changes) -> rows.Row:
    blank = dict.fromkeys(rows.NAMES) | dict.fromkeys(
        ("reason", "attack", "judge_version", "published_source", "commit", "target"), ""
    )
    group, better = next(kind for start, kind in GROUPS.items() if metric.startswith(start))
    known = {
        "schema": rows.SCHEMA,
        "status": "ok",
        "method": "uce",
        "method_version": 1,
        "params": "{}",
        "base": "mini",
        "revision": "abc",
        "world": "mini",
        "task": "object",
        "task_version": 1,
        "n_concepts": 1,
        "target": "airplane",
        "split": "target",
        "subset": False,
        "judge": "clip",
        "metric": metric,
        "group": group,
        "value": value,
        "higher_is_better": better,
        "low": None if value is None else value - half,
        "high": None if value is None else value + half,
        "ci_method": "wilson",
        "n": 120,
        "n_valid": 119,
        "n_refused": 0,
        "n_dropped": 0,
        "seed": 0,
        "sampler": "ddim 25 steps, guidance 3",
        "prompts_sha256": "f00",
        "packages": '{"torch": "2.9"}',
        "dirty": False,
        "device": "cpu",
        "batch": 32,
        "fit_seconds": 1.5,
        "sample_seconds": 60.25,
        "unet_calls": 9000,
        "peak_memory_mb": 900.0,
        "fit_notes": "",
        "artifact": "",
    }
    return rows.Row(**blank | known | changes)


def save(folder, run_id: str, *parts: rows.Row, **changes) -> None:
    rows.write([replace(part, run_id=run_id, **changes) for part in parts], folder / "runs" / f"{run_id}.csv")


def scores(forget: float, keep: float, half: float = 0.05, h: str = "h_o_top1") -> list[rows.Row]:
    return [
        row("acc_e_top1", forget, half),
        row("acc_s_top1", keep, half, split="retain"),
        row(h, (1 - forget + keep) / 2, half, split="target+retain"),
        row("fd_mini", 1 / 3 + 40 * forget, 0.1),
    ]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Two tasks, several methods, hostile names, a failed, a skipped, an empty and a subset run."""
    folder = tmp_path_factory.mktemp("leaderboard") / "results"
    save(folder, "a0", *scores(0.9, 0.9), method="none")
    for i, name in enumerate(NAMES):
        save(
            folder,
            f"b{i}",
            *scores(0.1 + 0.1 * i, 0.9 - 0.02 * i),
            method=name,
            params=json.dumps({"note": name}),
        )
    save(
        folder,
        "b1x",
        *scores(0.65, 0.2),
        method="uce",
        params=json.dumps({"ridge": 0.25}),
        commit="c0ffee",
        dirty=True,
    )
    failed = row("acc_s_top1", None, split="", status="failed", reason=EVIL, group="")
    save(folder, "c0", row("acc_e_top1", 0.0, 0.0), failed, method="broken")
    save(
        folder,
        "c1",
        row("acc_e_top1", None, status="skipped", reason="cannot erase an airplane"),
        method="unfit",
    )
    save(folder, "c2", row("acc_e_top1", None, n_valid=0), *scores(0.1, 0.9)[1:], method="faceless")
    save(folder, "d0", *(replace(r, n=r.n // 10) for r in scores(0.0, 1.0, 0.0)), method="uce", subset=True)
    save(folder, "e0", *scores(0.0, 1.0, 0.0), method="uce", sampler="ddim 50 steps, guidance 7.5")
    published = row("acc_e_top1", 0.25, published=0.3, published_source="MACE Table 4")
    save(
        folder,
        "f0",
        published,
        *scores(0.2, 0.8, h="h_c")[1:],
        method="uce",
        task="celebrity",
        target="",
        n_concepts=10,
    )
    save(
        folder,
        "f1",
        replace(published, published=0.9),
        *scores(0.2, 0.8, h="h_c")[1:],
        method="esd",
        task="celebrity",
        target="",
        n_concepts=10,
    )
    for name in ("b0", "b1"):
        Image.new("RGB", (4, 2), "teal").save(folder / "runs" / f"{name}.webp")
    return folder


@pytest.fixture(scope="session")
def groups(results):
    found, problems = leaderboard.load(results)
    assert not problems
    return found


@pytest.fixture(scope="session")
def main_group(groups):
    return max(groups, key=lambda group: len(group.runs))


def methods(runs) -> list[str]:
    return [run.head.method for run in runs]


# ranks and groups


def test_rank_counts_the_intervals_wholly_on_the_better_side():
    # By hand, lower is better: a [.0, .2]  b [.1, .3]  c [.21, .4]  d [.3, .35]  e [.5, .6]
    # wholly better than a: none; b: none; c: a; d: a (b touches .3: no); e: a b c d
    ends = {"a": (0.0, 0.2), "b": (0.1, 0.3), "c": (0.21, 0.4), "d": (0.3, 0.35), "e": (0.5, 0.6)}
    cells = [row("acc_e", low, method=name, low=low, high=high) for name, (low, high) in ends.items()]
    assert leaderboard.ranks(cells) == [1, 1, 2, 2, 5]
    # Higher is better: wholly above a: c d e; b: e; c: e; d: e; e: none (d = .3 touches b's end)
    assert leaderboard.ranks([replace(cell, higher_is_better=True) for cell in cells]) == [4, 2, 2, 2, 1]


def test_seeds_of_a_method_count_once_and_only_together():
    def at(low, high, **changes):
        return row("acc_e", low, low=low, high=high, **changes)

    twice = [at(0.0, 0.1, method="a", seed=0), at(0.0, 0.1, method="a", seed=1), at(0.5, 0.6, method="b")]
    assert leaderboard.ranks(twice) == [1, 1, 2]
    split = [at(0.0, 0.1, method="a", seed=0), at(0.4, 0.7, method="a", seed=1), at(0.5, 0.6, method="b")]
    assert leaderboard.ranks(split) == [1, 1, 1]
    tuned = [at(0.0, 0.1, params='{"k": 1}'), at(0.0, 0.1, params='{"k": 2}'), at(0.5, 0.6, method="b")]
    assert leaderboard.ranks(tuned) == [1, 1, 3]


def test_without_an_interval_or_a_direction_there_is_no_rank():
    bare = row("acc_e", 0.5, low=None, high=None)
    aimless = row("acc_e", 0.9, higher_is_better=None)
    assert leaderboard.ranks([bare, row("acc_e", 0.1, method="b"), aimless]) == [None, 1, None]


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "ddim 50 steps, guidance 3"},
        {"task_version": 2},
        {"world": "photo"},
        {"base": "sd14"},
        {"revision": "d"},
        {"n_concepts": 5},
        {"target": "cat"},
        {"subset": True},
        {"task": "style"},
    ],
)
def test_only_like_runs_share_a_table(tmp_path, change):
    save(tmp_path, "a", *scores(0.1, 0.9))
    save(tmp_path, "b", *scores(0.2, 0.9), method="esd")
    save(tmp_path, "c", *scores(0.0, 1.0, 0.0), method="esd", **change)
    found, _ = leaderboard.load(tmp_path)
    assert sorted(len(group.runs) for group in found) == [1, 2]


def test_subsets_of_different_sizes_are_kept_apart(tmp_path):
    for n in (8, 16):
        save(
            tmp_path,
            f"a{n}",
            *(replace(r, n=n * (1 + ("+" in r.split))) for r in scores(0.1, 0.9)),
            subset=True,
        )
    found, _ = leaderboard.load(tmp_path)
    assert [group.facts[-1] for group in found] == [
        "subset of 8 images a split",
        "subset of 16 images a split",
    ]


def test_another_version_of_the_judge_is_another_column(tmp_path):
    for version in "12":
        save(tmp_path, version, *scores(0.1, 0.9), method=f"m{version}", judge_version=version)
    (group,), _ = leaderboard.load(tmp_path)
    assert {"acc_e_top1 1", "acc_e_top1 2"} <= {column.label for column in group.columns}
    assert all(len(column.cells) == 1 for column in group.columns if column.row.group != "cost")


def test_order_reference_and_incomplete(main_group):
    assert methods(main_group.reference) == ["none"]
    assert methods(main_group.ranked) == [*NAMES, "uce"]  # by h_o_top1
    assert main_group.order.label == "h_o_top1"
    assert [(run.method, run.status) for run in main_group.incomplete] == [
        ("broken", "failed"),
        ("unfit", "skipped"),
        ("faceless", "incomplete"),
    ]
    assert main_group.incomplete[2].reasons == ["acc_e_top1 no value: 0 of 120 images judged"]
    for column in main_group.columns:
        assert set(column.rank) == {run.head.run_id for run in main_group.ranked}
        assert not {"a0", "c0", "c1", "c2"} & set(column.rank)


def test_without_a_harmonic_mean_the_first_forget_metric_orders(tmp_path):
    for method, forget in (("worse", 0.6), ("better", 0.2)):
        save(tmp_path, method, row("fd_mini", 1.0), row("acc_e_top1", forget), method=method)
    (group,), _ = leaderboard.load(tmp_path)
    assert methods(group.ranked) == ["better", "worse"]
    assert group.pareto is None


def test_pareto_front(main_group):
    points = {p["label"].split(" (")[0]: p for p in main_group.pareto["points"]}
    assert points["none"]["reference"] and not points["none"]["front"]
    assert [name for name, p in points.items() if p["front"]] == ["bell"]  # best on both axes
    assert points["bell"]["x"] == pytest.approx([0.85, 0.9, 0.95])
    assert main_group.pareto["names"] == ["1 − acc_e_top1", "acc_s_top1"]


# files and text


def test_csv_holds_the_rows_exactly(results, groups):
    path, _ = leaderboard.build(results)
    with path.open(encoding="utf-8", newline="") as stream:
        lines = {line["run_id"]: line for line in csv.DictReader(stream)}
    assert len(lines) == sum(len(group.runs) for group in groups)
    measured = [r for r in rows.read_all(results / "runs") if r.value is not None]
    for r in measured:
        line = lines[r.run_id]
        said = [line[f"{r.metric}{end}"] for end in ("", "_low", "_high", "_n_valid")]
        assert [float(text) for text in said] == [r.value, r.low, r.high, r.n_valid]
        assert (line["method"], line["params"], line["sampler"]) == (r.method, r.params, r.sampler)
        assert float(line["unet_calls"]) == 9000
    assert (lines["c0"]["status"], lines["c0"]["acc_s_top1"]) == ("failed", "")
    assert EVIL in lines["c0"]["reason"]


def test_text_fits_the_width_and_lists_everything(groups):
    text = leaderboard.render_text(groups)
    assert max(map(len, text.splitlines())) <= 100
    assert "object: airplane, 1 concept erased, mini, ddim 25 steps, guidance 3" in text
    assert "new\\nline" in text and "\u202e" not in text
    assert "incomplete, not ranked: unfit (seed 0): acc_e_top1 skipped: cannot erase an airplane" in text
    bell = next(line for line in text.splitlines() if " bell " in line)
    assert bell.startswith("1 ") and "0.900 [0.85, 0.95]  0.100 [0.05, 0.15]  0.900 [0.85, 0.95]" in bell


def test_an_attack_that_never_succeeds_takes_nobody_out_of_the_ranking_and_is_no_cost_of_the_method(tmp_path):
    under = {"attack": "cce", "split": "attack:cce", "unet_calls": 90_000}
    attack = row("asr", 0.0, 0.0, **under), row("seconds_per_success", None, **under)
    save(tmp_path, "a", *scores(0.1, 0.9), *attack)
    ((group,), _) = leaderboard.load(tmp_path)
    (run,) = group.ranked
    assert run.command.endswith(" 'attack=[cce]'")
    assert not group.incomplete and [r.value for r in run.cells.values() if r.metric == "unet_calls"] == [9000]
    assert [r.value for r in run.cells.values() if r.group == "attack"] == [0.0]


def test_filters(results):
    found, _ = leaderboard.load(results, task="celebrity", world="mini")
    assert [group.title for group in found] == ["celebrity: 10"]
    assert leaderboard.load(results, world="photo") == ([], [])


def test_command_repeats_the_run(groups):
    commands = {run.head.run_id: run.command for group in groups for run in group.runs}
    assert commands["b1x"] == (
        "python -m erasebench model=mini method=uce method.ridge=0.25 task=object target=airplane seed=0 "
        "sampler.name=ddim sampler.steps=25 sampler.guidance=3"
    )
    assert " n=10 " in commands["f0"] and " images=12 " in commands["d0"]


def test_a_digest_that_a_method_fills_in_is_shown_short_and_not_asked_for():
    run = leaderboard.Run((row("acc_e", 0.1, method="retrained", params=json.dumps({"content": "ab" * 32})),), Path())
    assert run.details[0] == "content=ababababab" and "content" not in run.command


@pytest.mark.parametrize(
    "task, target, said",
    [
        ("explicit", "explicit content", {}),
        ("object", "cat + Bea -> dog", {"target": "cat", "concepts": ["Bea"], "surrogate": "dog"}),
        ("celebrity", "", {"n": 1}),
        ("object", "cat -> dog, horse", {"target": "cat", "surrogate": ["dog", "horse"]}),
        ("object", "cat -> dog, by pictures", {"target": "cat", "surrogate": "dog", "pictures.path": "..."}),
    ],
)
def test_command_says_what_was_erased(task, target, said):
    assert leaderboard._asked(row("acc_e", 0.1, task=task, target=target)) == said


def cli(*args):
    command = [sys.executable, "-m", "erasebench.leaderboard", *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line(tmp_path):
    empty = cli("--results", str(tmp_path / "none"))
    assert empty.returncode == 1
    assert "python -m erasebench method=" in empty.stderr and len(empty.stderr.splitlines()) == 1
    save(tmp_path, "good", *scores(0.1, 0.9))
    good = cli("--results", str(tmp_path))
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[-2:] == [
        str(tmp_path / "leaderboard.csv"),
        str(tmp_path / "leaderboard.html"),
    ]


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\0\0", b"a,b\n1,2\n", None])
def test_a_damaged_file_is_named_and_the_others_are_used(tmp_path, capsys, damage):
    save(tmp_path, "good", *scores(0.1, 0.9))
    bad = tmp_path / "runs" / "bad.csv"
    bad.write_bytes((tmp_path / "runs" / "good.csv").read_bytes()[:-40] if damage is None else damage)
    assert leaderboard.main(["--results", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert str(bad) in err and len(err.splitlines()) == 1
    assert "0.900 [0.85, 0.95]" in out and (tmp_path / "leaderboard.html").exists()
    (tmp_path / "leaderboard.csv").unlink()
    with pytest.raises(ErasebenchError, match=r"bad\.csv"):
        leaderboard.build(tmp_path)
    assert (tmp_path / "leaderboard.csv").exists()


def test_the_same_run_twice_counts_once(tmp_path):
    save(tmp_path, "a", *scores(0.1, 0.9))
    shutil.copy(tmp_path / "runs" / "a.csv", tmp_path / "runs" / "copy.csv")
    (group,), problems = leaderboard.load(tmp_path)
    assert len(group.runs) == 1 and "copy.csv" in problems[0]


def test_importing_needs_no_torch():
    code = "import sys, erasebench.leaderboard; print({'torch', 'diffusers', 'pandas'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "set()\n"


def test_without_plotly_the_rest_is_written(results, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    page = leaderboard.render_html(leaderboard.load(results)[0])
    assert "erasebench[plots]" in page and "<table>" in page
    assert capsys.readouterr().err.count("erasebench[plots]") == 1


def test_explicit_images_stay_out(tmp_path):
    for task in ("explicit", "object"):
        save(tmp_path, task, *scores(0.1, 0.9), task=task)
        Image.new("RGB", (4, 2)).save(tmp_path / "runs" / f"{task}.webp")
    found = {group.title: group.runs[0].picture for group in leaderboard.load(tmp_path)[0]}
    assert found["explicit: airplane"] is None and found["object: airplane"]["width"] == 4


# the page in a browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs Chromium and chromedriver on the path")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1300,1000",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver))
    yield driver
    driver.quit()


def emulate(browser, width=1300, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


@pytest.fixture
def page(browser, results):
    _, path = leaderboard.build(results)
    browser.get_log("browser"), browser.get_log("performance")
    emulate(browser)
    browser.get(path.as_uri())
    return browser


def each(page, selector: str, expression: str) -> list:
    """A JavaScript expression of every element e that is there to be seen."""
    return page.execute_script(
        f"return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).map(e => {expression})",
        selector,
    )


def shown(page, group, column: int) -> list[str]:
    """The texts of a column, top to bottom."""
    return each(
        page,
        f"#{group.anchor} .ranked tr",
        f"e.cells[{column}].querySelector('.v, a').firstChild.textContent",
    )


def heads(page, group, expression: str) -> list:
    return each(page, f"#{group.anchor} .names th", expression)


def click(page, group, label: str) -> int:
    """Sort by a column, by keyboard, as the headers are buttons."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    index = heads(page, group, "e.textContent.trim()").index(label)
    page.find_elements(By.CSS_SELECTOR, f"#{group.anchor} .names button")[index].send_keys(Keys.ENTER)
    return index


def draw(page, group) -> None:
    """Plots are drawn when they come into view."""
    from selenium.webdriver.support.ui import WebDriverWait

    plot = f"#{group.anchor} .plot"
    page.execute_script("document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})", plot)
    WebDriverWait(page, 20).until(lambda _: each(page, f"{plot} .main-svg", "1"))


def test_page_is_quiet_and_asks_nobody(page, main_group):
    draw(page, main_group)
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # The browser's first tab may still be loading chrome:// pages of its own: only this document's count.
    urls = [p["request"]["url"] for p in sent if p["documentURL"] == page.current_url]
    assert page.current_url in urls
    assert [url for url in urls if url != page.current_url and not url.startswith("data:")] == []
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_click_sorts_by_number_and_again_reverses(page, main_group):
    before = shown(page, main_group, 0)
    index = click(page, main_group, "fd_mini")
    values = [float(text) for text in shown(page, main_group, index)]
    assert values == sorted(values) and len(values) == 7
    assert values != sorted(values, key=str)  # 4.33 before 12.33: by number, not by text
    assert heads(page, main_group, "e.getAttribute('aria-sort')")[index] == "ascending"
    click(page, main_group, "fd_mini")
    assert [float(text) for text in shown(page, main_group, index)] == values[::-1]
    assert heads(page, main_group, "e.getAttribute('aria-sort')")[index] == "descending"
    assert sorted(shown(page, main_group, 0)) == sorted(before)
    assert each(page, f"#{main_group.anchor} tbody th a", "e.textContent")[0] == "none"


def test_filter_leaves_the_methods_that_match(page, main_group):
    from selenium.webdriver.common.by import By

    page.find_element(By.ID, "filter").send_keys("BEL")
    assert shown(page, main_group, 0) == ["bell"]
    titles = each(page, ".run", "e.dataset.name")
    assert titles and all(title.startswith("bell") for title in titles)
    page.find_element(By.ID, "filter").clear()
    page.find_element(By.ID, "filter").send_keys("x\b")
    assert len(shown(page, main_group, 0)) == 7


def test_hostile_names_are_text(page, main_group):
    names = each(page, f"#{main_group.anchor} .ranked th a", "e.textContent")
    assert names == [leaderboard.plain(name) for name in [*NAMES, "uce"]]
    assert names[3:5] == ["new\\nline", "ünïcode 消去 \\u202eevil"]
    assert page.execute_script("return document.scripts.length") == 2  # plotly and the page's own
    assert each(page, ".apart .why", "e.textContent")[0] == f"acc_s_top1 failed: {EVIL}"
    plot = f"#{main_group.anchor} .plot"
    draw(page, main_group)
    labels = each(page, f"{plot} .annotation-text", "e.textContent")
    assert {"none", "bell bell", EVIL[:29] + "..."} <= set(labels)
    assert each(page, f"{plot} script, {plot} a", "e.outerHTML") == []
    from selenium.common.exceptions import NoAlertPresentException

    with pytest.raises(NoAlertPresentException):
        page.switch_to.alert.text  # noqa: B018


def test_a_narrow_screen_scrolls_only_inside_the_tables(page, main_group):
    emulate(page, width=390)
    draw(page, main_group)
    page.execute_script("document.documentElement.scrollLeft = 50")
    assert each(page, "html", "[e.scrollWidth, e.scrollLeft]") == [[390, 0]]
    box = f"#{main_group.anchor} .box"
    assert each(page, box, "e.scrollWidth > e.clientWidth") == [True]
    page.execute_script("document.querySelector(arguments[0]).scrollLeft = 200", box)
    left = each(page, f"{box}, {box} .ranked th", "e.getBoundingClientRect().left")
    assert left == pytest.approx([left[0]] * len(left), abs=1)  # the first column stays


def test_dark_mode_is_dark(page):
    def brightness(of):
        (color,) = each(page, "body", f"getComputedStyle(e).{of}")
        return sum(map(int, color[color.index("(") + 1 : -1].split(",")[:3])) / 3

    assert brightness("backgroundColor") > 230 and brightness("color") < 60
    emulate(page, scheme="dark")
    assert brightness("backgroundColor") < 40 and brightness("color") > 200


def test_tooltips_sheets_and_published_values(page, main_group):
    tip = each(page, f"#{main_group.anchor} .ranked td", "e.title")[1]
    for said in ("interval", "wilson", "n = 120", "n_valid = 119", "n_refused = 0", "judge clip"):
        assert said in tip
    assert (
        "share of images of the erased concepts in which clip still recognises them, by first choices "
        "(lower is better)" in heads(page, main_group, "e.title")
    )
    pictures = each(page, ".run img", "[e.alt, e.src.slice(0, 22)]")
    assert len(pictures) == 2 and all(alt and src == "data:image/webp;base64" for alt, src in pictures)
    published = each(page, ".pub", "[e.textContent.trim(), e.classList[1]]")
    assert sorted(published) == [["≈ paper 0.300", "in"], ["≠ paper 0.900", "out"]]


def test_the_page_escapes_in_its_source(results):
    source = leaderboard.build(results)[1].read_text(encoding="utf-8")
    assert EVIL not in source and html.escape(EVIL) in source


def test_only_parameters_that_were_changed_are_shown():
    """Values that a world gives (25 steps), and those that MACE chooses by its variant, are its usual ones."""
    usual = leaderboard._defaults("mace", "mini", "celebrity")
    assert usual["preserved_weight"] == 2.5e4 and usual["image_steps"] == 25
    assert usual["pixels"] == "vae" and usual["refined"] == "all_but_concept"
