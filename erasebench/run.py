"""One run, top to bottom: fit once, sample shards, score shards, summarise, write rows."""

from __future__ import annotations

import io
import json
import logging
import secrets
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import judging, needs, provenance, rates, verdicts
from .contracts import (
    WORD,
    Attack,
    Calibrates,
    Decider,
    DecidesSuccess,
    ErasebenchError,
    Eraser,
    Evaluator,
    Metric,
    Prompt,
    Sampler,
    Scored,
    Skips,
    Undrawn,
    Unlocks,
)
from .devices import check_device
from .execute import Local, Work
from .finite import NotFinite, is_finite
from .generate import Draw, Shard, make, shards
from .model import Model
from .places import masked_json, masked_text, strings
from .redaction import redact
from .rows import SCHEMA, Row, check_writable, record, replace_file
from .specification import Run, image_identities, requests, score_identity, shard_identity, word_identity
from .stats import Measure, Part, summarize
from .store import Store, canonical, digest
from .tables import with_published

if TYPE_CHECKING:
    from .attack import Outcome

log = logging.getLogger("erasebench")
SHEET = 96  # pixels of a picture on a sheet, at most


def watcher(run: Run) -> Decider | None:
    """The first evaluator that says of an image whether it shows the concept."""
    every = (e for e in run.plan.evaluators.values() if isinstance(e, DecidesSuccess) and not run.skips(e))
    return next(every, None)


def calibrated(erased: Erased, evaluator: Decider, originals: Sequence[Shard]) -> Decider:
    """The evaluator as the base's pictures set it, where it asks for them. Raises Undrawn."""
    if not isinstance(evaluator, Calibrates):
        return evaluator
    return evaluator.calibrated({split: score(erased, evaluator, originals, split) for split in evaluator.splits})


class Unfit(Exception):
    """The method cannot erase from this model; the message says why. A skipped row, no failure."""


