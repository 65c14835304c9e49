"""The store: nothing twice, nothing half-made, nothing outside its folder."""

import errno
import fcntl
import json
import multiprocessing
import os
from dataclasses import dataclass

import pytest
from safetensors import SafetensorError

from erasebench import cli
from erasebench.contracts import ErasebenchError
from erasebench.store.local import Store, canonical, digest


def write(text):
    return lambda folder: (folder / "x.txt").write_text(text)


def test_an_entry_is_made_once_and_read_back():
    store, calls = Store(), []
    for _ in range(2):
        path = store.get_or_make("kind", {"a": 1}, lambda f: (calls.append(1), write("hello")(f)))
    assert (path / "x.txt").read_text() == "hello" and calls == [1]
    assert json.loads((path / "identity.json").read_text()) == {"a": 1}
    assert Store().get("kind", {"a": 2}) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "identity"])
def test_a_damaged_entry_is_noticed_and_made_again(damage, caplog):
    path = Store().get_or_make("kind", {"a": 1}, write("hello"))
    file = path / {"manifest": "manifest.json", "identity": "identity.json"}.get(damage, "x.txt")
    if damage == "remove":
        file.unlink()
    else:
        file.write_text({"flip": "hellO", "truncate": "he", "manifest": "{", "identity": "{}"}[damage])
    again = Store()
    assert again.get("kind", {"a": 1}) is None and "damaged" in caplog.text
    assert (again.get_or_make("kind", {"a": 1}, write("hello")) / "x.txt").read_text() == "hello"


def test_what_fails_leaves_nothing_behind():
    store = Store()

    def fail(folder):
        write("half")(folder)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.get_or_make("kind", 1, fail)
    assert list(store.entries()) == [] and store.get("kind", 1) is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_and_a_folder_that_cannot_be_written_are_one_clear_line(tmp_path, error):
    def full(folder):
        raise error

    with pytest.raises(ErasebenchError, match="No space left.*free some space"):
        Store().get_or_make("kind", 1, full)
    (tmp_path / "file").write_text("")
    with pytest.raises(ErasebenchError, match="ERASEBENCH_HOME"):
        Store(tmp_path / "file").get_or_make("kind", 1, write("x"))


def test_on_a_shared_folder_without_locks_the_first_of_two_wins(monkeypatch, caplog):
    def no_locks(*given):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)

    def slowly(folder):
        first = Store().get_or_make("kind", 1, write("first"))
        assert (first / "x.txt").read_text() == "first"
        write("second")(folder)

    store = Store()
    assert (store.get_or_make("kind", 1, slowly) / "x.txt").read_text() == "first"
    assert [path.name for _, path in store.entries()] == [digest(1)] and "damaged" not in caplog.text


def test_who_need_not_wait_leaves_the_entry_to_another():
    def fill(folder):
        assert Store().get_or_make("kind", 1, write("x"), wait=False) is None
        write("x")(folder)

    assert Store().get_or_make("kind", 1, fill) and Store().get_or_make("kind", 1, fill, wait=False)


def _maker(number, barrier, queue):
    barrier.wait()
    store = Store()
    path = store.get_or_make("kind", "same", write(str(number)))
    queue.put((path / "x.txt").read_text())


def test_processes_that_want_the_same_entry_get_one():
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_maker, args=(i, barrier, queue)) for i in range(4)]
    for worker in workers:
        worker.start()
    seen = {queue.get(timeout=30) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(seen) == 1


def test_identity_is_text_and_order_does_not_matter():
    @dataclass(frozen=True)
    class A:
        x: float = 1.0

    @dataclass(frozen=True)
    class B:
        x: float = 1.0

    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    assert digest(A()) != digest(B()) and digest(A()) != digest(A(2.0))
    assert "…" in canonical({"name": "…"})
    with pytest.raises(TypeError, match="no canonical text"):
        canonical(object())
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        canonical(float("nan"))


def test_size_list_and_gc(capsys):
    store = Store()
    old = store.get_or_make("images", 1, write("a" * 1000))
    kept = store.get_or_make("scores", 2, write("b"))
    broken = store.get_or_make("scores", 3, write("c"))
    (broken / "x.txt").write_text("changed")
    leftover = store.root / "images" / ".abc.1"
    leftover.mkdir()
    for path in (old / "manifest.json", leftover):
        os.utime(path, (0, 0))
    cli.main(["store"])
    assert "scores" in capsys.readouterr().out
    cli.main(["store", "list"])
    assert old.name[:16] in capsys.readouterr().out
    held = store.root / "images" / f".{'a' * 64}.1"
    held.mkdir()
    os.utime(held, (0, 0))
    with (store.root / "locks" / ("a" * 64)).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in (store.root / "locks").iterdir():
            os.utime(path, (0, 0))
        cli.main(["store", "gc"])
        assert held.exists() and [path.name for path in (store.root / "locks").iterdir()] == ["a" * 64]
    cli.main(["store", "gc"])
    assert not held.exists() and not list((store.root / "locks").iterdir())
    assert not leftover.exists() and not broken.exists() and old.exists() and kept.exists()
    os.utime(old / "manifest.json", (0, 0))
    cli.main(["store", "gc", "--older", "30"])
    assert not old.exists() and kept.exists()
