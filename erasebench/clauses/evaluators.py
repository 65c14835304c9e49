"""Contract of an evaluator and its judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from ..contracts import (
    Calibrates,
    ChecksItself,
    Decider,
    DecidesSuccess,
    ErasebenchError,
    Evaluator,
    Judge,
    Metric,
    Prompt,
    RanksConcepts,
    Recognises,
    Scored,
    Undrawn,
)
from ..run import verdicts
from ..stats import Measure, summarize
from ..store.local import digest
from . import Clause, disturb, has_text, is_frozen, is_sent, says_needs, version_of

GROUPS = ("forget", "keep", "quality", "overall")
APART = 1e-3  # tolerance for scores of an image in another batch: networks round differently
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Judging:
    """Evaluator under examination, with prompts and images of the task's splits.

    There is one image for each prompt: uint8 [N, H, W, 3].
    """

    plugin: Evaluator
    prompts: Mapping[str, Sequence[Prompt]]
    images: Mapping[str, Tensor]

    @property
    def judge(self) -> Judge:
        return self.plugin.judge

    @property
    def splits(self) -> list[str]:
        return [split for split in self.plugin.splits if split in self.prompts]

    def arrays(self, split: str, which: Sequence[int] | None = None) -> Arrays:
        """Return raw scores of some images of a split."""
        chosen = list(range(len(self.prompts[split])) if which is None else which)
        found = self.judge.score(self.images[split][chosen].clone(), [self.prompts[split][i] for i in chosen])
        return verdicts.check(self.judge, found, len(chosen))

    @cached_property
    def base(self) -> dict[str, Scored]:
        given = lambda split: (tuple(self.prompts[split]), self.arrays(split))
        return {split: Scored(*given(split), np.zeros(len(self.prompts[split]), bool)) for split in self.splits}

    @cached_property
    def ours(self) -> dict[str, Scored]:
        """Scores of an imaginary method: those of the base's images in reverse order."""
        return self.altered(lambda values: values[::-1])

    def altered(self, change) -> dict[str, Scored]:
        turn = lambda scored: {key: change(values.copy()) for key, values in scored.arrays.items()}
        return {split: replace(scored, arrays=turn(scored)) for split, scored in self.base.items()}

    def measures(self, scores: Mapping[str, Scored]) -> list[Measure | Metric]:
        """Return the harness's measures of scores, with all of its checks."""
        verdicts.check_varies(self.judge, (scores, self.base))
        made = list(self.plugin.measure(scores, self.base))
        verdicts.check_measures(made, scores)
        return made

    @cached_property
    def decider(self) -> Decider | None:
        """Evaluator that decides success, calibrated on the base's images; None if there is none."""
        plugin: Evaluator = self.plugin
        if isinstance(plugin, Calibrates):
            try:
                plugin = plugin.calibrated(self.base)
            except Undrawn:  # a legitimate verdict on this base
                return None
        return plugin if isinstance(plugin, DecidesSuccess) else None


def numbers(measures: Sequence[Measure | Metric]) -> str:
    """Return all values of measures as one text, for comparison."""
    return repr([(m.name, *(p.values.tolist() for p in verdicts.parts_of(m))) for m in measures])


def has_all(judging: Judging) -> str | None:
    if not isinstance(judging.plugin, Evaluator):
        return "judge, splits or measure is missing"
    return None if isinstance(judging.judge, Judge) else "its judge lacks name, version, licence, weights or score"


def judge_is_frozen(judging: Judging) -> str | None:
    return is_frozen(replace(judging, plugin=judging.judge))  # type: ignore[arg-type]


def judge_has_version(judging: Judging) -> str | None:
    return version_of(judging.judge)


def judge_has_text(judging: Judging) -> str | None:
    digest([judging.judge, judging.judge.name, judging.judge.licence])
    return None


def names_weights(judging: Judging) -> str | None:
    found = judging.judge.weights()
    right = isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, str) and v for k, v in found.items())
    return None if right else "weights() is no dict of file name -> sha256"


