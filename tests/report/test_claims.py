"""What papers claim, against rows made up: it holds, it does not, or the interval cannot say."""

import json
from dataclasses import replace

import pytest
from test_leaderboard import row, save

from erasebench.report import claims, leaderboard, render


def rate(metric, value, half=0.05, group="forget", better=False, **more):
    return replace(row("acc_e", value, half), metric=metric, group=group, higher_is_better=better, **more)


def kept(value, half=0.05):
    return rate("shown_retain", value, half, "keep", True, split="retain")


def found(folder, monkeypatch, *given):
    monkeypatch.setattr(claims, "listed", lambda: list(given))
    groups, problems = leaderboard.load(folder)
    assert not problems
    return [(one.where, one.measured, one.verdict) for one in claims.findings(groups, [])]


@pytest.mark.parametrize(
    "value,half,verdict", [(0.1, 0.04, "holds"), (0.12, 0.05, "undecided"), (0.3, 0.05, "does not hold")]
)
def test_a_bound_needs_the_whole_interval(tmp_path, monkeypatch, value, half, verdict):
    save(tmp_path, "ap", rate("shown_target", value, half), method="ap")
    claim = {"says": "{method} forgets", "paper": "p", "method": ["ap", "gie"], "column": ["acc_e", "shown_target"]}
    (one,) = found(tmp_path, monkeypatch, claim | {"at_most": 0.15})
    assert one == ("object: airplane", f"shown_target {value:.3f} [{value - half:.3f}, {value + half:.3f}]", verdict)


def test_fewer_than_each_of_the_others(tmp_path, monkeypatch):
    under = lambda value: rate("asr", value, 0.05, "attack", attack="cce", split="attack:cce")
    save(tmp_path, "dm", under(0.2), method="dark_miner")
    save(tmp_path, "esd", under(0.5), method="esd")
    claim = {"says": "s", "paper": "p", "method": "dark_miner", "column": "asr cce", "fewer_than": ["uce", "esd"]}
    assert found(tmp_path, monkeypatch, claim) == []  # of one of them there is nothing
    for value, verdict in ((0.4, "holds"), (0.25, "undecided"), (0.05, "does not hold")):
        save(tmp_path, "uce", under(value), method="uce")
        ((_, measured, said),) = found(tmp_path, monkeypatch, claim)
        assert said == verdict and measured.startswith("asr cce 0.200 [0.150, 0.250]; uce ")


def test_above_what_fixed_values_reach_at_the_same_forgetting(tmp_path, monkeypatch):
    for scale, forgets, keeps in ((-1, 0.8, 0.9), (-9, 0.2, 0.3)):
        params = json.dumps({"scale": scale})
        save(tmp_path, f"s{-scale}", rate("shown_target", forgets), kept(keeps), method="gie", params=params)
    claim = {"says": "s", "paper": "p", "method": "gie", "column": "shown_retain", "forgets": "shown_target"}
    claim |= {"above_fixed": "scale"}
    for forgets, keeps, verdict in ((0.5, 0.7, "holds"), (0.5, 0.62, "undecided"), (0.5, 0.5, "does not hold")):
        params = json.dumps({"scale": None})
        save(tmp_path, "a", rate("shown_target", forgets), kept(keeps), method="gie", params=params)
        ((_, measured, said),) = found(tmp_path, monkeypatch, claim)
        assert said == verdict and measured.endswith("fixed 0.600")  # halfway between the two
    save(tmp_path, "a", rate("shown_target", 0.1), kept(0.9), method="gie", params='{"scale": null}')
    assert found(tmp_path, monkeypatch, claim) == []  # no fixed value forgets as much


def test_runs_of_other_values_say_nothing(tmp_path, monkeypatch):
    save(tmp_path, "ap", rate("shown_target", 0.5), method="ap", params='{"search": "random"}')
    claim = {"says": "s", "paper": "p", "method": "ap", "column": "shown_target", "at_most": 0.15}
    assert found(tmp_path, monkeypatch, claim) == []


def test_each_listed_claim_says_how_it_is_decided_and_is_shown(tmp_path):
    for claim in claims.listed():
        assert {"says", "paper", "column"} <= claim.keys() and ("sides" in claim) != ("method" in claim)
        decided = {"sides", "at_most", "at_least", "fewer_than", "above_fixed"} & claim.keys()
        assert len(decided) == 1, claim["says"]
    save(tmp_path, "kpop", rate("rsr", 0.99, 0.005, "keep", True), method="kpop", target="<b>")
    groups, _ = leaderboard.load(tmp_path)
    for shown in (render.as_md(groups, []), render.as_html(groups, [])):
        assert b"KPOP" in shown and b"rsr 0.990" in shown and b"object: <b>" not in shown


def test_no_claim_holds_for_a_broken_run(tmp_path, monkeypatch):
    claim = {"says": "s", "paper": "p", "method": "ap", "column": "shown_target", "at_most": 0.15}
    save(tmp_path, "ap", rate("shown_target", 0.05, 0.01), method="ap")
    assert [verdict for *_, verdict in found(tmp_path, monkeypatch, claim)] == ["holds"]
    black = rate("broken_target", 1.0, 0.0, "quality", base_value=0.0, change_low=0.9)
    save(tmp_path, "ap", rate("shown_target", 0.05, 0.01), black, method="ap")
    assert found(tmp_path, monkeypatch, claim) == []
