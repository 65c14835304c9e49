"""STEREO's two stages by hand: what is erased in the search, inverted in it, and composed after it."""

import pytest
import torch
from erasebench.methods import stereo
from erasebench.methods.stereo import STEREO
from safetensors.torch import load_file

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, ErasebenchError, Sampler
from erasebench.model.context import join
from erasebench.toolbox.inversion import Inversion, textual_inversion
from erasebench.toolbox.search import FREE, slots, table, tokens, with_vectors
from erasebench.toolbox.training import tuned
from erasebench.toolbox.trajectory import Along

BRIEF = Brief((Concept("cat", "object", "sky"), Concept("tom", "object", "sea")), templates=("{c}", "a {c}", "one {c}"))
SMALL = dict(
    variant="x",
    search_steps=1,
    search_lr=1e-2,
    pictures=3,
    inversion_steps=2,
    inversion_lr=0.1,
    steps=1,
    batch=2,
    lr=1e-3,
    ddim_steps=3,
    trajectories=2,
)


def words(tiny, vectors):
    with torch.no_grad():
        return with_vectors(tiny, slots(tiny, [[FREE]] * len(vectors)), vectors)


def test_the_composed_target():
    free, anchor = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    negative = torch.tensor([2.0, 6.0]).view(2, 1, 1, 1, 1)
    one = lambda **scales: float(STEREO(**scales).composed(free, anchor, negative))
    assert one() == 1 + 1 * (3 - 1) - 3 * ((2 - 1) + (6 - 1)) / 2  # as released
    assert one(anchor_scale=0.5, negative_scale=1.0) == 1 + 0.5 * 2 - 3


def test_each_round_goes_on_from_the_last_and_erases_what_it_found(tiny, monkeypatch):
    method, seen = STEREO(**SMALL), []
    erase, name = STEREO.erase, tiny.names(r"^unet\..*attn2\.to_v")[0]

    def spy(self, model, prompts, target, *rest):
        seen.append((prompts, model.weight(name).clone()))
        return erase(self, model, prompts, target, *rest)

    monkeypatch.setattr(STEREO, "erase", spy)
    concepts, before = tiny.encode(["cat", "tom"]), tiny.weight(name).clone()
    found = method.search(tiny, BRIEF, concepts, torch.Generator().manual_seed(0), 0)
    assert len(found) == len(seen) == 2 and torch.equal(tiny.weight(name), before)
    assert torch.equal(seen[0][0].hidden, concepts.hidden) and torch.equal(seen[1][0].hidden, found[0].hidden)
    assert torch.equal(seen[0][1], before) and not torch.equal(seen[1][1], before)
    assert not torch.equal(found[0].hidden, found[1].hidden)


def test_every_round_inverts_pictures_of_its_own_in_the_erased_model(tiny, monkeypatch):
    method, shown = STEREO(**SMALL), []
    name = tiny.names(r"^unet\..*attn2\.to_v")[0]
    before = tiny.weight(name).clone()

    def spy(model, z0, templates, start, how):
        shown.append((z0, start, not torch.equal(model.weight(name), before), how.seed))
        return torch.zeros(1, 16)

    monkeypatch.setattr(stereo, "textual_inversion", spy)
    method.search(tiny, BRIEF, tiny.encode(["cat", "tom"]), torch.Generator().manual_seed(0), 0)
    drawn = [method.shown(tiny, BRIEF, name, 0) for name in ("cat", "tom")]
    parts = [drawn[0][:2], drawn[1][:2], drawn[0][2:], drawn[1][2:]]
    assert all(torch.equal(one[0], part) for one, part in zip(shown, parts, strict=True))
    ends = [table(tiny)[tokens(tiny, name)[-1:]] for name in ("sky", "sea")]
    assert all(torch.equal(one[1], end) for one, end in zip(shown, 2 * ends, strict=True)) and all(
        one[2] for one in shown
    )
    assert len({one[3] for one in shown}) == 4


def test_an_inversion_of_latents_comes_nearer(tiny):
    """A step by hand: AdamW's first is lr * sign, its decay lr * 0.01 of the vector."""
    z0 = tiny.latents(tiny.encode(["cat"]).repeat(1), [3], Sampler("ddim", 3, 3.0))
    start = table(tiny)[tokens(tiny, "sky")[-1:]].detach()
    assert torch.equal(textual_inversion(tiny, z0, ("{c}",), start, Inversion(0, 4, 0.1, 5)), start)
    one = textual_inversion(tiny, z0, ("{c}",), start, Inversion(1, 4, 0.1, 5))
    torch.testing.assert_close((one - start * (1 - 0.1 * 0.01)).abs(), torch.full_like(one, 0.1), rtol=0.05, atol=0)
    learnt = textual_inversion(tiny, z0, ("{c}",), start, Inversion(20, 4, 0.1, 5))
    draw = torch.Generator().manual_seed(9)
    t, noise = torch.randint(1000, (64,), generator=draw), torch.randn(64, *z0.shape[1:], generator=draw)
    alpha = tiny.alphas_cumprod[t].view(-1, 1, 1, 1)
    z = alpha.sqrt() * z0 + (1 - alpha).sqrt() * noise
    with torch.no_grad():
        error = lambda v: float((tiny.eps(z, t, words(tiny, v.repeat(64, 1))) - noise).square().mean())
        assert error(learnt) < error(start)


