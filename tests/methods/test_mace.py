"""MACE's three steps against computations by hand, and adapters trained together against in turn."""

import json

import pytest
import torch
from erasebench.methods.mace import MACE, clip_each
from safetensors.torch import load_file

from erasebench.contracts import Brief, Concept, ErasebenchError, Sampler
from erasebench.toolbox import attention, closed_form, masks

BRIEF = Brief(
    (Concept("cat", "object", "sky"), Concept("tom", "object", "sea")),
    ("dog",),
    ("a horse", "a sea"),
    ("a {c} there", "{c}"),
)
SMALL = dict(
    images=2, image_sampler="ddim", image_steps=2, steps=3, lr=1e-2, masks="whole", ridge=0.1, prior_scale=1e-2
)


def test_the_variant_sets_what_is_not_given():
    assert (MACE().refined, MACE().norm, MACE().prior_power) == ("context", "squared", 1)
    assert MACE(prior_scale=0.5).fusion_prior_scale == 0.5
    official = MACE(variant="official", norm="squared")
    assert (official.refined, official.norm, official.prior_power, official.pixels) == (
        "all_but_concept",
        "squared",
        2,
        "imagenet",
    )


def test_looking_at_the_maps_changes_nothing_and_stops_early(tiny):
    z, context = tiny.noise([0, 1]), tiny.encode(["cat", "a sea"])
    seen = {}
    processors = {name: attention.Seeing(name, seen.__setitem__) for name in attention.layers(tiny)}
    with torch.no_grad():
        plain = tiny.eps(z, 500, context)
        with tiny.changed(processors=processors):
            torch.testing.assert_close(tiny.eps(z, 500, context), plain)
        maps = attention.maps(tiny, z, torch.tensor(500), context)
    assert maps.keys() == seen.keys() and all(torch.equal(maps[name], seen[name]) for name in maps)
    assert all((m.sum(-1) - 1).abs().max() < 1e-5 and m.shape[:2] == (2, 2) for m in maps.values())
    assert not tiny.is_changed


def test_the_loss_is_the_masked_attention_of_the_silenced_tokens():
    torch.manual_seed(0)
    maps = {"fine": torch.rand(1, 2, 16, 5), "coarse": torch.rand(1, 2, 4, 5)}
    shown = torch.zeros(1, 4, 4, dtype=torch.bool)
    shown[0, :2, :2] = True
    silenced = torch.tensor([[False, True, False, False, True]])
    fine = maps["fine"].view(2, 4, 4, 5)[:, :2, :2, [1, 4]].square().sum()
    coarse = maps["coarse"].view(2, 2, 2, 5)[:, 0, 0, [1, 4]].square().sum()
    torch.testing.assert_close(MACE(norm="squared").loss(maps, shown, silenced), (fine + coarse)[None])
    torch.testing.assert_close(MACE(norm="plain").loss(maps, shown, silenced), (fine.sqrt() + coarse.sqrt())[None])


def test_a_mask_that_a_coarse_layer_would_lose_still_counts_there():
    shown = torch.zeros(1, 8, 8, dtype=torch.bool)
    shown[0, 3, 3] = True
    assert attention.fitted(shown, 4).tolist() == [[True, False, False, False]]


def test_timesteps_lie_between_t1_and_t2():
    chances = MACE().timesteps(1000)
    t = torch.arange(1000)
    assert chances[200:401].sum() / chances.sum() > 0.84
    assert abs((chances * t).sum() / chances.sum() - 300) < 1
    assert MACE(importance=False).timesteps(10).tolist() == [1.0] * 10


