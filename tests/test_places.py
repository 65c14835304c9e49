"""Rows name no place of the disk that made them."""

import json
from pathlib import Path

import pytest

from erasebench import places

HOME = Path.home()


@pytest.mark.parametrize(
    "text,public",
    [
        ("cannot read /data/me/a.pt: no", "cannot read .../a.pt: no"),
        ("'/data/My Files/x.csv': no such file", "'.../x.csv': no such file"),
        ("method.path=/data/a/b.pt: holds", "method.path=.../b.pt: holds"),
        (f"{HOME}/My x/a.pt is gone", ".../My x/a.pt is gone"),
        ("(/a/b/c.x), ~/x/y.pt", "(.../c.x), .../y.pt"),
        ("C:\\Users\\me\\a.pt", ".../a.pt"),
        ("file:///a/b/c.x", ".../c.x"),
        ("3/4 shards, and/or 5 / 6 of https://host.org/a/b", "3/4 shards, and/or 5 / 6 of https://host.org/a/b"),
        ("a photo of a cat", "a photo of a cat"),
    ],
)
def test_a_sentence_keeps_of_a_path_its_name(text, public):
    assert places.masked_text(text) == public


def test_a_known_path_with_blanks_goes_whole():
    assert places.masked_text("/big disk/our work/x: damaged", ["/big disk/our work/x"]) == ".../x: damaged"


def test_hyperparameters_keep_of_a_path_its_name(tmp_path):
    (tmp_path / "x.pt").touch()
    given = {"path": f"{tmp_path}/x.pt", "list": ["/a/b", {"in": "~/c"}], "text": "a / b", "n": 1, "null": None}
    said = json.loads(places.masked_json(json.dumps(given)))
    assert said == {"path": ".../x.pt", "list": [".../b", {"in": ".../c"}], "text": "a / b", "n": 1, "null": None}
    for same in ('{"b":1, "a":"x"}', "", "not JSON"):
        assert places.masked_json(same) == same
