"""The photo world in small: what a user of Stable Diffusion has on disk, and the command line that names it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import bases
import judges
import pytest
import tables
import yaml

from erasebench import config
from erasebench.rows import Row, read_all
from erasebench.run.run import execute

CONF = Path(__file__).parents[2] / "conf"
SMALL = ("images=2", "sampler.steps=2", "batch=4")


class SocketOpened(AssertionError):
    """Something tried to reach another machine."""


@contextmanager
def no_sockets() -> Iterator[None]:
    """Inside, a connection to anything but a Unix socket raises, and is remembered even where that is swallowed."""
    opened: list[str] = []
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded(own):
        def attempt(self, address, *rest):
            if self.family == socket.AF_UNIX:
                return own(self, address, *rest)
            opened.append(str(address))
            raise SocketOpened(f"a socket to {address}")

        return attempt

    def resolve(host, *rest, **options):
        opened.append(str(host))
        raise SocketOpened(f"the address of {host}")

    socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = guarded(connect), guarded(connect_ex), resolve
    try:
        yield
    finally:
        socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = connect, connect_ex, lookup
    assert not opened, f"sockets were opened to {opened}"


@dataclass
class Photo:
    """Folders and files below `root`, written when they are first asked for."""

    root: Path
    written: dict[str, Path] = field(default_factory=dict)

    def base(self, name: str) -> Path:
        if name not in self.written:
            self.written[name] = bases.write_base(self.root / name, name)
        return self.written[name]

    @cached_property
    def judges(self) -> dict[str, str]:
        """Option -> the file or folder that it names."""
        root = self.root / "judges"
        root.mkdir()
        world = yaml.safe_load((CONF / "world" / "photo.yaml").read_text())
        judges.write_inception(root / "inception-2015-12-05.pt")
        judges.write_giphy(root / "giphy", [*world["people"]["erase"], *world["people"]["keep"]])
        judges.write_torchvision(root)
        judges.write_yolo(root / "yolo")
        judges.write_clip(root)
        judges.write_facenet(root / "packages")
        sys.path.append(str(root / "packages"))
        return {
            "world.judges.clip.pretrained": str(root / "ViT.pt"),
            "world.judges.styles.clip.pretrained": str(root / "open_clip_pytorch_model.bin"),
            "world.judges.identity.folder": str(root / "giphy"),
            "world.judges.objects.path": str(root / "resnet50-11ad3fa6.pth"),
            "world.judges.perceptual.judge.path": str(root / "alexnet-owt-7be5be79.pth"),
            "world.judges.yolo.folder": str(root / "yolo"),
            "world.judges.quality.judge.path": str(root / "inception-2015-12-05.pt"),
            "world.judges.quality.real": str(judges.write_pictures(self.root / "real", 4)),
            "world.captions.path": str(self.tables / "captions.txt"),
            "world.explicit.prompts.path": str(self.tables / "i2p.csv"),
        }

    @cached_property
    def tables(self) -> Path:
        tables.write_tables(self.root / "tables")
        return self.root / "tables"

    @cached_property
    def pictures(self) -> Path:
        return judges.write_pictures(self.root / "pictures", 3, seed=1)

    @property
    def method_clip(self) -> tuple[str, ...]:
        """Of a method with a CLIP of its own: open_clip's safetensors."""
        file = Path(self.judges["world.judges.clip.pretrained"]).with_name("open_clip_model.safetensors")
        return (f"method.clip.architecture={judges.CLIP}", f"method.clip.pretrained={file}")

    def words(self, *given: str, base: str = "sd14", device: str = "cpu") -> list[str]:
        """The command line of a run: a base's folder, every judge's files, few images and steps, and what is `given`."""
        clips = ("world.judges.clip", "world.judges.styles.clip")
        model = base if base != "bk_sdm" else "sd14"
        return [
            f"model={model}",
            f"model.path={self.base(base)}",
            f"device={device}",
            "world.captions.count=100",
            *(f"{clip}.architecture={judges.CLIP}" for clip in clips),
            *(f"{option}={place}" for option, place in self.judges.items() if not any(w.startswith(f"{option}=") for w in given)),
            *SMALL,
            *given,
        ]

    def run(self, results: Path, *given: str, **options: str) -> list[Row]:
        """Rows of one run, of which none failed."""
        words = [*self.words(*given, **options), f"results={results}"]
        assert config.main(execute, words) == 0, failures(results)
        rows = read_all(results / "runs")
        assert rows and not failures(results), failures(results)
        return rows


def failures(results: Path) -> list[str]:
    rows = read_all(results / "runs") if (results / "runs").is_dir() else []
    return [row.reason for row in rows if row.status == "failed"]


def skipped(rows: Sequence[Row]) -> list[str]:
    """Why judges or attacks were left out, but where the photo world has none or draws nothing for them."""
    known = ("world photo has no judge for it", "the world photo gives no")
    return [f"{row.metric}{row.attack}: {row.reason}" for row in rows if row.status == "skipped" and not row.reason.startswith(known)]


def measured(rows: Sequence[Row]) -> set[str]:
    """Names of metrics that have a finite value."""
    return {row.metric for row in rows if row.status == "ok" and row.value is not None and row.value == row.value}


def attacked(rows: Sequence[Row]) -> bool:
    """Whether every attack measured, on prompts of which half did not show the concept without it."""
    under = [row for row in rows if row.attack]
    before = [row.value for row in rows if row.metric == "wording"]
    return bool(under) and {row.status for row in under} == {"ok"} and before == [0.5]


def erased(rows: Sequence[Row]) -> bool:
    """Whether forgetting is measured; where a guard refuses every image of the concept, under the name that says so."""
    return bool(measured(rows) & {"acc_e_top1", "acc_e_top1_refused_as_forgotten"})


@pytest.fixture(scope="session")
def photo(tmp_path_factory) -> Photo:
    return Photo(tmp_path_factory.mktemp("photo"))


@pytest.fixture(autouse=True)
def alone(own_store, tmp_path_factory, monkeypatch) -> Iterator[None]:
    """Runs of one file of tests share a store, as a user's do, and none of them leaves this machine."""
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path_factory.getbasetemp() / "rehearsal-store"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "rehearsal-torch"))
    with no_sockets():
        yield
