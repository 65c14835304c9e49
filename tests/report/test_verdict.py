"""Verdicts: each requirement by its interval, the worst judge counts, nothing passes unattacked."""

import pytest
from test_rows import example

from erasebench import cli
from erasebench.cli import verdict as command
from erasebench.contracts import ErasebenchError
from erasebench.report.runs import Run
from erasebench.report.verdict import FAIL, OPEN, PASS, REQUIREMENTS, judge, write_page

LIMITS = dict.fromkeys(REQUIREMENTS, 0.1)
GOOD = {
    "forgetting": dict(metric="shown_target", group="forget", split="target", value=0.02, low=0.0, high=0.08),
    "synonyms": dict(metric="shown_synonym", group="forget", split="synonym", value=0.02, low=0.0, high=0.08),
    "keeping": dict(
        metric="shown_retain", group="keep", split="retain", higher_is_better=True, value=0.9, low=0.8, high=0.95,
        base_value=0.93, change_low=-0.09, change_high=0.02,
    ),
    "quality": dict(
        metric="clip_score", group="quality", split="caption", higher_is_better=True, value=69.0, low=68.0, high=70.0,
        base_value=70.0, change_low=-2.0, change_high=0.0,
    ),
    "broken": dict(metric="broken_target", group="quality", split="target", value=0.0, low=0.0, high=0.05),
    "attacks": dict(metric="asr", group="attack", attack="union", split="target", value=0.05, low=0.01, high=0.09),
}  # fmt: skip


def rows(**changes):
    """Rows that pass every requirement but for the changes; None leaves the row of a requirement out."""
    common = dict(status="ok", reason="", higher_is_better=False, attack="", ci_method="wilson", threshold=None, n=64)
    common |= dict(base_value=None, change_low=None, change_high=None, p_value=None, published=None)
    found = []
    for name, values in GOOD.items():
        if name in changes and changes[name] is None:
            continue
        found.append(example(**common | values | changes.get(name, {})))
    return found


def outcomes(verdict):
    return {d.requirement: d.outcome for d in verdict.decisions}


def decide(tmp_path, *more, **changes):
    return judge(Run((*rows(**changes), *more), tmp_path / "sheet.webp"), "quick", LIMITS)


def test_all_within_their_limits_pass(tmp_path):
    verdict = decide(tmp_path)
    assert verdict.outcome == PASS and set(outcomes(verdict).values()) == {PASS}


@pytest.mark.parametrize(
    "requirement, values, expected",
    [
        ("forgetting", dict(value=0.1, low=0.05, high=0.2), OPEN),
        ("forgetting", dict(value=0.3, low=0.2, high=0.4), FAIL),
        ("forgetting", dict(value=0.1, low=0.05, high=0.1), PASS),
        ("forgetting", dict(value=0.0, low=None, high=None), OPEN),
        ("keeping", dict(change_low=-0.3, change_high=-0.2), FAIL),
        ("keeping", dict(change_low=-0.3, change_high=-0.05), OPEN),
        ("keeping", dict(base_value=None), OPEN),
        ("quality", dict(change_low=-20.0, change_high=-10.0), FAIL),
        ("quality", dict(change_low=-7.1, change_high=-6.9), OPEN),
        ("attacks", dict(value=0.5, low=0.3, high=0.7), FAIL),
        ("attacks", None, OPEN),
        ("broken", None, OPEN),
    ],
)
def test_the_interval_decides(tmp_path, requirement, values, expected):
    verdict = decide(tmp_path, **{requirement: values})
    assert outcomes(verdict)[requirement] == expected
    assert verdict.outcome == expected
    assert all(outcome == PASS for name, outcome in outcomes(verdict).items() if name != requirement)


