"""Mixed devices: that the pretended GPU shows them, and that the product has none."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pretended import MixedDevices, pretended_gpu
from settings import OWN_CLIP, attack, method
from world import alone, attacked, erased, measured, photo, skipped  # noqa: F401

CPU_AND_GPU = {
    "a sum": lambda gpu, cpu: gpu + cpu,
    "a sum in place": lambda gpu, cpu: cpu.add_(gpu),
    "a product of matrices": lambda gpu, cpu: gpu @ cpu,
    "a list": lambda gpu, cpu: torch.stack([gpu, cpu]),
    "a number in a list": lambda gpu, cpu: torch.stack([gpu[0, 0], torch.tensor(1.0)]),
    "a choice": lambda gpu, cpu: torch.where(gpu > 0, gpu, cpu),
    "an index of the GPU's": lambda gpu, cpu: cpu[gpu.long()],
    "a mask that is written to": lambda gpu, cpu: gpu.__setitem__(gpu > 0, cpu.flatten()),
    "a layer that was left behind": lambda gpu, cpu: torch.nn.Linear(2, 2)(gpu),
    "a generator of the CPU's": lambda gpu, cpu: torch.randn(2, generator=torch.Generator(), device=gpu.device),
    "what a thread does": lambda gpu, cpu: ThreadPoolExecutor(1).submit(lambda: gpu + cpu).result(),
    "a gradient": lambda gpu, cpu: torch.nn.Parameter(gpu).sum() + cpu,
}


@pytest.mark.parametrize("what", CPU_AND_GPU)
def test_mixed_devices_raise(what):
    with pretended_gpu():
        gpu, cpu = torch.zeros(2, 2, device="cuda"), torch.zeros(2, 2)
        with pytest.raises(MixedDevices):
            CPU_AND_GPU[what](gpu, cpu)


def test_what_a_gpu_allows_is_allowed_and_nothing_stays():
    with pretended_gpu():
        network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).to("cuda")
        twin, x = copy.deepcopy(network), torch.ones(4, 2).cuda()
        assert x.device == torch.device("cuda:0") and x.is_cuda and {p.device for p in twin.parameters()} == {x.device}
        optimizer = torch.optim.AdamW(network.parameters())
        torch.utils.checkpoint.checkpoint(network, x, use_reentrant=False).square().sum().backward()
        optimizer.step()
        twin.load_state_dict({name: value.cpu() for name, value in network.state_dict().items()})
        assert (x * torch.tensor(2.0))[torch.tensor([0, 1])].device == x.device and not (x.cpu() + torch.ones(4, 2)).is_cuda
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(x)
        same = torch.zeros(2)
        assert same.to("cuda").is_cuda and same.is_cpu
    assert not x.is_cuda and torch.nn.Parameter(x).device == torch.device("cpu")


FAMILIES = {  # one of each way of fitting
    "closed form": "uce",
    "fine-tuning of the cross-attention": "esd_2025",
    "with trajectories of the model as it is trained": "esd",
    "search among words": "ap",
    "keys": "kpop",
    "adapters and masks": "mace",
    "mining": "dark_miner",
    "attention while sampling": "gie",
    "small networks": "receler",
    "text encoder": "text_tuning",
    "guidance": "sld",
    "a guard": "latent_guard",
    "Fisher information": "sa",
    "saliency": "salun",
}


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_no_fit_mixes_devices(photo, tmp_path, name):  # noqa: F811
    """Judges, of object and caption, compute there too."""
    words = [*method(name), *(photo.method_clip if name in OWN_CLIP else ()), "target=cat", "batch=auto"]
    with pretended_gpu():
        rows = photo.run(tmp_path, *words, device="cuda")
    assert erased(rows) and not skipped(rows) and all("pretended GPU" in row.device for row in rows)


@pytest.mark.parametrize("base", ["sd21", "sdxl"])
def test_no_architecture_mixes_devices(photo, tmp_path, base):  # noqa: F811
    with pretended_gpu():
        assert "clip_score" in measured(photo.run(tmp_path, "method=uce", "target=cat", base=base, device="cuda"))


@pytest.mark.parametrize("task", ["celebrity n=5", "imagenette", "style target='Van Gogh'", "explicit"])
def test_no_judge_mixes_devices(photo, tmp_path, task):  # noqa: F811
    name, *rest = task.split(" ", 1)
    with pretended_gpu():
        rows = photo.run(tmp_path, "method=negative_prompt", f"task={name}", *rest, device="cuda")
    assert not skipped(rows) and "clip_score" in measured(rows)


@pytest.mark.parametrize("name", ["udatk", "cce", "mma_text", "rab", "probe_guidance"])
def test_no_attack_mixes_devices(photo, tmp_path, name):  # noqa: F811
    with pretended_gpu():
        rows = photo.run(tmp_path, "method=uce", *attack(name), device="cuda")
    assert attacked(rows), [row.reason for row in rows if row.attack]
