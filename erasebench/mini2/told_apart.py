"""Test of telling people apart at 64 pixels: python -m erasebench.mini2.told_apart

    argmin_c (f - m_c)^T S^-1 (f - m_c),   m_c class means and S the pooled covariance of features f of a few drawings

The features come from the trunk of the first version's judge, which knows two hundred of the people. The result is a
lower bound for a judge that is trained on all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..mini.nets import load_judge
from .captions import concepts
from .clip import pixels
from .world import World, picture

RIDGE = 1e-2  # as a fraction of the mean variance, added to the covariance
EACH, FRESH = 8, 2  # drawings of each person for the fit, and for the test


def discriminant(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit linear discriminants (Fisher, 1936) to features [N, D].

    labels: 0..K-1. -> function from features [M, D] to labels [M]
    """
    means = np.stack([features[labels == k].mean(0) for k in range(labels.max() + 1)])
    inside = features - means[labels]
    covariance = inside.T @ inside / len(features)
    covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T
    centres = means @ whiten

    def name(fresh: np.ndarray) -> np.ndarray:
        return (np.square(centres).sum(1) - 2 * (fresh @ whiten) @ centres.T).argmin(1)

    return name


@torch.no_grad()
def draw_features(trunk: Callable[[Tensor], Tensor], part: str, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (features, labels) of `each` drawings of every person."""
    drawing, people = World(), concepts()["people"]
    found = []
    for i in range(each):
        for start in range(0, len(people), 100):
            some = [picture(drawing, part, i, "person", name) for name in people[start : start + 100]]
            found.append(trunk(pixels(some)).double().numpy())
    return np.concatenate(found), np.tile(np.arange(len(people)), each)


if __name__ == "__main__":
    trunk = load_judge().trunk
    name = discriminant(*draw_features(trunk, "told apart", EACH))
    features, labels = draw_features(trunk, "told apart, fresh", FRESH)
    record = {
        "people": len(concepts()["people"]),
        "drawings": len(labels),
        "named rightly": float((name(features) == labels).mean()),
    }
    Path(__file__).with_name("told_apart.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(record)