class Erased:
    """The erased model, loaded, fitted and entered only when somebody needs it; `base` is the model before.

    A run whose images are all in the store never loads a model.
    """

    def __init__(self, run: Run, store: Store):
        self.run, self.store, self.stack = run, store, ExitStack()
        self.token = secrets.token_hex(8)  # by which workers elsewhere know that they still hold the same
        self._model: Model | None = None
        self._entered = self._unlocked = False
        self._lock = threading.RLock()  # shards are made side by side; the first that needs the model loads it
        self.turn = None if run.device == "cpu" else threading.Lock()  # a GPU samples one shard at a time
        self.judging = threading.Lock()
        self.forecast: rates.Forecast | None = None  # of the images that are being made
        self.outdated: set[tuple[str, str]] = set()  # ("method", "judge" or "attack", its name): another source made it
        self._sources: dict[tuple[str, str], dict[str, str]] = {}

    def load(self) -> Model:
        with self._lock:
            if self._model is None:
                start = time.perf_counter()
                model = Model.load(self.run.source, self.run.device, self.run.plan.explicit)
                model.check_sampler(self.run.sampler)  # before a fit of hours
                log.info("loaded %s in %.1f s", self.run.source.name, time.perf_counter() - start)
                for concept in self.run.plan.concepts:
                    check_concept(model, concept.name)
                    if concept.surrogate == concept.name:
                        raise ErasebenchError(f"concept {concept.name!r} is its own surrogate: nothing would be erased")
                self._model = model
        return self._model

    def base(self) -> Model:
        assert not self._entered
        return self.load()

    def check_fit(self) -> None:
        """Raises Unfit before any image is made. What was fitted once fits, so that a repeated run loads no model."""
        if not isinstance(self.run.eraser, Skips) or self.fitted():
            return
        (reason,) = self.map(lambda here, _, beside: reason_to_skip(here.run.eraser, here.base()), [None], "check")
        if reason:
            raise Unfit(reason)

    def fitted(self) -> Path | None:
        """The artifact, if the method has been fitted."""
        path = self.store.get("artifacts", self.run.fit_identity())
        if path is not None:
            self.compare("method", self.run.method, self.run.eraser, path)
        return path

    def compare(self, kind: str, name: str, plugin: Any, entry: Path) -> None:
        """Say once if a plugin's source is not the one that made an entry, though its version is; the rows say it too."""
        which = kind, name
        if which in self.outdated:
            return
        if which not in self._sources:  # files do not change that often
            self._sources[which] = provenance.sources(plugin)
        if changed := provenance.changed_sources(entry, self._sources[which]):
            self.outdated.add(which)
            log.warning(
                "%s %s: its source changed since %s, at the same version %s: raise `version`, or gc (changed: %s)",
                kind,
                name,
                {"method": "this artifact was fitted", "judge": "it gave a score", "attack": "its search"}[kind],
                type(plugin).version,
                ", ".join(changed[:3]) + ", ..." * (len(changed) > 3),
            )

    def fit(self) -> None:
        """Fit the method, wherever the run is carried out."""
        if self.fitted() is None:
            self.map(lambda here, _, beside: here.artifact() and None, [None], "fit", alone=True)

    def artifact(self) -> Path:
        """What the method learnt, and `cost.json`: seconds, unet_samples, peak_memory_mb."""

        def fit(folder: Path) -> None:
            model, made_by = self.base(), provenance.sources(self.run.eraser)
            provenance.reset_peak_memory(self.run.device)
            start, before = time.perf_counter(), model.unet_samples
            with self.named(model), judging.on(self.run.judges):
                self.run.eraser.fit(model, self.run.plan.brief, folder, self.run.seed)
            if model.is_changed:
                raise ErasebenchError(f"method {self.run.method} left the model changed after fit")
            check_artifact(folder)
            if problem := not_finite_in(folder):
                raise ErasebenchError(f"method {self.run.method}: what it learnt is not finite ({problem})")
            cost = {
                "seconds": time.perf_counter() - start,
                "unet_samples": model.unet_samples - before,
                "peak_memory_mb": provenance.peak_memory_mb(self.run.device),
            }
            (folder / "cost.json").write_text(json.dumps(cost))
            provenance.write_sources(folder, made_by)

        return self.store.get_or_make("artifacts", self.run.fit_identity(), fit)

    def named(self, model: Model) -> AbstractContextManager[None]:
        """The model that knows what the brief calls the concept: a word learnt of pictures, or its name as it is."""
        if (pictured := self.run.pictured) is None:
            return nullcontext()
        learn = lambda: pictured.learn(model, self.run.plan.brief.templates, self.run.seed)
        fill = lambda folder: save_file({"vector": learn().cpu()}, folder / "vector.safetensors")
        entry = Store().get_or_make("words", word_identity(self.run), fill)
        return model.word(WORD, load_file(entry / "vector.safetensors")["vector"])

    def erased(self) -> Model:
        with self._lock:
            if not self._entered:
                artifact, model = self.artifact(), self.load()
                self.stack.enter_context(self.named(model))  # some methods name the concept at inference
                self.stack.enter_context(self.run.eraser.apply(model, artifact))
                self._entered = True
        return self.load()

    def unlocked(self) -> Model:
        """The erased model to which the method gives the concept back (KPOP), from here on."""
        with self._lock:
            if not self._unlocked:
                model, eraser = self.erased(), self.run.eraser
                assert isinstance(eraser, Unlocks)
                self.stack.enter_context(eraser.unlock(model, self.artifact()))
                self._unlocked = True
        return self.load()

    def close(self) -> None:
        self.stack.close()
        self._entered = self._unlocked = False

    def map(self, work: Work, items: Sequence, label: str, alone: bool = False) -> list:
        """work(erased, item, beside) of every item, wherever the run is carried out."""
        return self.run.executor.map(self, work, items, label, alone)


def reason_to_skip(plugin: Eraser | Attack, model: Model) -> str:
    """Why a plugin does not fit a model, or nothing."""
    return plugin.skip(model) if isinstance(plugin, Skips) else ""


def check_concept(model: Model, name: str) -> None:
    """A concept must be something, and fit into the context."""
    ids = model.tokenizer(name).input_ids
    if len(ids) <= 2:
        raise ErasebenchError(f"concept {name!r} tokenises to nothing: name something that the text encoder can read")
    if len(ids) > model.context_length:
        raise ErasebenchError(
            f"concept {name[:40]!r}... takes {len(ids) - 2} tokens, the context holds {model.context_length - 2}"
        )


