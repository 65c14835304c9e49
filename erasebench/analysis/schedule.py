"""Schedule of a sweep on paper: its duration on GPUs, and its costs.

    python -m erasebench schedule experiment=everything gpus=8 rate=1000
    python -m erasebench schedule -m method=none,uce,esd task=object target=airplane gpus=2 rate=900

Takes any command line of `python -m erasebench`; nothing runs. Fits, shards of images, their scores and attacks are
jobs that wait for each other. Work that several runs share is one job, and work that the store already holds is none.
A free worker takes a ready job for the model that it holds, or else any ready job, and among these the one with the
longest way to the end (list scheduling, critical path first).

`rate` is measured (`make bench`): evaluations of single latents by the U-Net that one GPU does in a second. Fits and
attacks declare their own costs (`fit_cost`, `attack_cost`). All other assumptions of a plan are in conf/plan.yaml,
and any number in it can be given too: backward=1 judges.clip=0.01.
"""

from __future__ import annotations

import heapq
import math
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import config
from ..contracts import (
    Attack,
    AttackCost,
    DecidesSuccess,
    ErasebenchError,
    FitCost,
    HasAttackCost,
    HasFitCost,
    Prompt,
    SearchCost,
)
from ..report.runs import plain

if TYPE_CHECKING:
    from ..run.specification import Run

COSTS = Path(str(resources.files("erasebench.conf"))) / "plan.yaml"
SHARED = "shared by all"
Costs = Mapping[str, Any]
Absent = tuple[str, str, str]  # task, model, why its prompts are not here


@dataclass(frozen=True)
class Job:
    """Work that takes one worker `seconds`.

    It starts once all of `after` are done, with `model`, if any, in the worker's memory.
    """

    name: str
    seconds: float
    after: tuple[str, ...] = ()
    model: str = ""
    kind: str = ""
    method: str = ""
    run: int = 0  # number of the first run that needs it


@dataclass(frozen=True)
class Schedule:
    """Durations of a schedule, in seconds.

    makespan: until the last job is done; busy: of all workers at jobs; loading: of all workers loading models;
    chain: of the longest chain of jobs.
    """

    makespan: float
    busy: float
    loading: float
    chain: float


def schedule(jobs: Sequence[Job], gpus: int, load: float = 0.0) -> Schedule:
    """Schedule jobs on workers by list scheduling, critical path first.

    Each job is listed after all jobs that it waits for; a job that is not listed counts as done. `load` is the
    number of seconds until a worker holds another model.
    """
    number = {job.name: i for i, job in enumerate(jobs)}
    waits = [[number[name] for name in job.after if name in number] for job in jobs]
    to_end, then = [job.seconds for job in jobs], [[] for _ in jobs]
    for i in reversed(range(len(jobs))):
        for before in waits[i]:
            assert before < i
            then[before].append(i)
            to_end[before] = max(to_end[before], jobs[before].seconds + to_end[i])
    models = [job.model if load else "" for job in jobs]
    ready: dict[str, list[tuple[float, int]]] = defaultdict(list)  # model -> heap of jobs, the longest to the end first
    running: list[tuple[float, int, int]] = []  # heap of end, worker, job
    left, holds, free, now, loading = [len(w) for w in waits], [""] * gpus, list(range(gpus)), 0.0, 0.0
    offered = [i for i in range(len(jobs)) if not left[i]]
    while offered or ready or running:
        for i in offered:
            heapq.heappush(ready[models[i]], (-to_end[i], i))
        while ready and free:
            worker = next((w for w in free if holds[w] in ready), free[0])
            model = holds[worker] if holds[worker] in ready else min(ready, key=lambda m: ready[m][0])
            _, i = heapq.heappop(ready[model])
            if not ready[model]:
                del ready[model]
            wait = load if model and holds[worker] != model else 0.0
            holds[worker], loading = model or holds[worker], loading + wait
            free.remove(worker)
            heapq.heappush(running, (now + wait + jobs[i].seconds, worker, i))
        now, worker, done = heapq.heappop(running)
        free.append(worker)
        for i in then[done]:
            left[i] -= 1
        offered = [i for i in then[done] if not left[i]]
    return Schedule(now, sum(job.seconds for job in jobs), loading, max(to_end, default=0.0))


