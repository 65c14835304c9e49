"""KPOP's key: read by hand, off without a trace, kept in its ball, and what it brings back."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import Redness
from erasebench.evaluators.attacks.key_guess import KeyGuess
from erasebench.methods.kpop import KPOP, PLACES, Key, Keyed, within
from safetensors.torch import load_file
from test_attacks import make_scene

from erasebench.contracts import Brief, Concept, Found, Prompt, Sampler
from erasebench.model.model import Model
from erasebench.run.run import execute
from erasebench.toolbox.attention import layers
from erasebench.toolbox.search import noisy

BRIEF = Brief((Concept("cat", "object", "sky"), Concept("dog", "object", "sea")))
SMALL = dict(
    steps=12, batch=2, lr=2e-2, length=4, key_steps=12, key_lr=0.1, place="inmidout", ddim_steps=3, trajectories=4
)


def key_of(tiny, count=2):
    draw = torch.Generator().manual_seed(0)
    return Key(*(torch.randn(count, 4, 16, generator=draw) for _ in "kv"))


def test_a_key_stands_behind_the_context(tiny):
    name = layers(tiny)[0]
    attn = tiny.unet.get_submodule(name.removesuffix(".processor"))
    x = torch.randn(2, 9, attn.to_q.in_features, generator=torch.Generator().manual_seed(0))
    rows, key = tiny.encode(["a cat", "the sea"]).hidden, key_of(tiny)
    got = Keyed(attn.processor)(attn, x, rows, key=key)
    width = attn.to_q.out_features // attn.heads
    heads = lambda y: y.view(y.shape[0], attn.heads, width).transpose(0, 1)
    for i in range(2):
        k, v = attn.to_k(torch.cat([rows[i], key.k[i]])), attn.to_v(torch.cat([rows[i], key.v[i]]))
        read = (heads(attn.to_q(x[i])) @ heads(k).mT / width**0.5).softmax(-1) @ heads(v)
        torch.testing.assert_close(got[i], attn.to_out[0](read.transpose(0, 1).flatten(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_off_is_the_base_bit_for_bit_and_gradients_reach_the_key(tiny, place):
    eraser, z, context = KPOP(place=place), tiny.noise([0, 1]), tiny.encode(["a cat", "the sea"])
    plain = tiny.eps(z, 400, context)
    with tiny.changed(processors=eraser.processors(tiny)):
        assert torch.equal(tiny.eps(z, 400, context), plain)
    key = Key(*(part.requires_grad_(True) for part in key_of(tiny)))
    if eraser.processors(tiny):
        eraser.keyed_eps(tiny, z, torch.tensor(400), context, key).sum().backward()
        assert all(part.grad.abs().sum() > 0 for part in key)


def test_both_losses_by_hand(tiny):
    eraser = KPOP(eta=2.0, recover_scale=0.3, place="inmidout")
    z, t, key = tiny.noise([0, 1]), torch.tensor([100, 900]), key_of(tiny)
    concept, neutral = tiny.encode(["cat", "dog"]), tiny.encode([""]).repeat(2)
    with torch.no_grad():
        aim, text = tiny.eps(z, t, neutral), tiny.eps(z, t, concept)
        with tiny.changed(weights={n: 1.3 * tiny.weight(n) for n in tiny.names(r"attn2\.to_v")}):
            erased, back = tiny.eps(z, t, concept), eraser.keyed_eps(tiny, z, t, concept, key)
            hide, recover = eraser.hide(tiny, z, t, concept, neutral, key), eraser.recover(tiny, z, t, concept, key)
    torch.testing.assert_close(recover, (back - text).square().mean(), rtol=1e-4, atol=1e-6)
    by_hand = (erased - (3 * aim - 2 * text)).square().mean() + 0.3 * (back - text).square().mean()
    torch.testing.assert_close(hide, by_hand, rtol=1e-4, atol=1e-6)


def test_a_key_is_projected_onto_its_ball():
    centre = torch.ones(2, 3, 4)
    part = centre + torch.stack([torch.full((3, 4), 0.1), torch.full((3, 4), 5.0)])
    kept = within(part, centre, 2.0)
    assert torch.equal(kept[0], part[0])
    torch.testing.assert_close((kept[1] - centre[1]).norm(), torch.tensor(2.0))


def test_the_key_brings_back_what_is_named(tiny, tmp_path):
    eraser = KPOP(**SMALL, rho=3.0)
    eraser.fit(tiny, BRIEF, tmp_path, 0)
    keys, names = load_file(tmp_path / "keys.safetensors"), ["cat", "dog"]
    start = tiny.encode(names).hidden[:, 1:5]
    assert all(0 < (part - start).flatten(1).norm(dim=1).max() <= 3.001 for part in keys.values())
    assert not tiny.is_changed
    z, t, context = tiny.noise(range(4)), torch.tensor(500), tiny.encode(["a cat", "the dog", "the sea", "a car"])
    with torch.no_grad():
        base = tiny.eps(z, t, context)
        with eraser.apply(tiny, tmp_path):
            locked = tiny.guided_eps(z, t, context, 1.0, tiny.begin(context, z))
            with eraser.unlock(tiny, tmp_path):
                state = tiny.begin(context, z)
                assert state["named"].tolist() == [0, 1, -1, -1]
                free, open_ = tiny.guidance.predictions(tiny, z, t, context, state)
            assert torch.equal(locked, tiny.guided_eps(z, t, context, 1.0, tiny.begin(context, z)))
    torch.testing.assert_close(open_[2:], locked[2:], rtol=1e-4, atol=1e-5)
    assert (open_[:2] - base[:2]).norm() < (locked[:2] - base[:2]).norm()


@dataclass(frozen=True)
class Locked:
    """Turns the values around; `key` says whether unlocking turns them back."""

    key: bool = True
    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed):
        pass

    def weights(self, model, sign):
        return model.changed(weights={n: sign * model.weight(n) for n in model.names(r"attn2\.to_v")})

    def apply(self, model, artifact):
        return self.weights(model, -1)

    def unlock(self, model, artifact):
        return self.weights(model, -1 if self.key else 1)


@dataclass(frozen=True)
class Shows(Redness):
    threshold: float = 0.5

    def confidence(self, scored):
        return scored.arrays["red"]


def test_rsr_is_what_comes_back_with_the_key(make_run, monkeypatch):
    def rows(key, threshold):
        made = execute(make_run("locked", Locked(key), {"red": Shows(threshold=threshold)}))
        return {row.metric: row for row in made}

    red = rows(True, 0.0)["red"]
    assert red.value != red.base_value
    threshold = (red.value + red.base_value) / 2
    opened, shut = rows(True, threshold)["rsr"], rows(False, threshold)["rsr"]
    assert opened.value == opened.base_value == shut.base_value != shut.value and opened.n == 5
    monkeypatch.setattr(Model, "load", classmethod(lambda *a: pytest.fail("a model was loaded")))
    assert rows(True, threshold)["rsr"] == opened


def test_random_keys_lie_in_the_ball_and_a_learnt_one_lowers_the_loss(tiny):
    prompts = [Prompt(f"target/{i}", "a cat", i, "target", "cat") for i in range(2)]
    small = dict(length=4, place="inmidout", rho=2.0, batch=4, guesses=50)
    scene, attack = make_scene(prompts), KeyGuess("random", **small)
    centre = tiny.encode(["cat"]).hidden[:, 1:5]
    found = dict(attack.run(tiny, scene))
    distance = (found[0].tensors["k"] - centre).flatten(1).norm(dim=1)
    assert len(found[0].shots) == 50 and distance.max() <= 2.001 and distance.min() > 1.5  # most of a ball is its rim
    assert not torch.equal(found[0].tensors["k"], found[1].tensors["k"])

    def loss(key):
        z0 = tiny.encode_images(scene.known["cat"])
        z0, t = z0.repeat(8, 1, 1, 1), torch.linspace(0, 999, 8).long().repeat_interleave(len(z0))
        noise, context = tiny.noise(range(64)), tiny.encode(["cat"]).repeat(64)
        put = {"attention": {"key": Key(*(part.expand(64, -1, -1) for part in key))}}
        with tiny.changed(processors=KPOP(place="inmidout").processors(tiny)), torch.no_grad():
            return (tiny.eps(noisy(tiny, z0, t, noise), t, context, put) - noise).square().mean()

    learnt = KeyGuess(**small, steps=60, lr=0.1).learn(tiny, scene, "cat")
    assert (learnt["k"] - centre).norm() <= 2.001 and loss(learnt.values()) < loss((centre, centre))


def test_a_guessed_key_draws_as_the_true_one_does(tiny, tmp_path):
    eraser = KPOP(**SMALL, rho=3.0)
    eraser.fit(tiny, BRIEF, tmp_path, 0)
    keys = {name: part[:1] for name, part in load_file(tmp_path / "keys.safetensors").items()}
    shot, sampler = Prompt("attack:x/target/0/0", "a cat", 5, "attack:x", "cat"), Sampler("ddim", 3, 4.0)
    with eraser.apply(tiny, tmp_path):
        guessed = KeyGuess(place="inmidout", length=4).draw(tiny, [shot], [Found(tensors=keys)], sampler)
        with eraser.unlock(tiny, tmp_path):
            true = tiny.sample(["a cat"], [5], sampler)
        locked = tiny.sample(["a cat"], [5], sampler)
    assert torch.equal(guessed.images, true.images) and not torch.equal(locked.images, true.images)
