"""Stages `vae` and `pool`: the VAE for the new drawings, and the U-Net's latents.

The VAE maps 64x64x3 to 8x8x16. The first version's VAE is kept unchanged if no kind of the new drawings has an error
above ALLOWED times that of the first version's drawings of the same kind; otherwise its training continues.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..mini import files as first_files
from ..mini import nets as first_nets
from ..store.local import digest, home, sha256_file
from . import art, captions, world
from .clip import pixels
from .loop import Recipe, fit
from .nets import WEIGHTS

log = logging.getLogger("erasebench")
ALLOWED = 1.25
RECIPE = Recipe(steps=3_000, lr=5e-4, decay=0.0)
BATCH = 32
WIDE = 0.3  # noise on latents in units of their deviation, so that the decoder tolerates the U-Net's errors
SIZE, PART = 160_000, 5_000  # images of the pool, and of one of its files


def load_vae(folder: Path) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False).eval()


@torch.no_grad()
def error(vae: nn.Module, x: Tensor) -> float:
    """Return the mean absolute error of images after encoding and decoding.

    x: [B, 3, 64, 64] in [-1, 1].
    """
    back = torch.cat([vae.decode(vae.encode(some).latent_dist.mean).sample for some in x.split(64)])
    return (back.clamp(-1, 1) - x).abs().mean().item()


ALIKE = {
    "thing": "object",
    "coloured": "object",
    "counted": "pair",
}  # the first version's kind for the comparison


def measure_errors(vae: nn.Module, count: int = 128) -> dict[str, tuple[float, float]]:
    """Return for each kind (error on new drawings, error on old ones).

    The old ones are the first version's most similar drawings.
    """
    old: dict[str, list[np.ndarray]] = {}
    for drawing in [*first_nets.drawings("mix"), *first_nets.drawings("caption")]:
        old.setdefault(drawing["kind"], []).append(drawing["pixels"])
    before = lambda kind: first_nets.prepared(torch.from_numpy(np.stack(old[kind][:count])))
    new, known, found = world.World(), {}, {}
    for kind in captions.names()["frequencies"]["pictures"]:
        like = ALIKE.get(kind, kind)
        if like not in known:
            known[like] = error(vae, before(like))
        x = pixels([world.picture(new, "vae test", i, kind) for i in range(count)])
        found[kind] = (error(vae, x), known[like])
    return found


def vae(count: int = 128) -> None:
    """Measure the VAE, train it if needed, and write weights and errors.

    They go to weights/sd/vae.
    """
    model = load_vae(first_files.WEIGHTS / "sd" / "vae")
    measured = measure_errors(model, count)
    trained = any(new > ALLOWED * old for new, old in measured.values())
    log.info("vae: errors %s; %s", measured, "trained on" if trained else "kept")
    if trained:
        carry_on(model)
        measured = measure_errors(model, count)
    model.half().save_pretrained(WEIGHTS / "sd" / "vae")
    pairs = {kind: {"new": round(new, 5), "version 1": round(old, 5)} for kind, (new, old) in measured.items()}
    record = {"trained on": trained, "mean absolute error": pairs}
    (WEIGHTS / "sd" / "vae" / "errors.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def carry_on(model: nn.Module, recipe: Recipe = RECIPE, batch: int = BATCH) -> None:
    """Continue the VAE's training with noise on its latents.

    The loss is L1, and L1 of the image's gradients, which carry hands and faces. The encoder stays near its latents, so
    that the first version's U-Net is still a valid start.
    """
    torch.manual_seed(0)
    drawing, scale = world.World(), model.config.scaling_factor
    before = load_vae(first_files.WEIGHTS / "sd" / "vae")
    model.requires_grad_(True).train()

    def loss_of(step: int) -> Tensor:
        x = pixels([world.picture(drawing, "vae", step * batch + i) for i in range(batch)])
        mean = model.encode(x).latent_dist.mean
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
        y = model.decode(mean + WIDE / scale * noise).sample
        with torch.no_grad():
            anchor = before.encode(x).latent_dist.mean
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        return (y - x).abs().mean() + edges + 0.1 * (scale * (mean - anchor)).square().mean()

    fit("vae", model, loss_of, recipe)
    model.requires_grad_(False).eval()


# -- the pool ---------------------------------------------------------------------------------------------------------


def pool_folder() -> Path:
    """Return the cache folder for the current drawing code and VAE."""
    sources = [Path(module.__file__) for module in (art, captions, world)]
    made_by = [*sources, WEIGHTS / "sd" / "vae" / "diffusion_pytorch_model.safetensors"]
    named = digest([*(sha256_file(file) for file in made_by), captions.names()["frequencies"]])[:10]
    return home() / "training2" / f"pool.{named}"


@torch.no_grad()
def draw_part(vae_: nn.Module, drawing: world.World, number: int, size: int, folder: Path) -> None:
    """Draw and encode one file of the pool.

    It writes latents fp16 [size, 16, 8, 8], and each image's caption, kind and names.
    """
    latents, records = [], []
    for start in range(number * size, (number + 1) * size, 100):
        some = [world.picture(drawing, "pool", i) for i in range(start, min(start + 100, (number + 1) * size))]
        mean = vae_.encode(pixels(some)).latent_dist.mean
        latents.append((mean * vae_.config.scaling_factor).half().numpy())
        contents = ([*p.objects, *p.hazards, *filter(None, (p.person, p.artist))] for p in some)
        records += [[p.caption, p.kind, names] for p, names in zip(some, contents, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number:03}.json").write_text(json.dumps(records), encoding="utf-8")
    np.save(folder / "part.npy", np.concatenate(latents))
    (folder / "part.npy").replace(folder / f"{number:03}.npy")  # last: an existing file is complete


def pool(size: int = SIZE, part: int = PART) -> tuple[np.ndarray, list[str], list[str], list[list[str]]]:
    """Return the pool's latents, captions, kinds and names.

    -> (latents fp16 [N, 16, 8, 8], captions, kinds, names of the contents); draws the missing part of the cache.
    """
    folder = pool_folder()
    missing = [i for i in range(-(-size // part)) if not (folder / f"{i:03}.npy").exists()]
    if missing:
        model, drawing = load_vae(WEIGHTS / "sd" / "vae"), world.World()
        for i in missing:
            draw_part(model, drawing, i, part, folder)
            log.info("pool: %d of %d pictures", (i + 1) * part, size)
    numbers = range(-(-size // part))
    latents = np.concatenate([np.load(folder / f"{i:03}.npy") for i in numbers])
    records = [r for i in numbers for r in json.loads((folder / f"{i:03}.json").read_text(encoding="utf-8"))]
    texts, kinds, contents = (list(column) for column in zip(*records, strict=True))
    return latents, texts, kinds, contents


@torch.no_grad()
def encode_captions(tower: nn.Module, texts: Sequence[str], file: Path) -> tuple[np.ndarray, list[int]]:
    """Encode captions once, and store their rows on disk.

    -> (rows fp16 [U, 32, W] of the distinct captions; the row of each caption)

    The file's name in the cache has a digest of the tower's weights, so that a resumed stage finds it.
    """
    from .nets import CONTEXT, tokenize

    distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    shape = (len(distinct), CONTEXT, tower.config.hidden_size)
    if not file.exists():
        part = file.with_suffix(".part")
        rows = np.lib.format.open_memmap(part, "w+", np.float16, shape)
        for start in range(0, len(distinct), 256):
            some = list(distinct)[start : start + 256]
            rows[start : start + len(some)] = tower(tokenize(some))[0].half().numpy()
        rows.flush()
        part.replace(file)
    return np.load(file, mmap_mode="r"), [distinct[text] for text in texts]
