"""Dark Miner's loop against computations by hand, and its verification on drawings."""

import json

import pytest
import torch
from erasebench.evaluators.clip import Clip
from erasebench.methods import dark_miner
from erasebench.methods.dark_miner import DarkMiner, as_context, verification
from safetensors.torch import load_file

from erasebench.contracts import Brief, Concept, ErasebenchError, Sampler
from erasebench.mini import nets
from erasebench.store.local import sha256_file
from erasebench.toolbox.attention import projection

BRIEF = Brief((Concept("cat", "object", "sky"),))
SMALL = dict(
    tau=-2.0,
    max_loops=2,
    pool=3,
    length=5,
    k=2,
    mine_steps=2,
    steps=2,
    rank=2,
    images=2,
    ddim_steps=2,
    guidance=2.0,
    clip=Clip(architecture="embedded", pretrained="embedded"),
)


@pytest.fixture(autouse=True)
def features(monkeypatch):
    """Mean colour in place of CLIP, whose pictures are larger."""
    monkeypatch.setattr(dark_miner, "embedded", lambda clip, images: images.float().mean((1, 2)))


def changed(tiny, factor=1.0):
    """Adapters that do change something."""
    made = DarkMiner(**SMALL).untrained(tiny, 0)
    generator = torch.Generator().manual_seed(1)
    return {
        name: adapter._replace(up=factor * torch.randn(adapter.up.shape, generator=generator))
        for name, adapter in made.items()
    }


def test_adapters_sit_on_every_value_projection_and_merge_into_it(tiny, tmp_path):
    adapters = changed(tiny)
    assert {projection(name, "v") for name in adapters} == set(tiny.names(r"attn[12]\.to_v\.weight$"))
    z, context = tiny.noise([0, 1]), tiny.encode(["cat", "sea"])
    with torch.no_grad():
        plain = tiny.eps(z, 500, context)
        with tiny.changed(processors=dark_miner.processors(DarkMiner(**SMALL).untrained(tiny, 0))):
            torch.testing.assert_close(tiny.eps(z, 500, context), plain)
        with tiny.changed(processors=dark_miner.processors(adapters)):
            beside = tiny.eps(z, 500, context)
        dark_miner.save_file(dark_miner.packed(adapters), tmp_path / "adapters.safetensors")
        with DarkMiner(**SMALL).apply(tiny, tmp_path):
            torch.testing.assert_close(tiny.eps(z, 500, context), beside, rtol=1e-4, atol=1e-5)
    assert (beside - plain).abs().max() > 1e-3


def test_the_loss_by_hand(tiny):
    eraser = DarkMiner(**SMALL, preserve_scale=0.3)
    z, t = tiny.noise([0, 1]), torch.tensor([100, 900])
    c, anchor = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), tiny.encode(["a photo"]).repeat(2)
    base = lambda context: tiny.eps(z, t, context)
    contexts = [anchor, as_context(torch.zeros_like(c)), as_context(-c)]
    with torch.no_grad():
        before = [base(context) for context in contexts]
        with tiny.changed(processors=dark_miner.processors(changed(tiny))):
            loss = eraser.loss(tiny, z, t, c, anchor)
            now = [base(context) for context in contexts]
            erased = base(as_context(c))
    by_hand = (erased - before[0]).square().sum() / 2
    by_hand = by_hand + 0.3 * sum((a - b).square().sum() / 2 for a, b in zip(now, before, strict=True))
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-4)


def test_mining_explains_the_pictures_better_than_where_it_started(tiny):
    eraser = DarkMiner(**{**SMALL, "mine_steps": 40, "mine_lr": 0.5})
    latents = tiny.noise([3, 4])
    c = eraser.mine(tiny, latents, torch.Generator().manual_seed(0))
    start = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    start = start * tiny.encode(["a photo"]).hidden.std()
    z, t, noise = dark_miner.noised(tiny, latents.repeat(20, 1, 1, 1), torch.Generator().manual_seed(9))
    error = lambda embedding: float(dark_miner.squared(noise, tiny.eps(z, t, as_context(embedding).repeat(40))))
    with torch.no_grad():
        assert error(c) < error(start)
    assert c.shape == (1, 5, 16) and not c.requires_grad


