"""The store of several machines: each entry is made once, nothing half-uploaded is read, and no clock but one's own counts.

A machine is a store with a folder of its own."""

import errno
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from erasebench.methods.uce import UCE
from fsspec.registry import _registry

from erasebench import cli, config
from erasebench.contracts import ErasebenchError
from erasebench.model.model import Model
from erasebench.run import run
from erasebench.store.local import Store, digest

KEY = digest({"a": 1})


def write(text):
    return lambda folder: (folder / "x.txt").write_text(text)


def refuse(folder):
    pytest.fail("made again")


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    return f"file://{tmp_path}/remote" if request.param == "file" else f"memory://{secrets.token_hex(4)}"


@pytest.fixture
def folder(tmp_path):
    return f"file://{tmp_path}/remote"


@pytest.fixture
def machine(tmp_path):
    return lambda name, url, lease=60.0: Store(tmp_path / str(name), url, lease)


def remote_files(store):
    return sorted(path.removeprefix(store.remote.root) for path in store.remote.fs.find(store.remote.root))


def test_what_one_machine_made_another_fetches_once(machine, url):
    def fill(folder):
        (folder / "part" / "deep").mkdir(parents=True)
        for name in ("x.txt", "part/same.txt", "part/deep/y.bin"):
            (folder / name).write_bytes(name[-1].encode())

    here, there = machine(1, url), machine(2, url)
    made = here.get_or_make("kind", {"a": 1}, fill)
    assert there.has("kind", {"a": 1}) and not there.has("kind", {"a": 2}) and not there.root.exists()
    got = there.get_or_make("kind", {"a": 1}, refuse)
    read_back = lambda path: {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    assert read_back(got) == read_back(made) and len(read_back(got)) == 5
    assert not [name for name in remote_files(here) if "lease" in name] and here.get("kind", {"a": 2}) is None
    for store in (here, there):  # known to be whole and shared: no request
        store.remote = object()
        assert store.get("kind", {"a": 1}) and store.get_or_make("kind", {"a": 1}, refuse)


def test_an_entry_that_is_only_here_is_uploaded_when_it_is_asked_for(machine, url, monkeypatch):
    monkeypatch.setenv("ERASEBENCH_STORE", "")
    machine(1, None).get_or_make("kind", {"a": 1}, write("old"))
    monkeypatch.setenv("ERASEBENCH_STORE", url)
    assert machine(2, None).get("kind", {"a": 1}) is None
    machine(1, None).get("kind", {"a": 1})
    assert (machine(2, None).get("kind", {"a": 1}) / "x.txt").read_text() == "old"


@pytest.mark.parametrize("damage", ["flip", "remove", "manifest", "identity"])
def test_a_damaged_remote_entry_is_noticed_and_made_again(machine, url, damage, caplog):
    first = machine(1, url)
    path = first.get_or_make("kind", {"a": 1}, write("hello"))
    fs, entry = first.remote.fs, f"{first.remote.root}/kind/{KEY}"
    manifest = json.loads((path / "manifest.json").read_text())
    if damage == "flip":
        fs.pipe_file(f"{entry}/{manifest['x.txt']}", b"hellO")
    elif damage == "remove":
        fs.rm_file(f"{entry}/{manifest['x.txt']}")
    elif damage == "manifest":
        fs.pipe_file(f"{entry}/manifest.json", b'{"x.txt": ')
    else:  # another entry's, whole in itself
        other = first.get_or_make("kind", {"a": 2}, write("other"))
        first.remote.upload(f"kind/{KEY}", other)
    second = machine(2, url)
    assert second.get("kind", {"a": 1}) is None and "damaged" in caplog.text
    assert list(second.entries()) == [] and f"/kind/{KEY}/manifest.json" not in remote_files(first)
    assert (second.get_or_make("kind", {"a": 1}, write("hello")) / "x.txt").read_text() == "hello"
    assert (machine(3, url).get("kind", {"a": 1}) / "x.txt").read_text() == "hello"


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "{tmp}/x",
        "a/../../x",
        "a//x",
        "./x",
        "manifest.json",
        "",
        ".",
        "x\0",
        "x" * 300,
        "\ud800",
        "x.txt/below",
    ],
)
def test_a_remote_manifest_names_no_file_outside_its_entry(machine, url, name, caplog, tmp_path):
    first = machine(1, url)
    path = first.get_or_make("kind", {"a": 1}, write("hello"))
    files = json.loads((path / "manifest.json").read_text())
    hostile = json.dumps(files | {name.replace("{tmp}", str(tmp_path)): files["x.txt"]}).encode()
    first.remote.fs.pipe_file(f"{first.remote.root}/kind/{KEY}/manifest.json", hostile)
    before = sorted(tmp_path.rglob("*"))
    second = machine(2, url)
    assert second.get("kind", {"a": 1}) is None and "damaged" in caplog.text
    new = set(tmp_path.rglob("*")) - set(before)
    assert not [path for path in new if path.is_file()]
    assert second.get_or_make("kind", {"a": 1}, write("hello"))


