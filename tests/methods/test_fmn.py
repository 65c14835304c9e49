"""Forget-Me-Not's loss and positions by hand, its step, and the concept called by learnt embeddings."""

import pytest
import torch
from erasebench.methods.fmn import FMN, GROUPS, attention
from safetensors.torch import load_file

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, Sampler
from erasebench.tasks import seed_of
from erasebench.toolbox.attention import layers, maps
from erasebench.toolbox.inversion import Inversion, textual_inversion
from erasebench.toolbox.search import noisy, slots, table, tokens, with_placeholder, with_vectors
from erasebench.toolbox.training import noised

BRIEF = Brief((Concept("cat", "object", "sky"), Concept("tom", "object", "sea")), templates=("a {c}", "one {c} here"))
TINY = dict(steps=1, batch=2, lr=1e-3, images=3, ddim_steps=2)


def test_one_norm_of_all_maps(tiny):
    seen = {
        "fine": torch.arange(2 * 2 * 4 * 3, dtype=torch.float32).view(2, 2, 4, 3),
        "coarse": torch.full((2, 2, 1, 3), 2.0),
    }
    silenced = torch.tensor([[False, True, False], [True, False, True]])
    total = 0.0
    for i in range(2):
        square = 0.0
        for probabilities in seen.values():
            for token in (0, 1, 2):
                if silenced[i, token]:
                    square += float(probabilities[i, :, :, token].square().sum())
        total += square**0.5 / 2
    assert float(attention(seen, silenced)) == pytest.approx(total)


@pytest.mark.parametrize("silenced", ["concept", "concept_and_end"])
def test_positions_and_pictures(tiny, silenced):
    """In "one cat here" a letter is a token; BOS is first."""
    shown = FMN(**TINY, silenced=silenced).shown(tiny, "cat", BRIEF.templates, 5)
    ends = silenced == "concept_and_end"
    assert [row.nonzero().flatten().tolist() for row in shown.silenced] == [
        [2, 3, 4, *(range(5, 24) if ends else ())],  # padding is EOS
        [4, 5, 6, *(range(11, 24) if ends else ())],
    ]
    texts, sampler = ["a cat", "one cat here", "a cat"], Sampler("ddim", 2, 7.5)
    seeds = [seed_of("fmn image", 5, "cat", i) for i in range(3)]
    assert torch.equal(shown.latents, tiny.latents(tiny.encode(texts), seeds, sampler))
    assert [tiny.tokenizer.decode(shown.one(i)[1].ids[0], skip_special_tokens=True) for i in range(3)] == texts


def test_where_padding_is_another_token_eos_alone_is_silenced(tiny):
    """As in Stable Diffusion 2."""
    tiny.tokenizer.pad_token = "!"
    shown = FMN(**TINY).shown(tiny, "cat", BRIEF.templates, 5)
    assert [row.nonzero().flatten().tolist() for row in shown.silenced] == [[2, 3, 4, 5], [4, 5, 6, 11]]


@pytest.mark.parametrize("trained", GROUPS)
def test_one_step_by_hand(tiny, tmp_path, trained):
    """AdamW's first step. What no map depends on stays, its decay too."""
    fmn = FMN(**TINY, trained=trained)
    fmn.fit(tiny, BRIEF, tmp_path, seed=6)
    learnt, draw = load_file(tmp_path / "weights.safetensors"), torch.Generator().manual_seed(6)
    concepts, pictures = (torch.randint(high, (2,), generator=draw).tolist() for high in (2, 3))
    both = [fmn.shown(tiny, c.name, BRIEF.templates, 6) for c in BRIEF.concepts]
    x, t, _ = noised(tiny, torch.stack([both[c].latents[i] for c, i in zip(concepts, pictures, strict=True)]), draw)
    still = 0
    with tiny.training(tiny.names(GROUPS[trained])) as weights:
        loss = 0.0
        for k in range(2):
            name, template = BRIEF.concepts[concepts[k]].name, BRIEF.templates[pictures[k] % 2]
            context = tiny.encode([template.replace("{c}", name)])
            first = template.index("{c}") - template[: template.index("{c}")].count(" ") + 1
            where = [*range(first, first + 3), *range(int(context.ends[0]), 24)]
            seen = maps(tiny, x[k : k + 1], t[k : k + 1], context)
            assert list(seen) and set(seen) == set(layers(tiny))
            loss = loss + sum(m[0, :, :, where].square().sum() for m in seen.values()).sqrt() / 2
        loss.backward()
        assert set(learnt) == set(weights)
        for name, p in weights.items():
            if p.grad is None:
                still += 1
                assert torch.equal(learnt[name], p.data)
                continue
            moved = p.grad.abs() > 1e-5
            expected = p.data * (1 - 1e-3 * 0.01) - 1e-3 * p.grad.sign()
            torch.testing.assert_close(learnt[name][moved], expected[moved], atol=2e-5, rtol=1e-4)
    assert still and any("conv_in" in n for n in learnt) == (trained == "full")


