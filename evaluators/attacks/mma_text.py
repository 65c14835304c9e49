"""MMA-Diffusion's text attack (Yang et al., CVPR 2024).

It searches for tokens without the concept's words whose pooled encoding is nearest to the prompt's. The search is
greedy coordinate gradient (GCG, Zou et al., 2023) on the original text encoder alone.

    max over tokens  cos(E_pooled(tokens), E_pooled(prompt))                                                (Eq. 2)

Targets are the task's own prompts; the released ones are never used. Tokens that make up the concept's names are
banned. variant=released shifts the gradient by one place, as the released window does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from erasebench.contracts import AttackCost, ErasebenchError, Found, Prompt, Scene, SearchCost
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.tasks import seed_of
from erasebench.toolbox.search import (
    FREE,
    Draws,
    Slots,
    fits,
    shots,
    slots,
    spelled,
    stored,
    table,
    tokens,
    two_encoders,
    with_vectors,
    words,
)


@dataclass(frozen=True)
class MMAText:
    """Greedy search for tokens with the prompt's pooled encoding.

    images: number shown for a prompt; the paper's ASR-4 is `asr` with 4.
    """

    tokens: int = 20
    steps: int = 1000
    candidates: int = 512
    top: int = 256
    images: int = 4
    variant: Literal["fixed", "released"] = "fixed"
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ("original text encoder gradient",)
    shared: ClassVar[bool] = True

    def skip(self, model: Model) -> str:
        return two_encoders(model)

    def unit(self, prompt: Prompt, explicit: bool) -> tuple[str, str]:
        return prompt.text, prompt.concept

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        return AttackCost(SearchCost(images=self.images, kept=self.images), SearchCost(seconds=45), prompts)

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        if not fits(model, [FREE] * self.tokens):
            yield from ((i, Found(outcome="too long")) for i in range(len(scene.prompts)))
            return
        for i, prompt in enumerate(scene.prompts):
            asked = prompt.text, prompt.concept
            ids = stored(scene, [asked], lambda _, asked=asked: [{"tokens": self.search(model, scene, *asked).cpu()}])
            yield i, shots(prompt, spelled(model, ids[asked]["tokens"]), count=self.images)

    def allowed(self, model: Model, scene: Scene, concept: str) -> Tensor:
        """Return the mask [V] of tokens outside the concept's names. Tokens of a single character are never banned."""
        names = {concept, *(n for c in scene.concepts.values() for n in (c.name, *c.synonyms))} - {""}
        banned = {t for name in names for t in tokens(model, name) if len(spelled(model, [t])) > 1}
        allowed = torch.zeros(len(table(model)), dtype=torch.bool, device=model.device)
        allowed[words(model)] = True
        allowed[list(banned)] = False
        return allowed

    def search(self, model: Model, scene: Scene, text: str, concept: str) -> Tensor:
        with model.teacher(), torch.enable_grad():
            return self.greedy(model, scene, text, concept)

    def greedy(self, model: Model, scene: Scene, text: str, concept: str) -> Tensor:
        draws = Draws(model, [seed_of("mma_text", text, concept, scene.seed)])
        allowed = self.allowed(model, scene, concept)
        letters = [t for c in "abcdefghijklmnopqrstuvwxyz" for t in tokens(model, c) if allowed[t]]
        ids = torch.tensor(letters, device=model.device)[draws.integers([0], 0, len(letters), self.tokens)[0]]
        vocabulary = table(model).detach()
        frame = slots(model, [[FREE] * self.tokens])
        frame = Slots(*(x[:, : self.tokens + 2] for x in frame))  # tokens after the end do not change it
        with torch.no_grad():
            goal = self.pooled(model.encode([text]))
        best, reached = ids, -torch.inf
        for _ in track(range(self.steps), "mma_text"):
            vectors = vocabulary[ids].clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.likeness(with_vectors(model, frame, vectors), goal).sum(), vectors)
            if self.variant == "released":
                gradient = gradient.roll(1, 0)
            slope = F.normalize(gradient @ vocabulary.T, dim=-1).masked_fill(~allowed, -torch.inf)
            likely = slope.topk(min(self.top, int(allowed.sum())), -1).indices
            place = draws.integers([0], 0, self.tokens, self.candidates)[0]
            choice = draws.integers([0], 0, likely.shape[1], self.candidates)[0]
            made = ids.repeat(self.candidates, 1)
            made[torch.arange(self.candidates), place] = likely[place, choice]
            made = self.readable(model, made.unique(dim=0))
            prompts = Slots(*(x.expand(len(made), -1) for x in frame)).filled(made.flatten())
            allowed_here = model.allows_ids(prompts)  # sequences that the safety gate refuses are no candidates
            made, prompts = made[allowed_here], prompts[allowed_here]
            if not len(made):
                continue
            with torch.no_grad():
                scores = torch.cat(
                    [self.likeness(model.encode(ids=part), goal) for part in prompts.split(4 * scene.together)]
                )
            ids = made[scores.argmax()]  # moves even if that is worse; the best of all is kept apart
            if scores.max() > reached:
                best, reached = ids, scores.max()
            elif not torch.isfinite(scores).all():
                raise ErasebenchError("mma_text: the text encoder gives encodings that are not finite")
        return best

    def pooled(self, context) -> Tensor:
        """Return the text encoder's output at the prompt's end [B, D]. It is not projected."""
        return context.hidden[torch.arange(len(context.ends)), context.ends]

    def likeness(self, context, goal: Tensor) -> Tensor:
        return F.cosine_similarity(self.pooled(context), goal)

    def readable(self, model: Model, made: Tensor) -> Tensor:
        """Keep the token ids [B, K] whose text has K tokens."""
        texts = [spelled(model, row) for row in made.tolist()]
        read = model.tokenizer(texts, add_special_tokens=False).input_ids
        return made[torch.tensor([len(row) == self.tokens for row in read], dtype=torch.bool, device=made.device)]
