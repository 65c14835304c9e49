"""What plugins need of this machine is asked for before a model is loaded, and what is missing is one line."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import Brightness, Redness
from erasebench.methods.kpop import KPOP
from erasebench.methods.none import NoErasure

from erasebench import needs
from erasebench.analysis import forecast as dry
from erasebench.contracts import ErasebenchError, Missing
from erasebench.model import bases
from erasebench.model.model import Model
from erasebench.model.source import Source, unfetched
from erasebench.needs import Need
from erasebench.run.run import execute

FETCH = {}  # how Needy's weights are fetched


@dataclass(frozen=True)
class Needy(Brightness):
    """A judge whose weights must be fetched."""

    name: str = "needy"
    place: str = ""

    def needs(self):
        here = lambda: Path(self.place) if Path(self.place).is_file() else None
        return [Need("a needy judge's weights", 98, "https://example.org/weights", "world.judges.needy=", here, FETCH["how"])]


@pytest.fixture(autouse=True)
def nothing_refused(monkeypatch):
    monkeypatch.setattr(needs, "_refused", {})
    FETCH.clear()


def test_weights_that_cannot_be_had_are_a_skipped_row_and_asked_for_before_a_model(make_run, tmp_path, monkeypatch):
    done, load = [], Model.load

    def fails():
        done.append("fetch")
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(Model, "load", classmethod(lambda cls, *a: done.append("load") or load(*a)))
    FETCH["how"], judge = fails, Needy(place=str(tmp_path / "no"))
    rows = execute(make_run("none", NoErasure(), {"needy": Redness(judge), "redness": Redness()}, images=1))
    assert done == ["fetch", "load"]
    (skipped,) = [row for row in rows if row.status == "skipped"]
    assert skipped.reason == (
        "a needy judge's weights (98 MB) could not be fetched (no route to host): https://example.org/weights "
        "(world.judges.needy=)"
    )
    assert any(row.metric == "red" and row.value is not None for row in rows)
    execute(make_run("none", NoErasure(), {"needy": Redness(judge)}, images=1))
    assert done.count("fetch") == 1  # a hub that is not there is asked once


def test_a_download_lies_where_torch_looks_and_a_host_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    import hashlib
    import socket

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "cache"))
    content = b"weights"
    begins = hashlib.sha256(content).hexdigest()[:8]
    (tmp_path / f"net-{begins}.pth").write_bytes(content)
    need = needs.download((tmp_path / f"net-{begins}.pth").as_uri(), "a net", 1, "")
    assert need.find() is None
    need.fetch()
    assert need.find().read_bytes() == content and socket.getdefaulttimeout() is None
    (tmp_path / "net-00000000.pth").write_bytes(content)
    spoilt = needs.download((tmp_path / "net-00000000.pth").as_uri(), "a net", 1, "")
    with pytest.raises(RuntimeError, match="invalid hash"):
        spoilt.fetch()
    assert spoilt.find() is None


def test_weights_are_fetched_once_and_then_used(make_run, tmp_path):
    place, times = tmp_path / "weights", []
    FETCH["how"], judge = lambda: times.append(1) or place.touch(), Needy(place=str(place))
    run = make_run("none", NoErasure(), {"needy": Redness(judge)}, images=1)
    (said,) = [line for line in dry.planned(run).missing if "needy" in line]
    assert "it will be downloaded from https://example.org/weights" in said and "98 MB" in said and not times
    for _ in range(2):
        assert {row.status for row in execute(run)} == {"ok"}
    assert times == [1] and not dry.planned(run).missing


def test_a_method_that_lacks_its_files_fails_before_a_model_is_loaded(make_run, monkeypatch):
    @dataclass(frozen=True)
    class Lacks(NoErasure):
        is_base = False

        def needs(self):
            return [needs.file(None, "a segmenter", 2560, "its authors' page", "method.masks=")]

    monkeypatch.setattr(Model, "load", classmethod(lambda *a: pytest.fail("a model was loaded")))
    (row,) = execute(make_run("lacks", Lacks()))
    assert (row.status, row.reason) == ("failed", "a segmenter (2.6 GB) is not here: its authors' page (method.masks=)")


def test_a_device_that_is_not_there_is_a_failed_row(make_run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def no_driver(*args):
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr("torch.cuda.get_device_name", no_driver)
    (row,) = execute(make_run("none", NoErasure(), device="cuda"))
    assert (row.status, row.reason, row.device) == ("failed", "device=cuda: no GPU here", "cuda")
    assert list((make_run("none", NoErasure()).results / "runs").glob("*.csv"))


def cache(monkeypatch, folder: Path) -> None:
    """The hub's cache holds what a folder does."""
    there = lambda repository, name, revision=None: str(folder / name) if (folder / name).is_file() else None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", there)


