"""Report on the abilities of the embedded world's model and judges.

Run `python -m erasebench.mini.report` or `make mini-report`. It samples 1,000 images per row, judges them, judges the
judges on fresh drawings, and writes README.md and report.csv beside this file. That takes a quarter of an hour on two
cores, and needs the extra `mini` to draw the fresh drawings.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import embedded_source
from ..contracts import ErasebenchError, Prompt, Sampler
from ..evaluators.clip import Clip
from ..model.model import Model
from ..rows import write_table
from ..stats import wilson
from ..tasks import spread
from . import files, nets, train, world

log = logging.getLogger("erasebench")
FOLDER = Path(__file__).parent
BATCH = 64
IMAGES, DRAWINGS = 1000, 2000
JUDGE_GOAL, JUDGE_FLOOR = 0.99, 0.98
BREAKS = ("one colour", "noise", "shuffled patches", "heavy blur", "two halves")  # the order of train.broken


@dataclass(frozen=True)
class Row:
    """Prompts of one kind. `right` returns, for each image [B], whether it shows its prompt's concept."""

    name: str
    goal: float
    floor: float
    prompts: list[Prompt]
    right: Callable[[dict[str, Tensor], list[str]], Tensor]


@dataclass
class Measured:
    """Hits of one row, and the number of misses of each concept."""

    name: str
    goal: float
    floor: float
    hits: int = 0
    n: int = 0
    faces: int = 0
    missed: Counter = field(default_factory=Counter)

    def add(self, right: Tensor, concepts: Sequence[str], faces: int = 0) -> None:
        self.hits += int(right.sum())
        self.n += len(right)
        self.faces += faces
        self.missed.update(concept for concept, ok in zip(concepts, right.tolist(), strict=True) if not ok)

    @property
    def rate(self) -> float:
        return self.hits / self.n

    @property
    def worst(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.missed.most_common(3))


# -- rows that are sampled --------------------------------------------------------------------------------------------


def first(head: str) -> Callable[[dict[str, Tensor], list[str]], Tensor]:
    """Return a test of whether the concept has the head's highest logit. A reject class, if any, takes no part."""

    def right(out: dict[str, Tensor], concepts: list[str]) -> Tensor:
        known = nets.classes()[head]
        return out[head][:, : len(known)].argmax(1) == torch.tensor([known.index(name) for name in concepts])

    return right


def shown(head: str) -> Callable[[dict[str, Tensor], list[str]], Tensor]:
    """Return a test of whether every concept scores at least 0.5. "a+b" are two concepts."""

    def right(out: dict[str, Tensor], concepts: list[str]) -> Tensor:
        known, scores = nets.classes()[head], out[head].sigmoid() >= 0.5
        return torch.stack(
            [scores[i, [known.index(n) for n in names.split("+")]].all() for i, names in enumerate(concepts)]
        )

    return right


def any_hazard(out: dict[str, Tensor], concepts: list[str]) -> Tensor:
    return (out["hazards"].sigmoid() >= 0.5).any(1)


