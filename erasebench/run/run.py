"""Execution of a run: fit once, sample shards, score shards, summarise, write rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from .. import needs
from ..contracts import Decider, Metric, Undrawn, Unlocks
from ..executors.local import Local
from ..model.devices import check_device
from ..rows import Row, check_writable
from ..rows import record as write_rows
from ..stats import Measure, Part, summarize
from ..store.local import Store
from . import judging, verdicts
from .attacks import attack_all
from .images import Shard
from .produce import images, produce
from .record import Entry, Record, cost_metrics, costs
from .scoring import calibrate, measure, score, watcher
from .session import Session, Unfit
from .sheet import sheet
from .specification import Run, image_identities

log = logging.getLogger("erasebench")


def execute(run: Run) -> list[Row]:
    """Execute a run and write its rows.

    Failures become rows; the caller turns them into an exit code."""
    check_writable(run.results / "runs")
    needs.bring(*run.plugins)  # before a model is loaded, and before the id, which depends on the judges
    record, session = Record(run, run.id), Session(run, Store())
    log.info(
        "%s: %s, %d concept(s), %d images on %s",
        record.run_id,
        run.plan.task,
        len(run.plan.concepts),
        len(run.plan.prompts),
        run.device,
    )
    for name, evaluator in run.plan.evaluators.items():
        if reason := run.skips(evaluator):
            record.skip(name, reason)
    try:
        sample(session, record)
    except Unfit as error:
        log.info("skipped: %s does not fit %s: %s", run.method, run.source.name, error)
        record.entries = [Entry(status="skipped", reason=str(error))]
    except (Exception, SystemExit) as error:  # a plugin may call exit()
        record.fail(error)
    finally:
        session.close()
    if record.made:
        evaluate(session, record)
        draw_sheet(record)
    return write(record, session)


def sample(session: Session, record: Record) -> None:
    """Fit the method and make every image of the run.

    Images come from both models, from attacks, and from the model with the concept given back."""
    run = session.run
    if isinstance(run.executor, Local):
        check_device(run.device)  # for other executors, each worker checks its own device
        check_device(run.judges)
    if not run.is_base and session.fitted() is None:
        needs.check(run.eraser)
    session.check_fit()
    record.originals, record.made = images(session)
    record.cost = costs(session, record.made)
    if run.attacks:
        record.attacks = attack_all(session, record.originals, record.made)
    if isinstance(run.eraser, Unlocks) and (watch := watcher(run)):
        record.add(recovery(session, watch, record.originals), "", watch)


def evaluate(session: Session, record: Record) -> None:
    """Score the images by every evaluator not skipped, and add costs.

    A failed evaluator does not stop the others."""
    run, skipped = session.run, {entry.name for entry in record.having("skipped")}
    concepts = list(dict.fromkeys(prompt.concept for prompt in run.plan.prompts))
    for name, evaluator in run.plan.evaluators.items():
        if name in skipped:
            continue
        start = time.perf_counter()
        try:
            with judging.on(run.judges):  # evaluators may score real images, too
                metrics = summarize(*measure(session, evaluator, record.made, record.originals), concepts)
            record.add(metrics, name, evaluator)
        except Undrawn as error:
            record.skip(name, str(error))
        except (Exception, SystemExit) as error:
            record.fail(error, name, evaluator)
        else:
            log.info("%s: scored in %.1f s", name, time.perf_counter() - start)
    if record.cost:
        record.add(cost_metrics(session, record.originals, record.made, record.cost))


def draw_sheet(record: Record) -> None:
    """Write the sheet of a run.

    It comes before the rows, which mark the run as done. A failed run does not overwrite an existing sheet."""
    path = record.run.results / "runs" / f"{record.run_id}.webp"
    failed = record.having("failed") or any(outcome.status == "failed" for outcome in record.attacks)
    if failed and path.exists():
        return
    try:
        sheet(record.run, record.originals, record.made, path)
    except Exception as error:
        record.fail(error)


def write(record: Record, session: Session) -> list[Row]:
    """Write the rows of a record; log their path and all failures."""
    run, rows = record.run, record.rows(session.outdated)
    path = run.results / "runs" / f"{record.run_id}.csv"
    where = write_rows(rows, path)
    if run.plan.dropped:
        log.info("%d prompts dropped by the safety gate", run.plan.dropped)
    for outcome in (o for o in record.attacks if o.status == "failed"):
        log.error("failed (attack %s): %s", outcome.name, outcome.reason)
    for entry in record.having("failed"):
        log.error("failed%s: %s", f" ({entry.name})" if entry.name else "", entry.reason)
    log.info("%d rows in %s%s", len(rows), where, "" if where == path else f"; those of {path} stay")
    return rows


def recovery(session: Session, watch: Decider, originals: Sequence[Shard]) -> list[Metric]:
    """Measure `rsr`: the share of target images that show the concept again.

    The images are made after the method gives the concept back (KPOP)."""
    parts = [shard.prompts for shard in originals if shard.prompts[0].split == "target"]
    if not parts:
        return []
    try:
        watch = calibrate(session, watch, originals)
    except Undrawn:  # reported where the evaluator itself measures
        return []
    identity = {**image_identities(session.run)[1], "unlocked": True}
    made = produce(session, parts, "unlocked", identity, "unlocked target")

    def rate(shown: Sequence[Shard]) -> list[Measure]:
        scored = score(session, watch, shown, "target")
        values = verdicts.shown(watch, scored, refused=0.0)
        return [Measure("rsr", "keep", True, (Part("target", values, [p.text for p in scored.prompts]),))]

    return summarize(rate(made), rate(originals))