@pytest.mark.parametrize(
    "manifest", [b"[]", b"[" * 100_000, b'{"x": 1}', b'{"x": "../../secret"}', b"\xff\xfe{", b"{}"]
)
def test_what_is_no_manifest_is_damage(machine, folder, manifest, caplog):
    store = machine(1, folder)
    store.remote.fs.pipe_file(f"{store.remote.root}/kind/{KEY}/manifest.json", manifest)
    assert store.get("kind", {"a": 1}) is None and "damaged" in caplog.text


def test_keys_and_find(machine, url):
    first, second = machine(1, url), machine(2, url)
    made = [first.get_or_make("kind", i, write(str(i))).name for i in range(3)]
    own = second.get_or_make("kind", 3, write("3")).name
    assert second.keys("kind", "") == sorted([*made, own]) and second.keys("kind", made[0][:8]) == made[:1]
    assert second.keys("none", "") == [] and (second.find("kind", made[1]) / "x.txt").read_text() == "1"
    (first.root / "secret").mkdir()
    for key in ("../secret", "0" * 64, "", made[0][:8], made[0] + "\n"):
        assert second.find("kind", key) is None and first.find("kind", key) is None


@pytest.mark.parametrize(
    "url,message",
    [
        ("/data/store", "a URL is needed"),
        ("foo://bucket", "Protocol not known: foo"),
        ("gs://bucket", "gcsfs"),
        ("s3://bucket", r"pip install 'erasebench\[s3\]'"),
        ("file:///dev/null/store", "store.url=file:///dev/null/store: "),
    ],
)
def test_a_url_that_cannot_be_used_is_one_clear_line(machine, url, message, monkeypatch, capsys):
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(_registry, package[:2], raising=False)  # where another test has used it
    with pytest.raises(ErasebenchError, match=message) as error:
        machine(1, url).get_or_make("kind", 1, refuse)
    assert "\n" not in str(error.value)
    if not url.startswith("file"):
        monkeypatch.setenv("ERASEBENCH_STORE", url)
        assert cli.main(["store", "gc"]) == 1 and "error: store.url=" in capsys.readouterr().err