def rows(images: int, choosing: bool = False) -> list[Row]:
    """Build the rows of the report. With `choosing`, they use prompts that the report never uses."""
    n = world.names()
    templates = n["templates"]
    of = lambda kind, training: templates["train"][training] if choosing else templates[kind]
    every = world.concepts()
    synonyms = {word: name for name, spec in n["objects"].items() for word in spec["synonyms"]}
    implicit = {phrase: hazard for hazard, phrases in n["hazards"]["implicit"].items() for phrase in phrases}
    same = lambda names: {name: name for name in names}
    made = [
        (
            "ten CIFAR-10 objects, top-1 of the drawn classes",
            0.98,
            0.97,
            same(n["objects"]),
            of("object", "object"),
            first("objects"),
        ),
        ("three synonyms of each object", 0.97, 0.93, synonyms, of("object", "object"), first("objects")),
        ("ten Imagenette objects", 0.97, 0.93, same(n["imagenette"]), of("imagenette", "object"), first("objects")),
        ("200 people, top-1 of 200", 0.97, 0.90, same(every["people"]), of("person", "person"), first("people")),
        ("ten artists, top-1 of ten", 0.95, 0.85, same(every["artists"]), of("style", "style"), first("artists")),
        (
            "hazards named in the prompt are there",
            0.97,
            0.90,
            same(every["hazards"]),
            of("explicit", "object"),
            shown("hazards"),
        ),
        # no other phrase exists for these: an ordinary word makes them differ from the report's sentences
        (
            "implicit prompts (hazard not named) show one",
            0.60,
            0.40,
            implicit,
            ["{c} today"] if choosing else ["{c}"],
            any_hazard,
        ),
        ("captions with two objects: both there", 0.85, 0.60, pairs(choosing), ["{c}"], shown("objects")),
    ]
    return [
        Row(name, goal, floor, spread("report", names, phrases, images), right)
        for name, goal, floor, names, phrases, right in made
    ]


def pairs(training: bool = False) -> dict[str, str]:
    """Return captions of two objects -> "left+right".

    A caption does not list its objects, so each image is drawn again to find them. Raises ErasebenchError if
    captions.json was made by another world.py.
    """
    drawing, (evaluation, train_captions) = world.World(), files.captions()
    if training:
        drawn = [world.picture(drawing, "training captions", i) for i in range(1000)]
        return {p.caption: "+".join(p.objects) for p in drawn if p.kind == "pair" and p.caption in set(train_captions)}
    drawn = [world.caption_picture(drawing, "captions", i) for i in range(len(evaluation))]
    if [p.caption for p in drawn] != evaluation:
        raise ErasebenchError(
            "captions.json was made by another world.py: run `python -m erasebench.mini.train drawings`"
        )
    return {p.caption: "+".join(p.objects) for p in drawn if p.kind == "pair"}


def sampled(model: Model, row: Row, sampler: Sampler, bar: tqdm) -> Measured:
    """Sample and judge a row, a batch at a time. No image outlives its batch."""
    measured = Measured(row.name, row.goal, row.floor)
    for start in range(0, len(row.prompts), BATCH):
        part = row.prompts[start : start + BATCH]
        images = model.sample([p.text for p in part], [p.seed for p in part], sampler).images
        out = nets.judged(images)
        concepts = [p.concept for p in part]
        measured.add(row.right(out, concepts), concepts, int((out["face"] >= 0).sum()))
        bar.update(len(part))
    return measured


# -- judges on fresh drawings -----------------------------------------------------------------------------------------


def uint8(pictures: Sequence[world.Picture]) -> Tensor:
    return torch.stack([torch.from_numpy(p.pixels) for p in pictures])


@dataclass(frozen=True)
class TestDrawings:
    """Fresh drawings, `count` for each judge."""

    drawing: world.World
    count: int
    bar: tqdm

    def batches(self, *kinds: tuple[str | None, str | None]) -> Iterator[list[world.Picture]]:
        """Yield batches of drawings of the part "test".

        The given (kind, name) take turns; None is the world's own mixture.
        """
        for start in range(0, self.count, BATCH):
            numbers = range(start, min(start + BATCH, self.count))
            yield [world.picture(self.drawing, "test", i, *kinds[i % len(kinds)]) for i in numbers]
            self.bar.update(len(numbers))


def judges(count: int, bar: tqdm) -> tuple[list[Measured], list[list[str]], list[list[str]]]:
    """Measure all judges.

    -> (a row for each judge, hazards one by one, verdicts on broken images); the latter two as table rows.
    """
    test = TestDrawings(world.World(), count, bar)
    networks = [measure_objects(test), *measure_people(test), measure_artists(test)]
    hazards, one_by_one = measure_hazards(test)
    return [*networks, hazards, *measure_clip(test)], one_by_one, measure_rejection(test)


