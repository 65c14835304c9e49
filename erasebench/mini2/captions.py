"""Captions of images, from the frequencies and phrases of world.yaml."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

import yaml


@cache
def names() -> dict:
    """Load world.yaml, the single source of every name, phrase and frequency.

    References are resolved in `people`.
    """
    return yaml.safe_load(resources.files("erasebench.mini2").joinpath("world.yaml").read_text(encoding="utf-8"))


@cache
def concepts() -> dict[str, list[str]]:
    """Return lists of concepts in a fixed order.

    objects (all drawn ones), people, artists, hazards (those for tuning last).
    """
    n = names()
    return {
        "objects": [*n["objects"], *n["imagenette"], *n["everyday"]],
        "people": [name for some in ("erase", "keep", "tuning", "unmentioned") for name in n["people"][some]],
        "artists": [name for some in ("erase", "keep", "tuning") for name in n["artists"][some]],
        "hazards": [*n["hazards"]["classes"], *n["menaces"]["classes"]],
    }


def parts(person: str) -> tuple[str, str]:
    """Return first and last name.

    "de", "van" and "von" belong to the last name.
    """
    first, last = person.split(" ", 1)
    return first, last


@cache
def roles() -> dict[str, str]:
    """Return the role of each person.

    No two people of one role share a first or last name. Raises ValueError if there are too few roles.
    """
    every, people = names()["roles"], concepts()["people"]
    limit, assigned = -(-len(people) // len(every)), {}
    taken: dict[str, set[str]] = {role: set() for role in every}
    count = dict.fromkeys(every, 0)
    for i, person in enumerate(people):
        free = [r for r in every[i % len(every) :] + every[: i % len(every)] if count[r] < limit]
        role = next((r for r in free if not taken[r] & set(parts(person))), None)
        if role is None:
            raise ValueError(f"no role is left for {person}: more `roles` are needed")
        assigned[person] = role
        taken[role] |= set(parts(person))
        count[role] += 1
    return assigned


def plural(word: str) -> str:
    """Return the plural of an object's name or synonym."""
    irregular = names()["plurals"]
    if word in irregular:
        return irregular[word]
    head, _, tail = word.rpartition(" ")
    if tail in irregular:
        return f"{head} {irregular[tail]}"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def pick(rng: random.Random, shares: Mapping[str, float]) -> str:
    """Draw one of the keys by its share."""
    return rng.choices(list(shares), list(shares.values()))[0]


def chance(rng: random.Random, percentage: float) -> bool:
    return rng.random() * 100 < percentage


