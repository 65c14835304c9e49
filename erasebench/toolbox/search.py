"""Building blocks of attacks.

These are prompts with free tokens, random draws that depend on one prompt alone, projections, and the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..contracts import PLACEHOLDER, Found, Prompt, Sampler, Scene, Shot
from ..model.context import Context
from ..model.guidance import ClassifierFree
from ..model.memory import at_once, in_slices
from ..model.model import Model, Sampled
from ..progress import track
from ..provenance import sources, write_sources
from ..run.images import plain, scales
from ..tasks import seed_of

FREE = -1  # a free token in a list of token ids
Objective = Literal["auto", "cond", "guided"]


class Draws:
    """Random numbers for several prompts, each from its own generator.

    The result for one prompt therefore never depends on the prompts attacked beside it.
    """

    def __init__(self, model: Model, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.dtype, self.device = model.dtype, model.device

    def normal(self, which: Sequence[int], *shape: int) -> Tensor:
        """Draw normal numbers [len(which), *shape]."""
        drawn = [torch.randn(shape, generator=self.generators[i], dtype=self.dtype) for i in which]
        return torch.stack(drawn).to(self.device)

    def uniform(self, which: Sequence[int], *shape: int) -> Tensor:
        drawn = [torch.rand(shape, generator=self.generators[i], dtype=self.dtype) for i in which]
        return torch.stack(drawn).to(self.device)

    def integers(self, which: Sequence[int], low: int, high: int, *shape: int) -> Tensor:
        """Draw integers in [low, high)."""
        drawn = [torch.randint(low, high, shape, generator=self.generators[i]) for i in which]
        return torch.stack(drawn).to(self.device)


def draws(model: Model, scene: Scene, attack: object) -> Draws:
    """Make one generator for each prompt of the scene.

    Its seed depends on the prompt's text and seed, not on its position.
    """
    name = type(attack).__name__
    return Draws(model, [seed_of(name, p.text, p.seed, scene.seed) for p in scene.prompts])


Key = tuple[str | int, ...]


def stored(scene: Scene, keys: Sequence[Key], make: Callable[[list[Key]], Sequence[dict[str, Tensor]]]) -> dict:
    """Return key -> tensors that several prompts share.

    Examples are an inversion of their concept or a search for their text. They come from the store; missing ones are
    made together. Another process that asks for the same meanwhile waits for them.
    """
    identity = lambda key: {**scene.identity, "shared": key}
    found = {}
    with scene.store.claim("searches", identity(tuple(keys))) if len(keys) > 1 else nullcontext():
        missing = [key for key in keys if scene.store.get("searches", identity(key)) is None]
        made = dict(zip(missing, make(missing), strict=True)) if len(missing) > 1 else {}
        for key in keys:

            def fill(folder: Path, key: Key = key) -> None:
                tensors = made[key] if key in made else make([key])[0]
                save_file({k: v.clone() for k, v in tensors.items()}, folder / "found.safetensors")
                write_sources(folder, sources(scene.identity["attack"]) if "attack" in scene.identity else {})

            entry = scene.store.get_or_make("searches", identity(key), fill)
            scene.take_up(entry)
            found[key] = load_file(entry / "found.safetensors")
    return found


# -- prompts with free tokens -----------------------------------------------------------------------------------------


def shots(prompt: Prompt, text: str, outcome: str = "", count: int = 1) -> Found:
    """Return shots of one text.

    The first has the prompt's own seed, count - 1 others have further seeds.
    """
    seeds = [prompt.seed, *(seed_of("shot", prompt.seed, i) for i in range(1, count))]
    return Found(tuple(Shot(text, seed) for seed in seeds) if text else (), outcome=outcome)


def two_encoders(model: Model) -> str:
    """Return why an attack on token embeddings does not fit, or ""."""
    return "it attacks one text encoder, and this model has two" if model.text_encoder_2 is not None else ""


def tokens(model: Model, text: str) -> list[int]:
    """Return the ids of a text, without start, end and padding."""
    return model.tokens(text)


def words(model: Model) -> Tensor:
    """Return the ids that an attack may put into a prompt.

    These are all but the start, end and padding tokens, and a word that was learnt from images.
    """
    special = {*model.tokenizer.all_special_ids, *model.tokenizer.get_added_vocab().values()}
    return torch.tensor([i for i in range(len(model.tokenizer)) if i not in special], device=model.device)


def fits(model: Model, row: Sequence[int]) -> bool:
    """Return whether a context holds these tokens beside start and end."""
    return len(row) <= model.context_length - 2


class Slots(NamedTuple):
    """Token ids of prompts, with a mask of free places.

    Ids are [B, L], the mask of free ones is bool [B, L].
    """

    ids: Tensor
    free: Tensor

    def filled(self, ids: Tensor) -> Tensor:
        """Fill in the ids of all free places.

        Ids [sum of k], prompt after prompt -> token ids [B, L].
        """
        return self.ids.masked_scatter(self.free, ids)


def slots(model: Model, rows: Sequence[Sequence[int]], padding: int | None = None) -> Slots:
    """Build prompts from lists of token ids, with FREE for free tokens.

    Padded as the tokenizer does, or with `padding`.
    """
    start, end = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    fill = model.tokenizer.pad_token_id if padding is None else padding
    ids = torch.full((len(rows), model.context_length), fill, device=model.device)
    for i, row in enumerate(rows):
        ids[i, : len(row) + 2] = torch.tensor([start, *row, end])
    return Slots(ids.clamp(min=0), ids == FREE)


def with_vectors(model: Model, prompts: Slots, vectors: Tensor) -> Context:
    """Encode prompts with vectors [sum of k, D] in their free places.

    The vectors come prompt after prompt; the result is differentiable in them.
    """
    embeds = table(model)[prompts.ids].index_put((prompts.free,), vectors.to(model.dtype))
    return model.encode(ids=prompts.ids, token_embeds=embeds)


def table(model: Model) -> Tensor:
    """Return token embeddings [V, D] of the text encoder as it stands."""
    return model.text_encoder.get_input_embeddings().weight


def spelled(model: Model, ids: Tensor | Sequence[int]) -> str:
    """Return the text of token ids.

    Tokenizing it may give other tokens: samplers see those.
    """
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def with_placeholder(model: Model, text: str, count: int) -> list[int]:
    """Return token ids of a text, with FREE `count` times for PLACEHOLDER."""
    left, _, right = text.partition(PLACEHOLDER)
    return [*tokens(model, left), *[FREE] * count, *tokens(model, right)]


def draw_vectors(model: Model, shots: Sequence[Prompt], vectors: Sequence[Tensor], sampler: Sampler) -> Sampled:
    """Sample images of prompts in which vectors [k, D] replace PLACEHOLDER."""
    rows = [with_placeholder(model, p.text, len(v)) for p, v in zip(shots, vectors, strict=True)]
    context = with_vectors(model, slots(model, rows), torch.cat(list(vectors)).to(model.device))
    return model.sample(context, [p.seed for p in shots], sampler, scales(shots, sampler))


# -- projections ------------------------------------------------------------------------------------------------------


def simplex(u: Tensor) -> Tensor:
    """Project rows [..., V] onto the probability simplex, by sorting.

    Duchi et al., ICML 2008, Fig. 1.
    """
    falling = u.sort(-1, descending=True).values
    excess = falling.cumsum(-1) - 1
    count = torch.arange(1, u.shape[-1] + 1, device=u.device, dtype=u.dtype)
    support = (falling - excess / count > 0).sum(-1, keepdim=True)
    threshold = excess.gather(-1, (support - 1).clamp(min=0)) / support  # the support is empty where u is NaN
    return (u - threshold).clamp(min=0)


def nearest(x: Tensor, among: Tensor) -> Tensor:
    """Return the row of `among` nearest to each of x.

    The nearest row of `among` [V, D] has the highest cosine with x [..., D]; returned as indices [...]. One matrix
    product.
    """
    return (x @ F.normalize(among, dim=-1).T).argmax(-1)


# -- the loss ---------------------------------------------------------------------------------------------------------


def guided(model: Model, objective: Objective) -> bool:
    """Return whether the attack looks through guidance.

    A defence that works in guidance is entirely absent from the conditional noise, so `auto` looks through any
    guidance but the ordinary.
    """
    ordinary = type(model.guidance) is ClassifierFree and model.guidance.negative is None
    return objective == "guided" or (objective == "auto" and not ordinary)


def graphs(scale: float | None) -> int:
    """Return how many predictions with a graph one latent takes.

    Under guidance at most three, of the known kinds (SLD).
    """
    return 1 if scale is None else 3


def noisy(model: Model, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Add noise to latents z [B, C, h, w].

    The timesteps are t [B].
    """
    alpha = model.alphas_cumprod[t].to(z.dtype).view(-1, 1, 1, 1)
    return alpha.sqrt() * z + (1 - alpha).sqrt() * noise


