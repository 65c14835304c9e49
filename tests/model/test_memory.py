"""Work in slices and micro-batches: the same as in one piece, and halved where memory is short."""

from contextlib import nullcontext
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
from test_attacks import make_scene

from erasebench import provenance
from erasebench.config import embedded_source
from erasebench.contracts import Brief, Concept, ErasebenchError, Prompt, Sampler
from erasebench.model import memory
from erasebench.model.memory import Term, add_gradients, in_slices
from erasebench.model.model import Model
from erasebench.run import judging
from erasebench.store import local as store
from erasebench.toolbox import attention, training
from erasebench.toolbox.search import FREE, AttackLoss, Bench, tokens
from erasebench.toolbox.training import Pictures, denoising
from erasebench.toolbox.trajectory import walked

BRIEF = Brief((Concept("cat", "object", "sky"),), ("dog", "ship"), (), ("a {c}", "a photo with a {c}"))
same = lambda loss: loss


@pytest.fixture(scope="module")
def embedded() -> Model:
    return Model.load(embedded_source())


@pytest.fixture
def one_by_one(monkeypatch):
    """Nothing is worked on beside another."""
    return lambda: monkeypatch.setattr(memory, "PLACES", 1)


def near(ours: torch.Tensor, theirs: torch.Tensor, of_largest: float = 1e-5) -> None:
    """Within a part of the largest number."""
    assert float((ours - theirs).abs().max()) <= of_largest * float(theirs.abs().max())


# -- gradients --------------------------------------------------------------------------------------------------------


