"""AdvUnlearn's attack and its loss against computations by hand; what it keeps, and what it trains."""

from dataclasses import replace

import pytest
import torch
from erasebench.methods.adv_unlearn import AdvUnlearn, before
from erasebench.methods.esd import ESD
from safetensors.torch import load_file

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, ErasebenchError
from erasebench.toolbox import vocabulary
from erasebench.toolbox.search import Slots, table, with_vectors, words

BRIEF = Brief((Concept("cat", "object", "sky", ("kitty",)),), ("dog", "sun"), ("a mat", "a cat", "the sea"), ("a {c}",))
SMALL = dict(
    steps=1, warmup=0, batch=2, lr=1e-3, retain_batch=2, retained=3, attack_steps=2, ddim_steps=3, trajectories=2
)


def test_what_is_kept_names_nothing_that_is_erased():
    brief = replace(BRIEF, captions=("a cat", "cats at sea", "the Kitty sat", "a mat"))
    assert vocabulary.ordinary(brief) == ["cats at sea", "a mat"]
    kept = vocabulary.kept_prompts(brief, 10, torch.Generator().manual_seed(0))
    assert sorted(kept) == ["a dog", "a mat", "a sun", "cats at sea"]
    assert [text in ("a dog", "a sun") for text in kept] == [True, False] * 2
    with pytest.raises(ErasebenchError, match="nothing is named that is kept"):
        vocabulary.kept_prompts(replace(brief, preserved=(), captions=("a cat",)), 10, torch.Generator())


def test_words_of_the_attack_stand_before_the_prompt(tiny):
    made = before(tiny.encode(["cat", "dog"]), 2)
    plain = tiny.tokenize(["cat", "dog"])
    assert made.free.tolist() == [[False, True, True] + [False] * 21] * 2
    assert torch.equal(made.ids[:, 3:], plain[:, 1:-2]) and torch.equal(made.ids[:, 0], plain[:, 0])


def test_the_attack_is_adam_on_the_revival_by_hand(tiny):
    """Fresh gradients in each step; the embeddings that come back are those after the last."""
    eraser = AdvUnlearn(**{**SMALL, "batch": 1, "attack_lr": 0.1})
    concept, draw = tiny.encode(["cat"]), torch.Generator().manual_seed(3)
    states = list(eraser.states(tiny, concept, 1, 2, 2, torch.Generator().manual_seed(5)))
    found = eraser.attack(tiny, iter(states), draw)
    known = words(tiny)
    v = table(tiny)[known[torch.randint(len(known), (1,), generator=torch.Generator().manual_seed(3))]].clone()
    ids = torch.cat([concept.ids[:, :1], concept.ids[:, :1], concept.ids[:, 1:-1]], 1)
    free = torch.arange(ids.shape[1])[None] == 1
    mean, square = torch.zeros_like(v), torch.zeros_like(v)
    for k, state in enumerate(states, 1):
        v.requires_grad_(True)
        eps = tiny.eps(state.z, state.t, with_vectors(tiny, Slots(ids, free), v))
        (g,) = torch.autograd.grad((eps - tiny.eps(state.z, state.t, concept)).square().mean(), v)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        v = v.detach() - 0.1 * (mean / (1 - 0.9**k)) / ((square / (1 - 0.999**k)).sqrt() + 1e-8)
    torch.testing.assert_close(found, v, rtol=1e-3, atol=1e-3)


def test_the_attack_brings_the_concept_back(tiny):
    eraser = AdvUnlearn(**{**SMALL, "batch": 1, "attack_steps": 60, "attack_lr": 0.05})
    concept, draw = tiny.encode(["cat"]), torch.Generator().manual_seed(0)
    states = list(eraser.states(tiny, concept, 1, 2, 60, draw))
    with tiny.changed(weights={n: 1.5 * tiny.weight(n) for n in tiny.names(r"text_encoder.*v_proj\.weight")}):
        first = table(tiny)[words(tiny)[:1]]
        found = eraser.attack(tiny, iter(states), draw)
        hurt = lambda v: sum(float(eraser.revival(tiny, s, v)) for s in states)
        with torch.no_grad():
            assert hurt(found) < 0.9 * hurt(first)


@pytest.mark.parametrize("warmup", [0, 1])
def test_one_step_by_hand(tiny, tmp_path, warmup):
    """ESD's loss on the attacked prompt (before it: on the plain one) and what is kept; Adam's first step is lr * sign."""
    eraser = AdvUnlearn(**{**SMALL, "warmup": warmup}, eta=2.0, retain_scale=0.7)
    eraser.fit(tiny, BRIEF, tmp_path, seed=4)
    trained = load_file(tmp_path / "weights.safetensors")
    assert set(trained) == {n for n in tiny.names("^text_encoder") if "embedding" not in n}
    draw = torch.Generator().manual_seed(4)
    texts = vocabulary.kept_prompts(BRIEF, 3, draw)
    concept, retained = tiny.encode(["cat"]), tiny.encode(texts)
    towards = eraser.states(tiny, concept, 2, 2, 1 + 2 * (1 - warmup), draw)
    kept = eraser.states(tiny, retained, 2, 3, 1, draw)
    torch.randint(1, (), generator=draw)
    adversary = None if warmup else eraser.attack(tiny, towards, draw)
    state, other = next(towards), next(kept)
    free = tiny.eps(state.z, state.t, tiny.encode([""]).repeat(2))
    text, before_ = tiny.eps(state.z, state.t, concept.repeat(2)), tiny.eps(other.z, other.t, other.context)
    with tiny.training(sorted(trained)) as weights:
        prompt = tiny.encode(["cat", "cat"])
        if adversary is not None:
            prompt = with_vectors(tiny, before(concept.repeat(2), 1), adversary)
        forget = (tiny.eps(state.z, state.t, prompt) - (3 * free - 2 * text)).square().mean()
        now = tiny.eps(other.z, other.t, tiny.encode(ids=other.context.ids))
        (forget + 0.7 * (now - before_).square().mean()).backward()
        for name, parameter in weights.items():
            moved = parameter.grad.abs() > 1e-5
            expected = parameter.data - 1e-3 * parameter.grad.sign()
            torch.testing.assert_close(trained[name][moved], expected[moved], atol=2e-5, rtol=1e-4)


def test_every_concept_is_attacked_on_its_own_latents(tiny, tmp_path, monkeypatch):
    seen = []
    plain = ESD.frozen

    def watched(self, model, contexts, generator):
        for state in plain(self, model, contexts, generator):
            seen.append(state.context.ids.unique(dim=0).shape[0])
            yield state

    monkeypatch.setattr(ESD, "frozen", watched)
    brief = replace(BRIEF, concepts=(*BRIEF.concepts, Concept("dog", "object", "sky")), preserved=(), captions=("sea",))
    AdvUnlearn(**{**SMALL, "steps": 4, "retain_batch": 1}).fit(tiny, brief, tmp_path, 0)
    assert len(seen) == 4 * (2 + 1 + 1) and set(seen) == {1}


def test_a_long_concept_leaves_no_room(tiny, tmp_path):
    brief = replace(BRIEF, concepts=(Concept("x" * 22, "object", "sky"),))
    with pytest.raises(ErasebenchError, match="no room"):
        AdvUnlearn(**SMALL).fit(tiny, brief, tmp_path, 0)


def test_it_conforms(tiny):
    eraser = AdvUnlearn(**{**SMALL, "steps": 4, "warmup": 1, "lr": 1e-2})
    assert [line for line in check(eraser, tiny, BRIEF, ["a cat", "one cat", "the cat"]) if line[1]] == []