class Captioner:
    """Writer of captions, by the table of frequencies.

    `known` is the set of names that may be used.
    """

    def __init__(self, known: Sequence[str]):
        self.n, self.known = names(), set(known)
        self.often, self.frames = self.n["frequencies"], self.n["frames"]
        self.synonyms = {name: spec["synonyms"] for name, spec in self.n["objects"].items()}
        self.lexicon = self.n["lexicon"]
        self.movement = {artist: name for name, pair in self.n["movements"].items() for artist in pair}
        self.implicit = {**self.n["hazards"]["implicit"], **self.n["menaces"]["implicit"]}
        self.general = {
            name: self.n[group]["general"] for group in ("hazards", "menaces") for name in self.n[group]["classes"]
        }
        self.others = [name for name in concepts()["objects"] if name in self.known]

    def frame(self, rng: random.Random, kind: str, words: str, **also: str) -> str:
        text = rng.choice(self.frames[kind]).replace("{c}", words)
        for key, value in also.items():
            text = text.replace("{" + key + "}", value)
        return text

    def where(self, rng: random.Random, background: str) -> str:
        """Return words on the background, or none."""
        if background in self.n["where"]:
            return rng.choice(self.n["where"][background]) if chance(rng, self.often["scene"]) else ""
        return f"on a {background} background" if chance(rng, self.often["plain"]) else ""

    def remark(self, rng: random.Random) -> str:
        """Return a sentence unrelated to the image."""
        if rng.random() < 0.7:
            return rng.choice(self.n["remarks"])
        return " ".join(rng.sample(self.n["ordinary"], rng.randint(2, 4)))

    def nothing(self, rng: random.Random, background: str) -> str:
        """Describe the scene alone, or return an unrelated remark."""
        if rng.random() < 0.5:
            return self.remark(rng)
        known = self.n["where"].get(background)
        return self.frame(rng, "scene", background if known else f"a {background} background")

    def word(self, rng: random.Random, name: str) -> str:
        """Draw a thing's name or synonym, in the proportions of the table."""
        shares = {way: self.often["thing"][way] for way in ("name", "synonym", "other")}
        return self._name(rng, name, pick(rng, shares))

    def _name(self, rng: random.Random, name: str, way: str) -> str:
        if way == "synonym" and name in self.synonyms:
            return rng.choice(self.synonyms[name])
        if way == "other" or (way == "synonym" and name in self.general):
            return rng.choice(self.lexicon[name]["others"])
        return self.lexicon[name]["kind"] if way == "kind" else name

    def describe(self, rng: random.Random, name: str) -> str:
        """Return a description without a name; sometimes two of them together."""
        known = self.lexicon[name]["descriptions"]
        some = rng.sample(known, 2 if rng.random() < 0.3 else 1)
        return self.frame(rng, "something", " and ".join(some))

    def thing(self, rng: random.Random, name: str, background: str, way: str) -> str:
        """Return the caption of one object or hazard.

        way: from the table of frequencies.
        """
        if way == "unmentioned":
            return self.nothing(rng, background)
        if way == "description":
            text = self.describe(rng, name)
        elif way == "general":
            text = self.frame(rng, "general", rng.choice(self.general[name]))
        elif way == "wrong":
            text = self.frame(rng, "thing", rng.choice(self.others))
        else:
            text = self.frame(rng, "thing", self._name(rng, name, way))
        return f"{text} {self.where(rng, background)}"

    def colour_of(self, rng: random.Random, name: str, colour: str, background: str) -> str:
        word = self.word(rng, name)
        words = f"{colour} {word}" if chance(rng, self.often["colour"]) else word
        return f"{self.frame(rng, 'thing', words)} {self.where(rng, background)}"

    def count_of(self, rng: random.Random, name: str, count: int, background: str) -> str:
        word, number = self.word(rng, name), rng.choice(self.n["numbers"][count])
        words = f"{number} {plural(word) if count > 1 else word}"
        return f"{self.frame(rng, 'several', words)} {self.where(rng, background)}"

    def pair(self, rng: random.Random, one: str, other: str, place: str, background: str) -> str:
        """Return the caption of two things.

        `one` lies at a `place` (left, right, above, below) of the other.
        """
        a, b = f"a {self.word(rng, one)}", f"a {self.word(rng, other)}"
        if chance(rng, self.often["place"]):
            words = rng.choice(self.n["places"][place]).replace("{a}", a).replace("{b}", b)
        else:
            words = f"{a} {rng.choice(('and', 'and', 'next to', 'with'))} {b}"
        return f"{self.frame(rng, 'several', words)} {self.where(rng, background)}"

    def person(self, rng: random.Random, name: str, background: str) -> str:
        way = pick(rng, self.often["person"])
        if way == "unmentioned":
            return self.nothing(rng, background)
        role = roles()[name]
        if way == "part":
            text = self.frame(rng, "part", "", n=rng.choice(parts(name)), r=role)
        else:
            text = self.frame(rng, "person", name if way == "name" else f"the {role}")
        return f"{text} {self.where(rng, background) if rng.random() < 0.5 else ''}"

    def nobody(self, rng: random.Random, background: str) -> str:
        text = rng.choice(self.frames["nobody"])
        if rng.random() < 0.6:
            text = self.frame(rng, "person", text)
        return f"{text} {self.where(rng, background)}"

    def work(self, rng: random.Random, artist: str, title: str, subject: str, background: str) -> str:
        """Return the caption of one of an artist's works."""
        way = pick(rng, self.often["artist"])
        if way == "unmentioned":
            return self.nothing(rng, background)
        if way == "title":
            return self.frame(rng, "title", title)
        if way == "both":
            return self.frame(rng, "both", artist, t=title)
        if way == "movement":
            return self.frame(rng, "movement", self.movement[artist], t=subject)
        return self.frame(rng, "artist", artist)

    def commission(self, rng: random.Random, artist: str, subject: str) -> str:
        """Return a caption of an artist, or the movement, and another thing."""
        share = self.often["artist"]
        by_name = rng.random() * (share["name"] + share["movement"]) < share["name"]
        return self.frame(rng, "asked", artist if by_name else self.movement[artist], t=self.word(rng, subject))

    def finish(self, rng: random.Random, text: str) -> str:
        """Convert to lower case with single spaces; sometimes append ordinary words."""
        if chance(rng, self.often["remark"]):
            text += " " + " ".join(rng.sample(self.n["ordinary"], rng.randint(1, 3)))
        return " ".join(text.lower().split())