def seconds(cost: FitCost, costs: Costs) -> float:
    """Return the duration of a fit or a search.

    Adds up evaluations without and with a gradient, and the rest.
    """
    return (cost.forward + (1 + costs["backward"]) * cost.gradient) / costs["rate"] + cost.seconds


def of(table: Mapping[Any, Any], name: Any) -> Any:
    return table.get(name, table["default"])


@dataclass
class Planned:
    """Jobs of a plan by name, each listed after its prerequisites.

    images: side in pixels -> number of images that the jobs leave in the store; there: number and bytes of such
    images that the store holds already; unknown: methods and attacks without a known cost.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    images: Counter = field(default_factory=Counter)
    there: Counter = field(default_factory=Counter)
    unknown: set[str] = field(default_factory=set)


def planned(runs: Sequence[Run], costs: Costs) -> Planned:
    made = Planned()
    for number, run in enumerate(runs):
        RunJobs(made, number, run, costs).add_all()
    return made


def fit_cost(run: Run, costs: Costs) -> FitCost:
    """Return the cost of the run's fit, zero if unknown."""
    if not isinstance(run.eraser, HasFitCost):
        return FitCost()
    concepts = run.plan.concepts
    cost = run.eraser.fit_cost(len(concepts), len({concept.surrogate for concept in concepts}), costs["loops"])
    return replace(cost, seconds=costs["rest"] * cost.seconds)


def attack_cost(run: Run, attack: Attack, prompts: Sequence[Prompt]) -> AttackCost:
    """Return the cost of an attack on these prompts, zero if unknown. Explicit content is one concept."""
    if not isinstance(attack, HasAttackCost):
        return AttackCost(SearchCost())
    return attack.attack_cost(len(prompts), 1 if run.plan.explicit else len({prompt.concept for prompt in prompts}))


