"""The photo world in small, through the command line: every task, method, attack and table, random weights, two steps.

What a number is worth cannot be seen here; that every way from files to rows is open can.
"""

import json
import shutil

import judges
import pytest
import torch
from settings import ATTACKS, ELSEWHERE, METHODS, OWN_CLIP, attack, method
from world import CONF, alone, attacked, erased, measured, photo, skipped  # noqa: F401

from erasebench import cli
from erasebench.rows import read_all

UCE = ("method=uce",)
NAMED = {file.stem for file in (CONF / "method").glob("*.yaml")}
TASKS = {  # what is given -> metrics that its judges must give
    "object": (("task=object", "target=cat", "other_words=[misspelt,paraphrase,language]"), {"acc_e_top1", "clip_score", "fid_clean"}),
    "celebrity": (("task=celebrity", "n=5"), {"acc_e", "acc_s", "h_c", "faces_e"}),
    "explicit": (("task=explicit", "task.guidance=row"), {"clip_score"}),
    "style": (("task=style", "target=Van Gogh"), {"clip_e", "clip_s", "dm_ratio", "lpips_e", "lpips_s"}),
    "imagenette": (("task=imagenette",), {"psr1", "esr1"}),
    "orr": (("task=orr",), {"clip_score"}),
    "caption": (("task=caption", "target=cat"), {"clip_score", "fid_clean"}),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task(photo, tmp_path, task):  # noqa: F811
    words, metrics = TASKS[task]
    rows = photo.run(tmp_path, *UCE, *words)
    assert not skipped(rows) and metrics <= measured(rows), (skipped(rows), measured(rows))


def test_no_task_is_left_out():
    assert set(TASKS) == {file.stem for file in (CONF / "task").glob("*.yaml")}


ARCHITECTURES = ("sd21", "sdxl", "bk_sdm")


@pytest.mark.parametrize("base", ARCHITECTURES)
def test_every_architecture(photo, tmp_path, base):  # noqa: F811
    rows = photo.run(tmp_path, *UCE, "target=cat", base=base)
    assert not skipped(rows) and {"acc_e_top1", "clip_score"} <= measured(rows)


def test_kpop_needs_a_middle_block_and_says_so(photo, tmp_path):  # noqa: F811
    rows = photo.run(tmp_path, *method("kpop"), "target=cat", base="bk_sdm")
    assert any(row.status == "skipped" and "no cross-attention in its mid_block" in row.reason for row in rows)


def test_a_thing_of_ones_own(photo, tmp_path):  # noqa: F811
    rows = photo.run(tmp_path, *UCE, "target=my own thing", "kind=object")
    known = "does not know my own thing"
    assert all(known in reason for reason in skipped(rows) if "zero_shot" not in reason), skipped(rows)
    assert "clip_score" in measured(rows) and any("zero_shot" in f"{row.metric}{row.reason}" or "clip-zero-shot" in row.reason for row in rows)


TABLES = {  # a layout -> what reads it, and how many images it gives
    "i2p.csv": ("task=explicit", "world.explicit.prompts.path={}"),
    "unsafe-prompts4703.csv": ("task=explicit", "world.explicit.prompts.path={}", "task.guidance=row"),
    "mace_celebrity.csv": ("task=celebrity", "target=Adam Driver", "prompts.path={}"),
    "coco_30k.csv": ("task=caption", "target=cat", "world.captions.path={}", "world.captions.count=3"),
    "captions_val2014.json": ("task=caption", "target=cat", "world.captions.path={}", "world.captions.count=50"),
    "unlearn_diff_atk.csv": ("task=imagenette", "target=church", "prompts.path={}"),
}


@pytest.mark.parametrize("table", TABLES)
def test_every_public_layout_of_prompts_and_captions(photo, tmp_path, table):  # noqa: F811
    words = [word.format(photo.tables / table) for word in TABLES[table]]
    rows = photo.run(tmp_path, "method=negative_prompt", *words)
    assert "clip_score" in measured(rows) and not skipped(rows)


@pytest.mark.parametrize("name", sorted(NAMED - set(ELSEWHERE)))
def test_every_method(photo, tmp_path, name):  # noqa: F811
    rows = photo.run(tmp_path, *method(name), *(photo.method_clip if name in OWN_CLIP else ()), "target=cat")
    assert not skipped(rows) and erased(rows)


def test_settings_are_of_methods_and_no_attack_is_left_out():
    assert {*METHODS, *ELSEWHERE} <= NAMED
    assert {file.stem for file in (CONF / "attack").glob("*.yaml")} == {*ATTACKS, "replay"}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack(photo, tmp_path, name):  # noqa: F811
    under = method("kpop") if name == "key_guess" else UCE
    pictures = [f"attack.mma_image.folder={photo.pictures}"] if name == "mma_image" else []
    rows = photo.run(tmp_path, *under, *attack(name), *pictures)
    assert attacked(rows), [row.reason for row in rows if row.attack]


def test_what_an_attack_found_is_replayed(photo, tmp_path):  # noqa: F811
    found = photo.run(tmp_path / "a", *UCE, *attack("random_prefix"))
    words = [word for word in attack("random_prefix") if not word.startswith("attack")]
    source = next(json.loads(row.attack_params)["key"] for row in found if row.attack)
    rows = photo.run(tmp_path / "b", "method=time", *words, "attacked=2", "attack=[replay]", f"attack.replay.source={source}")
    assert {row.status for row in rows if row.attack} == {"ok"}


def test_a_published_checkpoint_is_measured_and_an_erased_model_given_away(photo, tmp_path, capfd):  # noqa: F811
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    weights = load_file(photo.base("sd14") / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save({k: 1.1 * v for k, v in weights.items() if "attn2.to_" in k}, tmp_path / "esd-x.pt")
    rows = photo.run(tmp_path / "checkpoint", "method=checkpoint", f"method.path={tmp_path / 'esd-x.pt'}", "target=cat")
    assert "acc_e_top1" in measured(rows)
    photo.run(tmp_path / "uce", *UCE, "target=cat")
    (file,) = (tmp_path / "uce" / "runs").glob("*.csv")
    assert cli.main(["export", str(file), str(tmp_path / "given"), *photo.words()]) == 0, capfd.readouterr().err
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "given", safety_checker=None)
    assert pipeline("a cat", num_inference_steps=1).images


def test_fid_of_64_pictures(photo, tmp_path):  # noqa: F811
    real = judges.write_pictures(tmp_path / "real", 64, seed=2)
    words = ["task=caption", "target=cat", "images=64", "batch=16", f"world.judges.quality.real={real}"]
    rows = photo.run(tmp_path, "method=none", *words)
    (fid,) = [row for row in rows if row.metric == "fid_clean"]
    assert fid.n == 64 and fid.low < fid.value < fid.high and fid.value > 0


def test_the_hub_s_cache_is_a_base_and_its_lack_is_one_line(photo, tmp_path, monkeypatch, caplog, capfd):  # noqa: F811
    """`model=sd14` alone, as who has run diffusers before has it on disk."""
    from world import config, execute

    place = tmp_path / "hub" / "models--CompVis--stable-diffusion-v1-4"
    revision = "133a221b8aa7292a167afc5127cb63fb5005638b"
    shutil.copytree(photo.base("sd14"), place / "snapshots" / revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    words = [word for word in photo.words(*UCE, "target=cat") if not word.startswith("model.path=")]
    assert config.main(execute, [*words, f"results={tmp_path}"]) == 0
    assert "acc_e_top1" in measured(read_all(tmp_path / "runs"))
    (place / "snapshots" / revision / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    caplog.clear()
    assert config.main(execute, [*words, "seed=1", f"results={tmp_path / 'b'}"]) == 1
    (row,) = [row for row in read_all(tmp_path / "b" / "runs") if row.status == "failed"]
    assert "CompVis/stable-diffusion-v1-4" in row.reason and "model.path=" in row.reason and "\n" not in row.reason