@pytest.mark.parametrize("anchors, filled", [("concept", ("cat", "tom")), ("surrogate", ("sky", "sea"))])
def test_the_last_erasure_by_hand(tiny, tmp_path, monkeypatch, anchors, filled):
    """From the base, at a prompt of P; Adam's first step is lr * sign, after the decay of lr * 0.01."""
    method = STEREO(**SMALL, anchors=anchors, anchor_scale=0.5, negative_scale=2.0)
    found = [words(tiny, torch.randn(2, 16, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    monkeypatch.setattr(STEREO, "search", lambda *a: found)
    method.fit(tiny, BRIEF, tmp_path, seed=8)
    trained = load_file(tmp_path / "weights.safetensors")
    draw, known = torch.Generator().manual_seed(8), [tiny.encode(["cat", "tom"]), *found]
    prompts = join(*known)
    towards = Along(tiny, prompts, Sampler("ddim", 3, 3.0), draw, 2)
    which = torch.randint(6, (2,), generator=draw)
    context = prompts.select(which)
    z, t = towards(context, which)
    place = torch.randint(3, (2,), generator=draw)
    texts = [BRIEF.templates[p].format(c=filled[w % 2]) for p, w in zip(place, which, strict=True)]
    with torch.no_grad():
        free, anchor = tiny.eps(z, t, tiny.encode([""]).repeat(2)), tiny.eps(z, t, tiny.encode(texts))
        negative = sum(tiny.eps(z, t, known[k].select(which % 2)) - free for k in range(3)) / 3
    target = free + 0.5 * (anchor - free) - 2.0 * negative
    with tiny.training(tiny.names(r"^unet\..*attn2\.")) as weights:
        (tiny.eps(z, t, context) - target).square().mean().backward()
        for name, p in weights.items():
            moved = p.grad.abs() > 1e-5
            expected = p.data * (1 - 1e-3 * 0.01) - 1e-3 * p.grad.sign()
            torch.testing.assert_close(trained[name][moved], expected[moved], atol=2e-5, rtol=1e-4)
        assert set(trained) == set(weights)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_search_erases_towards_the_empty_prompt_or_beyond(tiny, tmp_path, monkeypatch, eta):
    aims = []

    def spy(self, model, prompts, target, *rest):
        z, t, context = model.noise([0, 1]), torch.tensor([300, 700]), prompts.select(torch.tensor([0, 1]))
        with torch.no_grad():
            aims.append((target(z, t, context, torch.tensor([0, 1])), z, t, context))
        raise StopIteration

    monkeypatch.setattr(STEREO, "erase", spy)
    method = STEREO(**SMALL, search_eta=eta)
    with pytest.raises(StopIteration):
        method.search(tiny, BRIEF, tiny.encode(["cat", "tom"]), torch.Generator().manual_seed(0), 0)
    got, z, t, context = aims[0]
    with torch.no_grad():
        free, text = tiny.eps(z, t, tiny.encode([""]).repeat(2)), tiny.eps(z, t, context)
    torch.testing.assert_close(got, free - eta * (text - free), rtol=1e-4, atol=1e-5)


def test_an_erasure_nears_its_target(tiny, tmp_path):

    method = STEREO(**SMALL)
    concepts = tiny.encode(["cat", "tom"])
    free = lambda z: tiny.unconditional().repeat(len(z))
    target = lambda z, t, prompts, which: tiny.eps(z, t, free(z))
    method.erase(tiny, concepts, target, 15, 1e-2, torch.Generator().manual_seed(0), tmp_path)
    z, t = tiny.noise(range(8)), torch.linspace(50, 950, 8).long()
    with torch.no_grad():
        aim, asked = tiny.eps(z, t, free(z)), concepts.select(torch.arange(8) % 2)
        gap = lambda: float((tiny.eps(z, t, asked) - aim).square().mean())
        before = gap()
        with tuned(tiny, tmp_path):
            assert gap() < 0.8 * before


def test_what_cannot_be_done_is_said(tiny, tmp_path):
    with pytest.raises(ErasebenchError, match="no more than there are pictures"):
        STEREO(rounds=3, pictures=2)
    with pytest.raises(ErasebenchError, match="at least one"):
        STEREO(rounds=0)
    with pytest.raises(ErasebenchError, match="'cat' diverged"):
        STEREO(**{**SMALL, "inversion_lr": float("inf")}).fit(tiny, BRIEF, tmp_path, 0)


@pytest.mark.parametrize("variant, trajectories", [("x", 2), ("u", None)])
def test_it_conforms(tiny, variant, trajectories):
    method = STEREO(**{**SMALL, "steps": 3, "lr": 1e-2, "variant": variant, "trajectories": trajectories})
    assert [line for line in check(method, tiny, BRIEF, ["a cat", "one cat", "tom"]) if line[1]] == []
