"""Build constructed datasets: what D_R, D_NR, D_det and D_rand have in common."""

from advfeat.construction.builder import build_dataset, indexed_source
from advfeat.construction.inverted import InvertedDataset, Start, build_inverted
from advfeat.construction.provenance import data_fingerprint, model_fingerprint
from advfeat.construction.recipe import BuildOptions, DatasetRecipe
from advfeat.construction.targeted import TargetedDataset, build_targeted

__all__ = [
    "BuildOptions",
    "DatasetRecipe",
    "InvertedDataset",
    "Start",
    "TargetedDataset",
    "build_dataset",
    "build_inverted",
    "build_targeted",
    "data_fingerprint",
    "indexed_source",
    "model_fingerprint",
]
