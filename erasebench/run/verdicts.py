"""Validation of judges' raw scores, and verdicts derived from them.

In the contract, NaN means no verdict on an image. Any other invalid score (infinity, a wrong number of images or
classes, text, invalid probabilities, the same scores for every image) raises an error that names the judge.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..contracts import Decider, ErasebenchError, IsSparse, Judge, Metric, Scored

if TYPE_CHECKING:
    from ..stats import Measure, Part

TOLERANCE = 1e-3  # for bounds and sums, since judges may compute in half precision
FEWEST = 4  # from this many different images on, bit-equal scores mean that a judge does not discriminate
ANY = range(1, 2**31)  # any number of columns, for an evaluator that does not know it
COSINE, PROBABILITY = (-1.0, 1.0), (0.0, 1.0)


def check(judge: Judge, scores: Any, count: int) -> dict[str, np.ndarray]:
    """Return a judge's scores of `count` images as arrays. Raises ErasebenchError if they are invalid."""
    who = f"judge {judge.name}"
    if not isinstance(scores, Mapping) or not scores:
        raise ErasebenchError(f"{who} gives no named arrays of scores (its score() returned {type(scores).__name__})")
    arrays = {}
    for key, values in scores.items():
        try:
            array = np.asarray(values)
        except ValueError as error:  # rows of different lengths
            raise ErasebenchError(f"{who}: {key!r} is no array of numbers") from error
        if array.dtype.kind not in "fiub":
            raise ErasebenchError(f"{who}: {key!r} is {array.dtype}, no real numbers")
        if not array.ndim or len(array) != count:
            raise ErasebenchError(f"{who}: {key!r} has {len(array) if array.ndim else 'no'} rows for {count} images")
        if np.isinf(array).any():
            raise ErasebenchError(f"{who}: {key!r} is infinite for {int(by_image(np.isinf(array)).sum())} images")
        arrays[str(key)] = array
    return arrays


def by_image(flags: np.ndarray) -> np.ndarray:
    """Return whether any of an image's flags is set: flags [N, ...] -> bool [N]."""
    return np.asarray(flags.reshape(len(flags), -1).any(1))


def rows(
    judge: Judge,
    scored: Scored,
    key: str,
    columns: int | Collection[int] | None = None,
    bounds: tuple[float, float] | None = None,
    total: float | None = None,
) -> np.ndarray:
    """Return one array of raw scores as floats [N] or [N, columns].

    If any score of an image is NaN, all of them become NaN. `bounds`: range of all numbers; `total`: sum of the columns
    of each image. Raises ErasebenchError if the array is missing or invalid."""
    who, count = f"judge {judge.name}", len(scored.prompts)
    if key not in scored.arrays:
        raise ErasebenchError(f"{who} gives no {key!r}, only {', '.join(map(repr, scored.arrays)) or 'nothing'}")
    array = check(judge, {key: scored.arrays[key]}, count)[key].astype(float)
    if np.shape(scored.refused) != (count,):
        raise ErasebenchError(f"{who}: {np.size(scored.refused)} images are refused or not, of {count}")
    wanted = [columns] if isinstance(columns, int) else columns
    if array.ndim != (1 if columns is None else 2) or (wanted is not None and array.shape[1] not in wanted):
        shape = "[N]" if columns is None else f"[N, {columns if isinstance(columns, int) else '...'}]"
        raise ErasebenchError(f"{who}: {key!r} is {list(array.shape)}, expected {shape} with N = {count}")
    array[by_image(np.isnan(array))] = np.nan
    judged = array[~by_image(np.isnan(array))]
    if bounds and len(judged) and (judged.min() < bounds[0] - TOLERANCE or judged.max() > bounds[1] + TOLERANCE):
        raise ErasebenchError(
            f"{who}: {key!r} leaves [{bounds[0]:g}, {bounds[1]:g}]: {judged.min():g}, {judged.max():g}"
        )
    if total is not None and len(judged) and (gap := np.abs(judged.sum(1) - total)).max() > TOLERANCE:
        raise ErasebenchError(f"{who}: {key!r} of an image adds up to {judged.sum(1)[gap.argmax()]:g}, not {total:g}")
    return array


def top1(choices: np.ndarray) -> np.ndarray:
    """Return the highest column for each image: [N, C] -> [N].

    -1 if there is no verdict or if all columns are equal."""
    none = np.isnan(choices).any(1)
    if choices.shape[1] > 1:
        none |= choices.max(1) == choices.min(1)
    return np.where(none, -1, np.where(none[:, None], 0, choices).argmax(1))