def check_artifact(folder: Path) -> None:
    odd = [f.name for f in folder.rglob("*") if f.is_file() and f.suffix not in (".safetensors", ".json")]
    if odd:
        raise ErasebenchError(f"a method may write safetensors and JSON only, it wrote {', '.join(odd)}")


def not_finite_in(folder: Path) -> str:
    """The first file and tensor of an artifact that holds NaN or infinity, or nothing."""
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if not is_finite(tensors.get_tensor(name)):
                    return f"{name} in {file.name}"
    return ""


def execute(run: Run) -> list[Row]:
    """Carry out a run and write its rows. Failures become rows; the caller makes them an exit code."""
    check_writable(run.results / "runs")
    needs.bring(*run.plugins)  # before a model is loaded, and before the id, which tells what is judged
    run_id = run.id
    path = run.results / "runs" / f"{run_id}.csv"
    erased = Erased(run, Store())
    log.info(
        "%s: %s, %d concept(s), %d images on %s",
        run_id,
        run.plan.task,
        len(run.plan.concepts),
        len(run.plan.prompts),
        run.device,
    )
    metrics: list[tuple[str, Evaluator | None, Metric]] = []
    failures: list[tuple[str, Evaluator | None, str]] = []
    skipped = {name: reason for name, e in run.plan.evaluators.items() if (reason := run.skips(e))}
    concepts = list(dict.fromkeys(prompt.concept for prompt in run.plan.prompts))
    base_shards: list[Shard] = []
    our_shards: list[Shard] = []
    cost: dict[str, float] = {}
    attacked: list[Outcome] = []
    for name, reason in skipped.items():
        log.info("skipped (%s): %s", name, reason)
    try:
        if isinstance(run.executor, Local):
            check_device(run.device)  # of others, each worker asks where it is
            check_device(run.judges)
        if not run.is_base and erased.fitted() is None:
            needs.check(run.eraser)
        erased.check_fit()
        base_shards, our_shards = images(erased)
        cost = costs(erased, our_shards)
        if run.attacks:
            from .attack import attack_all

            attacked = attack_all(erased, base_shards, our_shards)
        if isinstance(run.eraser, Unlocks) and (watch := watcher(run)):
            metrics += [("", watch, metric) for metric in recovered(erased, watch, base_shards)]
    except Unfit as error:
        log.info("skipped: %s does not fit %s: %s", run.method, run.source.name, error)
        skipped = {"": str(error)}
    except (Exception, SystemExit) as error:  # a plugin may call exit()
        failures.append(("", None, explain(error)))
    finally:
        erased.close()
    for name, evaluator in run.plan.evaluators.items() if our_shards else ():
        if name in skipped:
            continue
        start = time.perf_counter()
        try:
            with judging.on(run.judges):  # real pictures are looked at, too
                made = summarize(*measured(erased, evaluator, our_shards, base_shards), concepts)
            metrics += [(name, evaluator, metric) for metric in made]
        except Undrawn as error:
            log.info("skipped (%s): %s", name, error)
            skipped[name] = str(error)
        except (Exception, SystemExit) as error:
            failures.append((name, evaluator, explain(error)))
        else:
            log.info("%s: scored in %.1f s", name, time.perf_counter() - start)
    if our_shards and cost:
        metrics += [("", None, metric) for metric in spent(erased, base_shards, our_shards, cost)]
    picture = path.with_suffix(".webp")
    failed = failures or any(outcome.status == "failed" for outcome in attacked)
    if our_shards and not (failed and picture.exists()):
        try:
            sheet(run, base_shards, our_shards, picture)  # before the rows, which say that the run is done
        except Exception as error:
            failures.append(("", None, explain(error)))
    rows = [row(run, run_id, our_shards, cost, name, evaluator, metric=metric) for name, evaluator, metric in metrics]
    rows += [row(run, run_id, our_shards, cost, name, evaluator, reason=reason) for name, evaluator, reason in failures]
    rows += [
        row(run, run_id, our_shards, cost, name, None, reason=reason, status="skipped")
        for name, reason in skipped.items()
    ]
    rows += [r for outcome in attacked for r in attack_rows(run, run_id, our_shards, cost, outcome)]
    rows = [marked(r, erased.outdated) for r in rows]
    where = record(rows, path)
    if run.plan.dropped:
        log.info("%d prompts dropped by the safety gate", run.plan.dropped)
    for outcome in (o for o in attacked if o.status == "failed"):
        log.error("failed (attack %s): %s", outcome.name, outcome.reason)
    for name, _, reason in failures:
        log.error("failed%s: %s", f" ({name})" if name else "", reason)
    log.info("%d rows in %s%s", len(rows), where, "" if where == path else f"; those of {path} stay")
    return rows