def has_splits(judging: Judging) -> str | None:
    if not judging.plugin.splits or isinstance(judging.plugin.splits, str):
        return "splits is no tuple of names"
    lost = [split for split in judging.plugin.splits if split not in judging.prompts]
    return f"the task has no {', '.join(lost)} prompts" if lost else None


def checks_itself(judging: Judging) -> str | None:
    if isinstance(judging.plugin, ChecksItself):
        judging.plugin.check()
    return None


def recognises(judging: Judging) -> str | None:
    plugin = judging.plugin
    if not isinstance(plugin, Recognises):
        return None
    asked = dict.fromkeys(p.concept for split in judging.splits for p in judging.prompts[split] if p.concept)
    said = {concept: plugin.recognises(concept) for concept in asked}
    odd = [concept for concept, answer in said.items() if not isinstance(answer, bool | np.bool_)]
    lost = [concept for concept, answer in said.items() if not answer]
    if odd:
        return f"recognises({odd[0]!r}) is neither True nor False"
    return f"it does not know {lost[0]!r}, which the task asks for" if lost else None


def scores_each(judging: Judging) -> str | None:
    _ = judging.base
    return None


def scores_repeat(judging: Judging) -> str | None:
    disturb(1)
    return next((f"{split}: two scorings differ" for split in judging.splits if not equal(judging, split, 0.0)), None)


def equal(judging: Judging, split: str, apart: float, which: Sequence[int] | None = None) -> bool:
    """Return whether images get the same scores as among their whole split."""
    again, known = judging.arrays(split, which), judging.base[split].arrays
    chosen = slice(None) if which is None else list(which)
    near = lambda a, b: np.allclose(a.astype(float), b.astype(float), rtol=apart, atol=apart, equal_nan=True)
    return set(again) == set(known) and all(
        again[key].shape == known[key][chosen].shape and near(again[key], known[key][chosen]) for key in known
    )


def scores_alone(judging: Judging) -> str | None:
    for split in judging.splits:
        for i in range(len(judging.prompts[split])):
            if not equal(judging, split, APART, [i]):
                return f"{split}: image {i} alone is scored differently"
    return None


def scores_in_any_order(judging: Judging) -> str | None:
    backwards = lambda split: list(range(len(judging.prompts[split])))[::-1]
    moved = [split for split in judging.splits if not equal(judging, split, APART, backwards(split))]
    return f"{moved[0]}: scores depend on the order of the images" if moved else None


def leaves_images(judging: Judging) -> str | None:
    for split in judging.splits:
        given = judging.images[split].clone()
        judging.judge.score(given, judging.prompts[split])
        if not given.equal(judging.images[split]):
            return f"{split}: score() wrote into the images"
    return None


def tells_apart(judging: Judging) -> str | None:
    verdicts.check_varies(judging.judge, [judging.base])
    return None


def gives_verdicts(judging: Judging) -> str | None:
    blank = lambda scored: all(np.isnan(a.astype(float)).all() for a in scored.arrays.values())
    silent = [split for split in judging.splits if blank(judging.base[split])]
    return f"{silent[0]}: no verdict on any image" if silent else None


def measures(judging: Judging) -> str | None:
    made = judging.measures(judging.ours)
    if not made:
        return "no measure"
    if odd := [type(m).__name__ for m in made if not isinstance(m, Measure | Metric)]:
        return f"{odd[0]} is neither Measure nor Metric"
    names = [m.name for m in made]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        return f"{twice[0]} is given twice"
    odd = [m.name for m in made if m.group not in GROUPS]
    return f"{odd[0]}: its group is none of {', '.join(GROUPS)}" if odd else None


def measures_finitely(judging: Judging) -> str | None:
    made = summarize(judging.measures(judging.ours), judging.measures(judging.base))
    odd = [m.name for m in made if m.value is not None and not math.isfinite(m.value)]
    odd += [m.name for m in judging.measures(judging.ours) for p in verdicts.parts_of(m) if np.isinf(p.values).any()]
    return f"{odd[0]} is not finite" if odd else None


