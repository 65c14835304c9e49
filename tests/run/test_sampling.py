"""Sampling against diffusers' own pipelines, in double precision: every sampler, prediction type and setting of a file."""

import pytest
import torch
from conftest import build_pipeline

from erasebench.contracts import ErasebenchError, Prompt, Sampler
from erasebench.model.model import Model
from erasebench.model.schedulers import SCHEDULERS
from erasebench.model.source import Components
from erasebench.run import specification

PROMPTS, SEEDS = ["a cat", "a dog on a mat"], [3, 1]  # of two lengths, so that padding shows
FILES = {  # entries of scheduler_config.json, and the samplers that read them
    "trailing": ({"timestep_spacing": "trailing", "steps_offset": 0}, ("ddim", "dpmsolver", "euler")),
    "linspace": ({"timestep_spacing": "linspace", "set_alpha_to_one": True}, ("ddim", "lms")),
    "linear": ({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 500}, ("pndm",)),
    "karras": ({"use_karras_sigmas": True}, ("lms", "euler", "dpmsolver")),
    "thresholding": ({"thresholding": True, "sample_max_value": 1.5}, ("ddim", "dpmsolver")),
    "first order": ({"solver_order": 1, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, ("dpmsolver",)),
    "clipping": ({"clip_sample": True, "clip_sample_range": 0.5}, ("ddim",)),
}
READ = [(entries, name) for entries, (_, names) in FILES.items() for name in names]
ALL = [(name, prediction, False) for name in sorted(SCHEDULERS) for prediction in ("epsilon", "v_prediction", "sample")]
CANNOT = {("pndm", "sample")}  # diffusers' own scheduler raises


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Whether SDXL -> what diffusers loads of a random base in float64; the scheduler's file is each test's own."""
    import diffusers

    found = {}
    for xl, kind in ((False, diffusers.StableDiffusionPipeline), (True, diffusers.StableDiffusionXLPipeline)):
        folder = build_pipeline(tmp_path_factory.mktemp("bases") / "model", xl=xl)
        found[xl] = kind.from_pretrained(folder, torch_dtype=torch.float64).components
    return found


FILE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def by_diffusers(parts, sampler: Sampler, xl=False, **file) -> torch.Tensor:
    """Latents of diffusers' pipeline."""
    import diffusers

    own = getattr(diffusers, SCHEDULERS[sampler.name]).from_config(FILE | file)
    if xl:
        pipeline = diffusers.StableDiffusionXLPipeline(**parts[xl] | {"scheduler": own}, add_watermarker=False)
    else:
        pipeline = diffusers.StableDiffusionPipeline(**parts[xl] | {"scheduler": own}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance,
        height=16,
        width=16,
        output_type="latent",
    ).images


def loaded(parts, xl=False, **file) -> Model:
    names = ("unet", "vae", "text_encoder", "tokenizer", *(["text_encoder_2"] if xl else []))
    second = {"second_padding": parts[xl]["tokenizer_2"].pad_token_id} if xl else {}
    components = {name: parts[xl][name] for name in names}
    return Model(Components(**components, scheduler_config=FILE | file, **second))


def by_us(parts, sampler: Sampler, xl=False, **file) -> torch.Tensor:
    model = loaded(parts, xl, **file)
    model.check_sampler(sampler)
    return model.latents(model.encode(PROMPTS), SEEDS, sampler)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.dtype == torch.float64 and theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("name,prediction,xl", [*ALL, ("euler", "epsilon", True), ("pndm", "v_prediction", True)])
def test_every_sampler_and_prediction_type_equals_the_pipeline(parts, name, prediction, xl):
    sampler, file = Sampler(name, 5, 5.0), {"prediction_type": prediction}
    if (name, prediction) in CANNOT:
        with pytest.raises(ErasebenchError, match=f"{name} cannot sample a base that predicts {prediction}: "):
            by_us(parts, sampler, xl, **file)
        with pytest.raises((ValueError, NotImplementedError)):
            by_diffusers(parts, sampler, xl, **file)
        return
    close(by_us(parts, sampler, xl, **file), by_diffusers(parts, sampler, xl, **file))


@pytest.mark.parametrize("entries,name", READ)
def test_every_setting_of_the_schedulers_file_counts(parts, name, entries):
    file, sampler = {"prediction_type": "v_prediction", **FILES[entries][0]}, Sampler(name, 4, 4.0)
    close(by_us(parts, sampler, **file), by_diffusers(parts, sampler, **file))


def test_sdxl_clips_where_its_file_says_so_and_only_there(parts):
    sampler, clips = Sampler("ddim", 3, 4.0), {"clip_sample": True, "clip_sample_range": 0.5}
    close(by_us(parts, sampler, True, **clips), by_diffusers(parts, sampler, True, **clips))
    model = loaded(parts, xl=True)
    del model.scheduler_config["clip_sample"]  # as in a file of Euler's, which cannot clip
    assert model.scheduler(sampler).config.clip_sample is False


@pytest.mark.parametrize("guidance", [0.0, 0.6])
def test_guidance_is_left_out_at_one_and_below(parts, guidance):
    sampler = Sampler("ddim", 2, guidance)
    close(by_us(parts, sampler), by_diffusers(parts, sampler))
    model = loaded(parts)
    context = model.encode(PROMPTS)
    mixed = model.latents(context, SEEDS, Sampler("ddim", 2, 5.0), scales=[guidance, 3.0])
    alone = [model.latents(context, SEEDS, Sampler("ddim", 2, scale)) for scale in (guidance, 3.0)]
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]))
    assert specification.shard_identity({}, sampler, []) == specification.shard_identity({}, Sampler("ddim", 2, 1.0), [])
    own = lambda scale: specification.requests([Prompt("i", "x", 0, "target", guidance=scale)])
    assert own(guidance) == own(1.0) != own(1.5)


