"""Stable Diffusion pipeline with declared openings, for samplers, methods and attacks alike.

Openings, all through `changed`: weights, attention processors, `guidance`, `guard`, `text_encoder`, `around`. Changes
made through them are undone exactly on exit, and `teacher` gives access to the base without a second network.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from ..contracts import ErasebenchError, Sampler
from ..gate import Refused, refuses, refuses_decoded
from . import bases, reuse, schedulers
from .context import Context
from .devices import check_device, use_exact_arithmetic
from .finite import NotFinite, is_finite
from .guidance import Around, ClassifierFree, Guard, Guidance, nothing_around
from .memory import at_once, in_slices
from .openings import Slot, attribute_change, processor_change, weight_changes
from .reuse import ContextLinear
from .source import Components, Source, quiet

LARGEST = 8  # upper limit of `sampler.size`, as a multiple of the base's own side
COMPILER = {"mode": "reduce-overhead"}  # options of torch.compile: with CUDA graphs
# Code that does not compile runs uncompiled; hooks that a method adds later are honoured. torch keeps these per thread.
DYNAMO = {"suppress_errors": True, "skip_nnmodule_hook_guards": False}


class _Precision(threading.local):
    """Flag of the thread: whether it is inside `Model.fast`."""

    fast: bool = False


class _Counted(threading.local):
    """Count of the thread's U-Net evaluations."""

    samples: int = 0


_precision = _Precision()


class Sampled(NamedTuple):
    images: Tensor  # uint8 [B, H, W, 3] on the CPU
    refused: Tensor  # bool [B]; a refused image is black


