"""Ring-A-Bell (Tsai et al., ICLR 2024).

It searches for tokens whose encoding is nearest to the prompt's plus the concept, by a genetic search on the original
text encoder alone. One set of prompts serves every model.

    c = mean over pairs of  E(with the concept) - E(without)                                                (Eq. 4)
    min over tokens  || E(tokens) - (E(prompt) + eta c) ||^2                                                (Eq. 6)

Departs from the released code: populations of all prompts are one tensor, of constant size; no sequence is encoded
twice; children are cut between two of the free tokens, never at an end; with `elitism` the best is never mutated
(there, mutation in place loses it).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erasebench.contracts import AttackCost, ErasebenchError, Found, Prompt, Scene, SearchCost
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.tasks import seed_of
from erasebench.toolbox.search import FREE, Draws, Slots, fits, shots, slots, spelled, stored, two_encoders, words


@dataclass(frozen=True)
class RAB:
    """Genetic search for prompts on the original text encoder.

    patience: generations without a better one before the search ends; None goes through all.
    """

    tokens: int = 16  # 38 or 75 for violence
    eta: float = 3.0
    population: int = 200
    generations: int = 3000
    crossover: float = 0.5
    mutation: float = 0.25
    elitism: bool = True  # False: as released
    patience: int | None = 300
    images: ClassVar[int] = 1
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ("original text encoder",)
    shared: ClassVar[bool] = True

    def skip(self, model: Model) -> str:
        return two_encoders(model)

    def unit(self, prompt: Prompt, explicit: bool) -> tuple[str, str]:
        return prompt.text, prompt.concept

    @torch.no_grad()
    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        # the text encoder alone, 8 PFLOP
        return AttackCost(SearchCost(images=1, kept=1), SearchCost(seconds=60), prompts)

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        asked = list(dict.fromkeys((p.text, p.concept) for p in scene.prompts))
        if not fits(model, [FREE] * self.tokens):
            yield from ((i, Found(outcome="too long")) for i in range(len(scene.prompts)))
            return
        found = stored(scene, asked, lambda missing: self.search(model, scene, missing))
        for i, prompt in enumerate(scene.prompts):
            yield i, shots(prompt, spelled(model, found[prompt.text, prompt.concept]["tokens"]))

    def concept(self, model: Model, scene: Scene, name: str) -> Tensor:
        """Return the concept vector c [L, D] (Eq. 4).

        It compares the training templates with the concept's name and with its surrogate.
        """
        concept = scene.concepts.get(name) or next(iter(scene.concepts.values()))
        said = lambda word: model.encode([t.replace("{c}", word) for t in scene.templates]).hidden
        return (said(name or concept.name) - said(concept.surrogate)).mean(0)

    def search(self, model: Model, scene: Scene, asked: list[tuple[str, str]]) -> list[dict[str, Tensor]]:
        """Search for the best tokens for each (text, concept)."""
        with model.teacher():
            return [{"tokens": ids.cpu()} for ids in self.evolve(model, scene, asked)]

    def evolve(self, model: Model, scene: Scene, asked: list[tuple[str, str]]) -> Tensor:
        """Return the best token ids [T, K]. The populations of all T texts evolve side by side."""
        draws = Draws(model, [seed_of("rab", *pair, scene.seed) for pair in asked])
        every, known = list(range(len(asked))), words(model)
        vectors = {name: self.concept(model, scene, name) for _, name in asked}
        goal = model.encode([text for text, _ in asked]).hidden + self.eta * torch.stack([vectors[n] for _, n in asked])
        people = known[draws.integers(every, 0, len(known), self.population, self.tokens)]
        error = torch.full(people.shape[:2], torch.nan, dtype=goal.dtype, device=goal.device)
        parents = self.population // 2
        since = torch.zeros(len(asked), dtype=torch.long, device=goal.device)  # generations without a better one
        best = torch.full((len(asked),), torch.inf, dtype=goal.dtype, device=goal.device)
        winners = people[:, 0].clone()
        for _ in track(range(self.generations), "rab"):
            error = self.known(error, people, lambda ids, of: self.errors(model, ids, goal, of, scene.together))
            order = error.argsort(1)
            people = people.gather(1, order[..., None].expand_as(people))
            error = error.gather(1, order)
            ended = since >= (self.patience or self.generations)
            better = (error[:, 0] < best) & ~ended
            best, winners = torch.where(better, error[:, 0], best), torch.where(better[:, None], people[:, 0], winners)
            since = torch.where(better, 0, since + 1)
            if ended.all():
                break
            people, error = self.next(people, error, parents, draws, every, known)
        if not torch.isfinite(best).all():
            raise ErasebenchError("rab: the text encoder gives no finite encoding of any sequence")
        return winners

    def known(self, error: Tensor, people: Tensor, errors: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the errors [T, P] of all people [T, P, K].

        NaN errors are computed, each sequence of tokens once, since a converging population is full of duplicates.
        """
        text = torch.arange(len(people), device=people.device)[:, None, None].expand(-1, people.shape[1], 1)
        unique, which = torch.cat([text, people], 2).flatten(0, 1).unique(dim=0, return_inverse=True)
        found = torch.full((len(unique),), torch.nan, dtype=error.dtype, device=error.device)
        old = ~error.flatten().isnan()
        found[which[old]] = error.flatten()[old]
        new = found.isnan()
        if new.any():
            found[new] = errors(unique[new, 1:], unique[new, 0])
        return found[which].view_as(error)

    def next(self, people: Tensor, error: Tensor, parents: int, draws: Draws, every: list[int], known: Tensor):
        """Return the next generation [T, P, K] and its known errors.

        The given one must be sorted by error. NaN is an unknown error.
        """
        room = self.population - parents
        pairs = round(parents * self.crossover)
        mother = draws.uniform(every, parents).argsort(1)[:, :pairs]
        father = draws.integers(every, 0, parents, pairs)
        cut = draws.integers(every, 1, self.tokens, pairs) if self.tokens > 1 else torch.zeros_like(father)
        take = lambda who: people.gather(1, who[..., None].expand(-1, -1, self.tokens))
        left = torch.arange(self.tokens, device=people.device) < cut[..., None]
        a, b = take(mother), take(father)
        children = torch.cat([torch.where(left, a, b), torch.where(left, b, a)], 1)[:, :room]
        kept = self.population - children.shape[1]  # parents fill the places that children leave
        people = torch.cat([people[:, :kept], children], 1)
        error = torch.cat([error[:, :kept], torch.full_like(error[:, kept:], torch.nan)], 1)
        mutated = draws.uniform(every, self.population) < self.mutation
        if self.elitism:
            mutated[:, 0] = False
        place = draws.integers(every, 0, self.tokens, self.population)
        other = known[draws.integers(every, 0, len(known), self.population)]
        at = (torch.arange(self.tokens, device=people.device) == place[..., None]) & mutated[..., None]
        return torch.where(at, other[..., None], people), error.masked_fill(mutated, torch.nan)

    def errors(self, model: Model, people: Tensor, goal: Tensor, of: Tensor, together: int) -> Tensor:
        """Return the squared distance [B] of token ids [B, K] to goals.

        `of` [B] selects the goals; the distance is infinite if the safety gate refuses the tokens.
        """
        frame = slots(model, [[FREE] * self.tokens])
        prompts = Slots(frame.ids.expand(len(people), -1), frame.free.expand(len(people), -1)).filled(people.flatten())
        made = torch.full((len(people),), torch.inf, dtype=goal.dtype, device=goal.device)
        for at in model.allows_ids(prompts).nonzero().flatten().split(4 * together):
            made[at] = (model.encode(ids=prompts[at]).hidden - goal[of[at]]).square().sum((1, 2))
        return made
