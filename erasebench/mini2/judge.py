"""Stage `judge`: the judge of objects, people, artists, hazards, colours, counts and places, on drawings as it goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..mini.train import broken, worn
from .art import COLOURS
from .captions import concepts
from .clip import pixels
from .loop import Recipe, fit
from .nets import WEIGHTS, Judge
from .world import SPOTS, Picture, World, hands, inks, picture

RECIPE = Recipe(steps=6_000, lr=2e-3, decay=0.02)
BATCH = 128
KINDS = (None, None, None, "pair", None, "counted", "person", "coloured")  # what is hardest to see comes up more often
PEOPLE = ("person", "person", "person", "nobody")
IGNORED = -1
LAID = tuple(SPOTS)  # left, right, top, bottom


def classes() -> dict[str, list[str]]:
    """Names of the judge's classes; one more class of people, artists and colours is `none of them`."""
    return {**concepts(), "colours": list(COLOURS)}


def truth(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """Labels of pictures for every head; IGNORED where a picture has no answer.

    An artist is who draws with this hand in these inks: a plain drawing of any kind shows the hand of one, or of nobody.
    """
    known = classes()
    many = lambda names, every: [float(k in names) for k in every]
    place = lambda named, every: every.index(named) if named else len(every)
    style = {(hands()[a], inks()[a]): i for i, a in enumerate(known["artists"])}
    nobody = len(known["artists"])
    places = torch.zeros(len(pictures), len(known["objects"]), len(LAID))
    for i, p in enumerate(pictures):
        for thing, where in p.places.items():
            places[i, known["objects"].index(thing), LAID.index(where)] = 1
    return {
        "objects": torch.tensor([many(p.objects, known["objects"]) for p in pictures]),
        "hazards": torch.tensor([many(p.hazards, known["hazards"]) for p in pictures]),
        "people": torch.tensor([place(p.person, known["people"]) for p in pictures]),
        "face": torch.tensor([[float(p.face)] for p in pictures]),
        "artists": torch.tensor([nobody if p.hand < 0 else style.get((p.hand, p.inks), IGNORED) for p in pictures]),
        "colours": torch.tensor(
            [IGNORED if p.inks >= 0 or len(p.objects) != 1 else place(p.colour, known["colours"]) for p in pictures]
        ),
        "counts": torch.tensor([p.count - 1 if p.count else IGNORED for p in pictures]),
        "places": places,
    }


def void(label: dict[str, Tensor], rows: int) -> None:
    """Make the first rows, which are broken pictures, mean nothing, in place."""
    for name in ("objects", "hazards", "face", "places"):
        label[name][:rows] = 0
    for name in ("people", "artists", "colours"):
        label[name][:rows] = len(classes()[name])
    label["counts"][:rows] = IGNORED


def loss(out: dict[str, Tensor], label: dict[str, Tensor]) -> Tensor:
    """Sum over the heads; yes-or-no questions, of which hardly any is yes, weigh twenty times (places: 200 times)."""
    yes_no = {"objects": 20.0, "hazards": 20.0, "face": 1.0, "places": 200.0}
    total = sum(w * F.binary_cross_entropy_with_logits(out[name], label[name]) for name, w in yes_no.items())
    total = total + 20 * F.binary_cross_entropy_with_logits(out["by_features"], label["objects"])
    for name in ("people", "artists", "colours", "counts"):
        if (label[name] != IGNORED).any():
            total = total + F.cross_entropy(out[name], label[name], ignore_index=IGNORED)
    return total


def train(
    stage: str = "judge",
    recipe: Recipe = RECIPE,
    batch: int = BATCH,
    kinds: Sequence[str | None] = KINDS,
    folder: Path | None = WEIGHTS,
) -> Judge:
    """Train a judge and, with a folder, write it; a tenth of the pictures are broken and mean nothing."""
    torch.manual_seed(0)
    drawing, spoilt = World(), batch // 10
    model = Judge({name: len(some) for name, some in classes().items()}).to(memory_format=torch.channels_last)

    def loss_of(step: int) -> Tensor:
        model.train()
        generator = torch.Generator().manual_seed(step)
        pictures = [picture(drawing, stage, step * batch + i, kinds[i % len(kinds)]) for i in range(batch)]
        pictures = [pictures[i] for i in torch.randperm(batch, generator=generator).tolist()]
        x, label = pixels(pictures), truth(pictures)
        void(label, spoilt)
        return loss(model(torch.cat([broken(x[:spoilt], generator), worn(x[spoilt:], generator)])), label)

    fit(stage, model, loss_of, recipe)
    model.eval()
    if folder:
        (folder / "judge").mkdir(parents=True, exist_ok=True)
        (folder / "judge" / "classes.json").write_text(json.dumps(classes()), encoding="utf-8")
        half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
        save_file(half, folder / "judge" / "judge.safetensors")
    return model


def load(folder: Path = WEIGHTS) -> Judge:
    """The finished judge of a folder."""
    model = Judge({name: len(some) for name, some in classes().items()})
    state = load_file(folder / "judge" / "judge.safetensors")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval()


@torch.no_grad()
def share_of_people(model: nn.Module, count: int = 2_000) -> float:
    """The share of fresh drawings of people whom the judge knows for who they are, out of all."""
    drawing, known, hits = World(), classes()["people"], 0
    for start in range(0, count, 100):
        pictures = [picture(drawing, "test", i, "person", known[i % len(known)]) for i in range(start, start + 100)]
        hits += int((model(pixels(pictures))["people"].argmax(1) == truth(pictures)["people"]).sum())
    return hits / count


def people(steps: int = 1_500) -> float:
    """Whether a judge can tell all people apart at 64 pixels: train one on people alone, and print how often it is right."""
    share = share_of_people(train("people", Recipe(steps, 2e-3, 0.02), kinds=PEOPLE, folder=None))
    print(f"{len(concepts()['people'])} people: {share:.4f} of fresh drawings are recognised")
    return share
