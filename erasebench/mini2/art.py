"""Sprites, tints and backgrounds of the embedded world.

They are drawn as in the first version (`erasebench.mini.world`). Scaled sprites and backgrounds are cached, so that an
image takes a tenth of a millisecond and training need not wait for drawing.
"""

from __future__ import annotations

import random
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from ..mini import world as first
from .people import avatars

SIDE = first.SIDE
HANDS = first.HANDS
INK_ALONE = HANDS.index("fluent-emoji-high-contrast")  # this hand draws in dark ink alone
VARIANTS = 64  # of each background
# fmt: off
ICONS: dict[str, tuple[str, str | None]] = {  # as first.ICONS: icon in the first four sets, icon in fxemoji
    **first.ICONS,
    "apple": ("red-apple", "redapple"), "pineapple": ("pineapple", "pineapple"), "grapes": ("grapes", "grapes"),
    "watermelon": ("watermelon", "watermelon"), "corn": ("ear-of-corn", "earofmaize"), "cheese": ("cheese-wedge", None),
    "pizza": ("pizza", "sliceofpizza"), "hamburger": ("hamburger", "hamburger"), "cake": ("birthday-cake", "birthdaycake"),
    "doughnut": ("doughnut", "doughnut"), "ice cream": ("soft-ice-cream", "softicecream"),
    "coffee": ("hot-beverage", "hotbeverage"), "clock": ("alarm-clock", "alarmclock"),
    "telephone": ("telephone", "blacktelephone"), "television": ("television", "television"),
    "book": ("open-book", "openbook"), "pencil": ("pencil", "pencil"), "scissors": ("scissors", "blackscissors"),
    "hammer": ("hammer", "hammer"), "light bulb": ("light-bulb", "lightbulb"), "bell": ("bell", "bell"),
    "trophy": ("trophy", "trophy"), "soccer ball": ("soccer-ball", "soccerball"), "rose": ("rose", "rose"),
    "palm tree": ("palm-tree", "palmtree"), "tiger": ("tiger", "tigerside"), "rabbit": ("rabbit", "bunnyside"),
    "cow": ("cow", "cow"), "pig": ("pig", "pigside"), "penguin": ("penguin", "penguin"), "whale": ("whale", "whale"),
    "snail": ("snail", "snail"), "bee": ("honeybee", "honeybee"), "rocket": ("rocket", "rocket"),
    "helicopter": ("helicopter", "helicopter"), "train": ("locomotive", "steamlocomotive"),
    "castle": ("castle", "europeancastle"), "tent": ("tent", None), "violin": ("violin", "violin"),
    "saxophone": ("saxophone", "saxophone"), "top hat": ("top-hat", "tophat"), "gift": ("wrapped-gift", "present"),
    "monkey": ("monkey", "monkey"), "butterfly": ("butterfly", None), "spider": ("spider", "spider"),
    "tornado": ("tornado", "tornado"), "volcano": ("volcano", None), "axe": ("axe", None),
}
# fmt: on
COLOURS = {
    "red": (220, 30, 40),
    "orange": (244, 130, 20),
    "yellow": (250, 214, 30),
    "green": (40, 160, 60),
    "blue": (30, 80, 220),
    "purple": (130, 50, 180),
    "pink": (250, 120, 180),
    "brown": (120, 70, 30),
}
INKS = (  # of prints: the first version's, and four more for the tuning artists
    *first.INKS,
    ((20, 20, 20), (190, 226, 90)),
    ((250, 240, 120), (110, 20, 110)),
    ((60, 60, 66), (255, 160, 120)),
    ((210, 250, 250), (120, 40, 10)),
)


@cache
def sprite(hand: int, name: str) -> Image.Image | None:
    """Return an object by one hand, RGBA 128x128.

    None if that hand does not draw it.
    """
    if name in first.ICONS:
        return first.sprite(hand, name)
    return first.icon(hand, ICONS[name])


def draws(hand: int, *things: str) -> bool:
    """Tell whether a hand draws all of the things."""
    return all(sprite(hand, thing) is not None for thing in things)


@lru_cache(maxsize=60_000)
def scale_sprite(hand: int, name: str, size: int) -> np.ndarray:
    """Return a sprite at `size` x `size`, RGBA uint8."""
    return np.asarray(sprite(hand, name).resize((size, size), Image.LANCZOS, reducing_gap=2.0))


@lru_cache(maxsize=20_000)
def scale_avatar(number: int, size: int) -> np.ndarray:
    """Return an avatar at `size` x `size`, RGBA uint8.

    The anonymous ones follow the named ones.
    """
    named, others = avatars()
    return np.asarray([*named, *others][number].resize((size, size), Image.LANCZOS, reducing_gap=2.0))


def tint(art: np.ndarray, colour: str, hand: int) -> np.ndarray:
    """Recolour RGBA uint8 art, and keep its light and dark parts visible.

    Art in dark ink alone takes the colour itself.
    """
    target = np.array(COLOURS[colour], np.float32)
    light = art[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)[:, None] / 255
    shade = np.ones_like(light) if hand == INK_ALONE else 0.45 + 0.75 * light
    white = np.clip(light - 0.85, 0, 1) * 2  # nearly white parts stay paler
    rgb = np.clip(target * shade * (1 - white) + 255 * white, 0, 255)
    return np.concatenate([rgb.astype(np.uint8), art[..., 3:]], -1)


@lru_cache(maxsize=4096)
def background(name: str, variant: int) -> np.ndarray:
    """Return a scene or plain colour, uint8 [64, 64, 3].

    Its variants differ in the horizon and in small details.
    """
    return first.finish(first.scene(name, random.Random(f"{name}/{variant}")))


def compose(canvas: np.ndarray, art: np.ndarray, cx: int, cy: int, flip: bool) -> np.ndarray:
    """Draw RGBA `art` onto a canvas in place, centred at (cx, cy).

    art: [S, S, 4]. canvas: float32 [64, 64, 3].

    -> mask bool [64, 64] of the covered area
    """
    size = len(art)
    left, top = cx - size // 2, cy - size // 2
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, SIDE), min(top + size, SIDE)
    art = (art[:, ::-1] if flip else art)[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.float32)
    alpha = art[..., 3:] / 255
    region = canvas[y0:y1, x0:x1]
    region += alpha * (art[..., :3] - region)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y0:y1, x0:x1] = alpha[..., 0] > 0.5
    return mask


def print_in_inks(pixels: np.ndarray, inks: int) -> np.ndarray:
    """Convert an image uint8 [64, 64, 3] to two inks.

    Its contrast is stretched first (as in the first version).
    """
    light = pixels @ np.array([0.299, 0.587, 0.114])
    low, high = np.quantile(light, [0.02, 0.98])
    light = np.clip((light - low) / max(high - low, 1.0), 0, 1)[..., None]
    dark, bright = (np.array(colour, float) for colour in INKS[inks])
    return first.finish(dark + light * (bright - dark))