class RunJobs:
    """Jobs of one run that no earlier run asked for: fit, images, scores, attacks, rows."""

    def __init__(self, made: Planned, number: int, run: Run, costs: Costs):
        from .forecast import identities

        self.made, self.number, self.run, self.costs = made, number, run, costs
        self.base, self.ours, self.unknown = identities(run)
        self.side = run.sampler.size or of(costs["pixels"], run.source.name)
        self.method = type(run.eraser).__module__.rpartition(".")[2]  # several configs may be of one
        self.plain_image = run.sampler.steps * (2 if run.sampler.guidance > 1 else 1) / costs["rate"]
        self.image = self.plain_image * (1 if run.is_base else of(costs["sampling"], self.method))
        present = {prompt.split for prompt in run.plan.prompts}
        self.judging = [e for e in run.plan.evaluators.values() if e is not None and e.judge and present >= set(e.splits)]
        self.names: list[str] = []

    def add(self, name: str, long: float, after: Iterable[str], kind: str, model: str = "", who: str | None = None) -> str:
        """Add a job of `long` seconds that waits for others; returns its name."""
        who = self.run.method if who is None else who
        self.made.jobs.setdefault(name, Job(name, long, tuple(after), model, kind, who, self.number))
        self.names.append(name)
        return name

    def add_all(self) -> None:
        fit = "" if self.run.is_base else self.add_fit()
        targets = self.add_images(fit)
        prompts = [p for p in self.run.plan.prompts if p.split == "target"][: self.run.attacked]
        if prompts:
            self.add_attacks(prompts, [fit, *targets])
        self.add(f"rows {self.number}", self.costs["run"], dict.fromkeys(self.names), "rows")

    def add_fit(self) -> str:
        """Add the fit unless the store holds its artifact; returns its name."""
        from ..store.local import Store, digest

        name = f"fit {self.ours['artifact']}"
        if not isinstance(self.run.eraser, HasFitCost):
            self.made.unknown.add(f"a fit of {self.method}")
        if self.unknown or not Store().has("artifacts", self.run.fit_identity()):
            self.add(name, seconds(fit_cost(self.run, self.costs), self.costs), (), "fits", digest(self.base))
        return name

    def add_images(self, fit: str) -> list[str]:
        """Add shards of both models and their scores; returns names of target shards."""
        from ..run.images import shards
        from ..run.specification import shard_identity
        from ..store.local import Store, digest

        store, targets = Store(), []
        models = [(self.base, SHARED, self.plain_image)]
        models += [] if self.run.is_base else [(self.ours, self.run.method, self.image)]
        for identity, who, each in models:
            for part in shards(self.run.plan.prompts):
                content = shard_identity(identity, self.run.sampler, part)
                name = f"images {digest(content)}"
                targets += [name] if part[0].split == "target" else []
                if not self.unknown and name not in self.made.jobs and store.has("images", content):
                    if (file := store.path("images", content) / "images.npz").is_file():
                        self.made.there.update(images=len(part), bytes=file.stat().st_size)
                    continue
                self.made.images[self.side] += len(part) * (name not in self.made.jobs)
                self.add(name, len(part) * each, [fit] if who != SHARED else [], "images", digest(identity), who)
                for e in (e for e in self.judging if part[0].split in e.splits):
                    judged = f"score {digest([e.judge, type(e.judge).version])} {name}"
                    self.add(judged, len(part) * of(self.costs["judges"], e.judge.name), [name], "scores", who=who)
        return targets

    def add_attacks(self, prompts: Sequence[Prompt], ready: Sequence[str]) -> None:
        """Add searches and attacked images; an attack on the erased model begins once `ready` is done."""
        from ..run.run import watcher
        from ..run.specification import requests
        from ..store.local import digest

        watch = watcher(self.run) or next((e for e in self.judging if isinstance(e, DecidesSuccess)), None)
        attempt = self.image + (of(self.costs["judges"], watch.judge.name) if watch else 0)

        def long(cost: SearchCost) -> float:
            search = seconds(cost, self.costs) + (cost.images - cost.kept) * attempt
            return self.costs["searched"] * search + cost.kept * attempt

        for name, attack in self.run.attacks.items():
            if not isinstance(attack, HasAttackCost):
                self.made.unknown.add(f"attack {name}")
            cost, kind = attack_cost(self.run, attack, prompts), f"attack {name}"
            model, begin = ("", []) if attack.shared else (digest(self.ours), ready)
            what = digest([attack, model, [requests([p]) for p in prompts]])
            who = SHARED if attack.shared else self.run.method
            searches = [
                self.add(f"search {what} {i}", long(cost.once), begin, kind, model, who) for i in range(cost.count)
            ]
            for i in range(0, len(prompts), self.run.together):
                count = len(prompts[i : i + self.run.together])
                one = f"attack {what} {digest(self.ours)} {i}"
                self.add(one, count * long(cost.each), [*ready, *searches], kind, digest(self.ours))
            self.made.images[self.side] += round(len(prompts) * cost.each.kept)


