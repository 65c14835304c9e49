"""Receler's erasers, mask, adversarial prompt and loss by hand; what the released code leaves out."""

from dataclasses import replace

import pytest
import torch
from erasebench.methods import receler
from erasebench.methods.receler import Erasing, Receler, behind, eraser, outside, width
from safetensors.torch import load_file

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, Sampler
from erasebench.toolbox.attention import layers, maps
from erasebench.toolbox.trajectory import Along

BRIEF = Brief((Concept("cat", "object", "sky"), Concept("tom", "object", "sea")))
SMALL = dict(steps=1, batch=2, lr=1e-3, rank=4, vectors=3, attack_steps=2, map_side=4, ddim_steps=3, trajectories=2)


def test_an_eraser_stands_behind_the_output(tiny):
    name = layers(tiny)[0]
    attn = tiny.unet.get_submodule(name.removesuffix(".processor"))
    draw = torch.Generator().manual_seed(0)
    x, rows = torch.randn(2, 9, attn.to_q.in_features, generator=draw), tiny.encode(["a cat", "the sea"]).hidden
    made, plain = eraser(width(tiny, name), 4), attn.processor(attn, x, rows)
    assert torch.equal(Erasing(attn.processor, made)(attn, x, rows), plain)  # untrained it adds nothing
    torch.nn.init.normal_(made[2].weight)
    down, up = made[0], made[2]
    hidden = plain @ down.weight.T + down.bias
    added = (0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))) @ up.weight.T + up.bias
    written = []
    got = Erasing(attn.processor, made)(attn, x, rows, written=written)
    torch.testing.assert_close(got, plain + added, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(written[0], added, rtol=1e-4, atol=1e-5)


def test_the_mask_is_where_the_base_attends_to_the_concept(tiny):
    z, t, context = tiny.noise([0, 1]), torch.tensor([300, 700]), tiny.encode(["cat", "tom"])
    cut = Receler(map_side=4, threshold=0.5)
    with torch.no_grad():
        eps, mask = cut.located(tiny, z, t, context, [(1, 4), (1, 4)])
        torch.testing.assert_close(eps, tiny.eps(z, t, context), rtol=1e-4, atol=1e-5)
        seen = [m for m in maps(tiny, z, t, context).values() if m.shape[2] == 16]
    assert seen and mask.shape == (2, 4, 4)
    for i in range(2):
        total = sum(m[i, head, :, token] for m in seen for head in range(m.shape[1]) for token in (1, 2, 3))
        scaled = (total - total.min()) / (total.max() - total.min())
        assert torch.equal(mask[i].flatten(), scaled >= 0.5)
        assert 0 < mask[i].sum() < 16


def test_only_what_is_added_outside_the_mask_counts():
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 0, 0] = True
    fine = torch.zeros(1, 16, 2)
    fine.view(1, 4, 4, 2)[0, :2, :2] = 7.0  # inside, at twice the resolution
    coarse = torch.full((1, 4, 3), 2.0)
    assert float(outside([fine], mask)) == 0
    assert float(outside([fine, coarse], mask)) == pytest.approx((0 + 4) / 2)  # three places outside, each of square 4
    covering = torch.ones(1, 2, 2, dtype=torch.bool)
    assert float(outside([coarse], covering)) == 0
    two = outside([torch.cat([coarse, coarse])], torch.cat([mask, covering]))
    assert float(two) == pytest.approx((4 + 0) / 2)  # each sample by its own mask


def test_vectors_take_the_place_from_the_end_on(tiny):
    context, vectors = tiny.encode(["cat", "a longer prompt so"]), torch.full((2, 4, 16), 9.0)
    made = behind(context, vectors).hidden
    for i, end in enumerate(context.ends.tolist()):
        taken = torch.arange(24).ge(end) & torch.arange(24).lt(end + 4)
        assert (made[i][taken] == 9).all() and torch.equal(made[i][~taken], context.hidden[i][~taken])


