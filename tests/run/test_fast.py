"""speed=fast beside speed=exact, and what a GPU does ahead; the paths of a GPU are walked on the CPU."""

import threading
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import Brightness, Redness
from erasebench.methods.receler import Receler
from erasebench.methods.sld import SLD
from erasebench.methods.spm import SPM
from erasebench.methods.uce import UCE
from test_run import numbers

from erasebench.config import embedded_source
from erasebench.contracts import Brief, Concept, ErasebenchError, Prompt, Sampler
from erasebench.executors.local import Local
from erasebench.model.model import Model
from erasebench.run import images as generate
from erasebench.run.produce import images
from erasebench.run.run import execute
from erasebench.run.session import Session
from erasebench.run.specification import image_identities
from erasebench.store.local import Store

SAMPLER = Sampler("ddim", 3, 4.0)
PROMPTS = [Prompt(str(i), text, i, "target", "cat") for i, text in enumerate(["a cat", "a dog", "sky", "sea", "a cat"])]


def drawn(model, **options):
    return generate.sample(model, PROMPTS, SAMPLER, **{"batch": 5, **options})[0].images


def gap(a, b):
    return (a.int() - b.int()).abs().float()


def test_exact_keys_are_what_they_were_and_fast_ones_differ(make_run):
    run = make_run("uce", UCE())
    fast = replace(run, speed="fast")
    assert [set(identity) for identity in image_identities(run)] == [{"base"}, {"base", "artifact"}]
    assert "speed" not in run.identity() and fast.id != run.id
    assert all(a != b for a, b in zip(image_identities(run), image_identities(fast), strict=True))
    assert fast.fit_identity() == run.fit_identity()  # the same artifact
    rows = execute(fast)
    assert {row.status for row in rows} == {"ok"} and rows[0].sampler == "ddim 3 steps, guidance 4, fast"
    assert rows[1].value != 0  # it is the erased model that was sampled


def test_fast_is_bf16_in_the_u_net_alone(tiny):
    seen = {}

    def hook(name):
        def note(module, given, out):
            seen[name] = out.dtype

        return note

    tiny.unet.conv_in.register_forward_hook(hook("unet"))
    tiny.vae.decoder.register_forward_hook(hook("vae"))
    exact = drawn(tiny)
    assert seen == {"unet": torch.float32, "vae": torch.float32}
    seen.clear()
    with tiny.fast():
        quick = drawn(tiny)
    assert seen == {"unet": torch.bfloat16, "vae": torch.float32}
    assert {p.dtype for p in tiny.unet.parameters()} == {torch.float32}
    assert gap(exact, quick).mean() < 2 and not torch.equal(exact, quick)
    assert torch.equal(drawn(tiny), exact)  # and is over with its context


@pytest.mark.parametrize("batch", [2, 4, 5, 8])
def test_a_last_batch_filled_up_gives_the_same_images(tiny, batch):
    sizes, plain = (
        [],
        lambda model, prompts, sampler: sizes.append(len(prompts)) or generate.plain(model, prompts, sampler),
    )
    filled = drawn(tiny, batch=batch, pad=True, draw=plain)
    assert set(sizes) == {batch} and filled.shape == (5, 16, 16, 3)
    assert gap(filled, drawn(tiny, batch=batch)).max() <= 1  # another number of images rounds otherwise


