"""Whatever operation fails, and whoever owns the files: old or new, never neither, never half, and one line of error."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from erasebench.methods.uce import UCE
from faults import Disk
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rows import example

from erasebench import cli, rows
from erasebench.contracts import ErasebenchError
from erasebench.run import run
from erasebench.store import local as store_module
from erasebench.store.local import Store, check, digest
from erasebench.store.manifest import IDENTITY, MANIFEST, Damaged, files_of

KEY = digest({"a": 1})


def write(text):
    return lambda folder: (folder / "x.txt").write_text(text)


def refuse(folder):
    pytest.fail("made again")


# -- errors at every operation ----------------------------------------------------------------------------------------


class World:
    """A state on the disk, something that changes it, and what may be read afterwards."""

    def __init__(self, folder):
        self.folder, self.url = folder, f"file://{folder}/remote"

    def store(self, name="home", url=None):
        return Store(self.folder / name, url, lease=0.1)

    def text(self, store):
        entry = store.get("kind", {"a": 1})
        return (entry / "x.txt").read_text() if entry else None


class NewEntry(World):
    may_be = (None, "new")

    def change(self):
        self.store().get_or_make("kind", {"a": 1}, write("new"))

    def now(self):
        return self.text(self.store())


class DamagedEntry(NewEntry):
    def __init__(self, folder):
        super().__init__(folder)
        entry = self.store().get_or_make("kind", {"a": 1}, write("old"))
        (entry / "x.txt").write_text("odd")


class Uploaded(NewEntry):
    def change(self):
        self.store(url=self.url).get_or_make("kind", {"a": 1}, write("new"))

    def now(self):
        here, there = self.text(self.store()), self.text(self.store("another", self.url))
        shutil.rmtree(self.folder / "another", ignore_errors=True)
        assert there in (None, here)
        return there


class Fetched(World):
    may_be = ("new",)

    def __init__(self, folder):
        super().__init__(folder)
        self.store("maker", self.url).get_or_make("kind", {"a": 1}, write("new"))

    def change(self):
        assert self.store(url=self.url).get("kind", {"a": 1})

    def now(self):
        assert self.text(self.store()) in (None, "new")
        there = self.text(self.store("another", self.url))
        shutil.rmtree(self.folder / "another", ignore_errors=True)
        return there


class NewRows(World):
    may_be = (None, "new")

    @property
    def file(self):
        return self.folder / "runs" / "a.csv"

    def change(self):
        rows.write([example(run_id="new"), example(run_id="new", metric="b")], self.file)

    def now(self):
        if not self.file.exists():
            return None
        there = rows.read(self.file)
        assert len(there) == 2
        return there[0].run_id


class RowsAgain(NewRows):
    may_be = ("old", "new")

    def __init__(self, folder):
        super().__init__(folder)
        rows.write([example(run_id="old"), example(run_id="old", metric="b")], self.file)


@pytest.mark.parametrize("number,lasts", [(errno.ENOSPC, False), (errno.EIO, False), (errno.ENOSPC, True)])
@pytest.mark.parametrize("world", [NewEntry, DamagedEntry, Uploaded, Fetched, NewRows, RowsAgain])
def test_an_error_at_any_operation_leaves_old_or_new(world, number, lasts, tmp_path, monkeypatch):
    for at in itertools.count(1):
        here = world(tmp_path / str(at))
        disk = Disk(at, number, lasts, below=here.folder)
        with disk.failing(monkeypatch):
            try:
                here.change()
                assert disk.hit or at > 4
            except ErasebenchError as error:
                assert disk.hit and "\n" not in str(error)
        if not disk.hit:
            assert here.now() == "new"
            return
        assert here.now() in here.may_be
        here.change()
        assert here.now() == "new"


def test_a_repeated_run_works_from_a_store_that_nobody_may_write(make_run, monkeypatch, tmp_path):
    work = make_run("uce", UCE())
    first = run.execute(work)
    with Disk(1, errno.EROFS, lasts=True, below=tmp_path / "home").failing(monkeypatch):
        assert run.execute(work) == first
        (other,) = run.execute(replace(work, seed=1))
    assert other.status == "failed" and "cannot be written (Read-only file system)" in other.reason


# -- what is damage, and what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize("passes", [True, False])
def test_what_cannot_be_read_is_no_damage(number, passes, monkeypatch):
    if passes and number == errno.EACCES:
        pytest.skip("a right that is missing does not come by waiting")
    path = Store().get_or_make("kind", {"a": 1}, write("x"))
    original, left = store_module.sha256_file, [2 if passes else 99]

    def read(file):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
        return original(file)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "PAUSES", (0, 0, 0))
        patch.setattr(store_module, "sha256_file", read)
        if passes:
            assert Store().get_or_make("kind", {"a": 1}, refuse) == path
        else:
            for ask in (Store().get, lambda *of: Store().get_or_make(*of, refuse)):
                with pytest.raises(ErasebenchError, match=f"{os.strerror(number)}.* stays as it is"):
                    ask("kind", {"a": 1})
            assert cli.main(["store", "gc", "--older", "0"]) == 1
    assert Store().get("kind", {"a": 1}) == path


def _add(path, change):
    files = json.loads((path / MANIFEST).read_text())
    change(files)
    (path / MANIFEST).write_text(json.dumps(files))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / MANIFEST).write_text("{}"),
        lambda path: _add(path, lambda files: files.pop(IDENTITY)),
        lambda path: _add(path, lambda files: files.pop("x.txt")),
        lambda path: _add(path, lambda files: files.update(y=files["x.txt"])),
        lambda path: (path / "more").write_text("x"),
        lambda path: (path / "part" / "deep").mkdir(parents=True) or (path / "part" / "deep" / "more").write_text("x"),
        lambda path: (path / "link").symlink_to("/"),
        lambda path: (path / MANIFEST).unlink(),
        lambda path: (path / IDENTITY).unlink(),
        lambda path: (path / "x.txt").unlink() or (path / "x.txt").mkdir(),
        lambda path: (path / "x.txt").unlink() or os.mkfifo(path / "x.txt"),
        lambda path: shutil.rmtree(path) or path.write_text("a file"),
    ],
)
def test_an_entry_is_whole_or_damaged(damage, caplog):
    path = Store().get_or_make("kind", {"a": 1}, write("x"))
    damage(path)
    assert Store().get("kind", {"a": 1}) is None and "is damaged" in caplog.text
    assert Store().get_or_make("kind", {"a": 1}, write("x")) == path
    assert Store().get_or_make("kind", {"a": 1}, refuse) == path


def test_an_entry_that_somebody_made_again_meanwhile_is_not_discarded(monkeypatch):
    path = Store().get_or_make("kind", {"a": 1}, write("x"))
    (path / "x.txt").write_text("y")
    store, original = Store(), Store._discard

    def late(self, path):
        (path / "x.txt").write_text("x")
        return original(self, path)

    monkeypatch.setattr(Store, "_discard", late)
    assert store.get_or_make("kind", {"a": 1}, refuse) == path


def test_a_name_that_no_manifest_may_hold_is_an_error_when_it_is_made():
    with pytest.raises(ErasebenchError, match="a file that the store cannot hold"):
        Store().get_or_make("kind", 1, lambda folder: (folder / "a\nb").write_text("x"))
    assert list(Store().entries()) == []


sums = st.sampled_from(["0" * 64, "f" * 64, "0" * 63, "F" * 64, ""])
names = st.one_of(st.text(max_size=8), st.sampled_from([IDENTITY, MANIFEST, "x/y", "x", "../x", "/x", "a/" * 400]))
manifests = st.one_of(
    st.binary(max_size=40),
    st.dictionaries(names, st.one_of(sums, st.integers(), st.none()), max_size=4).map(lambda d: json.dumps(d).encode()),
    st.dictionaries(names, sums, max_size=4).map(lambda d: json.dumps(d | {IDENTITY: "0" * 64}).encode()),
    st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=4).map(lambda v: json.dumps(v).encode()),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b'{"x":"","x":""}', b"\xff", b'"\\ud800"']),
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(manifests)
def test_a_manifest_is_damaged_or_a_value(manifest):
    try:
        files = files_of(manifest)
    except Damaged as error:
        assert len(str(error)) < 500
        return
    assert IDENTITY in files
    for name, checksum in files.items():
        assert len(checksum) == 64 and os.path.normpath(f"/entry/{name}") == f"/entry/{name}"


# -- several users ----------------------------------------------------------------------------------------------------

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def shared():
    """A folder that other users can reach, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(work):
    """What work() returns, or the error it raises, in a process of another user."""

    def child(queue):
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            queue.put(work())
        except BaseException as error:
            queue.put(f"{type(error).__name__}: {error}")

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    said = queue.get(timeout=60)
    process.join()
    return said


