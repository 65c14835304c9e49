"""RACE's attack and its step by hand, from ESD's weights on; what the released code aims at."""

from dataclasses import replace

import pytest
import torch
from erasebench.methods.esd import ESD
from erasebench.methods.race import RACE
from safetensors.torch import load_file

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, Sampler
from erasebench.toolbox.training import tuned
from erasebench.toolbox.trajectory import midway

BRIEF = Brief((Concept("cat", "object", "sky"), Concept("dog", "object", "sea")))
FIRST = ESD(steps=3, batch=2, lr=1e-2, ddim_steps=3, trajectories=2)
SMALL = dict(first=FIRST, steps=1, batch=2, lr=1e-3, radius=0.3, attack_steps=2, ddim_steps=3)


def test_the_attack_stays_in_its_ball_and_gains_by_signs(tiny):
    context, z, t = tiny.encode(["cat", "dog"]), tiny.noise([0, 1]), torch.tensor([300, 700])
    race = RACE(**{**SMALL, "attack_steps": 1})
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    gain = lambda eps: (eps * weight).sum()
    got = race.attack(tiny, z, t, context, gain, torch.Generator().manual_seed(2)).hidden
    for i, c in enumerate(context.hidden):
        uniform = torch.rand(context.hidden.shape, generator=torch.Generator().manual_seed(2))[i]
        keep = lambda x, c=c: x.clamp(c.min(), c.max()).clamp(c - 0.3, c + 0.3)
        start = keep(c + 0.3 * (2 * uniform - 1)).requires_grad_(True)
        one = context.select([i])._replace(hidden=start[None])
        (slope,) = torch.autograd.grad((tiny.eps(z[i : i + 1], t[i : i + 1], one) * weight[i]).sum(), start)
        sure = slope.abs() > 1e-7
        torch.testing.assert_close(got[i][sure], keep(start + 0.25 * 0.3 * slope.sign())[sure].detach())
        assert (got[i] - c).abs().max() <= 0.3 + 1e-6 and got[i].min() >= c.min() and got[i].max() <= c.max()
    assert (got - context.hidden).abs().max() > 0.2


@pytest.mark.parametrize("variant", ["erasing", "released"])
def test_the_number_of_steps_counts(tiny, variant):
    """More of them gain more: on the loss, or towards the noise that the latents began with."""
    context, z, t = tiny.encode(["cat"]), tiny.noise([0]), torch.tensor([500])
    aim = tiny.noise([7])
    sign = 1 if variant == "erasing" else -1
    gain = lambda eps: sign * (eps - aim).square().sum()
    gained = []
    for steps in (0, 2, 20):
        race = RACE(**{**SMALL, "attack_steps": steps})
        found = race.attack(tiny, z, t, context, gain, torch.Generator().manual_seed(0))
        gained.append(float(gain(tiny.eps(z, t, found)).detach()))
    assert gained[0] < gained[1] < gained[2]


@pytest.mark.parametrize("variant", ["erasing", "released"])
def test_one_step_by_hand(tiny, tmp_path, variant):
    """From ESD's weights; Adam's first step is lr * sign."""
    race = RACE(**SMALL, variant=variant, eta=2.0)
    race.fit(tiny, BRIEF, tmp_path, seed=8)
    trained = load_file(tmp_path / "weights.safetensors")
    (tmp_path / "first").mkdir()
    FIRST.fit(tiny, BRIEF, tmp_path / "first", 8)
    draw, concepts = torch.Generator().manual_seed(8), tiny.encode(["cat", "dog"])
    with tuned(tiny, tmp_path / "first"):
        c = concepts.select(torch.randint(2, (2,), generator=draw))
        seeds = torch.randint(2**31, (2,), generator=draw).tolist()
        z, t = midway(tiny, c, Sampler("ddim", 3, 3.0), draw, seeds)
        with tiny.teacher():
            free, text = tiny.eps(z, t, tiny.encode([""]).repeat(2)), tiny.eps(z, t, c)
        target, start = 3 * free - 2 * text, tiny.noise(seeds)
        gain = lambda eps: (eps - target).square().sum() if variant == "erasing" else -(eps - start).square().sum()
        with tiny.training(tiny.names(r"^unet\..*attn2\.")) as weights:
            attacked = race.attack(tiny, z, t, c, gain, draw)
            (tiny.eps(z, t, attacked) - target).square().mean().backward()
            for name, parameter in weights.items():
                moved = parameter.grad.abs() > 1e-5
                expected = parameter.data - 1e-3 * parameter.grad.sign()
                torch.testing.assert_close(trained[name][moved], expected[moved], atol=2e-5, rtol=1e-4)
            assert set(trained) == set(weights)


def test_latents_begin_with_the_seeds_that_are_given(tiny):
    """And without them nothing else is drawn than before."""
    context, sampler = tiny.encode(["cat", "dog"]), Sampler("ddim", 3, 3.0)
    draw = lambda: torch.Generator().manual_seed(1)
    stop = int(torch.randint(3, (), generator=draw()))
    z, _ = midway(tiny, context, sampler, draw(), [5, 6])
    assert torch.equal(z, tiny.latents(context, [5, 6], sampler, stop=stop))
    rest = draw()
    torch.randint(3, (), generator=rest)
    seeds = torch.randint(2**31, (2,), generator=rest).tolist()
    assert torch.equal(midway(tiny, context, sampler, draw())[0], tiny.latents(context, seeds, sampler, stop=stop))


def test_it_conforms(tiny):
    race = RACE(**{**SMALL, "steps": 2, "first": replace(FIRST, variant="u")})
    assert [line for line in check(race, tiny, BRIEF, ["a cat", "one cat", "dog"]) if line[1]] == []