def seen_by_ca(model: Model) -> list[Term]:
    cut = CA(batch=3, images=2, prior_scale=0.5, trained="full-weight")
    side = model.latent_shape()[1] * model.pixels_per_latent
    drawings = torch.randint(256, (2, side, side, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    pictures = {"sky": drawings}
    seen = cut.seen(model, BRIEF.concepts, BRIEF.templates, pictures, torch.Generator().manual_seed(2))
    return [Term(lambda rows: memory.share(rows, 3) * cut.loss(model, seen.select(rows)), 3, graphs=2)]


def seen_by_salun(model: Model) -> list[Term]:
    draw = torch.Generator().manual_seed(3)
    pictures = Pictures(model.noise(range(3)), model.encode(["a cat", "a dog", "cat"]))
    other = model.encode(["a sky", "a sea", "sky"])
    return [unlearning(model, pictures, other, draw), denoising(model, pictures, draw).times(0.3)]


@pytest.mark.parametrize("which, terms, most", [("tiny", seen_by_ca, 1), ("tiny", seen_by_ca, 4), ("embedded", seen_by_salun, 2)])
def test_micro_batches_add_up_to_the_whole(request, which, terms, most):
    model = request.getfixturevalue(which)
    with model.training(model.names(r"^unet\.")) as weights:
        made, found = terms(model), []
        for count in (None, most):
            add_gradients(model, made, weights.values(), same, count)
            found.append(torch.cat([w.grad.flatten() for w in weights.values()]))
            for weight in weights.values():
                weight.grad = None
    near(found[1], found[0])


def test_fisher_information_does_not_depend_on_how_many_timesteps_fit(tiny, monkeypatch):
    cut = SelectiveAmnesia(fim="subsampled", fim_steps=5, fim_batch=4, variant="u")
    pictures = Pictures(tiny.noise([1]), tiny.encode(["a dog"]))
    whole = cut.fisher(tiny, pictures, torch.Generator().manual_seed(0))
    monkeypatch.setitem(memory._sizes.setdefault(tiny, {}), "graph", 1)
    single = cut.fisher(tiny, pictures, torch.Generator().manual_seed(0))
    near(*(torch.cat([f.flatten() for f in found.values()]) for found in (single, whole)))


def test_an_attack_has_the_gradients_that_each_prompt_has_alone(tiny, one_by_one):
    prompts = [Prompt(str(i), text, i, "target", "cat") for i, text in enumerate(("a cat", "a big cat", "cats"))]
    rows = [[FREE, FREE, *tokens(tiny, p.text)] for p in prompts]
    ids, t = [torch.tensor([5 + i, 9]) for i in range(3)], torch.tensor([10, 500, 900])
    bench = lambda objective: Bench(tiny, make_scene(prompts), UDAtk(), rows, AttackLoss(objective))
    gradients = lambda objective: torch.stack(bench(objective).gradients([0, 1, 2], t, ids))
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


def test_trajectories_are_the_same_in_slices_and_in_the_same_order(tiny, one_by_one):
    contexts, sampler = tiny.encode(["a cat", "a dog"]), Sampler("ddim", 3, 3.0)
    walk = lambda: walked(tiny, contexts, 3, sampler, torch.Generator().manual_seed(0))
    esd = ESD(steps=4, batch=2, trajectories=3, ddim_steps=3)
    states = lambda: list(esd.frozen(tiny, contexts, torch.Generator().manual_seed(0)))
    asked = [Prompt(str(i), "a cat", i, "gie") for i in range(3)]
    draw = lambda: drawn(tiny, asked, sampler)
    whole = walk(), states(), draw()
    one_by_one()
    assert torch.equal(walk().t, whole[0].t) and torch.equal(walk().which, whole[0].which)
    near(walk().z, whole[0].z, 5e-5)  # of several steps, each guided
    for ours, theirs in zip(states(), whole[1], strict=True):
        assert torch.equal(ours.t, theirs.t)
        near(ours.z, theirs.z, 5e-5)
        near(ours.text, theirs.text, 5e-5)
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


# -- judges and stages ------------------------------------------------------------------------------------------------


def test_weights_are_read_once_until_they_change(tmp_path, monkeypatch):
    (file := tmp_path / "weights").write_bytes(b"one")
    read = []
    monkeypatch.setattr(store, "sha256_file", lambda path: read.append(path) or path.read_text())
    assert [store.sha256_once(file) for _ in range(3)] == ["one"] * 3 and len(read) == 1
    (other := tmp_path / "other").write_bytes(b"two")
    other.replace(file)  # of the same size
    assert store.sha256_once(file) == "two" and len(read) == 2


def test_judges_compute_where_the_run_says_and_nowhere_else_after():
    assert judging.device() == "cpu" and judging.providers() == ["CPUExecutionProvider"]
    with judging.on("meta"):
        seen = []
        look = lambda x: seen.append((x.device.type, len(x))) or torch.zeros(len(x), 2)
        assert judging.in_batches(look, torch.ones(20, 3)).shape == (20, 2)
        assert seen == [("meta", 16), ("meta", 4)]
        seen.clear()
        judging.in_batches(look, torch.ones(20, 3), "cpu")
        assert seen == [("cpu", 20)] and judging.device() == "meta"
    assert judging.device() == "cpu"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no such thing on this system")
def test_a_peak_belongs_to_its_stage():
    provenance.reset_peak_memory("cpu")
    large = torch.ones(200 * 2**18)
    with_it = provenance.peak_memory_mb("cpu")
    del large
    provenance.reset_peak_memory("cpu")
    assert provenance.peak_memory_mb("cpu") < with_it - 150


def test_attention_maps_are_differentiable_where_activations_are_computed_again(tiny):
    """Their processors are gone by the time of the backward pass, which would compute something else again."""
    z, t, context = tiny.noise([1]), torch.tensor([500]), tiny.encode(["a cat"])
    gradients = []
    for light in (nullcontext, tiny.checkpointing):
        with tiny.training(tiny.names(r"^unet\..*attn2\.to_k\.weight$")) as weights, light():
            sum(probabilities.square().sum() for probabilities in attention.maps(tiny, z, t, context).values()).backward()
            gradients.append([weight.grad.clone() for weight in weights.values() if weight.grad is not None])
    assert gradients[0] and not tiny.unet.is_gradient_checkpointing
    for whole, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, whole)