def report(runs: Sequence[Run], absent: Sequence[Absent], costs: Costs) -> list[str]:
    """Return a plan's makespan, GPU hours, store size and dominant costs.

    The last lines name the numbers that are not measured.
    """
    made, gpus, start, load = planned(runs, costs), costs["gpus"], costs["start"], costs["load"]
    jobs, of_run, there = list(made.jobs.values()), defaultdict(list), made.there
    for job in jobs:
        of_run[job.run].append(job)
    whole = schedule(jobs, gpus, load)
    span, work = start + whole.makespan, whole.busy + whole.loading
    least = start + max(whole.busy / gpus, whole.chain)
    in_turn = start + sum(schedule(own, gpus, load).makespan for own in of_run.values())
    hours = lambda s: f"{s / 3600:,.1f}" if s >= 3600 else f"{s / 3600:.3f}"
    each = {side: there["bytes"] / there["images"] if there else of(costs["bytes"], side) for side in made.images}
    size = sum(n * each[side] for side, n in made.images.items()) / 1e9
    lines = [
        f"{len(runs)} runs, {len(jobs):,} jobs, {sum(made.images.values()):,} images to make",
        f"{gpus} GPUs, {costs['rate']:g} U-Net evaluations a second each",
        f"makespan {hours(span)} h, critical path first; no order takes less than {hours(least)} h",
        f"makespan {hours(in_turn)} h, one run after the other, as one command makes them",
        f"GPU hours {hours(work)} at work of {hours(gpus * span)}: busy {100 * work / (gpus * span or 1):.1f} %",
        f"store {size:,.1f} GB, {', '.join(f'{b:,.0f}' for b in each.values())} bytes an image, "
        + ("as those that it holds" if there else "assumed"),
    ]
    for title, group in (("kind", lambda job: job.kind), ("method", lambda job: job.method)):
        spent = Counter({"loading models": whole.loading})
        for job in jobs:
            spent[group(job)] += job.seconds
        lines += ["", f"{'by ' + title:24}{'GPU hours':>12}{'share':>10}"]
        lines += [f"{name:24}{hours(s):>12}{100 * s / (work or 1):>8.1f} %" for name, s in spent.most_common()]
    guesses = [f"{name}={costs[name]:g}" for name in ("backward", "start", "load", "run", "rest", "searched")]
    guesses += [f"{head}.{name}={n:g}" for head in ("judges", "sampling") for name, n in costs[head].items()]
    lines += [
        "",
        f"measured by who gives it: rate; guessed: seconds of fits and attacks, and (conf/plan.yaml) {', '.join(guesses)}",
    ]
    lines.append(f"counted in their code: U-Net evaluations of fits and attacks; published: loops={costs['loops']:g}")
    lines += [
        f"{task} on {model}: {n} runs counted with as many prompts as were published, since {why}"
        for (task, model, why), n in Counter(absent).items()
    ]
    lines += [f"no cost is known of {name}: it counts as none" for name in sorted(made.unknown)]
    return [
        *lines,
        "images of the store pass for judged, its attacks are counted again; of its files images alone count",
    ]


def given(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the costs with a command line's numbers, and its other words.

    Raises ErasebenchError if the numbers make no plan.
    """
    costs, others = yaml.safe_load(COSTS.read_text(encoding="utf-8")), []
    for word in words:
        name, _, text = word.partition("=")
        head, _, entry = name.partition(".")
        if head not in costs:
            others.append(word)
            continue
        if isinstance(costs[head], dict) != bool(entry):
            raise ErasebenchError(f"{word}: conf/plan.yaml has no such number")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (0 <= number < math.inf) or (head in ("rate", "gpus") and not number):
            raise ErasebenchError(
                f"{word}: a number, {'above' if head in ('rate', 'gpus') else 'at least'} 0, is needed"
            )
        table = costs[head] if entry else costs
        try:
            table[yaml.safe_load(entry) if entry else head] = number
        except (yaml.YAMLError, TypeError) as error:  # TypeError: a list, which is no name
            raise ErasebenchError(f"{word}: {entry!r} names no number of conf/plan.yaml") from error
    if costs["rate"] is None:
        raise ErasebenchError("rate= is needed: evaluations by the U-Net that one GPU does in a second (make bench)")
    if costs["gpus"] != int(costs["gpus"]):
        raise ErasebenchError(f"gpus={costs['gpus']:g}: a whole number is needed")
    return costs | {"gpus": int(costs["gpus"])}, others


def composed(words: Sequence[str], published: Mapping[str, float]) -> tuple[list[Run], list[Absent], int]:
    """Return a command line's runs, runs without prompts, and exit code.

    For a prompt file that is missing, a file with the `published` number of lines stands in.
    """
    runs: list[Run] = []
    absent: list[Absent] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {key: Path(folder) / f"{key}.{'csv' if 'prompts' in key else 'txt'}" for key in published}
        for key, file in files.items():
            rows = (f"{i},{i}" for i in range(int(published[key])))
            file.write_text("\n".join(["prompt,seed", *rows] if file.suffix == ".csv" else rows), encoding="utf-8")
        collect = lambda every, uncounted, rate: (runs.extend(every), absent.extend(uncounted))
        stand_ins = {key: str(file) for key, file in files.items()}
        code = config.main(lambda run: [], [*words, "dry_run=true"], collect, stand_ins)
    return runs, absent, code


def main(words: Sequence[str]) -> int:
    try:
        costs, others = given(words)
        runs, absent, code = composed(others, costs["published"])
        if not code and not runs:
            raise ErasebenchError("there is nothing to plan")
        if not code:
            print(*map(plain, report(runs, absent, costs)), sep="\n")
        return code
    except ErasebenchError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