def measures_purely(judging: Judging) -> str | None:
    before = {split: {k: a.copy() for k, a in s.arrays.items()} for split, s in judging.ours.items()}
    first = numbers(judging.measures(judging.ours))
    for split, arrays in before.items():
        if not all(np.array_equal(arrays[k], judging.ours[split].arrays[k], equal_nan=True) for k in arrays):
            return f"{split}: measure() wrote into the scores"
    disturb(2)
    return None if numbers(judging.measures(judging.ours)) == first else "two measurements of the same scores differ"


def counts_no_silence(judging: Judging) -> str | None:
    silence = lambda a: np.full_like(a, np.nan) if a.dtype.kind == "f" else a
    if not any(a.dtype.kind == "f" for s in judging.base.values() for a in s.arrays.values()):
        return None
    try:
        made = judging.measures(judging.altered(silence))
    except ErasebenchError:  # no number either
        return None
    counted = [m.name for m in made if verdicts.parts_of(m) and all(len(p.judged) for p in verdicts.parts_of(m))]
    return f"{counted[0]} has a value where the judge gave no verdict on any image" if counted else None


def refuses_other_lengths(judging: Judging) -> str | None:
    fewer = judging.altered(lambda values: values[:-1])
    try:
        verdicts.check_measures(judging.plugin.measure(fewer, judging.base), fewer)
    except (ErasebenchError, ValueError, IndexError):
        return None
    return "scores of one image fewer than there are prompts pass"


def decides(judging: Judging) -> str | None:
    if (decider := judging.decider) is None:
        return None
    if not isinstance(decider.threshold, int | float) or not math.isfinite(decider.threshold):
        return f"threshold is {decider.threshold!r}, no number"
    verdicts.shown(decider, judging.base["target"])  # raises unless there is one finite score for each image
    return None


def ranks(judging: Judging) -> str | None:
    if not isinstance(judging.plugin, RanksConcepts):
        return None
    found = np.asarray(judging.plugin.top1(judging.base["target"]), float)
    if found.shape != (len(judging.prompts["target"]),):
        return f"top1() gives {list(found.shape)} for {len(judging.prompts['target'])} images"
    return None if set(found[~np.isnan(found)].tolist()) <= {0.0, 1.0} else "top1() gives other values than 0, 1, NaN"


CLAUSES: tuple[Clause[Judging], ...] = (
    Clause("is a frozen dataclass", is_frozen, essential=True),
    Clause("its parameters have a canonical text", has_text),
    Clause("has a judge, splits and measure, and the judge all that a judge has", has_all, essential=True),
    Clause("its judge is a frozen dataclass", judge_is_frozen),
    Clause("its judge has a version, a whole number of its class", judge_has_version),
    Clause("its judge's parameters have a canonical text", judge_has_text),
    Clause("its judge names its weights", names_weights, essential=True),
    Clause("can be sent to another process", is_sent),
    Clause("says what it needs, if anything", says_needs),
    Clause("its splits are the task's", has_splits, essential=True),
    Clause("has all that it checks itself, if anything", checks_itself),
    Clause("recognises the task's concepts, if it knows a list", recognises),
    Clause("one finite score, or NaN, an image", scores_each, essential=True),
    Clause("scoring is deterministic", scores_repeat),
    Clause("a score does not depend on the batch", scores_alone),
    Clause("a score does not depend on the order of the images", scores_in_any_order),
    Clause("scoring leaves the images as they were", leaves_images),
    Clause("the judge tells images apart", tells_apart, essential=True),
    Clause("the judge gives a verdict on some image of each split", gives_verdicts),
    Clause("measure gives measures, each name once, of a known group", measures, essential=True),
    Clause("measures are finite", measures_finitely),
    Clause("measure is a pure function of the scores", measures_purely),
    Clause("no verdict is counted as a value", counts_no_silence),
    Clause("scores of another number of images are refused", refuses_other_lengths),
    Clause("success is decided by one confidence an image and a threshold, if at all", decides),
    Clause("top1 is 1, 0 or NaN an image, if there is one", ranks),
)
