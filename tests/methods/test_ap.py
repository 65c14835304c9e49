"""Adversarial preservation: its search, its candidates and its losses against computations by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from erasebench.methods.age import AGE
from erasebench.methods.ap import AP, distance
from safetensors.torch import load_file

from erasebench.contracts import Brief, Concept, ErasebenchError, Sampler
from erasebench.model.model import Model
from erasebench.model.source import Source
from erasebench.toolbox import vocabulary
from erasebench.toolbox.trajectory import Along

BRIEF = Brief(
    (Concept("cat", "object", "sky", ("kitty",)), Concept("dog", "object", "sea")),
    captions=("a cat on a mat", "the sea"),
)
WORDS = ("sun", "moon", "star", "sand", "rain", "snow")
SMALL = dict(
    steps=1, batch=2, lr=1e-3, vocabulary=WORDS, nearest=6, centres=3, ddim_steps=3, trajectories=4, start_guidance=2.0
)


def test_candidates_leave_out_what_is_erased(tiny):
    assert vocabulary.words(tiny, BRIEF, "captions") == ["mat", "sea", "the"]
    assert vocabulary.words(tiny, BRIEF, ["Kitty", "sun", "sun", "tom cat"]) == ["sun", "tom cat"]
    with pytest.raises(ErasebenchError, match="no word"):
        vocabulary.words(tiny, BRIEF, ["cat", "dog"])


def test_candidates_are_the_nearest_thinned_by_their_distance(tiny):
    whole = lambda text: tiny.encode([text]).hidden.double().flatten()
    far = {word: float((whole(word) - whole("cat")).norm()) for word in WORDS}
    ranked = sorted(WORDS, key=far.get)
    assert vocabulary.candidates(tiny, WORDS, "cat", 4, 10) == ranked[:4]
    two = vocabulary.candidates(tiny, WORDS, "cat", 6, 2)
    # two clusters of numbers in a row are a cut; the best cut has the least squared error
    values = [far[word] for word in ranked]
    mean = lambda some: sum(some) / len(some)
    cost = lambda cut: sum(sum((v - mean(part)) ** 2 for v in part) for part in (values[:cut], values[cut:]))
    best = min(range(1, 6), key=cost)
    off = lambda word, part: abs(far[word] - mean([far[w] for w in part]))
    for word, part in zip(two, (ranked[:best], ranked[best:]), strict=True):  # of two in a cluster both are as near
        assert word in part and off(word, part) == pytest.approx(min(off(w, part) for w in part))
    assert len(set(vocabulary.candidates(tiny, WORDS, "cat", 6, 5))) == 5


def test_means_of_clusters():
    values = torch.tensor([0.0, 0.2, 1.0, 1.1, 5.0], dtype=torch.float64)
    torch.testing.assert_close(vocabulary.means(values, 3), torch.tensor([0.1, 1.05, 5.0], dtype=torch.float64))


def test_a_hard_draw_is_a_word_and_its_gradient_is_that_of_the_softmax(tiny):
    choice = vocabulary.Choice(tiny, [list(WORDS[:3])], torch.Generator().manual_seed(3), temperature=2.0)
    word, number = choice.draw(torch.tensor([0]))
    assert torch.equal(word.hidden.detach().round(decimals=5), choice.contexts.hidden[number].round(decimals=5))
    (slope,) = torch.autograd.grad(word.hidden.sum(), choice.logits)
    uniform = torch.rand(1, 3, generator=torch.Generator().manual_seed(3))
    logits = torch.zeros(1, 3, requires_grad=True)
    soft = ((logits - (-uniform.log()).log()) / 2.0).softmax(1)
    assert int(soft.argmax()) == int(number)
    (by_hand,) = torch.autograd.grad((soft[0] * choice.contexts.hidden.sum((1, 2))).sum(), logits)
    torch.testing.assert_close(slope, by_hand, rtol=1e-4, atol=1e-5)


def test_a_mixture_is_of_the_likeliest_words(tiny):
    choice = vocabulary.Choice(tiny, [list(WORDS)], torch.Generator().manual_seed(0), temperature=1.0, mixed=2)
    word, number = choice.draw(torch.tensor([0]))
    uniform = torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    top, place = (-(-uniform.log()).log()).softmax(1)[0].topk(2)
    by_hand = ((top / top.sum())[:, None, None] * choice.contexts.hidden[place]).sum(0)
    torch.testing.assert_close(word.hidden[0].detach(), by_hand, rtol=1e-4, atol=1e-5)
    assert int(number) == int(place[0])


def planted(tiny, word):
    """Projections that answer one word's own direction otherwise, and hardly any other's."""
    gram = lambda texts: tiny.encode(texts).hidden.flatten(0, 1).T @ tiny.encode(texts).hidden.flatten(0, 1)
    others = gram([text for text in WORDS if text != word])
    values, vectors = torch.linalg.eig(torch.linalg.inv(others) @ gram([word]))
    direction = torch.nn.functional.normalize(vectors[:, values.real.argmax()].real, dim=0)
    names = tiny.names(r"attn2\.to_v\.weight$")
    return {
        name: tiny.weight(name) + 4.0 * torch.outer(torch.ones(len(tiny.weight(name))), direction) for name in names
    }


@pytest.mark.parametrize("word", ["snow"])
def test_the_search_finds_the_word_that_was_changed_most(tiny, word):
    generator = torch.Generator().manual_seed(0)
    choice = vocabulary.Choice(tiny, [list(WORDS)], generator, temperature=2.0, lr=0.2)
    to_word = Along(tiny, choice.contexts, Sampler("ddim", 3, 2.0), generator, 12)
    eraser = AP(space="eps", vocabulary=WORDS)
    with tiny.changed(weights=planted(tiny, word)):
        each = [
            eraser.hurt(
                tiny,
                *to_word(choice.contexts.select([i]).repeat(8), torch.full((8,), i)),
                choice.contexts.select([i]).repeat(8),
            )
            for i in range(len(WORDS))
        ]
        assert WORDS[int(torch.stack(each).argmax())] == word
        for _ in range(50):
            drawn, number = choice.draw(torch.zeros(4, dtype=torch.long))
            choice.climb(eraser.hurt(tiny, *to_word(drawn, number), drawn))
    assert choice.found()[0][0][0] == word


def test_one_step_by_hand(tiny, tmp_path):
    """L1 + lambda L2 of the released code, written out; Adam's first step is lr * g / (|g| + 1e-8)."""
    eraser = AP(**SMALL, search="random", preserve_scale=0.7, eta=2.0)
    eraser.fit(tiny, BRIEF, tmp_path, seed=5)
    trained = load_file(tmp_path / "weights.safetensors")
    assert all("attn2" in name for name in trained)
    generator = torch.Generator().manual_seed(5)
    lists = [vocabulary.candidates(tiny, WORDS, name, 6, 3) for name in ("cat", "dog")]
    choice = vocabulary.Choice(tiny, lists, generator, 2.0)
    concepts, sampler = tiny.encode(["cat", "dog"]), Sampler("ddim", 3, 2.0)
    to_concept = Along(tiny, concepts, sampler, generator, 4)
    to_word = Along(tiny, choice.contexts, sampler, generator, 4)
    which = torch.randint(2, (2,), generator=generator)
    word, number = choice.draw(which)
    word = word._replace(hidden=word.hidden.detach())
    (z, t), (z_a, t_a) = to_concept(None, which), to_word(None, number)
    c, empty = concepts.select(which), tiny.encode([""]).repeat(2)
    free, text, before = tiny.eps(z, t, empty), tiny.eps(z, t, c), tiny.eps(z_a, t_a, word)
    share = lambda t: ((1 - tiny.alphas_cumprod[t]) / tiny.alphas_cumprod[t]).view(-1, 1, 1, 1)
    with tiny.training(tiny.names(r"attn2\.")) as weights:
        l1 = (share(t) * (tiny.eps(z, t, c) - (3 * free - 2 * text)).square()).mean()
        l2 = (share(t_a) * (tiny.eps(z_a, t_a, word) - before).square()).mean()
        (l1 + 0.7 * l2).backward()
        for name, parameter in weights.items():
            moved = parameter.grad.abs() > 1e-4
            expected = parameter.data - 1e-3 * parameter.grad.sign()
            torch.testing.assert_close(trained[name][moved], expected[moved], atol=2e-5, rtol=1e-4)


