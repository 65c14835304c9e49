"""Inspection finds what was changed though nobody asked, and works on somebody else's checkpoint."""

import pytest
import torch
from conftest import build_pipeline
from erasebench.methods.checkpoint import Checkpoint
from safetensors.torch import load_file, save_file
from test_ap import WORDS, planted

from erasebench import inspect
from erasebench.contracts import Brief, ErasebenchError


def test_inspection_finds_the_word_that_moved_most(tiny):
    with tiny.changed(weights=planted(tiny, "snow")):
        found = inspect.moved(tiny, WORDS, last=2, draws=8)
    assert next(iter(found)) == "snow" and len(found) == 2 and list(found.values()) == sorted(found.values())[::-1]


def test_the_change_of_a_word_by_hand(tiny):
    z, t = tiny.noise([0, 1]), torch.tensor([100, 800])
    base = {word: tiny.eps(z, t, tiny.encode([word]).repeat(2)) for word in ("sun", "sea", "")}
    with tiny.changed(weights=planted(tiny, "snow")), torch.no_grad():
        got = inspect.change(tiny, ["sun", "sea"], z, t, base[""])
        for word, (far, said) in zip(("sun", "sea"), got.T.tolist(), strict=True):
            now = tiny.eps(z, t, tiny.encode([word]).repeat(2))
            assert far == pytest.approx(float((now - base[word]).square().mean()), rel=1e-3)
            assert said == pytest.approx(float((base[word] - base[""]).square().mean()), rel=1e-3)


def test_a_word_that_says_nothing_does_not_come_first(tiny, monkeypatch):
    energies = {"the": (0.1, 0.0), "sun": (0.5, 1.0), "sea": (0.2, 2.0)}
    monkeypatch.setattr(inspect, "change", lambda model, texts, *_: torch.tensor([energies[w] for w in texts]).T)
    assert inspect.moved(tiny, list(energies), last=3) == pytest.approx({"sun": 0.5, "sea": 0.2, "the": 0.1})


def test_a_checkpoint_of_somebody_else_stands_in_for_the_base(tiny, tiny_folder, tmp_path):
    other = build_pipeline(tmp_path / "other")  # the same weights: its seed is the fixture's
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = next(n for n in tensors if n.endswith("attn2.to_v.weight"))
    save_file({**tensors, name: tensors[name] + 1}, weights)
    (tmp_path / "out").mkdir()
    eraser = Checkpoint(str(other))
    assert eraser.content != Checkpoint(str(tiny_folder)).content
    eraser.fit(tiny, Brief(()), tmp_path / "out", 0)
    assert set(load_file(tmp_path / "out" / "weights.safetensors")) == {f"unet.{name}"}
    before = tiny.weight(f"unet.{name}")
    with eraser.apply(tiny, tmp_path / "out"):
        torch.testing.assert_close(tiny.weight(f"unet.{name}"), before + 1)


def test_a_checkpoint_of_another_architecture_is_refused(tiny, tmp_path):
    build_pipeline(tmp_path / "xl", xl=True)
    with pytest.raises(ErasebenchError, match="architecture|pipeline|load"):
        Checkpoint(str(tmp_path / "xl")).fit(tiny, Brief(()), tmp_path, 0)
