"""The remote store on an S3 server in this process, a well-behaved one and one that refuses, forgets to answer and contradicts."""

import logging
import secrets
import subprocess
import sys
import threading

import pytest
from erasebench.methods.uce import UCE
from test_run import numbers

from erasebench.contracts import ErasebenchError
from erasebench.run.run import execute
from erasebench.store.local import Store, digest

pytest.importorskip("s3fs")
pytest.importorskip("flask_cors")
app = pytest.importorskip("moto.moto_server.werkzeug_app")
serving = pytest.importorskip("werkzeug.serving")

KEY, URL = digest({"a": 1}), "s3://bucket/store"
ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>as the test wants it</Message></Error>"


class Server:
    """moto behind `fault`: called with each request, it lets it pass (None) or says (status, code, whether it is
    carried out all the same)."""

    def __init__(self):
        self.moto, self.fault = app.DomainDispatcherApplication(app.create_backend_app), lambda request: None
        self.requests, self.refused, self.lock = 0, 0, threading.Lock()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.http = serving.make_server("127.0.0.1", 0, self, threaded=True, request_handler=app.MotoRequestHandler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __call__(self, request, answer):
        with self.lock:
            self.requests += 1
            wrong = self.fault(request)
            self.refused += wrong is not None
        if wrong is None:
            return self.moto(request, answer)
        status, code, done = wrong
        if done:
            list(self.moto(request, lambda *given: None))
        answer(status, [("Content-Type", "application/xml")])
        return [ERROR.format(code).encode()]


@pytest.fixture
def server(monkeypatch):
    import s3fs

    server = Server()
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # of the last test's server
    s3fs.S3FileSystem().mkdir("bucket")
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.http.shutdown()
    from moto.backends import get_backend

    get_backend("s3").reset()


def write(text):
    return lambda folder: (folder / "x.txt").write_text(text)


def refuse(folder):
    pytest.fail("made again")


def every_tenth(server):
    return lambda request: ("503 Service Unavailable", "SlowDown", False) if server.requests % 10 == 0 else None


def test_an_entry_goes_from_one_machine_to_another(server, tmp_path):
    first, second = Store(tmp_path / "1", URL), Store(tmp_path / "2", URL)
    assert second.get("kind", {"a": 1}) is None
    first.get_or_make("kind", {"a": 1}, write("x"))
    assert (second.get_or_make("kind", {"a": 1}, refuse) / "x.txt").read_text() == "x"
    assert second.keys("kind", KEY[:6]) == [KEY]
    before = server.requests
    assert second.get("kind", {"a": 1}) and server.requests == before  # whole and shared, as is known
    first.remote.fs.pipe_file(f"{first.remote.root}/kind/{digest(2)}/{KEY}", b"left")
    assert first.remote.gc() == (0, 0) and first.remote.names("leases") == []


def test_a_live_lease_is_left_and_a_dead_one_taken(server, tmp_path, caplog):
    first, second = Store(tmp_path / "1", URL, 1.0), Store(tmp_path / "2", URL, 1.0)
    with first.remote.lease(KEY, secrets.token_hex(8), wait=True):
        assert second.get_or_make("kind", {"a": 1}, refuse, wait=False) is None
    second.remote.fs.pipe_file(f"{second.remote.root}/leases/{KEY}/0", b"somebody 4")
    assert second.get_or_make("kind", {"a": 1}, write("x")) and "taking over" in caplog.text


DRIVER = """
import sys, secrets, pathlib
from erasebench.store.local import Store
store, log = Store(pathlib.Path(sys.argv[1]), sys.argv[2]), pathlib.Path(sys.argv[3])
def make(i):
    def fill(folder):
        (log / f"{i}.{secrets.token_hex(4)}").touch()
        (folder / "x.txt").write_text(str(i))
    return fill
order = range(10)
for i in [i for i in order if store.get_or_make("kind", i, make(i), wait=False) is None]:
    store.get_or_make("kind", i, make(i))
"""


def test_two_drivers_on_a_store_that_refuses_every_tenth_request(server, tmp_path):
    server.fault = every_tenth(server)
    (tmp_path / "log").mkdir()
    drivers = [
        subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path / str(i), URL, tmp_path / "log"]) for i in range(2)
    ]
    assert [driver.wait(timeout=120) for driver in drivers] == [0, 0] and server.refused > 5
    assert sorted(int(file.stem) for file in (tmp_path / "log").iterdir()) == list(range(10))
    third = Store(tmp_path / "3", URL)
    assert [(third.get("kind", i) / "x.txt").read_text() for i in range(10)] == [str(i) for i in range(10)]
    assert third.remote.fs.find(f"{third.remote.root}/leases") == []


def test_a_run_on_a_store_that_refuses_every_tenth_request_gives_the_same_rows(server, make_run, monkeypatch, tmp_path):
    run = make_run("uce", UCE())
    calm = numbers(execute(run))
    server.fault = every_tenth(server)
    monkeypatch.setenv("ERASEBENCH_STORE", URL)
    for machine in ("one", "another"):  # of which the second finds everything there
        monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / machine))
        assert numbers(execute(run)) == calm
    assert server.refused > 3


@pytest.mark.parametrize(
    "wrong",
    [
        ("503 Service Unavailable", "ServiceUnavailable", True),  # done, but the answer was lost
        ("409 Conflict", "ConditionalRequestConflict", False),
    ],
)
def test_a_lease_is_ours_although_the_answer_was_lost_or_a_conflict(server, tmp_path, wrong):
    store, once = Store(tmp_path / "1", URL, 1.0), [wrong]
    server.fault = lambda request: once.pop() if once and "HTTP_IF_NONE_MATCH" in request else None
    assert (store.get_or_make("kind", {"a": 1}, write("x")) / "x.txt").read_text() == "x"
    assert server.refused == 1


@pytest.mark.parametrize(
    "url,wrong,message",
    [
        ("s3://nowhere/store", None, "bucket does not exist"),
        (URL, ("403 Forbidden", "AccessDenied", False), "as the test wants it"),
    ],
)
def test_no_bucket_and_no_access_are_one_clear_line(server, tmp_path, url, wrong, message):
    server.fault = lambda request: wrong
    with pytest.raises(ErasebenchError, match=f"store.url={url}: .*{message}"):
        Store(tmp_path, url).get_or_make("kind", {"a": 1}, refuse)
