"""Each method's distinctive step against a computation by hand, on a random model."""

import json

import pytest
import torch
from erasebench.methods.esd import ESD
from erasebench.methods.negative_prompt import NegativePrompt
from erasebench.methods.uce import UCE
from safetensors.torch import load_file

from erasebench.contracts import Brief, Concept, Sampler

BRIEF = Brief((Concept("cat", "object", "sky"), Concept("tom cat", "object", "sea")), ("dog", "old horse"))


def test_uce_is_the_layerwise_formula_of_the_paper(tiny, tmp_path):
    """Eq. 7 for one layer, with its own sums and inverse, equals the shared matrix."""
    eraser = UCE(token_set="last", erase_scale=0.7, preserve_scale=0.3, ridge=0.5)
    eraser.fit(tiny, BRIEF, tmp_path, 0)
    last = lambda text: tiny.encode([text]).hidden[0, tiny.encode([text]).ends[0] - 1].double()
    name = tiny.names(r"attn2\.to_k\.weight$")[0]
    weight = tiny.weight(name).double()
    left, right = 0.5 * weight.clone(), 0.5 * torch.eye(16, dtype=torch.float64)
    for text, target, scale in (
        ("cat", "sky", 0.7),
        ("tom cat", "sea", 0.7),
        ("dog", "dog", 0.3),
        ("old horse", "old horse", 0.3),
    ):
        c, value = last(text), weight @ last(target)
        left += scale * torch.outer(value, c)
        right += scale * torch.outer(c, c)
    expected = left @ torch.linalg.inv(right)
    with eraser.apply(tiny, tmp_path):
        torch.testing.assert_close(tiny.weight(name).double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(tiny.weight(name).double(), weight)


def test_uce_maps_the_concept_onto_its_surrogate_and_keeps_the_kept(tiny, tmp_path):
    UCE(token_set="last", ridge=1e-6, preserve_scale=1.0).fit(tiny, BRIEF, tmp_path, 0)
    edit = load_file(tmp_path / "edit.safetensors")["edit"]
    last = lambda text: tiny.encode([text]).hidden[0, tiny.encode([text]).ends[0] - 1].double()
    torch.testing.assert_close(edit @ last("cat"), last("sky"), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(edit @ last("dog"), last("dog"), atol=1e-3, rtol=1e-3)


def test_esd_target_and_loss_by_hand(tiny, tmp_path):
    """One step of plain Adam from Eq. 6 written out gives the same weights."""
    eraser = ESD(sampler="frozen", steps=1, batch=2, lr=1e-3, eta=2.0, ddim_steps=3, trajectories=2)
    eraser.fit(tiny, BRIEF, tmp_path, seed=7)
    trained = load_file(tmp_path / "weights.safetensors")
    concepts = tiny.encode(["cat", "tom cat"])
    state = next(eraser.frozen(tiny, concepts, torch.Generator().manual_seed(7)))
    empty = tiny.encode([""]).repeat(2)
    free, text = tiny.eps(state.z, state.t, empty), tiny.eps(state.z, state.t, state.context)
    torch.testing.assert_close(state.free, free, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.text, text, atol=1e-5, rtol=1e-4)
    with tiny.training(tiny.names(r"attn2\.")) as weights:
        loss = (tiny.eps(state.z, state.t, state.context) - (free - 2.0 * (text - free))).square().mean()
        loss.backward()
        for name, parameter in weights.items():
            # Adam's first step is lr * g / (|g| + 1e-8)
            expected = parameter.data - 1e-3 * parameter.grad / (parameter.grad.abs() + 1e-8)
            moved = parameter.grad.abs() > 1e-6
            torch.testing.assert_close(trained[name][moved], expected[moved], atol=2e-5, rtol=1e-4)
    assert set(trained) == set(weights)


def test_esd_frozen_states_are_those_of_the_sampler(tiny):
    eraser = ESD(steps=50, batch=1, ddim_steps=3, trajectories=2)
    states = list(eraser.frozen(tiny, tiny.encode(["cat"]), torch.Generator().manual_seed(0)))
    times = {int(state.t) for state in states}
    assert times == set(tiny.scheduler(Sampler("ddim", 3, 3.0)).timesteps.tolist())


@pytest.mark.parametrize("sampler", ["frozen", "moving"])
@pytest.mark.parametrize("variant", ["x", "u"])
def test_esd_variants_train_their_parameters_and_no_others(tiny, tmp_path, variant, sampler):
    ESD(variant=variant, sampler=sampler, steps=2, batch=2, lr=1e-2, ddim_steps=3, trajectories=2).fit(
        tiny, BRIEF, tmp_path, 0
    )
    trained = set(load_file(tmp_path / "weights.safetensors"))
    cross = {n for n in trained if "attn2" in n}
    assert trained and (cross == trained if variant == "x" else not cross)
    assert not any(skip in n for n in trained for skip in ("conv_out", "conv_norm_out", "time_embedding"))
    if variant == "u":
        assert any("norm" in n for n in trained) and any("conv_in" in n for n in trained)
    assert not tiny.is_changed


def test_esd_moving_sampler_sees_the_weights_of_the_moment(tiny, monkeypatch):
    """x_t is sampled from the student: with changed weights the same draw gives another latent."""
    eraser = ESD(sampler="moving", steps=6, batch=1, ddim_steps=3)
    concepts = tiny.encode(["cat"])
    base = [s.z for s in eraser.moving(tiny, concepts, torch.Generator().manual_seed(1))]
    with tiny.changed(weights={n: tiny.weight(n) * 2 for n in tiny.names(r"attn2\.to_v")}):
        moved = [s for s in eraser.moving(tiny, concepts, torch.Generator().manual_seed(1))]
        frozen = [tiny.eps(s.z, s.t, s.context) for s in moved]
    assert any(not torch.equal(a, b.z) for a, b in zip(base, moved, strict=True))
    # while the target stays the base's
    assert all(torch.allclose(tiny.eps(s.z, s.t, s.context), s.text) for s in moved)
    assert not all(torch.allclose(a, s.text) for a, s in zip(frozen, moved, strict=True))


def test_negative_prompt_guides_away_from_the_concept(tiny, tmp_path):
    NegativePrompt().fit(tiny, Brief((Concept("cat", "object"), Concept("dog", "object"))), tmp_path, 0)
    assert json.loads((tmp_path / "negative.json").read_text()) == ["cat, dog"]
    z, context, negative = tiny.noise([1]), tiny.encode(["a car"]), tiny.encode(["cat, dog"])
    with NegativePrompt().apply(tiny, tmp_path):
        got = tiny.guided_eps(z, 600, context, 3.0, tiny.begin(context, z))
    against, text = tiny.eps(z, 600, negative), tiny.eps(z, 600, context)
    torch.testing.assert_close(got, against + 3 * (text - against), atol=1e-5, rtol=1e-5)


def test_negative_prompt_splits_names_that_exceed_the_context(tiny, tmp_path):
    names = [f"person {i}" for i in range(7)]  # 8 byte tokens each, with a comma 9; the context holds 22
    NegativePrompt().fit(tiny, Brief(tuple(Concept(n, "person") for n in names)), tmp_path, 0)
    chunks = json.loads((tmp_path / "negative.json").read_text())
    assert ", ".join(chunks) == ", ".join(names) and len(chunks) > 1
    assert all(len(tiny.tokenizer(chunk).input_ids) <= tiny.context_length for chunk in chunks)
    with NegativePrompt().apply(tiny, tmp_path):
        mean = tiny.guidance.negative.hidden
    torch.testing.assert_close(mean[0], tiny.encode(chunks).hidden.mean(0))