@as_root
@pytest.mark.parametrize("mode,writes", [(0o755, False), (0o1777, True), (0o777, True)])
def test_another_user_uses_the_store(shared, mode, writes, capfd):
    store = Store(shared)
    store.root.mkdir()
    store.root.chmod(mode)
    path = store.get_or_make("kind", {"a": 1}, write("x"))
    assert as_nobody(lambda: Store(shared).get_or_make("kind", {"a": 1}, refuse)) == path
    with store.claim("kind", 3):
        assert as_nobody(lambda: Store(shared).being_made(digest(3))) is True
    new = as_nobody(lambda: Store(shared).get_or_make("kind", {"a": 2}, write("y")))
    if writes:
        assert (new / "x.txt").read_text() == "y" and store.get("kind", {"a": 2}) == new
    else:
        assert "cannot be written (Permission denied)" in new and new.startswith("ErasebenchError")
        (path / "x.txt").write_text("damage")
        said = as_nobody(lambda: Store(shared).get_or_make("kind", {"a": 1}, write("x")))
        assert said.startswith("ErasebenchError") and "is damaged and cannot be removed" in said
    (path / "x.txt").write_text("x")
    (path / "x.txt").chmod(0)
    said = as_nobody(lambda: Store(shared).get_or_make("kind", {"a": 1}, refuse))
    assert said.startswith("Unreadable") and "stays as it is" in said and path.exists()


