"""The only code that touches the user's module."""

from advfeat.model.access import device_of, innermost, logit_candidates, logits_of, unwrapped
from advfeat.model.extras import ExtraArguments, Extras
from advfeat.model.folding import rare_comparisons
from advfeat.model.formats import Precision, without_autocast
from advfeat.model.freezing import buffers_kept
from advfeat.model.inspection import Purpose
from advfeat.model.layers import Layer, find_layer
from advfeat.model.network import Evaluation, Network, attackable
from advfeat.model.normalize import Normalize
from advfeat.model.trainable import Trainee, averaging, check_not_wrapped, trainable

__all__ = [
    "Evaluation",
    "ExtraArguments",
    "Extras",
    "Layer",
    "Network",
    "Normalize",
    "Precision",
    "Purpose",
    "Trainee",
    "attackable",
    "averaging",
    "buffers_kept",
    "check_not_wrapped",
    "device_of",
    "find_layer",
    "innermost",
    "logit_candidates",
    "logits_of",
    "rare_comparisons",
    "trainable",
    "unwrapped",
    "without_autocast",
]
