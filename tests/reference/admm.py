"""The method as it is written on paper: slow, obvious, two tensors. What ``elsa_modifier.admm`` must agree with."""

import math

import torch
from torch import Tensor


def keep_mask(scores: Tensor, keep: int, group: tuple[int, int] | None = None) -> Tensor:
    """Kept entries by Python's own stable sort: largest first, ties to the lower index. ``group`` is (zeroed, size).

    Where more are to be kept than the groups leave, the largest of the others join them.
    """
    if group is not None:
        zeroed, size = group
        rows = [keep_mask(part, size - zeroed) for part in scores.reshape(-1, size)]
        mask = torch.stack(rows).reshape(scores.shape) if rows else torch.zeros(scores.shape, dtype=torch.bool)
        others = (~mask).flatten().nonzero().squeeze(1).tolist()
        others.sort(key=lambda i: -scores.flatten()[i].item())
        joining = others[: max(0, keep - int(mask.sum()))]
        mask.view(-1)[joining] = True
        return mask
    values = scores.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: -values[i])
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.reshape(scores.shape)


def fisher_scores(v: Tensor, fisher: Tensor) -> Tensor:
    """What ranks as ``F v^2``; a Fisher of 0 is the smallest normal number, so that magnitudes decide there."""
    return torch.where(fisher > 0, fisher, torch.full_like(fisher, 2.0**-126)).sqrt() * v.abs()


def stored(values: Tensor, dtype: str, block: int = 256) -> Tensor:
    """What is read back of fp32 values written in a low-precision format, block by block."""
    if dtype == "fp32":
        return values
    if dtype == "bf16":
        return values.bfloat16().float()
    largest = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}[dtype]
    flat, result = values.flatten(), []
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        scale = part.abs().max() / largest
        if scale == 0:
            result.append(part)
        elif dtype == "int8":
            result.append((part / scale).round() * scale)
        else:
            result.append((part / scale).to(getattr(torch, dtype)).float() * scale)
    return torch.cat(result).view_as(values) if result else values


def entries_kept(size: int, keep: int, step: int, schedule: str, steps: int) -> int:
    """Sparsity schedules, each written out: how many of ``size`` entries stay, of which ``keep`` do in the end."""
    if step >= steps:
        return keep
    part = {"constant": 1.0, "linear": step / steps, "cubic": 1 - ((steps - step) / steps) ** 3}[schedule]
    return size - round(part * (size - keep))


def penalty_at(step: int, value: float, schedule: str, steps: int) -> float:
    """Penalty schedules, each written out."""
    if step >= steps:
        return value
    return {
        "constant": value,
        "linear": value * step / steps,
        "cosine": value * 0.5 * (1 - math.cos(math.pi * step / steps)),
        "exponential": value / 1000 * 1000 ** (step / steps),
    }[schedule]


class TwoTensorADMM:
    """z and u of one weight, both dense; u rescaled at every step so that lam * u stays what it was."""

    def __init__(
        self,
        x: Tensor,
        keep: int,
        group: tuple[int, int] | None = None,
        *,
        form: str,
        dual: bool = True,
        dtype: str = "fp32",
    ) -> None:
        self.keep, self.group, self.dtype = keep, group, dtype
        self.free_support, self.dual = form == "decoupled", dual or form == "coupled"
        self.mask = keep_mask(x.abs(), keep, group)
        self.z = stored(x * self.mask, dtype)
        self.u = torch.zeros_like(x)
        self.penalty = 0.0

    def set_penalty(self, penalty: float) -> None:
        if self.penalty > 0 and penalty > 0:
            self.u = self.u * (self.penalty / penalty)
        self.penalty = penalty

    def follow(self, x: Tensor) -> None:
        """Partial minimization over z for the fixed support."""
        if self.free_support:
            self.z = torch.where(self.mask, x, torch.zeros_like(x))

    def gap(self, x: Tensor, penalty: float) -> Tensor:
        """x - z + u at a penalty."""
        self.set_penalty(penalty)
        self.follow(x)
        return x - self.z + self.u

    def pull(self, x: Tensor, penalty: float) -> Tensor:
        return x - penalty * self.gap(x, penalty)

    def proximal_gradient(self, x: Tensor, penalty: float) -> Tensor:
        return penalty * self.gap(x, penalty)

    def update(self, x: Tensor, penalty: float, fisher: Tensor | None = None, ascent: float = 1.0) -> None:
        self.set_penalty(penalty)
        v = x + self.u
        scores = v.abs() if fisher is None else fisher_scores(v, fisher)
        self.mask = keep_mask(scores, self.keep, self.group)
        self.z = stored(v * self.mask, self.dtype)
        u = (v - (1 - ascent) * x) * ~self.mask
        self.u = stored(penalty * u, self.dtype) / penalty if penalty > 0 and self.dual else torch.zeros_like(u)
