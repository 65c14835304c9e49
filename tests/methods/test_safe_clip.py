"""Safe-CLIP's losses by hand, its adapters, its projection, and what it is trained on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from erasebench.methods import safe_clip
from erasebench.methods.safe_clip import SafeCLIP, adapted, merged, pooled, projection, text_pairs, untrained
from safetensors.torch import load_file

from erasebench.analysis.check import check
from erasebench.contracts import Brief, Concept, Sampler
from erasebench.tasks import seed_of

WORDS = ("sun", "moon", "star", "sand", "rain", "snow", "wind", "tide")
BRIEF = Brief(
    (Concept("cat", "object", "sky"), Concept("fox", "object", "sea")),
    ("dog",),
    tuple(f"the {word}" for word in WORDS),
    ("a {c}", "{c} now"),
)
SMALL = dict(pairs=8, rank=2, epochs=2, batch=4, lr=1e-2, ddim_steps=2, guidance=2.0)
TOWER = torch.randn(16, 6, generator=torch.Generator().manual_seed(9))


@pytest.fixture(autouse=True)
def clip(tiny, monkeypatch):
    """A CLIP whose text tower is the tiny model's, and whose pictures are six mean colours."""
    encoder = SimpleNamespace(
        encode_text=lambda texts: pooled(tiny, texts) @ TOWER,
        encode_image=lambda images: images.float().flatten(2)[:, :, ::64].flatten(1)[:, :6] / 255,
    )
    monkeypatch.setattr(safe_clip, "load", lambda *names: (encoder, lambda images: images, list))


def test_the_losses_by_hand():
    draw = torch.Generator().manual_seed(0)
    safe, unsafe, reference, seen = (torch.randn(3, 5, generator=draw) for _ in range(4))
    eraser = SafeCLIP(keep=0.3, redirect=0.7, keep_pair=0.2, redirect_pair=0.9, logit_scale=5.0)
    cos = lambda a, b: (a @ b) / (a.norm() * b.norm())

    def pairs(a):
        rows = torch.stack([torch.stack([5.0 * cos(x, y) for y in seen]) for x in a])
        of = lambda m: -sum(torch.log(m[i].exp()[i] / m[i].exp().sum()) for i in range(3)) / 3
        return (of(rows) + of(rows.T)) / 2

    away = lambda a: sum(1 - cos(x, y) for x, y in zip(a, reference, strict=True)) / 3
    by_hand = 0.3 * away(safe) + 0.7 * away(unsafe) + 0.2 * pairs(safe) + 0.9 * pairs(unsafe)
    torch.testing.assert_close(eraser.loss(safe, unsafe, reference, seen), by_hand)


def test_what_follows_the_end_does_not_reach_the_pooled_output(tiny):
    texts = ["cat", "a much longer text"]
    whole = tiny.encode(texts)
    torch.testing.assert_close(pooled(tiny, texts), whole.hidden[[0, 1], whole.ends], rtol=1e-4, atol=1e-5)


def test_the_projection_of_its_own_tower_is_that_towers(tiny):
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    found, other = projection(tiny, SafeCLIP().clip, texts), pooled(tiny, ["a cat", "fox"])
    torch.testing.assert_close(other @ found, other @ TOWER, rtol=1e-3, atol=1e-3)


def test_adapters_sit_on_all_but_the_queries_and_merge_into_the_weights(tiny):
    draw = torch.Generator().manual_seed(0)
    adapters = untrained(tiny, 2, draw)
    present = {n for n in tiny.names(r"^text_encoder\.encoder.*weight$") if "norm" not in n}
    assert {n for n in present if "q_proj" not in n} == set(adapters) and len(adapters) == 10
    plain = pooled(tiny, ["a cat"])
    with adapted(tiny, adapters, 0.5, 0.0, draw):
        assert torch.equal(pooled(tiny, ["a cat"]), plain)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.up.normal_(generator=draw)
    with torch.no_grad(), adapted(tiny, adapters, 0.5, 0.0, draw):
        beside = pooled(tiny, ["a cat"])
    with tiny.changed(weights=merged(tiny, adapters, 0.5)):
        torch.testing.assert_close(pooled(tiny, ["a cat"]), beside, rtol=1e-3, atol=1e-4)
    assert (beside - plain).abs().max() > 1e-2
    assert torch.equal(pooled(tiny, ["a cat"]), plain)


