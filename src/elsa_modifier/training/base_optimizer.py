"""The optimizer that ADMM is built around: torch's Adam, our own with moments in 8 bits, or torchao's in 8 or 4."""

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from loguru import logger
from torch import nn
from torch.optim import Optimizer

from elsa_modifier.admm.rounding import Place
from elsa_modifier.training.stochastic_adam import StochasticAdam

__all__ = ["LOW_BIT_OPTIMIZERS", "OFFLOADED_OPTIMIZERS", "OptimizerName", "build_base_optimizer", "check_optimizer"]

OptimizerName = Literal["adam", "adamw", "adam8bit_sr", "adam8bit", "adam4bit", "adamfp8"]

_TORCH = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_TORCHAO = {"adam8bit": "Adam8bit", "adam4bit": "Adam4bit", "adamfp8": "AdamFp8"}
OFFLOADED_OPTIMIZERS: tuple[OptimizerName, ...] = ("adam", "adamw", "adam8bit_sr")
LOW_BIT_OPTIMIZERS: tuple[OptimizerName, ...] = ("adam8bit_sr", "adam8bit", "adam4bit", "adamfp8")


def check_optimizer(name: OptimizerName) -> None:
    """Refuse what cannot be built here.

    :raises ValueError: if the optimizer needs torchao and it is not installed
    """
    if name in _TORCHAO and importlib.util.find_spec("torchao") is None:
        raise ValueError(
            f"optimizer is {name!r}, which needs torchao: pip install 'elsa-modifier[torchao]', or use adam8bit_sr"
        )


def build_base_optimizer(
    name: OptimizerName,
    parameters: list[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    seed: int | None = None,
    places: Sequence[Place] | None = None,
) -> Optimizer:
    """An optimizer on ``parameters``, all on one device. bf16 parameters are rounded stochastically.

    torchao compiles its step for each shape of a parameter. On a CPU that takes a C++ compiler and, for the ones in
    integers, some seconds a shape, but makes a step several times as fast; fp8's step gains little and is not compiled
    (docs/results/optimizer_step.md).

    :param seed: of the noise of stochastic rounding, and ``places``: see
        :class:`~elsa_modifier.training.stochastic_adam.StochasticAdam`. torchao draws from torch's generator
    :raises ValueError: see :func:`check_optimizer`
    """
    check_optimizer(name)
    device = parameters[0].device.type
    if name in _TORCH:
        adam: Optimizer = _TORCH[name](parameters, lr=lr, betas=betas, fused=device in ("cpu", "cuda"))
        return adam
    if name == "adam8bit_sr":
        return StochasticAdam(parameters, lr=lr, betas=betas, seed=seed, places=places)
    from torchao import optim

    make = getattr(optim, _TORCHAO[name])
    if name == "adam4bit":
        logger.warning(
            "adam4bit tells second moments apart in 16 even steps, none of them 0, which has about doubled "
            "perplexity; adam8bit_sr takes one byte more a weight."
        )
    if device == "cpu":
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if name != "adamfp8" and not compiler:
            logger.warning(f"No C++ compiler was found: steps of {name} will be slow. On a CPU adamfp8 needs none.")
        if name == "adamfp8" or not compiler:
            make = _uncompiled(make)
    built: Optimizer = make(parameters, lr=lr, betas=betas, bf16_stochastic_round=True)
    return built


def _uncompiled(base: type[Any]) -> type[Any]:
    class Uncompiled(base):
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    Uncompiled.__name__ = base.__name__
    return Uncompiled
