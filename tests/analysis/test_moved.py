"""Inspection finds what was changed though nobody asked, and works on somebody else's checkpoint."""

import pytest
import torch
from test_ap import WORDS, planted

from erasebench.analysis import moved


def test_inspection_finds_the_word_that_moved_most(tiny):
    with tiny.changed(weights=planted(tiny, "snow")):
        found = moved.moved(tiny, WORDS, last=2, draws=8)
    assert next(iter(found)) == "snow" and len(found) == 2 and list(found.values()) == sorted(found.values())[::-1]


def test_the_change_of_a_word_by_hand(tiny):
    z, t = tiny.noise([0, 1]), torch.tensor([100, 800])
    base = {word: tiny.eps(z, t, tiny.encode([word]).repeat(2)) for word in ("sun", "sea", "")}
    with tiny.changed(weights=planted(tiny, "snow")), torch.no_grad():
        got = moved.change(tiny, ["sun", "sea"], z, t, base[""])
        for word, (far, said) in zip(("sun", "sea"), got.T.tolist(), strict=True):
            now = tiny.eps(z, t, tiny.encode([word]).repeat(2))
            assert far == pytest.approx(float((now - base[word]).square().mean()), rel=1e-3)
            assert said == pytest.approx(float((base[word] - base[""]).square().mean()), rel=1e-3)


def test_a_word_that_says_nothing_does_not_come_first(tiny, monkeypatch):
    energies = {"the": (0.1, 0.0), "sun": (0.5, 1.0), "sea": (0.2, 2.0)}
    monkeypatch.setattr(moved, "change", lambda model, texts, *_: torch.tensor([energies[w] for w in texts]).T)
    assert moved.moved(tiny, list(energies), last=3) == pytest.approx({"sun": 0.5, "sea": 0.2, "the": 0.1})
