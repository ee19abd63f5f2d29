"""The whole paper in one call, on the user's own model and data; every stage can be resumed."""

from advfeat.study._calibrate import calibrate
from advfeat.study._calibration import Calibration
from advfeat.study._comparison import Comparison
from advfeat.study._recipe import Recipe
from advfeat.study._result import Study
from advfeat.study._run import run

__all__ = ["Calibration", "Comparison", "Recipe", "Study", "calibrate", "run"]