def test_a_mined_embedding_of_another_length_is_guided_by_the_empty_prompt(tiny):
    z, c = tiny.noise([0]), as_context(torch.randn(1, 5, 16))
    free, text = tiny.eps(z, 500, tiny.encode([""])), tiny.eps(z, 500, c)
    got = tiny.guided_eps(z, 500, c, 3.0, tiny.begin(c, z))
    torch.testing.assert_close(got, free + 3 * (text - free))


def test_loops_are_kept_and_a_killed_fit_goes_on(tiny, tmp_path, monkeypatch):
    eraser = DarkMiner(**SMALL)
    for name in "abc":
        (tmp_path / name).mkdir()
    eraser.fit(tiny, BRIEF, tmp_path / "a", 0)
    report = json.loads((tmp_path / "a" / "loops.json").read_text())
    assert len(report["scores"]) == 2 and report["ended"] == "max_loops=2 were done"
    assert max(x.abs().max() for n, x in load_file(tmp_path / "a" / "adapters.safetensors").items() if "up" in n) > 0
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / "elsewhere"))
    kept = DarkMiner.circumvent

    def killed(self, model, adapters, found, seed):
        if len(found) == 2:
            raise KeyboardInterrupt
        return kept(self, model, adapters, found, seed)

    monkeypatch.setattr(DarkMiner, "circumvent", killed)
    with pytest.raises(KeyboardInterrupt):
        eraser.fit(tiny, BRIEF, tmp_path / "b", 0)
    monkeypatch.setattr(DarkMiner, "circumvent", kept)
    mined = []
    monkeypatch.setattr(DarkMiner, "mine", lambda *arguments: mined.append(arguments))
    eraser.fit(tiny, BRIEF, tmp_path / "b", 0)
    same = lambda name: sha256_file(tmp_path / name / "adapters.safetensors")
    assert same("a") == same("b") and not mined and not tiny.is_changed
    # another threshold shares the loops
    DarkMiner(**{**SMALL, "tau": 2.0}).fit(tiny, BRIEF, tmp_path / "c", 0)
    report = json.loads((tmp_path / "c" / "loops.json").read_text())
    assert len(report["scores"]) == 1 and report["ended"] == "s(c) <= 2" and not mined


def test_newest_and_older_embeddings_are_drawn_as_asked(tiny):
    eraser = DarkMiner(**{**SMALL, "images": None, "steps": 3})
    found = [{"embedding": torch.randn(1, 5, 16)} for _ in range(2)]
    which = torch.tensor([[0], [1], [1]])
    made = eraser.latents(tiny, found, which, torch.Generator().manual_seed(0))
    seeds = torch.randint(2**31, (3,), generator=torch.Generator().manual_seed(0)).tolist()
    context = as_context(torch.cat([found[i]["embedding"] for i in (0, 1, 1)]))
    by_hand = tiny.latents(context, seeds, Sampler("ddim", 2, 2.0))
    torch.testing.assert_close(made[:, 0], by_hand)


def test_an_unknown_term_is_refused():
    with pytest.raises(ErasebenchError, match="preserved=noise"):
        DarkMiner(preserved=("noise",))


def test_verification_tells_drawings_that_show_the_concept_from_others():
    """Table 12: area under the curve of s(c) for embeddings that bring the concept back, and that do not."""
    encoder, preprocess, _ = nets.load_clip()
    drawings = nets.drawings("concept")

    def feature(some):
        images = torch.stack([torch.tensor(d["pixels"]) for d in some])
        with torch.no_grad():
            return encoder.encode_image(preprocess(images)).float()

    draw = torch.Generator().manual_seed(0)
    pick = lambda some: some[torch.randint(len(some), (3,), generator=draw)]

    def auc(name):
        shows = [d for d in drawings if name in d["objects"]]
        others = [d for d in drawings if name not in d["objects"]]
        known, positive = feature(shows[::2]), feature(shows[1::2])
        negative, reference = feature(others[0 : 2 * len(positive) : 2]), feature(others[1:40:2])
        score = lambda mined: float(verification(pick(mined), pick(reference), pick(known)))
        good, bad = (torch.tensor([score(mined) for _ in range(200)]) for mined in (positive, negative))
        return float((good[:, None] > bad[None]).float().mean())

    assert min(auc("cat"), auc("airplane")) >= 0.95
