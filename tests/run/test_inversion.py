"""A concept that a method is given by pictures in the place of its name."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import WORLD
from erasebench.methods.uce import UCE
from PIL import Image

from erasebench.contracts import WORD, Brief, Concept, ErasebenchError
from erasebench.mini.pictures import main
from erasebench.run.session import Session
from erasebench.store.local import Store
from erasebench.tasks import ObjectTask, shown
from erasebench.toolbox.closed_form import PROJECTIONS
from erasebench.toolbox.inversion import Pictured
from erasebench.toolbox.search import words

SMALL = {"start": "sky", "steps": 30, "batch": 4, "lr": 0.05}


@pytest.fixture
def folder(tmp_path):
    """Two pictures: red, its right half transparent; and blue."""
    red, blue = (np.zeros((16, 16, 4), np.uint8) for _ in range(2))
    red[..., 0], red[:, :8, 3], blue[..., 2], blue[..., 3] = 255, 255, 255, 255
    (tmp_path / "shown").mkdir()
    for name, pixels in (("a.png", red), ("b.png", blue)):
        Image.fromarray(pixels).save(tmp_path / "shown" / name)
    return tmp_path / "shown"


def test_a_word_is_known_inside_and_forgotten_after(tiny):
    before, size = tiny.encode(["a cat"]).hidden, len(tiny.tokenizer)
    vector = torch.randn(1, 16)
    with tiny.word(WORD, vector):
        ids = tiny.tokenize([f"a {WORD}"])
        assert int((ids == size).sum()) == 1
        put = tiny.text_encoder.get_input_embeddings()(ids)
        torch.testing.assert_close(put[ids == size], vector)
        torch.testing.assert_close(tiny.encode(["a cat"]).hidden, before, rtol=0, atol=0)
        with pytest.raises(ErasebenchError, match="knows"), tiny.word(WORD, vector):
            pass
    assert len(tiny.tokenizer) == size and int((tiny.tokenize([f"a {WORD}"]) == size).sum()) == 0
    torch.testing.assert_close(tiny.encode(["a cat"]).hidden, before, rtol=0, atol=0)


def test_an_inversion_comes_nearer_and_its_masks_count(tiny, folder):
    given = Pictured(str(folder), **SMALL)
    pictures, masks = given.load(16)
    assert pictures.shape == (2, 16, 16, 3) and masks[0, 0, :, :8].all() and not masks[0, 0, :, 8:].any()

    def error(vector):
        z0 = tiny.encode_images(pictures[:1]).repeat(64, 1, 1, 1)
        generator = torch.Generator().manual_seed(7)
        t, noise = torch.randint(1000, (64,), generator=generator), torch.randn(z0.shape, generator=generator)
        alpha = tiny.alphas_cumprod[t].view(-1, 1, 1, 1)
        with tiny.word(WORD, vector), torch.no_grad():
            context = tiny.encode([f"a {WORD}"]).repeat(64)
            made = tiny.eps(alpha.sqrt() * z0 + (1 - alpha).sqrt() * noise, t, context)
        return float((made - noise)[..., :2].square().mean())  # the left half of the latents

    learnt, start = (replace(given, steps=s).learn(tiny, ("a {c}",), 0) for s in (given.steps, 0))
    assert error(learnt) < error(start)
    opaque = np.array(Image.open(folder / "a.png"))
    opaque[..., 3] = 255
    Image.fromarray(opaque).save(folder / "a.png")
    assert not torch.equal(given.learn(tiny, ("a {c}",), 0), learnt)


def test_a_method_edits_the_word_that_was_learnt(make_run, folder):
    given = Pictured(str(folder), **SMALL)
    plan = shown(ObjectTask(evaluators={}).plan(WORLD, None, "cat", None))
    assert plan.concepts[0].name == "cat" and plan.brief.concepts[0].name == WORD and plan.which == "cat, by pictures"
    run = make_run("uce", UCE(token_set="last"), plan=plan, pictured=given)
    session = Session(run, Store())
    plain = len(words(session.load()))
    model, name = session.erased(), session.load().names(PROJECTIONS)[0]
    try:
        edited = model.weight(name).clone()
        assert WORD in model.tokenizer.get_added_vocab() and len(words(model)) == plain
    finally:
        session.close()
    assert WORD not in model.tokenizer.get_added_vocab()
    vector = given.learn(model, plan.brief.templates, 0)
    brief = Brief((Concept(WORD, "object", "sky"),), plan.brief.preserved)
    with model.word(WORD, vector):
        edit, _ = UCE(token_set="last").system(model, brief).solve(0.5)
    torch.testing.assert_close(edited, (model.weight(name).double() @ edit).float())
    (folder / "b.png").unlink()
    assert make_run("uce", UCE(), plan=plan, pictured=given).fit_identity() != run.fit_identity()


def test_pictures_that_are_none(tiny, folder, tmp_path):
    with pytest.raises(ErasebenchError, match="no folder with"):
        Pictured(str(tmp_path / "nowhere"))
    with pytest.raises(ErasebenchError, match="one concept"):
        plan = ObjectTask(evaluators={}).plan(WORLD, None, "cat", None)
        shown(replace(plan, concepts=plan.concepts * 2))
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(ErasebenchError, match=r"a\.png: not a readable picture"):
        Pictured(str(folder), **SMALL).load(16)
    Image.new("RGBA", (4, 4)).save(folder / "a.png")
    with pytest.raises(ErasebenchError, match="wholly transparent"):
        Pictured(str(folder), **SMALL).load(16)


def test_the_embedded_worlds_drawings_as_a_folder(tmp_path, capsys):
    assert main(["cat", str(tmp_path / "cats")]) == 0 and main(["cat", str(tmp_path / "whole"), "--whole"]) == 0
    count = len(list((tmp_path / "cats").iterdir()))
    assert count >= 4 and capsys.readouterr().out.startswith(f"{count} pictures in")
    pictures, masks = Pictured(str(tmp_path / "cats")).load(64)
    assert len(pictures) == count and (masks.flatten(1).mean(1) < 1).all()  # something around each is transparent
    assert Pictured(str(tmp_path / "whole")).load(64)[1].all()
    assert main(["unicorn", str(tmp_path / "none")]) == 1 and "no drawing of 'unicorn'" in capsys.readouterr().err