def equals(found: np.ndarray, wanted: Any) -> np.ndarray:
    """Compare classes found [N] with those wanted: 1 if equal, 0 if not, NaN if none (-1)."""
    return np.where(found < 0, np.nan, (found == np.asarray(wanted)) * 1.0)


def exceeds(surely: np.ndarray, threshold: float, strictly: bool = False) -> np.ndarray:
    """Return 1 if a score [N, ...] reaches the threshold, else 0; NaN stays NaN."""
    there = surely > threshold if strictly else surely >= threshold
    return np.where(np.isnan(surely), np.nan, there * 1.0)


def without(values: np.ndarray, refused: np.ndarray, instead: float = np.nan) -> np.ndarray:
    """Replace the values [N] of refused images by `instead` (NaN: no verdict)."""
    return np.where(refused, instead, values)


def shown(evaluator: Decider, scored: Scored, refused: float = np.nan) -> np.ndarray:
    """Return whether a deciding evaluator sees the concept [N]: 1, 0, or NaN without a verdict.

    `refused` is the value of an image that a guard refused."""
    surely = np.asarray(evaluator.confidence(scored), float)
    if surely.shape != (len(scored.prompts),) or np.isinf(surely).any():
        raise ErasebenchError(f"judge {evaluator.judge.name}: {len(scored.prompts)} finite scores were expected")
    return without(exceeds(surely, evaluator.threshold), scored.refused, refused)


def check_varies(judge: Judge, sides: Iterable[Mapping[str, Scored]], *keys: str) -> None:
    """Raise ErasebenchError if a judge gives bit-equal scores for every image.

    One constant array among `keys` is enough; without keys, all arrays must be constant. Equal scores are legitimate
    for a judge of rare content (`sparse`), which finds nothing in most images."""
    every = list({id(scored): scored for side in sides for scored in side.values()}.values())
    for scored in every:
        arrays = {key: scored.arrays[key] for key in keys or scored.arrays if key in scored.arrays}
        if arrays or not keys:  # splits scored by other judges have other arrays
            check(judge, arrays, len(scored.prompts))
    drawn = {(p.text, p.seed) for s in every for p, gone in zip(s.prompts, s.refused, strict=True) if not gone}
    if len(drawn) < FEWEST or (isinstance(judge, IsSparse) and judge.sparse):
        return
    names = keys or tuple(dict.fromkeys(key for scored in every for key in scored.arrays))
    found = [
        constant(np.asarray(s.arrays[key])[~np.asarray(s.refused, bool)] for s in every if key in s.arrays)
        for key in names
    ]
    if any(found) if keys else found and all(found):
        raise ErasebenchError(f"judge {judge.name} gives the same scores for all {len(drawn)} different images")


def constant(parts: Iterable[np.ndarray]) -> bool:
    """Return whether the rows are bit-equal; rows of NaN only are ignored.

    False if fewer than FEWEST rows remain."""
    flat = [np.asarray(part).reshape(len(part), -1) for part in parts if len(part)]
    if not flat or len({part.shape[1] for part in flat}) > 1:
        return False
    every = np.concatenate(flat)
    every = every[~(every != every).all(1)]
    if len(every) < FEWEST:
        return False
    equal = (every == every[0]) | ((every != every) & (every[0] != every[0]))
    return bool(equal.all())


def check_measures(measures: Iterable[Measure | Metric], scores: Mapping[str, Scored]) -> None:
    """Raise ErasebenchError if a metric's values do not match its images.

    There must be as many values as the split has images."""
    for measure in measures:
        for part in parts_of(measure):
            count = len(scores[part.split].prompts) if part.split in scores else len(part.values)
            if len(part.values) != count:
                raise ErasebenchError(f"metric {measure.name}: {len(part.values)} values for {count} images")


def with_refusals(measures: Iterable[Measure | Metric], scores: Mapping[str, Scored], also: bool) -> list[Measure | Metric]:
    """Return the measures and, if `also`, their `<name>_refused_as_forgotten` variants.

    In these, a refused image counts as an image without the concept, by the evaluator's own value for it."""
    made = list(measures)
    measures_alone = [m for m in made if also and not isinstance(m, Metric)]
    return made + [leniently(m, scores) for m in measures_alone if any(p.forgotten is not None for p in m.parts)]


def parts_of(measure: Measure | Metric) -> tuple[Part, ...]:
    """Return the parts that a measure averages; a finished metric has none."""
    return () if isinstance(measure, Metric) else measure.parts


def leniently(measure: Measure, scores: Mapping[str, Scored]) -> Measure:
    fill = lambda p: (
        p if p.forgotten is None else replace(p, values=np.where(scores[p.split].refused, p.forgotten, p.values))
    )
    return replace(measure, name=f"{measure.name}_refused_as_forgotten", parts=tuple(map(fill, measure.parts)))
