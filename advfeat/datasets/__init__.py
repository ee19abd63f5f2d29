"""Constructed datasets: open, save, inspect, sample, exchange, and their controls."""

from advfeat.datasets.dataset import ConstructedDataset
from advfeat.datasets.exchange import (
    export_images,
    export_released,
    import_images,
    import_released,
)
from advfeat.datasets.inspection import Inspection, inspect, moved_control, noise_control
from advfeat.datasets.sampling import StartSampler

__all__ = [
    "ConstructedDataset",
    "Inspection",
    "StartSampler",
    "export_images",
    "export_released",
    "import_images",
    "import_released",
    "inspect",
    "moved_control",
    "noise_control",
]