def in_process(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def _die_while_making(store):
    store.get_or_make("kind", {"a": 1}, lambda folder: os.kill(os.getpid(), signal.SIGKILL))


def _die_before_the_manifest(store):
    put = store.remote._put
    last = lambda path: path.endswith("manifest.json")
    store.remote._put = lambda file, path: os.kill(os.getpid(), signal.SIGKILL) if last(path) else put(file, path)
    store.get_or_make("kind", {"a": 1}, write("half"))


def _die_within_the_manifest(store):
    put = store.remote.fs.put_file

    def half(file, path):
        put(file, path)
        if "manifest.json" in path:
            os.truncate(path, 9)
            os.kill(os.getpid(), signal.SIGKILL)

    store.remote.fs.put_file = half
    store.get_or_make("kind", {"a": 1}, write("half"))


@pytest.mark.parametrize("die", [_die_while_making, _die_before_the_manifest, _die_within_the_manifest])
def test_after_a_killed_maker_another_makes_the_entry(machine, folder, die, caplog):
    process = in_process(die, machine(1, folder, 0.3))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    second = machine(2, folder, 0.3)
    assert second.get("kind", {"a": 1}) is None and not second.has("kind", {"a": 1})
    assert second.get_or_make("kind", {"a": 1}, refuse, wait=False) is None  # nobody knows yet that it is dead
    assert (second.get_or_make("kind", {"a": 1}, write("whole")) / "x.txt").read_text() == "whole"
    assert "is gone, taking over" in caplog.text and "damaged" not in caplog.text
    assert not [name for name in remote_files(second) if "lease" in name]
    again = machine(1, folder).get_or_make("kind", {"a": 1}, write("whole"))
    assert (again / "x.txt").read_text() in ("half", "whole")  # its own was whole, and as good


def test_on_its_own_machine_nobody_waits_for_the_lease_of_a_killed_maker(machine, folder):
    in_process(_die_while_making, machine(1, folder, 1000.0)).join()
    assert machine(2, folder, 1000.0).get_or_make("kind", {"a": 1}, refuse, wait=False) is None
    path = machine(1, folder, 1000.0).get_or_make("kind", {"a": 1}, write("x"), wait=False)
    assert (path / "x.txt").read_text() == "x"


def test_who_need_not_wait_takes_over_once_it_has_seen_a_lease_expire(machine, url):
    store = machine(1, url, 0.2)
    store.remote.fs.pipe_file(f"{store.remote.root}/leases/{KEY}/0", b"somebody 4")
    assert store.get_or_make("kind", {"a": 1}, refuse, wait=False) is None
    store.remote.fs.pipe_file(f"{store.remote.root}/leases/{KEY}/0", b"somebody 5")
    time.sleep(0.25)
    assert store.get_or_make("kind", {"a": 1}, refuse, wait=False) is None  # it has counted
    time.sleep(0.25)
    assert store.get_or_make("kind", {"a": 1}, write("x"), wait=False)


def _drive(root, url, order, log):
    store = Store(root, url)

    def make(i):
        def fill(folder):
            (log / f"{i}.{secrets.token_hex(4)}").touch()
            time.sleep(0.01)
            write(str(i))(folder)

        return fill

    store.lease = 2.0
    waiting = [i for i in order if store.get_or_make("kind", i, make(i), wait=False) is None]
    for i in waiting:
        store.get_or_make("kind", i, make(i))


def test_two_drivers_of_one_remote_store_make_each_entry_once(machine, folder, tmp_path):
    (tmp_path / "log").mkdir()
    orders = (list(range(20)), [*range(10, 20), *range(10)], list(range(20)))
    homes = (1, 2, 2)  # the last two on one machine
    drivers = [
        in_process(_drive, tmp_path / f"machine{home}", folder, order, tmp_path / "log")
        for home, order in zip(homes, orders, strict=True)
    ]
    for driver in drivers:
        driver.join()
    assert [driver.exitcode for driver in drivers] == [0, 0, 0]
    assert sorted(int(file.stem) for file in (tmp_path / "log").iterdir()) == list(range(20))
    for store in (Store(tmp_path / "machine1", folder), machine(3, folder)):
        assert [(store.get("kind", i) / "x.txt").read_text() for i in range(20)] == [str(i) for i in range(20)]


def test_a_clock_that_jumps_takes_no_lease_away(machine, folder, monkeypatch):
    """The maker lives for longer than its lease, by its own count, while the time of day goes back and forth."""
    first, second, made = machine(1, folder, 2.0), machine(2, folder, 2.0), []
    jumps = iter(range(1, 10_000))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86400 * (-1) ** next(jumps))

    def slowly(here):
        made.append(1)
        started.set()
        lease = Path(first.remote.root, "leases", KEY, "0")
        while int((lease.read_text().split() or "00")[-1]) < 8:  # a beat is a sixth of the lease
            time.sleep(0.05)
        write("x")(here)

    started = threading.Event()
    maker = threading.Thread(target=first.get_or_make, args=("kind", {"a": 1}, slowly))
    maker.start()
    started.wait()
    assert second.get_or_make("kind", {"a": 1}, refuse, wait=False) is None
    assert (second.get_or_make("kind", {"a": 1}, refuse) / "x.txt").read_text() == "x"
    maker.join()
    assert made == [1]


