"""Closed-form edits: one matrix equals the layer-by-layer formulas, and rows are the right ones."""

import tempfile
from pathlib import Path

import pytest
import torch
from erasebench.methods.rece import RECE
from erasebench.methods.time import TIME
from erasebench.methods.uce import UCE
from safetensors.torch import load_file

from erasebench.contracts import Brief, Concept, ErasebenchError
from erasebench.toolbox import closed_form
from erasebench.toolbox.closed_form import System, aligned, coexisting, factor, span

BRIEF = Brief((Concept("cat", "object", "sky"),), ("dog",), ("a horse",), ("{c}", "a photo of the {c} at sea"))


def rows_of(tiny, text):
    return tiny.encode([text]).hidden[0]


def test_rows_run_from_the_last_token_to_the_end_aligned(tiny):
    source, target = aligned(tiny, [("cat", "skyline")], "last_to_end")
    length = 24 - 7  # the longer text decides how many rows both have
    assert torch.equal(source, rows_of(tiny, "cat")[3 : 3 + length])
    assert torch.equal(target, rows_of(tiny, "skyline")[7 : 7 + length])
    one, _ = aligned(tiny, [("cat", "sky")], "last", "a {c} at sea")
    assert torch.equal(one[0], rows_of(tiny, "a cat at sea")[4])  # byte tokens: BOS a c a t


def test_each_pair_is_cut_by_its_own_two_lengths(tiny):
    """As released: a long name among others takes no rows from the short ones."""
    together, targets = aligned(tiny, [("cat", "sky"), ("a long name", "sky")], "last_to_end")
    alone, target = aligned(tiny, [("cat", "sky")], "last_to_end")
    assert torch.equal(together[: 24 - 3], alone) and torch.equal(targets[: 24 - 3], target)
    assert len(together) == (24 - 3) + (24 - 9)  # byte tokens: the last of nine letters stands at 9


def test_an_empty_surrogate_is_the_first_token_as_released(tiny):
    _, target = aligned(tiny, [("cat", "")], "last")
    assert torch.equal(target[0], rows_of(tiny, "")[0])


def test_coexisting_rows_leave_out_the_name_and_shift_what_follows(tiny):
    cat, skyline = rows_of(tiny, "a cat at sea"), rows_of(tiny, "a skyline at sea")
    source, target = coexisting(tiny, "a {c} at sea", [("cat", "skyline")])
    assert torch.equal(source, torch.cat([cat[1:2], cat[5:10]]))  # a | at sea, without BOS and EOS
    assert torch.equal(target, torch.cat([skyline[1:2], skyline[9:14]]))
    source, target = coexisting(tiny, "a {c} at sea", [("cat", "skyline")], "all_but_concept")
    assert torch.equal(source, torch.cat([cat[:2], cat[5:20]]))
    assert torch.equal(target, torch.cat([skyline[:2], skyline[9:24]]))


def test_a_name_inside_another_is_found_where_it_stands(tiny):
    assert span(tiny, "Bill Moss and {c}", "Bill") == (1 + 8 + 3, 1 + 8 + 3 + 4)
    with pytest.raises(ErasebenchError, match="stand alone"):
        span(tiny, "{c}like", "Bill")
    with pytest.raises(ErasebenchError, match="no slot"):
        span(tiny, "a photo", "Bill")
    with pytest.raises(ErasebenchError, match="exceeds the context"):
        span(tiny, "a very long sentence about {c}", "Bill")


def test_a_system_is_the_least_squares_solution_of_every_layer():
    """The gradient of the written-out objective vanishes at W M, for a random W."""
    torch.manual_seed(0)
    sources, targets, kept = (torch.randn(n, 6, dtype=torch.float64) for n in (3, 3, 9))
    edit, _ = System(6).map(sources, targets, 0.7).keep(closed_form.gram(kept), 0.2).solve(0.3)
    before = torch.randn(4, 6, dtype=torch.float64)
    after = (before @ edit).requires_grad_()
    objective = (
        0.7 * (after @ sources.T - before @ targets.T).square().sum()
        + 0.2 * ((after - before) @ kept.T).square().sum()
        + 0.3 * (after - before).square().sum()
    )
    objective.backward()
    assert after.grad.abs().max() < 1e-10


def test_an_ill_conditioned_system_raises_its_ridge_and_says_so():
    rank_one = closed_form.gram(torch.ones(1, 4))
    made = factor(rank_one, 0.0)
    assert made.ridge > 0 and made.notes(0.0)["ridge_raised_to"] == made.ridge and made.condition <= 1.01e12
    assert "ridge_raised_to" not in factor(rank_one, 0.1).notes(0.1)
    with pytest.raises(ErasebenchError, match="nothing to solve"):
        factor(torch.zeros(4, 4, dtype=torch.float64), 0.0)
    with pytest.raises(ErasebenchError, match="not finite"):
        factor(rank_one * torch.nan, 0.0)


def test_the_prior_is_computed_once(tiny, monkeypatch):
    first = closed_form.prior(tiny, ["a horse", "sky", "sky"])
    expected = closed_form.gram(torch.stack([rows_of(tiny, "a horse"), rows_of(tiny, "sky")]))
    torch.testing.assert_close(first, expected)
    monkeypatch.setattr(tiny, "encode", None)
    assert torch.equal(closed_form.prior(tiny, ["a horse", "sky"]), first)


