"""Closed-form edits of the cross-attention's K and V projections, each one matrix.

MACE's refinement (Eq. 3), UCE (Eq. 7), TIME (Eq. 5) and RECE minimise, for every projection W,

    sum_i s_i |W' c_i - W c*_i|^2  +  sum_j p_j |W' e_j - W e_j|^2  +  ridge |W' - W|^2

whose solution W' = W B A^-1, with A = sum s c c^T + P + ridge I and B = sum s c* c^T + P + ridge I, depends on the
layer through W alone. So an edit is M = B A^-1, one D x D matrix in fp64, and edits compose: W M1 M2.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..contracts import ErasebenchError
from ..model.model import Model
from ..model.source import weights_digest
from ..store.local import Store, digest

log = logging.getLogger("erasebench")
PROJECTIONS = r"^unet\..*attn2\.to_[kv]\.weight$"
WORST_CONDITION = 1e12  # beyond it an fp64 solution has fewer than four correct digits


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of a system: A = L L^T.

    Also holds the ridge that was used and the condition number of A.
    """

    lower: Tensor
    ridge: float
    condition: float

    def solve(self, right: Tensor) -> Tensor:
        """right [R, D] -> right A^-1."""
        return torch.cholesky_solve(right.T, self.lower).T

    def notes(self, asked: float) -> dict[str, float]:
        """Return notes for the row: condition number, and the ridge if raised."""
        raised = {"ridge_raised_to": self.ridge} if self.ridge != asked else {}
        return {"condition": float(f"{self.condition:.3g}"), **raised}


