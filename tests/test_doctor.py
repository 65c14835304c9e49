"""What is here and what is missing."""

import logging

import pytest

from erasebench import doctor


def test_the_embedded_world_runs_whole_and_what_photographs_lack_is_said_with_how_to_get_it(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("sys.argv", ["doctor"])
    assert doctor.main([]) == 0
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
    assert absent == {"nudenet": "pip install 'erasebench[nudenet]'"} and "torch" in here and "pytest" not in here


def test_a_store_that_cannot_be_written_is_a_fault(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "runnable", lambda: {("object", "mini"): [], ("object", "sd14"): []})
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "NOT WRITABLE" in said and "cannot run whole" in said


def test_it_takes_no_arguments():
    with pytest.raises(SystemExit):
        doctor.main(["--fix"])
