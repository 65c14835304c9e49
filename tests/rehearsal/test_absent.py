"""Each file of the photo world taken away: one line names it and its option, and nothing is drawn before."""

import pytest
from world import Photo, alone, config, execute, photo  # noqa: F401

from erasebench import cli
from erasebench.model.model import Model

FILES = {  # option -> the task that needs its file
    "world.judges.clip.pretrained": "object",
    "world.judges.styles.clip.pretrained": "style",
    "world.judges.identity.folder": "celebrity",
    "world.judges.objects.path": "imagenette",
    "world.judges.perceptual.judge.path": "style",
    "world.judges.yolo.folder": "imagenette",
    "world.judges.quality.judge.path": "object",
    "world.judges.quality.real": "object",
    "world.captions.path": "object",
    "world.explicit.prompts.path": "explicit",
    "model.path": "object",
}


def test_no_file_is_left_out(photo):  # noqa: F811
    assert set(FILES) == {*photo.judges, "model.path"}


@pytest.mark.parametrize("option", FILES)
def test_a_file_that_is_not_there(photo, tmp_path, monkeypatch, caplog, capfd, option):  # noqa: F811
    monkeypatch.setattr(Model, "load", classmethod(lambda *a: pytest.fail("a model was loaded")))
    lost = tmp_path / "lost.pt"
    words = [*photo.words("method=uce", f"task={FILES[option]}", f"{option}={lost}"), f"results={tmp_path}"]
    assert config.main(execute, words) == 1
    named(option, lost, [line for line in (capfd.readouterr().err + caplog.text).splitlines() if "rror" in line or "failed" in line])
    caplog.clear()
    assert cli.main(["doctor", *words]) == 1
    said = capfd.readouterr()
    named(option, lost, [line for line in (said.out + said.err + caplog.text).splitlines() if not line.startswith(("here ", "fetched"))])
    config.main(execute, [*words, "dry_run=true"])
    said = capfd.readouterr()
    named(option, lost, (said.out + said.err + caplog.text).splitlines())


def named(option: str, lost, lines: list[str]) -> None:
    """One of the lines names the file and the option, and none is of a traceback."""
    assert any(str(lost) in line and f"{option}=" in line for line in lines), lines
    assert not any("Traceback" in line for line in lines)
