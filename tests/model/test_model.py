"""The model's primitives against diffusers' own pipeline, and its openings."""

import pytest
import torch
from conftest import build_pipeline
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

from erasebench.contracts import ErasebenchError, Sampler
from erasebench.model import guidance, reuse
from erasebench.model.context import join
from erasebench.model.guidance import ClassifierFree
from erasebench.model.model import Model
from erasebench.model.source import Source

PROMPTS, SEEDS = ["a cat", "a dog on a mat", ""], [3, 1, 2]


def state_bytes(model: Model) -> dict[str, bytes]:
    return {n: p.data.numpy().tobytes() for n, p in model._parameters().items()}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name,guidance", [("ddim", 5.0), ("dpmsolver", 5.0), ("ddim", 1.0)])
def test_sampling_equals_the_diffusers_pipeline(tmp_path, prediction, name, guidance):
    import diffusers

    folder = build_pipeline(tmp_path / "model", prediction)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if name == "dpmsolver":
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(
        PROMPTS, generator=generators, num_inference_steps=6, guidance_scale=guidance, output_type="np"
    ).images
    ours = Model.load(Source("m", folder)).sample(PROMPTS, SEEDS, Sampler(name, 6, guidance)).images
    difference = (torch.from_numpy(theirs * 255).round() - ours).abs()
    assert difference.max() <= (0 if prediction == "epsilon" else 1)  # v is converted to eps before guidance
    assert (difference > 0).float().mean() < 0.01


def test_an_image_does_not_depend_on_its_neighbours(tiny):
    for part in (tiny.unet, tiny.vae, tiny.text_encoder):
        part.double()
    sampler = Sampler("ddim", 4, 5.0)
    together = tiny.sample(PROMPTS, SEEDS, sampler).images
    alone = torch.cat([tiny.sample([p], [s], sampler).images for p, s in zip(PROMPTS, SEEDS, strict=True)])
    assert torch.equal(together, alone)


def test_weights_come_back_bit_equal_and_the_teacher_is_the_base(tiny):
    before = state_bytes(tiny)
    names = tiny.names(r"attn2\.to_v\.weight$")
    z, context = tiny.noise([1]), tiny.encode(["a cat"])
    base = tiny.eps(z, 500, context)
    with tiny.changed(weights={name: tiny.weight(name) * 3 for name in names}):
        changed = tiny.eps(z, 500, context)
        with tiny.teacher():
            assert torch.equal(tiny.eps(z, 500, context), base)
        assert torch.equal(tiny.eps(z, 500, context), changed)
        assert not torch.allclose(changed, base)
    assert state_bytes(tiny) == before and not tiny.is_changed


def test_changes_nest_and_unwind_after_an_exception(tiny):
    before = state_bytes(tiny)
    name = tiny.names(r"attn2\.to_k\.weight$")[0]
    with pytest.raises(RuntimeError, match="inside"):  # noqa: SIM117
        with tiny.changed(weights={name: tiny.weight(name) + 1}):
            with tiny.changed(weights={name: tiny.weight(name) + 1}, guard=object()):
                with tiny.teacher():
                    assert tiny.weight(name).numpy().tobytes() == before[name] and tiny.guard is None
                raise RuntimeError("inside")
    assert state_bytes(tiny) == before and tiny.guard is None


def test_training_never_writes_to_the_base(tiny):
    before = state_bytes(tiny)
    with tiny.training(tiny.names(r"attn2")) as weights:
        optimiser = torch.optim.SGD(weights.values(), lr=1.0)
        tiny.eps(tiny.noise([0]), 10, tiny.encode(["a"])).square().mean().backward()
        optimiser.step()
        assert state_bytes(tiny) != before
    assert state_bytes(tiny) == before
    assert not any(p.requires_grad for p in tiny._parameters().values())


