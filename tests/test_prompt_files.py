"""Prompt tables and captions that users bring: the odd rows of I2P, and files that are none."""

import json

import pandas as pd
import pytest

from erasebench import prompt_files
from erasebench.contracts import ErasebenchError

ROWS = {
    "prompt": ["a street", "", "a street", "a painting of a child", "x"],
    "sd_seed": [1, 2**32 - 1, 3, 4, 5],
    "sd_guidance_scale": [7.0, 255.0, 7.5, 7.0, 9.0],
    "sd_image_width": [512, 512, 768, 512, 512],
    "categories": ["violence"] * 5,
}


def table(folder, name="i2p.csv", **changes):
    frame = pd.DataFrame({**ROWS, **changes})
    path = folder / name
    frame.to_parquet(path) if name.endswith("parquet") else frame.to_csv(path, index=False)
    return {"path": str(path)}


@pytest.mark.parametrize("name", ["i2p.csv", "i2p.parquet"])
def test_i2p_with_its_odd_rows(tmp_path, name):
    rows, dropped = prompt_files.prompts(table(tmp_path, name))
    assert dropped == 1  # the gate
    assert [r.number for r in rows] == [0, 1, 2, 4]  # an empty prompt and a duplicate stay
    assert rows[1].text == "" and rows[1].seed == 2**32 - 1 and rows[1].guidance == 255
    assert rows[0].text == rows[2].text and rows[2].guidance == 7.5


def test_the_copied_csv_has_other_names(tmp_path):
    frame = pd.DataFrame({"case_number": [0], "prompt": ["a"], "evaluation_seed": [3], "evaluation_guidance": [7]})
    frame.to_csv(tmp_path / "unsafe.csv", index=False)
    assert prompt_files.prompts({"path": str(tmp_path / "unsafe.csv")})[0] == [prompt_files.PromptRow(0, "a", 3, 7.0)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sd_seed": [1, None, 3, 4, 5]}, "row 1: sd_seed = nan is not a number"),
        ({"sd_seed": [1, -2, 3, 4, 5]}, "row 1: sd_seed = -2 is not a seed"),
        ({"sd_seed": [1, 1.5, 3, 4, 5]}, "row 1: sd_seed = 1.5 is not a seed"),
        ({"sd_guidance_scale": ["a", 1, 1, 1, 1]}, "row 0: sd_guidance_scale = 'a' is not a number"),
        ({"prompt": ["a" * 10_000, "b", "c", "d", "e"]}, "row 0: a prompt of 10000 characters"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, changes, said):
    with pytest.raises(ErasebenchError, match=said):
        prompt_files.prompts(table(tmp_path, **changes))


def test_a_missing_column_or_file_is_named(tmp_path):
    pd.DataFrame({"text": ["a"]}).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(ErasebenchError, match="no column prompt"):
        prompt_files.prompts({"path": str(tmp_path / "x.csv")})
    for option in ("world.explicit.prompts.path=", "prompts.path="):
        with pytest.raises(ErasebenchError, match=rf"y.csv: no such file \({option}\)"):
            prompt_files.prompts({"path": str(tmp_path / "y.csv")}, option=option)
    for name in ("y.csv", "y.txt"):
        with pytest.raises(ErasebenchError, match=rf"{name}: no such file \(world.captions.path="):
            prompt_files.captions_of(tmp_path / name)
    (tmp_path / "z.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ErasebenchError, match="not a readable table"):
        prompt_files.prompts({"path": str(tmp_path / "z.parquet")})


def test_captions_from_a_text_file_and_from_coco(tmp_path):
    (tmp_path / "c.txt").write_text("one\n\n two \nthree\n")
    assert prompt_files.captions({"path": str(tmp_path / "c.txt"), "count": 2}) == (["one", "two"], ["three"])
    notes = [{"image_id": 9, "id": 5, "caption": "later"}, {"image_id": 9, "id": 2, "caption": "first"}]
    notes.append({"image_id": 3, "id": 8, "caption": "other"})
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"annotations": notes}))
    path = str(tmp_path / "captions_val2014.json")
    assert prompt_files.captions({"path": path, "count": 10}) == (["other", "first"], [])
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ErasebenchError, match="not COCO"):
        prompt_files.captions({"path": str(tmp_path / "bad.json"), "count": 10})
    assert prompt_files.captions({"path": None, "count": 10}) == ([], [])
