"""Forecast of a run without making it: `dry_run=true` on any command line, sweeps and experiments included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import provenance, rates
from ..contracts import ChecksItself, ErasebenchError
from ..model import bases
from ..model.source import Source
from ..needs import needs_of
from ..run import images as generate
from ..run.specification import Run, image_identities, shard_identity
from ..store.local import Store, digest


@dataclass(frozen=True)
class Planned:
    """Forecast of one run.

    images: shard key's digest -> (number of images, whether they are in the store); per_image: U-Net evaluations of
    single latents for each image; fit: whether the fit is still to do; missing: weights, files and packages that are
    missing; judges: judge -> its licence; rate: assumed evaluations a second; of: source of that rate.
    """

    name: str
    images: dict[str, tuple[int, bool]]
    per_image: int
    fit: bool
    missing: tuple[str, ...]
    judges: dict[str, str]
    rate: float = 1.0
    of: str = ""


def planned(run: Run) -> Planned:
    store, images = Store(), {}
    base, erased, unknown = identities(run)
    missing = [unknown] if unknown else []
    for identity in (base, erased):
        for part in generate.shards(run.plan.prompts):
            key = shard_identity(identity, run.sampler, part)
            images[digest(key)] = len(part), store.has("images", key)
    judges, able = {}, []
    for name, evaluator in run.plan.evaluators.items():
        if evaluator is None or evaluator.judge is None:
            continue
        judges[evaluator.judge.name] = evaluator.judge.licence
        try:
            evaluator.judge.weights()
            if isinstance(evaluator, ChecksItself):
                evaluator.check()
            if reason := run.unknown_to(evaluator):
                missing.append(f"{name}: {reason}")
            able += [evaluator, evaluator.judge]
        except ErasebenchError as error:
            missing.append(f"{name}: {error}")
    missing += absent(*able, run.eraser, *run.attacks.values())
    fit = not run.is_base and not unknown and not store.has("artifacts", run.fit_identity())
    what = run.target or f"n={len(run.plan.concepts)}"
    guided = run.sampler.guidance > 1
    return Planned(
        f"{run.method} {run.plan.task} {what} on {run.source.name}",
        images,
        run.sampler.steps * (2 if guided else 1),
        fit,
        tuple(missing),
        judges,
        *rates.assumed(run.source.name, run.speed, provenance.device(run.device) if run.device != "cpu" else ""),
    )


def absent(*plugins: Any) -> list[str]:
    """Return the plugins' needs that this machine lacks.

    Each line says how to get one.
    """
    fate = lambda need: "it will be downloaded from" if need.fetch else "get it:"
    return [
        f"{need.what}{need.size} is not on this machine: {fate(need)} {need.how}"
        for need in needs_of(*plugins)
        if need.find() is None
    ]


def identities(run: Run) -> tuple[dict, dict, str]:
    """Return `image_identities`, and the reason why they are unknown, if they are.

    Unknown identities are replaced by stand-ins that tell runs apart: the base is identified by its name.
    """
    try:
        weights_present(run.source)
        return *image_identities(run), ""
    except ErasebenchError as error:
        base = {"unknown": run.source.name}
        fit = digest([run.eraser, run.eraser.version, run.plan.brief, run.seed])
        return base, base if run.is_base else {**base, "artifact": fit}, str(error)


def weights_present(source: Source) -> None:
    """Raise ErasebenchError unless a run can load the model without downloading."""
    if source.path:
        source.check()
        return
    if lost := bases.first_absent(source.hub, source.revision or None):
        there = "not" if lost == bases.INDEX else f"not whole ({lost} is not there)"
        raise ErasebenchError(
            f"{source.hub} is {there} on this machine: it will be downloaded, or give a folder (model.path=)"
        )


def tell(runs: Sequence[Run], uncounted: Sequence[tuple[str, str, str]], rate: float | None) -> None:
    print(report([planned(run) for run in runs], uncounted, rate))


def report(plans: Sequence[Planned], uncounted: Sequence[tuple[str, str, str]], rate: float | None) -> str:
    """Return the forecast as text: a line for each run, then the sum.

    Each of `uncounted`, runs whose prompts are not on this machine (task, model, why), has a line too. Images that
    several runs share (the originals) count once in the sum. Without a `rate`, each run's own is assumed.
    """
    lines, every = [], {}
    for plan in plans:
        to_make = {key: n for key, (n, there) in plan.images.items() if not there}
        lines.append(
            f"{plan.name}: {sum(n for n, _ in plan.images.values())} images, {sum(to_make.values())} to make"
            + (", fit to do" if plan.fit else "")
            + "".join(f"; missing: {what}" for what in plan.missing)
        )
        every |= {key: (n, plan.per_image, plan.rate) for key, n in to_make.items()}
    lines += [f"{task} on {model}: missing: {why}" for task, model, why in uncounted]
    judges = {name: licence for plan in plans for name, licence in plan.judges.items()}
    if judges:
        lines.append("judges: " + "; ".join(f"{name}, {licence}" for name, licence in judges.items()))
    calls = sum(n * per_image for n, per_image, _ in every.values())
    seconds = sum(n * per_image / (rate or own) for n, per_image, own in every.values())
    at = [f"{rate:g} a second"] if rate else dict.fromkeys(f"{p.rate:.3g} a second (assumed: {p.of}; rate=)" for p in plans)
    lines.append(
        f"{len(plans)} runs, {sum(n for n, *_ in every.values())} images to make, {calls} U-Net evaluations, "
        f"{seconds / 3600:.1f} GPU hours at {', '.join(at) or 'no rate'} (fits and attacks not counted)"
        + (
            f"; {len(uncounted)} more runs, whose prompts are not here (a dry run downloads nothing)"
            if uncounted
            else ""
        )
    )
    return "\n".join(lines)
