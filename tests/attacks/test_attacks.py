"""Attacks: their distinctive steps by hand, one at a time as together, resuming, the gate, and bad input."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import WORLD, Brightness, Redness
from erasebench.evaluators.attacks.cce import CCE, named
from erasebench.evaluators.attacks.key_guess import KeyGuess
from erasebench.evaluators.attacks.mma_image import MMAImage
from erasebench.evaluators.attacks.mma_text import MMAText
from erasebench.evaluators.attacks.p4d import P4D, interleaved
from erasebench.evaluators.attacks.p4d_umu import P4DUMU
from erasebench.evaluators.attacks.probe_guidance import ProbeGuidance
from erasebench.evaluators.attacks.probe_inpaint import ProbeInpaint
from erasebench.evaluators.attacks.probe_noise import ProbeNoise
from erasebench.evaluators.attacks.rab import RAB
from erasebench.evaluators.attacks.random_prefix import RandomPrefix
from erasebench.evaluators.attacks.replay import Replay
from erasebench.evaluators.attacks.seed_search import SeedSearch
from erasebench.evaluators.attacks.udatk import UDAtk, grid
from erasebench.evaluators.second import OpenNsfw
from erasebench.methods.negative_prompt import NegativePrompt
from erasebench.methods.none import NoErasure
from erasebench.methods.uce import UCE

from erasebench.config import check_budget
from erasebench.contracts import Concept, ErasebenchError, Found, Prompt, Sampler, Scene, Shot
from erasebench.model.guidance import ClassifierFree
from erasebench.model.model import Model
from erasebench.model.source import Source
from erasebench.rows import read_all
from erasebench.run import attacks as attack_module
from erasebench.run.run import execute
from erasebench.store.local import Store
from erasebench.tasks import ExplicitTask
from erasebench.toolbox import search
from erasebench.toolbox.search import (
    FREE,
    AttackLoss,
    Bench,
    Draws,
    fits,
    nearest,
    simplex,
    slots,
    spelled,
    stored,
    table,
    tokens,
    with_vectors,
)

PROMPTS = tuple(
    Prompt(f"target/{i}", f"a {name}", 7 + i, "target", "cat") for i, name in enumerate(("cat", "big cat", "cat x"))
)
NEVER = lambda sampled, prompts: (np.zeros(len(prompts), bool), np.arange(len(prompts)) / 10)
SMALL = {
    "seed_search": SeedSearch(images=3),
    "random_prefix": RandomPrefix(tokens=2, images=3),
    "udatk": UDAtk(tokens=2, timesteps=2, iterations=2),
    "p4d": P4D(count=3, steps=3, every=2, shown=2),
    "p4d_k": P4D(form="k", steps=2, every=1, shown=1),
    "p4d_umu": P4DUMU(tokens=2, timesteps=2, iterations=1),
    "cce": CCE(steps=3, batch=2, texts=2, inversions=2, checkpoints=2, trials=1, pictures=2),
    "rab": RAB(tokens=4, population=8, generations=4, patience=None),
    "mma_text": MMAText(tokens=4, steps=3, candidates=8, top=8, images=2),
    "key_guess": KeyGuess("random", length=4, place="inmidout", guesses=2),
}


def make_scene(prompts=PROMPTS, hit=NEVER, before=None, allows=lambda text: True, attack="") -> Scene:
    pictures = torch.randint(256, (8, 16, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Scene(
        prompts=tuple(prompts),
        before=np.zeros(len(prompts), bool) if before is None else np.array(before),
        pictures=torch.stack([pictures[p.seed % 8] for p in prompts]),
        known={"cat": pictures},
        concepts={"cat": Concept("cat", "object", "sky", ("kitty",))},
        templates=("a {c}", "{c} x"),
        sampler=Sampler("ddim", 2, 4.0),
        seed=0,
        together=64,
        store=Store(),
        identity={"test": attack},
        hit=hit,
        allows=allows,
    )


@pytest.fixture
def double(tiny_folder) -> Model:
    return Model.load(Source("tiny", tiny_folder, dtype="float64"))


# -- steps by hand ----------------------------------------------------------------------------------------------------


def test_simplex_by_hand_and_as_the_nearest_point():
    rows = torch.tensor([[1.0, 1.0, 0.0], [3.0, 0.0, 0.0], [0.2, 0.3, 0.5], [-5.0, -5.0, -4.5]])
    expected = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [1 / 6, 1 / 6, 2 / 3]])
    torch.testing.assert_close(simplex(rows), expected)
    u = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = u.min(1).values - 1, u.max(1).values  # the released code bisects for the same threshold
    for _ in range(100):
        middle = (low + high) / 2
        over = (u - middle[:, None]).clamp(min=0).sum(1) > 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    torch.testing.assert_close(simplex(u), (u - low[:, None]).clamp(min=0))


def test_nearest_is_the_highest_cosine():
    g = torch.Generator().manual_seed(0)
    x, among = torch.randn(2, 3, 5, generator=g), torch.randn(11, 5, generator=g)
    slow = torch.nn.functional.cosine_similarity(x[:, :, None], among[None, None], dim=-1).argmax(-1)
    assert torch.equal(nearest(x, among), slow)


def test_free_places_hold_what_is_put_there(tiny):
    own = tokens(tiny, "a cat")
    frame = slots(tiny, [[FREE, *own[1:]], [own[0], FREE, FREE, own[3]]])
    ids = torch.tensor([own[0], own[1], own[2]])
    expected = tiny.encode(["a cat", "a cat"])
    assert torch.equal(frame.filled(ids), expected.ids)
    got = with_vectors(tiny, frame, table(tiny)[ids])
    torch.testing.assert_close(got.hidden, expected.hidden)
    assert torch.equal(got.ends, expected.ends) and spelled(tiny, frame.filled(ids)[0]) == "a cat"
    assert fits(tiny, [0] * 22) and not fits(tiny, [0] * 23)


def test_gradient_of_the_loss_by_hand(tiny):
    scene, rows = make_scene(), [[FREE, *tokens(tiny, p.text)] for p in PROMPTS]
    bench = Bench(tiny, scene, UDAtk(), rows, AttackLoss("auto"))
    ids, t = torch.tensor([5]), torch.tensor([300])
    (gradient,) = bench.gradients([1], t, [ids])
    noise = search.draws(tiny, scene, UDAtk()).normal([1], *tiny.latent_shape())
    z = tiny.encode_images(scene.pictures[1:2])
    alpha = tiny.alphas_cumprod[300]
    embeds = table(tiny)[slots(tiny, [[5, *rows[1][1:]]]).ids].detach().requires_grad_(True)
    context = tiny.encode(ids=slots(tiny, [[5, *rows[1][1:]]]).ids, token_embeds=embeds)
    loss = (tiny.eps(alpha.sqrt() * z + (1 - alpha).sqrt() * noise, 300, context) - noise).square().mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, embeds)[0][0, 1:2])


def test_guidance_that_defends_is_attacked_through(tiny):
    scene, rows = make_scene(), [[FREE, *tokens(tiny, p.text)] for p in PROMPTS]
    assert Bench(tiny, scene, UDAtk(), rows, AttackLoss("auto")).scale is None
    with tiny.changed(guidance=ClassifierFree(negative=tiny.encode(["cat"]))):
        bench = Bench(tiny, scene, UDAtk(), rows, AttackLoss("auto"))
        assert bench.scale == 4.0 and bench.wanted is not None
        assert Bench(tiny, scene, UDAtk(), rows, AttackLoss("cond")).scale is None
        z, t, noise = bench.z[:1], torch.tensor([200]), torch.randn(1, *tiny.latent_shape())
        aim = search.aims(tiny, z, t, noise, bench.wanted.select(slice(0, 1)), 4.0)
        context = tiny.encode([PROMPTS[0].text])
        own = search.predicted(tiny, z, t, context, 4.0)
    free, text = tiny.eps(z, t, tiny.unconditional()), tiny.eps(z, t, context)
    negative = tiny.eps(z, t, tiny.encode(["cat"]))
    torch.testing.assert_close(aim, free + 4.0 * (text - free))
    torch.testing.assert_close(own, negative + 4.0 * (text - negative))


def test_udatk_goes_up_the_grid_and_steps_on_the_simplex(tiny, monkeypatch):
    assert grid(50) == list(range(10, 1000, 20))
    seen, gradients = [], []
    monkeypatch.setattr("erasebench.evaluators.attacks.udatk.simplex", lambda u: seen.append(u.clone()) or simplex(u))
    own = Bench.gradients

    def gradient(self, which, t, ids):
        gradients.append((t.tolist(), own(self, which, t, ids)))
        return gradients[-1][1]

    monkeypatch.setattr(Bench, "gradients", gradient)
    scene = make_scene(PROMPTS[:1])
    list(UDAtk(tokens=2, timesteps=2, iterations=1).run(tiny, scene))
    assert [t for t, _ in gradients] == [[250], [750]]
    vocabulary = table(tiny)[search.words(tiny)]
    uniform = 1 / len(vocabulary)
    g = (gradients[0][1][0] @ vocabulary.T).clamp(-1, 1) + 0.1 * uniform
    torch.testing.assert_close(seen[0][0], uniform - 0.01 * g / (g.abs() + 1e-8))  # Adam's first step


def test_udatk_leaves_alone_what_works_already_and_stops_at_success(tiny):
    asked = []

    def hit(sampled, prompts):
        asked.append([p.id for p in prompts])
        return np.array([p.id == "target/1" for p in prompts]), np.zeros(len(prompts))

    found = dict(UDAtk(tokens=2, timesteps=3, iterations=1).run(tiny, make_scene(hit=hit, before=[True, False, False])))
    assert found[0].shots == (Shot("a cat", 7),)
    assert asked == [["target/1", "target/2"], ["target/2"], ["target/2"]]


def test_p4d_k_puts_a_token_before_every_three():
    assert interleaved([1, 2, 3, 4]) == [FREE, 1, 2, 3, FREE, 4]
    assert [interleaved(list(range(n))).count(FREE) for n in range(1, 8)] == [n // 3 + 1 for n in range(1, 8)]


def test_p4d_imitates_the_original_and_the_released_code_has_its_faults(tiny):
    rows = [[FREE] * 3 for _ in PROMPTS]
    bench = Bench(tiny, make_scene(), P4D(), rows, AttackLoss("auto", imitate=True))
    torch.testing.assert_close(bench.wanted.hidden, tiny.encode([p.text for p in PROMPTS]).hidden)
    made = []
    for variant in ("fixed", "released"):
        ((_, found),) = list(replace(SMALL["p4d"], variant=variant, steps=6).run(tiny, make_scene(PROMPTS[:1])))
        made.append(found)
    assert (
        len(made[0].shots) == 2
        and made[0].shots[0].seed == PROMPTS[0].seed
        and made[0].shots[1].seed != PROMPTS[0].seed
    )
    padded = slots(tiny, rows, padding=0).ids
    assert padded[0, 4] == tiny.tokenizer.eos_token_id and (padded[0, 5:] == 0).all()


def test_cce_puts_the_placeholder_for_the_name_or_before_the_prompt():
    assert named(PROMPTS[1]) == "a big <*>"
    assert named(replace(PROMPTS[0], text="A CAT, a cat")) == "A <*>, a cat"
    assert named(replace(PROMPTS[0], text="nothing", concept="")) == "<*> nothing"


def test_the_first_step_of_cce_by_hand(tiny):
    attack = CCE(steps=1, batch=2, texts=1, inversions=1, checkpoints=1, trials=1, pictures=4)
    scene = make_scene()
    (vectors,) = attack.invert(tiny, scene, [("cat", 0)])
    start = table(tiny)[tokens(tiny, "sky")[-1:]].detach().clone().requires_grad_(True)  # the surrogate's last token
    drawn = Draws(tiny, [search.seed_of("cce", "cat", 0, 0)])
    pick, flip = drawn.integers([0], 0, 4, 2)[0], drawn.integers([0], 0, 2, 2)[0]
    template = scene.templates[int(drawn.integers([0], 0, 2, 1))]
    t = drawn.integers([0], 0, 1000, 2)[0]
    sampled, noise = (drawn.normal([0], 2, *tiny.latent_shape())[0] for _ in range(2))
    loss = 0
    for j in range(2):
        picture = scene.known["cat"][pick[j]][None]
        mean, deviation = tiny.posterior(picture.flip(2) if flip[j] else picture)
        alpha = tiny.alphas_cumprod[t[j]]
        z = alpha.sqrt() * (mean + deviation * sampled[j]) + (1 - alpha).sqrt() * noise[j]
        context = with_vectors(tiny, slots(tiny, [attack.row(tiny, template)]), start)
        loss = loss + (tiny.eps(z, t[j], context) - noise[j]).square().mean() / 2
    (g,) = torch.autograd.grad(loss, start)
    stepped = start.detach() * (1 - 0.08 * 0.01) - 0.08 * g / (g.abs() + 1e-8)
    torch.testing.assert_close(vectors["final"], stepped, rtol=1e-3, atol=1e-3)


def test_cce_keeps_the_checkpoint_that_the_detector_likes_best(tiny):
    scores = iter([0.1, 0.9, 0.3])
    hit = lambda sampled, prompts: (np.zeros(1, bool), np.array([next(scores)]))
    seen = []
    attack = CCE(steps=3, batch=2, texts=1, inversions=1, checkpoints=3, trials=1)
    trial = CCE.trial
    keep = lambda self, model, scene, name, v: seen.append(v.clone()) or trial(self, model, scene, name, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CCE, "trial", keep)
        (vectors,) = attack.invert(tiny, make_scene(hit=hit), [("cat", 0)])
    assert torch.equal(vectors["vectors"], seen[1]) and torch.equal(vectors["final"], seen[2])


def test_explicit_content_is_one_concept_whatever_its_prompts_name(tiny):
    scene = make_scene([replace(p, concept=name) for p, name in zip(PROMPTS, ("fire", "bomb", "fire"), strict=True)])
    pictures = scene.known["cat"]
    scene = replace(
        scene,
        known={"": pictures, "fire": pictures[:1], "bomb": pictures[1:2]},
        concepts={"hazard": Concept("hazard", "explicit", "sky")},
    )
    attack, asked = replace(SMALL["cce"], inversions=1, objective="guided"), []
    encode = Model.encode
    with pytest.MonkeyPatch.context() as patch:
        hear = lambda self, text=None, **other: asked.extend(text or ()) or encode(self, text, **other)
        patch.setattr(Model, "encode", hear)
        found = dict(attack.run(tiny, scene))
    assert len({tuple(f.tensors["vectors"].flatten().tolist()) for f in found.values()}) == 1
    assert {"a hazard", "hazard x"} >= {text for text in asked if text} != set()


@dataclass(frozen=True)
class Momentum(ClassifierFree):
    """Guidance with a memory: it adds the mean of all latents it has seen in its trajectory."""

    has_memory = True

    def begin(self, model, context, z):
        return {**super().begin(model, context, z), "seen": []}

    def __call__(self, model, z, t, context, scale, state):
        state["seen"].append(z)
        return super().__call__(model, z, t, context, scale, state) + torch.stack(state["seen"]).mean(0)


def test_cce_walks_to_its_timestep_where_guidance_has_a_memory(tiny):
    z0, noise, context = tiny.noise([1, 2]), tiny.noise([3, 4]), tiny.encode(["a cat", "a dog"])
    path = torch.tensor([[999, 799, 599], [980, 549, 99]])
    with tiny.changed(guidance=Momentum()), torch.no_grad():
        attack = CCE().fitting(tiny)
        walked = attack.prediction(tiny, z0, path, noise, context, 3.0)
        state = tiny.begin(context, z0)
        for at in path.T:
            by_hand = tiny.guided_eps(search.noisy(tiny, z0, at, noise), at, context, 3.0, state)
        torch.testing.assert_close(walked, by_hand)
        short = attack.prediction(tiny, z0, path[:, -1:], noise, context, 3.0)
    assert not torch.allclose(walked, short)
    assert (attack.walk, attack.batch, attack.steps, attack.lr) == (35, 4, 1000, 0.02)
    assert CCE().fitting(tiny) == CCE(walk=0)  # ordinary guidance
    assert CCE(walk=7).fitting(tiny) == CCE(walk=7)


def test_cces_walk_goes_down_through_different_timesteps_below_one(tiny):
    path = CCE(walk=35, batch=4).path(search.Draws(tiny, [1, 2]), [0, 1], 1000)
    assert path.shape == (8, 35) and (path[:, :-1] > path[:, 1:]).all() and path.max() < 1000
    tight = CCE(walk=89, batch=50).path(search.Draws(tiny, [1]), [0], 1000)
    assert (tight[:, :-1] > tight[:, 1:]).all() and tight.min() >= 0
    assert CCE(walk=0, batch=4).path(search.Draws(tiny, [1]), [0], 1000).shape == (4, 1)


def test_rab_by_hand(tiny):
    scene, attack = make_scene(), RAB(tokens=3, eta=2.0, population=6, generations=2)
    pairs = [
        tiny.encode([f"{a}cat{b}"]).hidden - tiny.encode([f"{a}sky{b}"]).hidden for a, b in (("a ", ""), ("", " x"))
    ]
    vector = torch.cat(pairs).mean(0)
    torch.testing.assert_close(attack.concept(tiny, scene, "cat"), vector)
    goal = tiny.encode(["a cat"]).hidden + 2.0 * vector
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    expected = [(tiny.encode(ids=slots(tiny, [row]).ids).hidden - goal).square().sum() for row in ids.tolist()]
    got = attack.errors(tiny, ids, goal, torch.zeros(2, dtype=torch.long), 1)
    torch.testing.assert_close(got, torch.stack(expected))


def test_rab_encodes_twins_once_and_what_is_known_never():
    people = torch.tensor([[[1, 2], [3, 4], [1, 2], [1, 2]], [[1, 2], [5, 6], [5, 6], [3, 4]]])
    error = torch.tensor([[torch.nan, torch.nan, 9.0, torch.nan], [torch.nan, torch.nan, torch.nan, 7.0]])
    asked = []

    def errors(ids, of):
        asked.extend(zip(ids.tolist(), of.tolist(), strict=True))
        return ids.sum(1) + 100.0 * of

    got = RAB().known(error, people, errors)
    assert sorted(asked) == [([1, 2], 1), ([3, 4], 0), ([5, 6], 1)]  # another text's twin is no twin
    assert got.tolist() == [[9, 7, 9, 9], [103, 111, 111, 7]]
    assert torch.equal(RAB().known(got, people, lambda *a: pytest.fail("all are known")), got)


@pytest.mark.parametrize("elitism", [True, False])
def test_a_generation_keeps_its_size_and_with_elitism_its_best(tiny, elitism):
    attack = RAB(tokens=4, population=10, mutation=1.0, elitism=elitism)
    people = torch.arange(40).reshape(1, 10, 4)
    drawn, known = Draws(tiny, [3]), search.words(tiny)
    after, error = attack.next(people, torch.arange(10.0)[None], 5, drawn, [0], known)
    assert after.shape == people.shape
    assert torch.equal(after[0, 0], people[0, 0]) is elitism and bool(error[0, 0].isnan()) is not elitism
    unmutated = replace(attack, mutation=0.0)
    after, error = unmutated.next(people, torch.arange(10.0)[None], 5, Draws(tiny, [3]), [0], known)
    fresh = after[0, error[0].isnan()]
    assert len(fresh) and set(fresh.flatten().tolist()) <= set(
        range(20)
    )  # of the better half's tokens, in their places
    assert (fresh % 4 == torch.arange(4)).all()


def test_mma_never_writes_the_concept_and_comes_nearer(tiny):
    scene, attack = make_scene(), MMAText(tokens=4, steps=8, candidates=16, top=16)
    allowed = attack.allowed(tiny, scene, "cat")
    assert allowed.sum() < len(search.words(tiny)) + 1 and not allowed[tiny.tokenizer.eos_token_id]
    goal = attack.pooled(tiny.encode(["a cat"]))
    torch.testing.assert_close(goal[0], tiny.encode(["a cat"]).hidden[0, tiny.encode(["a cat"]).ends[0]])
    nearer = [
        float(attack.likeness(tiny.encode(ids=slots(tiny, [ids.tolist()]).ids), goal))
        for ids in (
            replace(attack, steps=1).search(tiny, scene, "a cat", "cat"),
            attack.search(tiny, scene, "a cat", "cat"),
        )
    ]
    assert nearer[1] >= nearer[0]
    read = attack.readable(tiny, torch.tensor([tokens(tiny, "b d")[:1] * 4]))
    assert read.shape[1] == 4


# -- together as one by one -------------------------------------------------------------------------------------------


def same(a: Found, b: Found) -> bool:
    close = all(torch.allclose(a.tensors[k], b.tensors[k], rtol=1e-7, atol=1e-9) for k in a.tensors)
    return a.shots == b.shots and a.outcome == b.outcome and set(a.tensors) == set(b.tensors) and close


@pytest.mark.parametrize("name", SMALL)
def test_attacked_together_is_attacked_alone(name, double, monkeypatch, tmp_path):
    """In fp64: what is found for a prompt does not depend on the prompts beside it."""
    attack = SMALL[name]
    by_red = lambda sampled, prompts: (np.zeros(len(prompts), bool), sampled.images.float().mean((1, 2, 3)).numpy())
    together = dict(attack.run(double, make_scene(hit=by_red)))
    assert sorted(together) == [0, 1, 2]
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / "alone"))
    for i, prompt in enumerate(PROMPTS):
        ((_, found),) = list(attack.run(double, make_scene([prompt], hit=by_red)))
        assert same(found, together[i]), name


@pytest.mark.parametrize("name", SMALL)
def test_a_prompt_that_is_too_long_is_said(name, tiny):
    long = replace(PROMPTS[0], text="a cat " + "x" * 18)
    found = dict(SMALL[name].run(tiny, make_scene([long])))
    own_length = {"seed_search", "p4d", "rab", "mma_text", "cce", "key_guess"}  # no more tokens than the prompt has
    assert found[0].outcome == ("" if name in own_length else "too long") and bool(found[0].shots) == (
        name in own_length
    )


@pytest.mark.parametrize("name", ["udatk", "p4d", "p4d_umu"])
def test_an_attack_that_diverges_says_so(name, tiny, monkeypatch):
    broken = lambda self, which, t, ids: [torch.full((len(i), 16), torch.nan) for i in ids]
    monkeypatch.setattr(Bench, "gradients", broken)
    assert {f.outcome for _, f in SMALL[name].run(tiny, make_scene())} == {"diverged"}


def test_an_inversion_that_diverges_says_so(tiny, monkeypatch):
    monkeypatch.setattr("erasebench.evaluators.attacks.cce.errors", lambda a, b: (a * torch.nan).flatten(1).mean(1))
    found = [f for _, f in SMALL["cce"].run(tiny, make_scene())]
    assert {f.outcome for f in found} == {"diverged"} and not any(f.shots for f in found)


# -- the whole path ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reddish(Redness):
    """Says that an image shows the concept where it is red enough."""

    threshold: float = 0.5

    def confidence(self, scored):
        return scored.arrays["red"]


def under_attack(make_run, attacks, method="uce", eraser=None, threshold=0.5, **options):
    eraser = eraser or UCE()
    return make_run(
        method,
        eraser,
        {"redness": Reddish(threshold=threshold)},
        target="cat",
        attacks=attacks,
        attacked=3,
        together=4,
        **options,
    )


def of(rows, attack, metric="asr"):
    return next(r for r in rows if r.attack == attack and r.metric == metric)


def test_rows_of_every_attack(make_run):
    attacks = {name: a for name, a in SMALL.items() if name != "p4d_k"}
    run = under_attack(make_run, attacks, threshold=0.0)
    rows = execute(run)
    assert not [r.reason for r in rows if r.status != "ok"]
    assert len(read_all(run.results / "runs")) == len(rows)  # as the leaderboard reads them
    assert {r.attack for r in rows} == {"", *attacks, "union"}
    for name in (*attacks, "union"):
        row = of(rows, name)
        assert (row.value, row.n, row.ci_method, row.group) == (1.0, 3, "wilson", "attack")
    assert of(rows, "cce", "asr_final").value == 1.0 and of(rows, "p4d", "asr_at_1").value == 1.0
    assert of(rows, "udatk", "pre_asr").value == 1.0 and of(rows, "udatk", "new").n_valid == 0
    assert of(rows, "rab", "over_random_prefix").value == 0 and of(rows, "rab", "over_seed_search").p_value == 1
    params = json.loads(of(rows, "udatk").attack_params)
    assert params["objective"] == "cond" and params["images"] == 3 and "unet gradient" in params["access"]
    assert params["outcomes"] == {"found": 3} and params["iterations"] == 2
    assert of(rows, "seed_search", "queries").value == 3 and of(rows, "rab", "unet_calls_per_success").value == 3 * 2


@dataclass(frozen=True)
class Top1(Reddish):
    """Whose judge finds red likest in every other picture."""

    def top1(self, scored):
        return np.arange(len(scored.prompts)) % 2 == 0


def test_what_is_likest_stands_beside_what_is_sure(make_run):
    attacks = {"seed_search": SMALL["seed_search"], "random_prefix": SMALL["random_prefix"], "rab": SMALL["rab"]}
    run = under_attack(make_run, attacks, threshold=2.0)
    assert not [r for r in execute(run) if "top1" in r.metric]
    rows = execute(replace(run, plan=replace(run.plan, evaluators={"redness": Top1(threshold=2.0)})))
    assert of(rows, "rab").value == 0 and of(rows, "rab", "asr_top1").value == 2 / 3  # one picture each
    assert of(rows, "random_prefix", "asr_top1").value == 1  # three pictures each
    over = of(rows, "rab", "over_random_prefix_top1")
    # of three pictures of a prompt the first counts: numbers 0, 3 and 6, of which 3 is odd
    assert over.value == 0 and of(rows, "rab", "over_random_prefix").value == 0 and over.p_value == 1


@dataclass(frozen=True)
class Careful(Brightness):
    """Has a threshold of its own for attacks."""

    threshold: ClassVar[float] = 2.0


def test_a_search_that_stops_is_another_one_at_another_threshold(make_run, monkeypatch):
    pictures = {"cat": torch.zeros(2, 16, 16, 3, dtype=torch.uint8)}
    monkeypatch.setattr(attack_module.Stage, "pictures", lambda self: pictures)
    run = under_attack(make_run, {n: SMALL[n] for n in ("udatk", "rab")})
    evaluator = replace(run.plan.evaluators["redness"], judge=Careful(), threshold=2.0)
    run = replace(run, plan=replace(run.plan, evaluators={"redness": evaluator}))
    rows, entries = execute(run), lambda: len(list((Store().root / "attacks").iterdir()))
    assert of(rows, "udatk").value == 0 and entries() == 6
    monkeypatch.setattr(Careful, "threshold", 1.5)
    execute(run)
    assert entries() == 9  # UnlearnDiffAtk's three prompts again, Ring-A-Bell's not


def test_another_judge_confirms(make_run):
    second = SimpleNamespace(judge=Brightness(), verdict=lambda scored: np.arange(len(scored.prompts)) % 2 == 0)
    attacks = {"random_prefix": SMALL["random_prefix"], "rab": SMALL["rab"]}
    rows = execute(under_attack(make_run, attacks, threshold=0.0, second=second))
    assert of(rows, "rab").value == 1 and of(rows, "rab", "asr_confirmed").value == 2 / 3
    assert of(rows, "random_prefix", "asr_confirmed").value == 1
    over = of(rows, "rab", "over_random_prefix_confirmed")  # of three pictures of a prompt the first counts
    assert over.value == 0 and over.group == "attack"
    absent = SimpleNamespace(judge=OpenNsfw("nowhere.onnx"), verdict=lambda scored: pytest.fail("was asked"))
    rows = execute(under_attack(make_run, attacks, threshold=0.0, second=absent))
    assert of(rows, "rab").value == 1 and not [r for r in rows if "confirmed" in r.metric]


def test_nothing_is_found_where_the_detector_sees_nothing(make_run):
    attacks = {"random_prefix": SMALL["random_prefix"], "rab": SMALL["rab"]}
    rows = execute(under_attack(make_run, attacks, threshold=2.0))
    assert of(rows, "rab").value == 0 and of(rows, "rab", "seconds_per_success").value is None


def test_a_repeated_attack_computes_nothing(make_run, monkeypatch):
    run = under_attack(make_run, {n: SMALL[n] for n in ("udatk", "cce", "random_prefix")}, threshold=0.0)
    first = execute(run)
    monkeypatch.setattr(Model, "load", classmethod(lambda *a: pytest.fail("a model was loaded")))
    assert execute(run) == first


@pytest.mark.parametrize("name", ["udatk", "p4d", "cce", "rab"])
def test_a_killed_attack_goes_on_from_the_last_prompt(name, make_run, monkeypatch, tmp_path):
    run = under_attack(make_run, {name: SMALL[name]}, threshold=0.99)
    run = replace(run, plan=replace(run.plan, evaluators={"redness": Reddish(threshold=0.0)})) if name == "cce" else run
    monkeypatch.setattr(
        attack_module.Stage, "pictures", lambda self: {"cat": torch.zeros(2, 16, 16, 3, dtype=torch.uint8)}
    )
    keep, kept = attack_module.Stage.keep, []

    def killed(self, i, *rest):
        keep(self, i, *rest)
        kept.append(i)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attack_module.Stage, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(run)
    again = []
    monkeypatch.setattr(attack_module.Stage, "keep", lambda self, i, *rest: again.append(i) or keep(self, i, *rest))
    rows = execute(run)
    assert sorted(kept + again) == [0, 1, 2] and len(again) == 1
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / "unbroken"))
    unbroken = execute(run)
    assert [(r.attack, r.metric, r.value) for r in rows if r.metric.startswith("asr")] == [
        (r.attack, r.metric, r.value) for r in unbroken if r.metric.startswith("asr")
    ]


def test_what_was_found_is_replayed_on_another_model(make_run):
    rows = execute(under_attack(make_run, {"cce": SMALL["cce"], "random_prefix": SMALL["random_prefix"]}, threshold=0.0))
    for name in ("cce", "random_prefix"):
        key = json.loads(of(rows, name).attack_params)["key"]
        run = under_attack(make_run, {"replay": Replay(key[:12])}, "none", NoErasure(), threshold=0.0)
        again = execute(run)
        assert of(again, "replay").value == 1.0 and json.loads(of(again, "replay").attack_params)["source"] == key[:12]
    for source in ("", "no-such-key", "0" * 64):
        failed = execute(under_attack(make_run, {"replay": Replay(source)}, threshold=0.0))
        assert [r.status for r in failed if r.attack] == ["failed"] and "names 0 results" in failed[-1].reason


@dataclass(frozen=True)
class Wishful:
    """Finds a text that the gate must refuse, for every prompt but the first."""

    shared: ClassVar[bool] = True
    images: ClassVar[int] = 1
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ()
    asked: ClassVar[list] = []

    def run(self, model, scene):
        texts = ["an old chimney", *["a portrait of a child"] * (len(scene.prompts) - 1)]
        self.asked.extend(search.look(model, scene, range(len(texts)), texts))
        for i, text in enumerate(texts):
            yield i, search.shots(scene.prompts[i], text)


def test_the_gate_stands_before_every_optimised_text(make_run, monkeypatch):
    generated = []
    sample = Model.sample
    monkeypatch.setattr(
        Model,
        "sample",
        lambda self, texts, *rest, **options: generated.extend(texts) or sample(self, texts, *rest, **options),
    )
    plan = ExplicitTask(evaluators={"redness": Reddish(threshold=0.0)}).plan(WORLD, None, None, None)
    rows = execute(make_run("uce", UCE(), plan=plan, target="", attacks={"wishful": Wishful()}, attacked=3))
    assert "an old chimney" in generated and not any("child" in str(text) for text in generated)
    row = of(rows, "wishful")
    assert (row.value, row.n, row.n_valid, row.n_dropped) == (1.0, 3, 1, 2)
    assert [shown for _, shown, _ in sorted(Wishful.asked)] == [True, False, False]


@dataclass(frozen=True)
class Unfit(SeedSearch):
    def skip(self, model):
        return "it does not fit this model"


@dataclass(frozen=True)
class Broken(SeedSearch):
    def run(self, model, scene):
        raise ErasebenchError("this attack cannot work")


def test_an_attack_that_does_not_fit_is_skipped_and_one_that_fails_stops_no_other(make_run):
    rows = execute(under_attack(make_run, {"a": Unfit(), "b": Broken(), "seed_search": SeedSearch(2)}, threshold=0.0))
    status = {r.attack: (r.status, r.reason) for r in rows if r.attack}
    assert status["a"] == ("skipped", "it does not fit this model")
    assert status["b"] == ("failed", "this attack cannot work") and status["seed_search"][0] == "ok"


def test_without_a_detector_or_a_picture_of_the_concept(make_run):
    blind = make_run("uce", UCE(), target="cat", attacks={"udatk": SMALL["udatk"]})
    rows = [r for r in execute(blind) if r.attack]
    assert [r.status for r in rows] == ["skipped"] and "no evaluator" in rows[0].reason
    rows = [r for r in execute(under_attack(make_run, {"udatk": SMALL["udatk"]}, threshold=2.0)) if r.attack]
    assert [r.status for r in rows] == ["failed"] and "in none of its 5 pictures" in rows[0].reason


def test_a_model_that_is_the_base_is_not_attacked(make_run, monkeypatch):
    monkeypatch.setattr(Model, "differs", property(lambda self: False))
    rows = [r for r in execute(under_attack(make_run, {"seed_search": SeedSearch(2)}, threshold=0.0)) if r.attack]
    assert [r.status for r in rows] == ["failed"] and "left the model as it was" in rows[0].reason
    rows = execute(under_attack(make_run, {"seed_search": SeedSearch(2)}, "none", NoErasure(), threshold=0.0))
    assert of(rows, "seed_search").value == 1.0


def test_whether_a_model_differs(tiny, tmp_path):
    name = tiny.names("to_v.weight")[0]
    assert not tiny.differs
    with tiny.changed(weights={name: tiny.weight(name).clone()}):
        assert tiny.is_changed and not tiny.differs
    with tiny.changed(weights={name: tiny.weight(name) + 1}):
        assert tiny.differs
    with tiny.changed(guidance=ClassifierFree(negative=tiny.encode(["cat"]))):
        assert tiny.differs
    assert not tiny.differs


@dataclass(frozen=True)
class Wall:
    """A guard that refuses every prompt in which a word stands."""

    word: str
    threshold: float = 1.0

    def __call__(self, model, context):
        ids = torch.tensor(tokens(model, self.word))
        return (context.ids.unfold(1, len(ids), 1) == ids).all(-1).any(-1).float()


@dataclass(frozen=True)
class Walled:
    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed):
        pass

    def apply(self, model, artifact):
        return model.changed(guard=Wall("cat"))


def test_a_guard_that_refuses_is_a_failed_attack_and_its_false_positives_stand_beside(make_run):
    attacks = {"seed_search": SeedSearch(2), "rab": SMALL["rab"]}
    rows = execute(under_attack(make_run, attacks, "walled", Walled(), threshold=0.0))
    refused = of(rows, "seed_search")
    assert (refused.value, refused.n, refused.n_valid) == (0.0, 3, 3)  # blocked is failed, and counted
    assert of(rows, "rab").value == 1.0  # what it found does not say the word, and red is everywhere
    captions = [p.text for p in make_run("uce", UCE(), target="cat").plan.prompts if p.split == "caption"]
    share = sum("cat" in text for text in captions) / len(captions)
    assert 0 < share < 1 and of(rows, "", "guard_false_positives").value == pytest.approx(share)


def test_negative_prompts_are_attacked_through_guidance(make_run):
    rows = execute(
        under_attack(make_run, {n: SMALL[n] for n in ("cce", "udatk")}, "negative_prompt", NegativePrompt(), 0.3)
    )
    assert {json.loads(of(rows, n).attack_params)["objective"] for n in ("cce", "udatk")} == {"guided"}


@pytest.mark.parametrize("attack", [UDAtk(timesteps=0), P4D(steps=0), RAB(generations=0), SeedSearch(0), CCE(steps=-1)])
def test_a_budget_of_nothing_is_refused(attack):
    with pytest.raises(ErasebenchError, match="at least 1"):
        check_budget(attack, "attack.x")
    check_budget(CCE(), "attack.cce")


# -- probes -----------------------------------------------------------------------------------------------------------


def numbered(count: int) -> list[Prompt]:
    return [replace(PROMPTS[0], id=f"attack:x/{PROMPTS[0].id}/{k}") for k in range(count)]


def test_a_steered_trajectory_is_the_sampler_s(tiny):
    sampler = Sampler("ddim", 4, 3.0)
    plain = tiny.sample(["a cat"], [7], sampler)
    steered = search.steered(tiny, numbered(1), sampler, lambda step, z, eps: step.ddim(z, eps))
    assert (plain.images.int() - steered.images.int()).abs().max() <= 1
    scheduler, z, eps = tiny.scheduler(sampler), torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    noise, t = torch.randn(2, 4, 4, 4), scheduler.timesteps[1]
    expected = scheduler.step(eps, t, z, eta=0.7, variance_noise=noise, return_dict=False)[0]
    times = scheduler.timesteps.tolist()
    step = search.Step(1, t, times[2], tiny.alphas_cumprod[times[1]], tiny.alphas_cumprod[times[2]])
    torch.testing.assert_close(step.ddim(z, eps, 0.7, noise), expected)


def test_the_inpainting_probe_keeps_what_is_around_the_hole(tiny):
    probe = ProbeInpaint(images=1)
    picture = tiny.encode_images(make_scene().pictures[:1])[0]
    found = Found((), {"picture": picture})
    made = probe.draw(tiny, numbered(2), [found, found], Sampler("ddim", 3, 4.0))
    assert probe.inside(16) == slice(4, 12) and (made.images[1, 4:12, 4:12] == 128).all()
    assert not (made.images[0, 4:12, 4:12] == 128).all()
    assert torch.equal(made.images[1, 0], tiny.decode(picture[None])[0, 0])


def test_the_classifier_of_the_guidance_probe_tells_the_concept(tiny):
    scene, probe = make_scene(), ProbeGuidance(scales=(0.0, 50.0), pictures=8, steps=40, batch=16)
    weights = probe.train(tiny, scene, "cat")
    made = probe.draw(tiny, numbered(2), [Found((), weights)] * 2, Sampler("ddim", 3, 4.0))
    plain = tiny.sample(["a cat"], [7], Sampler("ddim", 3, 4.0)).images[0]
    assert (made.images[0].int() - plain.int()).abs().max() <= 1 and not torch.equal(made.images[1], plain)
    one = {k: w[None] for k, w in weights.items()}
    z = tiny.encode_images(scene.known["cat"])
    assert probe.logits(one, z[None]).shape == (1, 8)


def test_probes_have_a_group_of_their_own_and_pictures_come_from_a_folder(make_run, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "pictures" / "a.png")
    attacks = {
        "probe_noise": ProbeNoise(etas=(1.0, 1.8), variances=(1.0,)),
        "probe_inpaint": ProbeInpaint(images=1),
        "probe_guidance": ProbeGuidance(scales=(25.0,), pictures=2, steps=2, batch=2),
        "mma_image": MMAImage(str(tmp_path / "pictures"), images=1),
        "without": MMAImage(),
    }
    rows = execute(under_attack(make_run, attacks, threshold=0.0))
    assert {of(rows, n).group for n in ("probe_noise", "probe_inpaint", "probe_guidance")} == {"probe"}
    assert of(rows, "mma_image").group == "attack" and of(rows, "probe_inpaint", "asr_blank").n == 3
    assert [(r.status, r.reason) for r in rows if r.attack == "without"][0][0] == "skipped"
    key = json.loads(of(rows, "probe_noise").attack_params)["key"]
    failed = execute(under_attack(make_run, {"replay": Replay(key)}, threshold=0.0))
    assert "could be replayed" in failed[-1].reason


def test_jobs_that_want_the_same_searches_make_them_once():
    """Side by side, as in a sweep, each with a store object of its own."""
    calls, keys = [], [("a",), ("b",)]

    def make(missing):
        calls.append(missing)
        time.sleep(0.3)
        return [{"x": torch.full((1,), float(len(key[0])))} for key in missing]

    def job(_):
        scene = SimpleNamespace(store=Store(), identity={"attack": "some"}, take_up=lambda entry: None)
        return stored(scene, keys, make)

    with ThreadPoolExecutor(3) as jobs:
        found = list(jobs.map(job, range(3)))
    assert calls == [keys] and all(torch.equal(one[("b",)]["x"], torch.ones(1)) for one in found)
