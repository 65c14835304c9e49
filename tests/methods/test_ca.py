"""Concept Ablation's losses, its augmentation and its anchors by hand; BOS learns nothing."""

from dataclasses import replace

import pytest
import torch
from erasebench.methods.ca import CA, GROUPS, LARGE, SMALL, Seen, start_held, within
from safetensors.torch import load_file

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, ErasebenchError, Sampler
from erasebench.tasks import seed_of
from erasebench.toolbox.attention import layers

BRIEF = Brief(
    (Concept("cat", "object", "sky"), Concept("dog", "object", "sea"), Concept("tom", "object", "sky")),
    templates=("a {c}", "one {c} here"),
)
TINY = dict(steps=1, batch=3, lr=1e-3, images=3, image_steps=2)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_bos_gets_no_gradient_and_nothing_else_changes(tiny):
    """A direction that BOS alone has is not learnt by the projections; with the plain processor it is."""
    name = layers(tiny)[0]
    attn = tiny.unet.get_submodule(name.removesuffix(".processor"))
    x = torch.randn(2, 9, attn.to_q.in_features, generator=draws())
    context = torch.randn(2, 5, 16, generator=draws(1))
    context[:, :, 0] = 0
    context[:, 0, 0] = 3.0
    for processor, learnt in ((attn.processor, True), (start_held, False)):
        with tiny.training([n for n in tiny.names(r"attn2\.to_[kv]\.") if n[5:].startswith(name[:-10])]) as weights:
            out = processor(attn, x, context)
            out.square().sum().backward()
            for weight in weights.values():
                assert bool(weight.grad[:, 0].abs().max() > 1e-6) == learnt
                assert weight.grad[:, 1:].abs().max() > 1e-6
    torch.testing.assert_close(out, attn.processor(attn, x, context), rtol=1e-4, atol=1e-5)


def test_the_error_counts_where_the_picture_is():
    error = torch.zeros(2, 2, 2, 2)
    error[0, :, 0, 0] = 3.0
    error[0, :, 1, 1] = 100.0  # not in the picture
    error[1] = 1.0
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, 0, 0] = 1
    mask[1] = 1
    assert float(within(error, mask)) == pytest.approx(((9 + 9 + 0 + 0) / 4 + 1) / 2)


@pytest.mark.parametrize("prior", [0.0, 0.3])
@pytest.mark.parametrize("variant", ["model", "noise"])
def test_both_losses_by_hand(tiny, variant, prior):
    """The target is the student's own answer, whose gradient is stopped; the base's is another."""
    ca = CA(variant=variant, prior_scale=prior)
    z, t, noise = tiny.noise([0, 1]), torch.tensor([300, 700]), tiny.noise([2, 3])
    anchor, concept = tiny.encode(["a sky", "a sea"]), tiny.encode(["a cat", "a dog"])
    seen = Seen(z, t, noise, anchor, concept, torch.ones(2, 1, *z.shape[2:]))
    names = tiny.names(GROUPS["cross-attn"])
    with tiny.changed(weights={n: 1.3 * tiny.weight(n) for n in names}), tiny.training(names) as weights:
        loss = ca.loss(tiny, seen)
        (got,) = torch.autograd.grad(loss, weights[names[0]])
        with torch.no_grad():
            answer = tiny.eps(z, t, anchor)
        with tiny.teacher():
            base = tiny.eps(z, t, anchor)
        assert not torch.allclose(answer, base, atol=1e-4)
        error = (tiny.eps(z, t, concept) - (answer if variant == "model" else noise)).square().mean()
        by_hand = error + prior * (tiny.eps(z, t, anchor) - noise).square().mean()
        torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-6)
        (expected,) = torch.autograd.grad(by_hand, weights[names[0]])
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", ["model", "noise"])
def test_one_step_by_hand(tiny, tmp_path, variant):
    """AdamW's first step, whose direction a clipped norm does not change."""
    ca = CA(**TINY, variant=variant)
    ca.fit(tiny, BRIEF, tmp_path, seed=4)
    trained = load_file(tmp_path / "weights.safetensors")
    pictures = ca.pictures(tiny, BRIEF.concepts, BRIEF.templates, 4)
    seen = ca.seen(tiny, BRIEF.concepts, BRIEF.templates, pictures, draws(4))
    processors = dict.fromkeys(layers(tiny), start_held)
    with tiny.changed(processors=processors), tiny.training(tiny.names(r"attn2\.to_[kv]\.")) as weights:
        ca.loss(tiny, seen).backward()
        assert set(trained) == set(weights)
        for name, p in weights.items():
            moved = p.grad.abs() > 1e-5
            expected = p.data * (1 - 1e-3 * 0.01) - 1e-3 * p.grad.sign()
            torch.testing.assert_close(trained[name][moved], expected[moved], atol=2e-5, rtol=1e-4)