def test_most_of_the_weight_is_in_the_noisiest_steps(tiny):
    t = torch.arange(0, 1000, 20)
    ones = torch.ones(1, 1, 1, 1)
    weight = torch.tensor([float(distance(tiny, "x0", ones, 0 * ones, x[None])) for x in t])
    assert weight[40:].sum() / weight.sum() == pytest.approx(0.84, abs=0.02)
    assert float(distance(tiny, "eps", ones, 0 * ones, t[:1])) == 1


@pytest.mark.parametrize(("search", "trajectories"), [("gumbel", None), ("random", 4), ("pgd", 4)])
def test_every_search_trains_and_leaves_the_base_alone(tiny, tmp_path, search, trajectories):
    AP(**{**SMALL, "trajectories": trajectories, "steps": 2}, search=search).fit(tiny, BRIEF, tmp_path, 0)
    found = json.loads((tmp_path / "words.json").read_text())
    assert set(found) == {"cat", "dog"} and math.isclose(sum(chance for _, chance in found["cat"]), 1, rel_tol=1e-5)
    assert not tiny.is_changed


def test_a_free_embedding_stays_within_its_words(tiny):
    choice = vocabulary.Free(tiny, [list(WORDS)], torch.Generator().manual_seed(0), lr=10.0)
    word, _ = choice.draw(torch.tensor([0]))
    choice.climb((word.hidden * 3).sum())
    torch.testing.assert_close(choice.embedding[0].detach(), choice.contexts.hidden.amax(0))


