"""Train the embedded world, completely or one stage of it.

Run `python -m erasebench.mini.train all`, or name a stage: tokenizer, drawings, vae, unet (with its text encoder),
widen, judge, clip, yolo, retrained. Each checkpoints every few minutes to the cache, resumes after a kill, uses a GPU
if there is one, and writes fp16 safetensors into weights/ when done. The VAE, the U-Net and `widen` share each batch
between the workers of `torchrun --nproc-per-node N -m erasebench.mini.train`: use a worker of one thread for each
core, since threads that wait for each other stall if something else runs. On two cores it takes about an hour for the
VAE, four for the U-Net (27,000 steps of half a second), ten minutes for a judge.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ..store.local import digest, home, sha256_file
from . import world
from .files import WEIGHTS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

log = logging.getLogger("erasebench")
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.36.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP = 200  # steps until the full learning rate
EVERY = 180  # seconds between checkpoints
POOL = 40_000  # training images of the U-Net
SHORT = 24  # tokens of the context in most steps of the U-Net
RANK, WORKERS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# -- the loop that every stage shares ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one stage.

    AdamW's learning rate warms up to `lr` and falls as a cosine. `ema`, if any, is the decay of averaged weights.

    `half` computes in bf16. On a CPU with its instructions it is 1.6 times as fast for large images, and slower for
    the U-Net's small latents.
    """

    steps: int
    lr: float
    decay: float = 0.01
    ema: float = 0.0
    half: bool = True

    def rate(self, step: int) -> float:
        return self.lr * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Trainee:
    """Module in training, with its optimiser, EMA weights and checkpoint.

    EMA weights exist only if asked for; the checkpoint of them all is in the cache.
    """

    def __init__(self, stage: str, module: nn.Module, recipe: Recipe):
        self.module, self.recipe = module, recipe
        self.path = home() / "training" / f"{stage}.pt"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        weights, decay = module.parameters(), recipe.decay
        self.optimiser = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=decay, betas=(0.9, 0.98), fused=True)
        self.shadow = [p.detach().clone() for p in module.parameters()] if recipe.ema else []

    def resume(self) -> int:
        """Load the checkpoint and return the step to go on from. 0 without a checkpoint."""
        if not self.path.exists():
            return 0
        saved = torch.load(self.path, map_location=DEVICE, weights_only=True)
        self.module.load_state_dict(saved["module"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.shadow = saved["shadow"]
        return saved["step"]

    def save(self, step: int) -> None:
        states = {"module": self.module.state_dict(), "optimiser": self.optimiser.state_dict()}
        torch.save({**states, "shadow": self.shadow, "step": step}, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)

    def advance(self, loss_of: Callable[[int], Tensor], step: int) -> float:
        """Take one step of the optimiser and of the EMA. Returns the loss before it."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate(step)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.recipe.half):
            loss = loss_of(step)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if WORKERS > 1:
            mean_over_workers(self.module)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimiser.step()
        if ema := self.recipe.ema:
            weights = [p.detach() for p in self.module.parameters()]
            torch._foreach_lerp_(self.shadow, weights, 1 - min(ema, (step + 1) / (step + 10)))
        return loss.item()


def fit(
    stage: str,
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    recipe: Recipe,
    snapshot: Callable[[], None] | None = None,
) -> None:
    """Train a module and leave its EMA weights, if any, in it.

    `loss_of(step)` draws its own batch. A checkpoint (weights, EMA, optimiser, step) goes to the cache every EVERY
    seconds. Batches depend on the step alone, so a resumed training equals the undisturbed one.
    """
    trainee, steps = Trainee(stage, module, recipe), recipe.steps
    if start := trainee.resume():
        log.info("%s: resumed at step %d", stage, start)
    last, began, losses = time.time(), time.time(), []
    for step in range(start, steps):
        losses.append(trainee.advance(loss_of, step))
        if RANK == 0 and step % 100 == 99:
            mean, pace = np.mean(losses[-100:]), (time.time() - began) / (step + 1 - start)
            log.info("%s: step %d/%d, loss %.4f, %.3f s a step", stage, step + 1, steps, mean, pace)
        if RANK == 0 and (time.time() - last > EVERY or step + 1 == steps):
            last = time.time()
            trainee.save(step + 1)
            if snapshot:
                with swapped(module, trainee.shadow):
                    snapshot()
    if recipe.ema:
        for parameter, mean in zip(module.parameters(), trainee.shadow, strict=True):
            parameter.data.copy_(mean)


def mean_over_workers(module: nn.Module) -> None:
    """Average the gradients over all workers. Every worker saw an equal share of the batch."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    torch._foreach_copy_(
        gradients,
        [
            part.view_as(g)
            for g, part in zip(gradients, (flat / WORKERS).split([g.numel() for g in gradients]), strict=True)
        ],
    )


def wait_for_workers() -> None:
    if WORKERS > 1:
        distributed.barrier()


def share(size: int) -> slice:
    """Return this worker's part of a batch."""
    return slice(RANK * size // WORKERS, (RANK + 1) * size // WORKERS)


class swapped:
    """Context with the EMA weights in place of the module's."""

    def __init__(self, module: nn.Module, shadow: list[Tensor]):
        self.pairs = list(zip(module.parameters(), shadow, strict=True)) if shadow else []

    def __enter__(self):
        self.kept = [p.data for p, _ in self.pairs]
        for parameter, mean in self.pairs:
            parameter.data = mean

    def __exit__(self, *error):
        for (parameter, _), kept in zip(self.pairs, self.kept, strict=True):
            parameter.data = kept


def tensor(pixels: list[np.ndarray]) -> Tensor:
    """Convert uint8 images -> [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pixels)).to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1


def batches(drawing: world.World, part: str, size: int) -> Callable[[int], list[world.Picture]]:
    return lambda step: [world.picture(drawing, part, step * size + i) for i in range(size)]


# -- VAE --------------------------------------------------------------------------------------------------------------


def vae(steps: int = 11_000, robust_steps: int = 4_500, wide: float = 0.3, batch: int = 16) -> None:
    """Train AutoencoderKL, 64x64 -> 16x8x8.

    The loss is L1, and L1 of the image gradients (edges carry the hands and the faces).

    The posterior's width is fixed. If learnt from an initial 1, it drowns the means, and the first thousand steps
    teach nothing. At first it is narrow, for sharp images; then it is wide, so that no information in the latents
    depends on tiny differences: the decoder forgives the errors of the U-Net.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(16, 16, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
    ).to(DEVICE)
    drawing, mine = world.World(), range(batch)[share(batch)]
    draw = lambda step: [world.picture(drawing, "vae", step * batch + i) for i in mine]

    def loss_of(step: int) -> Tensor:
        x = tensor([p.pixels for p in draw(step)])
        mean = model.encode(x).latent_dist.mean
        width = 0.1 if step < steps else wide * mean.detach().std()  # of the means, which would outgrow it
        noise = torch.randn((batch, *mean.shape[1:]), generator=torch.Generator().manual_seed(step))
        y = model.decode(mean + width * noise[share(batch)].to(DEVICE)).sample.float()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        return (y - x).abs().mean() + edges + 1e-3 * mean.float().square().mean()

    fit("vae", model, loss_of, Recipe(steps, lr=2e-3, decay=0.0))
    fit("vae_robust", model, lambda step: loss_of(steps + step), Recipe(robust_steps, lr=1e-3, decay=0.0))
    pictures = tensor([world.picture(drawing, "scale", i).pixels for i in range(512)])
    with torch.no_grad():
        z = torch.cat([model.encode(some).latent_dist.mean for some in pictures.split(64)])
        model.quant_conv.weight[16:] = 0  # the log variance used in training
        model.quant_conv.bias[16:] = 2 * math.log(wide * z.std())
    model.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    log.info("vae: latents have mean %.3f, std %.3f", z.mean(), z.std())
    if RANK == 0:
        model.half().save_pretrained(WEIGHTS / "sd" / "vae")


# -- tokenizer and shipped drawings -----------------------------------------------------------------------------------


def tokenizer() -> None:
    """Train a byte-level BPE on the words of the world.

    Each becomes one token, and any other text can still be encoded.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        world.words(), trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    vocabulary = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *dict.fromkeys(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder = WEIGHTS / "sd" / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    made = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    made.save_pretrained(folder)
    split = [word for word in world.words() if len(made(word).input_ids) != 3 and word.isalpha()]
    if split:
        raise RuntimeError(f"words of several tokens: {split}")
    log.info("tokenizer: %d tokens, %d words of one token", len(vocabulary), len(world.words()))


def drawings(captions: int = 1000, others: int = 1000, each: int = 4) -> None:
    """Write the world's drawings with their ground truth.

    A run thus never needs the drawing packages. The drawings are of captions, of the world's mixture, and `each` of
    every single concept. The captions for evaluation and training are written too.
    """
    import io

    import pandas as pd
    from PIL import Image

    drawing = world.World()
    pictures = [world.caption_picture(drawing, "shipped", i) for i in range(captions)]
    pictures += [world.picture(drawing, "shipped mix", i) for i in range(others)]
    kinds = {"object": "objects", "person": "people", "artist": "artists", "hazard": "hazards"}
    one = [(kind, name) for kind, known in kinds.items() for name in world.concepts()[known]]
    pictures += [world.picture(drawing, "shipped concept", i, *concept) for concept in one for i in range(each)]

    def webp(pixels: np.ndarray) -> bytes:
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "WEBP", lossless=True, quality=100, method=6)
        return buffer.getvalue()

    pd.DataFrame(
        {
            "webp": [webp(p.pixels) for p in pictures],
            "use": ["caption"] * captions + ["mix"] * others + ["concept"] * each * len(one),
            "kind": [p.kind for p in pictures],
            "caption": [p.caption for p in pictures],
            "objects": [p.objects for p in pictures],
            "hazards": [p.hazards for p in pictures],
            "person": [p.person for p in pictures],
            "face": [p.face for p in pictures],
            "artist": [p.artist for p in pictures],
            "hand": [p.hand for p in pictures],
            "background": [p.background for p in pictures],
            "mask_names": [list(p.masks) for p in pictures],
            "masks": [[np.packbits(m).tobytes() for m in p.masks.values()] for p in pictures],
        }
    ).to_parquet(WEIGHTS / "drawings.parquet", compression="brotli", compression_level=11)
    evaluation = [
        world.caption_picture(drawing, "captions", i).caption for i in range(world.names()["captions"]["count"])
    ]
    training = [world.picture(drawing, "training captions", i).caption for i in range(1000)]
    lists = {"evaluation": evaluation, "training": [c for c in dict.fromkeys(training) if c not in set(evaluation)]}
    (WEIGHTS / "captions.json").write_text(json.dumps(lists, indent=0))


# -- U-Net and text encoder -------------------------------------------------------------------------------------------


def pool(drawing: world.World, size: int) -> tuple[Tensor, list[str], list[str]]:
    """Encode this worker's share of the images once. -> scaled latents fp16 [N, 16, 8, 8], captions, kinds"""
    from diffusers import AutoencoderKL

    model = (
        AutoencoderKL.from_pretrained(WEIGHTS / "sd" / "vae", torch_dtype=torch.float32)
        .to(DEVICE)
        .requires_grad_(False)
    )
    latents, captions, kinds = [], [], []
    for numbers in torch.arange(size)[share(size)].split(100):
        pictures = [world.picture(drawing, "pool", i) for i in numbers.tolist()]
        captions += [p.caption for p in pictures]
        kinds += [p.kind for p in pictures]
        with torch.autocast(DEVICE, torch.bfloat16):
            mean = model.encode(tensor([p.pixels for p in pictures])).latent_dist.mean
        latents.append((mean * model.config.scaling_factor).half().cpu())
    return torch.cat(latents), captions, kinds


def pooled() -> tuple[Tensor, list[str], list[str]]:
    """Return the pool of every worker -> latents, captions and kinds. It is drawn once for this world and this VAE."""
    made_by = (Path(world.__file__), WEIGHTS / "sd" / "vae" / "diffusion_pytorch_model.safetensors")
    stamp = digest([sha256_file(file) for file in made_by])[:8]
    parts = [home() / "training" / f"pool.{stamp}.{i}.{WORKERS}.pt" for i in range(WORKERS)]
    if not parts[RANK].exists():
        torch.save(pool(world.World(), POOL), parts[RANK])
    wait_for_workers()
    encoded = [torch.load(part, weights_only=True) for part in parts]
    captions, kinds = ([text for part in encoded for text in part[k]] for k in (1, 2))
    return torch.cat([z for z, *_ in encoded]), captions, kinds


def forgotten() -> list[str]:
    """List the concepts that the perfect eraser never sees.

    They are airplanes, the hazards, the first artist and the first ten people.
    """
    every = world.names()
    return [
        next(iter(every["objects"])),
        *every["hazards"]["classes"],
        every["artists"]["first"],
        *every["people"]["erase"][:10],
    ]


def innocent(size: int) -> Tensor:
    """Mark the pool's images that show nothing of `forgotten`, bool [N].

    The order is the pool's. The images are drawn again for this, since an artist's image shows things that no caption
    names.
    """
    stamp = digest([sha256_file(Path(world.__file__)), forgotten()])[:8]
    parts = [home() / "training" / f"innocent.{stamp}.{i}.{WORKERS}.pt" for i in range(WORKERS)]
    if not parts[RANK].exists():
        gone, drawing = set(forgotten()), world.World()
        shown = [world.picture(drawing, "pool", i) for i in torch.arange(size)[share(size)].tolist()]
        torch.save(torch.tensor([not gone & {*p.objects, *p.hazards, p.person, p.artist} for p in shown]), parts[RANK])
    wait_for_workers()
    return torch.cat([torch.load(part, weights_only=True) for part in parts])


def retrained() -> None:
    """Train the perfect eraser.

    It is the U-Net and text encoder as `unet` trains them, from the same seed, in a world without the concepts of
    `forgotten`, for less than half of the steps. It keeps the narrow text encoder, so that it takes 10 MB.
    """
    folder = WEIGHTS / "retrained"
    folder.mkdir(exist_ok=True)
    names = [*forgotten(), world.names()["hazards"]["phrase"]]
    (folder / "forgotten.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    unet(9_000, 1_000, stage="retrained", folder=folder, among=innocent)


class Examples(NamedTuple):
    """Training images of the U-Net."""

    latents: Tensor  # [N, 16, 8, 8]
    ids: Tensor  # [N, 77], of their captions
    empty: Tensor  # [1, 77], of the empty caption
    often: Tensor  # [N], relative frequencies


def load_examples(words: CLIPTokenizer, stage: str, among: Callable[[int], Tensor] | None) -> Examples:
    """Load the pool as examples. If `among` is given, only the images that it admits are ever drawn."""
    latents, captions, kinds = pooled()
    often = torch.tensor([{"pair": 3.0, "artist": 3.0}.get(kind, 1.0) for kind in kinds])
    if among is not None:
        often *= among(POOL)
    log.info("%s: %d of %d pictures, latents have std %.3f", stage, often.count_nonzero(), POOL, latents.float().std())
    encode = lambda texts: (
        words(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    )
    return Examples(latents, encode(captions).to(DEVICE), encode([""]).to(DEVICE), often)


def narrow_networks(words: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Build the text encoder and the U-Net before any training."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    net = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return text, net


def denoising(both: nn.ModuleDict, examples: Examples, alphas: Tensor, batch: int = 64) -> Callable[[int], Tensor]:
    """Return the loss of each step.

    It is the squared error of the noise, weighted by the signal-to-noise ratio (see `unet`).
    """

    def loss_of(step: int) -> Tensor:
        random_ = torch.Generator().manual_seed(step)
        which = torch.multinomial(examples.often, batch, generator=random_)
        x = examples.latents[which].float().to(DEVICE)
        t = torch.randint(1000, (batch,), generator=random_).to(DEVICE)
        noise = torch.randn(x.shape, generator=random_).to(DEVICE)
        dropped = (torch.rand(batch, generator=random_) < 0.1).to(DEVICE)
        tokens = torch.where(dropped[:, None], examples.empty, examples.ids[which])
        x, t, noise, tokens = (whole[share(batch)] for whole in (x, t, noise, tokens))
        if step % 8:
            tokens = tokens[:, :SHORT]
        alpha = alphas[t].view(-1, 1, 1, 1)
        guess = both["unet"](
            alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t, both["text"](tokens)[0], return_dict=False
        )[0]
        snr = (alpha / (1 - alpha)).flatten()
        weight = torch.where(snr < 1, snr**-0.5, snr.clamp(max=5) / snr)
        return (((guess.float() - noise) ** 2).mean((1, 2, 3)) * weight).mean()

    return loss_of


def unet(
    steps: int = 22_000,
    again: int = 5_000,
    stage: str = "unet",
    folder: Path | None = None,
    among: Callable[[int], Tensor] | None = None,
) -> None:
    """Train UNet2DConditionModel and CLIPTextModel together.

    Training uses epsilon prediction, EMA and two cycles of the learning rate. The loss is weighted by min-SNR 5 (Hang
    et al., 2023) where the signal prevails, by SNR^-1/2 where noise does. With sixteen channels, an image becomes a
    cat or a dog at high noise, where the plain loss is so small that the model hardly learns names. Captions are
    short: seven steps in eight see a context cut to SHORT tokens, the eighth all 77, so that padding is familiar. The
    hardest images, pairs and artists, come up more often than in the world.

    (The shipped model saw its first 3,541 steps without the second weight, its first 7,300 on the latents of the VAE
    before its posterior was widened, its first 14,903 in short contexts and the world's own mixture, its first 18,076
    with artists that had no subjects of their own. From 14,903 on, one step in four was long, and artists came up 1.5
    and then 2 times as often as in the world. The first cycle, planned for 20,000 steps and then for 22,000, ended at
    20,709. The second is as it stands here.)
    """
    from diffusers import DDIMScheduler
    from transformers import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(WEIGHTS / "sd" / "tokenizer")
    text, net = narrow_networks(words)
    both = nn.ModuleDict({"unet": net, "text": text}).to(DEVICE, memory_format=torch.channels_last)
    log.info(
        "unet: %.2f M parameters, text encoder %.2f M",
        *(sum(p.numel() for p in m.parameters()) / 1e6 for m in (net, text)),
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    examples = load_examples(words, stage, among)
    loss_of = denoising(both, examples, scheduler.alphas_cumprod.to(DEVICE))

    def ship() -> None:
        """Save both networks for `widen`, also during training for inspection."""
        for part, module in (("unet", net), ("text_encoder", text)):
            copy.deepcopy(module).half().save_pretrained((folder or narrow()) / part)
        if folder is None:
            scheduler.save_pretrained(WEIGHTS / "sd" / "scheduler")

    how = {"ema": 0.998, "half": DEVICE == "cuda"}
    fit(stage, both, loss_of, Recipe(steps, lr=1.5e-3, **how), ship)
    fit(f"{stage}_again", both, lambda step: loss_of(steps + step), Recipe(again, lr=6e-4, **how), ship)
    if RANK == 0:
        ship()


def narrow() -> Path:
    """Return the folder of the U-Net and text encoder before `widen`."""
    return home() / "training" / "narrow"


def widen(width: int = 384, steps: int = 5_000, batch: int = 48, short: int = 32, naming: float = 0.05) -> None:
    """Widen the text encoder threefold by distillation, without any image.

    The new encoder h' learns to tell the U-Net's K and V projections W the same as the trained one: with a readout P
    [128, width], the error is W (P h' - h), over all projections and positions; then W P are the shipped projections.
    Its rows from EOS on also tell linearly the named concepts, as contrastive training leaves Stable Diffusion's
    encoder (squared error times `naming`; synonyms are one thing). Otherwise a linear reading of the embeddings poorly
    separates a hundred people from a hundred others with the same first and last names, and every closed form is such
    a reading. One step in four sees all 77 positions. The shipped encoder saw 3,241 steps with a cross-entropy in
    place of the squared error (it leaves the names less linear), then, from their mean, 2,600 of these from a rate of
    1.2e-3.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(WEIGHTS / "sd" / "tokenizer")
    taught = CLIPTextModel.from_pretrained(narrow() / "text_encoder", dtype=torch.float32).to(DEVICE).eval()
    net = UNet2DConditionModel.from_pretrained(narrow() / "unet", torch_dtype=torch.float32)
    state = net.state_dict()
    read = [name for name in state if ".attn2.to_k." in name or ".attn2.to_v." in name]
    captions = sorted(set(pooled()[1]))
    encoded = words(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    named = names_in(captions)

    torch.manual_seed(0)
    size = taught.config.hidden_size
    changes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 64}
    text = CLIPTextModel(CLIPTextConfig(**{**taught.config.to_dict(), **changes}))
    heads = {"readout": nn.Linear(width, size, bias=False), "names": nn.Linear(width, named.shape[1])}
    both = nn.ModuleDict({"text": text, **heads}).to(DEVICE)
    metric = metric_of([state[name].double() for name in read]).to(DEVICE)

    @torch.no_grad()
    @torch.autocast(DEVICE, enabled=False)
    def goal(tokens: Tensor) -> Tensor:
        return taught(tokens)[0] @ metric

    first = goal(encoded[:512].to(DEVICE))
    spread = (first - first.mean((0, 1))).square().sum(-1).mean()

    def loss_of(step: int) -> Tensor:
        random_ = torch.Generator().manual_seed(step)
        which = torch.randint(len(captions), (batch,), generator=random_)[share(batch)]
        tokens = encoded[which][:, : short if step % 4 else 77].to(DEVICE)
        hidden = both["text"](tokens)[0]
        error = (both["readout"](hidden).float() @ metric - goal(tokens)).square().sum(-1).mean() / spread
        ended = tokens == words.eos_token_id
        truth = named[which].to(DEVICE)[:, None].expand(-1, tokens.shape[1], -1)[ended]
        missed = (both["names"](hidden[ended]).float() - truth).square().sum(-1).mean()
        return error + naming * missed

    fit("widen", both, loss_of, Recipe(steps, lr=1.5e-3, ema=0.998))
    if RANK == 0:
        readout = both["readout"].weight.detach().double().cpu()
        shape = {key: value for key, value in net.config.items() if not key.startswith("_")}  # not its path
        wide = UNet2DConditionModel.from_config({**shape, "cross_attention_dim": width})
        wide.load_state_dict({n: (w.double() @ readout).float() if n in read else w for n, w in state.items()})
        for part, module in (("unet", wide), ("text_encoder", text)):
            copy.deepcopy(module).half().save_pretrained(WEIGHTS / "sd" / part)
        (WEIGHTS / "sd" / "model_index.json").write_text(json.dumps(INDEX, indent=1))


def metric_of(projections: Sequence[Tensor]) -> Tensor:
    """Return M [D, D] with |x M|^2 = sum of |W x|^2.

    W [k, D] runs over the projections, and M is the Cholesky factor of their Gram matrix.
    """
    gram = sum(weight.T @ weight for weight in projections)
    return torch.linalg.cholesky(gram + 1e-9 * gram.trace() * torch.eye(len(gram))).float()


def names_in(captions: Sequence[str]) -> Tensor:
    """Return the share of each thing in each caption [N, things].

    Things are people, objects, artists and hazards. The shares of named things are equal and sum to 1; without any
    they are 0.
    """
    called = {name: (name,) for kind in ("objects", "people", "artists", "hazards") for name in world.concepts()[kind]}
    called |= {name: (name, *spec["synonyms"]) for name, spec in world.names()["objects"].items()}
    found = torch.zeros(len(captions), len(called))
    for row, caption in zip(found, captions, strict=True):
        for k, ways in enumerate(called.values()):
            row[k] = any(f" {way.lower()} " in f" {caption} " for way in ways)
    return found / found.sum(1, keepdim=True).clamp(min=1)


# -- judges -----------------------------------------------------------------------------------------------------------


def worn(x: Tensor, generator: torch.Generator) -> Tensor:
    """Apply mild blur, noise, contrast and tint to some images. A decoder may do the same to a drawing."""
    chance = lambda: torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(chance() < 0.4, torch.lerp(x, soft, chance()), x)
    x = x * (1 + 0.15 * (chance() - 0.5)) + 0.1 * (chance() - 0.5)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x + torch.where(chance() < 0.5, 0.08 * chance(), 0 * chance()) * noise).clamp(-1, 1)


def broken(x: Tensor, generator: torch.Generator) -> Tensor:
    """Break images, a fifth of the batch in each way.

    The ways are blank, noise, shuffled patches, heavy blur, and halves of two images.
    """
    parts = list(x.tensor_split(5))
    draw = lambda *shape: torch.rand(*shape, generator=generator).to(x.device)
    parts[0] = (2 * draw(len(parts[0]), 3, 1, 1) - 1).expand_as(parts[0])
    parts[1] = 2 * draw(*parts[1].shape) - 1
    tiles = F.unfold(parts[2], 16, stride=16)[:, :, torch.randperm(16, generator=generator)]
    parts[2] = F.fold(tiles, 64, 16, stride=16)
    parts[3] = F.interpolate(F.avg_pool2d(parts[3], 16), scale_factor=16, mode="bilinear")
    parts[4] = torch.cat([parts[4][..., :32], parts[4].flip(0)[..., 32:]], -1)
    return torch.cat(parts)


def truth(drawing: world.World, pictures: list[world.Picture]) -> dict[str, Tensor]:
    """Return labels of images for every head. The hand and print of an image are known for every drawn object."""
    every = world.concepts()
    many = lambda names, known: [float(k in names) for k in known]
    style = {(drawing.hand_of[a], a in drawing.prints): i for i, a in enumerate(every["artists"])}
    printed = [p.artist in drawing.prints for p in pictures]
    return {
        "objects": torch.tensor([many(p.objects, every["objects"]) for p in pictures]),
        "hazards": torch.tensor([many(p.hazards, every["hazards"]) for p in pictures]),
        "people": torch.tensor(
            [every["people"].index(p.person) if p.person else len(every["people"]) for p in pictures]
        ),
        "face": torch.tensor([[float(p.face)] for p in pictures]),
        # -1: a plain hand that no artist has; len: nobody's
        "artists": torch.tensor(
            [
                len(every["artists"]) if p.hand < 0 else style.get((p.hand, q), -1)
                for p, q in zip(pictures, printed, strict=True)
            ]
        ),
    }


def judge(steps: int = 3000, batch: int = 128) -> None:
    """Train the judge of objects, people, artists and hazards.

    A quarter of every batch are pairs, the hardest to see; a tenth is broken and shows nothing.
    """
    from safetensors.torch import save_file

    from .nets import Judge

    torch.manual_seed(0)
    every, drawing = world.concepts(), world.World()
    model = Judge(*(len(every[kind]) for kind in ("objects", "people", "artists", "hazards"))).to(DEVICE)
    draw = lambda step: [
        world.picture(drawing, "judge", step * batch + i, None if i % 4 else "pair") for i in range(batch)
    ]
    spoilt = batch // 10

    def loss_of(step: int) -> Tensor:
        model.train()
        generator, pictures = torch.Generator().manual_seed(step), draw(step)
        x, label = tensor([p.pixels for p in pictures]), truth(drawing, pictures)
        x = torch.cat([broken(x[:spoilt], generator), worn(x[spoilt:], generator)])
        for name in ("objects", "hazards", "face"):
            label[name][:spoilt] = 0
        for name in ("people", "artists"):
            label[name][:spoilt] = len(every[name])
        out = {name: value.float() for name, value in model(x).items()}
        label = {name: value.to(DEVICE) for name, value in label.items()}
        label["by_features"] = label["objects"]
        yes_no = sum(
            20 * F.binary_cross_entropy_with_logits(out[n], label[n]) for n in ("objects", "by_features", "hazards")
        )
        return (
            yes_no
            + F.binary_cross_entropy_with_logits(out["face"], label["face"])
            + F.cross_entropy(out["people"], label["people"])
            + F.cross_entropy(out["artists"], label["artists"], ignore_index=-1)
        )

    fit("judge", model, loss_of, Recipe(steps, lr=2e-3, decay=0.02))
    model.eval()
    folder = WEIGHTS / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(every))
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()},
        folder / "judge.safetensors",
    )
    with torch.no_grad():
        shown = [
            tensor([world.caption_picture(drawing, "shipped", i).pixels for i in range(a, a + 100)])
            for a in range(0, 1000, 100)
        ]
        features = torch.cat([model(x)["features"] for x in shown])
    save_file({"caption_features": features.half().cpu()}, folder / "reference.safetensors")


def clip(steps: int = 2500, batch: int = 128) -> None:
    """Train open_clip's CLIP on fresh drawings and captions. The training is contrastive (Radford et al., 2021)."""
    from open_clip.loss import ClipLoss
    from safetensors.torch import save_file

    from .nets import clip_model, tokenize, tokenizer

    torch.manual_seed(0)
    model = clip_model(len(tokenizer())).to(DEVICE)
    draw, loss = batches(world.World(), "clip", batch), ClipLoss()

    def loss_of(step: int) -> Tensor:
        model.train()
        model.logit_scale.data.clamp_(max=math.log(100))
        pictures = draw(step)
        x = worn(tensor([p.pixels for p in pictures]), torch.Generator().manual_seed(step))
        image, text, scale = model(x, tokenize([p.caption for p in pictures]).to(DEVICE))[:3]
        return loss(image.float(), text.float(), scale.float())

    fit("clip", model, loss_of, Recipe(steps, lr=1e-3, decay=0.05))
    (WEIGHTS / "clip").mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in model.state_dict().items()},
        WEIGHTS / "clip" / "clip.safetensors",
    )


def yolo(steps: int = 2500, batch: int = 128) -> None:
    """Train YOLOv8n-cls on fresh drawings of one object. Anything else, and broken images, is `nothing`."""
    from ..evaluators.yolo import build, logits, save

    torch.manual_seed(0)
    classes, drawing = [*world.concepts()["objects"], "nothing"], world.World()
    model, spoilt = build(len(classes)).to(DEVICE), batch // 16
    kinds = (None, "object", "object", "object")

    def loss_of(step: int) -> Tensor:
        model.train()
        generator = torch.Generator().manual_seed(step)
        pictures = [world.picture(drawing, "yolo", step * batch + i, kinds[i % 4]) for i in range(batch)]
        pictures = [p for p in pictures if len(p.objects) < 2]
        label = torch.tensor([classes.index(p.objects[0]) if p.objects else len(classes) - 1 for p in pictures])
        label[:spoilt] = len(classes) - 1
        x = tensor([p.pixels for p in pictures])
        x = torch.cat([broken(x[:spoilt], generator), worn(x[spoilt:], generator)])
        return F.cross_entropy(logits(model, x / 2 + 0.5).float(), label.to(DEVICE))

    fit("yolo", model, loss_of, Recipe(steps, lr=2e-3, decay=0.02))
    save(model.eval(), classes, 64, WEIGHTS / "yolo")


def main(argv: list[str] | None = None) -> None:
    every = (tokenizer, drawings, vae, unet, widen, judge, clip, yolo, retrained)
    stages = {stage.__name__: stage for stage in every}
    parser = argparse.ArgumentParser(prog="python -m erasebench.mini.train", description=__doc__)
    parser.add_argument("stage", choices=["all", *stages])
    args = parser.parse_args(argv)
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    torch.set_flush_denormal(True)
    if WORKERS > 1:
        distributed.init_process_group("gloo", timeout=timedelta(hours=3))  # some stages run on the first worker alone
    for name, stage in stages.items():
        if args.stage in ("all", name):
            shared = stage in (vae, unet, widen, retrained)
            if WORKERS > 1:
                torch.set_num_threads(1 if shared else WORKERS)
            if RANK == 0 or shared:
                stage()
            wait_for_workers()


if __name__ == "__main__":
    main()
