"""Audit of the judges: python -m erasebench audit [method=... task=...]

Without arguments: compares every judge of the embedded world with the drawn truth of the shipped drawings. With runs
(any command line of `python -m erasebench`): reports the agreement of the first and the second opinion on their images
(Cohen's kappa), and ranks the methods at every threshold if the judge has one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import config, stats
from ..contracts import DecidesSuccess, ErasebenchError, Prompt, Scored
from ..report.runs import breakage
from ..run import verdicts
from ..run.produce import images
from ..run.run import execute
from ..run.scoring import calibrate, score
from ..run.session import Session
from ..run.specification import Run
from ..store.local import Store

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


# -- against the drawn truth ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Against:
    """Verdicts of one judge beside the truth, bool [N]."""

    judge: str
    question: str
    said: np.ndarray
    true: np.ndarray

    def line(self) -> list[str]:
        hits, quiet = self.said[self.true], ~self.said[~self.true]
        return [self.judge, self.question, rate(hits), rate(quiet), f"{kappa(self.said, self.true):.3f}"]


def rate(values: np.ndarray) -> str:
    """Return a rate with its interval and count: "0.980 [0.950, 0.990] n=200"."""
    if not len(values):
        return "no case"
    low, high = stats.wilson(int(values.sum()), len(values))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}] n={len(values)}"


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Return Cohen's kappa (1960) of two verdicts [N]. NaN if both always give the same single verdict."""
    agree = (a == b).mean()
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float((agree - chance) / (1 - chance)) if chance < 1 else float("nan")


class Drawings:
    """Drawings that ship with the embedded world, and their ground truth."""

    def __init__(self) -> None:
        import torch

        from ..mini import nets

        self.truth = nets.drawings()
        self.pictures = torch.from_numpy(np.stack([d["pixels"] for d in self.truth]))
        self.prompts = tuple(Prompt(str(i), d["caption"], i, "drawn") for i, d in enumerate(self.truth))

    def score(self, judge: Any) -> Scored:
        steps = range(0, len(self.truth), 256)
        parts = [judge.score(self.pictures[i : i + 256], self.prompts[i : i + 256]) for i in steps]
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        return Scored(self.prompts, arrays, np.zeros(len(self.truth), bool))

    def ask(self, question: Callable[[Mapping[str, Any]], Any]) -> np.ndarray:
        """Return the answer to `question` for each drawing."""
        return np.array([question(drawing) for drawing in self.truth])


def drawn_truth() -> list[Against]:
    """Compare every judge of the embedded world with the shipped drawings."""
    drawings = Drawings()
    made = [compare_objects(drawings), *compare_hazards(drawings), *compare_identity(drawings)]
    made += [compare_artists(drawings), compare_backgrounds(drawings)]
    try:
        made.append(compare_yolo(drawings))
    except ErasebenchError as error:
        print(f"skipped: {error}", file=sys.stderr)
    return made


def compare_objects(drawings: Drawings) -> Against:
    from ..evaluators.spread import Drawn

    judge = Drawn()
    seen = drawings.score(judge).arrays["objects"] > 0.5
    there = drawings.ask(lambda d: [name in d["objects"] for name in judge.classes])
    return Against(judge.name, "each object, at 0.5", seen.ravel(), there.ravel())


def compare_hazards(drawings: Drawings) -> list[Against]:
    from ..evaluators.detections import Hazards, best

    judge = Hazards()
    found = drawings.score(judge)
    there = drawings.ask(lambda d: [name in d["hazards"] for name in judge.classes])
    return [
        Against(judge.name, f"{name}, at 0.5", best(found, judge, [name]) >= 0.5, there[:, i])
        for i, name in enumerate(judge.classes)
    ]


def compare_identity(drawings: Drawings) -> list[Against]:
    from ..evaluators.identity import Identity

    judge = Identity()
    found, nobody = drawings.score(judge).arrays, len(judge.people)
    face = Against(judge.name, "a face", found["face"] >= judge.gate, drawings.ask(lambda d: bool(d["face"])))
    first = np.where(np.isnan(found["names"]).any(1), nobody, np.nan_to_num(found["names"]).argmax(1))
    named = drawings.ask(lambda d: judge.people.index(d["person"]) if d["person"] else nobody)
    verdict = np.where(named < nobody, first == named, first < nobody)
    return [face, Against(judge.name, "the person, among 200 and nobody", verdict, named < nobody)]


def compare_artists(drawings: Drawings) -> Against:
    from ..evaluators.style import Artists

    judge = Artists()
    likeliest, nobody = drawings.score(judge).arrays["artists"].argmax(1), len(judge.classes)
    styled = drawings.ask(lambda d: whose(d, judge.classes))
    verdict = np.where(styled < nobody, likeliest == styled, likeliest < nobody)
    return Against(judge.name, "whose hand, among ten artists' and none", verdict, styled < nobody)