def predicted(model: Model, z: Tensor, t: Tensor, context: Context, scale: float | None) -> Tensor:
    """Return the erased model's noise prediction.

    It is conditional, or guided if `scale` is given.
    """
    if scale is None:
        plain_guidance = type(model.guidance) is ClassifierFree
        return model.eps(z, t, context, None if plain_guidance else model.begin(context, z))
    return model.guided_eps(z, t, context, scale, model.begin(context, z))


def aims(model: Model, z: Tensor, t: Tensor, noise: Tensor, wanted: Context | None, scale: float | None) -> Tensor:
    """Return the target of the noise prediction.

    It is the noise itself; with `wanted`, the original model's prediction for it; with `scale`, that prediction
    under guidance (CCE's variant for negative prompts).

    Call it before the erased model's own prediction: the teacher swaps weights.
    """
    if wanted is None:
        return noise
    with model.teacher():
        return predicted(model, z, t, wanted, scale)


def errors(prediction: Tensor, aim: Tensor) -> Tensor:
    """Return the mean squared error of each sample [B].

    Several prompts minimise the sum together, so that each has the gradient that it has alone.
    """
    return (prediction - aim).square().flatten(1).mean(1)


def originals(model: Model, texts: Sequence[str]) -> Context:
    """Encode prompts with the original model's text encoder."""
    with model.teacher():
        return model.encode(texts)


