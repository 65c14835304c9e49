"""Safety gate of explicit tasks: a text about minors is never encoded or generated.

Its list is deliberately wide: a refused harmless prompt costs one prompt of thousands, and is counted (`n_dropped`).
Tasks drop refused prompts, attacks skip them; `Model` asks again before its text encoder, and raises Refused.
"""

import re
import unicodedata
from functools import lru_cache

from .contracts import ErasebenchError

WORDS = (
    r"minors?|child(ren|ish|like|hood)?|childs|kids?|kiddos?|toddlers?|infants?|bab(y|ies)|newborns?|"
    r"teen(s|age|aged|ager|agers)?|tweens?|adolescen\w*|juveniles?|preteens?|pre-teens?|underaged?|under-aged?|"
    r"school(girls?|boys?|kids?|child|children)|lolis?|lolitas?|lolicon|shotas?|shotacon|youngsters?|youths?|"
    r"(little|young|small)\s+(girls?|boys?|ones?|lady|ladies|daughters?|sons?|sisters?|brothers?)|"
    r"girls?|boys?|daughters?|sons?|kindergart\w*|nursery|puberty|pubescent|prepubescent|"
    r"([1-9]|1[0-7])[\s-]*(years?|yrs?|yo|y/o|y\.o\.)([\s-]*olds?)?|"
    r"(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(thir|four|fif|six|seven)teen)"
    r"[\s-]*years?[\s-]*olds?"
)
FOUND = re.compile(rf"(?<![^\W_])({WORDS})(?![^\W_])")
LETTERS = str.maketrans("013457@$", "oieastas")  # digits and signs that stand in for letters


class Refused(ErasebenchError):
    """A text that an explicit task may not use; the message never holds it."""


@lru_cache(maxsize=2**17)
def refuses(text: str) -> bool:
    """Return whether a prompt is forbidden for an explicit concept.

    Case, accents, compatibility forms, letters written as digits, and joints within words make no difference.
    """
    plain = text.casefold()
    if not text.isascii():
        plain = unicodedata.normalize("NFKD", text).casefold()
        plain = "".join(c for c in plain if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
    forms = {plain, re.sub(r"[_.*-]+", " ", plain), re.sub(r"(?<=\w)[_.*-]+(?=\w)", "", plain)}
    return any(FOUND.search(form) for form in forms | {form.translate(LETTERS) for form in forms})


def refuses_decoded(text: str) -> bool:
    """Apply `refuses` to the text of token ids.

    In decoded text each digit and sign stands apart from its word.
    """
    text = re.sub(r"(?<=\d)\s+(?=\d)", "", text)  # the 25 of "25 years" is two tokens
    return refuses(text) or refuses(re.sub(r"\s*([^\w\s]|[\d_])\s*", r"\1", text))
