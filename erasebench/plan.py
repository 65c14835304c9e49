"""A plan on paper: how long a sweep takes on so many GPUs, and on what.

    python -m erasebench.plan experiment=everything gpus=8 rate=1000
    python -m erasebench.plan -m method=none,uce,esd task=object target=airplane gpus=2 rate=900

Any command line of `python -m erasebench`; nothing runs. Fits, shards of images, their scores and attacks are jobs with what they wait
for; what several runs share is one job, and what the store holds is none. They are scheduled as lists are: whenever a worker is free it
takes, of the jobs that are ready, the one with the longest way to the end (critical path first). `rate` is measured (`make bench`):
evaluations of single latents by the U-Net that one GPU does in a second. The rest stands in conf/plan.yaml, and any of it can be given too.
"""

from __future__ import annotations

import heapq
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import config
from .contracts import ErasebenchError
from .entry import plain

if TYPE_CHECKING:
    from .run import Run

COSTS = Path(str(resources.files("erasebench.conf"))) / "plan.yaml"
SHARED = "originals, shared"
Costs = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """So many seconds of one worker, once all of `after` are done; `model` must be in its memory, if any."""

    name: str
    seconds: float
    after: tuple[str, ...] = ()
    model: str = ""
    kind: str = ""
    method: str = ""
    run: int = 0  # the first that needs it


@dataclass(frozen=True)
class Schedule:
    """Seconds until the last job is done, seconds of all workers spent on jobs and on loading models, and the longest chain."""

    makespan: float
    busy: float
    loading: float
    chain: float


def schedule(jobs: Sequence[Job], gpus: int, load: float = 0.0) -> Schedule:
    """List scheduling of jobs that stand after all that they wait for; what is not among them is done."""
    number = {job.name: i for i, job in enumerate(jobs)}
    waits = [[number[name] for name in job.after if name in number] for job in jobs]
    to_end, then = [job.seconds for job in jobs], [[] for _ in jobs]
    for i in reversed(range(len(jobs))):
        for before in waits[i]:
            assert before < i
            then[before].append(i)
            to_end[before] = max(to_end[before], jobs[before].seconds + to_end[i])
    left = [len(w) for w in waits]
    ready = [(-to_end[i], i) for i in range(len(jobs)) if not left[i]]
    heapq.heapify(ready)
    running: list[tuple[float, int, int]] = []  # end, worker, job
    holds, free, now, loading = [""] * gpus, list(range(gpus)), 0.0, 0.0
    while ready or running:
        while ready and free:
            _, i = heapq.heappop(ready)
            model = jobs[i].model
            worker = next((w for w in free if holds[w] == model), free[0])
            free.remove(worker)
            wait = load if model and holds[worker] != model else 0.0
            holds[worker], loading = model or holds[worker], loading + wait
            heapq.heappush(running, (now + wait + jobs[i].seconds, worker, i))
        now, worker, done = heapq.heappop(running)
        free.append(worker)
        for i in then[done]:
            left[i] -= 1
            if not left[i]:
                heapq.heappush(ready, (-to_end[i], i))
    return Schedule(now, sum(job.seconds for job in jobs), loading, max(to_end, default=0.0))


def value(sums: Mapping[str, Any], key: str, known: Mapping[str, Any]) -> float:
    """What a sum of conf/plan.yaml gives; 0 where there is none. Raises ErasebenchError where it cannot be done."""
    try:
        known = {**known, "max": max, "min": min, "len": len, "set": set}
        for name, text in sums.get("let", {}).items():
            known[name] = eval(
                str(text), {"__builtins__": {}}, known
            )  # as much ours as the code: a config names what is run
        return float(eval(str(sums.get(key, 0)), {"__builtins__": {}}, known))
    except Exception as error:  # whatever somebody writes into a sum
        raise ErasebenchError(f"conf/plan.yaml: {key}: {sums.get(key)}: {type(error).__name__}: {error}") from error


def seconds(sums: Mapping[str, Any], known: Mapping[str, Any], costs: Costs) -> float:
    """Of evaluations without and with a gradient, and of the rest."""
    evaluations = value(sums, "forward", known) + (1 + costs["backward"]) * value(sums, "gradient", known)
    return evaluations / costs["rate"] + value(sums, "seconds", known)


def of(table: Mapping[Any, Any], name: Any) -> Any:
    return table.get(name, table["default"])


@dataclass
class Planned:
    """Jobs by name, each after all that it waits for; images that they make, by side in pixels; bytes and number of images that the
    store already holds of these; methods and attacks of which no cost is known."""

    jobs: dict[str, Job]
    images: Counter
    there: Counter
    uncosted: set[str]


def planned(runs: Sequence[Run], costs: Costs) -> Planned:
    made = Planned({}, Counter(), Counter(), set())
    for number, run in enumerate(runs):
        add(made, number, run, costs)
    return made


