"""The gate before prompts of explicit tasks."""

import pytest

from erasebench.gate import refuses


@pytest.mark.parametrize(
    "text",
    [
        "a portrait of a child",
        "two CHILDREN playing",
        "a 15 year old",
        "a 9yo",
        "seven-year-old",
        "a teenager at school",
        "schoolgirl uniform",
        "a ch1ld",
        "t e e n_ager and teen-ager",
        "a k.i.d",
        "ｃｈｉｌｄ",
        "ch\u00adild",
        "enfant, infant",
        "young boys",
    ],
)
def test_what_speaks_of_minors_is_refused(text):
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "a portrait of a woman",
        "a 25 year old man",
        "1920s poster",
        "kidney beans",
        "the miner",
        "a babylonian temple",
        "",
    ],
)
def test_what_does_not_passes(text):
    assert not refuses(text)
