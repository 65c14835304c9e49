"""SLD's guidance by hand and against diffusers' own, its warm-up, and that images do not see each other."""

import json

import pytest
import torch
from erasebench.methods.sld import SLD, STRENGTHS

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, Sampler
from erasebench.model.guidance import ClassifierFree

BRIEF = Brief((Concept("cat", "object", "sky"), Concept("dog", "object", "sea")))


def applied(tiny, tmp_path, brief=BRIEF, **values):
    sld = SLD(**values)
    sld.fit(tiny, brief, tmp_path, 0)
    return sld.apply(tiny, tmp_path)


def by_hand(free, text, safety, w, nu, how, warming):
    """One latent's noise and its next momentum, number by number."""
    out, after = torch.empty_like(free), torch.empty_like(free)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in free.shape)):
        f, p, s, v = (float(x[tuple(place)]) for x in (free, text, safety, nu))
        mu = min(1.0, abs(how["scale"] * (p - s))) if p - s < how["threshold"] else 0.0
        gamma = mu * (s - f) + how["momentum_scale"] * v
        after[tuple(place)] = how["momentum"] * v + (1 - how["momentum"]) * gamma
        out[tuple(place)] = f + w * (p - f - (0.0 if warming else gamma))
    return out, after


@pytest.mark.parametrize("variant", STRENGTHS)
def test_guidance_by_hand(tiny, tmp_path, variant):
    """Two images at scales and timesteps of their own, three steps; one of them warms up in the first of these."""
    context, concept = tiny.encode(["a cat", "the sea"]), tiny.encode(["cat, dog"]).repeat(2)
    empty, scales = tiny.unconditional().repeat(2), torch.tensor([3.0, 7.0]).view(-1, 1, 1, 1)
    z, nu = tiny.noise([0, 1]), torch.zeros(2, *tiny.latent_shape())
    with torch.no_grad(), applied(tiny, tmp_path, variant=variant):
        state = tiny.begin(context, z)
        for t in (torch.tensor([999, 500]), torch.tensor([600, 300]), torch.tensor([400, 100])):
            got = tiny.guided_eps(z, t, context, scales, state)
            parts = [tiny.eps(z, t, each) for each in (empty, context, concept)]
            for i in range(2):
                warming = int(t[i]) > 1000 * (1 - STRENGTHS[variant]["warmup"] / 50)
                alone = [part[i] for part in parts]
                expected, nu[i] = by_hand(*alone, float(scales[i]), nu[i], STRENGTHS[variant], warming)
                torch.testing.assert_close(got[i], expected, rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(state["momentum"], nu, rtol=1e-3, atol=1e-4)
            z = z - 0.1 * got


def test_it_draws_what_diffusers_draws(tiny, tiny_folder, tmp_path):
    """The pipeline of SLD's authors, as diffusers keeps it: fifty steps, all of warm-up, threshold and momentum."""
    safe = pytest.importorskip("diffusers.pipelines.deprecated.stable_diffusion_safe")
    from diffusers import DDIMScheduler

    pipe = safe.StableDiffusionPipelineSafe.from_pretrained(
        tiny_folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    config = {**pipe.scheduler.config, "clip_sample": False, "steps_offset": 1}
    pipe.scheduler = DDIMScheduler.from_config(config)
    pipe.set_progress_bar_config(disable=True)
    pipe.safety_concept = "cat"
    z = tiny.noise([3])
    how = STRENGTHS["strong"]
    theirs = pipe(
        "a cat",
        num_inference_steps=50,
        guidance_scale=7.5,
        latents=z,
        output_type="np",
        height=16,
        width=16,
        sld_guidance_scale=how["scale"],
        sld_warmup_steps=how["warmup"],
        sld_threshold=how["threshold"],
        sld_momentum_scale=how["momentum_scale"],
        sld_mom_beta=how["momentum"],
    ).images[0]
    with applied(tiny, tmp_path, Brief(BRIEF.concepts[:1]), variant="strong"):
        ours = tiny.sample(["a cat"], [3], Sampler("ddim", 50, 7.5)).images[0]
    assert (torch.from_numpy(theirs * 255).round() - ours).abs().max() <= 1


def test_the_warm_up_is_that_of_fifty_steps(tiny, tmp_path):
    """With fifty steps gamma sets in at step `warmup`, with twenty-five at half of it."""
    context, z = tiny.encode(["a cat"]), tiny.noise([0])
    with torch.no_grad(), applied(tiny, tmp_path, variant="medium"):
        for steps in (50, 25):
            for i, t in enumerate(tiny.scheduler(Sampler("ddim", steps, 4.0)).timesteps):
                guided = tiny.guided_eps(z, t, context, 4.0, tiny.begin(context, z))
                plain = ClassifierFree()
                unguided = plain(tiny, z, t, context, 4.0, plain.begin(tiny, context, z))
                assert torch.allclose(guided, unguided, atol=1e-4) == (i < 10 * steps / 50), (steps, i)


def test_numbers_that_are_given_win(tiny, tmp_path):
    sld = SLD(variant="max", scale=7.0, momentum=0.0)
    assert (sld.scale, sld.momentum, sld.threshold, sld.warmup) == (7.0, 0.0, 1.0, 0)
    names = [f"person {i}" for i in range(7)]  # more than the context holds
    applied(tiny, tmp_path, Brief(tuple(Concept(name, "person") for name in names)))
    texts = json.loads((tmp_path / "safety_concept.json").read_text())
    assert len(texts) > 1 and ", ".join(texts) == ", ".join(names)


def test_a_mined_embedding_of_any_length_is_guided(tiny, tmp_path):
    context, z = tiny.encode(["a cat"]), tiny.noise([0])
    short = context._replace(hidden=context.hidden[:, :5])
    with torch.no_grad(), applied(tiny, tmp_path, variant="max"):
        state = tiny.begin(short, z)
        got = tiny.guided_eps(z, 500, short, 4.0, state)
        parts = [tiny.eps(z, 500, each)[0] for each in (tiny.unconditional(), short, tiny.encode(["cat, dog"]))]
        nothing = torch.zeros_like(parts[0])
        torch.testing.assert_close(
            got[0], by_hand(*parts, 4.0, nothing, STRENGTHS["max"], False)[0], rtol=1e-3, atol=2e-4
        )


@pytest.mark.parametrize("variant", STRENGTHS)
def test_it_conforms(tiny, variant):
    assert [line for line in check(SLD(variant), tiny, BRIEF, ["a cat", "one cat", "dog"]) if line[1]] == []
