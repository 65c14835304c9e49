"""A plan's arithmetic by hand, its bounds, what is shared, and that fits evaluate what their methods say."""

import itertools
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from conftest import Redness
from erasebench.evaluators.attacks.cce import CCE
from erasebench.evaluators.attacks.key_guess import KeyGuess
from erasebench.evaluators.attacks.rab import RAB
from erasebench.evaluators.attacks.udatk import UDAtk
from erasebench.methods.ca import CA
from erasebench.methods.esd import ESD
from erasebench.methods.fmn import FMN
from erasebench.methods.kpop import KPOP
from erasebench.methods.none import NoErasure
from erasebench.methods.sld import SLD
from erasebench.methods.spm import SPM
from erasebench.methods.uce import UCE
from hydra.utils import get_class

from erasebench import cli
from erasebench.analysis import schedule as plan
from erasebench.analysis.schedule import Job, schedule
from erasebench.contracts import Brief, Concept, HasAttackCost, HasFitCost
from erasebench.report import row_table
from erasebench.run.run import execute

ROOT = Path(__file__).resolve().parents[2]
COSTS = plan.given(["rate=10", "judges.default=0.5", "load=0", "run=3"])[0]
SEEDS = ["none", "uce", "mace", "esd", "ca", "fmn", "sld", "spm", "dark_miner", "gie", "ap", "age", "kpop"]


# -- the scheduler ----------------------------------------------------------------------------------------------------


def test_a_small_graph_by_hand():
    """Two workers: the fit and an original, the other original beside it, then both erased shards, side by side."""
    jobs = [Job("o1", 2), Job("o2", 2), Job("fit", 4), Job("e1", 3, ("fit",)), Job("e2", 3, ("fit", "elsewhere"))]
    made = schedule(jobs, 2)
    assert (made.makespan, made.busy, made.chain) == (7, 14, 7)
    assert schedule(jobs, 1).makespan == 14
    assert schedule(jobs, 9).makespan == 7  # no more than what waits for each other


def test_a_worker_stays_with_the_model_that_it_holds():
    of = lambda model: [Job(f"{model}{i}", 5, model=model) for i in range(3)]
    mixed = [job for pair in zip(of("a"), of("b"), strict=True) for job in pair]
    made = schedule(mixed, 1, load=7)
    assert (made.makespan, made.loading, made.busy) == (30 + 14, 14, 30)
    assert schedule(mixed, 2, load=7).makespan == 15 + 7
    assert schedule([replace(mixed[0], model="")], 1, load=7).makespan == 5  # asks for none


def test_independent_jobs_are_within_grahams_bound_of_the_best():
    draws = random.Random(0)
    for _ in range(20):
        lengths, gpus = [draws.randint(1, 20) for _ in range(7)], draws.choice([2, 3])
        places = itertools.product(range(gpus), repeat=len(lengths))
        best = min(
            max(sum(x for x, p in zip(lengths, at, strict=True) if p == g) for g in range(gpus)) for at in places
        )
        made = schedule([Job(str(i), x) for i, x in enumerate(lengths)], gpus).makespan
        assert best <= made <= best * (4 / 3 - 1 / (3 * gpus)) + 1e-9


def test_jobs_that_wait_are_within_grahams_bounds():
    draws = random.Random(1)
    for _ in range(30):
        jobs = []
        for i in range(30):
            after = tuple(str(j) for j in draws.sample(range(i), min(i, draws.randint(0, 2))))
            jobs.append(Job(str(i), draws.randint(1, 9), after))
        gpus = draws.choice([1, 2, 5])
        made = schedule(jobs, gpus)
        assert (
            max(made.busy / gpus, made.chain) <= made.makespan <= made.busy / gpus + (1 - 1 / gpus) * made.chain + 1e-9
        )


# -- what a run asks for ----------------------------------------------------------------------------------------------


@pytest.fixture
def runs(make_run):
    eraser = ESD(sampler="frozen", steps=10, batch=2, ddim_steps=5, trajectories=4, lr=1e-2)
    return [make_run("none", NoErasure(), {"redness": Redness()}), make_run("esd", eraser, {"redness": Redness()})]