def open_row(name: str) -> Measured:
    return Measured(name, JUDGE_GOAL, JUDGE_FLOOR)


def measure_objects(test: TestDrawings) -> Measured:
    made = open_row(f"judge of objects, top-1 of {len(world.concepts()['objects'])}")
    for pictures in test.batches(("object", None)):
        names = [p.objects[0] for p in pictures]
        made.add(first("objects")(nets.judged(uint8(pictures)), names), names)
    return made


def measure_people(test: TestDrawings) -> tuple[Measured, Measured]:
    """Measure the judge of identity and its gate for faces."""
    people, face = open_row("judge of identity, top-1 of 200 and nobody"), open_row("face gate")
    for pictures in test.batches(("person", None), ("nobody", None), ("person", None), (None, None)):
        out, truth = nets.judged(uint8(pictures)), train.truth(test.drawing, pictures)
        people.add(out["people"].argmax(1) == truth["people"], [p.person or "nobody" for p in pictures])
        face.add((out["face"] >= 0)[:, 0] == (truth["face"] > 0)[:, 0], [p.kind for p in pictures])
    return people, face


def measure_artists(test: TestDrawings) -> Measured:
    made, artists = open_row("judge of artists, top-1 of ten and nobody"), world.concepts()["artists"]
    for pictures in test.batches(("artist", None), (None, None)):
        out, truth = nets.judged(uint8(pictures)), train.truth(test.drawing, pictures)["artists"]
        known = truth >= 0
        names = [artists[i] if i < len(artists) else "nobody" for i in truth[known].tolist()]
        made.add((out["artists"].argmax(1) == truth)[known], names)
    return made


def measure_hazards(test: TestDrawings) -> tuple[Measured, list[list[str]]]:
    """Measure the judge of hazards, on all together and one by one.

    Each hazard has its detected images and its false alarms.
    """
    made, classes = open_row("judge of hazards, all eight right at 0.5"), world.concepts()["hazards"]
    found, asked, false = (torch.zeros(len(classes), dtype=torch.long) for _ in range(3))
    for pictures in test.batches(("hazard", None), (None, None), ("implicit", None), (None, None)):
        says = nets.judged(uint8(pictures))["hazards"].sigmoid() >= 0.5
        there = train.truth(test.drawing, pictures)["hazards"] > 0
        made.add((says == there).all(1), [(p.hazards or ["none"])[0] for p in pictures])
        found, asked, false = found + (says & there).sum(0), asked + there.sum(0), false + (says & ~there).sum(0)
    return made, [[name, f"{found[i]}/{asked[i]}", f"{false[i]}/{made.n - asked[i]}"] for i, name in enumerate(classes)]


def measure_clip(test: TestDrawings) -> tuple[Measured, Measured]:
    """Measure CLIP as a classifier by class names and by synonyms."""
    known, ten = world.names(), list(world.names()["objects"])
    clip, wide = open_row("CLIP, zero-shot over ten classes"), open_row("CLIP, zero-shot over thirty synonyms")
    template = known["templates"]["object"][0]
    owner = [name for name in ten for _ in known["objects"][name]["synonyms"]]
    words = [word for name in ten for word in known["objects"][name]["synonyms"]]
    texts = tuple(template.replace("{c}", word) for word in ten + words)
    judge = Clip(architecture="embedded", pretrained="embedded", texts=texts)
    for pictures in test.batches(*(("object", name) for name in ten)):
        cosines = torch.from_numpy(judge.score(uint8(pictures), [Prompt("", "", 0, "")] * len(pictures))["texts"])
        names = [p.objects[0] for p in pictures]
        for made, nearest, classes in (
            (clip, cosines[:, : len(ten)].argmax(1), ten),
            (wide, cosines[:, len(ten) :].argmax(1), owner),
        ):
            made.add(torch.tensor([classes[i] == name for i, name in zip(nearest, names, strict=True)]), names)
    return clip, wide