@pytest.mark.parametrize("variant", ["intended", "released"])
def test_one_step_by_hand(tiny, tmp_path, monkeypatch, variant):
    """The released code's prompt is the concept's own. Last layers start at zero: here they do not, as what is written outside
    the mask would have no gradient yet."""
    zero = Receler.untrained

    def awake(self, model, seed):
        erasers, draw = zero(self, model, seed), torch.Generator().manual_seed(seed)
        for made in erasers.values():
            torch.nn.init.normal_(made[2].weight, std=0.5, generator=draw)
        return erasers

    monkeypatch.setattr(Receler, "untrained", awake)
    cut = Receler(**SMALL, variant=variant, eta=2.0, outside_scale=0.3, threshold=0.5)
    cut.fit(tiny, BRIEF, tmp_path, seed=6)
    trained, draw = load_file(tmp_path / "erasers.safetensors"), torch.Generator().manual_seed(6)
    concepts, erasers = tiny.encode(["cat", "tom"]), cut.untrained(tiny, 6)
    with tiny.changed(processors=cut.processors(tiny, erasers)), torch.no_grad():
        towards = Along(tiny, concepts, Sampler("ddim", 3, 3.0), draw, 2)
        which = torch.randint(2, (2,), generator=draw)
        c = concepts.select(which)
        z, t = towards(c, which)
    with torch.no_grad():
        free, (text, mask) = tiny.eps(z, t, tiny.encode([""]).repeat(2)), cut.located(tiny, z, t, c, [(1, 4)] * 2)
    with tiny.changed(processors=cut.processors(tiny, erasers)):
        prompt = c if variant == "released" else cut.attack(tiny, z, t, c, text, draw)
        assert torch.equal(prompt.hidden, c.hidden) == (variant == "released")
        written = []
        eps = tiny.eps(z, t, prompt, {"attention": {"written": written}})
        ((eps - (3 * free - 2 * text)).square().mean() + 0.3 * outside(written, mask)).backward()
    for name, made in erasers.items():
        for key, p in made.named_parameters():
            moved = p.grad.abs() > 1e-5
            expected = p.data - 1e-3 * p.grad.sign()
            torch.testing.assert_close(trained[f"{name}.{key}"][moved], expected[moved], atol=2e-5, rtol=1e-4)


def test_the_adversarial_prompt_answers_as_the_base(tiny):
    cut = Receler(**{**SMALL, "attack_steps": 40, "attack_lr": 0.1, "attack_decay": 0.0})
    z, t, context = tiny.noise([0, 1]), torch.tensor([300, 700]), tiny.encode(["cat", "tom"])
    with torch.no_grad():
        text = tiny.eps(z, t, context)
    erasers, gap = cut.untrained(tiny, 0), lambda prompt: float((tiny.eps(z, t, prompt) - text).square().mean())
    for made in erasers.values():
        torch.nn.init.constant_(made[2].bias, 0.5)
    with tiny.changed(processors=cut.processors(tiny, erasers)):
        start = replace(cut, attack_steps=0).attack(tiny, z, t, context, text, torch.Generator().manual_seed(0))
        found = cut.attack(tiny, z, t, context, text, torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert gap(found) < 0.8 * gap(start)


def test_the_released_variant_never_attacks(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(receler.Receler, "attack", lambda *a: pytest.fail("an attack"))
    Receler(**SMALL, variant="released").fit(tiny, BRIEF, tmp_path, 0)


@pytest.mark.parametrize("variant, trajectories", [("intended", 2), ("released", None)])
def test_it_conforms(tiny, variant, trajectories):
    cut = Receler(**{**SMALL, "steps": 3, "lr": 1e-2, "trajectories": trajectories}, variant=variant)
    assert [line for line in check(cut, tiny, BRIEF, ["a cat", "one cat", "tom"]) if line[1]] == []
