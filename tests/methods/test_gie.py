"""Growth inhibitors against explicit insertion into the map, and the adapter's labels by hand."""

import json

import numpy as np
import pytest
import torch
from erasebench.methods import gie
from erasebench.methods.gie import GIE, Inhibiting, Inhibitors, probe, search, stronger

from erasebench.contracts import Brief, Concept, ErasebenchError, Sampler
from erasebench.toolbox.attention import layers, projection

BRIEF = Brief(
    (Concept("cat", "object", "sky"), Concept("dog", "object", "sea")), ("sun",), ("a mat", "the sea"), ("a {c}", "{c}")
)


def module(tiny, name):
    return tiny.unet.get_submodule(name.removesuffix(".processor"))


def test_injection_is_explicit_insertion_before_the_end(tiny):
    """[M[:, :end], w M*[:, 1..n], M[:, end:]] [V[:end]; V*[1..n]; V[end:]], softmax as it was."""
    inhibitors, context = Inhibitors.of(tiny, ["cat"], 0.0), tiny.encode(["a sea", "the long road"])
    attn = module(tiny, layers(tiny)[0])
    x = torch.randn(2, 9, attn.to_q.in_features, generator=torch.Generator().manual_seed(0))
    growth = torch.tensor([[-2.0, 0.5, 3.0], [1.0, -4.0, 0.0]])
    got = Inhibiting(inhibitors)(attn, x, context.hidden, growth=growth)
    star, width = tiny.encode(["cat"]), attn.to_q.out_features // attn.heads
    heads = lambda y: y.view(y.shape[0], attn.heads, width).transpose(0, 1)
    for i, end in enumerate(context.ends.tolist()):
        query, rows = heads(attn.to_q(x[i])), context.hidden[i]
        m = (query @ heads(attn.to_k(rows)).mT / width**0.5).softmax(-1)
        m_star = (query @ heads(attn.to_k(star.hidden[0])).mT / width**0.5).softmax(-1)[..., 1:4] * growth[i]
        inserted = torch.cat([m[..., :end], m_star, m[..., end:]], -1)
        values = attn.to_v(torch.cat([rows[:end], star.hidden[0, 1:4], rows[end:]]))
        read = (inserted @ heads(values)).transpose(0, 1).flatten(1)
        torch.testing.assert_close(got[i], attn.to_out[0](read), rtol=1e-4, atol=1e-5)


def test_w_0_changes_nothing_and_w_reaches_the_prompts_half_alone(tiny, tmp_path):
    z, context = tiny.noise([1, 2]), tiny.encode(["a cat", "the sea"])
    free, text = tiny.eps(z, 600, tiny.encode([""]).repeat(2)), tiny.eps(z, 600, context)
    for scale in (0.0, -3.0):
        GIE(scale=scale).fit(tiny, BRIEF, tmp_path, 0)
        with GIE(scale=scale).apply(tiny, tmp_path):
            state = tiny.begin(context, z)
            ours_free, ours_text = tiny.guidance.predictions(tiny, z, torch.tensor(600), context, state)
            alone = tiny.guided_eps(z, 600, context, 1.0, state)
        torch.testing.assert_close(ours_free, free, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours_text, alone, rtol=1e-4, atol=1e-5)
        assert torch.allclose(ours_text, text, atol=1e-5) == (scale == 0)


def test_the_adapter_sees_layers_as_they_run(tiny):
    inhibitors, z, context = Inhibitors.of(tiny, ["cat", "dog"], 0.0), tiny.noise([1]), tiny.encode(["a cat"])
    order, hooks = [], []
    for name in layers(tiny):
        hooks.append(module(tiny, name).register_forward_hook(lambda *_, name=name: order.append(name)))
    with torch.no_grad(), GIE().inhibited(tiny, inhibitors, 0.0):
        seen = probe(tiny, context, z, inhibitors)
        for hook in hooks:
            hook.remove()
        # with one layer's key projection silenced, its map is uniform: there, and in no layer before it
        second = projection(order[1], "k")
        with tiny.changed(weights={second: 0 * tiny.weight(second)}):
            silenced = probe(tiny, context, z, inhibitors)
    assert seen.shape == (1, 6, len(order)) and order != layers(tiny)
    torch.testing.assert_close(silenced[0, :, 1], torch.full((6,), 1 / tiny.context_length))
    torch.testing.assert_close(silenced[0, :, 0], seen[0, :, 0])


def test_the_label_is_the_least_suppression_that_does():
    shown = torch.tensor([[0.1, 0.9, 0.9, 0.9], [0.1, 0.4, 0.4, 0.8], [0.1, 0.1, 0.3, 0.7]])
    kept = torch.tensor([[0.3, 0.3, 0.3, 0.3], [0.3, 0.29, 0.2, 0.3], [0.3, 0.1, 0.29, 0.3]])
    asked = []

    def seen(scale, which):
        asked.append((scale, which.tolist()))
        return shown[int(-scale), which], kept[int(-scale), which]

    assert search((0.0, -1.0, -2.0), seen, 4, 0.5, 0.02).tolist() == [0, -1, -2, -2]
    assert asked == [(0.0, [0, 1, 2, 3]), (-1.0, [1, 2, 3]), (-2.0, [2, 3])]  # who has a label is drawn no more