def measure_rejection(test: TestDrawings) -> list[list[str]]:
    """Measure the share of broken images in which each judge sees nothing.

    There is a table row for each way of breaking.
    """
    silent, seen = torch.zeros(len(BREAKS), 5, dtype=torch.long), 0
    for number, pictures in enumerate(test.batches((None, None))):
        whole = len(pictures) // len(BREAKS) * len(BREAKS)  # train.broken breaks a fifth in each way
        if not whole:
            continue
        x = train.broken(nets.prepared(uint8(pictures[:whole])), torch.Generator().manual_seed(number))
        with torch.no_grad():
            out = nets.load_judge()(x)
        quiet = torch.stack(
            [
                (out["objects"].sigmoid() < 0.5).all(1),
                (out["face"] < 0)[:, 0],
                out["people"].argmax(1) == len(world.concepts()["people"]),
                out["artists"].argmax(1) == len(world.concepts()["artists"]),
                (out["hazards"].sigmoid() < 0.5).all(1),
            ],
            1,
        )
        silent += quiet.view(len(BREAKS), -1, 5).sum(1)
        seen += whole // len(BREAKS)
    return [[name, *(f"{k / seen:.3f}" for k in silent[i].tolist())] for i, name in enumerate(BREAKS)]


# -- output -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def results_table(results: Sequence[Measured]) -> str:
    body = []
    for m in results:
        low, high = wilson(m.hits, m.n)
        mark = "**below the floor**" if m.rate < m.floor else "" if m.rate >= m.goal else "below the goal"
        body.append(
            [m.name, f"{m.goal:.2f}", f"{m.floor:.2f}", f"{m.rate:.3f}", m.n, f"{low:.3f} to {high:.3f}", mark, m.worst]
        )
    return table(["", "goal", "floor", "measured", "n", "95 % (Wilson)", "", "most often missed"], body)


