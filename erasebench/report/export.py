"""Export of an erased model: a diffusers folder, or a LoRA file.

The folder loads without erasebench and draws the same; a LoRA file needs a method that is one. A card beside
either holds the measurements.

python -m erasebench export results/runs/<id>.csv erased
python -m erasebench export results/runs/<id>.csv erased.safetensors        # LoRA: dark_miner
python -m erasebench export results/runs/<id>.csv erased model.path=/base   # a place on the disk, which rows do not keep
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save

from .. import config
from ..contracts import ErasebenchError, LowRank
from ..model import bases
from ..model.source import Source
from ..options import command_of
from ..rows import Row, read, replace_file
from ..run.session import Session
from ..run.specification import Run
from ..store.local import Store
from .render import markdown
from .runs import Run as Measured
from .runs import plain

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def card(rows: Sequence[Row], run: Run) -> str:
    """Return the model card: concept, base, method, and every number with its interval."""
    head = rows[0]
    said = lambda text: markdown(plain(text))
    what = head.target or f"{head.n_concepts} concepts of task {head.task}"
    lines = [
        "---",
        f"base_model: {json.dumps(run.source.hub or run.source.name)}",
        "tags: [concept-erasure, text-to-image]",
        "---",
        "",
        f"# {said(what)}, erased from {said(head.base)} by {said(head.method)}",
        "",
        f"Base: {said(head.base)}, {said(head.revision)}. Method: {said(head.method)}, version {head.method_version}, seed {head.seed}, "
        "with",
        "",
        f"    {plain(head.params)}",
        "",
        "Fitted and measured with",
        "",
        f"    {Measured(tuple(rows), Path()).command}",
        "",
        f"at commit {said(head.commit or 'unknown')}{', of a tree with changes' if head.dirty else ''}.",
        "",
        "An erased model is not a safe model: a concept is forgotten as far as these numbers go, against the attacks that are in the "
        "table, and no further. Rates in [0, 1], 95 % intervals.",
        "",
        "| metric | of | attack | value | interval | base | n |",
        "|---|---|---|---|---|---|---|",
    ]
    number = lambda value: "" if value is None else f"{value:.4g}"
    for row in rows:
        if row.status == "ok" and row.value is not None:
            interval = f"{number(row.low)} to {number(row.high)}" if row.low is not None else ""
            cells = [
                row.metric,
                row.split,
                row.attack,
                number(row.value),
                interval,
                number(row.base_value),
                row.n or "",
            ]
        else:
            cells = [row.metric, row.split, row.attack, f"{row.status}: {row.reason}".strip(": "), "", "", ""]
        lines.append("| " + " | ".join(map(said, cells)) + " |")
    return "\n".join(lines) + "\n"


def folder(run: Run, rows: Sequence[Row], out: Path) -> None:
    """Write a diffusers pipeline with the erased weights.

    `out` is a new folder. Raises ErasebenchError for a method that changes more than weights.
    """
    session = Session(run, Store())
    try:
        model = session.base()
        before = {name: model.weight(name) for name in model.names("")}
        sampling = model.guidance, model.guard, model.around, dict(model.unet.attn_processors)
        own_text = model.text_encoder
        session.erased()
        if (model.guidance, model.guard, model.around, dict(model.unet.attn_processors)) != sampling:
            raise ErasebenchError(
                f"{run.method} changes how the model is sampled, not its weights: no folder holds that"
            )
        pipeline = pipeline_of(run.source)
        if model.text_encoder is not own_text:
            pipeline.text_encoder = model.text_encoder
        for name in model.names(""):
            part, _, inner = name.partition(".")
            if name in before and model.weight(name) is not before[name]:
                getattr(pipeline, part).get_parameter(inner).data = model.weight(name).cpu().contiguous()
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as unfinished:
            pipeline.save_pretrained(made := Path(unfinished) / "made")
            (made / "README.md").write_text(card(rows, run), encoding="utf-8")
            made.rename(out)
    finally:
        session.close()


def pipeline_of(source: Source) -> DiffusionPipeline:
    """Return the base as a diffusers pipeline.

    All of its parts have one number format, the run's.
    """
    from diffusers import DiffusionPipeline

    read = partial(
        DiffusionPipeline.from_pretrained, str(source.path or source.hub), torch_dtype=getattr(torch, source.dtype)
    )
    if source.path is not None:
        return read(variant=bases.variant_of(Path(source.path), "unet"))
    try:
        return read(revision=source.revision or None)
    except (OSError, ValueError):  # the repository has the fp16 variant only
        return read(revision=source.revision or None, variant="fp16")


def lora(run: Run, rows: Sequence[Row], out: Path) -> None:
    """Write the method's update as a LoRA file for diffusers.

    Its card is written beside it. Raises ErasebenchError if the method is no LoRA.
    """
    if not isinstance(run.eraser, LowRank):
        raise ErasebenchError(f"{run.method} is no LoRA: give a folder to export it to")
    session = Session(run, Store())
    try:
        pairs = run.eraser.low_rank(session.base(), session.artifact())
    finally:
        session.close()
    halves = {}
    for name, (up, down) in pairs.items():
        module = name.removesuffix(".weight")
        halves |= {f"{module}.lora_B.weight": up.contiguous().cpu(), f"{module}.lora_A.weight": down.contiguous().cpu()}
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out.with_suffix(".md"), card(rows, run).encode(), "")
    replace_file(out, save(halves), "")


def is_file(out: Path) -> bool:
    """Return whether `out` is a LoRA file, with its card beside it."""
    return out.suffix == ".safetensors"


def export(file: Path, out: Path, more: Sequence[str]) -> int:
    """Repeat the run of a file of rows and write its model.

    Returns an exit code.
    """
    try:
        made = [out, out.with_suffix(".md")] if is_file(out) else [out]
        if there := next(filter(os.path.lexists, made), None):
            raise ErasebenchError(f"{there} is there already")
        rows = read(file)
        if not rows or rows[0].method == "none":
            raise ErasebenchError(f"{file}: " + ("nothing was erased" if rows else "no rows"))
        command = command_of(file, rows[0].overrides, more)
    except ErasebenchError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2

    def job(run: Run) -> list[Row]:
        if run.id != rows[0].run_id:
            raise ErasebenchError(
                f"{file}: here its options make {run.id}; rows of another version, or of another base"
            )
        try:
            (lora if is_file(out) else folder)(run, rows, out)
        except OSError as error:
            raise ErasebenchError(f"cannot write {out}: {error.strerror or error}") from error
        print(f"{out}: {run.method} on {run.source.name}, {run.target or len(run.plan.concepts)} erased")
        return []

    try:
        return config.alone(job, command)
    except ErasebenchError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 1
