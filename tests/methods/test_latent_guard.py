"""Latent Guard's head and loss by hand, its pairs, and a threshold that keeps its word."""

import json
from dataclasses import replace

import pytest
import torch
from erasebench.methods import latent_guard
from erasebench.methods.latent_guard import Head, Latent, LatentGuard, calibrated, contrast, ends, named_by, read

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, ErasebenchError, Sampler
from erasebench.toolbox import vocabulary

CAPTIONS = tuple(f"the {a} {b}" for a in ("red", "old", "wet") for b in ("mat", "sea", "sun", "car", "bus"))
BRIEF = Brief((Concept("cat", "object", "sky", ("kitty",)),), ("dog",), (*CAPTIONS, "a cat"), ("a {c}", "{c} now"))
SMALL = dict(
    concepts=12, vocabulary="captions", epochs=60, heads=2, width=8, size=16, batch=6, lr=1e-2, false_positives=0.2
)


def test_scores_by_hand():
    draw = torch.Generator().manual_seed(0)
    head = Head(6, 2, 3, 4, 10.0)
    prompts, concepts = torch.randn(2, 5, 6, generator=draw), torch.randn(3, 6, generator=draw)
    got = head(prompts, concepts)
    for b in range(2):
        for c in range(3):
            q, k, v = head.query(concepts[c]), head.key(prompts[b]), head.value(prompts[b])
            held = []
            for part in (slice(0, 3), slice(3, 6)):
                weights = (k[:, part] @ q[part] / 3**0.5).softmax(0)
                held.append(weights @ v[:, part])
            a, b_ = head.prompt(torch.cat(held)), head.concept(concepts[c])
            torch.testing.assert_close(got[b, c], 10 * (a @ b_) / (a.norm() * b_.norm()), rtol=1e-4, atol=1e-5)


def test_the_loss_by_hand():
    """Each safe prompt counts for itself, for prompts as for concepts."""
    held, other = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.5, -1.0], [0.0, 1.5]])
    e = torch.exp
    of_concepts = [e(held[i, i]) / (e(held[:, i]).sum() + e(other[:, i]).sum()) for i in range(2)]
    of_prompts = [e(held[i, i]) / (e(held[i]).sum() + e(other[i]).sum()) for i in range(2)]
    by_hand = -sum(map(torch.log, of_concepts + of_prompts)) / 4
    torch.testing.assert_close(contrast(held, other), by_hand)


def test_pairs_hold_the_concept_or_something_else_in_its_place(tiny):
    guard, draw = LatentGuard(**{**SMALL, "concepts": 6}), torch.Generator().manual_seed(0)
    concepts = guard.training_concepts(tiny, BRIEF, draw)
    assert concepts[:2] == ["cat", "dog"] and len(concepts) == 6 and "kitty" not in concepts
    pairs = guard.training_pairs(BRIEF, concepts, draw)
    assert [len(own) for own in pairs] == [4] * 6
    assert {safe for _, safe in pairs[0]} <= {"a sky", "sky now"}
    for name, own in zip(concepts[1:], pairs[1:], strict=True):
        for held, safe in own:
            template = next(t for t in BRIEF.templates if held == t.replace("{c}", name))
            assert safe in [template.replace("{c}", other) for other in concepts if other != name]


def test_a_word_within_a_word_names_nothing():
    assert named_by(["cat", "gas pump"], ["a cat", "a catalogue", "a gas pump"]).tolist() == [
        [True, False],
        [False, False],
        [False, True],
    ]


@pytest.mark.parametrize("rate, allowed", [(0.0, 0), (0.1, 1), (0.25, 2), (0.99, 9)])
def test_the_threshold_refuses_no_more_than_its_share(rate, allowed):
    scores = torch.tensor([3.0, 1.0, 2.0, 9.0, 5.0, 4.0, 8.0, 7.0, 6.0, 0.0])
    assert int((scores >= calibrated(scores, rate)).sum()) == allowed
    assert int((torch.ones(10) >= calibrated(torch.ones(10), rate)).sum()) == 0  # ties are refused together, or not


@pytest.mark.parametrize("named", [False, True])
def test_what_names_a_concept_by_chance_is_no_negative_of_it(tiny, tmp_path, monkeypatch, named):
    seen, plain = [], latent_guard.contrast
    monkeypatch.setattr(latent_guard, "named_by", lambda names, texts: torch.full((len(texts), len(names)), named))
    monkeypatch.setattr(latent_guard, "contrast", lambda *both: seen.append(both) or plain(*both))
    LatentGuard(**SMALL | {"epochs": 1}).fit(tiny, BRIEF, tmp_path, 0)
    for held, other in seen:
        assert held.diagonal().isfinite().all()
        assert int(held.isinf().sum()) == named * (held.numel() - len(held)) and other.isinf().all() == named
    assert len(seen) == 2


def test_it_refuses_what_names_the_concept_and_calibrates_on_what_does_not(tiny, tmp_path):
    guard = LatentGuard(**SMALL)
    guard.fit(tiny, BRIEF, tmp_path, 0)
    assert {f.name for f in tmp_path.iterdir()} == {"head.safetensors", "guard.json", "notes.json"}
    notes = json.loads((tmp_path / "notes.json").read_text())
    assert notes["captions"] == len(vocabulary.ordinary(BRIEF)) == len(CAPTIONS) and notes["refused_captions"] <= 0.2
    with guard.apply(tiny, tmp_path):
        scores = tiny.guard(tiny, tiny.encode(CAPTIONS))
        assert float((scores >= tiny.guard.threshold).float().mean()) == pytest.approx(notes["refused_captions"])
        made = tiny.sample(["a cat", "cat now", "the red mat"], [0, 1, 2], Sampler("ddim", 2, 2.0))
        assert made.refused.tolist()[:2] == [True, True] and made.images[0].sum() == 0
        with tiny.teacher():
            assert tiny.guard is None
    assert tiny.guard is None


def test_the_surest_concept_decides_and_attacks_see_a_slope(tiny):
    head, context = Head(16, 2, 4, 8, 10.0).requires_grad_(False), tiny.encode(["a cat", "the sea"])
    concepts = ends(tiny.encode(["cat", "dog"]))
    hidden = context.hidden.detach().requires_grad_(True)
    score = Latent(head, concepts, 0.0)(tiny, context._replace(hidden=hidden))
    torch.testing.assert_close(score, head(read(context), concepts).max(1).values)
    score.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert torch.equal(read(context)[1, 0], context.hidden[1, context.ends[1]])


def test_what_it_cannot_do_it_says(tiny, tmp_path):
    with pytest.raises(ErasebenchError, match="ordinary captions"):
        LatentGuard(**{**SMALL, "vocabulary": ("sun",)}).fit(tiny, replace(BRIEF, captions=("a cat",)), tmp_path, 0)
    with pytest.raises(ErasebenchError, match="a share"):
        LatentGuard(false_positives=1.0)


def test_it_conforms(tiny):
    assert [line for line in check(LatentGuard(**SMALL), tiny, BRIEF, ["a cat", "cat now", "cat"]) if line[1]] == []
