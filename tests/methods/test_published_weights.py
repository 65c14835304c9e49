"""Every layout in which the field publishes weights is read to the last digit, or refused with its kind; nothing in between."""

import json
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_pipeline
from erasebench.methods.checkpoint import Checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save_file as save_contiguous

from erasebench.contracts import Brief, ErasebenchError
from erasebench.model.model import Model
from erasebench.model.source import Source
from erasebench.toolbox import adapters, layouts, published_weights


@pytest.fixture(scope="module")
def base(tiny_folder):
    return Model.load(Source("tiny", tiny_folder))


def save_file(tensors, path, metadata=None):
    save_contiguous({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def bare(name):
    """A weight's name without its part; a text encoder's as transformers 5 has it."""
    return layouts.plain(name).partition(".")[2]


# layouts of state dicts: a random change of random layers, written and read


def prefixed(prefix, text="text_encoder."):
    return lambda base, w: {(prefix if n.startswith("unet.") else text) + bare(n): t for n, t in w.items()}


def original(base, w, prefix="model.diffusion_model."):
    theirs = {ours: key for key, ours in layouts.compvis({bare(n) for n in base.names(r"^unet\.")}).items()}
    text = "cond_stage_model.transformer.text_model."
    return {prefix + theirs[bare(n)] if n.startswith("unet.") else text + bare(n): t for n, t in w.items()}


def per_module(base, w):
    made = {}
    for name, tensor in w.items():
        module, _, leaf = name.rpartition(".")
        made.setdefault(module, {})[leaf] = tensor
    return made


def per_part(base, w):
    made = {"unet": {}, "text_encoder": {}}
    for name, tensor in w.items():
        made[name.partition(".")[0]][bare(name)] = tensor
    return {part: tensors for part, tensors in made.items() if tensors} | {"modifier_token": {}, "epoch": 1}


LAYOUTS = {
    "diffusers": prefixed(""),
    "parts": prefixed("unet."),
    "text_model": prefixed("", "text_model."),
    "data-parallel": prefixed("module.", "module."),
    "compiled": prefixed("_orig_mod.", "text_encoder._orig_mod."),
    "compiled in parallel": prefixed("module._orig_mod.unet.", "_orig_mod.module.text_encoder.text_model."),
    "peft": prefixed("base_model.model.unet.", "text_encoder.base_model.model."),
    "model.unet": prefixed("model.unet.", "model.text_encoder."),
    "unet_model": prefixed("unet_model.", "_forward_module.text_encoder."),
    "deepspeed": prefixed("_forward_module.module.", "_forward_module.text_encoder."),
    "peft base layers": lambda base, w: {n.replace(".to_k.", ".to_k.base_layer."): t for n, t in w.items()},
    "CompVis": original,
    "CompVis without its prefix": lambda base, w: original(base, w, ""),
    "CompVis in parallel": lambda base, w: original(base, w, "module.model.diffusion_model."),
    "CompVis of diffusion_model": lambda base, w: original(base, w, "diffusion_model."),
    "per module": per_module,
    "per part": per_part,
    "per part and module": lambda base, w: {k: per_module(base, v) for k, v in per_part(base, w).items() if k in layouts.PARTS},
    **{
        name: lambda base, w, name=name: {name: prefixed("")(base, w), "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}
        for name in ("state_dict", "model", "model_state_dict", "module", "params", "weights", "net", "network", "student")
    },
}  # fmt: skip


def changes(base, seed, only=""):
    """Every weight of some random kinds of layer, changed at random."""
    chosen, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    names = base.names(only)
    ends = sorted({".".join(n.split(".")[-3:]) for n in names if ".norm" not in n})
    ends = tuple(chosen.sample(ends, min(len(ends), 4)))
    return {
        n: base.weight(n) + torch.randn(base.weight(n).shape, generator=generator) / 9
        for n in names
        if n.endswith(ends)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_change_is_read_from_every_layout(base, tmp_path, layout, seed):
    weights = changes(base, seed) if "peft base" not in layout else changes(base, seed, r"attn\d\.to_k\.weight$")
    state = LAYOUTS[layout](base, weights)
    torch.save(state, path := tmp_path / "model.pt")
    if all(isinstance(t, torch.Tensor) for t in state.values()):
        save_file(state, path := tmp_path / "model.safetensors")
    read = published_weights.weights_of(path, base, partial=True)
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(read[name], tensor, rtol=1e-6, atol=1e-6)


SELECTIONS = {  # ESD's train methods, and others'
    "xattn": lambda n: "attn2" in n and "norm" not in n,
    "xattn with norms": lambda n: "attn2" in n or "norm2" in n,
    "noxattn": lambda n: "attn2" not in n and "norm" not in n,
    "noxattn of CompVis": lambda n: not any(k in n for k in ("attn2", "conv_out", "conv_norm_out", "time_emb")),
    "selfattn": lambda n: "attn1" in n,
    "strict": lambda n: "attn2.to_k" in n or "attn2.to_v" in n,
    "full": lambda n: True,
    "convolutions": lambda n: "conv" in n,
}


@pytest.mark.parametrize("chosen", SELECTIONS)
@pytest.mark.parametrize("layout", ["diffusers", "CompVis"])
def test_whole_kinds_of_layer_are_read_and_a_missing_block_is_refused(base, tmp_path, chosen, layout):
    weights = {n: base.weight(n) + 1 for n in base.names(r"^unet\.") if SELECTIONS[chosen](n.removeprefix("unet."))}
    save_file(LAYOUTS[layout](base, weights), tmp_path / "whole.safetensors")
    assert published_weights.weights_of(tmp_path / "whole.safetensors", base).keys() == weights.keys()
    for block in ("up_blocks.1", "mid_block"):
        less = {n: t for n, t in weights.items() if f"{block}." not in n}
        if chosen == "convolutions" and block == "mid_block":
            less = {n: t for n, t in weights.items() if n != "unet.mid_block.resnets.0.conv1.bias"}
        save_file(LAYOUTS[layout](base, less), tmp_path / "less.safetensors")
        with pytest.raises(ErasebenchError, match="absent whose like are there"):
            published_weights.weights_of(tmp_path / "less.safetensors", base)


@pytest.mark.parametrize("blocks", [(3, 2), (4, 2), (3, 2, True)])
def test_the_names_of_compvis_are_those_of_diffusers_own_converter(blocks):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    levels, layers, *xl = blocks
    down = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
    more = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 32} if xl else {}
    more |= (
        {"addition_time_embed_dim": 4, "use_linear_projection": True, "transformer_layers_per_block": 2} if xl else {}
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8,) * levels,
        layers_per_block=layers,
        down_block_types=down[::-1] if xl else down,
        up_block_types=[kind.replace("Down", "Up") for kind in (down if xl else down[::-1])],
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )
    ours = set(unet.state_dict())
    theirs = layouts.compvis(ours)
    assert set(theirs.values()) == ours
    converted = convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": k for k in theirs}, dict(unet.config))
    assert {name: theirs[key] for name, key in converted.items()} == {name: name for name in ours}


# adapters, against peft and diffusers


def random_adapter(unet, config, folder, seed=0):
    """A folder as peft saves it, of an adapter with random values."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(unet, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            wide = "magnitude" in name
            parameter.data = (
                parameter.data * (1 + torch.rand_like(parameter)) if wide else torch.randn_like(parameter) / 9
            )
    adapted.save_pretrained(folder)


KV = ["to_k", "to_v"]
PEFT = {
    "alpha": {"lora_alpha": 8},
    "rslora": {"lora_alpha": 8, "use_rslora": True},
    "patterns": {"lora_alpha": 3, "rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_v": 9, r"mid_block.*to_k": 5}},
    "anchored": {"rank_pattern": {"^mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 1}},
    "dora": {"use_dora": True, "lora_alpha": 6},
    "dora of convolutions": {"use_dora": True, "target_modules": ["conv1", "to_q"]},
    "convolutions": {"target_modules": ["conv1", "conv_in", "proj_in", "to_out.0"], "lora_alpha": 2},
    "bias": {"bias": "lora_only", "target_modules": ["to_out.0"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["to_out.0", "conv1"], "lora_alpha": 8},
    "saved modules": {"modules_to_save": ["conv_out"]},
    "transposed": {"fan_in_fan_out": True},
    "default strength": {"lora_alpha": None},
}  # fmt: skip


@pytest.mark.parametrize("form", PEFT)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_folder_is_what_peft_makes_of_it(base, tiny_folder, tmp_path, form):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, PeftModel

    unet = lambda: UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet").float()
    options = {"r": 4, "lora_alpha": 4, "target_modules": KV, **PEFT[form]}
    strength = options.pop("lora_alpha") or 8
    random_adapter(unet(), LoraConfig(lora_alpha=strength, **options), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    if form == "default strength":
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "lora_alpha"}))
    theirs = PeftModel.from_pretrained(unet(), tmp_path / "adapter").merge_and_unload().state_dict()
    for path in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        ours = published_weights.weights_of(path, base)
        changed = {f"unet.{n}" for n, t in theirs.items() if not torch.equal(t, base.weight(f"unet.{n}"))}
        assert changed and changed <= ours.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name.removeprefix("unet.")], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "form", ["old", "metadata", "rslora metadata", "kohya", "kohya of CompVis", "text", "convolution"]
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_file_is_what_diffusers_makes_of_it(base, tiny_folder, tmp_path, form):
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(1)
    pattern = {"text": r"^text_encoder.*(q_proj|fc1)\.weight$", "convolution": r"^unet.*conv1\.weight$"}
    state, metadata, like = {}, None, {}
    spelt = {ours: key for key, ours in layouts.compvis({bare(n) for n in base.names(r"^unet\.")}).items()}
    for name in base.names(pattern.get(form, r"^unet.*attn2\.to_(k|out\.0)\.weight$")):
        weight, module = base.weight(name), layouts.plain(name).removesuffix(".weight")
        down, up = torch.randn(3, *weight.shape[1:]) / 9, torch.randn(len(weight), 3, *[1] * (weight.ndim - 2)) / 9
        ends = ("lora_A.weight", "lora_B.weight")
        if form == "old":
            module = module.replace("to_k", "processor.to_k_lora").replace("to_out.0", "processor.to_out_lora")
            ends = ("down.weight", "up.weight")
        if form.startswith("kohya"):
            called = (
                spelt[f"{bare(name)}"].removesuffix(".weight") if "CompVis" in form else module.removeprefix("unet.")
            )
            module, ends = "lora_unet_" + called.replace(".", "_"), ("lora_down.weight", "lora_up.weight")
            known = "lora_unet_" + bare(name).removesuffix(".weight").replace(
                ".", "_"
            )  # CompVis' diffusers has for SDXL alone
            like |= {f"{known}.{ends[0]}": down, f"{known}.{ends[1]}": up, f"{known}.alpha": torch.tensor(1.5)}
            state[f"{module}.alpha"] = torch.tensor(1.5)
        state |= {f"{module}.{ends[0]}": down, f"{module}.{ends[1]}": up}
    if "metadata" in form:
        values = {
            "r": 3,
            "lora_alpha": 12,
            "use_rslora": form.startswith("rslora"),
            "target_modules": ["to_k", "to_out.0"],
        }
        metadata = {"format": "pt", adapters.METADATA: json.dumps({f"unet.{k}": v for k, v in values.items()})}
    save_file(state, tmp_path / "lora.safetensors", metadata)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    save_file(like or state, tmp_path / "like.safetensors", metadata)
    pipeline.load_lora_weights(tmp_path, weight_name="like.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    ours = published_weights.weights_of(tmp_path / "lora.safetensors", base)
    assert ours
    for name, tensor in ours.items():
        theirs = dict(getattr(pipeline, name.partition(".")[0]).named_parameters())[name.partition(".")[2]]
        assert not torch.equal(theirs, base.weight(name))
        torch.testing.assert_close(tensor, theirs.data, rtol=1e-4, atol=1e-5)


def test_a_convolution_in_three_steps_is_their_product(base, tmp_path):
    name = base.names(r"mid_block.*conv1\.weight$")[0]
    out, width = base.weight(name).shape[:2]
    up, mid, down = torch.randn(out, 2, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(2, width, 1, 1)
    module = "lora_unet_" + bare(name).removesuffix(".weight").replace(".", "_")
    halves = {"lora_up": up, "lora_mid": mid, "lora_down": down}
    state = {f"{module}.{half}.weight": tensor for half, tensor in halves.items()} | {
        f"{module}.alpha": torch.tensor(2)
    }
    save_file(state, tmp_path / "locon.safetensors")
    image = torch.randn(1, width, 5, 5)
    through = image
    for tensor in (down, mid, up):
        through = torch.nn.functional.conv2d(through, tensor, padding=tensor.shape[-1] // 2)
    added = published_weights.weights_of(tmp_path / "locon.safetensors", base)[name] - base.weight(name)
    torch.testing.assert_close(torch.nn.functional.conv2d(image, added, padding=1), through, rtol=1e-3, atol=1e-3)


def a_lora(base, rank=2):
    """Keys as peft writes them."""
    state = {}
    for name in base.names(r"^unet.*attn2\.to_k\.weight$"):
        out, width = base.weight(name).shape
        module = "base_model.model." + bare(name).removesuffix(".weight")
        state |= {f"{module}.lora_A.weight": torch.ones(rank, width), f"{module}.lora_B.weight": torch.ones(out, rank)}
    return state


CONFIGS = {  # of adapter_config.json -> the line that is seen
    "peft_type": ({"peft_type": "LOHA"}, "of the kind LOHA"),
    "rank": ({"r": 8}, "says rank 8 of .*, its tensors have 2"),
    "base": ({"init_lora_weights": "pissa"}, "changes the base's weights too"),
    "replicated": ({"layer_replication": [[0, 2]]}, "layer_replication = .* not read"),
    "novel": ({"strength_of_tomorrow": 3}, "strength_of_tomorrow = 3, which is not read"),
    "word": ({"lora_alpha": "much"}, "no such value"),
    "dora": ({"use_dora": True}, "use_dora and the magnitudes"),
    "pattern": ({"alpha_pattern": {"(": 3}}, "no regular expression"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_setting_of_an_adapter_that_is_not_read_is_an_error(base, tmp_path, case):
    more, line = CONFIGS[case]
    save_file(a_lora(base), tmp_path / "adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | more))
    refused(base, tmp_path, line)
    config.write_text("{")
    refused(base, tmp_path, "adapter_config.json is no JSON")
    config.unlink()
    refused(base, tmp_path, "without adapter_config.json")


def refused(base, path, line, **options):
    """One clear line."""
    with pytest.raises(ErasebenchError, match=line) as caught:
        published_weights.weights_of(path, base, **options)
    assert "\n" not in str(caught.value)


KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONTRADICTIONS = {
    "alpha of nothing": ({f"{KEY}.alpha": torch.tensor(0.0)}, {}, "alpha of .* is not one number other than 0"),
    "alpha of two": ({f"{KEY}.alpha": torch.ones(2)}, {}, "alpha of .* is not one number"),
    "alpha in kohya's metadata": ({}, {"ss_network_alpha": "1", "ss_network_dim": "2"}, "has no .alpha beside it"),
    "metadata": ({}, {adapters.METADATA: "no"}, "is no JSON"),
    "metadata and alpha": ({f"{KEY}.alpha": torch.tensor(2.0)}, {adapters.METADATA: '{"lora_alpha": 1}'}, "alpha of .* is 2"),
    "metadata of another": ({}, {adapters.METADATA: '{"transformer.lora_alpha": 1}'}, "a part that is not read"),
    "metadata of the text": ({}, {adapters.METADATA: '{"text_encoder.lora_alpha": 1}'}, "says nothing of unet"),
    "LoHa": ({f"{KEY}.hada_w1_a": torch.ones(2, 2)}, {}, "LoHa, which is not read"),
    "LoKr": ({f"{KEY}.lokr_w1": torch.ones(2, 2)}, {}, "LoKr, which is not read"),
    "(IA)^3": ({f"{KEY}.on_input": torch.ones(1)}, {}, "IA.*, which is not read"),
    "DoRA": ({f"{KEY}.dora_scale": torch.ones(8, 1)}, {}, "dora_scale.*, which is not read"),
    "full": ({f"{KEY}.diff": torch.ones(8, 16)}, {}, "diff.*, which is not read"),
    "SDXL": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)}, {}, "of SDXL"),
    "integers": ({f"{KEY}.lora_up.weight": torch.ones(8, 2, dtype=torch.int8)}, {}, "int8: quantised"),
    "two in one": ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.cat.weight": torch.ones(2, 16)}, {}, "several adapters"),
    "nothing": ({f"{KEY}.lora_up.weight": torch.ones(8, 0), f"{KEY}.lora_down.weight": torch.ones(0, 16)}, {}, "is empty"),
    "a key": ({"novel.weight": torch.ones(2)}, {}, "is no key of a LoRA file"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_an_adapter_that_contradicts_itself_or_is_of_another_kind_is_refused(base, tmp_path, case):
    more, metadata, line = CONTRADICTIONS[case]
    state = {f"{KEY}.lora_down.weight": torch.ones(2, 16), f"{KEY}.lora_up.weight": torch.ones(8, 2)}
    save_file(state, tmp_path / "right.safetensors")
    assert len(published_weights.weights_of(tmp_path / "right.safetensors", base)) == 1
    save_file(state | more, tmp_path / "file.safetensors", metadata)
    refused(base, tmp_path / "file.safetensors", line)


# folders


def test_a_folder_of_several_models_is_refused_and_one_in_pieces_is_read(base, tmp_path):
    weights = {n: base.weight(n) + 1 for n in base.names(r"^unet.*attn2\.to_[kv]\.weight$")}
    half = len(weights) // 2
    put = lambda path, w: (path.parent.mkdir(exist_ok=True), save_file(prefixed("")(base, w), path))
    put(tmp_path / "two" / "cat.safetensors", weights)
    put(tmp_path / "two" / "dog.safetensors", dict(list(weights.items())[half:]))
    refused(base, tmp_path / "two", r"same weights \(cat.safetensors, dog.safetensors.*give one file")
    for number, part in enumerate((list(weights.items())[:half], list(weights.items())[half:]), 1):
        put(tmp_path / "shards" / f"model-0000{number}-of-00002.safetensors", dict(part))
    assert published_weights.weights_of(tmp_path / "shards", base).keys() == weights.keys()
    index = tmp_path / "shards" / "model.safetensors.index.json"
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index.write_text(json.dumps({"weight_map": {n: names[i >= half] for i, n in enumerate(weights)}}))
    assert published_weights.weights_of(tmp_path / "shards", base).keys() == weights.keys()
    (tmp_path / "shards" / names[0]).unlink()
    refused(base, tmp_path / "shards", f"index.json names {names[0]}, which is not there")
    index.unlink()
    refused(base, tmp_path / "shards", f"{names[0]} is not there, of 2 shards")
    torch.save({}, tmp_path / "two" / "optimizer.bin")
    (tmp_path / "two" / "dog.safetensors").rename(tmp_path / "two" / "cat.fp16.safetensors")
    remarks = {}
    assert published_weights.weights_of(tmp_path / "two", base, remarks=remarks).keys() == weights.keys()
    assert remarks["another number format of the same weights"] == ["cat.fp16.safetensors"]
    assert remarks["the state of a training"] == ["optimizer.bin"]
    torch.save(prefixed("")(base, weights), tmp_path / "two" / "dog.pt")
    refused(base, tmp_path / "two", "several models .*dog.pt")
    (tmp_path / "above").mkdir()
    (tmp_path / "shards").rename(tmp_path / "above" / "step-100")
    refused(base, tmp_path / "above", "give one of its folders: step-100")


def test_two_adapters_in_a_folder_and_one_beside_a_pipeline_are_refused(base, tiny_folder, tmp_path):
    state = {key.removeprefix("base_model.model."): t for key, t in a_lora(base).items()}
    (tmp_path / "spms").mkdir()
    for name in ("cat", "dog"):
        save_file(state, tmp_path / "spms" / f"{name}.safetensors")
    refused(base, tmp_path / "spms", "same weights .cat.safetensors, dog.safetensors")
    (tmp_path / "both" / "unet").mkdir(parents=True)
    unet = load_file(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(unet, tmp_path / "both" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "both" / "pytorch_lora_weights.safetensors")
    refused(base, tmp_path / "both", "pytorch_lora_weights.safetensors beside unet: give one of them")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_are_cast_and_what_is_lost_is_told(base, tmp_path, kind):
    weights = {n: base.weight(n).double() + 1 / 3 for n in base.names(r"^unet.*attn2\.to_k\.weight$")}
    (tmp_path / "unet").mkdir()
    save_file({bare(n): t.to(kind) for n, t in weights.items()}, tmp_path / "unet" / "model.fp16.safetensors")
    remarks = {}
    for name, tensor in published_weights.weights_of(tmp_path, base, remarks=remarks).items():
        torch.testing.assert_close(tensor, weights[name].to(kind).float(), rtol=1e-6, atol=1e-6)
    assert ("rounded from float64 to the base's float32" in remarks) == (kind == torch.float64)


def test_the_strength_beside_the_weights_is_part_of_what_a_fit_is_kept_by(base, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(a_lora(base), folder / "adapter_model.safetensors")
    bytes_alone = published_weights.content(folder)
    seen = {bytes_alone}
    for alpha in (2, 4):
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": alpha}))
        assert published_weights.content(folder) == published_weights.content(folder / "adapter_model.safetensors")
        seen.add(published_weights.content(folder))
    assert len(seen) == 3
    folder.rename(tmp_path / "renamed")
    assert published_weights.content(tmp_path / "renamed") in seen


def test_the_log_tells_how_much_was_given_and_what_was_left_out(tmp_path, tiny, caplog):
    state = {bare(n): tiny.weight(n) + 1 for n in tiny.names(r"attn2\.to_k\.weight$")}
    torch.save({"model": state | {"first_stage_model.x": torch.ones(1)}, "epoch": 3}, tmp_path / "a.pt")
    with caplog.at_level("INFO"):
        Checkpoint(str(tmp_path / "a.pt")).fit(tiny, Brief(()), tmp_path, 0)
    assert f"{len(state)} of {len(tiny.names(''))} weights given" in caplog.text
    assert "the VAE, the base's is used: 1 keys" in caplog.text and "beside the weights: 1 keys" in caplog.text
    assert "e.g. epoch" in caplog.text


# refusals


def odd_states(base):
    name = bare(base.names(r"attn2\.to_k\.weight$")[0])
    weight = base.weight(f"unet.{name}")
    one = lambda tensor: {name: tensor}
    return {
        "int8": (one(weight.to(torch.int8)), "is int8: quantised weights, dequantise them first"),
        "bool": (one(weight > 0), "is bool: no number format of weights"),
        "complex": (one(weight.to(torch.complex64)), "is complex64: no number format of weights"),
        "float8": (one(weight.to(torch.float8_e4m3fn)), "float8_e4m3fn: quantised"),
        "beyond": (one(weight.double() * 1e300), "beyond the range of the base's float32"),
        "sparse": (one(weight.to_sparse()), "a sparse tensor|not a checkpoint"),
        "meta": (one(weight.to("meta")), "meta device"),
        "nested": (one(torch.nested.nested_tensor([weight, weight])), "a nested tensor|not a checkpoint"),
        "torch's quantised": (one(torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)), "qint8: quantised"),
        "numpy": (one(weight.numpy()), "numpy arrays, not tensors|not a state dict"),
        "expanded": (one(torch.zeros(1).expand(2**30)), "larger than any checkpoint of the base"),
        "empty": (one(torch.zeros(0)), r"is \(0,\), the base's is"),
        "nothing": ({}, "it is empty"),
        "two models": ({"model": one(weight), "ema_model": one(weight + 1)}, r"several state dicts \(model, ema_model\)"),
        "in lists": ({"weights": [weight], "epoch": 1}, r"at its top are 'weights' \(list\), 'epoch' \(int\)"),
        "numbers for names": ({768: weight}, "a key is 768"),
        "itself in itself": ({}, "not a state dict"),
        "two spellings": ({name: weight, f"module.{name}": weight + 1}, "two keys for"),
        "bitsandbytes": (one(weight) | {f"{name}.absmax": weight}, "quantised by bitsandbytes: dequantise"),
        "ControlNet": ({"controlnet_cond_embedding.conv_in.weight": weight}, "a ControlNet"),
        "VAE": ({"encoder.conv_in.weight": weight, "quant_conv.weight": weight}, "a VAE"),
        "VAE of CompVis": ({"first_stage_model.encoder.conv_in.weight": weight}, "only the VAE"),
        "averages alone": ({"model_ema.decay": weight}, "only a moving average"),
        "embedding": ({"string_to_param": {"*": weight}, "name": "cat"}, "an embedding of a new word"),
        "learned embedding": ({"<cat>": weight[0]}, "an embedding of a new word"),
        "optimizer": ({"state": {0: {"exp_avg": weight}}, "param_groups": []}, "the state of an optimizer"),
        "OpenCLIP": ({"cond_stage_model.model.ln_final.weight": weight}, "an OpenCLIP text encoder"),
        "SDXL": ({"conditioner.embedders.0.x": weight, "model.diffusion_model.time_embed.0.weight": weight}, "SDXL|architecture"),
        "Flux": ({"double_blocks.0.img_attn.qkv.weight": weight}, "a Flux transformer"),
    }  # fmt: skip


@pytest.mark.parametrize("case", [
    "int8", "bool", "complex", "float8", "beyond", "sparse", "meta", "nested", "torch's quantised", "numpy", "expanded",
    "empty", "nothing", "two models", "in lists", "numbers for names", "itself in itself", "two spellings", "bitsandbytes",
    "ControlNet", "VAE", "VAE of CompVis", "averages alone", "embedding", "learned embedding", "optimizer", "OpenCLIP",
    "SDXL", "Flux",
])  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_kind(base, tmp_path, case):
    state, line = odd_states(base)[case]
    if case == "itself in itself":
        state["state_dict"] = state
    torch.save(state, tmp_path / "file.pt")
    refused(base, tmp_path / "file.pt", line)


FILES = {
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer"),
    "page.safetensors": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    "page.pt": (b"<html>", "a web page"),
    "file.bin": (b"GGUF\x03\x00\x00\x00", "a GGUF file: quantised"),
    "file.onnx": (b"\x08\x07\x12\x07pytorch", "an ONNX graph"),
    "onnx.bin": (b"\x08\x07\x12\x07pytorch", "an ONNX graph"),
    "file.ckpt": (b"\x1f\x8b\x08\x00", "a compressed archive"),
    "file.npz": (b"PK", "numpy arrays"),
    "index.json": (b"{}", "no weights; give the weight file or its folder"),
    "cut.safetensors": (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "a broken one"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_refused_with_its_kind(base, tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name][0])
    refused(base, tmp_path / name, FILES[name][1])


def test_a_name_that_stands_twice_in_a_header_is_refused(base, tmp_path):
    entry = '"conv_in.bias":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = ("{" + entry % (0, 4) + "," + entry % (0, 4) + "}").encode()
    (tmp_path / "twice.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(base, tmp_path / "twice.safetensors", "conv_in.bias stands twice")


def test_a_program_is_refused_as_one(base, tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "program.pt")
    refused(base, tmp_path / "program.pt", "a TorchScript archive, a program")


def test_what_unpacks_to_more_than_a_checkpoint_is_refused_unread(base, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**22))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was read"))
    refused(base, tmp_path / "packed.pt", "bytes that unpack to 4,194,304")
    torch.save({"conv_in.bias": torch.zeros(999)}, tmp_path / "large.pt")
    for name in ("large.pt", "large.safetensors"):
        save_file({"conv_in.bias": torch.zeros(999)}, tmp_path / "large.safetensors")
        with pytest.raises(ErasebenchError, match="more than any checkpoint of the base has"):
            published_weights.read(tmp_path / name, limit=1000)


# fuzz


def seeds(base, folder):
    """Small right files of every kind, to be damaged."""
    state = {bare(n): base.weight(n) for n in base.names(r"attn2\.to_k\.weight$")[:1]}
    save_file(state, folder / "safe.safetensors")
    torch.save({"model": state, "epoch": 1}, folder / "zip.pt")
    torch.save(state, folder / "legacy.ckpt", _use_new_zipfile_serialization=False)
    save_file(a_lora(base), folder / "lora.safetensors", {adapters.METADATA: json.dumps({"lora_alpha": 4, "r": 2})})
    return [(f.name, f.read_bytes()) for f in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def damaged(base, tmp_path_factory):
    return seeds(base, tmp_path_factory.mktemp("right")), tmp_path_factory.mktemp("damaged")


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_a_damaged_file_is_a_value_or_one_clear_line(base, damaged, data):
    files, folder = damaged
    name, content = data.draw(st.sampled_from(files))
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(
            st.integers(0, len(content) - 1) if data.draw(st.booleans()) else st.integers(0, min(700, len(content) - 1))
        )
        match data.draw(st.sampled_from(["byte", "cut", "double"])):
            case "byte":
                content[place] = data.draw(st.integers(0, 255))
            case "cut":
                del content[place : place + data.draw(st.integers(1, 64))]
            case _:
                content[place:place] = content[place : place + 16]
        content = content or bytearray(b" ")
    path = Path(folder) / name
    path.write_bytes(content)
    try:
        for tensor in published_weights.weights_of(path, base, partial=True).values():
            assert torch.isfinite(tensor).all()
    except ErasebenchError as error:
        assert "\n" not in str(error)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4) | st.just("a tensor"),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["model", "state_dict", "ema", "unet", "optimizer", "weight", "x.y", "conv_in.bias", ""]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(held=values)
def test_whatever_a_pickle_holds_is_a_value_or_one_clear_line(base, damaged, held):
    def filled(value):
        if isinstance(value, dict):
            return {k: filled(v) for k, v in value.items()}
        if isinstance(value, list):
            return [filled(v) for v in value]
        return torch.ones(8) if value == "a tensor" else value

    path = Path(damaged[1]) / "held.pt"
    torch.save(filled(held), path)
    try:
        published_weights.weights_of(path, base)
    except ErasebenchError as error:
        assert "\n" not in str(error)


def test_a_second_text_encoder_that_was_changed_is_refused(tmp_path):
    folder = build_pipeline(tmp_path / "xl", xl=True)
    model = Model.load(Source("xl", folder))
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: t + (n == "conv_in.bias") for n, t in load_file(unet).items()}, unet)
    assert published_weights.weights_of(folder, model)
    second = folder / "text_encoder_2" / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(second).items()}, second)
    refused(model, folder, "second text encoder is not read")


def test_numpy_is_told_from_code(base, tmp_path):
    import pickle

    (tmp_path / "arrays.bin").write_bytes(pickle.dumps({"conv_in.bias": np.zeros(8)}))
    refused(base, tmp_path / "arrays.bin", "numpy arrays, not tensors|not a checkpoint")
