"""Vision transformers of timm and transformers at 224x224: training, construction, and from disk.

    python tests/benchmarks/bench_vit.py [STEPS]

The weights are random. Each library has a process of its own, so memory is that of the work: how
far resident memory rises over the model and the data. Linux only: it reads /proc.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af

IMAGES, CLASSES, BATCH = 8, 10, 4
SIZE = {"depth": 12, "width": 384, "heads": 6}  # of ViT-S/16


def resident(name: str) -> float:
    """Megabytes resident now (VmRSS), or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


@contextmanager
def measured(what: str) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, began = resident("VmRSS"), time.process_time()
    yield
    seconds, rise = time.process_time() - began, resident("VmHWM") - before
    print(f"  {what:40} {seconds:6.1f} s of CPU, {rise:6.0f} MB over {before:.0f} MB", flush=True)


def of_timm() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    import timm

    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=CLASSES)
    return model, lambda x: model.forward_features(x)[:, 0]


def of_transformers() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=SIZE["width"],
        num_hidden_layers=SIZE["depth"],
        num_attention_heads=SIZE["heads"],
        intermediate_size=4 * SIZE["width"],
        num_labels=CLASSES,
    )
    model = ViTForImageClassification(config)
    return model, lambda x: model.vit(x).last_hidden_state[:, 0]


def run(library: str, steps: int, folder: str) -> None:
    torch.manual_seed(0)
    model, class_token = {"timm": of_timm, "transformers": of_transformers}[library]()
    data = TensorDataset(torch.rand(IMAGES, 3, 224, 224), torch.arange(IMAGES) % CLASSES)
    print(f"{library}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
    shared = {"batch_size": BATCH, "steps": steps, "seed": 0}
    with measured(f"adversarial_fit, {IMAGES // BATCH} steps of PGD-{steps}"):
        af.adversarial_fit(model, data, eps=0.5, norm="l2", epochs=1, **shared)
    with measured(f"construct_det_dataset, {steps} steps"):
        settings = {k: v for k, v in shared.items() if k != "seed"}
        det = af.construct_det_dataset(model, data, eps=0.5, out=f"{folder}/det", **settings)
    with measured(f"construct_robust_dataset, {steps} steps"):
        robust = af.construct_robust_dataset(
            model, data, layer=class_token, out=f"{folder}/robust", **shared
        )
    with measured("open both, read one image of each"):
        opened = [af.ConstructedDataset.open(f"{folder}/{name}") for name in ("det", "robust")]
        shapes = [tuple(made[3][0].shape) for made in opened]
    assert shapes == [(3, 224, 224)] * 2
    for made, again in zip((det, robust), opened, strict=True):
        assert torch.equal(made.images, again.images)
    images, labels = opened[1].images, opened[1].labels
    with torch.no_grad():
        distance = (class_token(images) - class_token(data.tensors[0])).norm(dim=1)
    assert torch.equal(labels, data.tensors[1])
    assert torch.allclose(distance, opened[1].field("distance"), rtol=1e-3)
    print(f"  the layer: {opened[1].manifest['layer']}; distances agree with the model's own")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        with tempfile.TemporaryDirectory() as place:
            run(sys.argv[2], int(sys.argv[3]), place)
    else:
        for library in ("timm", "transformers"):
            command = [sys.executable, __file__, "run", library, *(sys.argv[1:] or ["5"])]
            subprocess.run(command, check=True)
