"""What is exported loads without erasebench and draws what the erased model draws; its card holds its rows."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import build_pipeline
from safetensors.torch import load_file, save_file

from erasebench import cli, config
from erasebench.contracts import ErasebenchError, Sampler
from erasebench.model.model import Model
from erasebench.model.source import Source
from erasebench.rows import read, write
from erasebench.toolbox import published_weights

SMALL = ["images=2", "sampler.steps=2", "batch=2"]


def measured(tmp_path, tiny_folder, *more):
    """(the file of a run's rows, the model that it erased, what keeps it erased)"""
    from erasebench.run.run import execute
    from erasebench.run.session import Session
    from erasebench.store.local import Store

    models = []

    def job(run):
        rows = execute(run)
        session = Session(run, Store())
        models.extend([session.erased(), session])
        return rows

    words = [f"model.path={tiny_folder}", f"results={tmp_path}/results", *SMALL, *more]
    config.main(job, words)
    (path,) = (tmp_path / "results" / "runs").glob("*.csv")
    return path, *models


def test_a_folder_draws_the_same_and_its_card_has_every_row(tmp_path, tiny_folder, capsys):
    path, erased, _kept = measured(tmp_path, tiny_folder, "method=uce", "target=cat")
    assert cli.main(["export", str(path), str(tmp_path / "given"), f"model.path={tiny_folder}"]) == 0
    asked = ["a cat", "a dog on the grass"], [1, 2], Sampler("ddim", 3, 4.0)
    base = Model.load(Source("tiny", tiny_folder)).sample(*asked).images
    theirs = Model.load(Source("given", tmp_path / "given")).sample(*asked).images
    assert torch.equal(theirs, erased.sample(*asked).images) and not torch.equal(theirs, base)
    card = (tmp_path / "given" / "README.md").read_text()
    rows = [row for row in read(path) if row.value is not None]
    assert all(f"| {row.metric} | {row.split} |" in card for row in rows) and "method=uce" in card
    assert sorted(p.name for p in tmp_path.iterdir() if "tmp" in p.name) == []  # nothing half done is left


def test_it_loads_without_erasebench(tmp_path, tiny_folder):
    path, *_ = measured(tmp_path, tiny_folder, "method=uce", "target=cat")
    assert cli.main(["export", str(path), str(tmp_path / "given"), f"model.path={tiny_folder}"]) == 0
    program = (
        "import sys\n"
        "from diffusers import StableDiffusionPipeline\n"
        f"made = StableDiffusionPipeline.from_pretrained({str(tmp_path / 'given')!r})\n"
        "assert made('a cat', num_inference_steps=1).images and 'erasebench' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_lora_file_is_what_the_method_adds(tmp_path, tiny_folder):
    options = ["max_loops=1", "mine_steps=1", "steps=2", "pool=2", "images=2", "ddim_steps=2", "lr=0.1"]
    words = ["method=dark_miner", "target=cat", *(f"method.{option}" for option in options)]
    path, erased, _kept = measured(tmp_path, tiny_folder, *words)
    assert cli.main(["export", str(path), str(tmp_path / "cat.safetensors"), f"model.path={tiny_folder}"]) == 0
    base = Model.load(Source("tiny", tiny_folder))
    for name, weight in published_weights.weights_of(tmp_path / "cat.safetensors", base).items():
        torch.testing.assert_close(weight, erased.weight(name))
    assert len(load_file(tmp_path / "cat.safetensors")) == 2 * len(base.names(r"attn\d\.to_v\.weight$"))
    assert "dark_miner" in (tmp_path / "cat.md").read_text()


def test_what_cannot_be_exported_says_why(tmp_path, tiny_folder, capsys, caplog):
    path, *_ = measured(tmp_path, tiny_folder, "method=negative_prompt", "target=cat")
    place = f"model.path={tiny_folder}"

    def fails(message, *arguments):
        assert cli.main(["export", *map(str, arguments)]) != 0
        assert message in capsys.readouterr().err + caplog.text

    fails("rows do not keep where something was: give model.path=", path, tmp_path / "x")
    fails("changes how the model is sampled", path, tmp_path / "x", place)
    fails("is no LoRA", path, tmp_path / "x.safetensors", place)
    fails("no such file", tmp_path / "no.csv", tmp_path / "x")
    fails("is there already", path, path)
    other = build_pipeline(tmp_path / "other", seed=5)
    fails("rows of another version, or of another base", path, tmp_path / "x", f"model.path={other}")
    assert not (tmp_path / "x").exists()


def test_rows_may_not_say_what_code_to_load(tmp_path, tiny_folder, capsys):
    from dataclasses import replace

    path, *_ = measured(tmp_path, tiny_folder, "method=uce", "target=cat")
    write([replace(row, overrides='["method._target_=os.system"]') for row in read(path)], path)
    assert cli.main(["export", str(path), str(tmp_path / "x")]) == 2
    assert "may not say what code to load" in capsys.readouterr().err
    with pytest.raises(ErasebenchError, match="may not say"):
        config.again(["--config-dir=evil"])


def halved(folder, place):
    """A base whose weights are in half precision, as a folder of that variant has them."""
    shutil.copytree(folder, place)
    for file in place.glob("*/*.safetensors"):
        half = {name: weight.half() for name, weight in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    return place


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_of_a_half_precision_base_is_of_one_number_format_and_draws(tmp_path, tiny_folder, dtype):
    from diffusers import StableDiffusionPipeline

    base = halved(tiny_folder, tmp_path / "half")
    path, erased, _kept = measured(tmp_path, base, "method=uce", "target=cat", f"model.dtype={dtype}")
    assert cli.main(["export", str(path), str(tmp_path / "given"), f"model.path={base}"]) == 0
    weights = {
        weight.dtype
        for file in (tmp_path / "given").glob("*/*.safetensors")
        for weight in load_file(file).values()
        if weight.is_floating_point()
    }
    assert weights == {getattr(torch, dtype)}
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "given", torch_dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    more = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(1), "output_type": "latent"}
    theirs = pipeline("a cat", height=16, width=16, guidance_scale=4.0, **more).images
    ours = erased.latents(erased.encode(["a cat"]), [1], Sampler("ddim", 2, 4.0))
    near = 1e-3 if dtype == "float32" else 0.2  # of half precision, whose roundings depend on the order of sums
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