def test_of_near_concepts_the_stronger_is_injected():
    near = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    inhibitors = Inhibitors(torch.zeros(3, 4, 2), torch.zeros(3, 4), torch.tensor([0, 0, 1, 2]), near)
    growth = torch.tensor([[-1.0, -1.0, -2.0, -0.1], [-3.0, -3.0, -2.0, -0.1], [-2.0, -2.0, -2.0, 1.0]])
    kept = torch.tensor([[0, 0, -2.0, -0.1], [-3.0, -3.0, 0, -0.1], [-2.0, -2.0, 0, 1.0]])
    assert torch.equal(stronger(growth, inhibitors), kept)


class Judge:
    """In place of CLIP: sees the concept unless the picture is dark."""

    def __init__(self, name, architecture, pretrained, texts):
        self.name, self.texts = name, texts

    def score(self, images, prompts):
        red = images.float().mean((1, 2, 3)).numpy() / 255
        return {"own": np.ones(len(images)), "texts": np.stack([red] * len(self.texts), 1)}


def test_fit_learns_an_adapter_that_attacks_can_look_through(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(gie, "Clip", Judge)
    eraser = GIE(prompts=4, kept=2, captions=1, scales=(0, -2), shown=0.4, epochs=50, guidance=2.0, ddim_steps=2)
    eraser.fit(tiny, BRIEF, tmp_path, 0)
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert len(labels) == 7 and {w for _, w in labels} <= {0.0, -2.0}
    embeds = tiny.text_encoder.get_input_embeddings()(tiny.tokenize(["a cat"])).detach().requires_grad_(True)
    with eraser.apply(tiny, tmp_path):
        context, z = tiny.encode(ids=tiny.tokenize(["a cat"]), token_embeds=embeds), tiny.noise([0])
        state = tiny.begin(context, z)
        state["attention"]["growth"].sum().backward()
    assert state["attention"]["growth"].shape == (1, 6) and embeds.grad.abs().sum() > 0


# -- the released code --------------------------------------------------------------------------------------------------


def test_p2p_needs_a_scale():
    with pytest.raises(ErasebenchError, match="scale"):
        GIE(variant="p2p")


def test_p2p_draws_the_plain_image_beside(tiny, tmp_path):
    """The other branch is the base's own trajectory of the plain prompt."""
    eraser, sampler = GIE(variant="p2p", scale=-2.0), Sampler("ddim", 4, 3.0)
    eraser.fit(tiny, BRIEF, tmp_path, 0)
    context = tiny.encode(["a cat", "the sea"])
    tiny.latents(context, [0, 1], sampler, plain := [])
    with eraser.apply(tiny, tmp_path), torch.no_grad():
        scheduler, z = tiny.scheduler(sampler), tiny.noise([0, 1])
        state = tiny.begin(context, z)
        for t, expected in plain:
            eps = tiny.guided_eps(z, t, context, 3.0, state)
            torch.testing.assert_close(state["other"][0], expected, rtol=1e-3, atol=1e-4)
            z = scheduler.step(eps, t, z, return_dict=False)[0]
    assert (z - tiny.latents(context, [0, 1], sampler)).abs().max() > 1e-3


def test_p2p_names_the_concept_after_the_prompt(tiny, tmp_path):
    brief = Brief((Concept("cat", "object"),))
    eraser = GIE(variant="p2p", scale=-2.0)
    eraser.fit(tiny, brief, tmp_path, 0)
    context = tiny.encode(["the sea", "a road that is far too long for it"])
    with eraser.apply(tiny, tmp_path):
        state = tiny.begin(context, tiny.noise([0, 1]))
    assert torch.equal(state["named"].ids[0], tiny.tokenize(["the sea cat"])[0])
    assert state["named"].ids[1, -1] == tiny.tokenizer.eos_token_id
    growth, stays = state["cross"]
    end = int(context.ends[0])
    assert growth.shape == (2, 3) and stays[0].tolist() == [1] * (end + 1) + [0] * 3 + [1] * (24 - end - 4)


def test_p2p_takes_the_others_map(tiny):
    """One cross-attention layer by hand: the other's map on the image's values, and the weighted columns."""
    concept, attn = tiny.encode(["cat"]), module(tiny, layers(tiny)[0])
    x = torch.randn(4, 9, attn.to_q.in_features, generator=torch.Generator().manual_seed(0))
    rows = tiny.encode(["", "", "a sea", "a sea cat"]).hidden
    growth, stays = torch.tensor([[-2.0, 0.5, 3.0]]), (torch.arange(24)[None] != 5).float()
    got = gie.Following(concept, True)(attn, x, rows, cross=(growth, stays))
    plain = gie.Following(concept, True)(attn, x, rows)
    torch.testing.assert_close(got[:3], plain[:3])
    width = attn.to_q.out_features // attn.heads
    heads = lambda y: y.view(y.shape[0], attn.heads, width).transpose(0, 1)
    m = (heads(attn.to_q(x[2])) @ heads(attn.to_k(rows[2])).mT / width**0.5).softmax(-1) * stays[0]
    star = (heads(attn.to_q(x[3])) @ heads(attn.to_k(concept.hidden[0])).mT / width**0.5).softmax(-1)[..., 1:4]
    read = m @ heads(attn.to_v(rows[3])) + (star * growth[0]) @ heads(attn.to_v(concept.hidden[0, 1:4]))
    torch.testing.assert_close(got[3], attn.to_out[0](read.transpose(0, 1).flatten(1)), rtol=1e-4, atol=1e-5)