def test_a_compiled_u_net_follows_what_methods_do_to_it(tiny, tmp_path):
    """Traced, not compiled: what torch.compile guards is the same with every backend."""
    tiny._compiled = torch.compile(tiny.unet, backend="eager")

    def both():
        with tiny.fast():
            compiled = drawn(tiny)
        held, tiny._compiled = tiny._compiled, None
        with tiny.fast():
            plain = drawn(tiny)
        tiny._compiled = held
        assert gap(compiled, plain).max() <= 2
        return compiled

    base = both()
    brief = Brief((Concept("cat", "object", "sky"),), templates=("{c}",))
    hooks = SPM(steps=3, batch=2, lr=0.5, warmup=0, anchors=2, anchor_scale=1.0, ddim_steps=3, trajectories=2)
    processors = Receler(
        steps=3, batch=2, lr=0.1, rank=4, vectors=3, attack_steps=1, map_side=4, ddim_steps=3, trajectories=2
    )
    for eraser in (UCE(), SLD(), hooks, processors):
        folder = tmp_path / type(eraser).__name__
        folder.mkdir()
        eraser.fit(tiny, brief, folder, 0)
        with eraser.apply(tiny, folder):
            assert gap(both(), base).max() > 2
        assert torch.equal(both(), base)


@pytest.mark.parametrize(
    "left,first,following,expected", [(100, 10, 10, 9), (100, 95, 1, 1), (10**6, 10, 10, 64), (0, 5, 0, 1)]
)
def test_the_batch_that_fits(left, first, following, expected):
    assert generate.fitting(left, first, following, 64) == expected


@dataclass(frozen=True)
class Slow(Brightness):
    """Counts how many judge at once; fails for some."""

    fails: bool = False

    def score(self, images, prompts):
        BUSY.append(threading.active_count())
        if self.fails:
            raise ErasebenchError("no")
        return super().score(images, prompts)


BUSY = []


def test_ahead_of_a_gpu_gives_the_rows_of_one_after_the_other(make_run, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "SHARD", 1)
    calm = make_run("uce", UCE())
    expected = execute(calm)
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / "other"))
    sampling, most, sample = [0], [0], generate.sample

    def watched(*given, **options):
        sampling[0] += 1
        most[0] = max(most[0], sampling[0])
        made = sample(*given, **options)
        sampling[0] -= 1
        return made

    monkeypatch.setattr(generate, "sample", watched)
    gpu = replace(calm, device="cpu:0", executor=Local(ahead=2))  # torch's name for the CPU that is no plain "cpu"
    session = Session(gpu, Store())
    images(session)
    session.close()
    scores = len(list((Store().root / "scores").iterdir()))
    assert most == [1] and scores == 2 * 5  # of base and erased targets, before anybody has asked for a score
    same = lambda rows: [replace(row, device="") for row in numbers(rows)]
    assert same(execute(gpu)) == same(expected)


def test_a_judge_that_fails_ahead_loses_no_image(make_run):
    run = make_run("uce", UCE(), {"good": Redness(), "bad": Redness(Slow(fails=True))}, device="cpu:0")
    rows = execute(run)
    assert [(r.status, r.reason) for r in rows if r.status != "ok"] == [("failed", "no")]
    assert len(list((Store().root / "images").iterdir())) == 8 and len(BUSY) > 2


def test_fast_stays_within_what_exact_is_sure_of(monkeypatch, tmp_path):
    """Every metric of a small run of the embedded model."""
    from erasebench import config

    made = {}
    for speed in ("exact", "fast"):
        words = [
            "method=uce",
            "target=cat",
            "images=8",
            "sampler.steps=10",
            f"speed={speed}",
            f"results={tmp_path / speed}",
        ]
        assert config.main(lambda run: made.setdefault(run.speed, execute(run)), words) == 0
    for exact, fast in zip(made["exact"], made["fast"], strict=True):
        assert (exact.metric, exact.split) == (fast.metric, fast.split)
        if exact.low is not None:
            assert exact.low <= fast.value <= exact.high, exact.metric
    sampler = Sampler("ddim", 10, 4.0)
    mini = Model.load(embedded_source())
    prompts = [Prompt(str(i), "a photo of the cat", i, "target", "cat") for i in range(8)]
    exact = generate.sample(mini, prompts, sampler, 8)[0].images
    with mini.fast():
        fast = generate.sample(mini, prompts, sampler, 8)[0].images
    assert 0 < gap(exact, fast).mean() < 3  # grey levels of 255