def test_inputs_of_the_adapters_are_dropped_out(tiny):
    draw = torch.Generator().manual_seed(0)
    adapters = untrained(tiny, 2, draw)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.up.normal_(generator=draw)

    def out(dropout, seed):
        with torch.no_grad(), adapted(tiny, adapters, 0.5, dropout, torch.Generator().manual_seed(seed)):
            return pooled(tiny, ["a cat"])

    assert torch.equal(out(0.5, 1), out(0.5, 1)) and not torch.equal(out(0.5, 1), out(0.5, 2))
    assert torch.equal(out(0.0, 1), out(0.0, 2))


def test_pairs_name_the_concept_on_one_side_alone():
    made = text_pairs(BRIEF, 8, torch.Generator().manual_seed(0))
    assert len(made) == 8
    named = {"a cat": "a sky", "cat now": "sky now", "a fox": "a sea", "fox now": "sea now"}
    assert dict(made[:4]) == named
    for i, (unsafe, safe) in enumerate(made[4:]):
        assert unsafe == f"{safe} and {('cat', 'fox')[i % 2]}" and "cat" not in safe and "fox" not in safe


def test_references_stay_what_they_were(tiny, tmp_path, monkeypatch):
    """The released code's follow the model under training."""
    references, plain = [], SafeCLIP.loss
    keep = lambda self, safe, unsafe, reference, seen: (
        references.append(reference.clone()) or plain(self, safe, unsafe, reference, seen)
    )
    monkeypatch.setattr(SafeCLIP, "loss", keep)
    SafeCLIP(**SMALL, patience=9).fit(tiny, BRIEF, tmp_path, 0)
    rows = lambda parts: {tuple(round(x, 4) for x in row) for row in torch.cat(parts).tolist()}
    first, second = references[: len(references) // 2], references[len(references) // 2 :]
    assert not any(x.requires_grad for x in references) and rows(first) == rows(second)
    before = rows([pooled(tiny, [safe for _, safe in text_pairs(BRIEF, 8, torch.Generator().manual_seed(0))]) @ TOWER])
    assert len(before) == 8
    assert set(load_file(tmp_path / "weights.safetensors")) == set(untrained(tiny, 2, torch.Generator()))


def test_each_text_is_paired_with_its_own_picture(tiny, tmp_path, monkeypatch):
    pairs, plain = {}, SafeCLIP.loss
    key = lambda row: tuple(round(x, 3) for x in row.tolist())

    def noted(self, safe, unsafe, reference, seen):
        pairs.update(zip(map(key, reference), seen, strict=True))
        return plain(self, safe, unsafe, reference, seen)

    monkeypatch.setattr(SafeCLIP, "loss", noted)
    SafeCLIP(**SMALL).fit(tiny, BRIEF, tmp_path, 0)
    texts = [safe for _, safe in text_pairs(BRIEF, 8, torch.Generator().manual_seed(0))]
    encoder, _, _ = safe_clip.load()
    project = projection(tiny, SafeCLIP().clip, texts)
    for i, text in enumerate(texts):
        image = tiny.sample([text], [seed_of("safe_clip", i)], Sampler("ddim", 2, 2.0)).images
        found = min(pairs, key=lambda row: float((torch.tensor(row) - pooled(tiny, [text]) @ project).abs().max()))
        torch.testing.assert_close(pairs[found], encoder.encode_image(image)[0], atol=0.005, rtol=0)  # a grey level
    assert len(pairs) == 8


def test_unsafe_texts_come_to_mean_the_safe_ones(tiny, tmp_path):
    eraser = SafeCLIP(**{**SMALL, "epochs": 40}, patience=40, keep_pair=0.0, redirect_pair=0.0, dropout=0.0)
    cos = lambda a, b: float(torch.cosine_similarity(pooled(tiny, [a]) @ TOWER, b).detach())
    aim, kept = pooled(tiny, ["a sky"]) @ TOWER, pooled(tiny, ["the sun"]) @ TOWER
    start = cos("a cat", aim)
    eraser.fit(tiny, BRIEF, tmp_path, 0)
    with eraser.apply(tiny, tmp_path):
        assert 1 - cos("a cat", aim) < 0.5 * (1 - start) and cos("the sun", kept) > 0.9


def test_it_stops_where_what_is_held_out_gains_no_more(tiny, tmp_path):
    SafeCLIP(**{**SMALL, "lr": 0.0, "epochs": 50}, patience=3).fit(tiny, BRIEF, tmp_path, 0)
    assert json.loads((tmp_path / "notes.json").read_text())["epochs"] == 4


def test_it_conforms(tiny):
    brief = replace(BRIEF, concepts=BRIEF.concepts[:1])
    eraser = SafeCLIP(**{**SMALL, "lr": 3e-2, "alpha": 16.0})
    assert [line for line in check(eraser, tiny, brief, ["a cat", "cat now", "cat"]) if line[1]] == []