# -- gc ---------------------------------------------------------------------------------------------------------------


def test_gc_leaves_alone_whatever_is_not_the_stores(tmp_path, capsys):
    store = Store()
    whole = store.get_or_make("kind", {"a": 1}, write("x"))
    hexes = "ab" * 32
    outside = tmp_path / "outside" / hexes
    foreign = [
        store.root / "thesis" / "chapter" / "one.tex",
        store.root / "kind" / "notes" / "x.txt",
        store.root / "kind" / hexes / "layer.tar",
        store.root / "oci" / hexes / MANIFEST,
        store.root / "kind" / ".git" / "HEAD",
        store.root / "kind" / ".snapshot.d" / "x",
        store.root / "a.txt",
        store.root / "kind" / "b.txt",
        store.root / "locks" / "readme",
        outside / IDENTITY,
    ]
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("[]")
        for place in (file, file.parent):
            os.utime(place, (0, 0))
    (store.root / "linked").symlink_to(outside.parent)
    (store.root / "kind" / ("cd" * 32)).symlink_to(outside)
    assert cli.main(["store", "gc", "--older", "0"]) == 0
    assert all(file.exists() for file in foreign) and not whole.exists()
    assert "removed 1 entries" in capsys.readouterr().out


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "-0.001", "soon", ""])
def test_gc_refuses_what_is_no_number_of_days(days, capsys):
    path = Store().get_or_make("kind", {"a": 1}, write("x"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["store", "gc", f"--older={days}"])
    assert stop.value.code == 2 and "--older" in capsys.readouterr().err and path.exists()


def test_gc_leaves_what_is_being_made(capsys):
    store = Store()
    path = store.get_or_make("kind", {"a": 1}, write("x"))
    with store.claim("kind", {"a": 1}):
        assert cli.main(["store", "gc", "--older", "0"]) == 0 and path.exists()

    def fill(folder):
        write("y")(folder)
        assert cli.main(["store", "gc", "--older", "0"]) == 0

    assert store.get_or_make("kind", {"a": 2}, fill)


@pytest.mark.parametrize("command", ["size", "list", "gc"])
def test_commands_beside_processes_that_make_and_remove(command, monkeypatch, capsys):
    """Every file that a command has seen is gone when it looks closer."""
    store = Store()
    for i in range(4):
        store.get_or_make("kind", i, write(str(i)))
    original = store_module._listed

    def seen(folder):
        found = original(folder)
        if folder.name == "kind":
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(store_module, "_listed", seen)
    monkeypatch.setattr(store_module, "_is_own", lambda path: True)
    assert cli.main(["store", command]) == 0 and not capsys.readouterr().err


@pytest.mark.parametrize(
    "error,code", [(KeyboardInterrupt(), 130), (OSError(errno.EIO, "no"), 1), (BrokenPipeError(), 141)]
)
def test_a_command_that_is_interrupted_says_one_line(error, code, monkeypatch, capfd):
    def entries(store):
        raise error

    monkeypatch.setattr(Store, "entries", entries)
    kept = os.dup(1)
    try:
        assert cli.main(["store", "list"]) == code
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    said = capfd.readouterr().err
    assert said.count("\n") == (code != 141) and "Traceback" not in said


def test_an_entry_of_the_previous_version_is_whole():
    """With files in folders, hidden ones, and what an operating system has put beside them."""

    def fill(folder):
        (folder / "part").mkdir()
        for name in ("part/x", ".hidden"):
            (folder / name).write_text("x")

    path = Store().get_or_make("kind", 1, fill)
    (path / "empty").mkdir()
    (path / ".DS_Store").write_text("")
    check(path, path.name)
    assert set(json.loads((path / MANIFEST).read_text())) == {IDENTITY, "part/x", ".hidden"}
