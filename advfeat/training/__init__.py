"""Standard and adversarial training of any module on any data."""

from advfeat.training._adversarial_fit import adversarial_fit
from advfeat.training._augment import crop_flip
from advfeat.training._fit import fit
from advfeat.training._history import History
from advfeat.training._options import Options

__all__ = ["History", "Options", "adversarial_fit", "crop_flip", "fit"]
