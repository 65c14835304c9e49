"""A GPU that is only pretended: tensors stay on the CPU, say that they are on `cuda:0`, and may not be mixed.

`pretended_gpu()` is a mode of torch's functions: what is made for or moved to "cuda" is marked, `device` gives the mark, and
a function that is handed marked and unmarked tensors together raises as CUDA would. Threads that a pool starts inside
enter it too. What C++ does alone (autograd's backward of torch's own functions, TorchScript, ONNX) is not looked at.

What else could do it: FakeTensorMode and the meta device hold no numbers, and samplers, judges and gates read some; a
renamed PrivateUse1 backend is no "cuda", which the command line, generators and the counting of memory ask for by name.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
Tensor = torch.Tensor
WHERE = {Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__}
TO_NUMPY = {Tensor.numpy, Tensor.__array__}
# from any device to the tensor's own, and the question whether one may take another's place
ONTO = {Tensor.copy_, Tensor.data.__set__, torch._has_compatible_shallow_copy_type}
ALONE = {Tensor.__deepcopy__}  # its other arguments hold tensors of anywhere
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
# where a tensor of no dimension must lie with the others
STRICT = {torch.cat, torch.stack, torch.matmul, torch.nn.functional.linear, torch.nn.functional.embedding}
MEMORY = {  # what torch.cuda says
    "is_available": True,
    "device_count": 1,
    "get_device_name": "a pretended GPU",
    "reset_peak_memory_stats": None,
    "max_memory_allocated": 2**30,
    "memory_allocated": 2**29,
    "memory_reserved": 2**29,
    "mem_get_info": (2**34, 2**35),
    "empty_cache": None,
    "synchronize": None,
}


class MixedDevices(RuntimeError):
    """What torch says of tensors on several devices."""


def is_marked(x: Tensor) -> bool:
    return x.__dict__.get("pretended", False)


def is_known(x: Tensor) -> bool:
    return "pretended" in x.__dict__


def mark(made: Any, on_gpu: bool) -> Any:
    """Say of every tensor in `made` where it is."""
    for x in tensors_in(made):
        x.__dict__["pretended"] = on_gpu
    return made


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from tensors_in(each)


def in_backward() -> bool:
    """Whether autograd calls: it hands over tensors that no function here has made."""
    return torch._C._current_graph_task_id() != -1


class Pretended(TorchFunctionMode):
    """See the module's first lines."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in WHERE:
            return place_of(function, args[0])
        if function in TO_NUMPY and is_marked(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        if function == torch.autograd.grad:  # a gradient lies where its input does, wherever the loss is
            gradients = function(*args, **kwargs)
            inputs = tensors_in([kwargs.get("inputs", args[1:2])])
            return tuple(mark(gradient, is_marked(x)) for gradient, x in zip(gradients, inputs, strict=True))
        if function == Tensor.cuda:
            function, args, kwargs = Tensor.to, (args[0], GPU), {}
        wanted, args, kwargs = device_asked_for(function, args, kwargs)
        given = list(tensors_in(args[:1] if function in ALONE else [args, kwargs]))
        if wanted is None:
            check(function, args, given)
            on_gpu = is_marked(args[0]) if function in ONTO | INDEXING else any(map(is_marked, given))
        else:
            on_gpu = wanted.type == "cuda"
        generator = kwargs.get("generator")
        if on_gpu and generator is not None and generator.device.type == "cpu":
            raise MixedDevices("Expected a 'cuda' device type for generator but found 'cpu'")
        unknown = in_backward() and wanted is None and not any(map(is_known, given))
        made = function(*args, **kwargs)
        if function == Tensor.data.__set__:
            mark(args[0], is_marked(args[1]))
        elif wanted is not None and any(made is x and is_marked(x) != on_gpu for x in given):
            return mark(made.clone(), on_gpu)  # the tensor itself was given back; a GPU would have copied it
        elif not unknown:
            mark([x for x in tensors_in(made) if all(x is not own for own in given)], on_gpu)
        return made


def place_of(getter: Callable, x: Tensor) -> torch.device | bool:
    if getter == Tensor.device.__get__:
        return GPU if is_marked(x) else getter(x)
    return is_marked(x) == (getter == Tensor.is_cuda.__get__)


def device_asked_for(function: Callable, args: tuple, kwargs: dict) -> tuple[torch.device | None, tuple, dict]:
    """(the device that a call names, the call with the CPU in its place)."""
    if function == Tensor.cpu:
        return CPU, args, kwargs
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
        return None, args, kwargs
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]), args, {**kwargs, "device": CPU}
    if function == Tensor.to and len(args) > 1:
        if isinstance(args[1], Tensor):
            return (GPU if is_marked(args[1]) else CPU), args, kwargs
        if isinstance(args[1], str | torch.device):
            return torch.device(args[1]), (args[0], CPU, *args[2:]), kwargs
    return None, args, kwargs


