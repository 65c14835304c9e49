"""Production of all shards of a run, by base and erased models."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from .. import provenance, rates
from ..contracts import ErasebenchError, Prompt
from ..executors.local import Work
from ..model.finite import NotFinite
from ..store.local import digest
from .images import Draw, Resources, Shard, ShardRequest, make, shards
from .scoring import ahead, judge
from .session import Session
from .specification import image_identities, shard_identity

log = logging.getLogger("erasebench")


def images(session: Session) -> tuple[list[Shard], list[Shard]]:
    """Return original and erased shards, in the order of the plan.

    Every method shares the originals. Raises ErasebenchError if erasing changed no image of the concept."""
    run = session.run
    parts = shards(run.plan.prompts)
    base_identity, identity = image_identities(run)
    if not run.is_base:
        start = time.perf_counter()
        session.fit()  # first, so that a faulty method or checkpoint is found before hours of sampling
        log.info("fit: %.1f s", time.perf_counter() - start)
    session.forecast = forecast(session, parts, (base_identity, identity))
    originals = produce(session, parts, "base", base_identity, "originals")
    if run.is_base:
        return originals, originals
    # images that must change come first: those of the concept, or all if a task has none
    count = sum(part[0].split == "target" for part in parts) or len(parts)
    target = produce(session, parts[:count], "erased", identity, "erased target")
    # rounding depends on the number of threads per shard: the same model may differ by one grey level in a few pixels
    gap = lambda a, b: int((a.images().int() - b.images().int()).abs().max())
    if all(gap(a, b) <= 1 for a, b in zip(originals, target, strict=False)):
        raise ErasebenchError(f"method {run.method} changed no image of the concept: nothing was erased")
    return originals, target + produce(session, parts[count:], "erased", identity, "erased rest")


def produce(
    session: Session,
    parts: Sequence[tuple[Prompt, ...]],
    state: str,
    identity: dict,
    label: str,
    draw: Draw | None = None,
) -> list[Shard]:
    """Make shards of images in the order of the parts.

    `state` names the model: base, erased or unlocked. Shards that another process is making are left to it, and awaited
    once all others are done."""
    start, store, sampler = time.perf_counter(), session.store, session.run.sampler
    judges = ahead(session.run)

    def work(wait: bool) -> Work:
        def one(here: Session, part: tuple[Prompt, ...], beside: int) -> bool:
            request = ShardRequest(identity, sampler, part)
            try:
                resources = Resources(here.run.batch, beside, here.turn)
                made = make(here.store, getattr(here, state), request, resources, draw, wait)
            except NotFinite as error:
                who = f"base {here.run.source.name}" if state == "base" else f"method {here.run.method}"
                raise NotFinite(f"{error} ({who})") from error
            if made and here.forecast is not None and (shard := request.shard(here.store)):
                here.forecast.correct(shard.meta())
            for evaluator in judges if made else ():
                if part[0].split in evaluator.splits:
                    with suppress(Exception):  # scoring is repeated in the evaluation, which reports the failure
                        judge(here, evaluator, request.shard(here.store))
            return made

        return one

    entry = lambda part: ShardRequest(identity, sampler, part).shard(store)
    missing = [part for part in parts if entry(part) is None]
    done = session.map(work(wait=False), missing, label)
    session.map(work(wait=True), [part for part, mine in zip(missing, done, strict=True) if not mine], label)
    made = [shard for part in parts if (shard := entry(part))]
    if len(made) < len(parts):
        raise ErasebenchError(
            f"{len(parts) - len(made)} shards were made and are not in the store: is it the same one for all?"
        )
    log.info("%s: %d shards in %.1f s", label, len(made), time.perf_counter() - start)
    return made


def forecast(
    session: Session, parts: Sequence[tuple[Prompt, ...]], identities: Sequence[dict]
) -> rates.Forecast | None:
    """Return a forecast of the sampling left, at an assumed rate.

    None if all images are in the store."""
    run, sampler = session.run, session.run.sampler
    asked_for = [(shard_identity(identity, sampler, part), len(part)) for identity in identities for part in parts]
    missing = {digest(k): count for k, count in asked_for if not session.store.has("images", k)}
    images = sum(missing.values())
    if not images:
        return None
    gpu = "" if run.device == "cpu" else provenance.device(run.device)
    evaluations = images * sampler.steps * (2 if sampler.guidance > 1 else 1)
    made = rates.Forecast(evaluations, *rates.assumed(run.source.name, run.speed, gpu))
    made.begin()
    return made
