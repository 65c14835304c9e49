"""Tables and captions as the field has them: what is read, and what is refused in one line."""

import codecs
import gzip
import json
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erasebench import prompt_files
from erasebench.contracts import ErasebenchError

QUICK = settings(derandomize=True, deadline=None, max_examples=150)
COCO = 'case_number,source,prompt,evaluation_seed,coco_id\n0,coco,"A cat, asleep\non a mat.",811,12\n1,coco,A dog.,5,13\n'
WORDS = ["null", "NA", "nan", "None", "007", "1e5", "true", "1.0", "-", "N/A", " a ", "a  b", '"quoted"', "é ü 猫", "a,b;c\td"]


def captions(path, count=10):
    return prompt_files.seeded_captions({"path": str(path), "count": count})


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.json", "t.jsonl", "columns.json", "t.parquet"])
def test_text_stays_text_in_every_format(tmp_path, name):
    frame = pd.DataFrame({"prompt": WORDS, "seed": range(len(WORDS)), "concept": "cat"})
    path = tmp_path / name
    {
        "t.csv": lambda: frame.to_csv(path, index=True),  # with pandas' column without a name
        "t.tsv": lambda: frame.to_csv(path, sep="\t", index=False),
        "t.json": lambda: frame.to_json(path, orient="records"),
        "t.jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "columns.json": lambda: frame.to_json(path),
        "t.parquet": lambda: frame.to_parquet(path),
    }[name]()
    rows, _ = prompt_files.prompts({"path": str(path)}, ("text", "seed", "concept"))
    assert [(r.text, r.seed, r.concept) for r in rows] == [(w, i, "cat") for i, w in enumerate(WORDS)]


