"""Everything to know about the robustness of one trained model, in one call."""

from advfeat.metrics._report._result import Report, report
from advfeat.metrics._report._verdict import Verdict

__all__ = ["Report", "Verdict", "report"]