def test_originals_are_one_job_for_all_and_erased_ones_wait_for_their_fit(runs):
    jobs = plan.planned(runs, COSTS).jobs
    of = lambda kind, method: [job for job in jobs.values() if job.kind == kind and job.method == method]
    images = 5 + 4 + 3 + 3
    each = 3 * 2 / 10  # steps, both halves of guidance, rate
    for method in (plan.SHARED, "esd"):
        assert len(of("images", method)) == 4
        assert sum(job.seconds for job in of("images", method)) == pytest.approx(images * each)
        assert [job.seconds for job in of("scores", method)] == [5 * 0.5]  # of the target split alone
    (fit,) = of("fits", "esd")
    assert fit.seconds == pytest.approx((4 * 5 * 2 + 10 * 2 * 3) / 10)  # gradients count three times
    assert {job.after for job in of("images", "esd")} == {(fit.name,)}
    assert {job.after for job in of("images", plan.SHARED)} == {()}
    done = schedule(list(jobs.values()), 1)
    assert done.makespan == pytest.approx(done.busy) == 2 * images * each + 2 * 2.5 + fit.seconds + 2 * 3


def test_what_the_store_holds_is_no_job(runs):
    execute(runs[0])
    made = plan.planned(runs, COSTS)
    assert not [job for job in made.jobs.values() if job.method == plan.SHARED]
    assert made.there["images"] == 2 * 15 and sum(made.images.values()) == 15
    said = "\n".join(plan.report(runs, [], COSTS))
    assert "15 images to make" in said and "as those that it holds" in said
    execute(runs[1])
    assert {job.kind for job in plan.planned(runs, COSTS).jobs.values()} == {"rows"}


def test_attacks_are_counted_by_prompt_and_by_inversion_and_what_all_models_share_once(make_run):
    attacks = {"udatk": UDAtk(timesteps=2, iterations=3), "cce": CCE(steps=4, batch=2, checkpoints=2, inversions=2)}
    attacks |= {"rab": RAB()}
    own = lambda name, eraser: make_run(name, eraser, attacks=attacks, attacked=3, together=2)
    made = plan.planned([own("none", NoErasure()), own("uce", UCE())], COSTS)
    of = lambda kind, who: [
        job.seconds for job in made.jobs.values() if (job.kind, job.method) == (f"attack {kind}", who)
    ]
    image = 0.6  # no evaluator says of redness whether the concept is shown: it is not looked at
    udatk = 2 * 3 * 3 / 10 + 3 * image
    for who in ("none", "uce"):
        assert of("udatk", who) == pytest.approx([2 * udatk, udatk])  # two prompts together, and the third
        assert of("cce", who) == pytest.approx([4 * 2 * 3 / 10 + 2 * 4 * image] * 2 + [2 * 2 * image, 2 * image])
        assert of("rab", who) == pytest.approx([2 * image, image])
    assert of("rab", plan.SHARED) == [60.0] * 3


@dataclass(frozen=True)
class Own:
    version: ClassVar[int] = 1


def test_a_method_and_an_attack_without_a_cost_are_named(make_run):
    made = plan.planned([make_run("own", Own(), attacks={"guess": KeyGuess()})], COSTS)
    assert made.unknown == {"a fit of test_schedule", "attack guess"}


# -- what methods and attacks say that they take ---------------------------------------------------------------------------


def counted(eraser, concepts, surrogates=1, loops=0):
    cost = eraser.fit_cost(concepts, surrogates, loops)
    return cost.forward + cost.gradient


def test_every_method_and_attack_of_the_seed_papers_says_what_it_takes():
    params = yaml.safe_load((ROOT / "conf/experiment/everything.yaml").read_text())
    swept = params["hydra"]["sweeper"]["params"]
    objects = list(yaml.safe_load((ROOT / "conf/world/photo.yaml").read_text())["objects"])
    assert swept["method"].split(",") == SEEDS and swept["part"].split(",") == [*objects, "celebrity", "explicit"]
    assert all(isinstance(made("method", name), HasFitCost) for name in SEEDS if name != "none")
    assert all(isinstance(made("attack", name), HasAttackCost) for name in params["defaults"][-1]["override /attack"])


def made(group, name, **values):
    """A plugin with its defaults but for some values."""
    spec = yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())
    return get_class((spec if group == "method" else spec[name])["_target_"])(**values)