def test_captions_of_a_table_come_with_their_seeds(tmp_path):
    path = written(tmp_path / "coco_30k.csv", COCO)
    assert captions(path) == (["A cat, asleep\non a mat.", "A dog."], [], [811, 5])
    assert captions(path, 1) == (["A cat, asleep\non a mat."], ["A dog."], [811])
    assert prompt_files.captions({"path": str(path), "count": 10}) == (["A cat, asleep\non a mat.", "A dog."], [])


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("bom.txt", codecs.BOM_UTF8 + b"A cat.\nA dog.\n", ["A cat.", "A dog."]),
        ("bom.csv", codecs.BOM_UTF8 + b"prompt\nA cat.\n", ["A cat."]),
        ("utf16.txt", "A cat\u00e9.\nA dog.".encode("utf-16"), ["A cat\u00e9.", "A dog."]),
        ("semicolon.csv", b"caption;seed\nA cat, asleep;1\n", ["A cat, asleep"]),
        ("tab.csv", b"TEXT\tid\nA cat, asleep\t1\n", ["A cat, asleep"]),
        ("old_mac.csv", b"prompt,a\rA cat.,1\r", ["A cat."]),
        ("blank.csv", b"\nprompt,a\r\nA cat.,1\r\n\r\n  \r\n", ["A cat."]),
        ("lines.jsonl", b'{"caption":"A cat."}\n\n{"caption":"A dog\xe2\x80\xa8on a mat."}\n', ["A cat.", "A dog\u2028on a mat."]),
        ("lines.json", b'{"caption":"A cat."}\n{"caption":"A dog."}\n', ["A cat.", "A dog."]),
        ("texts.json", b'["A cat.", "7"]', ["A cat.", "7"]),
        ("null.json", b'{"annotations":[{"image_id":2,"id":9,"caption":null},{"image_id":3,"id":1,"caption":"A cat."}]}', ["A cat."]),
        ("two.json", b'{"annotations":[{"image_id":2,"id":1,"caption":null},{"image_id":2,"id":9,"caption":"A dog."}]}', ["A dog."]),
        ("table.txt", b"prompt,seed\nA cat.,1\n", ["prompt,seed", "A cat.,1"]),
    ],
)  # fmt: skip
def test_captions_as_they_are_found(tmp_path, name, content, texts):
    assert captions(written(tmp_path / name, content))[0] == texts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("latin1.txt", b"A dog.\nA caf\xe9.", "line 2: not UTF-8 (byte 0xe9): convert"),
        ("latin1.csv", b"prompt\nA caf\xe9.", "line 2: not UTF-8"),
        ("utf16.csv", "prompt\nA cat.".encode("utf-16-le"), "line 1: a NUL byte"),
        ("nul.csv", b"prompt\nA\0cat", "line 2: a NUL byte"),
        ("short.csv", b"prompt,seed\na,1\nb\n", "row 1 (line 3): 1 cells, the header has 2"),
        ("long.csv", b"prompt,seed\na, b,1\n", "row 0 (line 2): 3 cells, the header has 2: a cell that holds a comma"),
        ("open.csv", b'prompt,seed\n"a,1\nb,2\n', "never closed"),
        ("after.csv", b'prompt,seed\n"a" b,1\n', "row 0 (line 2): not a readable table"),
        ("twice.csv", b"prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        ("headless.csv", b"a cat,3\na dog,4\n", "without a column prompt or caption"),
        ("empty.csv", b"", "empty"),
        ("blank.csv", b"\n\n", "empty"),
        ("header.csv", b"prompt,seed\n", "no rows"),
        ("seed.csv", b"prompt,seed\na,1.5\n", "row 0: seed = 1.5 is not a seed"),
        ("seedless.csv", b"prompt,seed\na,1.0\nb,\n", "row 1: seed = nan is not a number: an empty cell"),
        ("packed.csv", gzip.compress(b"prompt\na\n", mtime=0), "a gzip file: unpack it first"),
        ("packed.txt", b"PK\x03\x04....", "a zip file"),
        ("z.parquet", b"PAR1 no", "not a readable table"),
        ("n.json", b'[{"caption": NaN}]', "NaN is not JSON"),
        ("deep.json", b"[" * 100_000, "not readable as JSON"),
        ("kinds.json", b'[{"caption": "a"}, 3]', "row 1: not a JSON object"),
        ("list.json", b'[{"caption": ["a"]}]', "row 0: caption = ['a'] is no text"),
        ("uneven.json", b'{"caption": ["a", "b"], "seed": [1]}', "different lengths (caption: 2, seed: 1)"),
        ("line.jsonl", b'{"caption": "a"}\n7\n', "line 2: not a JSON object"),
        ("key.json", b'[{"caption": "a", "caption": "b"}]', "a key stands twice"),
        ("all.json", b'{"annotations":[{"image_id":2,"id":9,"caption":null}]}', "all captions are empty"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused_in_one_line(tmp_path, name, content, said):
    with pytest.raises(ErasebenchError) as caught:
        captions(written(tmp_path / name, content))
    message = str(caught.value)
    assert said in message and name in message and "\n" not in message


def test_a_folder_or_no_file_is_said(tmp_path):
    for path, said in ((tmp_path, "a folder"), (tmp_path / "x.csv", "no such file"), ("/dev/null", "not a regular file")):
        with pytest.raises(ErasebenchError, match=said):
            captions(path)
    for option in ("words.csv", "words.jsonl"):
        with pytest.raises(ErasebenchError, match="a table: give a text file, one entry a line"):
            prompt_files.lines(written(tmp_path / option, "prompt\na\n"), "method.templates")


@pytest.mark.parametrize(
    ("written_as", "seed"),
    [("7", 7), ("007", 7), ("1.0", 1), ("4294967295.0", 2**32 - 1), (str(2**62 + 1), 2**62 + 1), (" 3 ", 3)],
)
def test_seeds_are_exact_whole_numbers(tmp_path, written_as, seed):
    path = written(tmp_path / "t.csv", f"prompt,seed\na,{written_as}\n")
    assert prompt_files.prompts({"path": str(path)})[0][0].seed == seed


@pytest.mark.parametrize("written_as", ["1.5", "-1", "1e3", str(2**63), "inf", "0x7", "1_0", "٣", "", "true"])
def test_what_is_no_seed_is_refused(tmp_path, written_as):
    path = written(tmp_path / "t.csv", f"prompt,seed\na,{written_as}\n")
    with pytest.raises(ErasebenchError, match="row 0: seed"):
        prompt_files.prompts({"path": str(path)})


def line_or_value(suffix, content):
    """One clear line or a value, whatever the file holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / f"t{suffix}", content)
        for reader in (captions, lambda p: prompt_files.prompts({"path": str(p)}), lambda p: prompt_files.lines(p, "x")):
            try:
                reader(path)
            except ErasebenchError as error:
                assert str(error) and "\n" not in str(error).replace(str(path), ""), error


SUFFIX = st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt"])


@QUICK
@given(SUFFIX, st.binary(max_size=200))
def test_any_bytes_are_a_line_or_a_value(suffix, content):
    line_or_value(suffix, content)


def valid(suffix):
    frame = pd.DataFrame({"prompt": ["a, b", 'c "d"\ne'], "seed": [1, 2], "concept": ["cat", "dog"]})
    if suffix == ".parquet":
        return frame.to_parquet()
    if suffix in (".json", ".jsonl"):
        return frame.to_json(orient="records", lines=suffix == ".jsonl").encode()
    return frame.to_csv(sep="\t" if suffix == ".tsv" else ",", index=False).encode()


VALID = {suffix: valid(suffix) for suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")}
ODD = [b'"', b",", b"\n", b"\0", b"\xff", b"\r", b"{", b"]", b"null", b"1.5", b"NaN", b"\xef\xbb\xbf", b"", b'"prompt"']


@QUICK
@given(SUFFIX, st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.sampled_from(ODD)), min_size=1, max_size=4))
def test_a_spoilt_table_is_a_line_or_a_value(suffix, changes):
    content = VALID[suffix]
    for where, cut, put in changes:
        at = int(where * len(content))
        content = content[:at] + put + content[at + cut :]
    line_or_value(suffix, content)


@QUICK
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40), min_size=1, max_size=5))
def test_any_text_comes_back_as_it_was_written(texts):
    with tempfile.TemporaryDirectory() as folder:
        for suffix, dump in ((".csv", None), (".json", json.dumps)):
            path = Path(folder) / f"t{suffix}"
            if dump:
                path.write_text(dump([{"prompt": text, "seed": i} for i, text in enumerate(texts)]))
            else:
                cells = [text.replace('"', '""') for text in texts]
                rows = "".join(f'"{text}",{i}\n' for i, text in enumerate(cells))
                path.write_bytes(("prompt,seed\n" + rows).encode())
            rows, dropped = prompt_files.prompts({"path": str(path)})
            assert [r.text for r in rows] == [texts[r.number] for r in rows] and len(rows) + dropped == len(texts)