class Model:
    """Loaded base model; build it with `Model.load`.

    All weights are frozen and in eval mode. The model of an `explicit` task has the safety gate before its text
    encoders and its sampler, from the beginning and for good."""

    def __init__(self, components: Components, device: str = "cpu", explicit: bool = False):
        self.device = torch.device(device)
        self._explicit = explicit
        self._admitted: set[tuple[int, ...]] = set()  # token ids of texts that the gate has admitted
        self._gated: WeakSet[torch.nn.Module] = WeakSet()
        frozen = lambda part: part.to(self.device).eval().requires_grad_(False)
        second = components.text_encoder_2
        self.text_encoder_2 = None if second is None else self._behind_gate(frozen(second))
        self._second_padding, self._zeros = components.second_padding, components.zeros
        self.unet, self.vae = frozen(components.unet), frozen(components.vae)
        self.text_encoder = frozen(components.text_encoder)
        self.unet.to(memory_format=torch.channels_last)  # makes convolutions faster
        from diffusers.models.attention_processor import Attention

        for attention in self.unet.modules():
            if isinstance(attention, Attention) and attention.is_cross_attention:
                attention.to_k.__class__ = attention.to_v.__class__ = ContextLinear
        self.tokenizer = components.tokenizer
        self.scheduler_config = dict(components.scheduler_config)
        self.guidance: Guidance = ClassifierFree()
        self.guard: Guard | None = None
        self.around: Around = nothing_around
        self._counted = _Counted()
        self._slots: list[Slot] = []
        self._compiled: Callable | None = None
        schedule = quiet("diffusers").DDIMScheduler.from_config(self.scheduler_config)
        self.alphas_cumprod = schedule.alphas_cumprod.to(self.device)
        self._prediction = schedule.config.prediction_type
        bases.check_scheduler(self.scheduler_config)
        self._side = bases.side_of(self.unet.config, second is not None)
        mean, deviation = self.vae.config.get("latents_mean"), self.vae.config.get("latents_std")
        column = lambda values: torch.tensor(values, device=self.device, dtype=self.dtype).view(-1, 1, 1)
        # of unscaled latents, if the configuration gives them (SDXL)
        self._normal = None if mean is None or deviation is None else (column(mean), column(deviation))

    @classmethod
    def load(cls, source: Source, device: str = "cpu", explicit: bool = False) -> Model:
        """Load every part strictly; `explicit`: for a task that erases explicit content.

        Raises ErasebenchError for a missing, truncated or non-finite model, for one that does not draw from text alone,
        and for a missing device."""
        check_device(device)
        use_exact_arithmetic()
        return cls(Components.load(source), device, explicit)

    @property
    def unet_samples(self) -> int:
        """U-Net evaluations of the calling thread so far, counted in single latents."""
        return self._counted.samples

    # -- the safety gate ------------------------------------------------------------------------------------------

    @property
    def explicit(self) -> bool:
        """Whether the safety gate guards the model; fixed at loading."""
        return self._explicit

    @property
    def text_encoder(self) -> torch.nn.Module:
        return self._text_encoder

    @text_encoder.setter
    def text_encoder(self, encoder: torch.nn.Module) -> None:
        self._text_encoder = self._behind_gate(encoder)

    def _behind_gate(self, encoder: torch.nn.Module) -> torch.nn.Module:
        """Put the safety gate before a text encoder -> the same encoder.

        From now on, it raises Refused for token ids whose text the gate refuses."""
        if self.explicit and encoder not in self._gated:
            self._gated.add(encoder)
            # a closure, since a deep copy of an encoder hooked to a bound method would copy the whole model
            check = lambda module, args, inputs: self._admit(inputs["input_ids"] if "input_ids" in inputs else args[0])
            encoder.register_forward_pre_hook(check, with_kwargs=True)
        return encoder

    def allows(self, text: str) -> bool:
        """Return whether the gate admits a text; always, unless the task is explicit."""
        return not (self.explicit and refuses(text))

    def allows_ids(self, ids: Tensor) -> Tensor:
        """Return whether the gate admits each text: token ids [B, L] -> bool [B]."""
        allowed = [self._allows_row(row) for row in ids.tolist()] if self.explicit else [True] * len(ids)
        return torch.tensor(allowed, dtype=torch.bool, device=ids.device)

    def _allows_row(self, row: Sequence[int]) -> bool:
        """Return whether the gate admits the text of one token row.

        Token 0 marks slots of inserted vectors (search.slots). It may or may not separate words, so the text is refused
        only if the gate refuses it both with and without these tokens."""
        said = self._words(row)
        if not said or said in self._admitted:
            return True
        read = lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True)
        return not (refuses_decoded(read(list(said))) and refuses_decoded(read(list(row))))

    def _words(self, ids: Sequence[int]) -> tuple[int, ...]:
        passed = {0, *self.tokenizer.all_special_ids}
        return tuple(i for i in ids if i not in passed)

    def _admit(self, ids: Tensor) -> None:
        if not bool(self.allows_ids(ids).all()):
            raise Refused("the safety gate refuses a text of this explicit task (docs/safety.md)")

    def _admit_texts(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
        """Admit the token ids of texts; raise Refused unless all pass.

        Decoded ids may read differently from their text: truncated, or with separated digits."""
        if self.explicit:
            if not all(map(self.allows, texts)):
                raise Refused("the safety gate refuses a text of this explicit task (docs/safety.md)")
            self._admitted.update(map(self._words, ids))

    # -- shapes ---------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def context_length(self) -> int:
        """Length of padded prompts, as in diffusers.

        It is the tokenizer's maximum, limited to the text encoder's positions."""
        return min(self.text_encoder.config.max_position_embeddings, self.tokenizer.model_max_length)

    @property
    def text_width(self) -> int:
        """Width of the embeddings that the cross-attention reads."""
        width = self.unet.config.cross_attention_dim
        return width if isinstance(width, int) else width[0]  # one entry a block, checked to be equal

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """Return the shape of latents: of images of `size` pixels a side, or of the base's own size.

        Raises ErasebenchError for an unsupported size, and if the base names none."""
        if size is not None:
            largest = LARGEST * self.pixels_per_latent * (self._side or 64)
            if size < 1 or size % self.pixels_per_latent or size > largest:
                raise ErasebenchError(
                    f"sampler.size={size}: a multiple of {self.pixels_per_latent} of at most {largest} is needed"
                )
            side = size // self.pixels_per_latent
        elif self._side is None:
            raise ErasebenchError("the base's configuration names no sample_size: give sampler.size=")
        else:
            side = self._side
        return self.unet.config.in_channels, side, side

    # -- openings -------------------------------------------------------------------------------------------------

    def names(self, pattern: str) -> list[str]:
        """Return the names of the parameters that match a regular expression.

        They have the form "unet.<name>" or "text_encoder.<name>"."""
        return [name for name in self._parameters() if re.search(pattern, name)]

    def weight(self, name: str) -> Tensor:
        """Return the current value of a parameter; do not write to it."""
        return self._parameters()[name].data

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{part}.{name}": parameter
            for part in ("unet", "text_encoder")
            for name, parameter in getattr(self, part).named_parameters()
        }

    @contextmanager
    def changed(
        self,
        weights: Mapping[str, Tensor] | None = None,
        processors: Mapping[str, Any] | None = None,
        **openings: Any,
    ) -> Iterator[None]:
        """Change the model inside the `with`, and restore it bit-equal after.

        weights     name -> tensor that replaces the parameter (the base's own storage is never written)
        processors  U-Net attention processors by diffusers' names; all others stay
        openings    guidance, guard, text_encoder, around
        Raises ErasebenchError for a name that does not exist, for a shape or number format that does not fit, and for
        numbers that are not finite or that the model's format cannot hold.
        """
        if unknown := set(openings) - {"guidance", "guard", "text_encoder", "around"}:
            raise ErasebenchError(f"the model has no opening called {sorted(unknown)[0]}")
        changes = list(weight_changes(self._parameters(), weights)) if weights else []
        if processors:
            changes.append(processor_change(self.unet, processors))
        changes += [attribute_change(self, name, value) for name, value in openings.items()]
        entered = []
        try:
            for slot, value in changes:
                slot.set(value)
                entered.append(slot)
                self._slots.append(slot)
            yield
        finally:
            for slot in reversed(entered):
                self._slots.remove(slot)
                slot.set(slot.before)

    @contextmanager
    def training(self, names: Sequence[str]) -> Iterator[dict[str, torch.nn.Parameter]]:
        """Replace the named weights by trainable copies inside the `with`.

        The copies are gone afterwards, so save them inside. Raises ErasebenchError without names."""
        if not names:
            raise ErasebenchError("no weight to train: the pattern matched nothing in this model")
        parameters = {name: parameter for name, parameter in self._parameters().items() if name in set(names)}
        with self.changed(weights={name: parameter.data.clone() for name, parameter in parameters.items()}):
            try:
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
                yield parameters
            finally:
                for parameter in parameters.values():
                    parameter.requires_grad_(False)
                    parameter.grad = None

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Use gradient checkpointing (Chen et al., 2016) inside the `with`.

        A backward pass recomputes the activations of the U-Net's blocks. The gradients are the same; the pass must run
        inside every change that the prediction ran in."""
        self.unet.enable_gradient_checkpointing()
        try:
            yield
        finally:
            self.unet.disable_gradient_checkpointing()

    @contextmanager
    def without_checkpointing(self) -> Iterator[None]:
        """Suspend gradient checkpointing inside the `with`.

        It is for a backward pass that runs outside a change that its prediction runs in."""
        if not self.unet.is_gradient_checkpointing:
            yield
            return
        self.unet.disable_gradient_checkpointing()
        try:
            yield
        finally:
            self.unet.enable_gradient_checkpointing()

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Restore the base model inside the `with`, without a copy.

        It works inside any changes. Use the teacher before the student's forward pass: autograd must not see swapped
        weights.
        """
        current = [slot.get() for slot in self._slots]
        changes, self._slots = self._slots, []
        for slot in reversed(changes):
            slot.set(slot.before)
        try:
            with torch.no_grad():
                yield
        finally:
            for slot, value in zip(changes, current, strict=True):
                slot.set(value)
            self._slots = changes

    @contextmanager
    def word(self, text: str, vector: Tensor) -> Iterator[None]:
        """Add a lower-case word with an embedding [1, D] inside the `with`.

        Tokenizer and text encoder know it. Raises Refused if the safety gate refuses the word, NotFinite for its
        embedding, and ErasebenchError if the tokenizer already knows the word."""
        if not self.allows(text):
            raise Refused("the safety gate refuses a word of this explicit task (docs/safety.md)")
        tokenizer, table = self.tokenizer, self.text_encoder.get_input_embeddings()
        weight = table.weight
        if not is_finite(vector):
            raise NotFinite(f"the embedding of the word {text!r} is not finite")
        grown = torch.nn.Embedding.from_pretrained(torch.cat([weight.data, vector.to(weight)]))
        self.tokenizer = copy.deepcopy(tokenizer)
        if self.tokenizer.add_tokens([text]) != 1:
            self.tokenizer = tokenizer
            raise ErasebenchError(f"the tokenizer knows a word {text!r} already")
        admitted, self._admitted = self._admitted, set(self._admitted)  # the next word may have the same id
        try:
            self.text_encoder.set_input_embeddings(grown)
            yield
        finally:
            self.text_encoder.set_input_embeddings(table)
            self.tokenizer, self._admitted = tokenizer, admitted

    @property
    def is_changed(self) -> bool:
        return bool(self._slots)

    @property
    def differs(self) -> bool:
        """Whether any changed part differs from its value before the change."""
        same = lambda a, b: torch.equal(a, b) if isinstance(a, Tensor) else a is b or (isinstance(a, dict) and a == b)
        return not all(same(slot.get(), slot.before) for slot in self._slots)

    # -- primitives -----------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokenize texts -> ids [B, L], of the context length.

        They are padded and truncated."""
        ids = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        ).input_ids
        self._admit_texts(texts, ids.tolist())
        return ids.to(self.device)

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, without start, end and padding."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        self._admit_texts([text], [ids])
        return ids

    def encode_distinct(self, texts: Sequence[str]) -> Context:
        """Encode prompts, but repeated ones only once."""
        distinct = list(dict.fromkeys(texts))
        return self.encode(distinct).select(torch.tensor([distinct.index(text) for text in texts]))

    def encode(
        self, text: Sequence[str] | None = None, *, ids: Tensor | None = None, token_embeds: Tensor | None = None
    ) -> Context:
        """Encode prompts, token ids [B, L], or token embeddings [B, L, D].

        Token embeddings replace those of `ids`. Differentiable with respect to token_embeds and to the text encoder's
        weights.
        """
        if ids is None:
            ids = self.tokenize(text)
        handle = None
        if token_embeds is not None:
            if self.text_encoder_2 is not None:
                raise ErasebenchError("token embeddings cannot stand in for tokens in a model with two text encoders")
            table = self.text_encoder.get_input_embeddings()
            handle = table.register_forward_hook(lambda module, args, output: token_embeds)
        try:
            out = self.text_encoder(ids, output_hidden_states=self.text_encoder_2 is not None)
        finally:
            if handle:
                handle.remove()
        is_end = ids == self.tokenizer.eos_token_id
        ends = torch.where(is_end.any(1), is_end.int().argmax(1), ids.shape[1] - 1)
        if self.text_encoder_2 is None:
            return Context(out[0], ids, ends)
        padding = torch.arange(ids.shape[1], device=ids.device) > ends[:, None]
        second = self.text_encoder_2(ids.masked_fill(padding, self._second_padding), output_hidden_states=True)
        hidden = torch.cat([out.hidden_states[-2], second.hidden_states[-2]], -1)
        return Context(hidden, ids, ends, second.text_embeds)

    def unconditional(self) -> Context:
        """Return the context of the empty prompt, for guidance.

        It is encoded, but for SDXL all zero if model_index.json says so."""
        context = self.encode([""])
        if self.text_encoder_2 is None or not self._zeros:
            return context
        return context._replace(hidden=torch.zeros_like(context.hidden), pooled=torch.zeros_like(context.pooled))

    def begin(self, context: Context, z: Tensor) -> dict[str, Any]:
        """Return the state of new trajectories from z [B, C, h, w].

        Pass it to `eps` and `guided_eps`. Raises Refused if the safety gate refuses a prompt."""
        self._admit(context.ids)
        return self.guidance.begin(self, context, z)

    def eps(self, z: Tensor, t: Tensor | int, context: Context, state: Mapping[str, Any] | None = None) -> Tensor:
        """Return the noise prediction [B, C, h, w] at timestep t.

        t is a number or [B]. The prediction is converted if the U-Net predicts something else."""
        return self.as_noise(self.predict(z, t, context, state), z, t)

    def predict(self, z: Tensor, t: Tensor | int, context: Context, state: Mapping[str, Any] | None = None) -> Tensor:
        """Return the U-Net's raw prediction [B, C, h, w] at timestep t.

        t is a number or [B]. The prediction is noise, v or clean latents, as its scheduler expects.
        `state["attention"]`, if set by guidance, reaches the attention processors as keyword arguments.
        """
        t = torch.as_tensor(t, device=z.device)
        self._counted.samples = self.unet_samples + len(z)
        fast = _precision.fast
        precision = torch.autocast(self.device.type, torch.bfloat16) if fast else nullcontext()
        with self.around(self, context), precision:
            out = (self.unet if self._compiled is None or not fast else self._compiled)(
                z,
                t,
                context.hidden,
                cross_attention_kwargs=(state or {}).get("attention"),
                added_cond_kwargs=self._added(z, context),
                return_dict=False,
            )[0]
            # the next call of a compiled U-Net overwrites the output of this one
            return out.clone() if fast and out.dtype == z.dtype else out.to(z.dtype)

    def as_noise(self, predicted: Tensor, z: Tensor, t: Tensor | int) -> Tensor:
        """Convert a U-Net prediction into noise [B, C, h, w].

        The prediction is for latents z at timestep t, a number or [B]."""
        if self._prediction == "epsilon":
            return predicted
        alpha = self._signal(torch.as_tensor(t, device=z.device)).to(z.dtype).reshape(-1, 1, 1, 1)
        if self._prediction == "sample":
            return (z - alpha.sqrt() * predicted) / (1 - alpha).sqrt()
        return alpha.sqrt() * predicted + (1 - alpha).sqrt() * z  # v: Salimans & Ho, 2022, section 4

    def _signal(self, t: Tensor) -> Tensor:
        """Return alphas_cumprod at t.

        Some samplers use fractional timesteps; these are interpolated as diffusers interpolates the noise."""
        if not t.is_floating_point():
            return self.alphas_cumprod[t]
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        low = t.floor().long().clamp(max=len(sigmas) - 1)
        high = (low + 1).clamp(max=len(sigmas) - 1)
        return 1 / (1 + torch.lerp(sigmas[low], sigmas[high], (t - low).to(sigmas)) ** 2)

    def _added(self, z: Tensor, context: Context) -> dict[str, Tensor] | None:
        """Return SDXL's additional conditions: size as made, uncropped, and the pooled prompt.

        None for a model with one text encoder."""
        if context.pooled is None:
            return None
        side = z.shape[-1] * self.pixels_per_latent
        times = torch.tensor([side, side, 0, 0, side, side], device=z.device, dtype=z.dtype).expand(len(z), 6)
        return {"text_embeds": context.pooled, "time_ids": times}

    def guided(self, z: Tensor, t: Tensor | int, context: Context, scale: float | Tensor, state: dict) -> Tensor:
        """Return the guided prediction for the scheduler [B, C, h, w].

        Guidance is the method's own if it replaces the default. As in diffusers, a scale of 1 or below means no
        guidance."""
        least = scale.clamp(min=1) if isinstance(scale, Tensor) else max(scale, 1)
        return self.guidance(self, z, torch.as_tensor(t, device=z.device), context, least, state)

    def guided_eps(self, z: Tensor, t: Tensor | int, context: Context, scale: float | Tensor, state: dict) -> Tensor:
        """Return the guided prediction as noise [B, C, h, w]."""
        return self.as_noise(self.guided(z, t, context, scale, state), z, t)

    def noise(self, seeds: Sequence[int], size: int | None = None) -> Tensor:
        """Draw unit Gaussian latents, with one CPU generator an image.

        An image therefore never depends on its neighbours."""
        shape = (1, *self.latent_shape(size))
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=self.dtype) for seed in seeds]
        return torch.cat(draws).to(self.device)

    def scheduler(self, sampler: Sampler):
        """Return a fresh diffusers scheduler with its timesteps set.

        It is set up as in StableDiffusionPipeline, or as in SDXL's pipeline."""
        return schedulers.load(self.scheduler_config, sampler, self.device, xl=self.text_encoder_2 is not None)

    def check_sampler(self, sampler: Sampler) -> None:
        """Raise ErasebenchError for a sampler or size unsupported by the base."""
        scheduler = self.scheduler(sampler)
        self.latent_shape(sampler.size)
        schedulers.check_step(scheduler, sampler.name)

    @contextmanager
    def fast(self) -> Iterator[None]:
        """Run this thread's U-Net in bf16 inside the `with`.

        Weights, guidance and scheduler stay in fp32. On a GPU, the U-Net is also compiled, and its weights are laid out
        channels last from then on."""
        if self.device.type == "cuda" and self._compiled is None:
            self.unet.to(memory_format=torch.channels_last)
            self._compiled = torch.compile(self.unet, **COMPILER)
        _precision.fast = True
        try:
            with torch._dynamo.config.patch(DYNAMO) if self._compiled is not None else nullcontext():
                yield
        finally:
            _precision.fast = False

    @torch.no_grad()
    def latents(
        self,
        context: Context,
        seeds: Sequence[int],
        sampler: Sampler,
        trace: list | None = None,
        scales: Sequence[float] | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Sample latents [B, C, h, w].

        `trace` receives (t, z) before every step; `scales` are the guidance scales of single images, if they differ
        from the sampler's; `stop` ends sampling after that many steps. Raises NotFinite if latents become NaN or
        infinite."""
        scheduler = self.scheduler(sampler)
        z = self.noise(seeds, sampler.size) * scheduler.init_noise_sigma
        state = self.begin(context, z)
        scale: float | Tensor = sampler.guidance
        if scales is not None and set(scales) != {sampler.guidance}:
            scale = torch.tensor(scales, device=z.device, dtype=z.dtype).view(-1, 1, 1, 1)
        finite: list[Tensor] = []  # read once at the end, since each read synchronises the GPU
        with reuse.trajectory():
            for t in scheduler.timesteps[:stop]:
                if trace is not None:
                    trace.append((t, z))
                scaled = scheduler.scale_model_input(z, t)
                z = scheduler.step(self.guided(scaled, t, context, scale, state), t, z, return_dict=False)[0]
                finite.append(torch.isfinite(z).all())
        if finite and not (fine := torch.stack(finite)).all():
            raise NotFinite(f"latents are not finite from step {int((~fine).int().argmax()) + 1} of {sampler.steps} on")
        return z

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents -> images uint8 [B, H, W, 3] on the CPU.

        Raises NotFinite for NaN or infinity, which would otherwise become an ordinary image."""
        if not is_finite(z):
            raise NotFinite("latents are not finite")
        return torch.cat(in_slices(self, "decode", lambda rows: self._decoded(z[rows]), len(z), at_once(z.shape)))

    def _decoded(self, z: Tensor) -> Tensor:
        latents = z.to(self.vae.dtype) / self.vae.config.scaling_factor
        if self._normal is not None:
            latents = latents * self._normal[1] + self._normal[0]
        images = self.vae.decode(latents, return_dict=False)[0]
        if not is_finite(images):
            raise NotFinite(
                f"what the VAE makes of finite latents is not finite in {images.dtype}".replace("torch.", "")
            )
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    @torch.no_grad()
    def encode_images(
        self, images: Tensor, mean: Sequence[float] = (0.5,) * 3, deviation: Sequence[float] = (0.5,) * 3
    ) -> Tensor:
        """Encode images uint8 [B, H, W, 3] -> latents (posterior mean, scaled).

        `mean` and `deviation` as in `posterior`."""
        return self.posterior(images, mean, deviation)[0]

    @torch.no_grad()
    def posterior(
        self, images: Tensor, mean: Sequence[float] = (0.5,) * 3, deviation: Sequence[float] = (0.5,) * 3
    ) -> tuple[Tensor, Tensor]:
        """Encode images uint8 [B, H, W, 3] -> posterior of their latents.

        It is given by mean and deviation [B, C, h, w], scaled. Pixels in [0, 1] are normalised by the channels' `mean`
        and `deviation`; the VAE expects the defaults. Raises NotFinite for NaN or infinity."""
        centre, spread = (
            torch.tensor(v, device=self.device, dtype=self.vae.dtype).view(3, 1, 1) for v in (mean, deviation)
        )

        def work(rows: slice) -> tuple[Tensor, Tensor]:
            pixels = (images[rows].to(self.device, self.vae.dtype).permute(0, 3, 1, 2) / 255 - centre) / spread
            latents = self.vae.encode(pixels).latent_dist
            return latents.mean, latents.std

        most = at_once([side // self.pixels_per_latent or 1 for side in images.shape[1:3]])
        parts = in_slices(self, "encode", work, len(images), most)
        found = tuple(torch.cat(each) for each in zip(*parts, strict=True))
        if self._normal is not None:
            found = (found[0] - self._normal[0]) / self._normal[1], found[1] / self._normal[1]
        made = tuple((x * self.vae.config.scaling_factor).to(self.dtype) for x in found)
        if not all(map(is_finite, made)):
            raise NotFinite(
                f"the latents that the VAE gives for pictures are not finite in {self.dtype}".replace("torch.", "")
            )
        return made

    def refuses(self, context: Context) -> Tensor:
        """Return whether the guard refuses each prompt, bool [B] on the CPU."""
        if self.guard is None:
            return torch.zeros(len(context.ids), dtype=torch.bool)
        scores = self.guard(self, context)
        if scores.isnan().any():
            raise NotFinite("the guard's scores are not finite")
        return (scores >= self.guard.threshold).cpu()

    @torch.no_grad()
    def sample(
        self,
        texts: Sequence[str] | Context,
        seeds: Sequence[int],
        sampler: Sampler,
        scales: Sequence[float] | None = None,
    ) -> Sampled:
        """Sample one image for each prompt and seed.

        It uses the current guidance and guard. `scales` gives each image its own guidance scale."""
        context = texts if isinstance(texts, Context) else self.encode_distinct(texts)
        if not is_finite(context.hidden):
            raise NotFinite("embeddings of prompts are not finite")
        refused = self.refuses(context)
        made = torch.nonzero(~refused).flatten()
        side = self.latent_shape(sampler.size)[1] * self.pixels_per_latent
        images = torch.zeros(len(seeds), side, side, 3, dtype=torch.uint8)
        if len(made):
            own = [scales[i] for i in made] if scales is not None else None
            z = self.latents(context.select(made), [seeds[i] for i in made], sampler, scales=own)
            images[made] = self.decode(z)
        return Sampled(images, refused)