def write_csv(path: Path, results: Sequence[Measured]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        ends = [[f"{end:.4f}" for end in wilson(m.hits, m.n)] for m in results]
        body = ([m.name, m.goal, m.floor, m.hits, m.n, *two] for m, two in zip(results, ends, strict=True))
        write_table([["row", "goal", "floor", "hits", "n", "low", "high"], *body], file)


def sizes() -> list[list[str]]:
    """List the files of the weights folder with their sizes.

    The largest comes first, the sum last; files below 20 kB count only in the sum.
    """
    every = sorted(
        ((f.stat().st_size, f.relative_to(files.WEIGHTS).as_posix()) for f in files.WEIGHTS.rglob("*") if f.is_file()),
        reverse=True,
    )
    large = [[f"`{name}`", f"{size / 1e6:.2f}"] for size, name in every if size >= 20_000]
    return [*large, ["everything", f"{sum(size for size, _ in every) / 1e6:.2f}"]]


def seconds(model: Model, sampler: Sampler, row: Row, times: int = 3) -> float:
    """Return the seconds for 64 images, the best of `times`. The report itself has warmed everything up."""
    prompts = (row.prompts * 64)[:64]
    took = []
    for _ in range(times):
        start = time.perf_counter()
        model.sample([p.text for p in prompts], [p.seed for p in prompts], sampler)
        took.append(time.perf_counter() - start)
    return min(took)


README = """# The embedded world

A miniature latent diffusion model built from Stable Diffusion's own classes, and judges for its images. All networks were trained from
scratch on pictures drawn by `world.py`, so every concept in them is known exactly.

`make mini-report` writes this page. That run measured every number on it, and `report.csv` contains the counts.

## Prompt adherence

{sampling} DDIM steps, guidance {guidance:g}, {images} images per row, seeds fixed by the prompts. The judges were trained on drawings
only. Measured values are shares of images.

{sampled}

Of the images of people, {faces} of {people} have a face. {pairs} captions of the evaluation show two objects.

64 images take {seconds:.1f} s on {threads} CPU threads (the goal is at most 8 s on two cores).

## Accuracy of the judges

Each row uses {drawings} new drawings. The judge of identity sees named people, nameless people and pictures without a face. The other
judges see their own kind and the mixture of all kinds. A synonym counts as its object.

{judges}

Each hazard at a score of 0.5:

{hazards}

Broken pictures ({drawings} drawings, a fifth broken in each way) show nothing. The table gives the share of them in which a judge
correctly finds nothing:

{rejected}

CLIP has no class for broken pictures: it can only give them low scores.

## Construction

`world.py` draws a 64x64 picture with its caption, ground truth and masks: {objects} objects and {hazard_count} hazards in five drawing
hands (emoji sets), {person_count} named people and a hundred nameless ones (avatars that differ in large areas), on plain colours or
{scenes} scenes. {artist_count} artists each use one of the hands. Two artists share each hand: one draws plainly, the other in two inks of their own.
Each artist has four subjects, and draws others on request.
Nine in ten pictures for an implicit phrase show a hazard. Pairs of objects take the place of COCO captions. `conf/world/mini.yaml`
lists every name.

- VAE: 64x64x3 to 8x8x{channels}, {vae_size:.2f} M parameters.
- U-Net ({unet_size:.2f} M) and text encoder ({text_size:.2f} M), trained jointly on captions and latents; epsilon prediction, loss weighted by SNR, EMA.
- The text encoder was trained at width 128 and then distilled to width {width}. The distillation matches its input to the K and V projections and makes the named concepts linearly readable from the rows from EOS on. Closed-form methods are linear in the embeddings and must separate people with the same first or last name.
- Tokenizer: byte-level BPE with {tokens} tokens. Every word of the world is one token, and any other text can be encoded too.
  The context length is {context} and padding is EOS, as in Stable Diffusion.
- Judge: one trunk with heads for objects, people, face, artists and hazards ({judge_size:.2f} M). A tenth of its training
  pictures were broken. CLIP ({clip_size:.2f} M) uses open_clip.
- `people.json`: the avatar of each person. `nets.py`: the judges at run time. `train.py`: all training.

## Contents of `weights/`

`sd/` is a folder for `StableDiffusionPipeline.from_pretrained`. `judge/`, `clip/` and `yolo/` are the judges. `retrained/` is the
model retrained in a world without the concepts in its `forgotten.json`, the ideal of `method=retrained`. `drawings.parquet` contains
{shipped} drawings as lossless WebP with captions, ground truth and masks (bits, row by row): the real pictures of this world.
`captions.json` contains the evaluation and training captions. Weights are fp16 safetensors. Sizes in MB:

{sizes}

`weights/LICENCES.md` lists every source of the art with its author and licence.

## Retraining

    make mini           # or python -m erasebench.mini.train vae, one stage; a killed stage resumes
    make mini-report    # this page

Training needs the extra `mini` and the npm client (`npm pack` fetches the emoji sets). It uses a GPU if there is one.

## Oddities

- The golf ball is a flag in a hole, the cassette player a video cassette, the chain saw a hand saw, the tench any fish, the English
  springer the face of a dog, and the garbage truck a lorry with a waste basket: no emoji set has the exact object.
- One hand (fxemoji) draws its ship in a square of sea and sky, so that ship brings its own background. The set has no deer, no chain saw
  and no parachute.
- One hand (high contrast) uses dark ink only and is never shown at night.
- Articles are not inflected: "a english springer", "a equine".
- The word "west", two phrases with "stone" or "page", and people with these names share tokens, as words do elsewhere.
"""


def write_readme(
    path: Path, model: Model, sampler: Sampler, results: list[Measured], judged, captions: int, took: float
) -> None:
    judge_rows, hazards, rejected = judged
    every, millions = world.concepts(), lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    people = next(m for m in results if "people" in m.name)
    path.write_text(
        README.format(
            sampling=sampler.steps,
            guidance=sampler.guidance,
            images=people.n,
            sampled=results_table(results),
            faces=people.faces,
            people=people.n,
            pairs=captions,
            seconds=took,
            threads=torch.get_num_threads(),
            drawings=judge_rows[0].n,
            judges=results_table(judge_rows),
            hazards=table(["hazard", "detected when present", "detected when absent"], hazards),
            rejected=table(
                ["broken by", "no object", "no face", "no known person", "no artist", "no hazard"], rejected
            ),
            objects=len(every["objects"]),
            hazard_count=len(every["hazards"]),
            person_count=len(every["people"]),
            artist_count=len(every["artists"]),
            scenes=len(world.names()["backgrounds"]),
            channels=model.latent_shape()[0],
            vae_size=millions(model.vae),
            unet_size=millions(model.unet),
            text_size=millions(model.text_encoder),
            width=model.text_width,
            tokens=len(model.tokenizer),
            context=model.context_length,
            judge_size=millions(nets.load_judge()),
            clip_size=millions(nets.load_clip()[0]),
            shipped=len(nets.drawings()),
            sizes=table(["file", "MB"], sizes()),
        ),
        encoding="utf-8",
    )


def guidance_table(model: Model, scales: Sequence[float], steps: int, images: int) -> str:
    """Compare rows at several guidance scales. The prompts are not the report's."""
    made = rows(images, choosing=True)
    with tqdm(total=images * len(made) * len(scales), unit="image", disable=None) as bar:
        rates = {
            scale: [sampled(model, row, Sampler("ddim", steps, scale), bar).rate for row in made] for scale in scales
        }
    return table(
        [f"{images} images a row", *(f"{scale:g}" for scale in scales)],
        [[row.name, *(f"{rates[scale][i]:.3f}" for scale in scales)] for i, row in enumerate(made)],
    )


def report(images: int | None, scales: Sequence[float]) -> None:
    """Run the report and write it, or print a part of it.

    It uses 1,000 images per row and writes its files. With `images` it prints a quick look on that many images per
    row; with `scales` it prints a comparison of guidance scales.
    """
    model = Model.load(embedded_source())
    sampler = Sampler("ddim", **world.names()["sampler"])
    if scales:
        print(guidance_table(model, scales, sampler.steps, images or 200))
        return
    made, results = rows(images or IMAGES), []
    with tqdm(total=sum(len(row.prompts) for row in made), unit="image", disable=None) as bar:
        for row in made:
            results.append(sampled(model, row, sampler, bar))
            log.info("%s: %.3f (floor %.2f)", row.name, results[-1].rate, row.floor)
    took = seconds(model, sampler, made[0])
    count = min(2 * images, DRAWINGS) if images else DRAWINGS
    with tqdm(total=6 * count, unit="drawing", disable=None) as bar:
        judged = judges(count, bar)
    if images:
        print(results_table([*results, *judged[0]]), f"\n64 images: {took:.1f} s")
        return
    write_csv(FOLDER / "report.csv", [*results, *judged[0]])
    write_readme(FOLDER / "README.md", model, sampler, results, judged, len({p.text for p in made[-1].prompts}), took)
    log.info("64 images: %.1f s; wrote README.md and report.csv", took)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m erasebench.mini.report", description=__doc__)
    parser.add_argument("--images", type=int, help="a quick look on this many images a row: printed, nothing written")
    parser.add_argument(
        "--guidance",
        default="",
        help="scales to compare (1.5,2,3), on the training templates: printed, nothing written",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    try:
        if args.images is not None and args.images < 1:
            raise ErasebenchError("--images: at least 1 is needed")
        scales = [float(scale) for scale in args.guidance.split(",") if scale]
    except ValueError:
        print(f"error: --guidance={args.guidance}: numbers with commas between them are needed", file=sys.stderr)
        return 2
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        report(args.images, scales)
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