def test_edits_compose_by_product(tiny):
    torch.manual_seed(0)
    first, second = torch.randn(2, 16, 16, dtype=torch.float64)
    name = tiny.names(closed_form.PROJECTIONS)[0]
    with closed_form.edited(tiny, first @ second):
        together = tiny.weight(name).clone()
    with closed_form.edited(tiny, first), closed_form.edited(tiny, second):
        torch.testing.assert_close(tiny.weight(name), together, atol=1e-4, rtol=1e-4)


def test_time_edits_the_values_alone_unless_asked(tiny, tmp_path):
    eraser = TIME(augmented=1)
    eraser.fit(tiny, BRIEF, tmp_path, 0)
    key, value = (tiny.names(rf"attn2\.to_{which}\.weight$")[0] for which in "kv")
    before = tiny.weight(key).clone(), tiny.weight(value).clone()
    with eraser.apply(tiny, tmp_path):
        assert torch.equal(tiny.weight(key), before[0]) and not torch.equal(tiny.weight(value), before[1])
    with TIME(with_key=True).apply(tiny, tmp_path):
        assert not torch.equal(tiny.weight(key), before[0])


def test_uce_preserves_names_and_the_empty_prompt(tiny):
    """The sums of each token set written out: as published, all rows of what is preserved."""
    for token_set, scale, first, whole in (("last_to_end", 1.0, 3, 0), ("last_to_end_and_empty", 0.5, 0, 1)):
        system = UCE(token_set=token_set).system(tiny, BRIEF)
        source, target = aligned(tiny, [("cat", "sky")], "last_to_end")
        dog, empty = rows_of(tiny, "dog")[first:].double(), rows_of(tiny, "").double()
        kept = scale * (dog.T @ dog + whole * empty.T @ empty)
        torch.testing.assert_close(system.keys, source.double().T @ source.double() + kept)
        torch.testing.assert_close(system.values, target.double().T @ source.double() + kept)
    assert len(empty) == 24


def test_rece_weighs_the_empty_prompt_once_for_each_concept_where_no_name_is_preserved(tiny, monkeypatch):
    weights = []
    own = System.map
    monkeypatch.setattr(System, "map", lambda self, a, b, scale=1.0: weights.append(scale) or own(self, a, b, scale))
    concepts = (Concept("cat", "object", "sky"), Concept("dog", "object", "sky"))
    eraser = RECE(epochs=1, preserve_scale=0.3)
    for preserved, expected in (((), 0.6), (("horse",), 0.3)):
        weights.clear()
        with tempfile.TemporaryDirectory() as out:
            eraser.fit(tiny, Brief(concepts, preserved), Path(out), 0)
        assert weights[-3:] == [1.0, 1.0, pytest.approx(expected)]  # two concepts, and what is kept


def test_rece_edits_what_is_left_again_and_again(tiny, tmp_path):
    """Two epochs, layer by layer as in the paper: each projection is solved for from its current weight."""
    eraser = RECE(epochs=2, ridge=0.1, recover_ridge=0.01, preserve_scale=0.3)
    eraser.fit(tiny, BRIEF, tmp_path, 0)
    first, _ = eraser.first.system(tiny, BRIEF).solve(0.5)
    base = {n: tiny.weight(n).double() for n in tiny.names(closed_form.PROJECTIONS)}
    now = {n: w @ first for n, w in base.items()}
    concept, other = rows_of(tiny, "cat").double(), rows_of(tiny, "sky").double()
    kept = torch.cat([rows_of(tiny, ""), rows_of(tiny, "dog")]).double()
    eye = torch.eye(16, dtype=torch.float64)
    for _ in range(2):
        left = 0.01 * eye + sum(w.T @ w for w in now.values())
        found = concept @ torch.linalg.solve(left, sum(now[n].T @ w for n, w in base.items())).T
        below = 0.1 * eye + found.T @ found + 0.3 * kept.T @ kept
        above = {n: 0.1 * w + w @ other.T @ found + 0.3 * w @ kept.T @ kept for n, w in now.items()}
        now = {n: torch.linalg.solve(below, above[n].T).T for n in now}
    with eraser.apply(tiny, tmp_path):
        for n, expected in now.items():
            torch.testing.assert_close(tiny.weight(n), expected.float(), rtol=1e-4, atol=1e-5)


def test_rece_finds_what_the_edited_projections_read_as_the_concept(tiny, tmp_path):
    """Eq. 6 with its sums over layers written out, then one epoch that maps it onto the surrogate."""
    eraser = RECE(first=UCE(token_set="last"), epochs=1, ridge=1e-9, recover_ridge=0.1, preserve_scale=0.0)
    first, _ = eraser.first.system(tiny, BRIEF).solve(0.5)
    name = tiny.names(closed_form.PROJECTIONS)
    left, right = 0.1 * torch.eye(16, dtype=torch.float64), torch.zeros(16, 16, dtype=torch.float64)
    for weight in (tiny.weight(n).double() for n in name):
        edited = weight @ first
        left += edited.T @ edited
        right += edited.T @ weight
    concept = rows_of(tiny, "cat").double()
    expected = concept @ torch.linalg.solve(left, right).T
    energy = sum(w.T @ w for w in (tiny.weight(n).double() for n in name))
    torch.testing.assert_close(eraser.recovered(energy, first, concept), expected)
    eraser.fit(tiny, BRIEF, tmp_path, 0)
    edit = load_file(tmp_path / "edit.safetensors")["edit"]
    other = rows_of(tiny, "sky").double()
    undone = (expected @ edit.T - other @ first.T).norm() / (other @ first.T).norm()
    assert undone < 0.5 * (expected @ first.T - other @ first.T).norm() / (other @ first.T).norm()
