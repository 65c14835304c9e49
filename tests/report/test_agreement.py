"""Agreement with published tables: ranks by hand, what is missing, and files that are none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from erasebench import cli, rows
from erasebench.contracts import ErasebenchError
from erasebench.report import agreement, row_table, tables
from erasebench.report.agreement import Column, Table, correlate, spearman
from erasebench.report.row_table import EMPTY

ROOT = Path(__file__).parents[2]
FOUR = {"uce": 10.0, "esd": 20.0, "mace": 30.0, "ca": 40.0}


def table(*columns, name="t"):
    return Table(name, "object: cat", False, columns, (), ())


def column(published, measured, block="cat", metric="acc_e"):
    return Column(block, metric, published, measured)


def test_rho_of_four_methods_by_hand():
    # ranks 1 2 3 4 against 1 3 2 4: 1 - 6 (1 + 1) / (4 * 15)
    found = correlate(table(column(FOUR, {"uce": 0.1, "esd": 0.3, "mace": 0.2, "ca": 0.4})), with_base=False)
    assert found.value == pytest.approx(0.8) and found.sizes == (4,)
    assert found.low <= 0.8 <= found.high <= 1


def test_ties_share_their_mean_rank():
    # ranks 1 2.5 2.5 4 against 1 2 3 4: 4.5 / sqrt(4.5 * 5)
    x, y = np.array([1.0, 2, 2, 3]), np.array([5.0, 6, 7, 8])
    assert spearman(x, y) == pytest.approx(4.5 / np.sqrt(22.5)) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_rho_is_scipy_s_with_ties_and_gaps_in_every_line_of_an_array():
    rng = np.random.default_rng(3)
    x, y = rng.integers(4, size=(50, 7)).astype(float), rng.integers(4, size=(50, 7)).astype(float)
    x[rng.random(x.shape) < 0.2] = np.nan
    found = spearman(x, y)
    for ours, a, b in zip(found, x, y, strict=True):
        known = np.isfinite(a)
        varies = known.sum() > 1 and np.ptp(a[known]) > 0 and np.ptp(b[known]) > 0
        assert ours == pytest.approx(stats.spearmanr(a[known], b[known]).statistic) if varies else np.isnan(ours)


def test_a_constant_column_and_two_methods_are_missing_and_no_zero():
    good = column(FOUR, FOUR)
    constant = column(FOUR, dict.fromkeys(FOUR, 0.0), metric="acc_g")
    two = column(FOUR, {"uce": 0.2, "esd": 0.1}, metric="acc_s")
    assert constant.flaw(False) == "constant: every measured value is 0"
    assert two.flaw(False) == "only uce, esd in common"
    assert correlate(table(good, constant, two), False).value == 1
    assert table(constant, two).agreement is None
    whole = agreement.average([table(good).agreement, table(constant).agreement])
    assert whole.value == 1 and np.isfinite(whole.draws).any()
    assert agreement.average([None]) is None


def test_a_table_is_the_mean_of_its_columns_and_the_mean_counts_each_table_once():
    reverse = {method: -value for method, value in FOUR.items()}
    one = table(column(FOUR, FOUR), column(FOUR, FOUR, metric="a"), column(FOUR, reverse, metric="b"), name="one")
    two = table(column(FOUR, reverse), name="two")
    assert one.agreement.value == pytest.approx(1 / 3)
    whole = agreement.average([one.agreement, two.agreement])
    assert whole.value == pytest.approx((1 / 3 - 1) / 2) and whole.low <= whole.value <= whole.high


def test_a_missing_cell_leaves_its_method_out_of_its_column_alone():
    gap = {method: value for method, value in FOUR.items() if method != "uce"}
    found = table(column(FOUR, gap), column(FOUR, FOUR, metric="acc_s"))
    assert found.agreement.sizes == (3, 4)
    (line,) = agreement.list_missing([found])
    assert line == "- t: acc_e of cat: without uce"


def test_the_base_stands_beside_and_is_no_method():
    some = {"none": 100.0, "uce": 1.0, "esd": 2.0, "mace": 3.0}
    measured = {"none": 100.0, "uce": 3.0, "esd": 2.0, "mace": 1.0}
    found = table(column(some, measured))
    assert found.agreement.value == -1
    # ranks 4 1 2 3 against 4 3 2 1: 1 - 6 (4 + 0 + 4) / (4 * 15)
    assert found.with_base.value == pytest.approx(0.2)
    three = table(column({k: some[k] for k in ("none", "uce", "esd")}, measured))
    assert three.agreement is None and three.with_base.sizes == (3,)


def test_the_interval_is_the_same_for_a_seed_and_does_not_hang_on_other_tables():
    noisy = column(FOUR, {"uce": 0.1, "esd": 0.4, "mace": 0.2, "ca": 0.3})
    first, again, other = (correlate(table(noisy), False, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.draws, again.draws, equal_nan=True)
    assert not np.array_equal(first.draws, other.draws, equal_nan=True)
    assert (first.low, first.high) == (again.low, again.high)
    perfect = table(column(FOUR, FOUR)).agreement
    assert (perfect.low, perfect.high) == (1, 1)


def test_three_methods_are_marked():
    three = {method: FOUR[method] for method in ("uce", "esd", "mace")}
    assert "‡" in agreement.summarize(table(column(three, FOUR)))[1]
    assert "‡" not in agreement.summarize(table(column(FOUR, FOUR)))[1]


# --- rows beside the published tables


def row(method, value, metric="acc_e_prob", task="object", target="airplane", **more):
    known = {"run_id": f"{method}-{target}-{more}", "status": "ok", "split": "target", "subset": False, "seed": 0}
    known |= {"n_concepts": 1, "params": "{}", "overrides": "[]", "world": "mini", "base": "mini", "revision": "1"}
    known |= dict.fromkeys(("low", "high", "base_value", "change_low", "p_value"))
    return replace(EMPTY, method=method, value=value, metric=metric, task=task, target=target, n=9, **known | more)


def compare(name, some):
    return agreement.compare(next(one for one in tables.published_tables() if one.name == name), some)


AIRPLANE = {"fmn": 0.9676, "ca": 0.9624, "uce": 0.4032, "mace": 0.0906}  # of MACE, Table 1, in their order


def cell(found, metric, block):
    return next(column for column in found.columns if (column.metric, column.block) == (metric, block))


def test_rows_are_held_against_the_published_block_of_their_concept():
    some = [row(method, value / 2) for method, value in AIRPLANE.items()]
    some += [row(method, 1 - value, target="truck") for method, value in AIRPLANE.items()]  # not printed
    found = compare("mace_table1", some)
    assert found.agreement.value == 1 and not found.is_stand_in and found.measured_on == "object: airplane"
    assert cell(found, "acc_e_prob", "cat").flaw(False) == "not measured"
    assert cell(found, "acc_e_prob", "average").flaw(False) == "not measured"


def test_runs_with_options_of_their_own_and_subsets_are_left_out():
    some = [row(method, value) for method, value in AIRPLANE.items()]
    odd = row("uce", 1.0, overrides='["method=uce", "method.erase_scale=2"]')
    few = row("mace", 1.0, subset=True)
    assert compare("mace_table1", [*some, odd, few]).agreement.value == 1
    failed = [replace(one, status="failed", value=None) if one.method == "uce" else one for one in some]
    assert cell(compare("mace_table1", failed), "acc_e_prob", "airplane").common(False) == ["fmn", "ca", "mace"]


def test_a_variant_that_a_table_tells_apart_is_a_method_of_its_own():
    some = [row(method, value) for method, value in AIRPLANE.items()]
    some += [row("esd", 0.5, params='{"variant":"u"}'), row("esd", 0.6, params='{"variant":"x"}')]
    found = cell(compare("mace_table1", some), "acc_e_prob", "airplane")
    assert (found.measured["esd"], found.measured["esd variant=u"]) == (0.6, 0.5)
    assert found.published["esd"] != found.published["esd variant=u"]


def test_another_task_s_concept_stands_in_for_one_that_was_not_measured():
    made = {"esd": 1.0, "fmn": 3.0, "spm": 2.0}
    some = [row(method, v, "asr", attack="udatk", split="attack:udatk") for method, v in made.items()]
    found = compare("udatk_objects", some)
    assert found.is_stand_in and found.measured_on == "object: airplane"
    # church: 60, 96, 94; tench: 36, 100, 90
    assert [cell(found, "udatk/asr", block).measured for block in ("church", "tench")] == [made, made]
    assert found.agreement.value == 1
    own = [replace(one, task="imagenette", target="church", value=-one.value, run_id=f"c{i}") for i, one in enumerate(some)]
    found = compare("udatk_objects", some + own)
    assert not found.is_stand_in and found.agreement.value == -1
    assert cell(found, "udatk/asr", "tench").flaw(False) == "not measured"


def test_as_many_people_as_published_come_before_fewer():
    four = {"mace_refinement": 0.6, "mace_naive": 0.1, "mace_uniform": 0.3, "mace": 0.2}
    of = lambda n, sign: [
        row(m, sign * v, "acc_e", "celebrity", "", n_concepts=n, overrides=f'["n={n}"]') for m, v in four.items()
    ]
    fewer = compare("mace_table4", of(10, 1))
    assert fewer.is_stand_in and fewer.measured_on == "celebrity: 10 concepts" and fewer.agreement.value == 1
    both = compare("mace_table4", of(10, 1) + of(100, -1))
    assert not both.is_stand_in and both.agreement.value == -1


def test_the_embedded_world_s_frechet_distance_stands_for_the_papers():
    made = {"uce": 1.0, "esd": 2.0, "salun": 3.0}
    some = [row(m, v, "fd_mini", "explicit", "explicit content", split="caption") for m, v in made.items()]
    assert cell(compare("darkminer_table1", some), "fid_clean", "").measured == made


def test_a_broken_run_counts_and_is_named():
    some = [row(method, value) for method, value in AIRPLANE.items()]
    some += [replace(some[0], metric="broken_target", value=1.0, base_value=0.0)]
    found = compare("mace_table1", some)
    assert found.broken == ("fmn",) and "fmn" in cell(found, "acc_e_prob", "airplane").common(False)
    assert "broken: fmn" in agreement.list_missing([found])[0]


# --- files


def test_rows_survive_their_parquet_file(tmp_path):
    some = agreement.select([row(method, value, run_id=method) for method, value in AIRPLANE.items()])
    row_table.write(some, tmp_path / "kept.parquet", row_table.KEPT)
    assert agreement.read(tmp_path / "kept.parquet") == some and len(some) == 4


def damage(path, kind):
    from pyarrow import Table as Arrow
    from pyarrow import compute, parquet

    path = path / f"{kind}.parquet"
    row_table.write([row("uce", 0.5)], path, row_table.KEPT)
    match kind:
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "zeros":
            path.write_bytes(bytes(1000))
        case "empty":
            path.write_bytes(b"")
        case "columns":
            parquet.write_table(Arrow.from_pydict({"a": [1]}), path)
        case "null":
            full = parquet.read_table(path)
            index = full.schema.get_field_index("method")
            nothing = compute.if_else(False, full["method"], None)
            parquet.write_table(full.set_column(index, "method", nothing), path)
        case "overrides":
            row_table.write([row("uce", 0.5, overrides="{")], path, row_table.KEPT)
        case "params":
            row_table.write([row("uce", 0.5, params="[" * 5000)], path, row_table.KEPT)
        case "interval":
            row_table.write([row("uce", 0.5, low=0.6, high=0.7)], path, row_table.KEPT)
        case "none":
            path.unlink()
    return path


@pytest.mark.parametrize("kind", ["cut", "zeros", "empty", "columns", "null", "overrides", "params", "interval", "none"])
def test_a_damaged_file_is_one_clear_line(tmp_path, capsys, kind):
    path = damage(tmp_path, kind)
    assert cli.main(["agreement", str(path), "--folder", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {path}") and said.err.count("\n") == 1 and len(said.err) < 400
    assert not (tmp_path / "out").exists() and not said.out


def test_a_folder_without_rows_and_a_file_of_other_rows_are_refused(tmp_path):
    with pytest.raises(ErasebenchError, match="no rows"):
        agreement.read(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ErasebenchError, match="not rows of schema"):
        agreement.read(tmp_path)


def test_two_models_in_one_folder_are_two_sets():
    some = [row("uce", 0.5), row("uce", 0.4, revision="2")]
    assert set(agreement.split_by_base("runs", some)) == {"runs mini 1", "runs mini 2"}
    assert set(agreement.split_by_base("runs", some[:1])) == {"runs"}


def test_version_1_agrees_as_its_committed_table_says(tmp_path, capsys):
    assert cli.main(["agreement", "--folder", str(tmp_path)]) == 0
    committed = ROOT / "results" / "agreement"
    assert (tmp_path / "agreement.md").read_text() == (committed / "agreement.md").read_text()
    ours, theirs = (pd.read_csv(folder / "agreement.csv") for folder in (tmp_path, committed))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-9)
    assert "| mean |" in capsys.readouterr().out


def test_kept_rows_stand_beside_version_1(tmp_path, capsys):
    own = [row(method, value, run_id=method) for method, value in AIRPLANE.items()]
    full = [
        replace(one, schema=rows.SCHEMA, method_version=1, task_version=1, n_dropped=0, higher_is_better=False)
        for one in own
    ]
    blank = {f: None for f in ("threshold", "n_valid", "n_refused", "published", "dirty", "batch", "fit_seconds")}
    blank |= dict.fromkeys(("sample_seconds", "unet_calls", "peak_memory_mb"))
    rows.write([replace(one, **blank) for one in full], tmp_path / "runs" / "a.csv")
    assert cli.main(["agreement", str(tmp_path), "--keep", str(tmp_path / "mine.parquet")]) == 0
    assert cli.main(["agreement", str(tmp_path / "mine.parquet"), "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| mine: rho |" in out and "| version1: rho |" in out
    assert "mace_table1" in out and "+1.00" in out
