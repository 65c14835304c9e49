"""Record of a run: shards, costs, status of every measurement; and its rows."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import provenance
from ..contracts import ErasebenchError, Evaluator, Metric, Sampler
from ..places import masked_json, masked_text, strings
from ..redaction import redact
from ..report.tables import with_published
from ..rows import SCHEMA, Row
from ..store.local import canonical, digest
from .images import Shard
from .scoring import watcher
from .session import Session
from .specification import Run, requests

if TYPE_CHECKING:
    from .attacks import Outcome

log = logging.getLogger("erasebench")


@dataclass(frozen=True)
class Entry:
    """Subject of one row: a metric, or a failed or skipped evaluator with the reason."""

    name: str = ""
    evaluator: Evaluator | None = None
    metric: Metric | None = None
    status: str = "ok"
    reason: str = ""


@dataclass
class Record:
    """Data from which the rows of a run are made."""

    run: Run
    run_id: str
    originals: Sequence[Shard] = ()
    made: Sequence[Shard] = ()  # by the erased model
    cost: Mapping[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    attacks: Sequence[Outcome] = ()

    def add(self, metrics: Sequence[Metric], name: str = "", evaluator: Evaluator | None = None) -> None:
        self.entries += [Entry(name, evaluator, metric) for metric in metrics]

    def fail(self, error: BaseException, name: str = "", evaluator: Evaluator | None = None) -> None:
        self.entries.append(Entry(name, evaluator, status="failed", reason=explain(error)))

    def skip(self, name: str, reason: str) -> None:
        log.info("skipped (%s): %s", name, reason)
        self.entries.append(Entry(name, status="skipped", reason=reason))

    def having(self, status: str) -> list[Entry]:
        """Return the entries with a status: ok, failed or skipped."""
        return [entry for entry in self.entries if entry.status == status]

    def rows(self, outdated: Collection[tuple[str, str]]) -> list[Row]:
        """Return a row for each entry, and the rows of the attacks; `outdated` as in `Session`."""
        rows = [row(self, entry) for status in ("ok", "failed", "skipped") for entry in self.having(status)]
        rows += [r for outcome in self.attacks for r in attack_rows(self, outcome)]
        return [mark(r, outdated) for r in rows]


def explain(error: BaseException) -> str:
    """Return an error as one line for the row.

    The traceback of any error that the user did not cause is logged."""
    if not isinstance(error, ErasebenchError):
        log.error("traceback:", exc_info=error)
    lines = redact(str(error)).strip().splitlines()
    return (
        lines[-1]
        if isinstance(error, ErasebenchError) and lines
        else f"{type(error).__name__}: {lines[-1] if lines else ''}"
    )


def row(record: Record, entry: Entry) -> Row:
    """Return the row of an entry: of a metric, of a failure or of a skip."""
    run, metric = record.run, entry.metric
    splits = metric.split.split("+") if metric else []
    refused = sum(sum(shard.meta()["refused"]) for shard in record.made if shard.prompts[0].split in splits)
    prompts = requests([p for p in run.plan.prompts if p.split in splits])
    judge = entry.evaluator.judge if entry.evaluator else None
    nothing = {f.name: "" if f.type == "str" else None for f in fields(Metric)}
    values = asdict(metric) if metric else {**nothing, "name": entry.name}
    concepts = values.pop("by_concept")
    cost = record.cost or no_cost(run)
    made = Row(
        schema=SCHEMA,
        run_id=record.run_id,
        status=entry.status,
        reason=masked_text(
            entry.reason, strings([asdict(run.eraser), *map(asdict, run.attacks.values()), str(run.source.path)])
        ),
        method=run.method,
        method_version=run.eraser.version,
        params=masked_json(canonical(asdict(run.eraser))),
        base=run.source.name,
        revision=run.source.revision or run.source.identity()["content"],
        world=run.world,
        task=run.plan.task,
        task_version=run.plan.version,
        n_concepts=len(run.plan.concepts),
        target=run.target,
        attack="",
        subset=run.plan.subset,
        judge=judge.name if judge else "",
        judge_version=f"{type(judge).version}:{digest(judge.weights())[:12]}" if judge else "",
        metric=values.pop("name"),
        published=None,
        published_source="",
        seed=run.seed,
        n_refused=refused if metric else None,
        n_dropped=run.plan.dropped,
        by_concept=json.dumps(concepts, ensure_ascii=False) if concepts else "",
        overrides=json.dumps(run.overrides, ensure_ascii=False),
        sampler=sampler_text(run.sampler) + (", fast" if run.speed == "fast" else ""),
        prompts_sha256=digest(prompts),
        **values,
        **{**cost, "fit_notes": masked_json(cost["fit_notes"])},
    )
    return with_published(made)


def no_cost(run: Run) -> dict[str, Any]:
    """Return a substitute for `costs` if nothing was made: machine and packages only."""
    commit, dirty = provenance.git()
    measured = ("batch", "fit_seconds", "sample_seconds", "unet_calls", "peak_memory_mb")
    return {
        "packages": provenance.packages(),
        "commit": commit,
        "dirty": dirty,
        "device": provenance.device(run.device),
        **dict.fromkeys(measured),
        "fit_notes": "",
        "artifact": "",
    }


def attack_rows(record: Record, outcome: Outcome) -> list[Row]:
    """Return the rows of one attack, with its own cost.

    A failed or skipped attack has a single row."""
    run, own = record.run, replace(record, cost=outcome.cost or record.cost)
    prompts = requests([p for p in run.plan.prompts if p.split == "target"][: run.attacked])
    under: dict[str, Any] = {
        "attack": outcome.name,
        "attack_params": masked_json(outcome.params),
        "prompts_sha256": digest(prompts),
    }
    if outcome.status != "ok":
        made = [row(own, Entry(status=outcome.status, reason=outcome.reason))]
    else:
        own, watch = replace(own, made=outcome.made), watcher(run)
        made = [row(own, Entry("", watch, metric)) for metric in outcome.metrics]
        under["n_dropped"] = run.plan.dropped + outcome.dropped
    return [with_published(replace(r, **under)) for r in made]


def sampler_text(sampler: Sampler) -> str:
    size = f", {sampler.size} px" if sampler.size else ""
    return f"{sampler.name} {sampler.steps} steps, guidance {sampler.guidance:g}{size}"


def mark(row: Row, outdated: Collection[tuple[str, str]]) -> Row:
    """Flag a row's plugins with changed source but the same version."""
    of = lambda kind, name, key: {key: True} if (kind, name) in outdated else {}
    notes = of("method", row.method, "source_changed") | of("judge", row.judge, "judge_source_changed")

    def added(text: str, more: dict[str, bool]) -> str:
        known = json.loads(text or "{}") if more else {}
        return canonical({**(known if isinstance(known, dict) else {"notes": known}), **more}) if more else text

    params = added(row.attack_params, of("attack", row.attack, "source_changed"))
    return replace(row, fit_notes=added(row.fit_notes, notes), attack_params=params)


