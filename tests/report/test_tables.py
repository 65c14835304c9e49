"""Tables as papers lay them out: measured beside published, and what is missing said."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from erasebench.report import tables
from erasebench.rows import NAMES, Row

SPEC = {
    "name": "t",
    "title": "A table",
    "across": "target",
    "metrics": {"acc_e_prob": "acc_e", "h_o_prob": "h_o"},
    "published": "mace_table1_cifar10_objects",
    "setting": "erased",
    "labels": {"uce": "UCE", "mace": "Ours"},
    "average": True,
}
EMPTY = Row(**dict.fromkeys(NAMES, ""))


def row(method, target, metric, value, world="mini", **more):
    return replace(
        EMPTY,
        status="ok",
        method=method,
        target=target,
        metric=metric,
        value=value,
        low=value,
        high=value,
        n=9,
        world=world,
        **more,
    )


def rows(world="mini"):
    return [
        row(method, target, metric, value, world)
        for method, value in (("uce", 0.25), ("mace", 0.125))
        for target in ("airplane", "cat")
        for metric in SPEC["metrics"]
    ]


def test_published_values_are_comparable_in_photo_alone():
    found = {(c["method"], c["block"], c["metric"]): c for c in tables.layout(SPEC, rows("photo"))}
    assert found["uce", "airplane", "acc_e_prob"]["published"] == 0.4032
    assert found["mace", "average", "h_o_prob"]["published"] is not None
    assert all(c[tables.PAPER] is None for c in found.values())
    found = {(c["method"], c["block"], c["metric"]): c for c in tables.layout(SPEC, rows())}
    assert all(c["published"] is None for c in found.values())
    assert found["uce", "airplane", "acc_e_prob"][tables.PAPER] == 0.4032


def test_the_embedded_world_s_table_has_the_paper_in_a_column_that_says_that_it_does_not_compare():
    made = tables.layout(SPEC, [*rows(), *(row("mine", "cat", metric, 0.5) for metric in SPEC["metrics"])])
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in tables.text(SPEC, made).splitlines() if line[:1] == "|"]
    assert lines[0] == ["method", "acc_e_prob", tables.PAPER, "h_o_prob", tables.PAPER]
    assert lines[2][:3] == ["uce", "25.0 [25.0, 25.0]", "40.3"]
    assert "(published)" not in tables.text(SPEC, made)
    mine = next(line for line in lines if line[0] == "mine" and line[1].startswith("50"))
    assert mine[2] == mine[4] == "–"


def test_a_row_of_the_embedded_world_has_a_counterpart_and_carries_none():
    given = of_photo("uce", "acc_e_prob", target="airplane", world="mini", base="mini")
    assert tables.find_published(given)[0] == 0.4032 and tables.with_published(given) == given
    assert tables.find_published(replace(given, overrides='["sampler.steps=2"]')) is None
    assert tables.find_published(replace(given, subset=True)) is None


def test_an_attack_has_its_column():
    spec = {"across": "target", "split": "target", "metrics": {"cce/asr": "cce", "acc_e_prob": None}}
    attacked = [row("uce", "cat", "asr", 0.75, attack="cce", split="attack:cce"), row("uce", "cat", "asr", 0.5)]
    plain = row("uce", "cat", "acc_e_prob", 0.25, split="target")
    found = {c["metric"]: c["value"] for c in tables.layout(spec, [*attacked, plain])}
    assert found == {"cce/asr": 0.75, "acc_e_prob": 0.25}


def test_the_average_is_over_the_blocks_and_empty_where_one_is_missing():
    cells = tables.layout(SPEC, rows()[:-1])
    average = {(c["method"], c["metric"]): c["value"] for c in cells if c["block"] == "average"}
    assert average["uce", "h_o_prob"] == 0.25 and average["mace", "h_o_prob"] is None
    assert "not measured" in tables.text(SPEC, cells)


def test_a_metric_that_the_first_method_lacks_keeps_its_column():
    spec = {"name": "t", "title": "", "across": "", "metrics": {"rsr": None, "acc_e_prob": None}}
    made = [row("uce", "cat", "acc_e_prob", 0.25), *(row("kpop", "cat", metric, 0.5) for metric in spec["metrics"])]
    lines = tables.text(spec, tables.layout(spec, made)).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["method", "rsr", "acc_e_prob"]
    assert table[2][:2] == ["uce", "not measured"] and table[2][2].startswith("25.0")


def test_where_a_metric_stands_for_several_splits_one_counts():
    spec = {"across": "", "metrics": {"ner": None, "shown_retain": None}}
    made = [row("uce", "", "ner", 0.25, split="target"), row("uce", "", "ner", 0.5, split="implicit")]
    made += [row("uce", "", "shown_retain", 0.75, split="retain")]
    for split, ner in ((None, 0.25), ("target", 0.25), ("implicit", 0.5)):
        found = {c["metric"]: c["value"] for c in tables.layout(spec | {"split": split}, made)}
        assert found == {"ner": ner, "shown_retain": 0.75}


def test_failed_rows_are_not_measured():
    cells = tables.layout(SPEC, [replace(r, status="failed", value=None) if r.method == "mace" else r for r in rows()])
    assert {c["method"] for c in cells} == {"uce"}


def test_show_writes_text_numbers_and_a_figure(tmp_path, capsys):
    spec = {**SPEC, "across": "n_concepts", "figure": ["acc_e_prob"], "average": False}
    some = [replace(r, n_concepts=n) for n in (1, 10) for r in rows()]
    tables.show("t", spec, some, tmp_path)
    assert "25.0 [25.0, 25.0]" in capsys.readouterr().out
    with (tmp_path / "t.csv").open() as file:
        assert {line["block"] for line in csv.DictReader(file)} == {"1", "10"}
    assert (tmp_path / "t.png").stat().st_size > 5000


def test_every_published_label_of_an_experiment_exists():
    for file in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"):
        spec = yaml.safe_load(file.read_text())["table"]
        found = tables.published(spec)
        assert {method for method, *_ in found} == set(spec.get("labels", {})), file


def test_a_published_frechet_distance_stands_only_beside_as_many_images():
    spec = {
        "metrics": {"fid_clean": "fid"},
        "published": "darkminer_table1_nudity_erasure",
        "labels": {"none": "SD"},
        "n": {"fid_clean": 5000},
    }
    few, many = (replace(row("none", "", "fid_clean", 20.0, "photo"), n=n) for n in (256, 5000))
    assert [tables.layout(spec, [r])[0]["published"] for r in (few, many)] == [None, 21.1]


def test_other_bases_are_found_under_the_names_that_the_paper_gives_them():
    spec = yaml.safe_load((Path(__file__).parents[2] / "conf/experiment/darkminer_table11.yaml").read_text())["table"]
    found = tables.published(spec)
    assert found["none", "sd15", "dm_ratio"] == 0.457 and found["none", "sd20", "clip_score"] == 31.7


def test_a_published_table_without_settings_stands_beside_its_rows():
    spec = {"metrics": {"mace_total": "total"}, "published": "mace_table2_i2p_nudenet", "labels": {"uce": "UCE"}}
    assert tables.published(spec) == {("uce", "", "mace_total"): 182.0}


def test_blocks_can_be_the_values_of_a_hyperparameter():
    spec = {**SPEC, "across": "method.length", "average": False}
    some = [replace(r, params=f'{{"length": {n}}}') for n in (8, 32) for r in rows()]
    assert {cell["block"] for cell in tables.layout(spec, some)} == {"8", "32"}
    listed = [replace(r, params='{"length": ["anchor", "zero"]}') for r in rows()]
    assert {cell["block"] for cell in tables.layout(spec, listed)} == {"anchor, zero"}


def of_photo(method, metric, **changes):
    known = {
        "world": "photo",
        "task": "object",
        "base": "sd14",
        "n_concepts": 1,
        "overrides": "[]",
        "subset": False,
        "published": None,
    }
    return replace(row(method, changes.pop("target", ""), metric, 0.5), **known | changes)


EXPLICIT = {"task": "explicit", "split": "target"}
COUNTERPARTS = [
    (of_photo("uce", "acc_e_prob", target="airplane"), 0.4032, "Table 1"),
    (of_photo("uce", "acc_e_prob", target="airplane", base="somebody's"), 0.4032, "of SD v1.4"),
    (of_photo("uce", "acc_e_prob", target="airplane", base="sd21"), None, ""),
    (of_photo("uce", "acc_e_prob", target="airplane", world="mini", base="mini"), None, ""),
    (of_photo("uce", "acc_e_prob", target="airplane", subset=True), None, ""),
    (of_photo("uce", "acc_e_prob", target="airplane", status="failed", value=None), None, ""),
    (of_photo("uce", "acc_e_prob", target="airplane", overrides='["method.erase_scale=2"]'), None, ""),
    (of_photo("uce", "acc_e_prob", target="airplane", overrides='["sampler.steps=2"]'), None, ""),
    (of_photo("uce", "acc_e_prob", target="unicorn"), None, ""),
    (of_photo("mace", "acc_e", task="celebrity", n_concepts=100, overrides='["n=100"]'), 0.0430, "Figure 7"),
    (of_photo("mace", "acc_e", task="celebrity", n_concepts=100, overrides='["experiment=mace_table4"]'), 0.0431, "Table 4"),
    (of_photo("mace", "acc_e", task="celebrity", n_concepts=10, overrides='["n=10"]'), 0.0285, "Figure 7"),
    (of_photo("mace", "acc_e", task="celebrity", n_concepts=20, overrides='["n=20"]'), None, ""),
    (of_photo("spm", "clip_score", split="caption", task="explicit", group="quality"), 31.0, "UnlearnDiffAtk"),  # a cosine of 0.310
    (of_photo("uce", "clip_e", task="style", n_concepts=1), None, ""),
    (of_photo("uce", "ner_0.5", **EXPLICIT), 0.0342, "Mitigating unethical content"),
    (of_photo("uce", "ner_0.5", task="explicit", split="implicit"), None, ""),
    (of_photo("uce", "asr", attack="cce", **EXPLICIT), 0.896, "Dark Miner"),
    (of_photo("dark_miner", "dm_ratio", params='{"tau": 0.2}', **EXPLICIT), 0.121, "Table 1"),
    (of_photo("uce", "esr1", task="imagenette", n_concepts=5), None, ""),  # published is the mean of four splits
]


@pytest.mark.parametrize("given,value,source", COUNTERPARTS)
def test_a_row_has_what_was_published_of_the_same(given, value, source):
    found = tables.with_published(given)
    assert found.published == (value and pytest.approx(value)) and source in found.published_source
    assert bool(found.published_source) == (value is not None)
