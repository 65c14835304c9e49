"""Progress of long work: a line every ten seconds without a terminal, which names the part and counts."""

import logging

import pytest

from erasebench import progress


@pytest.fixture
def clock(monkeypatch, caplog):
    """A clock that stands still until it is moved; no terminal."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO, "erasebench")
    return now


def test_a_line_every_ten_seconds_says_where_it_is(clock, caplog):
    with progress.part("prompt 3 of 20"):
        for _ in progress.track(range(500), "cce"):
            clock[0] += 0.25
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "cce: prompt 3 of 20, step 40 of 500" and len(lines) == 12
    for _ in progress.track(range(3), "cce"):
        clock[0] += 11
    assert caplog.records[-1].getMessage() == "cce: step 3 of 3"


def test_fast_work_says_nothing(clock, caplog):
    assert list(progress.track(iter("abc"), "x")) == ["a", "b", "c"]
    assert not caplog.records


def test_a_total_that_nobody_knows_is_left_out(clock, caplog):
    for _ in progress.track(iter(range(2)), "mine", unit="loop"):
        clock[0] += 10
    assert [r.getMessage() for r in caplog.records] == ["mine: loop 1", "mine: loop 2"]


def test_items_are_yielded_when_they_are_asked_for_and_a_loop_may_end_early(clock):
    seen = []
    for item in progress.track((seen.append(i) or i for i in range(5)), "x"):
        if item == 1:
            break
    assert seen == [0, 1]
