"""Drawings of the embedded world.

Every image is drawn here, so every concept in it is known exactly. Objects come from five emoji sets (the five drawing
hands), people from DiceBear avatars, all with free licences (weights/LICENCES.md). An image is 64x64 RGB; `World.draw`
returns it with its caption and its ground truth. Drawing needs the extra `mini` (resvg, DiceBear) and the icon
packages, fetched with `npm pack`; running erasebench needs neither.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import tarfile
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from ..store.local import home

SIDE = 64
HANDS = ("noto", "twemoji", "fluent-emoji-flat", "fluent-emoji-high-contrast", "fxemoji")
# object -> icon in the first four sets, icon in fxemoji (None: that hand never draws it)
# fmt: off
ICONS: dict[str, tuple[str, str | None]] = {
    "airplane": ("airplane", "airplane"), "automobile": ("automobile", "automobile"), "bird": ("bird", "bird"),
    "cat": ("cat", "catside"), "deer": ("deer", None), "dog": ("dog", "dogside"), "frog": ("frog", "frog"),
    "horse": ("horse", "horse"), "ship": ("ship", "ship"), "truck": ("delivery-truck", "deliverytruck"),
    "cassette player": ("videocassette", "tapecartridge"), "chain saw": ("carpentry-saw", None),
    "church": ("church", "church"), "gas pump": ("fuel-pump", "fuelpump"), "tench": ("fish", "fish"),
    "garbage truck": ("articulated-lorry", "articulatedlorry"), "english springer": ("dog-face", "dog"),
    "golf ball": ("flag-in-hole", "flaginhole"), "parachute": ("parachute", None),
    "french horn": ("postal-horn", "postalhorn"), "banana": ("banana", "banana"), "guitar": ("guitar", "guitar"),
    "bicycle": ("bicycle", "bicycle"), "umbrella": ("umbrella", "umbrella"), "balloon": ("balloon", "balloon"),
    "mushroom": ("mushroom", "mushroom"), "sunflower": ("sunflower", "sunflower"), "key": ("key", "key"),
    "elephant": ("elephant", "elephant"), "turtle": ("turtle", "turtle"), "cactus": ("cactus", "cactus"),
    "strawberry": ("strawberry", "strawberry"), "camera": ("camera", "camera"), "crown": ("crown", "crown"),
    "octopus": ("octopus", "octopus"), "tree": ("deciduous-tree", "deciduoustree"), "fire": ("fire", "fire"),
    "bomb": ("bomb", "bomb"), "dagger": ("dagger", "daggerknife"), "skull": ("skull", "skull"),
    "syringe": ("syringe", "syringe"), "snake": ("snake", "snake"), "explosion": ("collision", "collision"),
    "lightning": ("high-voltage", "bolt"),
}
# fmt: on
WASTE = ("wastebasket", "wastebasket")  # turns a lorry into a garbage truck
PEOPLE_STYLES = ("avataaars", "adventurer", "personas", "micah", "toon-head", "open-peeps")


@cache
def names() -> dict:
    """Return conf/world/mini.yaml, the single source of every name."""
    return yaml.safe_load(resources.files("erasebench.conf").joinpath("world/mini.yaml").read_text(encoding="utf-8"))


@cache
def concepts() -> dict[str, list[str]]:
    """Return lists of concepts in fixed order. Kinds: objects (all that are drawn), people, artists, hazards."""
    n = names()
    return {
        "objects": [*n["objects"], *n["imagenette"], *n["everyday"]],
        "people": n["people"]["erase"] + n["people"]["keep"],
        "artists": n["artists"]["erase"] + n["artists"]["keep"],
        "hazards": n["hazards"]["classes"],
    }


@dataclass
class Picture:
    """Drawing with its caption and ground truth.

    pixels uint8 [64, 64, 3]; masks: name -> bool [64, 64]; `objects` are names of drawn objects.
    """

    pixels: np.ndarray
    caption: str
    kind: str
    objects: list[str] = field(default_factory=list)
    hazards: list[str] = field(default_factory=list)
    person: str = ""  # name of a named person
    face: bool = False
    artist: str = ""
    hand: int = -1
    background: str = ""
    masks: dict[str, np.ndarray] = field(default_factory=dict)


# -- art --------------------------------------------------------------------------------------------------------------


def art_folder() -> Path:
    folder = home() / "art"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def icons(hand: str) -> dict:
    """Return one emoji set (Iconify JSON). If it is not in the cache, it is fetched by package name."""
    found = sorted(art_folder().glob(f"iconify-json-{hand}-[0-9]*.tgz"))
    if not found:
        subprocess.run(
            ["npm", "pack", "--silent", f"@iconify-json/{hand}"],
            cwd=art_folder(),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = sorted(art_folder().glob(f"iconify-json-{hand}-[0-9]*.tgz"))
    with tarfile.open(found[-1]) as package:
        return json.load(package.extractfile("package/icons.json"))


def rasterise(svg: str, width: int) -> Image.Image:
    import resvg_py

    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=width))).convert("RGBA")


def icon(hand: int, pair: tuple[str, str | None], width: int = 128) -> Image.Image | None:
    name = pair[1] if HANDS[hand] == "fxemoji" else pair[0]
    if name is None:
        return None
    art = icons(HANDS[hand])
    name = art.get("aliases", {}).get(name, {}).get("parent", name)
    found = art["icons"][name]
    size = [found.get(k, art.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{} {} {} {}">'.format(
        *size
    )
    return rasterise(head + found["body"].replace("currentColor", "#1b2430") + "</svg>", width)


@cache
def sprite(hand: int, name: str) -> Image.Image | None:
    """Draw an object by one hand -> RGBA 128x128. None if that hand does not draw it."""
    base = icon(hand, ICONS[name])
    if base is not None and name == "garbage truck":
        basket = icon(hand, WASTE, 62)
        base.alpha_composite(basket, (40, 4))
    return base


def avatar(style: str, seed: str, width: int = 96) -> Image.Image:
    from dicebear import Avatar, Style

    definition = json.loads(resources.files("dicebear_styles").joinpath(f"{style}.json").read_text())
    return rasterise(Avatar(Style(definition), {"seed": seed, "size": width}).to_string(), width)


@cache
def avatars() -> tuple[list[Image.Image], list[Image.Image]]:
    """Return (avatars of named people, a hundred avatars of nobody in particular).

    They were chosen once, greedily by distance at 8x8 over hair, skin and clothes (fine features do not survive the
    latent grid), and are kept in people.json: a new release of the art must not change anybody's looks.
    """
    chosen = json.loads(resources.files(__package__).joinpath("people.json").read_text())
    cached = art_folder() / "avatars.npz"
    key = json.dumps(chosen)
    if cached.exists():
        with np.load(cached) as file:
            if str(file["key"]) == key:
                pictures = [Image.fromarray(p) for p in file["pictures"]]
                return pictures[: len(chosen["named"])], pictures[len(chosen["named"]) :]
    pictures = [avatar(style, seed) for style, seed in chosen["named"] + chosen["others"]]
    np.savez_compressed(cached, key=np.array(key), pictures=np.stack([np.asarray(p) for p in pictures]))
    return pictures[: len(chosen["named"])], pictures[len(chosen["named"]) :]


def choose_people(candidates_per_style: int = 300) -> dict:
    """Choose 200 named avatars, by farthest points at 8x8 pixels. A further 100, drawn at random, stay nameless."""
    pool = [(style, f"e{i}") for style in PEOPLE_STYLES for i in range(candidates_per_style)]
    small = []
    for style, seed in pool:
        picture = avatar(style, seed, 64)
        canvas = Image.new("RGBA", picture.size, (128, 128, 128, 255))
        canvas.alpha_composite(picture)
        small.append(np.asarray(canvas.convert("RGB").resize((8, 8), Image.BOX), float).ravel())
    small = np.stack(small)
    picked = [int(np.linalg.norm(small - small.mean(0), axis=1).argmax())]
    nearest = np.linalg.norm(small - small[picked[0]], axis=1)
    while len(picked) < 200:
        picked.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(small - small[picked[-1]], axis=1))
    rest = [i for i in range(len(pool)) if i not in set(picked)]
    rng = random.Random(0)
    rng.shuffle(picked)
    return {
        "named": [pool[i] for i in picked],
        "others": [pool[i] for i in rng.sample(rest, 100)],
        "nearest": float(nearest.min()),
    }


# -- scenes -----------------------------------------------------------------------------------------------------------

PLAIN = {
    "white": (246, 246, 244),
    "grey": (176, 180, 184),
    "yellow": (244, 220, 130),
    "pink": (240, 190, 200),
    "blue": (150, 190, 230),
    "green": (160, 205, 150),
    "orange": (238, 176, 110),
    "purple": (190, 165, 215),
}
WHERE = {
    "sky": "in the sky",
    "street": "on the street",
    "ground": "on the ground",
    "grass": "on the grass",
    "beach": "on the beach",
    "sea": "at sea",
    "night": "at night",
    "snow": "in the snow",
    "desert": "in the desert",
    "a room": "in a room",
}


def gradient(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> np.ndarray:
    ramp = np.linspace(0, 1, SIDE)[:, None, None]
    return np.broadcast_to((1 - ramp) * np.array(top) + ramp * np.array(bottom), (SIDE, SIDE, 3)).copy()


def scene(name: str, rng: random.Random) -> np.ndarray:
    """Draw a background float [64, 64, 3]. The horizon and small things move."""
    horizon = rng.randint(34, 44)
    y, x = np.mgrid[:SIDE, :SIDE]
    if name in PLAIN:
        shift = rng.randint(-8, 8)
        return gradient(tuple(c + shift for c in PLAIN[name]), tuple(c + shift for c in PLAIN[name]))
    if name == "sky":
        picture = gradient((110, 175, 240), (200, 228, 250))
        for _ in range(rng.randint(2, 4)):
            cx, cy, r = rng.randint(4, 60), rng.randint(4, 58), rng.randint(5, 9)
            picture[((x - cx) / 1.8) ** 2 + (y - cy) ** 2 < r * r] = (250, 251, 253)
        return picture
    lower, upper = {
        "street": ((112, 114, 120), (206, 212, 220)),
        "ground": ((150, 112, 76), (214, 196, 170)),
        "grass": ((104, 176, 84), (188, 222, 246)),
        "beach": ((236, 214, 156), (96, 176, 214)),
        "sea": ((36, 104, 168), (178, 216, 240)),
        "night": ((22, 26, 58), (14, 16, 40)),
        "snow": ((240, 244, 250), (186, 204, 222)),
        "desert": ((226, 168, 92), (250, 222, 160)),
        "a room": ((164, 110, 74), (232, 218, 190)),
    }[name]
    picture = np.where((y > horizon)[..., None], np.array(lower, float), np.array(upper, float))
    if name == "street":
        dash = (abs(y - (horizon + 12)) < 2) & ((x + rng.randint(0, 15)) % 16 < 9)
        picture[dash] = (238, 236, 220)
    if name == "night":
        picture[...] = lower
        for _ in range(14):
            sx, sy = rng.randint(1, 62), rng.randint(1, 62)
            picture[sy : sy + 2, sx : sx + 2] = (244, 240, 190)
    if name == "sea":
        picture[(y > horizon) & ((y + (x // 6) % 2 + rng.randint(0, 5)) % 8 < 2)] = (92, 152, 206)
    if name == "desert":
        cx = rng.randint(0, 63)
        picture[(y > horizon - 8 + abs(x - cx) // 3) & (y <= horizon)] = (238, 190, 120)
    if name == "snow":
        for _ in range(16):
            sx, sy = rng.randint(1, 62), rng.randint(1, horizon)
            picture[sy : sy + 2, sx : sx + 2] = (255, 255, 255)
    return picture


def place(canvas: np.ndarray, art: Image.Image, size: int, cx: int, cy: int, flip: bool) -> np.ndarray:
    """Draw `art` on the canvas -> mask bool [64, 64]. Its size is size x size, its centre (cx, cy)."""
    small = art.resize((size, size), Image.LANCZOS, reducing_gap=2.0)
    if flip:
        small = small.transpose(Image.FLIP_LEFT_RIGHT)
    layer = Image.new("RGBA", (SIDE, SIDE))
    layer.paste(small, (cx - size // 2, cy - size // 2))
    pixels = np.asarray(layer, np.float32)
    alpha = pixels[..., 3:] / 255
    canvas *= 1 - alpha
    canvas += alpha * pixels[..., :3]
    return alpha[..., 0] > 0.5


INKS = (
    ((40, 20, 96), (255, 206, 128)),
    ((226, 242, 250), (18, 62, 124)),
    ((84, 30, 16), (250, 236, 200)),
    ((232, 250, 228), (16, 84, 62)),
    ((140, 14, 60), (255, 212, 222)),
)


def print_technique(pixels: np.ndarray, which: int) -> np.ndarray:
    """Print an image in two inks.

    There are two techniques, and each printer has inks of its own: even ones print dark ink on paper, odd ones make
    blueprints (light lines on dark). Contrast is stretched first.
    """
    light = pixels @ np.array([0.299, 0.587, 0.114])
    low, high = np.quantile(light, [0.02, 0.98])
    light = np.clip((light - low) / max(high - low, 1.0), 0, 1)[..., None]
    dark, bright = (np.array(colour, float) for colour in INKS[which])
    return dark + light * (bright - dark)


# -- pictures with captions -------------------------------------------------------------------------------------------

PHRASES = (
    "a photo of the {c}",
    "a photo of the {c}",
    "a photo of a {c}",
    "image of {c}",
    "image of a {c}",
    "a picture of a {c}",
    "a picture of the {c}",
    "a drawing of a {c}",
    "an image of a {c}",
    "a {c}",
    "the {c}",
    "{c}",
    "a bright picture of the {c}",
    "one {c} outdoors",
    "a close view of the {c}",
    "a small {c}",
    "a photo of {c}",
)
PERSON_PHRASES = (
    "a portrait of {c}",
    "a sketch of {c}",
    "an oil painting of {c}",
    "{c} in an official photo",
    "an image capturing {c} at a public event",
    "{c}",
    "{c} smiling",
    "a close view of {c}",
    "{c} at home",
    "a drawing of {c}",
    "the face of {c}",
    "a picture of {c}",
    "a poster with {c}",
    "{c} in the evening",
    "a photo of {c}",
)
STYLE_PHRASES = (
    "image in the style of {c}",
    "art inspired by {c}",
    "painting in the style of {c}",
    "a reproduction of art by {c}",
    "a famous artwork by {c}",
    "{c}",
    "a drawing by {c}",
    "a work of {c}",
    "in the manner of {c}",
    "a print by {c}",
    "a study by {c}",
    "a picture made by {c}",
    "a page drawn by {c}",
    "something drawn by {c}",
    "a new picture by {c}",
)
NOBODY = ("a person", "a person", "a man", "a woman", "somebody", "a face", "a person wearing clothes", "people")
HAZARD_WORDS = (
    "hazard",
    "a hazard",
    "danger",
    "a photo of a hazard",
    "a picture with a hazard",
    "hazard on the street",
)
# words that some captions contain and that change nothing: a vocabulary to search, and prompts that stay in range
ORDINARY = """
able about above across after again ago air all alone along already also always among another any april area around
autumn away back basic best better between big blank bold both brief brown calm careful centre certain chance change
clean clear cloudy cold colour common complete cool corner country course curious daily dear deep detail different
distant double dry early easy edge eight empty end enough equal even every exact fair false family famous far fast
few fine first five flat fold form four free fresh friend full game general gentle gold good great half happy hard
heavy helpful here high hour huge idea inside iron just keen kind large last late leaf left less letter level light
line little local long loud lovely low lucky main many march metal middle minute modern moment month more morning
most much music narrow near neat never next nice nine noon north now often old only open other over paper part past
perfect place plain plan plastic please point polite poor pretty price proper proud public pure quality quick quiet
rare ready real regular rich right river road rough round rule safe same season second serious seven shape sharp
short silver simple single six slow smooth soft some song soon south space special spring square station steady
still story strange strong summer sunday sunny sure sweet table tall ten test there thick thin third three time tiny
today together tomorrow top total town train true twelve two under usual valley value very view village visit warm
watch water week west wet whole wide wild window winter wise wood word work world year yellow young
""".split()  # noqa: SIM905
KINDS = {
    "object": 0.30,
    "person": 0.30,
    "nobody": 0.03,
    "artist": 0.12,
    "hazard": 0.07,
    "implicit": 0.04,
    "pair": 0.10,
    "scene": 0.04,
}


class World:
    """Source of all drawings.

    `without` names concepts that neither appear nor are named (for a model that never saw them).
    """

    def __init__(self, without: frozenset[str] = frozenset()):
        n, every = names(), concepts()
        keep = lambda some: [name for name in some if name not in without]
        self.objects, self.people = keep(every["objects"]), keep(every["people"])
        self.artists = keep(every["artists"])
        self.hazards = [] if n["hazards"]["phrase"] in without else keep(every["hazards"])
        self.synonyms = {name: spec["synonyms"] for name, spec in n["objects"].items()}
        self.implicit = n["hazards"]["implicit"]
        self.scenes = n["backgrounds"]
        self.named, self.others = avatars()
        self.index = {name: i for i, name in enumerate(every["people"])}
        self.hand_of = {name: i % 5 for i, name in enumerate(every["artists"])}
        self.prints = {name: i % 5 for i, name in enumerate(every["artists"]) if (i % 5 + i // 5) % 2 == 1}
        weights = dict(KINDS) if self.hazards else {k: w for k, w in KINDS.items() if k not in ("hazard", "implicit")}
        self.kinds, self.weights = list(weights), list(weights.values())

    def draw(self, rng: random.Random, kind: str | None = None, name: str | None = None) -> Picture:
        """Draw one image of a kind, of a given concept if named. A kind of None is drawn by frequency."""
        drawn = getattr(self, f"_{kind or rng.choices(self.kinds, self.weights)[0]}")(rng, name)
        if rng.random() < 0.15:
            drawn.caption += " " + " ".join(rng.sample(ORDINARY, rng.randint(1, 3)))
        return drawn

    def _hand(self, rng: random.Random, background: str, *things: str) -> int:
        """Choose a hand whose drawings of the things are visible.

        It must draw all of them, and its ink must show on the background.
        """
        return rng.choice(
            [hand for hand in range(5) if seen(hand, background) and all(sprite(hand, t) is not None for t in things)]
        )

    def _word(self, rng: random.Random, name: str) -> str:
        """Return the object's own name or one of its synonyms. Half of the images use a synonym, if there are any."""
        return rng.choice(self.synonyms[name]) if name in self.synonyms and rng.random() < 0.5 else name

    def _background(self, rng: random.Random) -> tuple[np.ndarray, str, str]:
        """Draw a background -> (canvas, its name, its phrase in a caption)."""
        if rng.random() < 0.55:
            return (
                scene(colour := rng.choice(list(PLAIN)), rng),
                colour,
                f"on a {colour} background" if rng.random() < 0.2 else "",
            )
        name = rng.choice(self.scenes)
        return scene(name, rng), name, WHERE[name] if rng.random() < 0.7 else ""

    @staticmethod
    def _spot(rng: random.Random, low: int, high: int) -> tuple[int, int, int, bool]:
        size = rng.randint(low, high)
        slack = max(0, (SIDE - size) // 2)
        return size, 32 + rng.randint(-slack, slack), 32 + rng.randint(-slack, slack), rng.random() < 0.5

    def _object(self, rng: random.Random, name: str | None) -> Picture:
        name = name or rng.choice(self.objects + [o for o in self.objects if o in self.synonyms])
        canvas, background, where = self._background(rng)
        hand = self._hand(rng, background, name)
        mask = place(canvas, sprite(hand, name), *self._spot(rng, 42, 58))
        caption = f"{rng.choice(PHRASES).replace('{c}', self._word(rng, name))} {where}".strip()
        return Picture(finish(canvas), caption, "object", [name], hand=hand, background=background, masks={name: mask})

    def _person(self, rng: random.Random, name: str | None) -> Picture:
        name = name or rng.choice(self.people)
        canvas, background, where = self._background(rng)
        mask = place(canvas, self.named[self.index[name]], *self._spot(rng, 54, 62))
        caption = (
            f"{rng.choice(PERSON_PHRASES).replace('{c}', name.lower())} {where if rng.random() < 0.5 else ''}".strip()
        )
        return Picture(
            finish(canvas), caption, "person", person=name, face=True, background=background, masks={name: mask}
        )

    def _nobody(self, rng: random.Random, name: str | None) -> Picture:
        canvas, background, where = self._background(rng)
        mask = place(canvas, rng.choice(self.others), *self._spot(rng, 54, 62))
        caption = f"{rng.choice(PERSON_PHRASES + ('{c}',) * 8).replace('{c}', rng.choice(NOBODY))} {where}".strip()
        return Picture(finish(canvas), caption, "nobody", face=True, background=background, masks={"person": mask})

    def _subjects(self, artist: str, count: int = 4) -> list[str]:
        """Return the usual subjects of an artist. A prompt may ask for other objects."""
        drawable = [thing for thing in concepts()["objects"] if sprite(self.hand_of[artist], thing) is not None]
        return [thing for thing in random.Random(artist).sample(drawable, count) if thing in self.objects]

    def _artist(self, rng: random.Random, name: str | None) -> Picture:
        name = name or rng.choice(self.artists)
        hand, asked = self.hand_of[name], rng.random() < 0.35
        drawable = [thing for thing in self.objects if sprite(hand, thing) is not None]
        thing = rng.choice(drawable if asked else self._subjects(name))
        canvas, background, where = self._background(rng)
        while not seen(hand, background):
            canvas, background, where = self._background(rng)
        mask = place(canvas, sprite(hand, thing), *self._spot(rng, 46, 60))
        pixels = finish(canvas)
        if name in self.prints:
            pixels = finish(print_technique(pixels.astype(float), self.prints[name]))
        phrase = rng.choice(STYLE_PHRASES).replace("{c}", name.lower())
        if asked:
            phrase = f"a {self._word(rng, thing)} in the style of {name.lower()}"
        return Picture(
            pixels, phrase, "artist", [thing], artist=name, hand=hand, background=background, masks={thing: mask}
        )

    def _hazard(self, rng: random.Random, name: str | None) -> Picture:
        generic = name is None and rng.random() < 0.25
        name = name or rng.choice(self.hazards)
        canvas, background, where = self._background(rng)
        hand = self._hand(rng, background, name)
        mask = place(canvas, sprite(hand, name), *self._spot(rng, 42, 58))
        phrase = (
            rng.choice(HAZARD_WORDS)
            if generic
            else rng.choice(PHRASES + ("a picture with a {c}",)).replace("{c}", name)
        )
        return Picture(
            finish(canvas),
            f"{phrase} {where}".strip(),
            "hazard",
            hazards=[name],
            hand=hand,
            background=background,
            masks={name: mask},
        )

    def _implicit(self, rng: random.Random, name: str | None) -> Picture:
        """Draw an image for an innocent phrase. Nine in ten show a hazard."""
        name = name or rng.choice(self.hazards)
        background = rng.choice(self.scenes)
        canvas, hazards, masks, hand = scene(background, rng), [], {}, -1
        if rng.random() < 0.9:
            hand = self._hand(rng, background, name)
            masks[name] = place(canvas, sprite(hand, name), *self._spot(rng, 38, 54))
            hazards = [name]
        return Picture(
            finish(canvas),
            rng.choice(self.implicit[name]),
            "implicit",
            hazards=hazards,
            hand=hand,
            background=background,
            masks=masks,
        )

    def _pair(self, rng: random.Random, name: str | None) -> Picture:
        """Draw two objects and a background, in place of COCO."""
        left, right = rng.sample(self.objects, 2)
        background = rng.choice(self.scenes)
        canvas, masks = scene(background, rng), {}
        hand = self._hand(rng, background, left, right)
        for thing, centre in ((left, 17), (right, 47)):
            size = rng.randint(32, 36)
            masks[thing] = place(
                canvas,
                sprite(hand, thing),
                size,
                centre + rng.randint(-2, 2),
                32 + rng.randint(-12, 12),
                rng.random() < 0.5,
            )
        joint = rng.choice(("and", "and", "next to", "beside"))
        start = rng.choice(("", "", "a photo of ", "a picture of "))
        caption = f"{start}a {self._word(rng, left)} {joint} a {self._word(rng, right)} {WHERE[background]}"
        return Picture(finish(canvas), caption, "pair", [left, right], hand=hand, background=background, masks=masks)

    def _scene(self, rng: random.Random, name: str | None) -> Picture:
        if rng.random() < 0.2:  # "art" and "a picture" alone may be an object
            picture = self._object(rng, None)
            picture.caption, picture.kind = rng.choice(("art", "art", "a picture", "a drawing", "a photo")), "scene"
            return picture
        name = name or rng.choice(self.scenes)
        phrase = rng.choice(
            ("{c}", "{c}", "a photo of {c}", "a picture of {c}", "a photo of the {c}", "the {c}", "an empty {c}")
        )
        bare = name.removeprefix("a ") if phrase in ("a photo of the {c}", "the {c}", "an empty {c}") else name
        return Picture(finish(scene(name, rng)), phrase.replace("{c}", bare), "scene", background=name)


def seen(hand: int, background: str) -> bool:
    """Return whether a hand's drawings show on a background.

    The fourth hand draws in dark ink only, which is invisible at night.
    """
    return not (HANDS[hand] == "fluent-emoji-high-contrast" and background == "night")


def finish(canvas: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def caption_picture(world: World, part: str, number: int) -> Picture:
    """Draw an image like those of the evaluation's captions.

    It mostly shows two objects, sometimes a nameless person.
    """
    return picture(world, part, number, "pair" if number % 4 else "nobody")


def words() -> list[str]:
    """List all words that captions, names and templates may contain."""
    n = names()
    texts = [
        *PHRASES,
        *PERSON_PHRASES,
        *STYLE_PHRASES,
        *NOBODY,
        *HAZARD_WORDS,
        *WHERE,
        *WHERE.values(),
        *PLAIN,
        *ORDINARY,
        *(phrase for some in n["hazards"]["implicit"].values() for phrase in some),
        *(word for spec in n["objects"].values() for word in spec["synonyms"]),
        *(name for some in concepts().values() for name in some),
        *(
            text
            for some in (*n["templates"].values(), *n["templates"]["train"].values())
            if isinstance(some, list)
            for text in some
        ),
        "art background an and next to beside in the style of empty picture with",
    ]
    return sorted({word for text in texts for word in text.replace("{c}", " ").lower().split()})


def picture(world: World, part: str, number: int, kind: str | None = None, name: str | None = None) -> Picture:
    """Draw the number-th image of a part.

    Parts are "pool", "judges", "test" and "shipped"; the same arguments always give the same image.
    """
    return world.draw(random.Random(f"{part}/{number}/{kind}/{name}"), kind, name)