def marked(row: Row, outdated: Collection[tuple[str, str]]) -> Row:
    """The row, and that the source of what made it changed since, without another version."""
    of = lambda kind, name, key: {key: True} if (kind, name) in outdated else {}
    notes = of("method", row.method, "source_changed") | of("judge", row.judge, "judge_source_changed")

    def added(text: str, more: dict[str, bool]) -> str:
        known = json.loads(text or "{}") if more else {}
        return canonical({**(known if isinstance(known, dict) else {"notes": known}), **more}) if more else text

    params = added(row.attack_params, of("attack", row.attack, "source_changed"))
    return replace(row, fit_notes=added(row.fit_notes, notes), attack_params=params)


def measured(
    erased: Erased, evaluator: Evaluator, ours: Sequence[Shard], originals: Sequence[Shard]
) -> tuple[list[Measure | Metric], list[Measure | Metric]]:
    """An evaluator's measures of the erased images and of the base's; where a guard refused some, also what they are if
    that counts as forgetting."""
    scores = {split: score(erased, evaluator, ours, split) for split in evaluator.splits}
    base = {split: score(erased, evaluator, originals, split) for split in evaluator.splits}
    verdicts.check_varies(evaluator.judge, (scores, base))
    made, before = evaluator.measure(scores, base), evaluator.measure(base, base)
    for side, of in ((made, scores), (before, base)):
        verdicts.check_measures(side, of)
    guarded = any(scored.refused.any() for scored in scores.values())
    return verdicts.with_refusals(made, scores, guarded), verdicts.with_refusals(before, base, guarded)


def explain(error: BaseException) -> str:
    """One line for the row; the traceback of anything that the user did not cause goes to the log."""
    if not isinstance(error, ErasebenchError):
        log.error("traceback:", exc_info=error)
    lines = redact(str(error)).strip().splitlines()
    return (
        lines[-1]
        if isinstance(error, ErasebenchError) and lines
        else f"{type(error).__name__}: {lines[-1] if lines else ''}"
    )


def images(erased: Erased) -> tuple[list[Shard], list[Shard]]:
    """Original shards (shared by every method) and erased ones, in the order of the plan."""
    run = erased.run
    parts = shards(run.plan.prompts)
    base_identity, identity = image_identities(run)
    if not run.is_base:
        start = time.perf_counter()
        erased.fit()  # first, as what is wrong with a method or a checkpoint should be known before hours of sampling
        log.info("fit: %.1f s", time.perf_counter() - start)
    erased.forecast = forecast(erased, parts, (base_identity, identity))
    originals = produce(erased, parts, "base", base_identity, "originals")
    if run.is_base:
        return originals, originals
    # what must change comes first: images of the concept, or all where a task shows none
    count = sum(part[0].split == "target" for part in parts) or len(parts)
    target = produce(erased, parts[:count], "erased", identity, "erased target")
    # with another number of threads to a shard the same model rounds otherwise: one grey level, in few places
    gap = lambda a, b: int((a.images().int() - b.images().int()).abs().max())
    if all(gap(a, b) <= 1 for a, b in zip(originals, target, strict=False)):
        raise ErasebenchError(f"method {run.method} changed no image of the concept: nothing was erased")
    return originals, target + produce(erased, parts[count:], "erased", identity, "erased rest")


