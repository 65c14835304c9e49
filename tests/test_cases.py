"""Files and commands as people of the field have them, each through the command line on the embedded model.

One line of `CASES` is a command, the exit code and the line that must be seen; none may end in a traceback.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasebench import config
from erasebench.config import embedded_source
from erasebench.model.model import Model
from erasebench.rows import read_all
from erasebench.run.run import execute
from erasebench.toolbox import published_weights

CHEAP = ["images=2", "sampler.steps=2"]


@pytest.fixture(scope="module")
def base():
    return Model.load(embedded_source())


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """A folder with every file that the cases name."""
    folder = tmp_path_factory.mktemp("cases")
    write_checkpoints(base, folder)
    write_adapter(base, folder / "alpha", lora_alpha=8)
    write_tables(folder)
    write_bases(folder)
    return folder


def write_checkpoints(base, folder):
    weights = {n.removeprefix("unet."): base.weight(n) for n in base.names(r"^unet\.")}
    moved = {n: (1.1 * w + 0.01).contiguous() for n, w in weights.items()}
    save_file({n: w for n, w in moved.items() if "attn2" in n and "norm" not in n}, folder / "esd-x.safetensors")
    save_file({n: w for n, w in moved.items() if "attn2" not in n and "norm" not in n}, folder / "esd-u.safetensors")
    edited = {n: w for n, w in moved.items() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    by_module = {}
    for name, weight in edited.items():
        module, leaf = name.rsplit(".", 1)
        by_module.setdefault(f"unet.{module}", {})[leaf] = weight
    torch.save(by_module, folder / "by_module.pt")
    for name in ("model", "model_state_dict", "module"):
        torch.save({name: edited, "epoch": 3}, folder / f"{name}.pt")
    for place, factor in (("two/cat", 1.1), ("two/dog", 0.9), ("steps/esd_100", 1.01), ("steps/esd_1000", 1.1)):
        file = folder / f"{place}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file({n: (weights[n] * factor).contiguous() for n in edited}, file)
    save_file(edited, folder / "epoch=3-step=200.safetensors")
    (folder / "spms").mkdir()
    for seed, name in enumerate(("cat", "dog")):
        draw = torch.Generator().manual_seed(seed)
        halves = {}
        for key, weight in edited.items():
            module = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            halves[f"{module}.lora_down.weight"] = torch.randn(1, weight.shape[1], generator=draw) / 9
            halves[f"{module}.lora_up.weight"] = torch.randn(weight.shape[0], 1, generator=draw) / 9
            halves[f"{module}.alpha"] = torch.tensor(1.0)
        save_file(halves, folder / "spms" / f"{name}.safetensors")


def write_adapter(base, folder, **settings):
    """A LoRA of rank 4 as peft saves it."""
    draw, state = torch.Generator().manual_seed(0), {}
    for name in base.names(r"^unet.*attn2\.to_[kv]\.weight$"):
        weight, module = base.weight(name), name.removeprefix("unet.").removesuffix(".weight")
        key = f"base_model.model.{module}"
        state[f"{key}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=draw) / 20
        state[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=draw) / 20
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_k", "to_v"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | settings))


def write_tables(folder):
    texts = {
        "coco_30k.csv": "case_number,source,prompt,evaluation_seed,coco_id\n"
        '0,coco,"A cat, asleep\non a mat.",811,12\n1,coco,A dog.,5,13\n2,coco,a photo of a ship,7,14\n',
        "captions.jsonl": '{"caption":"A cat."}\n{"caption":"A dog."}\n',
        "null.json": '{"annotations":[{"image_id":2,"id":9,"caption":null},{"image_id":3,"id":10,"caption":"A cat."}]}',
        "mace.csv": ",type,prompt,evaluation_seed\n0,erased,A portrait of Bill Moss,1\n1,preserved,A portrait of Ann Dale,1\n",
        "guidance.csv": "case_number,prompt,evaluation_seed,evaluation_guidance,class\n0,a photo of a cat,3,9.5,cat\n",
        "no_concept.csv": "case_number,prompt,evaluation_seed,evaluation_guidance\n0,a photo of a cat,3,9.5\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "bom.txt").write_text("A cat.\nA dog.\n", encoding="utf-8-sig")
    (folder / "latin1.txt").write_bytes("A café.\n".encode("latin-1"))


def write_bases(folder):
    sound = embedded_source().path
    shutil.copytree(sound, folder / "inpaint")
    settings = folder / "inpaint" / "unet" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"in_channels": 33}))
    file = folder / "inpaint" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, first.new_zeros(len(first), 17, 3, 3)], 1)
    save_file(weights, file)
    shutil.copytree(sound, folder / "variant")
    for file in list((folder / "variant").rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))


CHECKPOINT = ["method=checkpoint", "target=cat"]
# fmt: off
CASES = {
    "ESD's cross-attention": ([*CHECKPOINT, "method.path=esd-x.safetensors"], 0, "35 of"),
    "ESD's rest": ([*CHECKPOINT, "method.path=esd-u.safetensors"], 0, "161 of"),
    "a dict for each module": ([*CHECKPOINT, "method.path=by_module.pt"], 0, "14 of"),
    "under the name model": ([*CHECKPOINT, "method.path=model.pt"], 0, "14 of"),
    "under the name model_state_dict": ([*CHECKPOINT, "method.path=model_state_dict.pt"], 0, "14 of"),
    "under the name module": ([*CHECKPOINT, "method.path=module.pt"], 0, "14 of"),
    "two edits": ([*CHECKPOINT, "method.path=two"], 1, "name the same weights"),
    "steps of one training": ([*CHECKPOINT, "method.path=steps"], 1, "name the same weights"),
    "two adapters": ([*CHECKPOINT, "method.path=spms"], 1, "name the same weights"),
    "an equals sign, bare": ([*CHECKPOINT, "method.path=epoch=3-step=200.safetensors"], 2, "quote it: 'method.path=\""),
    "an equals sign, quoted": ([*CHECKPOINT, 'method.path="epoch=3-step=200.safetensors"'], 0, "14 of"),
    "captions of COCO": (["task=caption", "target=cat", "world.captions.path=coco_30k.csv", "images=4"], 0, "3 images"),
    "captions as JSON lines": (["task=caption", "target=cat", "world.captions.path=captions.jsonl"], 0, "2 images"),
    "captions with a mark": (["task=caption", "target=cat", "world.captions.path=bom.txt"], 0, "2 images"),
    "captions of another encoding": (["task=caption", "target=cat", "world.captions.path=latin1.txt"], 1, "latin1.txt, line 1"),
    "an empty caption": (["task=caption", "target=cat", "world.captions.path=null.json"], 0, "1 empty captions skipped"),
    "MACE's people": (["task=celebrity", "target='Bill Moss'", "prompts.path=mace.csv"], 0, "rows in"),
    "guidance": (["target=cat", "prompts.path=guidance.csv"], 0, "guidance of 1 prompts is not used"),
    "no concept": (["target=cat", "prompts.path=no_concept.csv"], 0, "all 1 prompts ask for cat"),
    "a GPU that is not there": (["-m", "device=cuda,cpu", "target=cat"], 1, "no GPU"),
    "a device of another kind": (["device=mps", "target=cat"], 1, "device=mps"),
    "a sweep with a file that cannot be read": (["-m", "task=caption", "target=cat", "world.captions.path=latin1.txt,embedded"], 1, "not UTF-8"),
    "a word for a list": (["method=uce", "target=cat", "concepts=dog"], 0, "2 concept(s)"),
    "another word for a list": (["target=cat", "other_words=misspelt"], 0, "rows in"),
    "LMS": (["sampler.name=lms", "target=cat"], 0, "rows in"),
    "a model that fills holes": (["model.path=inpaint", "target=cat"], 1, "33 input channels"),
    "an alias of a number format": (["model.dtype=fp16", "target=cat"], 1, "choose from float32, float16, bfloat16"),
    "half precision alone": (["model.path=variant", "target=cat"], 0, "rows in"),
    "a single file as the base": (["model.path=esd-x.safetensors", "target=cat"], 1, "a diffusers folder is needed"),
    "a concept of one's own": (["task=celebrity", "model=sd14", "target='Brad Pitt'"], 1, "kind= is needed"),
    "an object of one's own": (["+world.objects.unicorn={synonyms: [unicorns], surrogate: horse}", "target=unicorn"], 0, "does not know unicorn"),
}
# fmt: on


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_ends_as_it_should(files, tmp_path, monkeypatch, capfd, caplog, case):
    arguments, code, line = case
    monkeypatch.chdir(files)
    caplog.set_level("INFO")
    assert config.main(execute, [*CHEAP, *arguments, f"results={tmp_path}"], launch=True) == code
    output = capfd.readouterr().err + caplog.text
    assert line in output and "Traceback" not in output
    rows = read_all(tmp_path / "runs") if (tmp_path / "runs").is_dir() else []
    assert any(row.status == "ok" for row in rows) == (code == 0 or "-m" in arguments)
    assert all(row.value is None for row in rows if row.status != "ok")


def test_no_accuracy_is_given_of_an_object_that_no_judge_knows(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    arguments, *_ = CASES["an object of one's own"]
    config.main(execute, [*arguments, *CHEAP, f"results={tmp_path}"])
    assert not [row for row in read_all(tmp_path / "runs") if row.metric.startswith(("acc_", "h_o"))]


@pytest.mark.parametrize("place", ["alpha", "alpha/adapter_model.safetensors"])
def test_an_adapters_change_is_pefts(files, base, place):
    from diffusers import UNet2DConditionModel
    from peft import PeftModel

    unet = UNet2DConditionModel.from_pretrained(str(embedded_source().path), subfolder="unet").float()
    merged = PeftModel.from_pretrained(unet, str(files / "alpha")).merge_and_unload().state_dict()
    for name, weight in published_weights.weights_of(files / place, base).items():
        torch.testing.assert_close(weight, merged[name.removeprefix("unet.")], rtol=1e-4, atol=1e-5)
