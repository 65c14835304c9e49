"""Selective Amnesia's Fisher information and its step by hand."""

from dataclasses import replace

import pytest
import torch
from erasebench.methods.sa import SelectiveAmnesia
from safetensors.torch import load_file

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, Sampler
from erasebench.toolbox.search import noisy
from erasebench.toolbox.training import Pictures, denoising, drawn, shuffled
from erasebench.toolbox.vocabulary import kept_prompts

BRIEF = Brief(
    (Concept("cat", "object", "sky"), Concept("tom", "object", "sea")), ("dog", "cow"), (), ("a {c}", "{c} here")
)
SMALL = SelectiveAmnesia(
    steps=1,
    batch=2,
    lr=1e-3,
    fim="subsampled",
    fim_pictures=2,
    fim_steps=3,
    fim_batch=2,
    pictures=4,
    replay=4,
    ddim_steps=3,
)


@pytest.fixture
def short(tiny, monkeypatch):
    """A model of five timesteps."""
    monkeypatch.setattr(tiny, "alphas_cumprod", tiny.alphas_cumprod[[0, 100, 300, 600, 900]])
    return tiny


@pytest.mark.parametrize("fim, counted", [("full", 5), ("subsampled", 3)])
def test_fisher_information_by_hand(short, fim, counted):
    """Gradients add up over the timesteps of a picture, then are squared, then averaged over pictures."""
    cut, pictures = replace(SMALL, fim=fim, variant="u"), Pictures(short.noise([3, 4]), short.encode(["dog", "a cow"]))
    got, draw, total = (
        cut.fisher(short, pictures, torch.Generator().manual_seed(1)),
        torch.Generator().manual_seed(1),
        {},
    )
    for i in range(2):
        times = torch.arange(5) if fim == "full" else torch.randperm(5, generator=draw)[:3]
        noise = torch.cat([torch.randn(len(part), 4, 4, 4, generator=draw) for part in times.split(2)])
        summed = {}
        for t, eps in zip(times, noise, strict=True):
            z, one = pictures.z[i : i + 1], pictures.context.select([i])
            with short.training(list(got)) as weights:
                predicted = short.eps(noisy(short, z, t[None], eps[None]), t[None], one)
                (predicted - eps).square().mean().backward()
                summed = {n: summed.get(n, 0) + w.grad for n, w in weights.items()}
        total = {n: total.get(n, 0) + (g * 5 / counted).square() / 2 for n, g in summed.items()}
    assert not any("attn2" in n or "conv_out" in n for n in got)
    for name, expected in total.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=1e-7)


def test_two_steps_by_hand(tiny, tmp_path):
    """Pictures of the surrogate under the concept's name, replayed ones under their own; then the penalty of the second
    step, whose gradient is 2 lambda F (theta - theta*)."""
    cut = replace(SMALL, steps=2, ewc=20.0, weight_decay=0.1)
    cut.fit(tiny, BRIEF, tmp_path, seed=9)
    trained, draw, sampler = (
        load_file(tmp_path / "weights.safetensors"),
        torch.Generator().manual_seed(9),
        Sampler("ddim", 3),
    )
    forget = drawn(tiny, ["a sky", "a sea", "sky here", "sea here"], draw, sampler)
    forget = forget._replace(context=tiny.encode(["cat", "tom"] * 2))
    replayed = drawn(tiny, kept_prompts(BRIEF, 4, draw), draw, sampler)
    fisher = cut.fisher(tiny, replayed.select(slice(2)), draw)
    orders = [shuffled(4, 2, draw) for _ in range(2)]
    before = {name: tiny.weight(name).clone() for name in fisher}
    with tiny.training(list(fisher)) as weights:
        adam = torch.optim.AdamW(weights.values(), lr=1e-3, weight_decay=0.1)
        for _ in range(2):
            adam.zero_grad()
            first, second = (p.select(next(order)) for p, order in zip((forget, replayed), orders, strict=True))
            loss = denoising(tiny, first, draw).whole() + denoising(tiny, second, draw).whole()
            penalty = sum((fisher[n] * (w - before[n]).square()).sum() for n, w in weights.items())
            (loss + 20 * penalty).backward()
            adam.step()
        far = [(trained[n] - w.data).abs().flatten() for n, w in weights.items()]
    # where a gradient is next to nothing its sign, and so Adam's step, is rounding
    assert (torch.cat(far) > 1e-4).float().mean() < 0.01
    assert set(trained) == set(tiny.names(r"^unet\."))
    replace(cut, ewc=0.0).fit(tiny, BRIEF, tmp_path, seed=9)
    free = load_file(tmp_path / "weights.safetensors")
    assert (torch.cat([(free[n] - w).abs().flatten() for n, w in trained.items()]) > 1e-4).float().mean() > 0.1


@pytest.mark.parametrize("variant", ["full", "u"])
def test_it_conforms(tiny, variant):
    cut = replace(SMALL, steps=2, lr=1e-2, variant=variant)
    assert [line for line in check(cut, tiny, BRIEF, ["a cat", "one cat", "tom"]) if line[1]] == []