def produce(
    erased: Erased,
    parts: Sequence[tuple[Prompt, ...]],
    state: str,
    identity: dict,
    label: str,
    draw: Draw | None = None,
) -> list[Shard]:
    """Shards of images in the order of the parts, by the model in the given state (base, erased, unlocked). What another
    process is making is left to it, and waited for when nothing else is left to do."""
    start, store, sampler = time.perf_counter(), erased.store, erased.run.sampler

    judges = ahead(erased.run)

    def work(wait: bool) -> Work:
        def one(here: Erased, part: tuple[Prompt, ...], beside: int) -> bool:
            model, batch = getattr(here, state), here.run.batch
            try:
                made = make(here.store, model, identity, sampler, part, batch, beside, draw, wait, here.turn)
            except NotFinite as error:
                who = f"base {here.run.source.name}" if state == "base" else f"method {here.run.method}"
                raise NotFinite(f"{error} ({who})") from error
            if made and here.forecast is not None:
                here.forecast.correct(Shard(here.store.get("images", shard_identity(identity, sampler, part)), part).meta())
            for evaluator in judges if made else ():
                if part[0].split in evaluator.splits:
                    with suppress(Exception):  # it is judged again when it is summed up, and fails there
                        judge(here, evaluator, Shard(here.store.get("images", shard_identity(identity, sampler, part)), part))
            return made

        return one

    shard = lambda part: store.get("images", shard_identity(identity, sampler, part))
    missing = [part for part in parts if shard(part) is None]
    done = erased.map(work(wait=False), missing, label)
    erased.map(work(wait=True), [part for part, mine in zip(missing, done, strict=True) if not mine], label)
    made = [Shard(path, part) for part in parts if (path := shard(part))]
    if len(made) < len(parts):
        raise ErasebenchError(
            f"{len(parts) - len(made)} shards were made and are not in the store: is it the same one for all?"
        )
    log.info("%s: %d shards in %.1f s", label, len(made), time.perf_counter() - start)
    return made


def forecast(erased: Erased, parts: Sequence[tuple[Prompt, ...]], identities: Sequence[dict]) -> rates.Forecast | None:
    """What is left to sample, told at an assumed rate; nothing where all is in the store."""
    run, sampler = erased.run, erased.run.sampler
    asked_for = [(shard_identity(identity, sampler, part), len(part)) for identity in identities for part in parts]
    missing = {digest(k): count for k, count in asked_for if not erased.store.has("images", k)}
    images = sum(missing.values())
    if not images:
        return None
    gpu = "" if run.device == "cpu" else provenance.device(run.device)
    evaluations = images * sampler.steps * (2 if sampler.guidance > 1 else 1)
    made = rates.Forecast(evaluations, *rates.assumed(run.source.name, run.speed, gpu))
    made.begin()
    return made


def ahead(run: Run) -> list[Evaluator]:
    """Who judges a shard while a GPU samples the next. The CPU has no time to spare."""
    return [] if run.device == "cpu" else [e for e in run.plan.evaluators.values() if not run.skips(e)]


def judge(erased: Erased, evaluator: Evaluator, shard: Shard) -> None:
    """Get or make a shard's raw scores. Judges work one at a time, and may keep what they have loaded."""
    own = shard.of(erased.store)

    def fill(folder: Path) -> None:
        made_by = provenance.sources(evaluator.judge)
        with judging.on(erased.run.judges):
            found = evaluator.judge.score(own.images(), own.prompts)
        arrays = verdicts.check(evaluator.judge, found, len(own.prompts))
        np.savez_compressed(folder / "scores.npz", **arrays)
        provenance.write_sources(folder, made_by)

    with erased.judging:
        erased.store.get_or_make("scores", score_identity(evaluator.judge, shard.path.name), fill)