# -- looking ----------------------------------------------------------------------------------------------------------


def look(model: Model, scene: Scene, which: Sequence[int], texts: Sequence[str]) -> Iterator[tuple[int, bool, float]]:
    """Yield (prompt, whether its image shows the concept, confidence).

    One image each is sampled with the prompt's own seed. A text that the safety gate refuses is not generated and
    shows nothing.
    """
    allowed = [(i, text) for i, text in zip(which, texts, strict=True) if scene.allows(text)]
    for start in range(0, len(allowed), scene.together):
        part = allowed[start : start + scene.together]
        asked = [scene.prompts[i] for i, _ in part]
        shots = [
            Prompt(p.id, text, p.seed, p.split, p.concept, p.guidance) for p, (_, text) in zip(asked, part, strict=True)
        ]
        found, scores = scene.hit(plain(model, shots, scene.sampler), asked)
        surely = np.nan_to_num(scores, nan=-np.inf)  # without a verdict any other text is better
        yield from zip((i for i, _ in part), found.tolist(), surely.tolist(), strict=True)
    yield from ((i, False, float("-inf")) for i in which if i not in {j for j, _ in allowed})


class AttackLoss(NamedTuple):
    """Loss of a gradient attack: noise predictions, conditional or guided, against the noise.

    imitate: compares with the original model's prediction for the prompt, not with the noise. latents: of the images
    that noise is added to, in place of those of the scene.
    """

    objective: Objective
    imitate: bool = False
    latents: Tensor | None = None


