"""Models of a run: the base, the erased model and the unlocked one."""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .. import provenance, rates
from ..contracts import WORD, Attack, ErasebenchError, Eraser, Skips, Unlocks
from ..executors.local import Work
from ..model.finite import is_finite
from ..model.model import Model
from ..store.local import Store
from . import judging
from .specification import Run, word_identity

log = logging.getLogger("erasebench")


class Unfit(Exception):
    """Method that cannot erase from this model; the message gives the reason.

    It makes a skipped row, not a failure."""


class Session:
    """Models of a run, loaded, fitted and changed only on demand.

    `erased` changes the model that `base` returns, so `base` must come first. A run whose images are all in the store
    never loads a model.
    """

    def __init__(self, run: Run, store: Store):
        self.run, self.store, self.stack = run, store, ExitStack()
        self.token = secrets.token_hex(8)  # tells remote workers whether they still hold this session
        self._model: Model | None = None
        self._entered = self._unlocked = False
        self._lock = threading.RLock()  # shards are made concurrently; the first that needs the model loads it
        self.turn = None if run.device == "cpu" else threading.Lock()  # a GPU samples one shard at a time
        self.judging = threading.Lock()
        self.forecast: rates.Forecast | None = None  # of the images in progress
        self.outdated: set[tuple[str, str]] = set()  # ("method", "judge" or "attack", name): changed source
        self._sources: dict[tuple[str, str], dict[str, str]] = {}

    def load(self) -> Model:
        with self._lock:
            if self._model is None:
                start = time.perf_counter()
                model = Model.load(self.run.source, self.run.device, self.run.plan.explicit)
                model.check_sampler(self.run.sampler)  # before a fit that takes hours
                log.info("loaded %s in %.1f s", self.run.source.name, time.perf_counter() - start)
                for concept in self.run.plan.concepts:
                    check_concept(model, concept.name)
                    if concept.surrogate == concept.name:
                        raise ErasebenchError(f"concept {concept.name!r} is its own surrogate: nothing would be erased")
                self._model = model
        return self._model

    def base(self) -> Model:
        assert not self._entered
        return self.load()

    def check_fit(self) -> None:
        """Raise Unfit before any image is made.

        A method with a stored artifact is not asked, so that a repeated run loads no model."""
        if not isinstance(self.run.eraser, Skips) or self.fitted():
            return
        (reason,) = self.map(lambda here, _, beside: reason_to_skip(here.run.eraser, here.base()), [None], "check")
        if reason:
            raise Unfit(reason)

    def fitted(self) -> Path | None:
        """Return the artifact, or None if the method has not been fitted."""
        path = self.store.get("artifacts", self.run.fit_identity())
        if path is not None:
            self.compare("method", self.run.method, self.run.eraser, path)
        return path

    def compare(self, kind: str, name: str, plugin: Any, entry: Path) -> None:
        """Warn once if a plugin's source changed without a new version.

        It is compared with the source that made an entry. The rows note the change, too."""
        which = kind, name
        if which in self.outdated:
            return
        if which not in self._sources:  # hashed once a session, since files rarely change
            self._sources[which] = provenance.sources(plugin)
        if changed := provenance.changed_sources(entry, self._sources[which]):
            self.outdated.add(which)
            log.warning(
                "%s %s: its source changed since %s, at the same version %s: raise `version`, or gc (changed: %s)",
                kind,
                name,
                {"method": "this artifact was fitted", "judge": "it gave a score", "attack": "its search"}[kind],
                type(plugin).version,
                ", ".join(changed[:3]) + ", ..." * (len(changed) > 3),
            )

    def fit(self) -> None:
        """Fit the method through the run's executor, unless it is fitted."""
        if self.fitted() is None:
            self.map(lambda here, _, beside: here.artifact() and None, [None], "fit", alone=True)

    def artifact(self) -> Path:
        """Get or make the method's artifact.

        Its `cost.json` holds seconds, unet_samples and peak_memory_mb."""

        def fit(folder: Path) -> None:
            model, made_by = self.base(), provenance.sources(self.run.eraser)
            provenance.reset_peak_memory(self.run.device)
            start, before = time.perf_counter(), model.unet_samples
            with self.named(model), judging.on(self.run.judges):
                self.run.eraser.fit(model, self.run.plan.brief, folder, self.run.seed)
            if model.is_changed:
                raise ErasebenchError(f"method {self.run.method} left the model changed after fit")
            check_artifact(folder)
            if problem := not_finite_in(folder):
                raise ErasebenchError(f"method {self.run.method}: what it learnt is not finite ({problem})")
            cost = {
                "seconds": time.perf_counter() - start,
                "unet_samples": model.unet_samples - before,
                "peak_memory_mb": provenance.peak_memory_mb(self.run.device),
            }
            (folder / "cost.json").write_text(json.dumps(cost))
            provenance.write_sources(folder, made_by)

        return self.store.get_or_make("artifacts", self.run.fit_identity(), fit)

    def named(self, model: Model) -> AbstractContextManager[None]:
        """Teach the model the concept's name in the brief, inside the `with`.

        The name is a word learnt from images; without reference images, it is an ordinary name and nothing changes."""
        if (pictured := self.run.pictured) is None:
            return nullcontext()
        learn = lambda: pictured.learn(model, self.run.plan.brief.templates, self.run.seed)
        fill = lambda folder: save_file({"vector": learn().cpu()}, folder / "vector.safetensors")
        entry = Store().get_or_make("words", word_identity(self.run), fill)
        return model.word(WORD, load_file(entry / "vector.safetensors")["vector"])

    def erased(self) -> Model:
        with self._lock:
            if not self._entered:
                artifact, model = self.artifact(), self.load()
                self.stack.enter_context(self.named(model))  # some methods name the concept at inference
                self.stack.enter_context(self.run.eraser.apply(model, artifact))
                self._entered = True
        return self.load()

    def unlocked(self) -> Model:
        """Return the erased model with the concept given back (KPOP).

        It stays so until the session is closed."""
        with self._lock:
            if not self._unlocked:
                model, eraser = self.erased(), self.run.eraser
                assert isinstance(eraser, Unlocks)
                self.stack.enter_context(eraser.unlock(model, self.artifact()))
                self._unlocked = True
        return self.load()

    def close(self) -> None:
        self.stack.close()
        self._entered = self._unlocked = False

    def map(self, work: Work, items: Sequence, label: str, alone: bool = False) -> list:
        """Return work(session, item, beside) for every item, through the run's executor."""
        return self.run.executor.map(self, work, items, label, alone)


def reason_to_skip(plugin: Eraser | Attack, model: Model) -> str:
    """Return why a plugin does not fit, or an empty string."""
    return plugin.skip(model) if isinstance(plugin, Skips) else ""


def check_concept(model: Model, name: str) -> None:
    """Raise ErasebenchError if a concept's name is empty or too long.

    It must have at least one token and fit into the context."""
    ids = model.tokenizer(name).input_ids
    if len(ids) <= 2:
        raise ErasebenchError(f"concept {name!r} tokenises to nothing: name something that the text encoder can read")
    if len(ids) > model.context_length:
        raise ErasebenchError(
            f"concept {name[:40]!r}... takes {len(ids) - 2} tokens, the context holds {model.context_length - 2}"
        )


def check_artifact(folder: Path) -> None:
    odd = [f.name for f in folder.rglob("*") if f.is_file() and f.suffix not in (".safetensors", ".json")]
    if odd:
        raise ErasebenchError(f"a method may write safetensors and JSON only, it wrote {', '.join(odd)}")


def not_finite_in(folder: Path) -> str:
    """Name an artifact's first tensor with NaN or infinity, if any."""
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if not is_finite(tensors.get_tensor(name)):
                    return f"{name} in {file.name}"
    return ""
