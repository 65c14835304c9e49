"""Stage `judge`: the judge, trained on drawings made during training.

It recognises objects, people, artists, hazards, colours, counts and places.
"""

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
KINDS = (None, None, None, "pair", None, "counted", "person", "coloured")  # the hardest kinds are more frequent
PEOPLE = ("person", "person", "person", "nobody")
IGNORED = -1
LAID = tuple(SPOTS)  # left, right, top, bottom


def classes() -> dict[str, list[str]]:
    """Return the names of the judge's classes.

    People, artists and colours have one more class, `none of them`.
    """
    return {**concepts(), "colours": list(COLOURS)}


def truth(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """Return labels of images for every head; IGNORED if there is no answer.

    Hand and inks identify an artist: a plain drawing of any kind may show an artist's hand, or that of no artist.
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
    """Reset the labels of the first rows in place.

    These rows are broken images, which show nothing.
    """
    for name in ("objects", "hazards", "face", "places"):
        label[name][:rows] = 0
    for name in ("people", "artists", "colours"):
        label[name][:rows] = len(classes()[name])
    label["counts"][:rows] = IGNORED


def loss(out: dict[str, Tensor], label: dict[str, Tensor]) -> Tensor:
    """Return the sum of the heads' losses.

    Yes-or-no questions, with hardly any positives, have twenty times the weight (places: 200 times).
    """
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
    """Train a judge and, if a folder is given, write it.

    A tenth of the images are broken and show nothing.
    """
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
    """Load the finished judge of a folder."""
    model = Judge({name: len(some) for name, some in classes().items()})
    state = load_file(folder / "judge" / "judge.safetensors")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval()


@torch.no_grad()
def share_of_people(model: nn.Module, count: int = 2_000) -> float:
    """Return the judge's accuracy on fresh drawings of people."""
    drawing, known, hits = World(), classes()["people"], 0
    for start in range(0, count, 100):
        pictures = [picture(drawing, "test", i, "person", known[i % len(known)]) for i in range(start, start + 100)]
        hits += int((model(pixels(pictures))["people"].argmax(1) == truth(pictures)["people"]).sum())
    return hits / count


def people(steps: int = 1_500) -> float:
    """Train a judge on people alone, and print its accuracy.

    It tests whether a judge can tell all people apart at 64 pixels.
    """
    share = share_of_people(train("people", Recipe(steps, 2e-3, 0.02), kinds=PEOPLE, folder=None))
    print(f"{len(concepts()['people'])} people: {share:.4f} of fresh drawings are recognised")
    return share