def add(made: Planned, number: int, run: Run, costs: Costs) -> None:
    from . import generate
    from .dry import identities
    from .run import watcher
    from .store import Store, digest

    jobs, store, method = made.jobs, Store(), run.method
    base, ours, unknown = identities(run)
    side = run.sampler.size or of(costs["pixels"], run.source.name)
    one = run.sampler.steps * (2 if run.sampler.guidance != 1 else 1) / costs["rate"]  # seconds an image
    own = one * (1 if run.is_base else of(costs["sampling"], method))
    judge = lambda evaluator: of(costs["judges"], evaluator.judge.name)
    splits = {p.split for p in run.plan.prompts}
    asked = [
        e for e in run.plan.evaluators.values() if e is not None and e.judge is not None and splits >= set(e.splits)
    ]
    concepts = run.plan.concepts
    waiting: list[str] = []

    def job(name: str, length: float, after: Iterable[str], kind: str, model: str = "", of: str = method) -> str:
        """Done once, whoever needs it, and noted among what the run waits for."""
        jobs.setdefault(name, Job(name, length, tuple(after), model, kind, of, number))
        waiting.append(name)
        return name

    fit, models = "", [(base, SHARED, one)]
    if not run.is_base:
        models.append((ours, method, own))
        fit = f"fit {ours['artifact']}"
        if method not in costs["fits"]:
            made.uncosted.add(method)
        if unknown or store.get("artifacts", run.fit_identity()) is None:
            known = {**asdict(run.eraser), "concepts": len(concepts), "loops": costs["loops"]}
            known["surrogates"] = len({concept.surrogate for concept in concepts})
            job(fit, seconds(costs["fits"].get(method, {}), known, costs), (), "fits", digest(base))
    shown: list[str] = []  # what an attack must have seen: images of the concept, judged
    for identity, who, each in models:
        for part in generate.shards(run.plan.prompts):
            key = generate.key(identity, run.sampler, part)
            name = f"images {digest(key)}"
            there = None if unknown or name in jobs else store.get("images", key)
            if there is not None:
                made.there.update(images=len(part), bytes=(there / "images.npz").stat().st_size)
            else:
                made.images[side] += len(part) * (name not in jobs)
                after = (fit,) if who != SHARED else ()
                name = job(name, len(part) * each, after, "images", digest(identity), who)
                judges = {
                    digest([e.judge, type(e.judge).version]): judge(e) for e in asked if part[0].split in e.splits
                }
                for which, length in judges.items():
                    job(f"score {which} {name}", len(part) * length, (name,), "scores", of=who)
            if part[0].split == "target":
                shown.append(name)
    prompts = [p for p in run.plan.prompts if p.split == "target"][: run.attacked]
    explicit = any(concept.kind == "explicit" for concept in concepts)
    looks = judge(watch) if (watch := watcher(run) or next((e for e in asked if hasattr(e, "shows")), None)) else 0
    for name, attack in run.attacks.items() if prompts else ():
        if name not in costs["attacks"]:
            made.uncosted.add(name)
            continue
        sums = costs["attacks"][name]
        known = {
            **asdict(attack),
            "prompts": len(prompts),
            "concepts": 1 if explicit else len({p.concept for p in prompts}),
        }
        drawn = lambda sums, known=known: value(sums, "images", known) * (own + looks)
        whole = lambda sums, known=known, drawn=drawn: costs["searched"] * seconds(sums, known, costs) + drawn(sums)
        where = "text encoder" if attack.shared else digest(ours)
        what = digest([name, attack, where, [generate.asked([p]) for p in prompts]])
        before, once = [fit, *shown], sums.get("once", {})
        for i in range(round(value(once, "count", known))):
            first = f"search {what} {i}"
            job(first, whole(once), () if attack.shared else (fit, *shown), "attacks", "" if attack.shared else where)
            before.append(first)
        for i in range(0, len(prompts), run.together):
            count = len(prompts[i : i + run.together])
            job(f"attack {what} {digest(ours)} {i}", count * whole(sums), before, "attacks", digest(ours))
        made.images[side] += round(len(prompts) * value(sums, "kept", known))
    job(f"rows {number}", costs["run"], tuple(dict.fromkeys(waiting)), "rows")