def test_the_reference_s_fits_evaluated_what_their_methods_say():
    seen = set()
    rows = row_table.read_all(ROOT / "results/reference")
    for row in (row for row in rows if row.metric == "fit_unet_calls" and not row.attack):
        name = "mace" if row.method.startswith("mace") else row.method
        if name in SEEDS[1:] and row.value is not None:
            values = {key: value for key, value in json.loads(row.params).items() if key != "clip"}
            said = counted(made("method", name, **values), row.n_concepts)
            within = (1, 1)
            if name == "gie":  # it stops where a weight is enough
                within = (0.6, 1.8)
            elif name in {"ap", "age"} and row.n_concepts > 1:  # concepts may be next to the same words, which count once
                within = (1, 1.5)
            assert within[0] * row.value <= said <= within[1] * row.value, row.run_id
            seen.add(name)
    assert {"esd", "mace", "ap", "age", "kpop", "dark_miner", "gie", "uce"} <= seen


def test_a_fit_that_goes_on_until_it_succeeds_takes_the_loops_that_are_assumed():
    miner = made("method", "dark_miner", steps=2, batch=3, k=2, mine_steps=5, pool=7, ddim_steps=4, images=1)
    one, two = (miner.fit_cost(1, 1, loops) for loops in (1, 2))
    # a loop: pictures that are mined, twice, and one for its embedding; 6 samples with two of the base and three kept terms
    assert two.forward - one.forward == 8 * (2 * 2 + 1) + 6 * 3
    assert two.gradient - one.gradient == 5 * 2 + 6 * 4
    assert replace(miner, max_loops=2).fit_cost(1, 1, 99) == two


@pytest.mark.parametrize(
    "eraser",
    [
        CA(steps=3, batch=2, images=3, image_sampler="ddim", image_steps=2),
        CA(steps=3, batch=2, images=3, image_sampler="ddim", image_steps=2, prior_scale=1.0),
        FMN(steps=3, batch=2, images=3, ddim_steps=2),
        FMN(steps=3, batch=2, images=3, ddim_steps=2, inversion_steps=2, inversion_batch=3, inversion_tokens=1),
        SPM(steps=3, batch=2, anchors=3, ddim_steps=2, trajectories=2),
        SLD(),
        ESD(steps=60, sampler="moving", ddim_steps=4),
        KPOP(steps=40, key_steps=40, ddim_steps=4, length=2),
        SPM(steps=60, anchors=1, ddim_steps=4),
    ],
)
def test_tiny_fits_evaluate_what_their_methods_say(tiny, tmp_path, eraser):
    concepts = (Concept("cat", "object", "sky"), Concept("tom", "object", "sea"))
    before = tiny.unet_samples
    eraser.fit(tiny, Brief(concepts, ("dog",), ("a dog",), ("a {c}", "one {c}")), tmp_path, 0)
    said = counted(eraser, concepts=2, surrogates=2)
    drawn = getattr(eraser, "trajectories", 0) is None or getattr(eraser, "sampler", "") == "moving"
    # a walk to a random step is as long as such walks are on average
    assert tiny.unet_samples - before == pytest.approx(said, rel=0.1 if drawn else 0)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words,reason",
    [
        (["gpus=0", "rate=1"], "gpus=0: a number, above 0"),
        (["gpus=1.5", "rate=1"], "whole number"),
        (["rate=-1"], "rate=-1: a number"),
        (["rate=nan"], "rate=nan: a number"),
        (["gpus=2"], "rate= is needed"),
        (["rate=1", "judges=2"], "no such number"),
        (["rate=1", "load.more=2"], "no such number"),
        (["rate=1", "experiment=everythin"], "did you mean 'everything'?"),
    ],
)
def test_bad_input_is_one_line(words, reason, capsys):
    assert cli.main(["schedule", *words]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_run_that_cannot_be_composed_leaves_no_plan(capsys):
    assert cli.main(["schedule", "rate=1", "target=nothing"]) == 1
    assert not capsys.readouterr().out


def test_everything_is_of_the_papers_scale_without_their_prompts(capsys):
    """5,000 pictures of people, 4,703 prompts with ten each, 30,000 captions, 2,600 of an object."""
    words = ["experiment=everything", "method=none", "part=truck,celebrity,explicit"]
    runs, absent, code = plan.composed(words, COSTS["published"])
    assert code == 0 and [len(run.plan.prompts) for run in runs] == [2600, 5000, 47030 + 30000]
    assert [(task, model) for task, model, _ in absent] == [("explicit", "sd14")]
    assert all(run.source.name == "sd14" and len(run.attacks) == 6 for run in runs)
    assert cli.main(["schedule", "rate=1000", "gpus=8", *words[:2], "part=explicit"]) == 0
    out = capsys.readouterr().out
    assert "explicit on sd14: 1 runs counted with as many prompts as were published" in out
    assert "attack udatk" in out and "no cost" not in out