def check(function: Callable, args: tuple, given: list[Tensor]) -> None:
    """Raises MixedDevices where CUDA would. On the CPU may lie what has no dimension, and an index of numbers; an
    index without a dimension is read as a number, wherever it lies."""
    if function in ONTO:
        return
    if function in INDEXING:
        index, rest = list(tensors_in(args[1:2])), list(tensors_in(args[2:]))
        given = [args[0], *(x for x in index if x.ndim and is_marked(x)), *(x for x in rest if index and x.ndim)]
    elif function not in STRICT:
        given = [x for x in given if x.ndim or is_marked(x)]
    if in_backward():
        given = list(filter(is_known, given))
    if len(set(map(is_marked, given))) > 1:
        shapes = ", ".join(f"{tuple(x.shape)} on {'cuda:0' if is_marked(x) else 'cpu'}" for x in given)
        name = getattr(function, "__qualname__", None) or getattr(function, "__name__", str(function))
        raise MixedDevices(f"Expected all tensors to be on the same device: {name} of {shapes}")


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, "cuda" is a device of this machine."""
    from contextlib import ExitStack

    new, submit, load = torch.nn.Parameter.__new__, concurrent.futures.ThreadPoolExecutor.submit, torch.jit.load

    def parameter(cls: type, data: Any = None, *rest: Any, **options: Any) -> torch.nn.Parameter:
        options.pop("pretended", None)  # accelerate hands over all that the parameter before has in its __dict__
        return mark(new(cls, data, *rest, **options), data is not None and is_marked(data))

    def entering(work: Callable) -> Callable:
        @functools.wraps(work)
        def inside(*args: Any, **options: Any) -> Any:
            with Pretended():
                return work(*args, **options)

        return inside

    def batched(work: Callable, *options: Any, **named: Any) -> Callable:
        mapped = vmap(work, *options, **named)  # which hands over tensors that C++ makes, and gives such back
        return lambda *args: mark(mapped(*args), any(map(is_marked, tensors_in(list(args)))))

    def module_to(module: torch.nn.Module, *given: Any, **named: Any) -> torch.nn.Module:
        if given and isinstance(given[0], Tensor):  # whose device C++ would read
            given = (given[0].device, given[0].dtype)
        return move(module, *given, **named)

    vmap, move = torch.func.vmap, torch.nn.Module.to
    checkpoint = torch.utils.checkpoint.checkpoint  # backward computes again, where no mode is
    with ExitStack() as stack:
        put = lambda owner, name, value: stack.enter_context(replaced(owner, name, value))
        put(torch.nn.Parameter, "__new__", parameter)
        put(concurrent.futures.ThreadPoolExecutor, "submit", lambda pool, work, *a, **o: submit(pool, entering(work), *a, **o))
        put(torch.func, "vmap", batched)
        put(torch.nn.Module, "to", module_to)
        put(torch.utils.checkpoint, "checkpoint", lambda work, *a, **o: checkpoint(entering(work), *a, **o))
        put(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda optimizer: None)
        put(torch.jit, "load", lambda file, map_location=None, **o: load(file, map_location="cpu", **o))
        for name, answer in MEMORY.items():
            put(torch.cuda, name, functools.partial(lambda given, *_, **__: given, answer))
        with Pretended():
            yield