@pytest.mark.parametrize("name,steps", [("ddim", 1000), ("pndm", 1000), ("dpmsolver", 1000), ("pndm", 3), ("ddim", 1001)])
def test_steps_that_a_sampler_cannot_take_are_one_line(tiny, name, steps):
    with pytest.raises(ErasebenchError, match=str(steps)) as error:
        tiny.check_sampler(Sampler(name, steps, 4.0))
    assert "\n" not in str(error.value)
    tiny.check_sampler(Sampler(name, 999, 4.0))


def test_samplers_that_interpolate_take_as_many_steps_as_diffusers_does(tiny):
    for name in ("lms", "euler"):
        assert len(tiny.scheduler(Sampler(name, 1000, 4.0)).timesteps) == 1000
    v = torch.ones(1, 4, 4, 4)
    tiny._prediction = "v_prediction"
    assert torch.isfinite(tiny.as_noise(v, v, 1000.0)).all()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_noise_that_a_prediction_stands_for(tiny, prediction):
    z0, noise, t = tiny.noise([1]), tiny.noise([2]), 300
    alpha = tiny.alphas_cumprod[t]
    z = alpha.sqrt() * z0 + (1 - alpha).sqrt() * noise
    predicted = z0 if prediction == "sample" else alpha.sqrt() * noise - (1 - alpha).sqrt() * z0
    tiny._prediction = prediction
    torch.testing.assert_close(tiny.as_noise(predicted, z, t), noise, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiny.as_noise(predicted, z, torch.tensor([t])), noise, atol=1e-5, rtol=1e-5)


def test_guidance_of_methods_gives_the_scheduler_what_the_network_predicts(parts):
    """SLD without strength and ESD's recorder are ordinary guidance, on v too."""
    from erasebench.methods.esd import Recorder
    from erasebench.methods.sld import SLD, SafetyGuidance

    model, sampler = loaded(parts, prediction_type="v_prediction"), Sampler("pndm", 4, 4.0)
    context = model.encode(PROMPTS)
    plain = model.latents(context, SEEDS, sampler)
    none = SLD(warmup=0, scale=0.0, threshold=0.0, momentum_scale=0.0, momentum=0.0)
    record = Recorder()
    for guidance in (SafetyGuidance(concept=model.encode(["x"]), sld=none), record):
        with model.changed(guidance=guidance):
            torch.testing.assert_close(model.latents(context, SEEDS, sampler), plain)
    first = record.states[0]
    torch.testing.assert_close(first.text, model.eps(first.z, first.t, first.context))