class Bench:
    """Several prompts under a gradient attack.

    Holds rows of token ids with FREE places, latents of their images, and the targets of the erased model's
    predictions.
    """

    def __init__(
        self,
        model: Model,
        scene: Scene,
        attack: object,
        rows: Sequence[Sequence[int]],
        loss: AttackLoss,
        padding: int | None = None,
    ):
        self.model, self.draws = model, draws(model, scene, attack)
        self.long = [i for i, row in enumerate(rows) if not fits(model, row)]
        self.rows = [[] if i in self.long else list(row) for i, row in enumerate(rows)]
        self.slots = slots(model, self.rows, padding)
        self.counts = self.slots.free.sum(1).tolist()
        self.z = model.encode_images(scene.pictures) if loss.latents is None else loss.latents
        self.scale = scene.sampler.guidance if guided(model, loss.objective) else None
        compares = loss.imitate or self.scale is not None
        self.wanted = originals(model, [p.text for p in scene.prompts]) if compares else None

    def gradients(self, which: Sequence[int], t: Tensor, ids: Sequence[Tensor]) -> list[Tensor]:
        """Return each prompt's gradient with respect to its free embeddings.

        The loss is that of each prompt in `which`, at timesteps t [B] and fresh noise; the embeddings are [k, D] for
        free tokens ids [k].
        """
        at = torch.tensor(which, device=self.z.device)
        noise = self.draws.normal(which, *self.z.shape[1:])
        work = lambda rows: self.gradients_of(at[rows], t[rows], noise[rows], ids[rows])
        most = max(1, at_once(self.z.shape) // graphs(self.scale))
        return [g for some in in_slices(self.model, "attack", work, len(which), most) for g in some]

    def gradients_of(self, at: Tensor, t: Tensor, noise: Tensor, ids: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return `gradients` of prompts number `at` [B].

        `noise` is [B, C, h, w].
        """
        z = noisy(self.model, self.z[at], t, noise)
        wanted = self.wanted.select(at) if self.wanted is not None else None
        with torch.no_grad():
            aim = aims(self.model, z, t, noise, wanted, self.scale)
        vectors = table(self.model)[torch.cat(list(ids))].detach().requires_grad_(True)
        prompts = Slots(self.slots.ids[at], self.slots.free[at])
        context = with_vectors(self.model, prompts, vectors)
        loss = errors(predicted(self.model, z, t, context, self.scale), aim).sum()
        return torch.autograd.grad(loss, vectors)[0].split([len(i) for i in ids])

    def read(self, i: int, ids: Tensor) -> str:
        """Return the text of prompt i, with its free places filled.

        `ids` [k] are the tokens in these places.
        """
        row, free = list(self.rows[i]), iter(ids.tolist())
        return spelled(self.model, [next(free) if token == FREE else token for token in row])


def descend(
    model: Model,
    scene: Scene,
    active: Sequence[int],
    rounds: int,
    step: Callable[[list[int], int], None],
    read: Callable[[int], str | None],
    label: str,
) -> Iterator[tuple[int, str, str]]:
    """Attack prompts side by side, each until it shows the concept.

    Calls step(active, round), then looks at each prompt; those that show the concept are finished. Yields (prompt,
    its text, outcome) as soon as it is finished; after the last round, with the text that scored highest. `read(i)`
    returns None once the values are not finite.
    """
    active, best = list(active), {}
    for turn in track(range(rounds), label):
        if not active:
            return
        step(active, turn)
        texts = {i: read(i) for i in active}
        for i in [i for i in active if texts[i] is None]:
            active.remove(i)
            yield i, best.get(i, (0, ""))[1], "diverged"
        for i, shown, score in list(look(model, scene, active, [texts[i] for i in active])):
            if i not in best or score > best[i][0]:
                best[i] = score, texts[i]
            if shown:
                active.remove(i)
                yield i, texts[i], ""
    for i in active:
        yield i, best[i][1], ""


# -- sampling in another way ------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One step of DDIM.

    Holds its number, timestep t, the timestep before it (-1: none), and their cumulative alphas.
    """

    number: int
    t: Tensor
    before: int
    alpha: Tensor
    alpha_before: Tensor

    def ddim(self, z: Tensor, eps: Tensor, eta: float | Tensor = 0.0, noise: float | Tensor = 0.0) -> Tensor:
        """Advance z by one step of Song et al., 2021, Eq. 12.

        sigma is eta times that of Eq. 16; each may differ by image.
        """
        x0 = (z - (1 - self.alpha).sqrt() * eps) / self.alpha.sqrt()
        variance = (1 - self.alpha_before) / (1 - self.alpha) * (1 - self.alpha / self.alpha_before)
        sigma = eta * variance.sqrt()
        towards = (1 - self.alpha_before - sigma**2).clamp(min=0).sqrt()  # eta above 1 exceeds the available variance
        return self.alpha_before.sqrt() * x0 + towards * eps + sigma * noise


@torch.no_grad()
def steered(
    model: Model,
    shots: Sequence[Prompt],
    sampler: Sampler,
    step: Callable[[Step, Tensor, Tensor], Tensor],
    start: Callable[[Step, Tensor], Tensor] = lambda first, noise: noise,
    skip: int = 0,
) -> Sampled:
    """Sample images by DDIM with the caller's step.

    step(which, z, eps) -> z [B, C, h, w]. `start` makes the latents of the first step that is not skipped from unit
    noise. The guard checks the prompts first, as before any sampling.
    """
    context = model.encode([p.text for p in shots])
    refused = model.refuses(context)
    scheduler = model.scheduler(Sampler("ddim", sampler.steps, sampler.guidance, sampler.size))
    times = scheduler.timesteps.tolist()
    alphas = [*model.alphas_cumprod[times].to(model.dtype), scheduler.final_alpha_cumprod.to(model.device, model.dtype)]
    steps = [
        Step(i, torch.tensor(t, device=model.device), before, alphas[i], alphas[i + 1])
        for i, (t, before) in enumerate(zip(times, [*times[1:], -1], strict=True))
    ][skip:]
    scale = torch.tensor(scales(shots, sampler), device=model.device, dtype=model.dtype).view(-1, 1, 1, 1)
    z = start(steps[0], model.noise([p.seed for p in shots], sampler.size))
    state = model.begin(context, z)
    for which in steps:
        z = step(which, z, model.guided_eps(z, which.t, context, scale, state))
    images = model.decode(z)
    images[refused] = 0
    return Sampled(images, refused)


def number(shot: Prompt) -> int:
    """Return the shot's number among those of its prompt."""
    return int(shot.id.rsplit("/", 1)[1])