def costs(session: Session, made: Sequence[Shard]) -> dict[str, Any]:
    """Return the measured cost of fit and sampling.

    It is read from the store, noted when and where they were done, so a repeated run reports the same cost."""
    metas = [shard.meta() for shard in made]
    artifact = None if session.run.is_base else session.fitted()
    fit = fitting(artifact)
    notes = artifact / "notes.json" if artifact else None
    distinct = lambda key: " + ".join(sorted({str(meta[key]) for meta in metas}))
    dirty = {meta["dirty"] for meta in metas}
    return {
        "packages": distinct("packages"),
        "commit": distinct("commit"),
        "dirty": None if None in dirty else any(dirty),
        "device": distinct("device"),
        "batch": min(meta["batch"] for meta in metas),
        "fit_seconds": fit["seconds"],
        "sample_seconds": sum(meta["seconds"] for meta in metas),
        "unet_calls": fit["unet_samples"] + sum(meta["unet_samples"] for meta in metas),
        "peak_memory_mb": max([fit["peak_memory_mb"], *(meta["peak_memory_mb"] for meta in metas)]),
        "fit_notes": notes.read_text() if notes and notes.is_file() else "",
        "artifact": artifact.name if artifact else "",
    }


def fitting(artifact: Path | None) -> dict[str, Any]:
    """Return the cost of a fit that `Session.artifact` noted; zeros for the base."""
    if artifact is None:
        return {"seconds": 0.0, "unet_samples": 0, "peak_memory_mb": 0.0}
    return json.loads((artifact / "cost.json").read_text())


def cost_metrics(
    session: Session, originals: Sequence[Shard], made: Sequence[Shard], cost: dict[str, Any]
) -> list[Metric]:
    """Return the cost of erasing as metrics.

    slowdown: seconds of sampling over the base's for the same prompts, as measured when the images were made."""
    artifact = None if session.run.is_base else session.fitted()
    learnt = [f for f in artifact.rglob("*") if f.suffix == ".safetensors"] if artifact else []
    seconds = lambda shards: sum(shard.meta()["seconds"] for shard in shards)
    values = {
        "fit_seconds": cost["fit_seconds"],
        "fit_unet_calls": float(fitting(artifact)["unet_samples"]),
        "peak_memory_mb": cost["peak_memory_mb"],
        "artifact_bytes": float(sum(f.stat().st_size for f in learnt)),
        "slowdown": seconds(made) / seconds(originals),
    }
    return [
        Metric(name, "", value, None, None, "", None, None, higher_is_better=False, group="cost")
        for name, value in values.items()
    ]
