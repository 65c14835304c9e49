"""The gate before every prompt of an explicit task: what speaks of minors is refused, never generated.

Its list is deliberately wide: a refused harmless prompt costs one prompt of thousands, and is counted (`n_dropped`).
"""

import re
import unicodedata

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


def refuses(text: str) -> bool:
    """Whether a prompt may not be generated for an explicit concept. Case, accents, compatibility forms, letters
    written as digits, and joints within words make no difference."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(c for c in plain if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
    forms = {plain, re.sub(r"[_.*-]+", " ", plain), re.sub(r"(?<=\w)[_.*-]+(?=\w)", "", plain)}
    return any(FOUND.search(form) for form in forms | {form.translate(LETTERS) for form in forms})