@pytest.mark.parametrize(
    "lost",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "text_encoder/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_cache_that_lacks_one_file_is_not_whole(tiny_folder, tmp_path, monkeypatch, lost):
    import shutil

    place = shutil.copytree(tiny_folder, tmp_path / "base")
    cache(monkeypatch, place)
    source = Source("m", None, "owner/name", "1" * 40)
    if lost.startswith("tokenizer"):  # as older folders have it
        (place / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
        for name in ("vocab.json", "merges.txt"):
            (place / "tokenizer" / name).touch()
    assert bases.first_absent("owner/name", None) == "" and dry.weights_present(source) is None
    (place / lost).unlink()
    assert bases.first_absent("owner/name", None) == lost
    whole = "not on" if lost == "model_index.json" else rf"not whole \({lost} is not there\) on"
    with pytest.raises(ErasebenchError, match=f"owner/name is {whole} this machine: it will be downloaded"):
        dry.weights_present(source)


def test_of_shards_all_are_needed(tiny_folder, tmp_path, monkeypatch):
    import json
    import shutil

    place = shutil.copytree(tiny_folder, tmp_path / "base")
    cache(monkeypatch, place)
    weights = place / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(place / "unet" / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (place / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert bases.first_absent("owner/name", None) == "unet/b.safetensors"
    (place / "unet" / "b.safetensors").touch()
    assert bases.first_absent("owner/name", None) == ""


def test_a_repository_that_is_gone_says_what_to_give_instead():
    import httpx
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    answer = httpx.Response(404, request=httpx.Request("GET", "https://example.org"))
    gone = {RepositoryNotFoundError: "no such repository, or not any more", RevisionNotFoundError: "no such revision"}
    for kind, said in gone.items():
        outer = OSError("owner/name is not a local folder")
        outer.__cause__ = kind("404", response=answer)
        assert said in unfetched(outer) and "model.hub=" in unfetched(outer)
    assert "model.path=" in unfetched(OSError("no route to host"))


def test_kpop_is_skipped_on_a_unet_without_a_middle_block(tiny, monkeypatch):
    assert KPOP().skip(tiny) == ""
    present = {name: p for name, p in tiny.unet.attn_processors.items() if not name.startswith("mid_block")}
    monkeypatch.setattr(type(tiny.unet), "attn_processors", present)
    monkeypatch.setattr("erasebench.methods.kpop.layers", lambda model: [name for name in present if "attn2" in name])
    assert "no cross-attention in its mid_block" in KPOP().skip(tiny) and KPOP(place="inmidout").skip(tiny) == ""


def test_torchmetrics_inception_names_its_package(monkeypatch):
    from erasebench.evaluators.quality import Inception

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Missing, match=r"torch-fidelity: pip install 'erasebench\[fid\]'"):
        Inception("torchmetrics").weights()


def test_lpips_reads_alexnet_as_torchvision_publishes_it(tmp_path):
    from erasebench.evaluators.quality import AlexNet, lpips
    from torchvision.models import alexnet

    torch.manual_seed(0)
    network = alexnet()
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    judge = AlexNet(str(tmp_path / "alexnet.pth"))
    assert not judge.needs() and len(judge.weights()["alexnet"]) == 64
    held = lpips(judge.path).net.state_dict()
    theirs = network.features.state_dict()
    assert {k.partition(".")[2]: v.sum() for k, v in held.items()} == {k: v.sum() for k, v in theirs.items()}
    with pytest.raises(ErasebenchError, match="no such file"):
        AlexNet(str(tmp_path / "no.pth")).weights()


def test_loading_a_model_switches_tf32_off(tiny_folder, monkeypatch):
    from erasebench import provenance
    from erasebench.model import devices

    torch.backends.cudnn.allow_tf32 = True
    assert devices.arithmetic() == "TF32 on"
    Model.load(Source("m", tiny_folder))
    assert devices.arithmetic() == "TF32 off"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda name: "NVIDIA H200")
    assert provenance.device("cuda") == "NVIDIA H200, TF32 off"


def test_forecasts_name_the_speed_and_the_first_shard_corrects_them(make_run, caplog):
    from erasebench import rates

    exact, fast = (rates.assumed("sd14", speed, "NVIDIA A100-SXM4-80GB") for speed in ("exact", "fast"))
    assert exact[0] == pytest.approx(19.5 * 0.6 / 0.8) and fast[0] == pytest.approx(312 * 0.26 / 0.8)
    assert (exact[1], fast[1]) == ("speed=exact on an A100", "speed=fast on an A100")
    assert rates.assumed("sd21", "fast", "NVIDIA GeForce RTX 4090")[1] == "speed=fast on an RTX 4090"
    assert rates.gpu_class("NVIDIA L40S") == "L40S" and rates.gpu_class("NVIDIA L4") == "L4" and not rates.gpu_class("Voodoo 2")
    forecast = rates.Forecast(36000, 10, "speed=exact on an A100")
    with caplog.at_level("INFO", "erasebench"):
        forecast.begin()
        forecast.correct({"unet_samples": 0, "seconds": 0.1})  # all were refused
        forecast.correct({"unet_samples": 3600, "seconds": 36.0})
        forecast.correct({"unet_samples": 3600, "seconds": 1.0})
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("about 1.0 h of sampling at 10 U-Net") and "assumed: speed=exact on an A100" in said[0]
    assert said[1].startswith("about 5 min of sampling at 100 U-Net") and len(said) == 2
    caplog.clear()
    with caplog.at_level("INFO", "erasebench"):
        execute(make_run("none", NoErasure(), images=1))
    assert sum("of sampling at" in record.getMessage() for record in caplog.records) == 2
    report = dry.report([dry.planned(make_run("none", NoErasure(), images=3))], [], None)
    assert "assumed: speed=exact on an A100" in report and "rate=" in report