def score(erased: Erased, evaluator: Evaluator, made: Sequence[Shard], split: str) -> Scored:
    """Raw scores of one split, shard by shard through the store."""
    entry = lambda shard: erased.store.get("scores", score_identity(evaluator.judge, shard.path.name))
    members = [shard for shard in made if shard.prompts[0].split == split]
    if not members:
        raise ErasebenchError(f"the task has no {split} prompts")
    missing = [shard for shard in members if entry(shard) is None]
    label = f"{evaluator.judge.name} {split}"
    erased.map(lambda here, shard, beside: judge(here, evaluator, shard), missing, label, alone=True)
    for shard in members:
        erased.compare("judge", evaluator.judge.name, evaluator.judge, entry(shard))
    arrays = [stored_scores(evaluator, entry(shard), len(shard.prompts)) for shard in members]
    if len({tuple((key, part[key].shape[1:]) for key in sorted(part)) for part in arrays}) > 1:
        raise ErasebenchError(
            f"judge {evaluator.judge.name} gives arrays of other names or widths for some {split} images"
        )
    return Scored(
        prompts=tuple(prompt for shard in members for prompt in shard.prompts),
        arrays={key: np.concatenate([part[key] for part in arrays]) for key in arrays[0]},
        refused=np.concatenate([shard.meta()["refused"] for shard in members]),
    )


def stored_scores(evaluator: Evaluator, entry: Path, count: int) -> dict[str, np.ndarray]:
    """Raw scores as the store has them; an older entry may hold what is refused now."""
    try:
        with np.load(entry / "scores.npz", allow_pickle=False) as file:
            return verdicts.check(evaluator.judge, dict(file), count)
    except ValueError as error:  # an array of objects
        raise ErasebenchError(f"judge {evaluator.judge.name}: {entry}/scores.npz holds no arrays of numbers") from error


def recovered(erased: Erased, watch: Decider, originals: Sequence[Shard]) -> list[Metric]:
    """rsr: share of the target images that show the concept again once the method gives it back (KPOP)."""
    parts = [shard.prompts for shard in originals if shard.prompts[0].split == "target"]
    if not parts:
        return []
    try:
        watch = calibrated(erased, watch, originals)
    except Undrawn:  # said where it measures
        return []
    identity = {**image_identities(erased.run)[1], "unlocked": True}
    made = produce(erased, parts, "unlocked", identity, "unlocked target")

    def rate(shown: Sequence[Shard]) -> list[Measure]:
        scored = score(erased, watch, shown, "target")
        values = verdicts.shown(watch, scored, refused=0.0)
        return [Measure("rsr", "keep", True, (Part("target", values, [p.text for p in scored.prompts]),))]

    return summarize(rate(made), rate(originals))


def costs(erased: Erased, made: Sequence[Shard]) -> dict[str, Any]:
    """What fit and sampling cost when they were done, wherever that was; read from the store, so it repeats."""
    metas = [shard.meta() for shard in made]
    artifact = None if erased.run.is_base else erased.fitted()
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
    """What `Erased.artifact` noted of a fit; nothing for the base."""
    if artifact is None:
        return {"seconds": 0.0, "unet_samples": 0, "peak_memory_mb": 0.0}
    return json.loads((artifact / "cost.json").read_text())


def spent(erased: Erased, originals: Sequence[Shard], made: Sequence[Shard], cost: dict[str, Any]) -> list[Metric]:
    """What erasing cost, as rows of its own. slowdown: seconds of sampling over the base's for the same prompts, as they
    were measured when the images were made."""
    artifact = None if erased.run.is_base else erased.fitted()
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