def factor(gram: Tensor, ridge: float) -> Factor:
    """Compute the Cholesky factor of gram + ridge I.

    gram is [D, D], symmetric, fp64; a ridge that is too small is raised.

    Raises ErasebenchError for a Gram matrix that is not finite, or zero without a ridge.
    """
    if not torch.isfinite(gram).all():
        raise ErasebenchError(
            "closed form: the Gram matrix is not finite; look for extreme scales or broken embeddings"
        )
    values = torch.linalg.eigvalsh(gram)
    high, low = values[-1].item(), max(values[0].item(), 0.0)  # negative values are rounding errors
    if high + ridge <= 0:
        raise ErasebenchError("closed form: nothing to solve, every scale and the ridge are zero")
    used = ridge
    if low + ridge < (high + ridge) / WORST_CONDITION:
        used = high / WORST_CONDITION
        log.warning("closed form: ill-conditioned, ridge raised from %g to %.3g", ridge, used)
    lower = torch.linalg.cholesky(gram + used * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return Factor(lower, used, (high + used) / (low + used))


class System:
    """Sums A and B of an edit, without their ridge.

    Embeddings are rows [R, D].
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.keys = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.values = self.keys.clone()

    def map(self, sources: Tensor, targets: Tensor, scale: float = 1.0) -> System:
        """Require each source to be projected as its target is now."""
        sources, targets = sources.double(), targets.double()
        self.keys += scale * sources.T @ sources
        self.values += scale * targets.T @ sources
        return self

    def keep(self, gram: Tensor, scale: float = 1.0) -> System:
        """Require embeddings to be projected as they are now.

        `gram` is their Gram matrix [D, D].
        """
        self.keys += scale * gram
        self.values += scale * gram
        return self

    def solve(self, ridge: float) -> tuple[Tensor, Factor]:
        """Return (M fp64 [D, D], the factorisation of A)."""
        made = factor(self.keys, ridge)
        return made.solve(
            self.values + made.ridge * torch.eye(len(self.keys), dtype=torch.float64, device=self.keys.device)
        ), made


def gram(rows: Tensor) -> Tensor:
    """Sum e e^T over rows [..., D] -> fp64 [D, D].

    Products of fp32 chunks are exact enough when summed in fp64.
    """
    flat = rows.reshape(-1, rows.shape[-1]).double()
    return flat.T @ flat


def prior(model: Model, texts: Sequence[str], batch: int = 256) -> Tensor:
    """Return the Gram matrix of all texts, fp64 [D, D].

    It sums over all positions of all texts. It is kept in the store: it is the same for every layer, concept and
    method (MACE's released code keeps 32 copies).
    """
    unique = list(dict.fromkeys(texts))

    def fill(folder: Path) -> None:
        total = torch.zeros(model.text_width, model.text_width, dtype=torch.float64, device=model.device)
        with torch.no_grad():
            for start in range(0, len(unique), batch):
                total += gram(model.encode(unique[start : start + batch]).hidden)
        save_file({"gram": total.cpu()}, folder / "gram.safetensors")

    entry = Store().get_or_make("grams", {"encoder": text_encoder_digest(model), "texts": unique, "version": 1}, fill)
    return load_file(entry / "gram.safetensors")["gram"].to(model.device)


def text_encoder_digest(model: Model) -> dict[str, str]:
    """Return the identity of embeddings: the encoders' weights and the vocabulary."""
    encoders = [encoder for encoder in (model.text_encoder, model.text_encoder_2) if encoder is not None]
    return {"weights": weights_digest(*encoders), "vocabulary": digest(model.tokenizer.get_vocab())}


# -- selection of rows of an encoded prompt ---------------------------------------------------------------------------


def filled(template: str, name: str) -> str:
    """Fill the template's slot with a name.

    Raises ErasebenchError for a template without a slot.
    """
    if "{c}" not in template:
        raise ErasebenchError(f"template {template!r} has no slot: write {{c}} where the concept goes")
    return template.replace("{c}", name)


def span(model: Model, template: str, name: str) -> tuple[int, int]:
    """Return positions [start, stop) of the name's tokens in the filled template.

    They are found by the words before the slot, so that a name inside another ("Bill" in "Bill Moss") is not
    mistaken for it. Raises ErasebenchError if the name is cut off, or merges with its neighbours into other tokens.
    """
    ids = model.tokenizer(filled(template, name)).input_ids
    own = model.tokenizer(name).input_ids[1:-1]
    start = len(model.tokenizer(template.split("{c}")[0].rstrip()).input_ids) - 1
    if ids[start : start + len(own)] != own:
        raise ErasebenchError(f"template {template!r}: {name!r} does not stand alone in it; put spaces around {{c}}")
    if len(ids) > model.context_length:
        raise ErasebenchError(
            f"template {template!r} with {name!r} exceeds the context of {model.context_length} tokens"
        )
    return start, start + len(own)


def encoded(model: Model, texts: Sequence[str]) -> dict[str, tuple[Tensor, int]]:
    """Return text -> (its rows [L, D], the position of its EOS).

    Every text is encoded once.
    """
    unique = list(dict.fromkeys(texts))
    with torch.no_grad():
        context = model.encode(unique)
    return dict(zip(unique, zip(context.hidden, context.ends.tolist(), strict=True), strict=True))


def aligned(
    model: Model, pairs: Sequence[tuple[str, str]], token_set: str, template: str = "{c}"
) -> tuple[Tensor, Tensor]:
    """Return rows [R, D] of the names and of their targets.

    They are aligned at their last tokens: that token alone (token_set=last), or it and all later tokens, as many
    rows as both texts of a pair have (last_to_end).
    """
    rows = encoded(model, [filled(template, text) for pair in pairs for text in pair])
    last = {text: max(span(model, template, text)[1] - 1, 0) for pair in pairs for text in pair}
    sources, targets = [], []
    for name, target in pairs:
        length = 1 if token_set == "last" else model.context_length - max(last[name], last[target])
        cut = lambda text, length=length: rows[filled(template, text)][0][last[text] : last[text] + length]
        sources.append(cut(name))
        targets.append(cut(target))
    return torch.cat(sources), torch.cat(targets)


def coexisting(
    model: Model, template: str, pairs: Sequence[tuple[str, str]], which: str = "context"
) -> tuple[Tensor, Tensor]:
    """Return rows [R, D] of the words around names and targets.

    Both stand in the same template, and the rows are aligned.

    which: `context` takes words alone, `all_but_concept` also BOS, EOS and as much padding as both have.
    """
    rows = encoded(model, [filled(template, text) for pair in pairs for text in pair])
    sources, targets = [], []
    for name, target in pairs:
        (source, end), (other, _) = rows[filled(template, name)], rows[filled(template, target)]
        (start, stop), (_, stop_other) = span(model, template, name), span(model, template, target)
        first = 1 if which == "context" else 0
        after = end - stop if which == "context" else len(source) - max(stop, stop_other)
        sources += [source[first:start], source[stop : stop + after]]
        targets += [other[first:start], other[stop_other : stop_other + after]]
    return torch.cat(sources), torch.cat(targets)


# -- edits as artifacts -----------------------------------------------------------------------------------------------


def save_edit(edit: Tensor, out: Path) -> None:
    save_file({"edit": edit.contiguous().cpu()}, out / "edit.safetensors")


def load_edit(model: Model, artifact: Path) -> Tensor:
    return load_file(artifact / "edit.safetensors")["edit"].to(model.device)


def edited(model: Model, edit: Tensor, which: str = "kv") -> AbstractContextManager[None]:
    """Replace the projections W of K and V by W M.

    `which` selects both or V alone. Returns the model's context manager.
    """
    names = model.names(PROJECTIONS.replace("kv", which))
    return model.changed(weights={name: model.weight(name).double() @ edit for name in names})


def write_notes(out: Path, notes: Mapping[str, float]) -> None:
    """Write a fit's notes for its rows.

    Examples: condition numbers, ridges raised, masks found empty.
    """
    (out / "notes.json").write_text(json.dumps(notes))
