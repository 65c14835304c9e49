"""SDXL: two text encoders, pooled prompts and sizes, on a random model of its classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_pipeline
from erasebench.methods.esd import ESD
from erasebench.methods.mace import MACE
from erasebench.methods.negative_prompt import NegativePrompt
from erasebench.methods.none import NoErasure
from erasebench.methods.output_tuning import OutputTuning
from erasebench.methods.rece import RECE
from erasebench.methods.text_tuning import TextTuning
from erasebench.methods.time import TIME
from erasebench.methods.uce import UCE

from erasebench.contracts import ErasebenchError, Sampler
from erasebench.model.model import Model
from erasebench.model.source import Source
from erasebench.run.run import execute
from erasebench.store.local import Store
from erasebench.toolbox.closed_form import text_encoder_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_pipeline(tmp_path_factory.mktemp("xl") / "model", xl=True)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sampling_equals_the_diffusers_pipeline(folder, guidance):
    from diffusers import StableDiffusionXLPipeline

    prompts, seeds = ["a cat", "a portrait of Ann Reed"], [3, 4]
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=guidance,
        height=16,
        width=16,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    ours = Model.load(Source("xl", folder)).sample(prompts, seeds, Sampler("ddim", 4, guidance)).images
    assert np.abs(ours.numpy().astype(int) - (theirs * 255).round().astype(int)).max() <= 1


ERASERS = {
    "negative_prompt": NegativePrompt(),
    "uce": UCE(),
    "time": TIME(),
    "rece": RECE(),
    "esd": ESD(steps=2, trajectories=2, ddim_steps=2, lr=1e-2),
    "esd moving": ESD(sampler="moving", variant="u", steps=2, ddim_steps=2, lr=1e-2),
    "output_tuning": OutputTuning(steps=2, trajectories=2, ddim_steps=2, lr=1e-2),
    "mace": MACE(masks="whole", images=1, image_steps=2, steps=2, lr=1e-2, ridge=0.1),
}


@pytest.mark.parametrize("name", ERASERS)
def test_every_method_that_fits_erases(make_run, folder, name):
    rows = execute(make_run(name, ERASERS[name], source=Source("tiny", folder), images=1))
    assert {row.status for row in rows} == {"ok"}, rows[0].reason
    assert next(row for row in rows if row.metric == "red_change").value != 0


def test_a_method_that_does_not_fit_is_skipped_before_any_image(make_run, folder):
    rows = execute(make_run("text_tuning", TextTuning(steps=1), source=Source("tiny", folder)))
    assert [(row.status, row.value) for row in rows] == [("skipped", None)]
    assert "this model has two" in rows[0].reason and not list(Store().entries())
    assert {row.status for row in execute(make_run("text_tuning", TextTuning(steps=1, lr=1e-2)))} == {"ok"}


def test_what_was_fitted_once_is_not_asked_again_whether_it_fits(make_run, monkeypatch):
    run = make_run("text_tuning", TextTuning(steps=1, lr=1e-2))
    first = execute(run)
    monkeypatch.setattr(Model, "load", classmethod(lambda *a: pytest.fail("a model was loaded")))
    assert execute(run) == first


def test_the_base_runs_and_both_encoders_are_part_of_an_embedding(make_run, folder):
    assert {row.status for row in execute(make_run("none", NoErasure(), source=Source("tiny", folder), images=1))} == {
        "ok"
    }
    model = Model.load(Source("xl", folder))
    assert model.encode(["a cat"]).hidden.shape[-1] == model.text_width == 32
    before = text_encoder_digest(model)
    model.text_encoder_2.get_input_embeddings().weight.data[0] += 1
    assert text_encoder_digest(model) != before
    with pytest.raises(ErasebenchError, match="two text encoders"):
        ids = model.tokenize(["a cat"])
        model.encode(ids=ids, token_embeds=model.text_encoder.get_input_embeddings()(ids))


def test_the_empty_prompt_of_guidance_is_zero_and_a_mean_keeps_its_pooled_part(folder):
    model = Model.load(Source("xl", folder))
    empty = model.unconditional()
    assert not empty.hidden.any() and not empty.pooled.any() and model.encode([""]).hidden.any()
    both = model.encode(["a cat", "a dog"])
    assert torch.allclose(both.mean().pooled, (both.pooled[:1] + both.pooled[1:]) / 2)
    assert torch.allclose(both.mean().hidden, (both.hidden[:1] + both.hidden[1:]) / 2)
