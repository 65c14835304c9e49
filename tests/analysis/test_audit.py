"""Audits: agreement of two judges, ranks by threshold, and the embedded world's judges against what was drawn."""

import numpy as np
import pytest

from erasebench.analysis import audit


def test_kappa_by_hand():
    a, b = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool), np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 0], bool)
    assert audit.kappa(a, b) == pytest.approx((0.8 - 0.58) / 0.42)  # they agree on 8; chance: 0.3 * 0.3 + 0.7 * 0.7
    assert audit.kappa(a, a) == 1 and audit.kappa(a, ~a) < 0
    assert np.isnan(audit.kappa(np.ones(4, bool), np.ones(4, bool)))


def test_sensitivity_and_specificity_are_of_their_own_cases():
    true = np.array([True] * 4 + [False] * 6)
    said = np.array([True, True, True, False] + [True] + [False] * 5)
    line = audit.Against("judge", "a cat", said, true).line()
    assert line[:2] == ["judge", "a cat"]
    assert line[2].startswith("0.750 [") and line[2].endswith("n=4")
    assert line[3].startswith("0.833 [") and line[3].endswith("n=6")
    assert audit.Against("judge", "a cat", said, np.zeros(10, bool)).line()[2] == "no case"


def test_places_move_with_the_threshold():
    one = audit.Opinions("one", np.array([0.55, 0.55, 0.1, 0.1]), np.zeros(4, bool), None)
    other = audit.Opinions("other", np.array([0.85, 0.1, 0.1, 0.1]), np.zeros(4, bool), None)
    places = dict(audit.places([one, other]))
    assert places["0.5"] == "other 0.250 < one 0.500" and places["0.8"] == "one 0.000 < other 0.250"


def test_the_world_s_judges_are_held_against_its_drawings(capsys, monkeypatch):
    assert audit.main([]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0] for line in out.splitlines()[1:]}
    assert {"drawn", "hazards", "identity", "artists", "clip"} <= lines
    found = {a.question: a for a in audit.drawn_truth()}
    for question in ("a face", "each background, where one is named", "whose hand, among ten artists' and none"):
        assert audit.kappa(found[question].said, found[question].true) > 0.9


def test_a_plain_picture_shows_the_hand_of_the_artist_who_draws_plainly():
    from erasebench.mini import world

    artists, drawn = world.concepts()["artists"], {"artist": "", "hand": -1}
    assert audit.whose(drawn, artists) == len(artists)
    assert audit.whose({**drawn, "artist": artists[7]}, artists) == 7
    plain = {audit.whose({**drawn, "hand": hand}, artists) for hand in range(5)}
    assert plain == {0, 6, 2, 8, 4}  # hands 0, 2, 4: the first five draw plainly; 1, 3: the others do