def test_it_takes_attention_away(tiny, tmp_path):
    fmn = FMN(**{**TINY, "steps": 8, "lr": 3e-3})
    shown = fmn.shown(tiny, "cat", BRIEF.templates, 0)
    where = tiny.noise([1]), torch.tensor([400]), shown.contexts.select(slice(1))
    fmn.fit(tiny, BRIEF, tmp_path, 0)
    with torch.no_grad():
        before = attention(maps(tiny, *where), shown.silenced[:1])
        with fmn.apply(tiny, tmp_path):
            assert attention(maps(tiny, *where), shown.silenced[:1]) < 0.9 * before


def test_learnt_embeddings_stand_in_for_the_name(tiny):
    fmn = FMN(**TINY, inversion_steps=2, inversion_tokens=4, inversion_lr=1e-5)
    plain, shown = FMN(**TINY).shown(tiny, "cat", BRIEF.templates, 5), fmn.shown(tiny, "cat", BRIEF.templates, 5)
    assert torch.equal(shown.latents, plain.latents)
    assert shown.silenced[0].nonzero().flatten().tolist() == [2, 3, 4, 5, *range(6, 24)]
    rows = [with_placeholder(tiny, text, 4) for text in ("a <*>", "one <*> here")]
    start = table(tiny)[[*tokens(tiny, "cat"), tokens(tiny, "cat")[0]]]
    untrained = with_vectors(tiny, slots(tiny, rows), start.repeat(2, 1)).hidden
    assert (
        not torch.allclose(shown.contexts.hidden, untrained, rtol=0, atol=1e-6)
        and not shown.contexts.hidden.requires_grad
    )
    torch.testing.assert_close(shown.contexts.hidden, untrained, atol=0.02, rtol=0)


def test_several_embeddings_are_inverted_together(tiny):
    latents = tiny.noise([3]) * 0.1
    rows = [with_placeholder(tiny, text, 2) for text in ("a <*>", "one <*> here")]
    start = table(tiny)[tokens(tiny, "ca")]
    learn = lambda steps: textual_inversion(
        tiny, latents, ("a {c}", "one {c} here"), start, Inversion(steps, 4, 5e-2, 0)
    )
    assert torch.equal(learn(0), start)
    t, noise = torch.arange(50, 1000, 50), tiny.noise(range(19))

    def gap(vectors):
        context = with_vectors(tiny, slots(tiny, rows[:1]), vectors).repeat(19)
        with torch.no_grad():
            return float(
                (tiny.eps(noisy(tiny, latents.repeat(19, 1, 1, 1), t, noise), t, context) - noise).square().mean()
            )

    learnt = learn(40)
    assert gap(learnt) < gap(start) and not torch.equal(learnt[0] - start[0], learnt[1] - start[1])


@pytest.mark.parametrize("values", [{}, {"trained": "x", "silenced": "concept", "inversion_steps": 2}])
def test_it_conforms(tiny, values):
    fmn = FMN(**{**TINY, "steps": 3, "lr": 1e-2, **values})
    assert [line for line in check(fmn, tiny, BRIEF, ["a cat", "one cat", "tom"]) if line[1]] == []