# -- AGE --------------------------------------------------------------------------------------------------------------


def test_age_climbs_both_terms_in_the_paper_and_one_in_the_code(tiny, tiny_folder):
    """The gradient to the word against autograd through a second, unchanged copy of the model."""
    base = Model.load(Source("tiny", tiny_folder))
    concept, word = tiny.encode(["cat"]), tiny.encode(["sun"])
    z, t = tiny.noise([1]), torch.tensor([300])
    z_t, t_t = tiny.noise([2]), torch.tensor([700])
    word = word._replace(hidden=word.hidden.detach().requires_grad_(True))
    with tiny.training(tiny.names(r"attn2\.to_v")) as weights:
        for parameter in weights.values():
            parameter.data += 0.1
        slope = lambda loss: torch.autograd.grad(loss, word.hidden)[0]
        hurt = 0.7 * (tiny.eps(z_t, t_t, word) - base.eps(z_t, t_t, word).detach()).square().mean()
        target = 2 * base.eps(z, t, word) - base.eps(z, t, concept)
        missed = (tiny.eps(z, t, concept).detach() - target).square().mean()
        gain = lambda variant: AGE(variant=variant, space="eps", preserve_scale=0.7).gain(
            tiny, (z, t), (z_t, t_t), concept, word
        )
        torch.testing.assert_close(slope(gain("code")), slope(hurt), rtol=1e-3, atol=1e-6)
        hurt = 0.7 * (tiny.eps(z_t, t_t, word) - base.eps(z_t, t_t, word).detach()).square().mean()
        torch.testing.assert_close(slope(gain("paper")), slope(hurt + missed), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode, towards", [("erase", "sun"), ("edit", "a motor car")])
def test_age_moves_the_concept_towards_the_drawn_word_or_turns_it_into_its_surrogate(mode, towards, tiny, tmp_path):
    options = {**SMALL, "steps": 25, "lr": 1e-2, "vocabulary": ("sun",), "mode": mode}
    brief = replace(BRIEF, concepts=(Concept("cat", "object", "a motor car"),))
    AGE(**options, eta=5.0 if mode == "edit" else 0.0, space="eps").fit(tiny, brief, tmp_path, 0)  # an edit has no eta
    z, t = tiny.noise(range(4)), torch.full((4,), 500)
    with torch.no_grad():
        aim, cat = (tiny.eps(z, t, tiny.encode([name]).repeat(4)) for name in (towards, "cat"))
        with AGE(**options).apply(tiny, tmp_path):
            now = tiny.eps(z, t, tiny.encode(["cat"]).repeat(4))
    assert (now - aim).norm() < 0.7 * (cat - aim).norm()