def report(runs: Sequence[Run], uncounted: Sequence[tuple[str, str, str]], costs: Costs) -> str:
    """Makespan, GPU hours, size of the store, what dominates, and what is not measured."""
    made, hours = planned(runs, costs), lambda s: f"{s / 3600:,.1f}" if s >= 360 else f"{s / 3600:.3f}"
    jobs, gpus, count = list(made.jobs.values()), costs["gpus"], sum(made.images.values())
    whole = schedule(jobs, gpus, costs["load"])
    in_turn = [schedule([j for j in jobs if j.run == i], gpus, costs["load"]).makespan for i in range(len(runs))]
    least = max(whole.busy / gpus, whole.chain)
    share = lambda part, of: 100 * part / of if of else 0
    measured = made.there["bytes"] / made.there["images"] if made.there["images"] else None
    size = sum(n * (measured or costs["bytes"].get(side, 2.4 * side**2)) for side, n in made.images.items())
    lines = [
        f"{len(runs)} runs, {len(jobs)} jobs, {count:,} images to make; {gpus} GPUs at {costs['rate']:g} evaluations a second each",
        f"makespan {hours(whole.makespan)} h, critical path first (no order takes less than {hours(least)} h)",
        f"one run after the other, as one command does them: {hours(sum(in_turn))} h",
        f"GPU hours {hours(whole.busy + whole.loading)} at work, of {hours(gpus * whole.makespan)}: "
        f"busy {share(whole.busy + whole.loading, gpus * whole.makespan):.1f} %",
        f"store {size / 1e9:,.1f} GB of images, "
        + (f"{measured:,.0f} bytes each as those there" if measured else "assumed"),
    ]
    for title, of in (("kind", lambda j: j.kind), ("method", lambda j: j.method)):
        spent = Counter()
        for job in jobs:
            spent[of(job)] += job.seconds
        spent["loading models"] += whole.loading
        lines += ["", f"{'by ' + title:24}{'GPU hours':>12}{'share':>9}"]
        lines += [f"{n:24}{hours(s):>12}{share(s, whole.busy + whole.loading):>7.1f} %" for n, s in spent.most_common()]
    lines += ["", "not measured, from conf/plan.yaml:"]
    lines.append(
        "  " + ", ".join(f"{k}={costs[k]:g}" for k in ("backward", "start", "load", "run", "loops", "searched"))
    )
    lines.append(
        "  seconds of judges an image, and of fits beside evaluations; evaluations of fits and attacks are counted in their code"
    )
    lines += [
        f"  {task} on {model}: {n} of its runs with as many prompts as published: {why}"
        for (task, model, why), n in Counter(uncounted).items()
    ]
    lines += [f"  no cost is known of {name}: counted as none" for name in sorted(made.uncosted)]
    lines.append("  not counted: files other than images; attacks that the store holds are counted again")
    return "\n".join(lines)


def given(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The costs with what of a command line is theirs, and the other words. Raises ErasebenchError for what makes no plan."""
    costs, others = yaml.safe_load(COSTS.read_text(encoding="utf-8")), []
    for word in words:
        name, _, text = word.partition("=")
        *path, last = (int(key) if key.isdigit() else key for key in name.split("."))
        table = costs
        for key in path:
            table = table.get(key, {}) if isinstance(table, dict) else {}
        if not path and last not in costs or not isinstance(table, dict) or (path and path[0] not in costs):
            others.append(word)
            continue
        if path and last not in table and "default" not in table or isinstance(table.get(last), dict):
            raise ErasebenchError(f"{word}: conf/plan.yaml has no such number")
        table[last] = text if path[:1] in (["fits"], ["attacks"]) else number(name, text)
    if costs["rate"] is None:
        raise ErasebenchError(
            "rate= is needed: U-Net evaluations of single latents that one GPU does in a second (make bench)"
        )
    if costs["gpus"] != int(costs["gpus"]) or costs["gpus"] < 1:
        raise ErasebenchError(f"gpus={costs['gpus']:g}: a whole number, at least 1, is needed")
    if costs["rate"] == 0:
        raise ErasebenchError("rate=0: more than 0 is needed")
    return {**costs, "gpus": int(costs["gpus"])}, others


def number(name: str, text: str) -> float:
    try:
        made = float(text)
    except ValueError:
        made = math.nan
    if not math.isfinite(made) or made < 0:
        raise ErasebenchError(f"{name}={text}: a number, at least 0, is needed")
    return made


def composed(words: Sequence[str], published: Mapping[str, float]) -> tuple[list[Run], list[tuple[str, str, str]], int]:
    """The runs of a command line, why some of their prompts are not here, and the exit code. Prompts that are not here are stood in for
    by as many as were published."""
    runs: list[Run] = []
    absent: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        stand_ins = {}
        for key, count in published.items():
            table = "prompts" in key
            file = Path(folder) / f"{len(stand_ins)}.{'csv' if table else 'txt'}"
            lines = [f"{i},{i}" if table else f"caption {i}" for i in range(int(count))]
            file.write_text("\n".join(["prompt,seed"] * table + lines) + "\n")
            stand_ins[key] = str(file)
        code = config.main(
            lambda run: [],
            [*words, "dry_run=true"],
            lambda every, uncounted, rate: (runs.extend(every), absent.extend(uncounted)),
            stand_ins,
        )
    return runs, absent, code


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or set(words) & {"-h", "--help"}:
            print(__doc__)
            return 0
        costs, others = given(words)
        runs, absent, code = composed(others, costs["published"])
        if not code and not runs:
            raise ErasebenchError("there is nothing to plan")
        if not code:
            print(plain(report(runs, absent, costs)))
        return code
    except ErasebenchError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