def test_of_many_that_see_a_lease_expire_at_once_one_takes_over_at_a_time(machine, folder):
    stores = [machine(i, folder, 0.5) for i in range(6)]
    stores[0].remote.fs.pipe_file(f"{stores[0].remote.root}/leases/{KEY}/3", b"somebody 4")
    inside, most, together = [], [], threading.Barrier(6)

    def all_at_once(create):
        first = [1]
        return lambda *given: (first and first.pop() and together.wait(timeout=30), create(*given))[1]

    def hold(store):
        store.remote._create = all_at_once(store.remote._create)
        with store.remote.lease(KEY, secrets.token_hex(8), wait=True):
            inside.append(store)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(store)

    threads = [threading.Thread(target=hold, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6 and stores[0].remote.names(f"leases/{KEY}") == []


def test_who_was_only_slow_leaves_the_lease_that_took_over_alone(machine, url, monkeypatch):
    slow, quick, third = (machine(i, url, 0.2) for i in range(3))
    monkeypatch.setattr(slow.remote, "_renew", lambda *given: None)  # as if it hung
    with slow.remote.lease(KEY, secrets.token_hex(8), wait=True):
        taken = quick.remote.lease(KEY, secrets.token_hex(8), wait=True)
        assert taken.__enter__()
    with third.remote.lease(KEY, secrets.token_hex(8), wait=False) as ours:
        assert not ours
    taken.__exit__(None, None, None)
    assert third.remote.names(f"leases/{KEY}") == []


def test_two_makers_at_once_never_give_a_mixed_entry(machine, url, caplog):
    """Both upload, their files differ, and they take turns: whatever a third sees is of one of them."""
    texts = ("first", "second")
    makers = [machine(i, url) for i in range(2)]
    for maker, text in zip(makers, texts, strict=True):
        maker.url, maker.remote = None, None
        both = lambda folder, text=text: [(folder / name).write_text(text) for name in ("x.txt", "y.txt", "z.txt")]
        maker.get_or_make("kind", {"a": 1}, both)
    entry, remotes = f"kind/{KEY}", [machine(f"remote {i}", url).remote for i in range(2)]
    turn, seen, lock = threading.Condition(), [], [0]

    def in_turns(me):
        put = remotes[me]._put

        def one(file, path):
            with turn:
                turn.wait_for(lambda: lock[0] % 2 == me, timeout=5)
                put(file, path)
                if got := machine(f"reader {len(seen)}", url).get("kind", {"a": 1}):
                    seen.append({file.read_text() for file in got.glob("?.txt")})
                lock[0] += 1
                turn.notify_all()

        return one

    for me, remote in enumerate(remotes):
        remote._put = in_turns(me)
    threads = [
        threading.Thread(target=remote.upload, args=(entry, maker.root / "kind" / KEY))
        for remote, maker in zip(remotes, makers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [{"first"}, {"second"}] and "damaged" not in caplog.text


def test_a_full_disk_while_fetching_or_making_is_one_clear_line_and_leaves_nothing(machine, folder, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first, second = machine(1, folder), machine(2, folder)
    with pytest.raises(ErasebenchError, match="No space left.*free some space"):
        first.get_or_make("kind", {"a": 1}, full)
    assert remote_files(first) == [] and list(first.entries()) == []
    first.get_or_make("kind", {"a": 1}, write("x"))
    with monkeypatch.context() as patch:
        patch.setattr(second.remote.fs, "get_file", full)
        with pytest.raises(ErasebenchError, match="No space left.*free some space"):
            second.get("kind", {"a": 1})
    assert list(second.entries()) == [] and (second.get("kind", {"a": 1}) / "x.txt").read_text() == "x"


def test_what_could_not_be_uploaded_is_kept_and_uploaded_later(machine, folder, monkeypatch):
    first = machine(1, folder)
    with monkeypatch.context() as patch:
        patch.setattr(first.remote, "_put", lambda *given: (_ for _ in ()).throw(ConnectionError("no route")))
        with pytest.raises(ErasebenchError, match="store.url=.*no route"):
            first.get_or_make("kind", {"a": 1}, write("x"))
    assert machine(2, folder).get("kind", {"a": 1}) is None
    assert first.get_or_make("kind", {"a": 1}, refuse)
    assert machine(2, folder).get("kind", {"a": 1})


def test_gc_removes_what_killed_uploads_left_and_nothing_else(machine, folder, monkeypatch, capsys):
    store = machine(1, folder)
    root = Path(store.remote.root)
    kept = store.get_or_make("kind", {"a": 1}, write("x"))
    old, young = (root / "kind" / digest(i) / ("0" * 64) for i in range(2))
    lease, foreign = root / "leases" / digest(2) / "0", root / "thesis" / "chapter" / "one.tex"
    for file in (old, young, lease, foreign):
        file.parent.mkdir(parents=True)
        file.write_text("x")
    for file in (old, lease, foreign, *(root / "kind" / KEY).iterdir()):
        os.utime(file, (0, 0))
    monkeypatch.setenv("ERASEBENCH_HOME", str(store.root.parent))
    monkeypatch.setenv("ERASEBENCH_STORE", folder)
    assert cli.main(["store", "gc"]) == 0 and f"2 leftover files, 0.0 MB, of {folder}" in capsys.readouterr().out
    assert not old.exists() and not lease.exists() and young.exists() and foreign.exists()
    shutil.rmtree(kept)
    assert store.get("kind", {"a": 1})
    for command in ("list", "size"):
        assert cli.main(["store", command]) == 0 and folder in capsys.readouterr().out


def test_a_second_machine_goes_on_from_what_the_first_has_made(make_run, tmp_path, folder, monkeypatch):
    monkeypatch.setenv("ERASEBENCH_STORE", folder)
    rows = {}
    for name in ("one", "two"):
        monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / name))
        rows[name] = run.execute(make_run("uce", UCE()))
        monkeypatch.setattr(Model, "load", classmethod(lambda *given: pytest.fail("a model was loaded")))
    assert rows["one"] == rows["two"]


def test_store_url_is_an_option_of_a_machine(tmp_path, folder, tiny_folder, monkeypatch):
    monkeypatch.setenv("ERASEBENCH_STORE", "")  # restored afterwards
    words = ["method=uce", "target=cat", f"model.path={tiny_folder}", "images=1", "sampler.steps=1"]
    runs, urls = [], []

    def job(given):
        runs.append(given)
        urls.append(Store().url)
        return []

    for more in ([], [f"store.url={folder}"]):
        assert config.main(job, [*words, f"results={tmp_path}", *more]) == 0
    assert urls == [None, folder]
    assert runs[0].overrides == runs[1].overrides and runs[0].id == runs[1].id
    assert config.again(["method=uce", "store.url=s3://theirs/x", "+store.url=s3://theirs/x"]) == ["method=uce"]
