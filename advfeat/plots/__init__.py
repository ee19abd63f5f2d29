"""Pictures, with matplotlib (an extra): each function returns a figure and shows nothing.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; lines and bars differ in
dash, marker or hatch as well, so that a figure survives being printed in grey.
"""

from advfeat.plots.axes import (
    COLORS as COLORS,
)
from advfeat.plots.axes import (
    bars,
)
from advfeat.plots.axes import (
    counts as counts,
)
from advfeat.plots.axes import (
    figure_of as figure_of,
)
from advfeat.plots.axes import (
    grouped as grouped,
)
from advfeat.plots.axes import (
    heat_map as heat_map,
)
from advfeat.plots.axes import (
    limits as limits,
)
from advfeat.plots.axes import (
    lines as lines,
)
from advfeat.plots.axes import (
    new_axes as new_axes,
)
from advfeat.plots.axes import (
    new_figure as new_figure,
)
from advfeat.plots.axes import (
    new_panels as new_panels,
)
from advfeat.plots.axes import (
    picture as picture,
)
from advfeat.plots.axes import (
    stretched as stretched,
)
from advfeat.plots.axes import (
    styles as styles,
)
from advfeat.plots.figures import (
    attack_steps,
    curves,
    differences,
    robustness_curves,
    samples,
)
from advfeat.plots.figures import (
    trainings as trainings,
)
from advfeat.plots.figures import (
    usefulness_regions as usefulness_regions,
)

__all__ = ["attack_steps", "bars", "curves", "differences", "robustness_curves", "samples"]
