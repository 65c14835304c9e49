"""Processor time of drawing and of every stage: python -m erasebench.mini2.rates

Writes processor seconds a step to rates.csv. Processor time, summed over threads, hardly depends on the load of the
machine, so it can serve for planning.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path

import torch
from open_clip.loss import ClipLoss
from torch.utils.flop_counter import FlopCounterMode

from ..mini import files as first_files
from . import clip, judge, latents, retrained, shipped, unet
from .nets import WIDTH, Judge, clip_model, text_features, tokenize, tokenizer
from .tokenizer import CONTEXT
from .world import World, picture


def seconds(run: Callable[[], object], times: int = 2) -> float:
    """Return the processor seconds of a call.

    It is the minimum of `times` calls after a warm-up.
    """
    run()
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def flops(run: Callable[[], object]) -> float:
    """Return the GFLOP of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e9


def measure() -> list[list[object]]:
    """Return the rows of rates.csv.

    A row is (name, number of planned steps, processor seconds a step, total hours on two cores).
    """
    drawing, body = World(), []
    pictures = [picture(drawing, "rates", i) for i in range(512)]  # also caches the sprites
    add = lambda name, steps, took: body.append([name, steps, f"{took:.4f}", f"{steps * took / 2 / 3600:.2f}"])
    draw = seconds(lambda: [picture(drawing, "rates", i) for i in range(512)]) / 512
    add("drawing one picture", 1, draw)

    some = pictures[: clip.BATCH]
    model = clip_model(len(tokenizer())).to(memory_format=torch.channels_last)
    x, ids = clip.pixels(some), tokenize([p.caption for p in some])
    contrast = ClipLoss()
    step = seconds(
        lambda: contrast(
            model.encode_image(x, normalize=True), text_features(model, ids), model.logit_scale.exp()
        ).backward()
    )
    step += draw * clip.BATCH
    add("clip", clip.RECIPE.steps, step)
    add("retrained_clip", retrained.CLIP_RECIPE.steps, step)

    vae = latents.load_vae(first_files.WEIGHTS / "sd" / "vae")
    with torch.no_grad():
        encode = seconds(lambda: vae.encode(x[:64]).latent_dist.mean) / 64
    add("pool, one picture", latents.SIZE, encode + draw)

    net = unet.build().to(memory_format=torch.channels_last)
    z, text = torch.randn(unet.BATCH, 16, 8, 8), torch.randn(unet.BATCH, CONTEXT, WIDTH)
    t = torch.randint(1000, (unet.BATCH,))
    step = seconds(lambda: net(z, t, text, return_dict=False)[0].square().mean().backward())
    add("unet", unet.RECIPE.steps, step)
    add("retrained", retrained.UNET_RECIPE.steps, step)

    heads = Judge({name: len(known) for name, known in judge.classes().items()}).to(memory_format=torch.channels_last)
    label = judge.truth(pictures[: judge.BATCH])
    step = seconds(lambda: judge.loss(heads(x[: judge.BATCH]), label).backward()) + draw * judge.BATCH
    add("judge", judge.RECIPE.steps, step)
    add("yolo (as a step of the judge)", shipped.YOLO.steps, step)
    body.append(["GFLOP of the U-Net", "", f"{flops(lambda: net(z[:1], t[:1], text[:1])):.4f}", ""])
    body.append(["GFLOP of the text encoder", "", f"{flops(lambda: model.encode_text(ids[:1])):.4f}", ""])
    return body


if __name__ == "__main__":
    with Path(__file__).with_name("rates.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["of", "steps", "processor seconds", "hours on two cores"])
        writer.writerows(measure())
