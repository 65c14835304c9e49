"""SPEED (Li et al., ICLR 2026): a closed-form edit in the null space of the retain set.

    min over D   || (W + D) C1 - W C* ||^2 + lambda || D ||^2    with  D C0 = 0  and  D C2 = 0

for every V projection W. C1: last tokens of the concepts; C*: those of their surrogates. Both are divided by the root
of their number, so that products are means, as in the released code. C2, the invariants: the encoder's first output for
the empty prompt, and cluster centres of its other outputs. C0: the retained embeddings, refined for each W by

    prior filtering     only c0 whose  || D' c0 ||  is not below the mean,  D' = W (C* C1^T - C1 C1^T) (I + C1 C1^T)^-1
    prior augmentation  with  c0 + noise P,  P: on the r least right singular vectors of W;  filtered likewise

The eigenvectors of mean c0 c0^T with eigenvalues below `threshold` span its null space. B is an orthonormal basis of
the part of this space that is orthogonal to C2. The solution is  D = W (C* - C1) C1^T B (B^T C1 C1^T B + lambda I)^-1
B^T, the paper's with its Lagrange multipliers written out. It needs no inverse of C2^T P Q^-1 C2, which is singular if
the null space and C2 hardly meet. The released code adds a multiple of the identity there, `invariant_ridge`; this is
the penalty || D C2 ||^2 / invariant_ridge in place of D C2 = 0 (Woodbury), and B then spans the whole null space.

Departures from the released code: fp64 (there fp32) and its own seed. The retain set is the brief's names and the words
of a vocabulary, where the paper has lists of each kind. The augmented embeddings are filtered together, not in batches
with different means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from erasebench.methods.ap import named
from safetensors.torch import save_file
from torch import Tensor

from erasebench.contracts import Brief, ErasebenchError
from erasebench.model.model import Model
from erasebench.toolbox import vocabulary
from erasebench.toolbox.closed_form import PROJECTIONS, aligned, factor, gram, write_notes
from erasebench.toolbox.training import FILE, tuned


@dataclass(frozen=True)
class SPEED:
    """Closed-form edit in the null space of the retained embeddings.

    which: the projections. token_set: of the concepts, as in UCE. vocabulary: as in AP, or None for the names alone.
    ridge: lambda. invariant_ridge: 0 holds the invariants exactly. augmented: number of variations of a retained
    embedding, along `rank` directions. centres: number of clusters of the empty prompt's outputs.
    """

    which: Literal["v", "k", "kv"] = "v"
    token_set: Literal["last", "last_to_end"] = "last"
    vocabulary: str | tuple[str, ...] | None = "captions"
    threshold: float = 0.1  # eigenvalues of the retained embeddings below it count as zero
    ridge: float = 1.0
    invariant_ridge: float = 0.0  # 0 is exact; larger is weaker, as released for nudity
    filtered: bool = True  # retain only embeddings that the edit moves more than the mean
    augmented: int = 10
    rank: int = 1
    centres: int = 3
    version: ClassVar[int] = 1
    published_surrogates: ClassVar[Mapping[str, str]] = {"person": "person", "explicit": ""}

    def __post_init__(self) -> None:
        if self.invariant_ridge < 0:
            raise ErasebenchError(f"method.invariant_ridge={self.invariant_ridge:g}: at least 0 is needed")
        if self.centres < 1:
            raise ErasebenchError(f"method.centres={self.centres}: the empty prompt needs at least one")
        if self.vocabulary is not None:
            object.__setattr__(self, "vocabulary", named(self.vocabulary))

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pairs = [(concept.name, concept.surrogate) for concept in brief.concepts]
        sources, targets = (rows.double() for rows in aligned(model, pairs, self.token_set))
        energy = sources.T @ sources / len(pairs)
        change = (targets - sources).T @ sources / len(pairs)
        retained, invariants = last_tokens(model, self.retained(model, brief)), self.invariants(model)
        penalty = gram(invariants) / self.invariant_ridge if self.invariant_ridge else 0
        edited, room = {}, []
        for name in model.names(PROJECTIONS.replace("kv", self.which)):
            weight = model.weight(name).double()
            basis = self.null_space(self.refined(weight, energy, change, retained, generator), invariants)
            room.append(basis.shape[1])
            if room[-1]:
                within = factor(basis.T @ (energy + penalty) @ basis, self.ridge).solve(weight @ change @ basis)
                edited[name] = weight + within @ basis.T
        if not edited:
            raise ErasebenchError(f"method.threshold={self.threshold:g}: what is retained leaves no direction to edit")
        save_file({name: weight.float().contiguous().cpu() for name, weight in edited.items()}, out / FILE)
        write_notes(out, {"least_null_space": min(room), "most_null_space": max(room)})

    def retained(self, model: Model, brief: Brief) -> list[str]:
        """Return the preserved names and the words of the vocabulary.

        Without either (as released for nudity), only the invariants stay.
        """
        words = vocabulary.words(model, brief, self.vocabulary) if self.vocabulary is not None else []
        return list(dict.fromkeys([*brief.preserved, *words]))

    def refined(self, weight: Tensor, energy: Tensor, change: Tensor, retained: Tensor, generator) -> Tensor:
        """Filter and augment the retained embeddings [N, D] for one projection.

        Keeps the embeddings that the unconstrained edit moves most, and adds their augmentations: [*, D].
        """
        shift = factor(energy, 1.0).solve(weight @ change)
        if not len(retained):
            return retained
        moved = lambda rows: (rows @ shift.T).norm(dim=1)
        most = lambda rows: rows[moved(rows) >= moved(rows).mean()]
        kept = most(retained) if self.filtered else retained
        if not self.augmented:
            return kept
        directions = torch.linalg.svd(weight, full_matrices=False).Vh[-self.rank :]
        noise = torch.randn(self.augmented * len(kept), len(directions), generator=generator, dtype=torch.float64)
        return torch.cat([kept, most(kept.repeat(self.augmented, 1) + noise.to(kept.device) @ directions)])

    def null_space(self, kept: Tensor, invariants: Tensor) -> Tensor:
        """Return orthonormal directions [D, m] of the null space.

        The kept embeddings [N, D] hardly extend into them. The invariants [Q, D] are orthogonal to them, unless they
        are only penalised.
        """
        values, vectors = torch.linalg.eigh(gram(kept) / max(1, len(kept)))
        free = vectors[:, values.clamp(min=0) < self.threshold]  # rounding may give values below zero
        if self.invariant_ridge:
            return free
        across, sizes, _ = torch.linalg.svd(free.T @ invariants.T)
        return free @ across[:, int((sizes > 1e-9 * invariants.norm()).sum()) :]

    def invariants(self, model: Model) -> Tensor:
        """Return the invariants of the empty prompt: [1 + centres, D].

        The first output, and cluster means of the others.
        """
        with torch.no_grad():
            first, rest = model.unconditional().hidden[0].double().tensor_split([1])
        return torch.cat([first, means(rest, min(self.centres, len(rest)))])

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)


@torch.no_grad()
def last_tokens(model: Model, texts: Sequence[str], batch: int = 256) -> Tensor:
    """Return the encoding of each text's last token: fp64 [N, D]."""
    parts = (model.encode(texts[i : i + batch]) for i in range(0, len(texts), batch))
    none = torch.empty(0, model.text_width, dtype=torch.float64, device=model.device)
    return torch.cat([none, *(c.hidden[torch.arange(len(c.ids)), c.ends - 1].double() for c in parts)])


def means(rows: Tensor, count: int, rounds: int = 100) -> Tensor:
    """Cluster rows [N, D] by k-means: [count, D].

    Lloyd's algorithm, from evenly spaced rows.
    """
    centre = rows[((torch.arange(count) + 0.5) * len(rows) / count).long()]
    for _ in range(rounds):
        label = torch.cdist(rows, centre).argmin(1)
        of = [rows[label == i] for i in range(count)]
        moved = torch.stack([own.mean(0) if len(own) else old for own, old in zip(of, centre, strict=True)])
        if torch.equal(moved, centre):
            break
        centre = moved
    return centre
