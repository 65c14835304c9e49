"""A GPU of the mind: Stable Diffusion 1.4 as meta tensors, and a counter of the bytes that a GPU would hold.

Nothing is computed but small numbers that decide what happens next (timesteps, token ids, masks); everything else has a shape
alone. Counted are the storages that live between two operations: weights, activations kept for the backward pass, gradients,
state of optimisers. Attention counts as CUDA's memory-efficient kernel, which keeps no map. Not counted: what is inside an
operation (workspaces of convolutions), and what the allocator loses to fragments; leave some GiB for these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config  # noqa: F401
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from erasebench.model.model import Model
from erasebench.model.source import Components

GIB = 2**30
SMALL = 4096  # numbers of fractions that are known; of whole numbers and truths more
LARGE = 2**20  # from here on a copy to the CPU has a shape alone, too
META = torch.device("meta")
aten = torch.ops.aten
MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_NEW: dict[Any, bool] = {}  # operation -> whether it writes into nothing and gives no view


def tensors(values: Iterable) -> list[Tensor]:
    """Those among values, and in lists of them."""
    flat = (y for x in values for y in (x if isinstance(x, list | tuple) else (x,)))
    return [x for x in flat if isinstance(x, Tensor)]


RANDOM = {aten.rand.default, aten.randn.default}


class Gpu(TorchDispatchMode):
    """Counts the bytes of meta tensors; `capacity` in bytes, beyond which torch.OutOfMemoryError is raised."""

    def __init__(self, capacity: float = float("inf")):
        super().__init__()
        self.capacity, self.held, self.peak = capacity, 0, 0
        self._counted: dict[int, int] = {}  # storage -> bytes
        self._known: dict[int, torch.UntypedStorage] = {}  # storage -> what is in it, on the CPU
        self._shapes: dict[Any, Any] = {}  # operation and shapes -> shapes of what it gives

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [*tensors(args), *tensors(kwargs.values())]
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            known = self.value(args[0])
            return known.item() if known is not None else torch.ones((), dtype=args[0].dtype).item()
        to_cpu = func is aten._to_copy.default and args[0].is_meta and kwargs.get("device", META).type == "cpu"
        if to_cpu or (func is aten.copy_.default and not args[0].is_meta and args[1].is_meta):
            return self.copied(func, args, kwargs)
        if func is aten.nonzero.default and args[0].is_meta and (known := self.value(args[0])) is not None:
            return known.nonzero().to(META)
        if not any(x.is_meta for x in given):
            out = func(*args, **kwargs)
            if self.note(out):
                self.learn(func, args, kwargs, out, func not in RANDOM)
            return out
        known = all(not x.is_meta or x.untyped_storage()._cdata in self._known for x in given)
        if func in MASKED:
            args = self.without_masks(args)
        place = lambda x: x.to(META) if isinstance(x, Tensor) and x.ndim and not x.is_meta else x
        inner = lambda x: [place(y) for y in x] if isinstance(x, list | tuple) else place(x)
        out = self.shaped(func, tuple(map(inner, args)), {k: inner(v) for k, v in kwargs.items()})
        fresh = self.note(out)
        if func._schema.is_mutable or (fresh and known):
            self.learn(func, args, kwargs, out, known)
        return out

    def shaped(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """What an operation gives, as shapes. Those of one that makes new tensors are kept for the next time: asking torch is
        slow."""
        if func not in _NEW:
            _NEW[func] = not any(a.alias_info for a in (*func._schema.arguments, *func._schema.returns))
        if not _NEW[func]:
            return func(*args, **kwargs)
        about = lambda x: (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x)
        inner = lambda x: tuple(map(about, x)) if isinstance(x, list | tuple) else about(x)
        key = func, *map(inner, args), *((k, inner(v)) for k, v in kwargs.items())
        if key not in self._shapes:
            out = func(*args, **kwargs)
            if all(isinstance(x, Tensor | None) for x in (out if isinstance(out, tuple | list) else (out,))):
                self._shapes[key] = inner(out)
            return out
        made = lambda x: None if x[0] is type(None) else torch.empty_strided(x[0], x[1], dtype=x[2], device=META)
        found = self._shapes[key]
        if found == (type(None), None):  # a check gives nothing
            return None
        return made(found) if isinstance(found[0], torch.Size) else tuple(map(made, found))

    # -- bytes ----------------------------------------------------------------------------------------------------

    def note(self, out: Any) -> bool:
        """Count storages that are new; whether there are any."""
        fresh = False
        for x in tensors((out,)):
            if x.is_meta:
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self._counted:
                    fresh = True
                    self._counted[key] = storage.nbytes()
                    self.held += storage.nbytes()
                    weakref.finalize(storage, self.forget, key)
        self.expect(0)
        return fresh

    def expect(self, more: int) -> None:
        """Count what something needs for a moment."""
        if self.held + more > self.capacity:
            raise torch.OutOfMemoryError(f"{(self.held + more) / GIB:.1f} GiB held of {self.capacity / GIB:.1f}")
        self.peak = max(self.peak, self.held + more)

    def forget(self, key: int) -> None:
        self.held -= self._counted.pop(key, 0)
        self._known.pop(key, None)

    # -- values ---------------------------------------------------------------------------------------------------

    def value(self, x: Tensor) -> Tensor | None:
        """What is in a tensor, if that is known, as a view on the CPU."""
        if not x.is_meta:
            return x
        storage = self._known.get(x.untyped_storage()._cdata)
        if storage is None:
            return None
        return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())

    def learn(self, func: Callable, args: Any, kwargs: Any, out: Any, known: bool) -> None:
        """Do with known values what was done with shapes; what was written with unknown ones is unknown."""
        written = [
            x for x, a in zip(args, func._schema.arguments, strict=False)
            if isinstance(x, Tensor) and a.alias_info is not None and a.alias_info.is_write
        ]
        outs = tensors((out,))
        small = all(x.numel() <= (SMALL if x.is_floating_point() else LARGE) for x in outs)
        if not known or not small:
            for x in written:
                self._known.pop(x.untyped_storage()._cdata, None)
            return
        there = lambda x: self.value(x) if isinstance(x, Tensor) else torch.device("cpu") if x == META else x
        inner = lambda x: [there(y) for y in x] if isinstance(x, list | tuple) else there(x)
        found = func(*map(inner, args), **{k: inner(v) for k, v in kwargs.items()})
        for x, y in zip(outs, tensors((found,)), strict=True):
            key = x.untyped_storage()._cdata
            if key in self._known or not x.is_meta:
                continue
            own = torch.empty(0, dtype=y.dtype).set_(
                torch.UntypedStorage(x.untyped_storage().nbytes()), x.storage_offset(), x.shape, x.stride()
            )
            own.copy_(y)
            self._known[key] = own.untyped_storage()

    def copied(self, func: Callable, args: Any, kwargs: Any) -> Tensor:
        """A copy on the CPU: of what is known, or zeros."""
        source = args[1] if func is aten.copy_.default else args[0]
        known = self.value(source)
        if func is aten.copy_.default:
            return args[0] if known is None else args[0].copy_(known)
        dtype = kwargs.get("dtype") or source.dtype
        if known is not None:
            return known.to(dtype, copy=True)
        if source.numel() > LARGE:
            return torch.zeros((), dtype=dtype).expand(source.shape)
        return torch.zeros(source.shape, dtype=dtype)

    def without_masks(self, args: tuple) -> tuple:
        """Indices in the place of masks whose values are known."""
        indices = []
        for index in args[1]:
            if index is not None and index.dtype == torch.bool and (mask := self.value(index)) is not None:
                indices += [i.clone() for i in mask.nonzero(as_tuple=True)]
            else:
                indices.append(index)
        return args[0], indices, *args[2:]


@contextmanager
def efficient_attention() -> Iterator[None]:
    """Attention as a GPU computes it in fp32: without its map."""
    ordinary = functional.scaled_dot_product_attention

    def efficient(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        if not query.is_meta:
            return ordinary(query, key, value, attn_mask, dropout_p, is_causal, **more)
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        operation = aten._scaled_dot_product_efficient_attention
        return operation(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal)[0]

    functional.scaled_dot_product_attention = efficient
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = ordinary


@contextmanager
def gpu(counter: Gpu | None = None) -> Iterator[Gpu]:
    """Everything on the device "meta" is counted inside, on a GPU of its own or one that was there before."""
    every = torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)  # of masks that nobody knows: the most
    with every, counter or Gpu() as counter, efficient_attention():
        yield counter


def tokenizer():
    """Stable Diffusion 1's own; open_clip brings its words and merges."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    made = SimpleTokenizer()
    merges = list(made.bpe_ranks)
    words = {{"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(w, w): i for w, i in made.encoder.items()}
    return CLIPTokenizer(vocab=words, merges=merges, model_max_length=77)


def stable_diffusion() -> Model:
    """Stable Diffusion 1.4 on the device "meta"."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
                bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
            )
        )
    scheduler = {
        "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "num_train_timesteps": 1000,
    }  # fmt: skip
    return Model(Components(unet, vae, text, tokenizer(), scheduler), device="meta")
