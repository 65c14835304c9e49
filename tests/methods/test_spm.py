"""SPM's membranes, transport, anchors and step by hand; how several are composed."""

from dataclasses import replace

import pytest
import torch
from erasebench.methods.spm import SPM, Membrane, Membranes, Transport, adapted, anchors, beside, untrained
from safetensors.torch import load_file
from torch.nn import functional as F

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, Sampler
from erasebench.model.context import join
from erasebench.toolbox.trajectory import Along

BRIEF = Brief((Concept("cat", "object", "sky"), Concept("tom cat", "object", "sea")))
SMALL = SPM(steps=1, batch=2, lr=1e-2, warmup=0, anchors=2, anchor_scale=3.0, ddim_steps=3, trajectories=2)


def random(model, count, seed=0):
    """Membranes that do something."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: Membrane(
            torch.randn(count, m.weight.shape[1], generator=draw) / 4,
            torch.randn(count, len(m.weight), generator=draw) / 4,
        )
        for name, m in adapted(model).items()
    }


def merged(model, made, gamma):
    """The U-Net's weights with sum gamma_i u_i d_i in them."""
    weights = {}
    for name, (d, u) in made.items():
        weight = model.weight(f"unet.{name}.weight")
        weights[f"unet.{name}.weight"] = weight + torch.einsum("no,n,ni->oi", u, gamma, d).view_as(weight)
    return weights


def test_every_layer_of_the_transformers_has_one(tiny):
    kinds = {name.rpartition("blocks.")[2] for name in adapted(tiny)}
    assert {"0.attn1.to_q", "0.attn2.to_out.0", "0.ff.net.0.proj", "0.ff.net.2"} <= kinds
    assert {name.rpartition(".")[2] for name in adapted(tiny)} >= {"proj_in", "proj_out"}
    assert not any("resnet" in name or "time" in name for name in adapted(tiny))


def test_each_row_has_the_sum_of_its_own_shares(tiny):
    """As if u d were in the weights, times gamma; the released composition squares it, and mixes the concepts."""
    made, z, t = random(tiny, 2), tiny.noise([0, 1]), torch.tensor([300, 700])
    context, gamma = tiny.encode(["a cat", "the sea"]), torch.tensor([[0.5, 0.2], [0.0, 1.0]])
    of = lambda composition: Membranes(made, lambda prompts: gamma, composition)
    with torch.no_grad():
        with beside(tiny, of("separate")):
            got = tiny.eps(z, t, context)
        with beside(tiny, of("released")):
            released = tiny.eps(z, t, context)
        for i in range(2):
            row = z[i : i + 1], t[i : i + 1], context.select([i])
            with tiny.changed(weights=merged(tiny, made, gamma[i])):
                torch.testing.assert_close(got[i : i + 1], tiny.eps(*row), rtol=1e-4, atol=1e-5)
            both = {n: Membrane(*((gamma[i] @ half)[None] for half in one)) for n, one in made.items()}
            with tiny.changed(weights=merged(tiny, both, torch.ones(1))):
                torch.testing.assert_close(released[i : i + 1], tiny.eps(*row), rtol=1e-4, atol=1e-5)
    # the second row holds one concept, wholly: there both are the same
    torch.testing.assert_close(got[1], released[1], rtol=1e-4, atol=1e-5)
    assert (got[0] - released[0]).abs().max() > 1e-3


def test_transport_by_hand(tiny):
    """The larger of the cosine of the whole encodings and the share of the concept's tokens."""
    names = ["cat", "tom"]
    words = [torch.tensor(tiny.tokenizer(name).input_ids[1:-1]) for name in names]
    concepts, prompts = tiny.encode(names), tiny.encode(["a cat", "zzz", "cat"])
    gamma = Transport(concepts.hidden, words)(prompts)
    assert gamma.shape == (3, 2)
    for i, text in enumerate(["a cat", "zzz", "cat"]):
        for k, name in enumerate(names):
            own, theirs = set(tiny.tokenizer(name).input_ids[1:-1]), set(tiny.tokenizer(text).input_ids)
            cosine = F.cosine_similarity(prompts.hidden[i].flatten(), concepts.hidden[k].flatten(), dim=0)
            assert float(gamma[i, k]) == pytest.approx(max(float(cosine), len(own & theirs) / len(own)), abs=1e-5)
    assert float(gamma[0, 0]) == pytest.approx(1) and float(gamma[2, 0]) == pytest.approx(1) and float(gamma[1, 1]) < 1
    torch.testing.assert_close(Transport(concepts.hidden, words)(prompts.select([1])), gamma[1:2])
    short = prompts._replace(hidden=prompts.hidden[:, :5], ids=prompts.ids[:, :5])
    assert torch.isfinite(Transport(concepts.hidden, words)(short)).all()