def compare_backgrounds(drawings: Drawings) -> Against:
    from ..evaluators.clip import Clip
    from ..evaluators.spread import Backgrounds

    judge = Backgrounds(Clip(architecture="embedded", pretrained="embedded")).judge
    nearest = drawings.score(judge).arrays["texts"].argmax(1)
    asked = drawings.ask(lambda d: [d["caption"].endswith(where) for where in judge.texts])
    named, verdict = asked.any(1), np.eye(len(judge.texts), dtype=bool)[nearest]
    question = "each background, where one is named"
    return Against(judge.name, question, verdict[named].ravel(), asked[named].ravel())


def compare_yolo(drawings: Drawings) -> Against:
    """Compare YOLO with the drawings. Raises ErasebenchError if YOLO is not installed."""
    from ..evaluators.yolo import Yolo

    judge = Yolo()
    likeliest, nothing = drawings.score(judge).arrays["probabilities"].argmax(1), len(judge.classes) - 1
    single = drawings.ask(lambda d: len(d["objects"]) < 2)
    truth = drawings.ask(lambda d: judge.classes.index(d["objects"][0]) if len(d["objects"]) == 1 else nothing)
    verdict = np.where(truth == nothing, likeliest != nothing, likeliest == truth)
    return Against(judge.name, "the object, where there is one at most", verdict[single], (truth != nothing)[single])


def whose(drawing: Mapping[str, Any], artists: Sequence[str]) -> int:
    """Return the index of the artist whose style a drawing shows.

    The style need not have been asked for. Returns the number of artists if no artist's hand drew anything. The i-th
    artist draws with hand i modulo 5; of two artists with the same hand, one prints, and the other draws like any
    plain drawing.
    """
    if drawing["artist"]:
        return artists.index(drawing["artist"])
    plain = (i for i in range(len(artists)) if i % 5 == drawing["hand"] and (i % 5 + i // 5) % 2 == 0)
    return next(plain, len(artists))


# -- on the images of runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opinions:
    """Verdicts of both judges on the target images of one run.

    `scores` holds the first judge's score of each image (higher: shows the concept).
    """

    method: str
    scores: np.ndarray
    first: np.ndarray
    second: np.ndarray | None
    broken: str = ""  # reason why the run is broken


def opinions(run: Run) -> Opinions | None:
    """Make a run and return both judges' verdicts on its target images.

    Returns None if no evaluator of the run decides whether an image shows the concept (DecidesSuccess). Raises
    ErasebenchError if the method failed or no target image has a verdict.
    """
    rows = execute(run)
    if any(row.status == "failed" for row in rows):
        raise ErasebenchError(f"method {run.method} failed: nothing to audit")
    broken = "; ".join(breakage(rows))
    session = Session(run, Store())
    originals, made = images(session)
    session.close()
    for evaluator in run.plan.evaluators.values():
        if isinstance(evaluator, DecidesSuccess) and not run.skips(evaluator):
            evaluator = calibrate(session, evaluator, originals)
            scored = score(session, evaluator, made, "target")
            first = verdicts.shown(evaluator, scored)
            other = run.second and np.asarray(run.second.verdict(score(session, run.second, made, "target")), float)
            judged = ~np.isnan(first) & (~np.isnan(other) if other is not None else True)
            if not judged.any():
                raise ErasebenchError(f"method {run.method}: no target image with a verdict, nothing to audit")
            surely = evaluator.confidence(scored)[judged]
            confirmed = other[judged] == 1 if other is not None else None
            return Opinions(run.method, surely, first[judged] == 1, confirmed, broken)
    return None


def places(found: Sequence[Opinions]) -> list[list[str]]:
    """Return a line for each threshold that ranks the methods.

    The method that shows the concept least comes first, each with its share of images. Broken runs are left out.
    """
    lines = []
    for threshold in THRESHOLDS:
        shares = sorted(((o.scores >= threshold).mean(), o.method) for o in found if not o.broken)
        lines.append([f"{threshold:g}", " < ".join(f"{method} {share:.3f}" for share, method in shares)])
    return lines


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(len(str(line[i])) for line in (head, *body)) for i in range(len(head))]
    return "\n".join(
        "  ".join(str(cell).ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *body)
    )


def main(words: Sequence[str]) -> int:
    if not words:
        body = [against.line() for against in drawn_truth()]
        print(table(["judge", "question", "sensitivity", "specificity", "kappa"], body))
        return 0
    runs: list[Run] = []
    failed = config.main(lambda run: runs.append(run) or [], ["-m", *words])
    if failed or not runs:  # a dry run has none
        return failed
    try:
        found = [o for o in map(opinions, runs) if o is not None]
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not found:
        print("error: no evaluator of this task says of an image whether it shows the concept", file=sys.stderr)
        return 1
    for o in found:
        if o.second is not None:
            print(
                f"{o.method}: first opinion {rate(o.first)}, second {rate(o.second)}, kappa {kappa(o.first, o.second):.3f}"
            )
    print(table(["threshold", "shows the concept, from least to most"], places(found)))
    print("".join(f"broken, not ranked: {o.method}: {o.broken}\n" for o in found if o.broken), end="")
    return 0