class Halved:
    """An attention processor that halves what another one returns."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, factor=0.5, **kwargs):
        return factor * self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


def test_attention_processors_open_and_receive_the_state(tiny):
    present = dict(tiny.unet.attn_processors)
    mine = {name: Halved(inner) for name, inner in present.items() if "attn2" in name}
    z, context = tiny.noise([1]), tiny.encode(["a cat"])
    base = tiny.eps(z, 500, context)
    with tiny.changed(processors=mine):
        assert not torch.allclose(tiny.eps(z, 500, context), base)
        assert torch.equal(tiny.eps(z, 500, context, {"attention": {"factor": 1.0}}), base)
    assert mine and tiny.unet.attn_processors == present
    assert torch.equal(tiny.eps(z, 500, context), base)


class Refuses:
    """A guard that refuses prompts holding a token, with a differentiable score."""

    threshold = 0.5

    def __init__(self, token):
        self.token = token

    def __call__(self, model, context):
        return (context.ids == self.token).any(1).float() + 0 * context.hidden.sum((1, 2))


def test_a_guard_refuses_with_a_black_image_and_leaves_the_others_alone(tiny):
    sampler = Sampler("ddim", 3, 2.0)
    free = tiny.sample(PROMPTS, SEEDS, sampler)
    token = int(tiny.tokenize(["a dog on a mat"])[0, 2])  # the d, after BOS and a
    with tiny.changed(guard=Refuses(token)):
        guarded = tiny.sample(PROMPTS, SEEDS, sampler)
    assert not free.refused.any() and guarded.refused.tolist() == [False, True, False]
    assert guarded.images[1].sum() == 0
    assert (guarded.images[[0, 2]].int() - free.images[[0, 2]].int()).abs().max() <= 1


def test_a_swapped_text_encoder_is_used_and_put_back(tiny, tmp_path):
    other = Model.load(Source("other", build_pipeline(tmp_path / "other", seed=5))).text_encoder
    base = tiny.encode(["a cat"]).hidden
    with tiny.changed(text_encoder=other):
        inside = tiny.encode(["a cat"]).hidden
        with tiny.teacher():
            assert torch.equal(tiny.encode(["a cat"]).hidden, base)
    assert not torch.allclose(inside, base)
    assert torch.equal(tiny.encode(["a cat"]).hidden, base)


def test_encoding_is_the_same_from_text_ids_and_token_embeddings(tiny):
    ids = tiny.tokenize(["a cat", "a"])
    embeds = tiny.text_encoder.get_input_embeddings()(ids).detach().clone().requires_grad_(True)
    by_text, by_ids, by_embeds = (
        tiny.encode(["a cat", "a"]),
        tiny.encode(ids=ids),
        tiny.encode(ids=ids, token_embeds=embeds),
    )
    assert torch.equal(by_text.hidden, by_ids.hidden) and torch.equal(by_ids.hidden, by_embeds.hidden)
    assert by_text.ends.tolist() == [5, 2]  # byte tokens: BOS a c a t EOS
    state = tiny.begin(by_embeds, tiny.noise([1, 2]))
    tiny.guided_eps(tiny.noise([1, 2]), 500, by_embeds, 3.0, state).sum().backward()
    assert embeds.grad.abs().sum() > 0


def test_classifier_free_guidance_by_hand(tiny):
    z, context, free = tiny.noise([4]), tiny.encode(["cat"]), tiny.encode([""])
    text, none = tiny.eps(z, 700, context), tiny.eps(z, 700, free)
    guided = tiny.guided_eps(z, 700, context, 4.0, tiny.begin(context, z))
    torch.testing.assert_close(guided, none + 4 * (text - none), atol=1e-5, rtol=1e-5)
    other = tiny.encode(["dog"])
    with tiny.changed(guidance=ClassifierFree(negative=other)):
        against = tiny.guided_eps(z, 700, context, 4.0, tiny.begin(context, z))
    torch.testing.assert_close(against, tiny.eps(z, 700, other) * -3 + 4 * text, atol=1e-5, rtol=1e-5)
    assert join(context, other).hidden.shape[0] == 2


class WritesIntoKeys(AttnProcessor):
    """A rude processor: it changes the projected keys in place, as a method's might."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **keywords):
        attn.to_k(hidden_states if encoder_hidden_states is None else encoder_hidden_states).mul_(2)
        return super().__call__(attn, hidden_states, encoder_hidden_states, **keywords)


class AsksTheTeacher(ClassifierFree):
    """Guidance that moves between the changed weights and the base's in every step."""

    def __call__(self, model, z, t, context, scale, state):
        with model.teacher():
            base = model.eps(z, t, context)
        return base + super().__call__(model, z, t, context, scale, state)


@pytest.mark.parametrize("rude", [False, True])
def test_the_context_is_projected_once_in_a_trajectory_and_nothing_else_changes(tiny, monkeypatch, rude):
    calls = []
    plain = torch.nn.Linear.forward
    linears = [m for m in tiny.unet.modules() if isinstance(m, reuse.ContextLinear)]
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, x: (calls.append(1) if self in linears else None, plain(self, x))[1]
    )
    changes = {"weights": {n: tiny.weight(n) * 3 for n in tiny.names(r"attn2\.to_v\.weight$")}}
    if rude:
        names = [n for n in tiny.unet.attn_processors if "attn2" in n]
        changes |= {"processors": {n: WritesIntoKeys() for n in names}, "guidance": AsksTheTeacher()}
    sampler = Sampler("ddim", 6, 4.0)
    with tiny.changed(**changes):
        images = tiny.sample(PROMPTS, SEEDS, sampler).images
        count = len(calls)
        for module in (reuse, guidance):
            monkeypatch.setattr(module, "once", lambda what, make, *inputs: make())
        assert torch.equal(images, tiny.sample(PROMPTS, SEEDS, sampler).images)
    assert linears and len(calls) > count
    assert rude or count == len(linears)


def test_images_and_latents_have_the_same_scale(tiny):
    z = tiny.encode_images(torch.full((2, 16, 16, 3), 128, dtype=torch.uint8))
    assert z.shape == (2, *tiny.latent_shape()) and torch.equal(z[0], z[1])


def test_model_faults_are_one_clear_line(tmp_path):
    with pytest.raises(ErasebenchError, match="does not exist"):
        Model.load(Source("m", tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ErasebenchError, match="not a Stable Diffusion pipeline: it has no unet"):
        Model.load(Source("m", tmp_path / "empty"))
    folder = build_pipeline(tmp_path / "cut")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ErasebenchError, match="cannot load model"):
        Model.load(Source("m", folder))


def test_nan_and_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = build_pipeline(tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * float("nan")}, file, metadata={"format": "pt"})
    with pytest.raises(ErasebenchError, match="not finite"):
        Model.load(Source("m", folder))
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(ErasebenchError, match="missing"):
        Model.load(Source("m", folder))


def test_unknown_openings_and_shapes_are_refused(tiny):
    name = tiny.names("attn2")[0]
    for change in (
        {"weights": {"unet.nothing": torch.zeros(1)}},
        {"weights": {name: torch.zeros(1)}},
        {"processors": {"nothing": None}},
        {"scheduler": None},
    ):
        with pytest.raises(ErasebenchError), tiny.changed(**change):
            pass
    assert not tiny.is_changed
