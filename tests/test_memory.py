"""Work in slices and micro-batches: the same as in one piece, halved where memory is short, and at most 20 GiB at Stable Diffusion's size."""

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from erasebench.evaluators.attacks.cce import CCE
from erasebench.evaluators.attacks.key_guess import KeyGuess
from erasebench.evaluators.attacks.udatk import UDAtk
from erasebench.methods.ca import CA
from erasebench.methods.esd import ESD
from erasebench.methods.gie import drawn
from erasebench.methods.sa import SelectiveAmnesia
from erasebench.methods.salun import SalUn, unlearning
from safetensors.torch import load_file
from simulated import META, gpu
from test_attacks import make_scene

from erasebench import memory, training
from erasebench.config import embedded_source
from erasebench.contracts import Brief, Concept, ErasebenchError, Prompt, Sampler
from erasebench.memory import Term, add_gradients, in_slices
from erasebench.model import Model
from erasebench.search import FREE, Bench, tokens
from erasebench.training import Pictures, denoising
from erasebench.trajectory import walked

BRIEF = Brief((Concept("cat", "object", "sky"),), ("dog", "ship"), (), ("a {c}", "a photo with a {c}"))
same = lambda loss: loss


@pytest.fixture(scope="module")
def embedded() -> Model:
    return Model.load(embedded_source())


