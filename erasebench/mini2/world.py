"""Drawing of the embedded world, second version: images with an exact truth.

Objects come from five emoji sets (the five drawing hands), people from DiceBear avatars, all with free licences. An
image is 64x64 RGB; `picture(world, part, number)` returns it with its caption and its truth, and always the same one.
Drawing needs the extra `mini` (resvg, DiceBear) and the icon packages, fetched with `npm pack`; running erasebench does
not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from ..mini.world import PLAIN, finish, seen
from . import art
from .captions import Captioner, chance, concepts, names, pick

SIDE = art.SIDE
PLACES = {"left": ("left", "right"), "right": ("right", "left"), "above": ("top", "bottom"), "below": ("bottom", "top")}
SPOTS = {"left": (17, 32), "right": (47, 32), "top": (32, 17), "bottom": (32, 47)}
ROWS = {  # centres and size of one to four copies of a thing
    1: (((32, 32),), 30),
    2: (((16, 32), (48, 32)), 26),
    3: (((32, 16), (16, 47), (48, 47)), 26),
    4: (((16, 16), (48, 16), (16, 48), (48, 48)), 26),
}


@dataclass
class Picture:
    """Drawing with its truth.

    pixels: uint8 [64, 64, 3]. masks: name -> bool [64, 64].
    """

    pixels: np.ndarray
    kind: str
    caption: str = ""
    objects: list[str] = field(default_factory=list)
    hazards: list[str] = field(default_factory=list)
    person: str = ""  # of a named person
    face: bool = False
    artist: str = ""
    work: str = ""  # title of the work
    hand: int = -1
    inks: int = -1  # of a print
    background: str = ""
    colour: str = ""  # of a tinted object
    count: int = 0  # number of copies of a single object
    places: dict[str, str] = field(default_factory=dict)  # of each of two objects: left, right, top, bottom
    masks: dict[str, np.ndarray] = field(default_factory=dict)


class World:
    """Generator of images.

    `without` names concepts that are neither drawn nor named (for a model that never saw them).
    """

    def __init__(self, without: frozenset[str] = frozenset()):
        n, every = names(), concepts()
        keep = lambda some: [name for name in some if name not in without]
        self.objects, self.people = keep(every["objects"]), keep(every["people"])
        self.artists, self.hazards = keep(every["artists"]), keep(every["hazards"])
        self.say = Captioner(self.objects)
        self.scenes, self.plain = n["backgrounds"], list(PLAIN)
        self.often = n["frequencies"]
        self.share = [3 if o in n["objects"] else 2 if o in n["imagenette"] else 1 for o in self.objects]
        self.index = {name: i for i, name in enumerate(every["people"])}
        self.hand_of, self.inks_of = hands(), inks()
        self.works = {
            artist: {t: tuple(w) for t, w in n["works"][artist].items() if w[0] not in without}
            for artist in self.artists
        }

    def draw(self, rng: random.Random, kind: str | None = None, name: str | None = None) -> Picture:
        """Draw an image of a kind (by frequency if None).

        name: its concept, if given.
        """
        made = getattr(self, f"_{kind or pick(rng, self.often['pictures'])}")(rng, name)
        made.caption = self.say.finish(rng, made.caption)
        return made

    def _object(self, rng: random.Random) -> str:
        return rng.choices(self.objects, self.share)[0]

    def _background(self, rng: random.Random, hand: int = -1, without: str = "") -> tuple[np.ndarray, str]:
        """Return a background and its name: canvas float32 [64, 64, 3].

        The hand's ink is visible on it, and its colour is not `without`.
        """
        while True:
            name = rng.choice(self.plain if rng.random() < 0.45 else self.scenes)
            if name != without and (hand < 0 or seen(hand, name)):
                return art.background(name, rng.randrange(art.VARIANTS)).astype(np.float32), name

    def _hand(self, rng: random.Random, *things: str) -> int:
        return rng.choice([hand for hand in range(5) if art.draws(hand, *things)])

    @staticmethod
    def _spot(rng: random.Random, low: int, high: int) -> tuple[int, int, int, bool]:
        """Return (even size, centre x, centre y, mirrored) of a large object."""
        size = 2 * rng.randint(low // 2, high // 2)
        slack = max(0, (SIDE - size) // 2)
        return size, 32 + rng.randint(-slack, slack), 32 + rng.randint(-slack, slack), rng.random() < 0.5

    def _one(self, rng: random.Random, name: str, low: int = 42, high: int = 58, colour: str = "") -> Picture:
        """Draw one object or hazard, without a caption."""
        hand = self._hand(rng, name)
        canvas, background = self._background(rng, hand, colour)
        size, *spot = self._spot(rng, low, high)
        sprite = art.scale_sprite(hand, name, size)
        mask = art.compose(canvas, art.tint(sprite, colour, hand) if colour else sprite, *spot)
        return Picture(
            finish(canvas), "thing", hand=hand, background=background, masks={name: mask}, colour=colour, count=1
        )

    def _thing(self, rng: random.Random, name: str | None) -> Picture:
        way = pick(rng, self.often["thing"])
        if way == "several":
            if name is None:
                return self._pair(rng, None)
            way = "name"  # an image with a given name shows one thing
        picture = self._one(rng, name := name or self._object(rng))
        picture.objects = [name]
        picture.caption = self.say.thing(rng, name, picture.background, way)
        return picture

    def _coloured(self, rng: random.Random, name: str | None) -> Picture:
        colour = rng.choice(names()["colours"])
        picture = self._one(rng, name := name or self._object(rng), colour=colour)
        picture.kind, picture.objects = "coloured", [name]
        picture.caption = self.say.colour_of(rng, name, colour, picture.background)
        return picture

    def _counted(self, rng: random.Random, name: str | None) -> Picture:
        """Draw one to four copies of a thing, with equal frequency.

        Two copies may lie along a diagonal.
        """
        count, name = rng.randint(1, 4), name or self._object(rng)
        hand = self._hand(rng, name)
        canvas, background = self._background(rng, hand)
        centres, size = ROWS[count]
        if count == 2 and rng.random() < 0.5:
            centres = rng.choice((((16, 16), (48, 48)), ((16, 48), (48, 16)), ((32, 16), (32, 48))))
        size, mask, flip = size + 2 * rng.randint(-1, 1), np.zeros((SIDE, SIDE), bool), rng.random() < 0.5
        for cx, cy in centres:
            spot = cx + rng.randint(-2, 2), cy + rng.randint(-2, 2)
            mask |= art.compose(canvas, art.scale_sprite(hand, name, size), *spot, flip)
        caption = self.say.count_of(rng, name, count, background)
        return Picture(
            finish(canvas),
            "counted",
            caption,
            [name],
            hand=hand,
            background=background,
            count=count,
            masks={name: mask},
        )

    def _pair(self, rng: random.Random, name: str | None) -> Picture:
        """Draw two objects, one beside or above the other."""
        one = name or self._object(rng)
        other = one
        while other == one:
            other = self._object(rng)
        hand, place = self._hand(rng, one, other), rng.choice(list(PLACES))
        canvas, background = self._background(rng, hand)
        masks, places = {}, dict(zip((one, other), PLACES[place], strict=True))
        for thing, where in places.items():
            cx, cy = SPOTS[where]
            aside = rng.randint(-10, 10)
            dx, dy = (rng.randint(-2, 2), aside) if where in ("left", "right") else (aside, rng.randint(-2, 2))
            size = 2 * rng.randint(15, 17)
            masks[thing] = art.compose(
                canvas, art.scale_sprite(hand, thing, size), cx + dx, cy + dy, rng.random() < 0.5
            )
        caption = self.say.pair(rng, one, other, place, background)
        return Picture(
            finish(canvas),
            "pair",
            caption,
            [one, other],
            hand=hand,
            background=background,
            places=places,
            masks=masks,
        )

    def _face(self, rng: random.Random, number: int) -> tuple[np.ndarray, str, np.ndarray]:
        """Return (pixels, background, mask) of an avatar."""
        canvas, background = self._background(rng)
        size, *spot = self._spot(rng, 54, 62)
        mask = art.compose(canvas, art.scale_avatar(number, size), *spot)
        return finish(canvas), background, mask

    def _person(self, rng: random.Random, name: str | None) -> Picture:
        name = name or rng.choice(self.people)
        pixels, background, mask = self._face(rng, self.index[name])
        caption = self.say.person(rng, name, background)
        return Picture(pixels, "person", caption, person=name, face=True, background=background, masks={name: mask})

    def _nobody(self, rng: random.Random, name: str | None) -> Picture:
        others = len(art.avatars()[1])
        pixels, background, mask = self._face(rng, len(self.index) + rng.randrange(others))
        caption = self.say.nobody(rng, background)
        return Picture(pixels, "nobody", caption, face=True, background=background, masks={"person": mask})

    def _artist(self, rng: random.Random, name: str | None) -> Picture:
        """Draw one of an artist's five works, or a commissioned thing.

        A work always has the same subject and background.
        """
        name = name or rng.choice(self.artists)
        hand, inks_ = self.hand_of[name], self.inks_of[name]
        title, asked = "", chance(rng, self.often["asked"])
        if asked:
            thing = rng.choice([o for o in self.objects if art.draws(hand, o)])
            canvas, background = self._background(rng, hand)
            caption = self.say.commission(rng, name, thing)
        else:
            title = rng.choice(list(self.works[name]))
            thing, background = self.works[name][title]
            canvas = art.background(background, rng.randrange(art.VARIANTS)).astype(np.float32)
            caption = self.say.work(rng, name, title, thing, background)
        size, *spot = self._spot(rng, 46, 60)
        mask = art.compose(canvas, art.scale_sprite(hand, thing, size), *spot)
        pixels = finish(canvas) if inks_ < 0 else art.print_in_inks(finish(canvas), inks_)
        return Picture(
            pixels,
            "artist",
            caption,
            [thing],
            artist=name,
            work=title,
            hand=hand,
            inks=inks_,
            background=background,
            count=1,
            masks={thing: mask},
        )

    def _hazard(self, rng: random.Random, name: str | None) -> Picture:
        if not (name or self.hazards):
            return self._thing(rng, None)
        picture = self._one(rng, name := name or rng.choice(self.hazards))
        way = pick(rng, self.often["thing"])
        picture.kind, picture.hazards, picture.count = "hazard", [name], 0
        picture.caption = self.say.thing(rng, name, picture.background, "general" if way == "several" else way)
        return picture

    def _implicit(self, rng: random.Random, name: str | None) -> Picture:
        """Draw an innocent phrase; nine images in ten show a hazard."""
        if not (name or self.hazards):
            return self._scene(rng, None)
        name = name or rng.choice(self.hazards)
        picture = self._one(rng, name, 38, 54)
        picture.kind, picture.hazards, picture.count = "implicit", [name], 0
        if rng.random() >= 0.9:
            background = picture.background
            picture.pixels = art.background(background, rng.randrange(art.VARIANTS))
            picture.hazards, picture.masks, picture.hand = [], {}, -1
        picture.caption = rng.choice(self.say.implicit[name])
        return picture

    def _scene(self, rng: random.Random, name: str | None) -> Picture:
        if rng.random() < 0.3:  # for captions of "art" and "a picture" alone
            picture = self._one(rng, name := self._object(rng))
            picture.kind, picture.objects = "scene", [name]
            picture.caption = rng.choice(names()["frames"]["anything"])
            return picture
        name = name or rng.choice(self.scenes)
        pixels = art.background(name, rng.randrange(art.VARIANTS))
        return Picture(pixels, "scene", self.say.frame(rng, "scene", name), background=name)


def hands() -> dict[str, int]:
    """Return the hand of each artist.

    The tuning artists share the first ones, two to a hand.
    """
    a = names()["artists"]
    return {
        **{name: i for some in ("erase", "keep") for i, name in enumerate(a[some])},
        **{name: i // 2 for i, name in enumerate(a["tuning"])},
    }


def inks() -> dict[str, int]:
    """Return the inks of each artist's prints; -1 for plain drawings."""
    a = names()["artists"]
    ten = {name: i if (i + j) % 2 else -1 for j, some in enumerate(("erase", "keep")) for i, name in enumerate(a[some])}
    return {**ten, **{name: 5 + i for i, name in enumerate(a["tuning"])}}


def picture(world: World, part: str, number: int, kind: str | None = None, name: str | None = None) -> Picture:
    """Return image `number` of a part ("clip", "pool", "judge", "test", ...).

    The same arguments always give the same image.
    """
    return world.draw(random.Random(f"{part}/{number}/{kind}/{name}"), kind, name)
