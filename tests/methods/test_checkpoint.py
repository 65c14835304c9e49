"""Somebody else's erased model, in every form in which they are published; and what is no such thing."""

import json
import os
import pickle
import re

import pytest
import torch
from conftest import build_pipeline
from erasebench.methods.checkpoint import Checkpoint
from safetensors.torch import load_file, save_file

from erasebench.contracts import Brief, ErasebenchError
from erasebench.toolbox import published_weights

VALUES = "attn2.to_v.weight"


@pytest.fixture
def unet(tiny_folder):
    """The U-Net's state dict, with value projections that somebody changed."""
    tensors = load_file(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors")
    return {name: tensor + 1 if name.endswith(VALUES) else tensor for name, tensor in tensors.items()}


def values(tiny):
    return tiny.names(rf"^unet\..*{re.escape(VALUES)}$")


def is_read(tiny, path, **options):
    """Every value projection is one more than the base's, and nothing else is changed."""
    read = published_weights.weights_of(path, tiny, **options)
    changed = {name for name, tensor in read.items() if not torch.equal(tensor, tiny.weight(name))}
    assert changed == set(values(tiny))
    for name in changed:
        torch.testing.assert_close(read[name], tiny.weight(name) + 1)
    return read


def compvis(name):
    """diffusers' name of one of the tiny U-Net's weights -> the original's; written from the layout of the original."""
    fixed = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    fixed |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    places = {"down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1"}
    places |= {
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
    }
    places |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    places |= {"mid_block.resnets.1": "middle_block.2", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv"}
    places |= {f"up_blocks.{i}.resnets.{j}": f"output_blocks.{2 * i + j}.0" for i in (0, 1) for j in (0, 1)}
    places |= {f"up_blocks.1.attentions.{j}": f"output_blocks.{2 + j}.1" for j in (0, 1)}
    for ours, theirs in {**fixed, **places}.items():
        if name.startswith(ours + "."):
            name = name.replace(ours, theirs, 1)
            break
    parts = {".norm1.": ".in_layers.0.", ".conv1.": ".in_layers.2.", ".time_emb_proj.": ".emb_layers.1."}
    parts |= {".norm2.": ".out_layers.0.", ".conv2.": ".out_layers.3.", ".conv_shortcut.": ".skip_connection."}
    if "transformer_blocks" not in name:
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
    return f"model.diffusion_model.{name}"


@pytest.mark.parametrize("end", ["safetensors", "pt"])
def test_a_state_dict_with_the_keys_of_diffusers(tiny, unet, tmp_path, end):
    path = tmp_path / f"unet.{end}"
    save_file(unet, path) if end == "safetensors" else torch.save({"state_dict": unet, "epoch": 3}, path)
    is_read(tiny, path)


def test_some_layers_alone(tiny, unet, tmp_path):
    """As UCE and ESD publish them."""
    save_file({name: t for name, t in unet.items() if name.endswith(VALUES)}, tmp_path / "uce.safetensors")
    assert set(is_read(tiny, tmp_path / "uce.safetensors")) == set(values(tiny))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_checkpoint_with_the_keys_of_compvis(tiny, unet, tmp_path, prefix):
    """ESD's first, of the whole model: VAE, schedule and moving average are left out."""
    state = {compvis(name).replace("model.diffusion_model.", prefix): tensor for name, tensor in unet.items()}
    if prefix:
        state |= {"first_stage_model.encoder.conv_in.weight": torch.ones(1), "alphas_cumprod": torch.ones(3)}
        text = {n.removeprefix("text_encoder."): tiny.weight(n) for n in tiny.names(r"^text_encoder\.")}
        state |= {f"cond_stage_model.transformer.text_model.{n}": t for n, t in text.items()}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    is_read(tiny, tmp_path / "model.ckpt")


@pytest.mark.parametrize("prefix", ["", "text_model.", "text_encoder.text_model."])
def test_a_text_encoder(tiny, tmp_path, prefix):
    """As AdvUnlearn publishes it."""
    named = {n: tiny.weight(n) for n in tiny.names(r"^text_encoder\.")}
    first = next(iter(named))
    (tmp_path / "encoder").mkdir()
    state = {prefix + n.removeprefix("text_encoder."): t + (n == first) for n, t in named.items()}
    state[f"{prefix}embeddings.position_ids"] = torch.arange(3)
    save_file(state, tmp_path / "encoder" / "model.safetensors")
    read = published_weights.weights_of(tmp_path / "encoder", tiny)
    assert [n for n, t in read.items() if not torch.equal(t, tiny.weight(n))] == [first]


def test_a_diffusers_folder_and_what_its_fit_says(tiny, unet, tmp_path, caplog):
    other = build_pipeline(tmp_path / "other")  # the same weights: its seed is the fixture's
    save_file(unet, other / "unet" / "diffusion_pytorch_model.safetensors")
    is_read(tiny, other)
    (tmp_path / "out").mkdir()
    eraser = Checkpoint(str(other))
    with caplog.at_level("INFO"):
        eraser.fit(tiny, Brief(()), tmp_path / "out", 0)
    assert set(load_file(tmp_path / "out" / "weights.safetensors")) == set(values(tiny))
    notes = json.loads((tmp_path / "out" / "notes.json").read_text())
    assert notes["changed"] == {"unet": len(values(tiny)), "text_encoder": 0}
    worst = max(values(tiny), key=lambda n: tiny.weight(n).numel() ** 0.5 / float(tiny.weight(n).norm()))
    assert next(iter(notes["most"])) == worst and worst in caplog.text
    before = tiny.weight(worst)
    with eraser.apply(tiny, tmp_path / "out"):
        torch.testing.assert_close(tiny.weight(worst), before + 1)


def test_what_is_in_it_counts_and_not_where_it_lies(tiny_folder, unet, tmp_path):
    save_file(unet, tmp_path / "a.safetensors")
    save_file(unet, tmp_path / "b.safetensors")
    assert Checkpoint(str(tmp_path / "a.safetensors")).content == Checkpoint(str(tmp_path / "b.safetensors")).content
    assert Checkpoint(str(tmp_path / "a.safetensors")).content != Checkpoint(str(tiny_folder)).content


def lora(tiny, rank=2):
    """module of each value projection -> (up, down), a LoRA that adds one everywhere with alpha = 3 rank."""
    made = {}
    for name in values(tiny):
        out, width = tiny.weight(name).shape
        up, down = torch.zeros(out, rank), torch.zeros(rank, width)
        up[:, 0], down[0] = 1 / 3, 1
        made[name.removesuffix(".weight")] = up, down
    return made


FORMS = {
    "peft": (lambda m: m, "lora_B", "lora_A"),
    "base_model": (lambda m: "base_model.model." + m.removeprefix("unet."), "lora_B.default", "lora_A.default"),
    "diffusers": (lambda m: m, "lora.up", "lora.down"),
    "kohya": (lambda m: m.replace("unet.", "lora_unet_", 1).replace(".", "_"), "lora_up", "lora_down"),
}


@pytest.mark.parametrize("form", [*FORMS, "processor"])
def test_a_lora_file(tiny, tmp_path, form):
    state = {}
    for module, (up, down) in lora(tiny).items():
        if form == "processor":
            called = module.replace(".to_v", ".processor.to_v_lora")
            state |= {f"{called}.up.weight": up, f"{called}.down.weight": down}
        else:
            place, high, low = FORMS[form]
            state |= {f"{place(module)}.{high}.weight": up, f"{place(module)}.{low}.weight": down}
            if form == "kohya":
                state[f"{place(module)}.alpha"] = torch.tensor(6.0)
    metadata = None if form in ("kohya", "processor") else {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6})}
    save_file(state, tmp_path / "lora.safetensors", metadata)
    is_read(tiny, tmp_path / "lora.safetensors", scale=3.0 if form == "processor" else 1.0)


