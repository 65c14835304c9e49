"""What a base is: its configuration, its folder, its device, and what the packages are that all of it needs."""

import ast
import json
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import build_pipeline
from safetensors.torch import load_file, save_file

from erasebench.contracts import ErasebenchError, Sampler
from erasebench.model import bases
from erasebench.model.devices import check_device
from erasebench.model.model import Model
from erasebench.model.schedulers import SCHEDULERS
from erasebench.model.source import Source

UNET, VAE, TEXT, SCHEDULER = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)
INDEX = "model_index.json"


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return build_pipeline(tmp_path_factory.mktemp("xl") / "model", xl=True)


def copied(folder: Path, place: Path, **changes) -> Path:
    """A copy of a base whose files of JSON say something else; None takes an entry away."""
    shutil.copytree(folder, place)
    for name, entries in changes.items():
        content = json.loads((place / name).read_text()) | entries
        (place / name).write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))
    return place


@pytest.mark.parametrize(
    "file,entries,reason",
    [
        (UNET, {"in_channels": 9}, "9 input channels and 4 latent ones: an inpainting model, which does not draw from"),
        (UNET, {"in_channels": 5}, "5 input channels and 4 latent ones: a depth-to-image model"),
        (UNET, {"in_channels": 8}, "8 input channels and 4 latent ones: an image-to-image model"),
        (UNET, {"in_channels": 7}, "an upscaling model"),
        (UNET, {"in_channels": 3}, "another kind of model"),
        (UNET, {"in_channels": "4"}, "in_channels '4': a whole number above 0"),
        (UNET, {"out_channels": 8}, "8 output channels"),
        (UNET, {"class_embed_type": "timestep"}, "class_embed_type 'timestep': it needs a class beside the prompt"),
        (UNET, {"num_class_embeds": 1000}, "num_class_embeds 1000"),
        (UNET, {"encoder_hid_dim": 32}, "encoder_hid_dim 32"),
        (UNET, {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type 'image_proj'"),
        (UNET, {"time_cond_proj_dim": 256}, "a latent consistency model"),
        (UNET, {"attention_type": "gated"}, "GLIGEN"),
        (UNET, {"addition_embed_type": "text"}, "addition_embed_type 'text'"),
        (UNET, {"addition_embed_type": "text_time"}, "addition_embed_type 'text_time'"),
        (UNET, {"cross_attention_dim": 1024}, "width 1024, and text encoding of width 16"),
        (UNET, {"cross_attention_dim": [16, 32]}, r"width \[16, 32\]"),
        (UNET, {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}, "does not read text"),
        (UNET, {"sample_size": [8, 4]}, "not square"),
        (UNET, {"sample_size": 0}, "sample_size 0"),
        (UNET, {"sample_size": "4"}, "sample_size '4'"),
        (UNET, {"_class_name": "Kandinsky3UNet"}, "unet is a Kandinsky3UNet"),
        (VAE, {"latent_channels": 16}, "4 input channels and 16 latent ones"),
        (VAE, {"in_channels": 4}, "pictures have 3"),
        (VAE, {"scaling_factor": None}, "scaling_factor None"),
        (VAE, {"scaling_factor": 0}, "scaling_factor 0"),
        (VAE, {"scaling_factor": float("nan")}, "scaling_factor nan"),
        (VAE, {"shift_factor": 0.1159}, "shift_factor 0.1159: of a flow model"),
        (VAE, {"latents_mean": [0.0] * 4}, "StableDiffusionPipeline does not apply it"),
        (VAE, {"_class_name": "AutoencoderTiny"}, "vae is a AutoencoderTiny"),
        (TEXT, {"hidden_size": 32}, "width 16, and text encoding of width 32"),
        (TEXT, {"model_type": "t5"}, "text_encoder is a t5"),
        (TEXT, {"use_attention_mask": True}, "use_attention_mask"),
        (TEXT, {"max_position_embeddings": None}, "max_position_embeddings None"),
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow transformer: not supported yet"),
        (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "EDM"),
        (SCHEDULER, {"_class_name": "LCMScheduler"}, "LCMScheduler"),
        (SCHEDULER, {"prediction_type": "flow_prediction"}, "prediction type 'flow_prediction'"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "terminal SNR"),
        (SCHEDULER, {"timestep_spacing": "odd"}, "timestep_spacing 'odd'"),
        (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000"),
        (SCHEDULER, {"num_train_timesteps": None}, "num_train_timesteps None"),
        (SCHEDULER, {"beta_schedule": "odd"}, "diffusers cannot build"),
        (SCHEDULER, {"beta_end": 2.0}, "alphas_cumprod"),
        (INDEX, {"_class_name": "StableDiffusionInpaintPipeline"}, "StableDiffusionInpaintPipeline, an inpainting model"),
        (INDEX, {"_class_name": "FluxPipeline"}, "FluxPipeline, a flow transformer: not supported yet"),
        (INDEX, {"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3Pipeline, a flow transformer"),
        (INDEX, {"_class_name": "StableDiffusionImg2ImgPipeline"}, "image-to-image"),
        (INDEX, {"_class_name": "StableDiffusionControlNetPipeline"}, "a ControlNet"),
        (INDEX, {"_class_name": "AudioLDMPipeline"}, "AudioLDMPipeline, a model of sound"),
        (INDEX, {"_class_name": "KandinskyPipeline"}, "KandinskyPipeline, which is not supported"),
        (INDEX, {"_class_name": "absent"}, "model_index.json names None"),
        (INDEX, {"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder is a T5EncoderModel"),
        (INDEX, {"vae": [None, None]}, "names no vae"),
        (INDEX, {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "a text_encoder_2 in a StableDiffusionPipeline"),
    ],
)
def test_a_configuration_that_is_no_base_is_refused_by_what_it_is(tiny_folder, tmp_path, file, entries, reason):
    folder = copied(tiny_folder, tmp_path / "base", **{file: entries})
    with pytest.raises(ErasebenchError, match=reason) as error:
        Model.load(Source("m", folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    "file,entries,reason",
    [
        (UNET, {"addition_embed_type": None}, "SDXL's text_time"),
        (UNET, {"projection_class_embeddings_input_dim": 99}, "width 99, and 64"),
        (UNET, {"cross_attention_dim": 16}, "width 16, and text encoding of width 32"),
        ("text_encoder_2/config.json", {"hidden_size": 8}, "width 24"),
        ("text_encoder_2/config.json", {"projection_dim": 8}, "64, and 56"),
        (VAE, {"latents_mean": [0.0] * 4}, "one of latents_mean and latents_std"),
        (VAE, {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "a number for each latent channel"),
        (INDEX, {"text_encoder_2": [None, None]}, "names no text_encoder_2"),
        (INDEX, {"_class_name": "StableDiffusionPipeline"}, "names a text_encoder_2"),
    ],
)
def test_a_configuration_that_is_no_sdxl_is_refused(xl_folder, tmp_path, file, entries, reason):
    folder = copied(xl_folder, tmp_path / "base", **{file: entries})
    with pytest.raises(ErasebenchError, match=reason):
        Source("m", folder).check()


@pytest.mark.parametrize("file", [INDEX, UNET, VAE, TEXT, SCHEDULER])
@pytest.mark.parametrize("content,reason", [("{", "no JSON"), ("[1]", "holds a list"), ("", "no JSON"), (None, "missing")])
def test_a_broken_configuration_file_is_named(tiny_folder, tmp_path, file, content, reason):
    folder = copied(tiny_folder, tmp_path / "base")
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(ErasebenchError, match=rf"{Path(file).name}.*{reason}"):
        Source("m", folder).check()


@pytest.mark.parametrize(
    "file,entries",
    [
        (UNET, {"sample_size": [4, 4]}),
        (UNET, {"cross_attention_dim": [16, 16], "out_channels": "absent"}),
        (UNET, {"_diffusers_version": "0.9.0"}),
        (VAE, {"shift_factor": 0.0, "scaling_factor": "absent"}),
        (TEXT, {"return_dict": False}),
        (SCHEDULER, {"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "absent"}),
        (SCHEDULER, {"trained_betas": [0.001 + i * 1e-5 for i in range(1000)]}),
        (SCHEDULER, {"steps_offset": 0, "clip_sample": True, "timestep_spacing": "trailing"}),
        (SCHEDULER, {"set_alpha_to_one": True, "num_train_timesteps": 500}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 20}),
    ],
)
def test_what_diffusers_reads_is_read_alike(tiny_folder, tmp_path, file, entries):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = copied(tiny_folder, tmp_path / "base", **{file: entries})
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(1)
    square = {"height": 16, "width": 16}
    theirs = pipeline("a cat", generator=generator, num_inference_steps=3, guidance_scale=4.0, output_type="np", **square)
    ours = Model.load(Source("m", folder)).sample(["a cat"], [1], Sampler("ddim", 3, 4.0)).images
    assert (torch.from_numpy(theirs.images * 255).round() - ours).abs().max() <= 1


def test_a_base_of_before_diffusers_0_9_draws_at_64_latents_as_diffusers_does(tiny_folder, tmp_path):
    old = copied(tiny_folder, tmp_path / "old", **{UNET: {"_diffusers_version": "0.6.0", "sample_size": 32}})
    assert Model.load(Source("m", old)).latent_shape() == (4, 64, 64)


@pytest.mark.parametrize("size", [0, -4, 15, 63, 10**9])
def test_sizes_that_the_base_cannot_draw_are_refused(tiny, size):
    with pytest.raises(ErasebenchError, match=f"sampler.size={size}: a multiple of 4 of at most 128"):
        tiny.check_sampler(Sampler("ddim", 3, 4.0, size))
    assert tiny.latent_shape(32) == (4, 8, 8)


def test_without_a_sample_size_one_must_be_given(tiny_folder, tmp_path):
    model = Model.load(Source("m", copied(tiny_folder, tmp_path / "base", **{UNET: {"sample_size": None}})))
    with pytest.raises(ErasebenchError, match="names no sample_size: give sampler.size="):
        model.check_sampler(Sampler("ddim", 3, 4.0))
    model.check_sampler(Sampler("ddim", 3, 4.0, 16))


@pytest.mark.parametrize("entries", [{"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [0.5, 2.0, 1.5, 0.8]}, {}])
@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_reads_latent_means_empty_prompts_and_padding_as_diffusers_does(xl_folder, tmp_path, entries, zeros):
    from diffusers import StableDiffusionXLPipeline

    changes = {VAE: entries, INDEX: {"force_zeros_for_empty_prompt": zeros}, SCHEDULER: {"steps_offset": 0}}
    folder = copied(xl_folder, tmp_path / "base", **changes)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    # with zeros an empty negative prompt is one that was not given
    theirs = pipeline("a cat", generator=generator, num_inference_steps=3, guidance_scale=4.0, output_type="np").images
    model = Model.load(Source("m", folder))
    ours = model.sample(["a cat"], [1], Sampler("ddim", 3, 4.0)).images
    assert (torch.from_numpy(theirs * 255).round() - ours).abs().max() <= 1
    picture = torch.randint(0, 255, (1, 16, 16, 3), dtype=torch.uint8)
    z = model.posterior(picture)[0]
    decoded = model.vae.config.scaling_factor
    mean, std = (torch.tensor(entries.get(k, [d] * 4)).view(4, 1, 1) for k, d in (("latents_mean", 0.0), ("latents_std", 1.0)))
    raw = model.vae.encode(picture.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(z, (raw - mean) / std * decoded, atol=1e-4, rtol=1e-4)


def renamed(folder: Path, variant: str) -> Path:
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    return folder


def sharded(folder: Path, variant: str | None = None) -> Path:
    """The same base with its weights in several files and an index, as diffusers and transformers write them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    for part, kind in {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}.items():
        module = kind.from_pretrained(folder / part)
        next((folder / part).glob("*.safetensors")).unlink()
        module.save_pretrained(folder / part, max_shard_size="20KB", variant=variant)
        assert len(list((folder / part).glob("*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize("layout", ["fp16", "non_ema", "bf16", "sharded", "sharded fp16"])
def test_folders_of_one_variant_and_of_shards_are_read(tiny_folder, tmp_path, layout):
    folder = copied(tiny_folder, tmp_path / "base")
    whole = Model.load(Source("m", folder)).sample(["a cat"], [1], Sampler("ddim", 2, 4.0)).images
    first = Source("m", folder).identity()
    if layout.startswith("sharded"):
        sharded(folder, "fp16" if "fp16" in layout else None)
    else:
        renamed(folder, layout)
    source = Source("m", folder)
    assert torch.equal(Model.load(source).sample(["a cat"], [1], Sampler("ddim", 2, 4.0)).images, whole)
    before = source.identity()
    assert before != first
    if "fp16" in layout:  # a file that is not read is no part of what it is
        save_file({"x": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
        assert source.identity() == before
    shard = max((folder / "unet").glob("*.safetensors"), key=lambda f: f.stat().st_size)
    save_file({k: v + 1 for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert source.identity() != before


def test_full_weights_are_read_where_a_variant_is_there_too(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "base")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v * 0 for k, v in load_file(file).items()}, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert Model.load(Source("m", folder)).weight("unet.conv_in.weight").abs().sum() > 0


def pickled(folder):
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def pointer(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def of_no_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def ambiguous(folder):
    file = renamed(folder, "ema") / "unet" / "diffusion_pytorch_model.ema.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model.non_ema.safetensors"))


def with_more(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "adapter.weight": torch.zeros(2)}, file, metadata={"format": "pt"})


def misshapen(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "conv_in.weight": torch.zeros(2)}, file, metadata={"format": "pt"})


def of_many_words(folder):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.add_tokens([f"<{i}>" for i in range(9)]) == 9
    tokenizer.save_pretrained(folder / "tokenizer")


def without_a_scheduler(folder):
    shutil.rmtree(folder / "scheduler")


def of_flux(folder):
    (folder / "unet").rename(folder / "transformer")
    (folder / INDEX).write_text(json.dumps({"_class_name": "FluxPipeline"}))


def emptied(folder, **content):
    shutil.rmtree(folder)
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    "damage,reason",
    [
        (pickled, "pickled weights .*from_pretrained"),
        (pointer, "a pointer of Git LFS"),
        (of_no_weights, "has no weights: diffusion_pytorch_model.safetensors is needed"),
        (ambiguous, "holds the variants ema, non_ema"),
        (with_more, "1 weights that UNet2DConditionModel has no place for, e.g. adapter.weight"),
        (misshapen, "misshapen|cannot load model"),
        (of_many_words, "tokenizer of .* words, and a text encoder of"),
        (without_a_scheduler, "it has no scheduler folder"),
        (of_flux, "it is a FluxPipeline, a flow transformer: not supported yet"),
        (emptied, "it has no unet, vae"),
        (lambda f: emptied(f, **{"adapter_config.json": "{}"}), "it is a LoRA"),
        (lambda f: emptied(f, **{"pytorch_lora_weights.safetensors": ""}), "it is a LoRA"),
        (lambda f: emptied(f, **{"config.json": '{"_class_name": "ControlNetModel"}'}), "ControlNetModel, a ControlNet"),
        (lambda f: emptied(f, **{"config.json": '{"architectures": ["CLIPTextModel"]}'}), "a text encoder alone"),
        (lambda f: (shutil.rmtree(f), f.write_text("x")), "is a single file; a diffusers folder is needed: .*from_single_file"),
    ],
)
def test_folders_that_hold_no_base_say_what_they_hold(tiny_folder, tmp_path, damage, reason):
    damage(folder := copied(tiny_folder, tmp_path / "base"))
    with pytest.raises(ErasebenchError, match=reason) as error:
        Model.load(Source("m", folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key,kind", [("conditioner.embedders.1.x", "XL"), ("cond_stage_model.x", "")])
def test_a_single_file_is_converted_by_the_pipeline_that_it_is_of(tmp_path, key, kind):
    save_file({key: torch.zeros(1)}, file := tmp_path / "base.safetensors")
    with pytest.raises(ErasebenchError, match=rf"import StableDiffusion{kind}Pipeline as P; P.from_single_file\('{file}'\)"):
        Source("m", file).check()


@pytest.mark.parametrize("dtype", ["fp16", "half", "bf16", "torch.float16", "double", "banana", 16, None])
def test_number_formats_have_one_name(tiny_folder, dtype):
    with pytest.raises(ErasebenchError, match=f"model.dtype={dtype}: choose from float32, float16, bfloat16"):
        Model.load(Source("m", tiny_folder, dtype=dtype))


@pytest.mark.parametrize(
    "device,reason",
    [
        ("cuda", "device=cuda: no GPU here"),
        ("cuda:7", "device=cuda:7: no GPU here"),
        ("mps", "device=mps: no GPU here of Apple's"),
        *((name, "choose cpu, cuda, cuda:<number> or mps") for name in ("banana", "7", "", "cpu:1", "cuda:", "cuda:-1", "meta")),
    ],
)
def test_devices_that_are_not_there(monkeypatch, device, reason):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ErasebenchError, match=reason):
        check_device(device)


def test_a_gpu_beyond_the_last_and_one_that_cannot_be_used(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ErasebenchError, match="device=cuda:7: 2 GPUs here, the last is cuda:1"):
        check_device("cuda:7")

    def taken(*shape, device):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nmore")

    monkeypatch.setattr("torch.zeros", taken)
    with pytest.raises(ErasebenchError, match=r"device=cuda: the GPU cannot be used \(CUDA error: all .* busy\)"):
        check_device("cuda")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_sampler_draws_or_is_refused_in_one_line(tiny, name, prediction):
    tiny._prediction = prediction
    images = tiny.sample(["a cat"], [1], Sampler(name, 6, 4.0)).images
    assert images.float().std() > 0
    for steps in (1, 3, 1000, 1001, 5000):  # pndm needs four
        try:
            tiny.scheduler(Sampler(name, steps, 4.0))
        except ErasebenchError as error:
            assert str(steps) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name,steps", [("ddim", 600), ("lms", 350), ("dpmsolver", 500)])
def test_many_steps_that_would_begin_halfway_are_refused(tiny, name, steps):
    with pytest.raises(ErasebenchError, match=f"sampler.steps={steps}: {name} would begin at timestep .* with pure noise"):
        tiny.scheduler(Sampler(name, steps, 4.0))
    assert tiny.scheduler(Sampler(name, 200, 4.0)).timesteps.max() >= 800
    assert tiny.scheduler(Sampler("ddim", 500, 4.0)).timesteps.max() > 990


def test_every_import_has_a_dependency_or_an_extra():
    """A choice that is offered needs no package that nothing installs."""
    root = Path(bases.__file__).parents[2]
    found = {}
    for folder in ("erasebench", "methods", "evaluators"):
        for file in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                found |= {name.partition(".")[0]: file for name in names}
    needs = [*(metadata.requires("erasebench") or ())] + re.findall(r'"([\w.-]+)[\[><=]', (root / "pyproject.toml").read_text())
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in needs}
    # packages that others of ours always bring, by what they are called
    brought = {"numpy": "torch", "yaml": "hydra-core", "omegaconf": "hydra-core", "huggingface_hub": "diffusers"}
    brought |= {"torchvision": "open-clip-torch", "submitit": "hydra-submitit-launcher", "hydra_plugins": "hydra-core"}
    brought |= {"fsspec": "torch", "onnxruntime": "nudenet", "cv2": "nudenet", "timm": "open-clip-torch"}
    brought |= {"tokenizers": "transformers", "requests": "wandb"}
    own_way = {"facenet_pytorch"}  # its pins are stale: the message where it is missing says how to install it
    own = {"erasebench", "methods", "evaluators", *own_way, *sys.stdlib_module_names}
    distributions = metadata.packages_distributions()
    for name, file in found.items():
        if name in own:
            continue
        provided = {d.lower().replace("_", "-") for d in distributions.get(name, [name])} | {brought.get(name, "")}
        assert provided & declared, f"{file.name} imports {name}, which nothing in pyproject.toml installs"
    assert {"scipy"} <= declared  # diffusers imports it for the lms sampler, itself optional there