def test_the_anchors_pictures_are_drawn_once_and_shared(tiny):
    ca = CA(**TINY)
    pictures = ca.pictures(tiny, BRIEF.concepts, BRIEF.templates, 4)
    assert list(pictures) == ["sky", "sea"]
    texts = ["a sky", "one sky here", "a sky"]
    seeds = [seed_of("ca image", 4, "sky", i) for i in range(3)]
    drawn = tiny.sample(texts, seeds, Sampler("dpmsolver", 2, 6.0)).images
    assert torch.equal(pictures["sky"], drawn)
    other = replace(ca, away=True).pictures(tiny, BRIEF.concepts, BRIEF.templates, 4)
    assert not torch.equal(other["sky"], drawn) and not tiny.is_changed


def test_concept_and_anchor_are_said_alike_of_what_is_seen(tiny, monkeypatch):
    """Every pair of prompts differs in the name alone, and the picture is that of the template."""
    ca, said = CA(**{**TINY, "batch": 40}), []
    encode = tiny.encode
    monkeypatch.setattr(tiny, "encode", lambda texts: said.append(texts) or encode(texts))
    pictures = {a: torch.full((3, 16, 16, 3), 9, dtype=torch.uint8) for a in ("sky", "sea")}
    seen = ca.seen(tiny, BRIEF.concepts, BRIEF.templates, pictures, draws())
    anchors, named = said
    assert seen.z.shape == (40, 4, 4, 4) and seen.mask.shape == (40, 1, 4, 4)
    surrogates = {c.name: c.surrogate for c in BRIEF.concepts}
    for anchor, name in zip(anchors, named, strict=True):
        (concept,) = (c for c in surrogates if c in name.split())
        assert name.replace(concept, surrogates[concept]) == anchor
    assert {"cat", "dog", "tom"} <= {word for text in named for word in text.split()}
    assert any(text.startswith(word) for text in named for word in SMALL)
    assert any(text.startswith(word) for text in named for word in LARGE)


def test_views_of_a_picture(tiny):
    """White pictures of 16 pixels, of which a place of the latent is four by four."""
    ca, generator = CA(), draws()
    white = torch.full((16, 16, 3), 255, dtype=torch.uint8)
    small = 0
    for _ in range(300):
        picture, mask, said = ca.view(tiny, white, generator)
        shown = (picture == 255).all(2)
        assert picture.shape == white.shape and bool((shown | (picture == 128).all(2)).all())
        rows, columns = shown.any(1).nonzero().flatten(), shown.any(0).nonzero().flatten()
        size = len(rows)
        assert size == len(columns) >= 7 and int(shown.sum()) == size**2
        cells = shown.view(4, 4, 4, 4).all(3).all(1)
        assert torch.equal(mask[0].bool(), cells) and mask.sum() > 0
        small += size < 16
        if size < 16:
            assert bool(said) == (size < 0.6 * 16) and set(said) <= set(SMALL)
        else:
            assert set(said) <= set(LARGE)  # as large as the frame, or larger
    assert 150 < small < 225  # nine in ten of two in three


def test_a_larger_picture_is_cut_and_a_mirrored_one_turned(tiny):
    """A ramp from left to right: cut, it spans less; mirrored, it falls."""
    ramp = torch.arange(16, dtype=torch.uint8).mul(10)[None, :, None].expand(16, 16, 3)
    plain = [replace(CA(), augment=False).view(tiny, ramp, draws(i)) for i in range(20)]
    assert all(v.said == () and v.mask.all() for v in plain)
    assert {bool(torch.equal(v.picture, ramp)) for v in plain} == {True, False}
    assert all(torch.equal(v.picture, ramp) or torch.equal(v.picture, ramp.flip(1)) for v in plain)
    views = [CA().view(tiny, ramp, draws(i)) for i in range(60)]
    large = [v.picture.float() for v in views if set(v.said) & set(LARGE)]
    assert large and all(v.max() - v.min() < 135 and (v[0] == v[-1]).all() for v in large)


def test_prompts_of_ones_own(tmp_path):
    (tmp_path / "prompts.txt").write_text("a {c} on a hill\n\ntwo {c}\n")
    assert CA(templates=str(tmp_path / "prompts.txt")).templates == ("a {c} on a hill", "two {c}")
    with pytest.raises(ErasebenchError, match="method.templates"):
        CA(templates="nowhere.txt")


@pytest.mark.parametrize("trained, some, none", [("attn", "attn1", "ff"), ("full-weight", "conv_in", "text_encoder")])
def test_groups(tiny, trained, some, none):
    names = tiny.names(GROUPS[trained])
    assert any(some in n for n in names) and any("attn2.to_q" in n for n in names)
    assert not any(none in n for n in names)


@pytest.mark.parametrize(
    "values", [{}, {"variant": "noise", "prior_scale": 1.0}, {"trained": "full-weight", "augment": False, "away": True}]
)
def test_it_conforms(tiny, values):
    ca = CA(**{**TINY, "steps": 3, "lr": 1e-2, **values})
    assert [line for line in check(ca, tiny, BRIEF, ["a cat", "one cat", "tom"]) if line[1]] == []
