"""What is here and what is missing."""

import logging

import pytest

from erasebench import cli
from erasebench.analysis import doctor


def test_the_embedded_world_runs_whole_and_what_photographs_lack_is_said_with_how_to_get_it(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("sys.argv", ["doctor"])
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in said.split("runs now")[1].split("\n\n")[0].splitlines()[1:]}
    assert set(lines) >= {"object", "celebrity", "explicit", "style"} and all(
        line[0] == "yes" for line in lines.values()
    )
    assert all(line[1] == "lacks" for line in lines.values())
    assert "world.captions.path=" in said and "AIML-TUDA/i2p" in said and "it could not be composed" not in said
    assert str(tmp_path) in said and said.endswith(
        "The embedded world can run: python -m erasebench method=uce target=cat\n"
    )
    assert logging.root.manager.disable == logging.NOTSET


def test_a_package_that_is_not_here_is_named_with_its_extra(monkeypatch):
    version = doctor.metadata.version

    def without(name):
        if name == "nudenet":
            raise doctor.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", without)
    here, absent = doctor.requirements()
    assert absent["nudenet"] == "pip install 'erasebench[nudenet]'" and "torch" in here and "pytest" not in here


def test_a_store_that_cannot_be_written_is_a_fault(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "runnable", lambda: {("object", "mini"): [], ("object", "sd14"): []})
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "NOT WRITABLE" in said and "cannot run whole" in said


def test_it_takes_no_flags_of_its_own():
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--fix"])


def test_every_file_of_a_command_line_is_listed_with_its_size_source_and_option(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    words = ["-m", "model=sd14", "method=mace", "task=style,celebrity,imagenette", "attack=mma_image"]
    assert cli.main(["doctor", *words]) == 1
    said = capsys.readouterr().out.splitlines()
    lines = {line.partition(":")[0]: line for line in said}
    for begins, *parts in (
        ("fetched  base sd14 (4.3 GB)", "huggingface.co/CompVis/stable-diffusion-v1-4", "model.path="),
        ("fetched  Grounding DINO (690 MB)", "huggingface.co/IDEA-Research/grounding-dino-tiny", "method.masks=attention"),
        ("fetched  SAM (2.6 GB)", "huggingface.co/facebook/sam-vit-huge"),
        ("fetched  CLIP ViT-B-32-quickgelu/openai (605 MB)", "huggingface.co/timm/", "world.judges.clip.pretrained="),
        ("fetched  ResNet-50 (torchvision, ImageNet, V2) (98 MB)", "download.pytorch.org", "world.judges.objects.path="),
        ("fetched  AlexNet of LPIPS (233 MB)", "download.pytorch.org", "world.judges.perceptual.judge.path="),
        ("absent   GIPHY's best_model_states.pkl (100 MB)", "world.judges.identity.folder="),
        ("absent   YOLOv8 for Imagenette", "erasebench.evaluators.yolo train", "world.judges.yolo.folder="),
        ("absent   Inception of clean-fid (96 MB)", "inception-2015-12-05.pt", "world.judges.quality.judge.path="),
        ("absent   real images", "world.judges.quality.real="),
        ("absent   MMA-Diffusion's adversarial pictures", "attack.mma_image.folder="),
    ):
        assert begins in lines and all(part in lines[begins] for part in parts), (begins, said)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet50-11ad3fa6.pth").touch()
    assert cli.main(["doctor", *words]) == 1
    assert f"here     ResNet-50 (torchvision, ImageNet, V2) (98 MB): {tmp_path}" in capsys.readouterr().out


def test_a_run_that_needs_nothing_is_fit(capsys, tiny_folder):
    assert cli.main(["doctor", f"model.path={tiny_folder}", "method=uce", "target=cat"]) == 0
    assert capsys.readouterr().out == f"here     base mini: {tiny_folder}\n"
    assert cli.main(["doctor", "method=uce", "target=nothing"]) == 1


def test_a_gpu_that_torch_does_not_see_is_refused(monkeypatch, capsys, caplog, tmp_path):
    from erasebench import config
    from erasebench.model import devices

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr(devices, "DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words, runs = ["method=uce", "target=cat", f"results={tmp_path}"], []
    assert config.main(lambda run: runs.append(run) or [], words) == 1 and not runs
    assert "has a GPU" in caplog.text and "is built for the CPU alone" in caplog.text and "device=cpu" in caplog.text
    assert "built for the CPU alone" in doctor.devices()
    assert config.main(lambda run: runs.append(run) or [], [*words, "device=cpu"]) == 0 and len(runs) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # somebody hides it
    assert config.main(lambda run: runs.append(run) or [], words) == 0 and runs[1].device == "cpu"
