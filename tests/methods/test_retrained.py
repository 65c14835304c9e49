"""The perfect eraser: a narrower twin stands in for the base exactly, and only beside what it never saw."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_pipeline
from diffusers import UNet2DConditionModel
from erasebench.methods.retrained import Retrained
from transformers import CLIPTextConfig, CLIPTextModel

from erasebench.contracts import Brief, Concept, ErasebenchError
from erasebench.model.model import Model
from erasebench.model.source import Source, weights_digest

CAT, DOG = Concept("cat", "object", "grass"), Concept("dog", "object", "grass")


@pytest.fixture
def twin(tiny, tmp_path) -> Path:
    """A U-Net and text encoder like the tiny model's, with half the width of the text."""
    torch.manual_seed(1)
    config = {**tiny.text_encoder.config.to_dict(), "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(tmp_path / "twin" / "text_encoder")
    UNet2DConditionModel.from_config({**tiny.unet.config, "cross_attention_dim": 8}).save_pretrained(
        tmp_path / "twin" / "unet"
    )
    (tmp_path / "twin" / "forgotten.json").write_text(json.dumps(["cat"]))
    return tmp_path / "twin"


def test_the_twin_predicts_what_it_predicts_alone(tiny, twin, tmp_path):
    eraser, before = Retrained(str(twin)), weights_digest(tiny.unet, tiny.text_encoder)
    text = CLIPTextModel.from_pretrained(twin / "text_encoder").eval()
    unet = UNet2DConditionModel.from_pretrained(twin / "unet").eval()
    z, t = tiny.noise([3, 4]), torch.tensor([700, 20])
    ids = tiny.tokenize(["a cat", "the dog at night"])
    with torch.no_grad():
        alone = unet(z, t, text(ids)[0])[0]
        base = tiny.eps(z, t, tiny.encode(["a cat", "the dog at night"]))
        assert not eraser.skip(tiny)
        eraser.fit(tiny, Brief((CAT,)), tmp_path, 0)
        with eraser.apply(tiny, tmp_path):
            context = tiny.encode(["a cat", "the dog at night"])
            assert context.hidden.shape[-1] == tiny.text_width
            torch.testing.assert_close(tiny.eps(z, t, context), alone)
            assert tiny.text_encoder.get_input_embeddings().weight.shape[1] == 8
            with tiny.teacher():
                torch.testing.assert_close(tiny.eps(z, t, tiny.encode(["a cat", "the dog at night"])), base)
    assert weights_digest(tiny.unet, tiny.text_encoder) == before and not torch.allclose(alone, base)


def test_it_stands_only_beside_what_it_never_saw(tiny, twin, tmp_path):
    with pytest.raises(ErasebenchError, match="has seen 'dog'"):
        Retrained(str(twin)).fit(tiny, Brief((CAT, DOG)), tmp_path, 0)


def test_another_base_has_no_twin(twin, tmp_path):
    xl = Model.load(Source("xl", build_pipeline(tmp_path / "xl", xl=True)))
    assert "twin" in Retrained(str(twin)).skip(xl)
    tiny = Model.load(Source("tiny", build_pipeline(tmp_path / "tiny")))
    UNet2DConditionModel.from_config({**tiny.unet.config, "norm_num_groups": 2}).save_pretrained(twin / "unet")
    assert "twin" in Retrained(str(twin)).skip(tiny)


def test_a_folder_without_a_retrained_model_is_named(tmp_path):
    with pytest.raises(ErasebenchError, match="holds no retrained model"):
        Retrained(str(tmp_path))


def test_what_it_is_follows_from_its_files(twin):
    first = Retrained(str(twin)).content
    assert first == Retrained(str(twin)).content
    (twin / "forgotten.json").write_text(json.dumps(["dog"]))
    assert Retrained(str(twin)).content != first
