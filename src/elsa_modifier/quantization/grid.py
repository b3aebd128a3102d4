"""The values that each entry of a weight may be quantized to."""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType, fake_quantize
from compressed_tensors.quantization.utils import calculate_range
from torch import Tensor

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of some entries, in the entries' shape; indexed as the entries are.

    :param scales: fp32
    :param zero_points: fp32, or None: zero
    :param limits: of integers, or None: not integers, and compressed-tensors rounds them
    """

    args: QuantizationArgs
    scales: Tensor
    zero_points: Tensor | None
    limits: tuple[float, float] | None

    @classmethod
    def of(cls, args: QuantizationArgs, scales: Tensor, zero_points: Tensor | None) -> "Grid":
        limits = None
        if args.type == QuantizationType.INT:
            low, high = calculate_range(args, "cpu")
            limits = float(low), float(high)
        return cls(args, scales.float(), None if zero_points is None else zero_points.float(), limits)

    def __getitem__(self, index: Any) -> "Grid":
        zero_points = None if self.zero_points is None else self.zero_points[index]
        return replace(self, scales=self.scales[index], zero_points=zero_points)

    def transposed(self) -> "Grid":
        """The grid of the transposed weight, contiguous."""
        zero_points = None if self.zero_points is None else self.zero_points.T.contiguous()
        return replace(self, scales=self.scales.T.contiguous(), zero_points=zero_points)

    def round(self, values: Tensor) -> Tensor:
        """Values (of the grid's shape, fp32) quantized and dequantized, fp32."""
        if self.limits is None:
            one_by_one: Any = copy(self.args)
            one_by_one.strategy = QuantizationStrategy.CHANNEL
            columns = [None if t is None else t.reshape(-1, 1) for t in (values, self.scales, self.zero_points)]
            rounded: Tensor = fake_quantize(*columns, one_by_one)
            return rounded.view_as(values)
        # What compressed-tensors does to integers, in a sixth of the time on a column of a weight.
        scaled = values / self.scales
        if self.zero_points is not None:
            scaled += self.zero_points
        scaled.clamp_(*self.limits).round_()
        if self.zero_points is not None:
            scaled -= self.zero_points
        return scaled.mul_(self.scales)
