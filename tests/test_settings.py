"""Settings as published: the values that a method or an attack takes on photographs, by the kind of concept."""

import pytest
from erasebench.evaluators.attacks.udatk import prefix_length
from erasebench.methods.mace import MACE
from hydra import compose, initialize_config_module

from erasebench.config import main
from erasebench.contracts import Concept

MACE_OFFICIAL = {
    "refined": "all_but_concept", "silenced": "concept_and_end", "norm": "plain", "prior_power": 2, "pixels": "imagenet",
}  # fmt: skip
PUBLISHED = {  # words of a command line -> fields of the method
    "method=mace task=explicit": {"lr": 1e-5, "steps": 120, "importance": False, "prior_scale": 7e-7, "preserved_weight": 0},
    "method=mace task=style": {"masks": "whole", "preserved_weight": 8e4, "lr": 1e-4},
    "method=mace task=object target=bird": {"ridge": 10, "prior_scale": 0},
    "method=mace experiment=mace_table2": {"variant": "official", "steps": 120},
    "method=mace experiment=mace_table4": {"variant": "official", "steps": 50, "preserved_weight": None},
    "method=mace_naive experiment=mace_table4": {"variant": "official", "fusion": "naive"},
    "method=speed task=explicit": {"ridge": 0.7, "invariant_ridge": 0.5, "vocabulary": None},
    "method=speed task=celebrity": {"threshold": 1e-4, "ridge": 0.05, "filtered": False},
    "method=age task=style": {"search_lr": 1e-3, "mixed": 5},
    "method=esd task=style": {"variant": "x", "sampler": "moving", "steps": 1000, "lr": 1e-5},
    "method=esd task=explicit": {"variant": "u"},
    "method=esd task=object": {"variant": "u"},
    "method=esd task=imagenette": {"variant": "u"},
    "method=esd experiment=mace_table1": {"variant": "x"},
    "method=esd experiment=gie_table4": {"variant": "x"},
    "method=esd experiment=darkminer_table1": {"variant": "u"},
    "method=esd_2025 task=style": {"variant": "x", "sampler": "frozen", "steps": 200, "lr": 5e-5},
    "method=esd_2025 task=object": {"variant": "u", "sampler": "frozen"},
}


def composed(words):
    with initialize_config_module("erasebench.conf", version_base="1.3"):
        return compose("config", ["model=sd14", *words.split()])


@pytest.mark.parametrize("words", PUBLISHED)
def test_a_method_has_the_values_that_were_published_for_its_kind_of_concept(words):
    method = composed(words).method
    assert {name: method[name] for name in PUBLISHED[words]} == PUBLISHED[words]


def test_the_released_variant_of_mace_is_all_its_departures():
    assert {name: getattr(MACE(variant="official"), name) for name in MACE_OFFICIAL} == MACE_OFFICIAL


@pytest.mark.parametrize("people,weight", [(1, 8e3), (4, 8e3), (5, 5e4), (10, 8e4), (99, 8e4), (100, 2e5), (300, 2e5)])
def test_mace_weighs_kept_people_by_how_many_are_erased(people, weight):
    assert MACE().weight_of_preserved(people) == weight
    assert MACE(preserved_weight=0.0).weight_of_preserved(people) == 0


@pytest.mark.parametrize("kind,count", [("explicit", 5), ("object", 3), ("style", 3), ("person", 3)])
def test_unlearndiffatk_has_as_many_free_tokens_as_were_released(kind, count):
    class Scene:
        concepts = {"x": Concept("x", kind)}

    assert prefix_length(None, Scene) == count
    assert prefix_length(7, Scene) == 7


@pytest.mark.parametrize("attack", ["udatk", "p4d_umu", "random_prefix"])
def test_attacks_leave_the_number_of_free_tokens_to_the_kind_on_photographs_alone(attack):
    assert composed(f"attack={attack}").attack[attack].tokens is None
    assert composed(f"model=mini attack={attack}").attack[attack].tokens == 5


@pytest.mark.parametrize(
    "words,surrogate",
    [
        ("method=uce", ""),
        ("method=rece", ""),
        ("method=esd", "sky"),  # its authors need none
        ("method=mace", "sky"),
        ("method=uce task=explicit", ""),
        ("method=uce task=style n=1", "art"),
        ("method=uce task=celebrity", "a person"),
        ("method=speed task=celebrity", "person"),
        ("method=speed task=explicit", ""),
    ],
)
def test_a_published_surrogate_is_that_of_the_methods_authors(words, surrogate, tmp_path):
    runs = []
    line = ["surrogate=published", f"results={tmp_path}", *words.split()]
    assert main(lambda run: runs.append(run) or [], line) == 0
    (run,) = runs
    assert {concept.surrogate for concept in run.plan.brief.concepts} == {surrogate}
    assert "->" not in run.target  # the same concept of the same table
