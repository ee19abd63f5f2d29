"""Put a normalisation inside of a model, so that it takes inputs in the bounds of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """A model that takes inputs in [0, 1] and normalises them by channel itself.

    Then attacks and bounds are in the units of the data: eps=8/255 is 8 levels of a pixel. The
    model inside gets normalized inputs, as in its training.

    Parameters
    ----------
    model
        Any module; further arguments of a call are passed on to it.
    mean, std
        A number, or one for each channel, the axis after the sample.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> inner = torch.nn.Flatten()
    >>> model = af.Normalize(inner, mean=[0.5, 0.0], std=[0.5, 1.0])
    >>> model(torch.ones(1, 2, 1, 1))
    tensor([[1., 1.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: float | Sequence[float] | Tensor,
        std: float | Sequence[float] | Tensor,
    ) -> None:
        super().__init__()
        self.model = model
        for name, value in (("mean", mean), ("std", std)):
            like = next(model.parameters(), torch.zeros((), dtype=torch.float32, device="cpu"))
            tensor = torch.as_tensor(value, dtype=torch.float32, device=like.device).flatten()
            if name == "std" and not bool((tensor > 0).all()):
                raise ValueError(f"std={value!r}: every value must be above 0")
            # Not saved: checkpoints of the model inside and of this one have the same entries.
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the model on ``(inputs - mean) / std``."""
        shape = (-1, *(1,) * (inputs.ndim - 2))
        mean, std = self.mean.to(inputs.dtype), self.std.to(inputs.dtype)
        if mean.numel() not in (1, inputs.shape[1]):
            raise ValueError(
                f"mean: {mean.numel()} values for inputs of {inputs.shape[1]} channels"
            )
        return self.model((inputs - mean.view(shape)) / std.view(shape), *args, **kwargs)
