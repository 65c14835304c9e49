"""SalUn's mask and its step by hand; the order of the pictures, as mended and as released."""

from itertools import islice

import pytest
import torch
from erasebench.methods import salun
from erasebench.methods.salun import SalUn, saliency, unlearning
from safetensors.torch import load_file

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, Sampler
from erasebench.toolbox.training import Pictures, denoising, drawn, noised, shuffled

BRIEF = Brief((Concept("cat", "object", "sky"),), ("dog", "cow"), (), ("a {c}", "{c} here"))
EXPLICIT = Brief((Concept("hazard", "explicit", "sky"),), ("dog", "cow"), (), ("a {c}", "{c} here"))
SMALL = dict(pictures=4, kept=4, epochs=1, batch=4, lr=1e-3, ddim_steps=3)


def test_the_mask_holds_the_largest_of_all_weights_together():
    gradient = {"a": torch.tensor([[-5.0, 0.1], [2.0, 0.0]]), "b": torch.tensor([3.0, -0.2])}
    assert {n: m.tolist() for n, m in saliency(gradient, 0.5).items()} == {
        "a": [[True, False], [True, False]],
        "b": [True, False],
    }
    assert sum(int(m.sum()) for m in saliency(gradient, 1.0).values()) == 6
    assert sum(int(m.sum()) for m in saliency(gradient, 0.01).values()) == 1


def test_gradients_add_up_before_their_absolute_value(tiny):
    cut = SalUn(**SMALL | {"batch": 3, "mask_guidance": 3.0})
    pictures = Pictures(tiny.noise(range(4)), tiny.encode(["a cat", "cat here", "a cat", "cat"]))
    got, draw = cut.gradient(tiny, pictures, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(1)
    total = dict.fromkeys(got, 0.0)
    for part in (torch.arange(3), torch.tensor([3])):
        z, t, noise = noised(tiny, pictures.z[part], draw)
        with tiny.training(tiny.names(r"^unet\.")) as weights:
            text, free = tiny.eps(z, t, pictures.context.select(part)), tiny.eps(z, t, tiny.encode([""] * len(part)))
            (3 * text - 2 * free - noise).square().mean().backward()
            total = {name: total[name] + w.grad for name, w in weights.items()}
    for name, expected in total.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)
    assert not tiny.is_changed


def test_the_concept_is_answered_as_the_other_at_the_same_latents(tiny):
    """And the answer counts as given: the gradient is that of the first prediction alone."""
    pictures, other = (
        Pictures(tiny.noise([0, 1]), tiny.encode(["a cat", "cat here"])),
        tiny.encode(["a sky", "sky here"]),
    )
    z, t, _ = noised(tiny, pictures.z, torch.Generator().manual_seed(2))
    target = tiny.eps(z, t, other).detach()
    name = tiny.names(r"attn2\.to_v\.weight$")[0]
    with tiny.training([name]) as weights:
        loss = unlearning(tiny, pictures, other, torch.Generator().manual_seed(2)).whole()
        (got,) = torch.autograd.grad(loss, weights[name])
        expected = (tiny.eps(z, t, pictures.context) - target).square().mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(got, torch.autograd.grad(expected, weights[name])[0])


def test_one_step_by_hand(tiny, tmp_path):
    """Adam's first step is lr * sign, and only where the mask is."""
    cut = SalUn(**SMALL, keep_scale=0.3, salient=0.25)
    cut.fit(tiny, BRIEF, tmp_path, seed=5)
    trained, draw, sampler = (
        load_file(tmp_path / "weights.safetensors"),
        torch.Generator().manual_seed(5),
        Sampler("ddim", 3),
    )
    forget = drawn(tiny, ["a cat", "cat here"] * 2, draw, sampler)
    retain = drawn(tiny, salun.kept_prompts(BRIEF, 4, draw), draw, sampler)
    mask = saliency(cut.gradient(tiny, forget, draw), 0.25)
    which, kept = (next(shuffled(4, 4, draw)) for _ in range(2))
    with tiny.training(tiny.names(r"^unet\.")) as weights:
        other = tiny.encode(["a sky", "sky here"] * 2).select(which)
        loss = unlearning(tiny, forget.select(which), other, draw).whole()
        (loss + 0.3 * denoising(tiny, retain.select(kept), draw).whole()).backward()
        for name, parameter in weights.items():
            moved = mask[name] & (parameter.grad.abs() > 1e-5)
            expected = parameter.data - 1e-3 * parameter.grad.sign()
            torch.testing.assert_close(trained[name][moved], expected[moved], atol=2e-5, rtol=1e-4)
            assert torch.equal(trained[name][~mask[name]], parameter.data[~mask[name]])
        assert set(trained) == set(weights)
    total, most = sum(m.numel() for m in mask.values()), sum(int(m.sum()) for m in mask.values())
    assert most == pytest.approx(total / 4, rel=1e-3)


@pytest.mark.parametrize("brief, kept_too", [(BRIEF, False), (EXPLICIT, True)])
@pytest.mark.parametrize("variant", ["fixed", "released"])
def test_released_takes_the_same_first_pictures_in_every_step(tiny, tmp_path, monkeypatch, variant, brief, kept_too):
    first, second = [], []
    same = lambda seen: all(torch.equal(z, seen[0]) for z in seen)

    def unlearned(model, pictures, other, generator):
        first.append(pictures.z)
        return unlearning(model, pictures, other, generator)

    def kept(model, pictures, generator):
        second.append(pictures.z)
        return denoising(model, pictures, generator)

    monkeypatch.setattr(salun, "unlearning", unlearned)
    monkeypatch.setattr(salun, "denoising", kept)
    SalUn(**SMALL | {"batch": 2, "epochs": 2}, variant=variant).fit(tiny, brief, tmp_path, seed=0)
    assert len(first) == len(second) == 4
    assert same(first) == (variant == "released") and same(second) == (variant == "released" and kept_too)
    if variant == "fixed":
        assert len(torch.unique(torch.cat(first[:2]).flatten(1), dim=0)) == 4  # an epoch sees each once


def test_of_explicit_content_what_is_kept_is_its_surrogate(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        salun, "drawn", lambda model, texts, *how: asked.append(list(texts)) or drawn(model, texts, *how)
    )
    SalUn(**SMALL).fit(tiny, EXPLICIT, tmp_path, 0)
    assert asked == [["a hazard", "hazard here"] * 2, ["a sky", "sky here"] * 2]  # without captions


def test_batches_see_each_once_before_any_again():
    seen = torch.cat(list(islice(shuffled(5, 3, torch.Generator().manual_seed(0)), 5))).tolist()
    assert all(sorted(seen[i : i + 5]) == list(range(5)) for i in (0, 5, 10))
    assert [len(b) for b in islice(shuffled(2, 5, torch.Generator()), 2)] == [5, 5]


@pytest.mark.parametrize("variant", ["fixed", "released"])
def test_it_conforms(tiny, variant):
    cut = SalUn(**SMALL | {"lr": 1e-2, "batch": 2}, variant=variant)
    assert [line for line in check(cut, tiny, BRIEF, ["a cat", "one cat", "cat"]) if line[1]] == []