@pytest.fixture
def one_by_one(monkeypatch):
    """Nothing is worked on beside another."""
    return lambda: monkeypatch.setattr(memory, "PLACES", 1)


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest number."""
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


# -- gradients --------------------------------------------------------------------------------------------------------


def seen_by_ca(model: Model) -> list[Term]:
    cut = CA(batch=3, images=2, prior_scale=0.5, trained="full-weight")
    pictures = {"sky": torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))}
    seen = cut.seen(model, BRIEF.concepts, BRIEF.templates, pictures, torch.Generator().manual_seed(2))
    return [Term(lambda rows: memory.share(rows, 3) * cut.loss(model, seen.select(rows)), 3, graphs=2)]


def seen_by_salun(model: Model) -> list[Term]:
    draw = torch.Generator().manual_seed(3)
    pictures = Pictures(model.noise(range(3)), model.encode(["a cat", "a dog", "cat"]))
    other = model.encode(["a sky", "a sea", "sky"])
    return [unlearning(model, pictures, other, draw), denoising(model, pictures, draw).times(0.3)]


@pytest.mark.parametrize("terms", [seen_by_ca, seen_by_salun])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole(embedded, terms, most):
    with embedded.training(embedded.names(r"^unet\.")) as weights:
        made, found = terms(embedded), []
        for count in (None, most):
            add_gradients(embedded, made, weights.values(), same, count)
            found.append(torch.cat([w.grad.flatten() for w in weights.values()]))
            for weight in weights.values():
                weight.grad = None
    near(found[1], found[0])


def test_fisher_information_does_not_depend_on_how_many_timesteps_fit(embedded, monkeypatch):
    cut = SelectiveAmnesia(fim="subsampled", fim_steps=5, fim_batch=4, variant="u")
    pictures = Pictures(embedded.noise([1]), embedded.encode(["a dog"]))
    whole = cut.fisher(embedded, pictures, torch.Generator().manual_seed(0))
    monkeypatch.setitem(memory._sizes.setdefault(embedded, {}), "graph", 1)
    single = cut.fisher(embedded, pictures, torch.Generator().manual_seed(0))
    near(*(torch.cat([f.flatten() for f in found.values()]) for found in (single, whole)))


def test_an_attack_has_the_gradients_that_each_prompt_has_alone(embedded, one_by_one):
    prompts = [Prompt(str(i), text, i, "target", "cat") for i, text in enumerate(("a cat", "a big cat", "cats"))]
    scene = replace(make_scene(prompts), pictures=torch.zeros(3, 64, 64, 3, dtype=torch.uint8))
    rows = [[FREE, FREE, *tokens(embedded, p.text)] for p in prompts]
    ids, t = [torch.tensor([5 + i, 9]) for i in range(3)], torch.tensor([10, 500, 900])
    gradients = lambda objective: torch.stack(Bench(embedded, scene, UDAtk(), rows, objective).gradients([0, 1, 2], t, ids))
    whole = [gradients(objective) for objective in ("cond", "guided")]
    one_by_one()
    for objective, expected in zip(("cond", "guided"), whole, strict=True):
        near(gradients(objective), expected)


@pytest.mark.parametrize("objective", ["cond", "guided"])
def test_inversions_do_not_depend_on_micro_batches(tiny, one_by_one, monkeypatch, objective):
    attack = CCE(steps=3, batch=4, texts=2, inversions=1, checkpoints=1, trials=1, pictures=4, lr=1e-3, objective=objective)
    learn = lambda: attack.invert(tiny, make_scene(), [("cat", 0), ("cat", 1)])
    key = KeyGuess(steps=3, batch=4, length=2, place="inmidout")
    guess = lambda: key.learn(tiny, make_scene(), "cat")
    whole, keys = learn(), guess()
    one_by_one()
    for ours, theirs in zip(learn(), whole, strict=True):
        near(ours["final"], theirs["final"])
    for part, theirs in keys.items():
        near(guess()[part], theirs)


def test_weights_that_are_heavy_are_trained_with_checkpointing_to_the_same(tiny, tmp_path, monkeypatch):
    cut, found, entered = ESD(variant="u", steps=2, batch=2, trajectories=2, ddim_steps=2), [], []
    checkpointing = Model.checkpointing
    monkeypatch.setattr(Model, "checkpointing", lambda self: entered.append(1) or checkpointing(self))
    for number, heavy in enumerate((2**30, 0)):
        monkeypatch.setattr(training, "HEAVY", heavy)
        (folder := tmp_path / str(number)).mkdir()
        cut.fit(tiny, BRIEF, folder, 0)
        found.append(load_file(folder / "weights.safetensors"))
    assert len(entered) == 2 and not any(getattr(m, "gradient_checkpointing", False) for m in tiny.unet.modules())
    assert all(torch.equal(found[0][name], weight) for name, weight in found[1].items())


# -- without gradients ------------------------------------------------------------------------------------------------


def test_pictures_are_decoded_and_encoded_alike_in_slices(embedded, one_by_one):
    z = embedded.noise(range(3))
    images, (mean, deviation) = embedded.decode(z), embedded.posterior(embedded.decode(z))
    one_by_one()
    assert int((embedded.decode(z).int() - images.int()).abs().max()) <= 1
    for ours, theirs in zip(embedded.posterior(images), (mean, deviation), strict=True):
        near(ours, theirs)


def test_trajectories_are_the_same_in_slices_and_in_the_same_order(embedded, one_by_one):
    contexts, sampler = embedded.encode(["a cat", "a dog"]), Sampler("ddim", 3, 3.0)
    walk = lambda: walked(embedded, contexts, 3, sampler, torch.Generator().manual_seed(0))
    states = lambda: list(ESD(steps=4, batch=2, trajectories=3, ddim_steps=3).frozen(embedded, contexts, torch.Generator().manual_seed(0)))
    asked = [Prompt(str(i), "a cat", i, "gie") for i in range(3)]
    draw = lambda: drawn(embedded, asked, sampler)
    whole = walk(), states(), draw()
    one_by_one()
    assert torch.equal(walk().t, whole[0].t) and torch.equal(walk().which, whole[0].which)
    near(walk().z, whole[0].z)
    for ours, theirs in zip(states(), whole[1], strict=True):
        assert torch.equal(ours.t, theirs.t)
        near(ours.z, theirs.z)
        near(ours.text, theirs.text)
    assert int((draw().int() - whole[2].int()).abs().max()) <= 1


def test_the_embedded_world_is_never_cut(embedded):
    assert memory.at_once(embedded.latent_shape()) >= 3 * 64 and memory.at_once((4, 64, 64)) == 8


# -- where memory is short --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("full"), RuntimeError("cannot allocate memory: 8 bytes")])
def test_slices_are_halved_where_memory_is_short_and_stay_so(tiny, error):
    tried = []

    def work(rows: slice) -> list[int]:
        tried.append(rows.stop - rows.start)
        if tried[-1] > 2:
            raise error
        return list(range(10))[rows]

    assert sum(in_slices(tiny, "work", work, 7, 5), []) == list(range(7)) and tried == [5, 2, 2, 2, 1]
    assert sum(in_slices(tiny, "work", work, 3, 5), []) == [0, 1, 2] and tried[5:] == [2, 1]
    assert in_slices(tiny, "other", lambda rows: rows.stop, 7, 5) == [5, 7]


def test_what_does_not_fit_alone_or_is_another_fault_is_raised(tiny):
    def fails(error: Exception, rows: slice) -> None:
        raise error

    with pytest.raises(ErasebenchError, match="out of memory even for one"):
        in_slices(tiny, "work", partial(fails, MemoryError()), 4, 4)
    with pytest.raises(RuntimeError, match="shapes"):
        in_slices(tiny, "work", partial(fails, RuntimeError("shapes do not fit")), 4, 4)


def test_a_gradient_begins_anew_where_memory_was_short_in_its_middle(tiny):
    """Half of it had been added up."""
    weight, x, asked = torch.nn.Parameter(torch.ones(2)), torch.arange(8.0).view(4, 2), []

    def short(rows: slice) -> torch.Tensor:
        asked.append(rows.stop - rows.start)
        if asked == [2, 2]:
            raise torch.OutOfMemoryError("full")
        return (weight * x[rows]).sum()

    add_gradients(tiny, [Term(short, 4)], [weight], same, most=2)
    assert weight.grad.tolist() == [12.0, 16.0] and asked == [2, 2, 1, 1, 1, 1]
    asked.clear()
    weight.grad = None
    add_gradients(tiny, [Term(short, 2)], [weight], same, most=2)
    assert asked == [1, 1]  # remembered


@pytest.mark.parametrize("name", ["sa", "salun"])
def test_a_fit_goes_on_in_smaller_parts_to_the_same_end(tiny, tmp_path, monkeypatch, name):
    small = dict(batch=4, pictures=4, lr=1e-3, ddim_steps=2)
    cut = {"sa": SelectiveAmnesia(**small, steps=1, replay=4, fim="subsampled", fim_pictures=1, fim_steps=3),
           "salun": SalUn(**small, kept=4, epochs=1)}[name]  # fmt: skip
    eps, most = Model.eps, [100]

    def limited(self, z, *rest):
        if len(z) > most[0] and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("full")
        return eps(self, z, *rest)

    monkeypatch.setattr(Model, "eps", limited)
    found = []
    for count in (100, 1):
        most[0] = count
        (folder := tmp_path / str(count)).mkdir()
        cut.fit(tiny, BRIEF, folder, 0)
        found.append(load_file(folder / "weights.safetensors"))
    far = torch.cat([(found[0][n] - w).abs().flatten() for n, w in found[1].items()])
    assert (far > 1e-4).float().mean() < 0.01  # where a gradient is next to nothing its sign, and so Adam's step, is rounding


# -- at Stable Diffusion's size ---------------------------------------------------------------------------------------


def benchmark():
    spec = importlib.util.spec_from_file_location("memory_benchmark", Path(__file__).parent / "benchmarks" / "memory.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


measured = benchmark()


def test_bytes_are_counted_as_they_come_and_go():
    with gpu() as counter:
        x = torch.ones(256, 1024, device=META, requires_grad=True)
        assert counter.held == 2**20
        y = (x.view(1024, 256) * 2).exp()  # a product that nobody needs any more, and what exp keeps
        assert counter.held == 2 * 2**20 and counter.peak == 3 * 2**20
        y.sum().backward()
        assert x.grad is not None and counter.peak <= 5 * 2**20
        del y
        optimiser = torch.optim.Adam([x], foreach=False)
        optimiser.step()
        assert counter.held == 4 * 2**20  # x, its gradient and two moments
        with pytest.raises(torch.OutOfMemoryError):
            counter.capacity = 5 * 2**20
            torch.empty(2**20, device=META)


def test_small_numbers_keep_their_values():
    with gpu():
        t = torch.tensor([3, 1, 2], device=META)
        t[0] = 7
        assert (t * 2).tolist() == [14, 2, 4] and int(t.max()) == 7 and bool((t > 6).any())
        x = torch.empty(3, 5, device=META)
        assert x[t > 1].shape == (2, 5) and torch.randn(100, 100).to(META).cpu().shape == (100, 100)


@pytest.mark.parametrize("plugin", measured.plugins(), ids=lambda p: f"{p[1]} {p[2]}")
def test_every_method_and_attack_needs_at_most_20_gib(plugin):
    peaks = measured.measure(*plugin)
    assert peaks and all(3.9 < gib <= 20 for gib in peaks.values()), peaks
