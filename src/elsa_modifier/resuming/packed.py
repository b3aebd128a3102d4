"""States that hold a weight's entries in few bits, as tensors that can be saved, and parted by the weight's rows.

A single process saves their bytes, which give the same bits back. So do the ranks of FSDP2, each of which has some rows
of a weight (``Shard(0)``) and a state of its own for them, where no byte and no block of entries with one scale is in
two rows. Elsewhere (a vector, a width that a block of 256 does not divide) the ranks save what their bytes mean, which
any number of ranks can read, and which is rounded once more then.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from elsa_modifier.admm.bitmask import pack_bits, unpack_bits
from elsa_modifier.admm.state import ADMMState
from elsa_modifier.training.stochastic_adam import FirstMoment, SecondMoment

__all__ = ["Mask", "Packed", "Pair", "packed_moment", "part_of", "placed_as"]


class Packed(ABC):
    """A state of one parameter, or of this rank's part of one.

    :param parameter: whose state it is; perhaps a DTensor
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    @property
    @abstractmethod
    def parts(self) -> dict[str, tuple[Tensor, int]]:
        """The tensors that it is made of, flat or not, and how many entries of the parameter each element is for."""

    @abstractmethod
    def unpack(self) -> Tensor:
        """What the bytes mean, in the shape of this rank's part of the parameter."""

    @abstractmethod
    def pack_(self, values: Tensor) -> None:
        """Take values as :meth:`unpack` gives them."""

    @abstractmethod
    def whole(self) -> "Packed | None":
        """An empty state of the same kind for the whole parameter, on its device; None if there can be none."""

    @property
    def by_rows(self) -> bool:
        """Whether every element of every part belongs to one row of the parameter, and ranks have whole rows."""
        shape, width = self.parameter.shape, self.parameter.shape[1:].numel()
        placements = self.parameter.placements if isinstance(self.parameter, DTensor) else ()
        if len(shape) < 2 or not width or not all(p.is_replicate() or p.is_shard(0) for p in placements):
            return False
        return all(width % entries == 0 for _, entries in self.parts.values())

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by the ends of their names. Unless they are ``values``, they are the state's own memory."""
        if self.by_rows:
            width = self.parameter.shape[1:].numel()
            return {
                name: placed_as(
                    self.parameter, part.view(-1, width // entries), (self.parameter.shape[0], width // entries)
                )
                for name, (part, entries) in self.parts.items()
            }
        if not isinstance(self.parameter, DTensor):
            return {name: part.view(-1) for name, (part, _) in self.parts.items()}
        return {"values": placed_as(self.parameter, self.unpack(), tuple(self.parameter.shape))}


class Moment(Packed):
    """Of :class:`~elsa_modifier.training.stochastic_adam.StochasticAdam`."""

    def __init__(self, parameter: Tensor, moment: FirstMoment | SecondMoment) -> None:
        super().__init__(parameter)
        self.moment = moment

    @property
    def parts(self) -> dict[str, tuple[Tensor, int]]:
        return {"codes": (self.moment.codes, 1), "scale": (self.moment.scale, self.moment.block)}

    def unpack(self) -> Tensor:
        return self.moment.dequantize()

    def pack_(self, values: Tensor) -> None:
        self.moment.quantize_(values.float())

    def whole(self) -> "Moment":
        empty = torch.empty(self.parameter.shape, device=self.parameter.device)
        return Moment(empty, type(self.moment)(empty))


class LowBit(Packed):
    """Of torchao's optimizers: a tensor subclass, in a DTensor where the parameter is one.

    Whether a moment is in few bits depends on the size of the part. So that ranks agree on what they save, only parts
    of one size are saved as bytes.
    """

    def __init__(self, parameter: Tensor, state: Any) -> None:
        super().__init__(parameter)
        self.state: Any = state.to_local() if isinstance(state, DTensor) else state

    @property
    def parts(self) -> dict[str, tuple[Tensor, int]]:
        # The table of what codes mean is a constant.
        names = [name for name in self.state.__tensor_flatten__()[0] if name != "qmap"]
        parts = {name: getattr(self.state, name) for name in names}
        return {name: (part, self.state.numel() // part.numel()) for name, part in parts.items()}

    @property
    def by_rows(self) -> bool:
        ranks = self.parameter.device_mesh.size() if isinstance(self.parameter, DTensor) else 1
        return super().by_rows and self.parameter.shape[0] % ranks == 0

    def unpack(self) -> Tensor:
        values: Tensor = self.state.dequantize()
        return values.float()

    def pack_(self, values: Tensor) -> None:
        self.state.copy_(values)

    def whole(self) -> "LowBit":
        empty = torch.empty(self.parameter.shape, device=self.parameter.device)
        options = {"block_size": self.state.block_size, "device": empty.device}
        if hasattr(self.state, "signed"):
            options["signed"] = self.state.signed
        return LowBit(empty, type(self.state).zeros(empty.shape, **options))


class Mask(Packed):
    """The mask of an ADMM state."""

    def __init__(self, parameter: Tensor, state: ADMMState) -> None:
        super().__init__(parameter)
        self.state = state

    @property
    def parts(self) -> dict[str, tuple[Tensor, int]]:
        return {"bits": (self.state.bits, 8)}

    def unpack(self) -> Tensor:
        return self.state.mask.to(torch.uint8)

    def pack_(self, values: Tensor) -> None:
        self.state.bits.copy_(pack_bits(values.to(torch.bool)))

    def whole(self) -> "Packed":
        return _Bits(self.parameter)


class _Bits(Packed):
    """A mask that is no state's."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(torch.empty(parameter.shape, device="meta"))
        self._bits = torch.empty(-(-parameter.numel() // 8), dtype=torch.uint8, device=parameter.device)

    @property
    def parts(self) -> dict[str, tuple[Tensor, int]]:
        return {"bits": (self._bits, 8)}

    def unpack(self) -> Tensor:
        return unpack_bits(self._bits, self.parameter.shape).to(torch.uint8)

    def pack_(self, values: Tensor) -> None:
        self._bits.copy_(pack_bits(values.to(torch.bool)))

    def whole(self) -> None:
        return None


class Pair(Packed):
    """``z`` and ``u`` of an ADMM state that stores them. What its bytes mean depends on the mask, which comes first."""

    def __init__(self, parameter: Tensor, state: ADMMState) -> None:
        super().__init__(parameter)
        self.state = state

    @property
    def parts(self) -> dict[str, tuple[Tensor, int]]:
        return self.state.pair_parts

    def unpack(self) -> Tensor:
        return self.state.pair_values()

    def pack_(self, values: Tensor) -> None:
        self.state.write_pair_(values)

    def whole(self) -> None:
        return None


def packed_moment(parameter: Tensor, state: Any) -> Packed | None:
    """What the optimizer keeps of a parameter under one name, if that is in few bits."""
    local = state.to_local() if isinstance(state, DTensor) else state
    if isinstance(local, FirstMoment | SecondMoment):
        return Moment(parameter, local)
    return LowBit(parameter, state) if hasattr(local, "codes") else None


def placed_as(parameter: Tensor, local: Tensor, shape: tuple[int, ...]) -> Tensor:
    """This rank's rows of a tensor of that shape, parted as a parameter's rows are; ``local`` if that is no DTensor."""
    if not isinstance(parameter, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def part_of(parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, and which is parted as a parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    parted = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return parted.to_local()
