"""SAFE and SAFE+: sparse and flat minima by ADMM around sharpness-aware steps (Lee et al., arXiv 2506.06866).

This is the form of the paper's language models: one decoder layer after the other, each trained to give what it gave
dense on the outputs of those that are pruned already. Every layer is trained anew on the same sequences, two forward
and two backward passes a step: ``epochs`` times twice the work of the methods that train the whole model once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, get_scheduler

from elsa_modifier.admm import sparse_mask
from elsa_modifier.training.data import batches_from_calibration
from elsa_modifier.training.model_state import trainable
from elsa_modifier.training.precision import multiplies_bf16

__all__ = ["SAFEModifier", "SplitWeight", "sharpness_aware_gradients_"]

Run = Callable[[Tensor], Tensor]


def sharpness_aware_gradients_(parameters: list[nn.Parameter], loss_of: Callable[[], Tensor], *, radius: float) -> None:
    """Gradients where the loss, to first order, is highest within a radius of the parameters, which stay as they are.

    :param parameters: of any shapes; those that have no part in the loss keep having no gradient
    :param loss_of: the loss, zero-dimensional; called twice
    :param radius: of the ball around all of them together
    """
    loss_of().backward()
    there = [(p, p.detach().clone(), p.grad) for p in parameters if p.grad is not None]
    scale = radius / nn.utils.get_total_norm([gradient for _, _, gradient in there]).clamp_min(1e-12)
    for parameter, value, gradient in there:
        parameter.data = value + scale * gradient
        parameter.grad = None
    loss_of().backward()
    for parameter, value, _ in there:
        parameter.data = value


class SplitWeight:
    """A weight ``x``, its sparse copy ``z`` and the scaled dual ``u``.

    :param weight: (out, in), fp32
    :param keep: how many entries of ``z`` may differ from 0
    :param scale: of the columns, (in,): the projection keeps the largest ``|v| scale``
    """

    def __init__(self, weight: Tensor, keep: int, scale: Tensor | None) -> None:
        self.weight, self._keep, self._scale = weight, keep, scale
        self.z = self.projected(weight.detach())
        self.u = torch.zeros_like(self.z)

    def projected(self, v: Tensor) -> Tensor:
        """The entries of ``v`` that are kept, 0 elsewhere."""
        scores = v.abs() if self._scale is None else v.abs() * self._scale
        return v * sparse_mask(scores, self._keep)

    def add_penalty_gradient_(self, penalty: float) -> None:
        """Of ``penalty / 2 ||x - z + u||^2``, added to what the optimizer will see."""
        assert self.weight.grad is not None
        self.weight.grad.add_(self.weight.detach() - self.z + self.u, alpha=penalty)

    def update_(self) -> None:
        """The z- and the u-update."""
        v = self.weight.detach() + self.u
        self.z = self.projected(v)
        self.u = v - self.z

    def finish_(self) -> None:
        """Make the weight sparse."""
        self.weight.data.copy_(self.projected(self.weight.detach()))


class SAFEModifier(Modifier):
    """
    SAFE, or SAFE+, with the settings that the paper has for language models of 7B and more; smaller layers may want
    another ``lr``, ``penalty`` and ``radius``.

    :param sparsity: fraction of zeros in every Linear of every decoder layer
    :param steps: with ``batch_size``, how many sequences: as many as the methods see which train so many steps
    :param batch_size: sequences a step; the paper has 8
    :param sequence_length: tokens a sequence
    :param lr: peak learning rate, rising linearly from and falling linearly to 0, for every layer anew
    :param epochs: over the sequences, for every layer
    :param warmup_epochs: of these, those over which the learning rate rises
    :param penalty: ``lam``: coupled, its gradient goes through Adam
    :param radius: of the sharpness-aware perturbation, over all parameters of a layer
    :param interval: steps between z- and u-updates
    :param activation: SAFE+: the projection weighs entries by the norms of their inputs
    :param seed: of the order of the data
    """

    sparsity: float
    steps: int
    batch_size: int
    sequence_length: int
    lr: float = 2e-4
    epochs: int = 30
    warmup_epochs: int = 2
    penalty: float = 1e-3
    radius: float = 2e-4
    interval: int = 32
    activation: bool = False
    seed: int = 0

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Nothing is done before the run."""
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Prune layer after layer."""
        model, device = state.model, get_main_device()
        batches = batches_from_calibration(
            state.data.calib,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulation=1,
            length=self.sequence_length,
            separator=model.config.get_text_config().eos_token_id,
            seed=self.seed,
        )
        ids = [batches.micro_batches(step)[0]["input_ids"].to(device) for step in range(self.steps)]
        layers = [layer for _, layer in match_named_modules(model, infer_sequential_targets(model))]
        with trainable(model, device), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model.eval()
            hidden, arguments = _inputs_of_layers(model, layers, ids)
            for layer, extra in zip(tqdm(layers, desc="SAFE", unit="layer"), arguments, strict=True):
                hidden = self._prune_layer(layer, _runner(layer, extra), hidden)

    def _prune_layer(self, layer: nn.Module, run: Run, inputs: list[Tensor]) -> list[Tensor]:
        """Train and prune a layer; its outputs afterwards, as ``inputs``: a tensor (batch, length, width) a batch."""
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        norms, hooks = _input_norms(linears)
        targets = _without_gradients(run, inputs)
        for hook in hooks:
            hook.remove()
        splits = [
            SplitWeight(
                linear.weight,
                linear.weight.numel() - round(self.sparsity * linear.weight.numel()),
                norms[linear].sqrt() if self.activation else None,
            )
            for linear in linears
        ]
        parameters = list(layer.parameters())
        adam = torch.optim.Adam(parameters, lr=self.lr, betas=(0.9, 0.95), fused=True)
        schedule = get_scheduler(
            "linear",
            adam,
            num_warmup_steps=self.warmup_epochs * len(inputs),
            num_training_steps=self.epochs * len(inputs),
        )
        order = [int(i) for _ in range(self.epochs) for i in torch.randperm(len(inputs))]
        for step, index in enumerate(order, start=1):
            sharpness_aware_gradients_(
                parameters,
                lambda index=index: F.mse_loss(run(inputs[index]).float(), targets[index]),  # type: ignore[misc]
                radius=self.radius,
            )
            for split in splits:
                split.add_penalty_gradient_(self.penalty)
            adam.step()
            adam.zero_grad()
            schedule.step()
            if step % self.interval == 0:
                for split in splits:
                    split.update_()
        for split in splits:
            split.finish_()
        return _without_gradients(run, inputs)


def _runner(layer: nn.Module, extra: tuple[tuple[Any, ...], dict[str, Any]]) -> Run:
    def run(hidden: Tensor) -> Tensor:
        # Entered anew for each call: it keeps what weights were cast to until it is left.
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=multiplies_bf16(hidden.device)):
            found = layer(hidden, *extra[0], **extra[1])
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    return run


@torch.no_grad()
def _without_gradients(run: Run, inputs: list[Tensor]) -> list[Tensor]:
    return [run(batch).float() for batch in inputs]


@torch.no_grad()
def _inputs_of_layers(
    model: PreTrainedModel, layers: list[nn.Module], ids: list[Tensor]
) -> tuple[list[Tensor], list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Hidden states (batch, length, width) before the first layer, and what else each layer is called with.

    The latter is the same for all batches, which are of one size and have no padding.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    for batch in ids:
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    hidden = [args[0] for args, _ in seen[:: len(layers)]]
    return hidden, [(args[1:], kwargs) for args, kwargs in seen[: len(layers)]]


def _input_norms(linears: list[nn.Linear]) -> tuple[dict[nn.Module, Tensor], list[Any]]:
    """Sums of squares of each input (in,), filled by hooks while they stay."""
    sums: dict[nn.Module, Tensor] = {linear: torch.zeros_like(linear.weight[0]).detach() for linear in linears}

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums[module] += args[0].float().square().flatten(0, -2).sum(0)

    return sums, [linear.register_forward_pre_hook(add) for linear in linears]