@pytest.mark.parametrize("norm", ["squared", "plain"])
def test_adapters_trained_together_equal_those_trained_in_turn(tiny, norm):
    tiny.unet.double(), tiny.text_encoder.double(), tiny.vae.double()
    latents, shown, _ = MACE(**SMALL).pictures(tiny, BRIEF, 5)
    together = MACE(**SMALL, norm=norm).adapters(tiny, BRIEF, latents, shown, 5)
    in_turn = MACE(**SMALL, norm=norm, together=1).adapters(tiny, BRIEF, latents, shown, 5)
    assert together.keys() == set(tiny.names(closed_form.PROJECTIONS))
    for name, pair in together.items():
        for ours, theirs in zip(pair, in_turn[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert max(up.abs().max() for _, up in together.values()) > 1e-3


def test_clipping_is_each_samples_own():
    weights = [torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 4, requires_grad=True)]
    weights[0].grad, weights[1].grad = (
        torch.tensor([[3.0, 0, 0], [0.1, 0, 0]]),
        torch.tensor([[4.0, 0, 0, 0], [0, 0, 0, 0]]),
    )
    clip_each(weights)
    torch.testing.assert_close(weights[0].grad, torch.tensor([[0.6, 0, 0], [0.1, 0, 0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights[1].grad[0, 0], torch.tensor(0.8), atol=1e-5, rtol=0)


def test_fusion_is_the_minimum_of_its_objective(tiny, tmp_path):
    """Eq. 7: the gradient vanishes at the fused projection of every layer."""
    eraser = MACE(**SMALL, fusion_prior_scale=3e-2)
    kept = eraser.kept(tiny, BRIEF)
    names = tiny.names(closed_form.PROJECTIONS)
    original = {name: tiny.weight(name).double() for name in names}
    refined = {name: w + 0.1 for name, w in original.items()}
    torch.manual_seed(0)
    adapters = {n: (torch.randn(2, 1, 16), torch.randn(2, len(tiny.weight(n)), 1)) for n in names}
    fused, _ = eraser.fuse(tiny, BRIEF, kept, original, refined, adapters)
    rows = [
        torch.cat([tiny.encode([t.replace("{c}", c.name)]).hidden[0] for t in BRIEF.templates]).double()
        for c in BRIEF.concepts
    ]
    for name in names:
        w, (down, up) = fused[name].clone().requires_grad_(), (part.double() for part in adapters[name])
        objective = 0.1 * (w - refined[name]).square().sum() + 3e-2 * torch.trace(
            (w - original[name]) @ kept @ (w - original[name]).T
        )
        for i, e in enumerate(rows):
            objective = objective + ((w - refined[name] - up[i] @ down[i]) @ e.T).square().sum()
        objective.backward()
        assert w.grad.abs().max() < 1e-6 * objective.item()


def test_fit_silences_the_concept_where_it_is_shown(tiny, tmp_path):
    eraser = MACE(**{**SMALL, "steps": 60, "lr": 5e-2, "prior_scale": 1e-6, "ridge": 1e-3})
    eraser.fit(tiny, BRIEF, tmp_path, 0)
    notes = json.loads((tmp_path / "notes.json").read_text())
    assert notes["empty_masks"] == 0 and notes["condition"] > 1 and notes["fusion_condition"] > 1
    z, context = tiny.noise([3]), tiny.encode(["a cat there"])
    attended = lambda: sum(m[..., 3:6].sum() for m in attention.maps(tiny, z, torch.tensor(300), context).values())
    with torch.no_grad():
        before = attended()
        with eraser.apply(tiny, tmp_path):
            assert attended() < 0.7 * before


def test_steps_can_be_left_out(tiny, tmp_path):
    refinement_only = MACE(**SMALL, adapt=False)
    refinement_only.fit(tiny, BRIEF, tmp_path, 0)
    name = tiny.names(closed_form.PROJECTIONS)[0]
    edit, _ = refinement_only.refinement(tiny, BRIEF, refinement_only.kept(tiny, BRIEF))
    expected = (tiny.weight(name).double() @ edit).float()
    torch.testing.assert_close(load_file(tmp_path / "weights.safetensors")[name], expected)


def test_empty_masks_are_counted_and_the_whole_image_is_silenced(tiny, monkeypatch):
    monkeypatch.setitem(
        masks.MASKS, "whole", lambda model, images, template, name: torch.zeros(images.shape[:3], dtype=torch.bool)
    )
    _, shown, empty = MACE(**SMALL).pictures(tiny, BRIEF, 0)
    assert empty == 4 and shown.all()


def test_attended_masks_follow_the_tokens_attention(tiny):
    images = tiny.sample(["cat", "cat"], [0, 1], Sampler("ddim", 2, 3.0)).images
    mask = masks.attended(tiny, images, "a {c} there", "cat")
    assert mask.shape == (2, 4, 4) and 0 < mask.float().mean() < 1


def test_templates_come_from_a_file_and_are_part_of_the_identity(tmp_path):
    (tmp_path / "t.txt").write_text("a {c}\n\n{c} there\n")
    assert MACE(templates=str(tmp_path / "t.txt")).templates == ("a {c}", "{c} there")
    with pytest.raises(ErasebenchError, match="no such file"):
        MACE(templates=str(tmp_path / "none.txt"))


def test_a_template_without_a_slot_is_refused(tiny, tmp_path):
    with pytest.raises(ErasebenchError, match="no slot"):
        MACE(**SMALL, templates=("a photo",)).fit(tiny, BRIEF, tmp_path, 0)
