"""Train the embedded world, second version: python -m erasebench.mini2.train STAGE

Stages, in order: see README.md beside this file. Each writes a checkpoint to the cache every two minutes and resumes
after a kill; a finished stage writes half-precision weights into weights/. `light STAGE` copies an unfinished stage's
checkpoint into unfinished/, without its optimiser state, so that it can be committed and continued elsewhere.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

import torch

from .loop import checkpoint, lighten


def tokenizer(captions: int = 20_000) -> None:
    """Train the tokenizer on captions.

    It uses one in eight of the captions of people, since names of people are rare in text.
    """
    from . import tokenizer as bpe
    from .nets import WEIGHTS
    from .world import World, picture

    drawing = World()
    drawn = (picture(drawing, "tokenizer", i) for i in range(captions))
    texts = [p.caption for i, p in enumerate(drawn) if not p.person or i % 8 == 0]
    size = bpe.train(texts, WEIGHTS / "sd" / "tokenizer")
    logging.getLogger("erasebench").info("tokenizer: %d tokens from %d captions", size, len(texts))


def clip() -> None:
    from . import clip as stage

    stage.train()


def vae() -> None:
    from . import latents

    latents.vae()


def pool() -> None:
    from . import latents

    latents.pool()


def unet() -> None:
    from . import unet as stage

    stage.train()


def judge() -> None:
    from . import judge as stage

    stage.train()


def people() -> None:
    from . import judge as stage

    stage.people()


def retrained_clip() -> None:
    from . import retrained as stage

    stage.train_clip()


def retrained() -> None:
    from . import retrained as stage

    stage.train()


def yolo() -> None:
    from . import shipped

    shipped.yolo()


def drawings() -> None:
    from . import shipped

    shipped.drawings()


ORDER = (tokenizer, clip, vae, pool, unet, judge, people, retrained_clip, retrained, yolo, drawings)
STAGES: dict[str, Callable[[], None]] = {stage.__name__: stage for stage in ORDER}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m erasebench.mini2.train", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=[*STAGES, "light"])
    parser.add_argument("of", nargs="?", choices=list(STAGES), help="the stage to make a light copy of")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    if given.stage == "light":
        if given.of is None or not checkpoint(given.of).exists():
            print(f"error: no checkpoint of {given.of or 'a stage (name one)'} is in the cache", file=sys.stderr)
            return 1
        print(lighten(given.of))
        return 0
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    STAGES[given.stage]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