def test_the_teacher_is_without_membranes_and_nothing_stays(tiny):
    z, context = tiny.noise([0]), tiny.encode(["a cat"])
    with torch.no_grad():
        plain = tiny.eps(z, 500, context)
        with beside(tiny, Membranes(random(tiny, 1), lambda prompts: torch.ones(1, 1))):
            assert (tiny.eps(z, 500, context) - plain).abs().max() > 1e-3
            with tiny.teacher():
                assert torch.equal(tiny.eps(z, 500, context), plain)
        assert torch.equal(tiny.eps(z, 500, context), plain) and not tiny.is_changed
    assert not any(module._forward_hooks for module in tiny.unet.modules())


def test_anchors_are_as_long_as_the_concept_and_unlike_it(tiny):
    concept = tiny.encode(["cat"])
    found = anchors(concept, 50, torch.Generator().manual_seed(0)).hidden
    ratio = found.flatten(1).norm(dim=1) / concept.hidden.norm()
    assert found.shape == (50, 24, 16) and ratio.min() >= 0.8 and ratio.max() <= 1.2 and ratio.std() > 0.05
    assert F.cosine_similarity(found.flatten(1), concept.hidden.flatten(1)).abs().max() < 0.5


def test_one_step_by_hand(tiny, tmp_path):
    """u starts at zero, so that only u moves, by lr * sign (AdamW); all anchors count, each on its latent."""
    only = replace(BRIEF, concepts=BRIEF.concepts[:1])
    replace(SMALL, eta=2.0, weight_decay=0.0).fit(tiny, only, tmp_path, seed=4)
    trained, draw = load_file(tmp_path / "membranes.safetensors"), torch.Generator().manual_seed(4)
    made, concept = untrained(tiny, draw), tiny.encode(["cat"])
    c, empty = tiny.encode(["cat", "cat"]), tiny.encode(["", ""])
    with torch.no_grad():
        z, t = Along(tiny, concept, Sampler("ddim", 3, 3.0), draw, 2)(c, torch.zeros(2, dtype=torch.long))
        others = anchors(concept, 4, draw)
        z_an, t_an = z[[0, 0, 1, 1]], t[[0, 0, 1, 1]]
        target = 3 * tiny.eps(z, t, empty) - 2 * tiny.eps(z, t, c)
        kept = tiny.eps(z_an, t_an, others)
    with beside(tiny, Membranes(made, lambda prompts: torch.ones(len(prompts.ids), 1))):
        eps = tiny.eps(torch.cat([z, z_an]), torch.cat([t, t_an]), join(c, others))
        ((eps[:2] - target).square().mean() + 3 * (eps[2:] - kept).square().mean()).backward()
    for name, (d, u) in made.items():
        moved = u.grad.abs() > 1e-5
        torch.testing.assert_close(trained[f"{name}.u"][moved], -1e-2 * u.grad.sign()[moved], atol=2e-4, rtol=1e-3)
        assert torch.equal(trained[f"{name}.d"], d.detach())


def test_each_concept_has_its_own_and_they_are_composed(tiny, tmp_path):
    """The first one's does not depend on whether there is a second."""
    both, one = tmp_path / "both", tmp_path / "one"
    for folder, brief in ((both, BRIEF), (one, replace(BRIEF, concepts=BRIEF.concepts[:1]))):
        folder.mkdir()
        replace(SMALL, steps=3).fit(tiny, brief, folder, 0)
    two, alone = (load_file(folder / "membranes.safetensors") for folder in (both, one))
    assert all(len(two[n]) == 2 and torch.equal(two[n][:1], alone[n]) for n in alone)
    z, context = tiny.noise([0]), tiny.encode(["a cat"])
    shown = []
    for composition in ("separate", "released"):
        with replace(SMALL, composition=composition).apply(tiny, both), torch.no_grad():
            shown.append(tiny.eps(z, 500, context))
    assert not torch.equal(*shown)


@pytest.mark.parametrize("composition, trajectories", [("separate", 2), ("released", None)])
def test_it_conforms(tiny, composition, trajectories):
    cut = replace(SMALL, steps=3, lr=0.1, composition=composition, trajectories=trajectories)
    assert [line for line in check(cut, tiny, BRIEF, ["a cat", "one cat", "tom"]) if line[1]] == []