def row(
    run: Run,
    run_id: str,
    made: Sequence[Shard],
    cost: dict[str, Any],
    name: str,
    evaluator: Evaluator | None,
    metric: Metric | None = None,
    reason: str = "",
    status: str = "failed",
) -> Row:
    """One row: of a metric, or of something that failed or was skipped."""
    splits = metric.split.split("+") if metric else []
    refused = sum(sum(shard.meta()["refused"]) for shard in made if shard.prompts[0].split in splits)
    prompts = requests([p for p in run.plan.prompts if p.split in splits])
    commit, dirty = provenance.git()
    fallback = {
        "packages": provenance.packages(),
        "commit": commit,
        "dirty": dirty,
        "device": provenance.device(run.device),
        "batch": None,
        "fit_seconds": None,
        "sample_seconds": None,
        "unet_calls": None,
        "peak_memory_mb": None,
        "fit_notes": "",
        "artifact": "",
    }
    judge = evaluator.judge if evaluator else None
    nothing = {f.name: "" if f.type == "str" else None for f in fields(Metric)}
    measured = asdict(metric) if metric else {**nothing, "name": name}
    concepts = measured.pop("by_concept")
    cost = cost or fallback
    measured_row = Row(
        schema=SCHEMA,
        run_id=run_id,
        status="ok" if metric else status,
        reason=masked_text(
            reason, strings([asdict(run.eraser), *map(asdict, run.attacks.values()), str(run.source.path)])
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
        metric=measured.pop("name"),
        published=None,
        published_source="",
        seed=run.seed,
        n_refused=refused if metric else None,
        n_dropped=run.plan.dropped,
        by_concept=json.dumps(concepts, ensure_ascii=False) if concepts else "",
        overrides=json.dumps(run.overrides, ensure_ascii=False),
        sampler=sampler_text(run.sampler) + (", fast" if run.speed == "fast" else ""),
        prompts_sha256=digest(prompts),
        **measured,
        **{**cost, "fit_notes": masked_json(cost["fit_notes"])},
    )
    return with_published(measured_row)


def attack_rows(run: Run, run_id: str, ours: Sequence[Shard], cost: dict[str, Any], outcome: Outcome) -> list[Row]:
    """Rows of one attack, with its own cost; one row alone if it failed or was skipped."""
    spent = dict(outcome.cost) or cost
    prompts = requests([p for p in run.plan.prompts if p.split == "target"][: run.attacked])
    under: dict[str, Any] = {"attack": outcome.name, "attack_params": masked_json(outcome.params), "prompts_sha256": digest(prompts)}
    if outcome.status != "ok":
        made = [row(run, run_id, ours, spent, "", None, reason=outcome.reason, status=outcome.status)]
    else:
        watch = watcher(run)
        made = [row(run, run_id, outcome.made, spent, "", watch, metric=metric) for metric in outcome.metrics]
        under["n_dropped"] = run.plan.dropped + outcome.dropped
    return [with_published(replace(r, **under)) for r in made]


def sampler_text(sampler: Sampler) -> str:
    size = f", {sampler.size} px" if sampler.size else ""
    return f"{sampler.name} {sampler.steps} steps, guidance {sampler.guidance:g}{size}"


def sheet(run: Run, originals: Sequence[Shard], made: Sequence[Shard], path: Path, columns: int = 8) -> None:
    """Base on top, erased below, same prompts and seeds: a pair of rows for each split. Never for explicit tasks.

    The file says what it shows (EXIF): the run, its rows of each split, and the columns' prompts and seeds.
    """
    if run.plan.explicit:
        return
    columns = min(columns, max(len(shard.prompts) for shard in made))
    strips, shown, sides = [], {}, ["base"] if run.is_base else ["base", "erased"]
    shrink = lambda picture: np.asarray(Image.fromarray(picture).resize((SHEET, SHEET), Image.LANCZOS))
    for split in dict.fromkeys(shard.prompts[0].split for shard in made):
        first = [next(s for s in side if s.prompts[0].split == split) for side in (originals, made)]
        shown[split] = [(prompt.text, prompt.seed) for prompt in first[0].prompts[:columns]]
        pair = [shard.images()[:columns].numpy() for shard in first]
        for pictures in pair[: len(sides)]:
            if pictures.shape[1] > SHEET:  # a page holds the sheets of many runs
                pictures = np.stack([shrink(picture) for picture in pictures])
            blank = np.full((columns - len(pictures), *pictures.shape[1:]), 255, np.uint8)
            strips.append(np.concatenate(list(np.concatenate([pictures, blank])), axis=1))
        strips.append(np.full((8, strips[-1].shape[1], 3), 255, np.uint8))
    said = Image.Exif()
    what = {"run": path.stem, "sides": sides, "columns": columns, "shows": shown}
    said[ExifTags.Base.ImageDescription] = json.dumps(what)
    Image.fromarray(np.concatenate(strips[:-1])).save(buffer := io.BytesIO(), "WEBP", quality=70, exif=said)
    replace_file(path, buffer.getvalue())
