"""The concept graph's cells and claims by hand."""

import csv

import pytest
from test_ap import WORDS, planted

from erasebench.analysis import graph
from erasebench.analysis.graph import Edge


def test_cells_are_changes_over_the_same_noise(tiny):
    with tiny.changed(weights=planted(tiny, "snow")):
        found = graph.edges(tiny, "snow", list(WORDS), draws=4)
    assert [e.other for e in found] == list(WORDS) and all(e.erased == "snow" for e in found)
    assert max(found, key=lambda e: e.change).other == max(found, key=lambda e: e.again).other == "snow"
    whole = lambda text: tiny.encode([text]).hidden.double().flatten()
    assert found[0].distance == pytest.approx(float((whole("sun") - whole("snow")).norm()))
    assert found[-1].distance == pytest.approx(0, abs=1e-5)


def test_claims_by_hand(tmp_path):
    near = [Edge("a", "b", 0.4, 0.4, 1.0), Edge("a", "c", 0.2, 0.1, 2.0), Edge("a", "d", 0.3, 0.3, 3.0)]
    back = [Edge("b", "a", 0.1, 0.1, 1.0), Edge("b", "c", 0.05, 0.05, 2.0), Edge("b", "d", 0.01, 0.01, 3.0)]
    itself = [Edge("a", "a", 9.0, 9.0, 0.0)]
    mean, low, high = graph.locality(near + back + itself)
    assert mean == pytest.approx((-0.5 - 1.0) / 2) and low == pytest.approx(-1) and high == pytest.approx(-0.5)
    assert graph.asymmetry(near + back) == (pytest.approx(0.3 / 0.5), 0.0)
    assert graph.asymmetry(near) is None
    said = graph.report("uce", near + back, tmp_path)
    assert "locality -0.75" in said and "asymmetry 0.60" in said
    with (tmp_path / "concept_graph_uce.csv").open() as file:
        assert [float(line["change"]) for line in csv.DictReader(file)][:2] == [0.4, 0.2]
