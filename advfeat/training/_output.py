"""Which part of what a model returns are the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from advfeat import checks
from advfeat.model import logit_candidates

Output: TypeAlias = "str | int | Callable[[Any], Tensor]"


class OutputChoice(nn.Module):
    """A model that returns a part of what the module inside returns.

    Parameters
    ----------
    module
        The model.
    output
        A key or an attribute, a position, or a function of what the model returns.
    """

    def __init__(self, module: nn.Module, output: Output) -> None:
        super().__init__()
        self._orig_mod = module  # as torch.compile names it, for `advfeat.model.innermost`
        self.training = module.training
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the part that was chosen."""
        found: Any = self._orig_mod(*args, **kwargs)
        output = self._output
        if callable(output):
            return output(found)
        try:
            if isinstance(output, str) and not isinstance(found, Mapping):
                return getattr(found, output)
            return found[output]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(
                f"output={output!r}: the model returned {_kind(found)}, which has no such part"
            ) from error


def check_output(output: object) -> None:
    """Check that this can choose a part of the output."""
    if not (output is None or isinstance(output, (str, int)) or callable(output)):
        raise TypeError(f"output={output!r}: expected a key, a position or a function")


class OutputInspector(OutputChoice):
    """A model as it is, whose outputs are checked: is what is used as logits the logits?"""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, self._inspect)

    def _inspect(self, found: Any) -> Any:
        tensors = found if isinstance(found, (tuple, list)) else ()
        count = next((len(t) for t in tensors if isinstance(t, Tensor) and t.ndim), 0)
        shapes = logit_candidates(found, count)
        if len(shapes) > 1:
            # Said here, for evaluation says the same without knowing of `output`.
            checks.warn(
                f"the model returns tensors of shapes {' and '.join(map(str, shapes))}; the first "
                "is trained as logits. Pass output=0 if that is right, or the position of the "
                "logits: output=1",
                topic="several outputs",
            )
        return found


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with the keys {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
