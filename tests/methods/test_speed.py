"""SPEED against the paper's formulas written out, what it leaves as it is, and what is retained."""

from dataclasses import replace

import pytest
import torch
from erasebench.methods.speed import SPEED, last_tokens, means
from safetensors.torch import load_file

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, ErasebenchError
from erasebench.toolbox.closed_form import gram

BRIEF = Brief((Concept("cat", "object", "sky"), Concept("tom", "object", "sea")), ("dog", "horse"), ("a big red cow",))
SMALL = dict(threshold=0.05, ridge=0.3, augmented=2, centres=2)


def row(tiny, text, position):
    return tiny.encode([text]).hidden[0, position].double()


def projections(tiny, which="v"):
    return tiny.names(rf"^unet\..*attn2\.to_[{which}]\.weight$")


def fitted(speed, tiny, tmp_path, brief=BRIEF, seed=0):
    speed.fit(tiny, brief, tmp_path, seed)
    return load_file(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("invariant_ridge", [0.0, 0.5])
def test_the_edit_is_the_papers_formula(tiny, tmp_path, invariant_ridge):
    """With Q and M of its closed form, whose multipliers the code solves by a projection, or by a penalty (Woodbury)."""
    speed = SPEED(**{**SMALL, "augmented": 0, "filtered": False, "invariant_ridge": invariant_ridge})
    edited = fitted(speed, tiny, tmp_path)
    sources = torch.stack([row(tiny, "cat", 3), row(tiny, "tom", 3)]).T  # a token a letter, after BOS
    targets = torch.stack([row(tiny, "sky", 3), row(tiny, "sea", 3)]).T
    kept = [row(tiny, word, len(word)) for word in ("dog", "horse", "big", "red", "cow")]
    values, vectors = torch.linalg.eigh(sum(torch.outer(c, c) for c in kept) / 5)
    assert 0 < (values < 0.05).sum() < 16
    null = vectors[:, values < 0.05]
    p, same = null @ null.T, torch.eye(16, dtype=torch.float64)
    c2 = speed.invariants(tiny).T
    q = torch.linalg.inv(sources @ sources.T / 2 @ p + 0.3 * same)
    inner = c2.T @ p @ q @ c2
    m = same - c2 @ torch.linalg.inv(inner + invariant_ridge * torch.eye(len(inner), dtype=inner.dtype)) @ c2.T @ p @ q
    for name in projections(tiny):
        weight = tiny.weight(name).double()
        expected = weight @ ((targets - sources) @ sources.T / 2) @ p @ q @ m
        torch.testing.assert_close(edited[name].double() - weight, expected, rtol=1e-3, atol=1e-6)
        assert expected.abs().max() > 1e-3
    assert set(edited) == set(projections(tiny))


def test_what_is_retained_and_the_empty_prompts_first_output_stay(tiny, tmp_path):
    brief = Brief(BRIEF.concepts[:1], ("dog", "horse"))
    speed = SPEED(vocabulary=None, threshold=1e-9, ridge=1e-6, filtered=False, augmented=0, centres=1)
    edited = fitted(speed, tiny, tmp_path, brief)
    for name in projections(tiny):
        before, after = tiny.weight(name).double(), edited[name].double()
        moved = lambda c, b=before, a=after: float(((a - b) @ c).norm() / (b @ c).norm())
        assert max(moved(row(tiny, "dog", 3)), moved(row(tiny, "horse", 5)), moved(row(tiny, "", 0))) < 1e-5
        assert moved(row(tiny, "", slice(1, None)).mean(0)) < 1e-5
        cat, sky = row(tiny, "cat", 3), row(tiny, "sky", 3)
        assert (after @ cat - before @ sky).norm() < 0.6 * (before @ cat - before @ sky).norm()


def test_only_what_the_edit_moves_most_is_retained_and_varied_where_the_projection_hardly_looks(tiny):
    speed, draw = SPEED(**{**SMALL, "rank": 2, "augmented": 3}), torch.Generator().manual_seed(0)
    weight = tiny.weight(projections(tiny)[0]).double()
    cat, sky = row(tiny, "cat", 3), row(tiny, "sky", 3)
    energy, change = torch.outer(cat, cat), torch.outer(sky - cat, cat)
    retained = torch.randn(20, 16, generator=draw, dtype=torch.float64)
    shift = weight @ change @ torch.linalg.inv(torch.eye(16, dtype=torch.float64) + energy)
    sizes = torch.stack([(shift @ c).norm() for c in retained])
    expected = retained[sizes > sizes.mean()]
    assert 0 < len(expected) < 20
    kept = speed.refined(weight, energy, change, retained, torch.Generator().manual_seed(1))
    torch.testing.assert_close(kept[: len(expected)], expected)
    varied = kept[len(expected) :]
    assert 0 < len(varied) < 3 * len(expected)  # filtered again
    least = torch.linalg.svd(weight, full_matrices=False).Vh[-2:]
    apart = varied[:, None] - expected  # each lies on the plane through one of them
    off = (apart - apart @ least.T @ least).norm(dim=2).amin(1)
    assert off.max() < 1e-9 and apart.norm(dim=2).amin(1).min() > 1e-3
    alone = replace(speed, augmented=0).refined(weight, energy, change, retained, draw)
    assert torch.equal(alone, expected)
    assert len(replace(speed, augmented=0, filtered=False).refined(weight, energy, change, retained, draw)) == 20


def test_the_null_space_is_orthogonal_to_the_invariants(tiny):
    draw = torch.Generator().manual_seed(0)
    kept, invariants = (torch.randn(n, 16, generator=draw, dtype=torch.float64) for n in (4, 2))
    basis = SPEED(threshold=1e-6).null_space(kept, torch.cat([invariants, invariants[:1]]))  # one of them twice
    assert basis.shape == (16, 16 - 4 - 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(10, dtype=torch.float64))
    assert (torch.cat([kept, invariants]) @ basis).abs().max() < 1e-9
    assert SPEED(threshold=1e-6).null_space(torch.eye(16, dtype=torch.float64), invariants).shape == (16, 0)
    half = SPEED(threshold=float(torch.linalg.eigvalsh(gram(kept) / 4)[-1]) - 1e-9).null_space(kept, invariants[:0])
    assert half.shape == (16, 15)  # all but the strongest direction


def test_cluster_means():
    rows = torch.tensor([[0.0, 0.0], [0.0, 2.0], [9.0, 0.0], [9.0, 1.0], [9.0, 2.0]])
    assert torch.equal(means(rows, 2), torch.tensor([[0.0, 1.0], [9.0, 1.0]]))
    assert torch.equal(means(rows, 1), rows.mean(0, keepdim=True))


def test_where_nothing_is_retained_the_invariants_alone_stay(tiny, tmp_path):
    speed = SPEED(**{**SMALL, "vocabulary": None})
    edited = fitted(speed, tiny, tmp_path, Brief(BRIEF.concepts))
    for name in projections(tiny):
        change = edited[name].double() - tiny.weight(name).double()
        assert float((change @ row(tiny, "", 0)).norm()) < 1e-5 < float((change @ row(tiny, "cat", 3)).norm())


def test_a_text_is_read_at_its_last_token(tiny):
    read = last_tokens(tiny, ["dog", "a horse", "cow"], batch=2)
    for got, text in zip(read, ["dog", "a horse", "cow"], strict=True):
        torch.testing.assert_close(got, row(tiny, text, len(text.replace(" ", ""))), rtol=1e-4, atol=1e-5)


def test_keys_and_values(tiny, tmp_path):
    assert set(fitted(SPEED(**SMALL, which="kv"), tiny, tmp_path)) == set(projections(tiny, "kv"))


@pytest.mark.parametrize(
    "options, brief, says",
    [
        (dict(threshold=0.0), BRIEF, "leaves no direction"),
    ],
)
def test_what_cannot_be_done_is_said(tiny, tmp_path, options, brief, says):
    with pytest.raises(ErasebenchError, match=says):
        fitted(SPEED(**{**SMALL, **options}), tiny, tmp_path, brief)
    with pytest.raises(ErasebenchError, match="at least one"):
        SPEED(centres=0)
    with pytest.raises(ErasebenchError, match="invariant_ridge=-1"):
        SPEED(invariant_ridge=-1.0)


@pytest.mark.parametrize("token_set", ["last", "last_to_end"])
def test_it_conforms(tiny, token_set):
    speed = SPEED(**SMALL, token_set=token_set)
    assert [line for line in check(speed, tiny, BRIEF, ["a cat", "one cat", "tom"]) if line[1]] == []