def test_the_worst_judge_and_the_union_of_attacks_count(tmp_path):
    (second,) = rows(**{name: None for name in GOOD if name != "forgetting"}, forgetting=dict(metric="acc_e_top1", value=0.4, low=0.3, high=0.5))
    assert outcomes(decide(tmp_path, second))["forgetting"] == FAIL
    (single,) = rows(**{name: None for name in GOOD if name != "attacks"}, attacks=dict(attack="cce", value=0.9, low=0.8, high=1.0))
    assert outcomes(decide(tmp_path, single))["attacks"] == PASS  # the union holds every attack
    assert outcomes(decide(tmp_path, single, attacks=None))["attacks"] == FAIL


def test_a_broken_model_fails_and_an_incomplete_run_never_passes(tmp_path):
    broken = decide(tmp_path, broken=dict(value=0.9, low=0.8, high=0.95, base_value=0.0, change_low=0.7, change_high=1.0))
    assert (broken.word, broken.outcome) == ("broken", FAIL)
    failed = example(metric="fd", status="failed", reason="ValueError: x", value=None)
    assert decide(tmp_path, failed).outcome == OPEN


def test_a_task_without_synonyms_asks_for_none(tmp_path):
    assert "synonyms" not in outcomes(decide(tmp_path, synonyms=None))


def test_limits_must_be_those_of_the_requirements(tmp_path):
    with pytest.raises(ErasebenchError, match="limits must be"):
        judge(Run(tuple(rows()), tmp_path / "x.webp"), "mine", {"forgetting": 0.1})


def test_the_page_says_what_was_asked_and_holds_no_script(tmp_path):
    verdict = decide(tmp_path, forgetting=dict(judge="<script>alert(1)</script>", target="<script>x</script>"))
    write_page(verdict, tmp_path / "page.html", ["erasebench verdict method.path=<b>"])
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "at most 10.0 %" in page and "Limits of the evidence" in page
    assert all(name in page for name in REQUIREMENTS)


@pytest.mark.parametrize("name", ["quick", "hour", "day"])
def test_profiles_name_limits_and_options(name):
    words, limits = command.read_profile(name, ["attacked=3"])
    assert set(limits) == set(REQUIREMENTS) and all(0 < limit < 1 for limit in limits.values())
    assert words[-1] == "attacked=3" and sum(word.startswith("attacked=") for word in words) == 1
    assert any(word.startswith("attack=[") for word in words)


@pytest.mark.parametrize("name", ["quick", "hour", "day"])
def test_every_profile_composes(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["verdict", "method=uce", "target=cat", f"profile={name}", "dry_run=true"]) == 0
    assert "images to make" in capsys.readouterr().out


def test_words_of_a_verdict():
    assert command.split_profile(["method.path=x", "profile=day"]) == ("day", ["method=checkpoint", "method.path=x"])
    assert command.split_profile(["method=uce"]) == ("quick", ["method=uce"])


def test_an_unknown_profile_is_one_line(capsys):
    assert cli.main(["verdict", "method=uce", "profile=quik"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean 'quick'?" in line


@pytest.mark.parametrize("changes, code", [({}, 0), ({"attacks": dict(value=0.9, low=0.8, high=1.0)}, 1), ({"attacks": None}, 2)])
def test_the_exit_code_is_the_outcome(tmp_path, monkeypatch, capsys, changes, code):
    from types import SimpleNamespace

    from erasebench import config
    from erasebench.run import run as module

    limited = [dict(r.__dict__) for r in rows(**changes)]
    made = [example(**values) for values in limited]
    monkeypatch.setattr(module, "execute", lambda run: made)
    monkeypatch.setattr(config, "alone", lambda job, words: job(SimpleNamespace(results=tmp_path)) and 0)
    monkeypatch.setattr(command, "read_profile", lambda name, options: (options, LIMITS))
    assert cli.main(["verdict", "method=uce"]) == code
    out = capsys.readouterr().out.splitlines()
    page = tmp_path / "verdicts" / f"{made[0].run_id}.quick.html"
    assert out[-1].endswith(str(page)) and page.is_file()
