"""No secret of a URL in a log, a row, an error or a traceback."""

import logging
import traceback

import pytest
from erasebench.methods.uce import UCE

from erasebench import cli, config
from erasebench.contracts import ErasebenchError
from erasebench.redaction import Formatter, masked, redact
from erasebench.rows import read
from erasebench.run import run
from erasebench.store.local import Store

SECRET = "hunter2"
URLS = {
    "ftp://me:hunter2@host/x": "ftp://***@host/x",
    "ftp://me:hun%74er2@host/x": "ftp://***@host/x",
    "ftp://me:p@/?#hunter2@host/x": "ftp://***@host/x",
    "https://hunter2hunter2hunter2@host/x": "https://***@host/x",
    "https://host/x?sig=hunter2&sv=1": "https://host/x?***",
    "https://host/x#hunter2": "https://host/x#***",
    "simplecache::ftp://me:hunter2@host/x": "simplecache::ftp://***@host/x",
    "zip://a.zip::ftp://me:hunter2@host/x.zip": "zip://a.zip::ftp://***@host/x.zip",
    "me:hunter2@host/x": "***@host/x",
    "s3://bucket/folder": "s3://bucket/folder",
    "s3://bucket/a@b": "s3://bucket/a@b",
    "file:///data/store": "file:///data/store",
    "http://host:8080/x": "http://host:8080/x",
}


def secret_of(url):
    return {"ftp://me:p@/?#hunter2@host/x": "p@/?#hunter2"}.get(url) or SECRET * url.count(SECRET)


@pytest.mark.parametrize("url,shown", URLS.items())
def test_a_url_is_shown_without_its_secrets(url, shown):
    assert masked(url) == shown
    for said in (f"cannot reach {url!r}: refused", f"<{url}>", f"login {secret_of(url)} failed"):
        assert SECRET not in redact(said, url)
    assert SECRET not in redact(f"no {url.split('::')[-1]}, sorry") or "://" not in url


@pytest.mark.parametrize("form", ["a/b c&d", "a%2Fb%20c%26d", "a%2fb+c%26d"])
def test_a_password_is_found_in_every_form(form):
    for url in ("ftp://me:a%2Fb%20c%26d@host/x", "ftp://me:a/b c&d@host/x"):
        assert redact(f"login {form} failed", url) == "login *** failed"


def test_a_message_without_a_url_stays_as_it_is():
    assert redact("a: b@c, 1 ? 2 # 3", None, "", "s3://bucket/x") == "a: b@c, 1 ? 2 # 3"


@pytest.mark.parametrize("url", [url for url in URLS if SECRET in url and "ftp" not in url] + ["memory://me:hunter2@x"])
def test_no_secret_in_the_log_the_rows_or_the_errors_of_a_run(url, make_run, monkeypatch, capsys, caplog):
    from erasebench.store.remote import Remote

    monkeypatch.setattr(Remote, "_read", refused)
    monkeypatch.setenv("ERASEBENCH_STORE", url)
    work = make_run("uce", UCE())
    (row,) = run.execute(work)
    file = work.results / "runs" / f"{row.run_id}.csv"
    assert row.status == "failed" and "store.url=" in row.reason and read(file) == [row]
    cli.main(["store", "gc"])
    cli.main(["store", "size"])
    with pytest.raises(ErasebenchError) as error:
        Store().get("kind", 1)
    said = capsys.readouterr()
    trace = "".join(traceback.format_exception(error.value))
    for text in (file.read_text(), caplog.text, said.out, said.err, trace):
        assert SECRET not in text


def refused(remote, path):
    with remote._asking():
        raise ConnectionError(f"no route to {remote.url}, and {secret_of(remote.url)} is wrong")


def test_a_traceback_in_the_log_holds_no_secret():
    try:
        raise ValueError(f"https://me:{SECRET}@proxy:80 refused")
    except ValueError as error:
        record = logging.LogRecord("x", 40, "", 1, "failed: %s", (error,), (type(error), error, error.__traceback__))
    said = Formatter("%(message)s").format(record)
    assert SECRET not in said and "https://***@proxy:80 refused" in said


@pytest.mark.parametrize("word", ["store.url={}", "+store.url={}", "++store.url={}"])
def test_the_url_of_a_store_is_in_no_row(word):
    given = [word.format(f"ftp://me:{SECRET}@host/x"), "method=uce"]
    assert config.repeatable(given) == ("method=uce",)