def test_a_lora_of_the_text_encoder_as_kohya_calls_it(tiny, tmp_path):
    name = tiny.names(r"^text_encoder\..*layers\.0.*q_proj\.weight$")[0]
    out, width = tiny.weight(name).shape
    called = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    up, down = torch.randn(out, 1), torch.randn(1, width)
    save_file({f"{called}.lora_up.weight": up, f"{called}.lora_down.weight": down}, tmp_path / "te.safetensors")
    read = published_weights.weights_of(tmp_path / "te.safetensors", tiny)
    torch.testing.assert_close(read[name], tiny.weight(name) + up @ down)


def test_a_lora_is_merged_as_diffusers_does(tiny, tiny_folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    state = {}
    for module, (up, down) in lora(tiny).items():
        state |= {f"{module}.lora_B.weight": torch.randn_like(up), f"{module}.lora_A.weight": torch.randn_like(down)}
    save_file(state, tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    theirs = dict(pipeline.unet.named_parameters())
    for name, weight in published_weights.weights_of(tmp_path / "lora.safetensors", tiny).items():
        torch.testing.assert_close(weight, theirs[name.removeprefix("unet.")].data, rtol=1e-4, atol=1e-5)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(tiny, tmp_path):
    torch.save({"unet": Trap(tmp_path / "ran")}, tmp_path / "new.pt")
    torch.save({"unet": Trap(tmp_path / "ran")}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    for name in ("new.pt", "old.ckpt", "bare.bin"):
        with pytest.raises(ErasebenchError, match="not read: ask its author for safetensors|not a checkpoint"):
            published_weights.weights_of(tmp_path / name, tiny)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_of_this_base_is_one_clear_line(tiny, unet, tmp_path):
    def fails(file, message, **options):
        with pytest.raises(ErasebenchError, match=message) as caught:
            published_weights.weights_of(tmp_path / file, tiny, **options)
        assert "\n" not in str(caught.value)

    def write(file, tensors):
        save_file(tensors, tmp_path / file)
        return file

    first = next(name for name in unet if name.endswith(VALUES))
    (tmp_path / "empty.safetensors").touch()
    fails("empty.safetensors", "an empty file")
    (tmp_path / "text.pt").write_text("hello")
    fails("text.pt", "not a checkpoint")
    (tmp_path / "text.safetensors").write_text("hello, this is no header")
    fails("text.safetensors", "not a safetensors file")
    import zipfile

    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    fails("zip.pt", "not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    fails("list.pt", "not a state dict")
    broken = {**unet, first: torch.full_like(unet[first], float("nan"))}
    fails(write("nan.safetensors", broken), f"{re.escape(first)} is not finite")
    fails(write("more.safetensors", {**unet, "novel.weight": torch.ones(1)}), "1 of .* e.g. novel.weight")
    fails(write("shape.safetensors", {**unet, first: torch.ones(3, 3)}), r"is \(3, 3\), the base's is")
    less = {name: t for name, t in unet.items() if name != first}
    fails(write("less.safetensors", less), f"1 weights are absent .* e.g. unet.{re.escape(first)}")
    assert f"unet.{first}" not in published_weights.weights_of(tmp_path / "less.safetensors", tiny, partial=True)
    fails(write("half.safetensors", {"unet.conv_in.lora_A.weight": torch.ones(1, 36)}), "has only down")
    other = {"unet.conv_in.lora_A.weight": torch.ones(1, 99), "unet.conv_in.lora_B.weight": torch.ones(8, 1)}
    fails(write("other.safetensors", other), "does not fit: not of the base's architecture")
    alien = {"unet.blocks.77.lora_A.weight": torch.ones(1, 9), "unet.blocks.77.lora_B.weight": torch.ones(8, 1)}
    fails(write("alien.safetensors", alien), "not of the base's architecture")
    (tmp_path / "hollow").mkdir()
    fails("hollow", "no weights in it")


def test_the_base_itself_and_nothing_at_all_are_refused(tiny, tiny_folder, tmp_path):
    with pytest.raises(ErasebenchError, match="nothing was erased"):
        Checkpoint(str(tiny_folder)).fit(tiny, Brief(()), tmp_path, 0)
    with pytest.raises(ErasebenchError, match="give a file, a folder or a hub id"):
        Checkpoint().fit(tiny, Brief(()), tmp_path, 0)
    with pytest.raises(ErasebenchError, match="no such file or folder, and no hub id"):
        Checkpoint(str(tmp_path / "nowhere.pt"))
    with pytest.raises(ErasebenchError, match="neither here nor to be had from the hub"):
        Checkpoint("nobody/nothing")


def test_another_architecture_is_refused(tiny, tmp_path):
    build_pipeline(tmp_path / "xl", xl=True)
    with pytest.raises(ErasebenchError, match="architecture"):
        Checkpoint(str(tmp_path / "xl")).fit(tiny, Brief(()), tmp_path, 0)
