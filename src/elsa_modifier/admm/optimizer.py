"""ADMM around any torch optimizer: an x-update in every step, z- and u-updates in some, then a fixed mask."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_modifier.admm.base import BaseSteps
from elsa_modifier.admm.budget import SharedBudget
from elsa_modifier.admm.choosing import Choice, Source, choose, choose_by_magnitude
from elsa_modifier.admm.constraint import Constraint, PrunedWeight, SparsitySchedule
from elsa_modifier.admm.fisher import Projection, SecondMoments
from elsa_modifier.admm.moments import MomentPart, SecondMoment
from elsa_modifier.admm.offloading import KeptState
from elsa_modifier.admm.penalty import PenaltyForm, PenaltySchedule
from elsa_modifier.admm.placement import is_fused
from elsa_modifier.admm.rounding import drawn_key
from elsa_modifier.admm.scores import Scored
from elsa_modifier.admm.selection import WHOLE, Shards
from elsa_modifier.admm.state import ADMMState, Pull, negated_inverse, pull_weight_
from elsa_modifier.admm.storage import BLOCK, Scratch, StateDtype, chunks, in_blocks

__all__ = ["ADMMOptimizer"]


class ADMMOptimizer:
    """Prune while training: ``min f(x)`` subject to ``x`` sparse, by ADMM (arXiv 2510.01650, algorithm 1).

    Call :meth:`step` where the base optimizer's would be called, after clipping. Each step is an x-update, one step of
    the base optimizer on ``f(x) + penalty/2 ||x - z + u||^2``. After the first one, and then after every ``interval``,
    the z- and the u-update follow: ``z <- Proj(x + u)``, ``u <- u + x - z``. At ``freeze_step`` comes a last
    projection. From then on the mask is fixed, the penalty gone, and every weight outside the mask is exactly zero
    after each step.

    In the *coupled* form, the published one, the base optimizer sees the gradient of both terms. In the *decoupled*
    form it steps on ``f`` alone, and then pruned weights lose the fraction ``rho`` of what they are: ``x <- x - rho (x
    - z + u)``, with ``z = x`` on the support. Without a dual, and with a set that tightens, that is gradual pruning for
    ``rho = 1``, and projected gradient descent once the set no longer changes. For a smaller ``rho`` a pruned weight
    settles where the optimizer's step and the pull are equal, which is at 0 as the learning rate goes there: the dual
    that other penalty methods need for that is not missed (docs/method.md).

    A weight that has had no gradient, or none but zeros, is as it was: no step, no pull, no mask. Its mask goes by its
    magnitudes, and is applied in the step of its first gradient if it is fixed by then. ``unreached`` names the weights
    that wait for theirs; telling takes a device synchronization in a step in which one of them has a gradient of zeros.

    ``last_residual`` and ``last_entered`` are the primal residual just before the last projection and how many weights
    entered a mask in it: zero-dimensional tensors on the weights' device.

    Gradients must already be those of the global batch, the same on all ranks that hold the same weights; the penalty
    is never divided by their number. Where weights lie in shards, every rank calls the same methods in the same order,
    and what a sum over ranks is needed for is done once for all weights: in a projection, and in steps in which a
    weight waits for its first gradient.

    :param base: optimizer on ``f``; a Fisher projection needs one that keeps ``exp_avg_sq`` (the Adam family)
    :param weights: the weights to prune
    :param penalty: schedule of ``lam`` (coupled) or ``rho`` (decoupled)
    :param form: see above
    :param dual: in the decoupled form, whether there is one. Its ascent is scaled by how far the pull of the steps
        between two updates takes the x-update, ``1 - (1 - rho)^interval``. The coupled form has a dual always
    :param interval: optimizer steps between z- and u-updates
    :param projection: ``fisher`` weighs entries by the base optimizer's second moment, ``magnitude`` does not
    :param sparsity_schedule: how the constraint tightens; all of it holds at ``freeze_step`` at the latest
    :param budget: see :class:`~elsa_modifier.admm.constraint.Constraint`. As scores of different weights are compared
        then, the second moments are corrected for their bias, and a weight that has none yet takes no part, with the
        entries it brings. The first masks go by magnitude
    :param freeze_step: after how many steps the mask is fixed; 0 fixes the magnitude mask before training
    :param prune_unreached: when the mask is fixed, apply it also to weights without a gradient
    :param state_dtype: what ``z`` and ``u`` are stored in
    :param offload: keep ``z`` and ``u`` and the base optimizer's moments in main memory between uses, where weights
        are on an accelerator
    :param shards: how the weights lie over ranks: every rank has rows of each, in order, or none
    :raises ValueError: for an empty list, an interval below 1, a decoupled penalty outside [0, 1], or a budget that
        is to be shared with an N:M structure or cannot be met within its floor and cap
    """

    def __init__(
        self,
        base: Optimizer,
        weights: Sequence[PrunedWeight],
        *,
        penalty: PenaltySchedule,
        form: PenaltyForm = "decoupled",
        dual: bool = False,
        interval: int = 32,
        projection: Projection = "fisher",
        sparsity_schedule: SparsitySchedule | None = None,
        budget: SharedBudget | None = None,
        freeze_step: int,
        state_dtype: StateDtype = "fp32",
        prune_unreached: bool = False,
        offload: bool = False,
        shards: Shards = WHOLE,
    ) -> None:
        if not weights:
            raise ValueError("there is no weight to prune")
        if interval < 1:
            raise ValueError(f"interval is {interval}; allowed is 1 or more optimizer steps")
        if form == "decoupled" and not 0 <= penalty.value <= 1:
            raise ValueError(f"the decoupled penalty is {penalty.value}; allowed is 0 to 1, a fraction per step")
        self.base = base
        self.weights = list(weights)
        self.penalty = penalty
        self.form = form
        self.interval = interval
        self.projection = projection
        schedule = sparsity_schedule or SparsitySchedule()
        # A mask that is fixed has all the zeros.
        schedule = SparsitySchedule(schedule.name, min(schedule.steps, freeze_step))
        self.shards = shards
        self.constraint = Constraint(self.weights, schedule, budget)
        self.constraint.check()
        self._moments = SecondMoments(base, [w.weight for w in self.weights], projection)
        self.freeze_step = freeze_step
        self.prune_unreached = prune_unreached
        self.step_count = 0
        self.frozen = False
        self.projection_count = 0
        self.last_residual = self.last_entered = torch.zeros(())
        self._device = self.weights[0].weight.device
        largest = max(w.weight.numel() for w in self.weights)
        self._scratch = None if is_fused(self._device) else Scratch(largest, self._device)
        self._ok: Tensor | None = None
        self.kept = KeptState(base, self._device, offload=offload)
        options: dict[str, Any] = {"form": form, "dual": dual, "dtype": state_dtype}
        self.states: list[ADMMState] = []
        # Magnitudes are all that is known at first.
        for w, (bits, keep) in zip(self.weights, choose_by_magnitude(self.constraint, shards), strict=True):
            with self.kept.here(w.weight, changed=True):
                self.states.append(ADMMState(w.weight.detach(), keep, w.structure, first=bits, **options))
                self.kept.add(w.weight, self.states[-1].pair)
        self._state_of = {id(w.weight): state for w, state in self._pairs()}
        self._reached: set[int] = set()
        self._base_steps = BaseSteps(base)
        if freeze_step <= 0:
            self._freeze()

    @torch.no_grad()
    def step(self, ok: Tensor | None = None) -> None:
        """One x-update, and the z- and u-updates if it is time.

        :param ok: zero-dimensional bool on the weights' device, where :attr:`can_skip`: if it is False, which the host
            need not know yet, the x-update changes neither weights nor moments
        :raises ValueError: if a projection meets weights or moments that are not finite, or finds no second moment
        """
        self._ok = ok
        try:
            with self._base_steps.unless_not(ok):
                weights = [pruned.weight for pruned in self.weights]
                if not self.kept.moves:
                    self._update_x(weights, partial(self._base_steps.step, self._pull_of))
                else:
                    self._note_gradients(weights)
                    for parameter in self._base_steps.parameters():
                        self.step_parameter(parameter)
        finally:
            self._ok = None
        self.end_step()

    @property
    def can_skip(self) -> bool:
        """Whether the base optimizer can leave all as it is because of a value that is on its device."""
        return self._base_steps.can_skip

    @torch.no_grad()
    def step_parameter(self, parameter: nn.Parameter) -> None:
        """The part of the x-update that belongs to one of the base optimizer's parameters, which has its gradient.

        With gradient release each parameter takes its step as soon as its gradient is there; :meth:`end_step` follows
        when all have.
        """
        of_parameter = [parameter] if id(parameter) in self._state_of else []
        with self.kept.here(parameter, changed=True):
            self._update_x(of_parameter, partial(self._base_steps.step_of, parameter, self._pull_of))

    @torch.no_grad()
    def end_step(self) -> None:
        """Count the step, and update z and u or fix the mask if it is time; :meth:`step` does this itself."""
        self.step_count += 1
        self._base_steps.end_step()
        if self.frozen:
            return
        if self.step_count >= self.freeze_step:
            self.project()
            self._freeze()
        elif self.step_count % self.interval == 1 % self.interval:
            self.project()

    def _update_x(self, weights: Sequence[nn.Parameter], base_step: Callable[[], None]) -> None:
        """One step on ``f(x) + penalty/2 ||x - z + u||^2``; once the mask is fixed, on ``f`` inside it."""
        self._note_gradients(weights)
        reached = [w for w in weights if self._is_reached(w)]
        penalty = self.penalty(self.step_count)
        if self.form == "coupled" and not self.frozen and penalty > 0:
            for weight in reached:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                self._state_of[id(weight)].add_proximal_gradient_(weight.grad, weight, penalty, self._scratch)
        base_step()
        for weight in reached:
            if not self._base_steps.rounds_once or weight.grad is None:  # otherwise it has been done in the base step
                self._constrain(weight)

    def _constrain(self, weight: Tensor) -> None:
        """What the x-update adds to the base optimizer's step: the decoupled pull, or the fixed mask."""
        for start, end in chunks(weight.numel(), weight.device):
            pull = self._pull_of(weight, start, end)
            if pull is not None:
                entries = in_blocks(weight.detach().view(-1)[start:end])
                noise = drawn_key() if is_fused(weight.device) else None
                pull_weight_(entries, pull, noise, self._ok, is_mask=self.frozen)

    def _pull_of(self, parameter: Tensor, start: int, end: int, block: int = BLOCK) -> Pull | None:
        """The same, of a part of a weight; None if there is nothing."""
        state = self._state_of.get(id(parameter))
        if state is None:
            return None
        if self.frozen:
            return state.mask_out(start, end, self._scratch)
        if self.form == "decoupled" and (penalty := self.penalty(self.step_count)) > 0:
            return state.pull(start, end, penalty, self._scratch, block)
        return None

    def project(self) -> None:
        """The z- and u-updates of all weights; :meth:`step` calls this when it is time."""
        # The dual is scaled for the step to come. With a schedule from 0 the first one has no penalty to be scaled for.
        penalty = self.penalty(self.step_count)
        ascent = 1.0 if self.form == "coupled" else 1.0 - (1.0 - penalty) ** self.interval
        residual = self.residual()
        # z <- Proj(x + u), u <- u + x - z
        choices = self._choose(penalty)
        entered = []
        for (pruned, state), choice in zip(self._pairs(), choices, strict=True):
            own = self._own_penalty(pruned, penalty)
            try:
                with self.kept.here(pruned.weight, changed=state.pair is not None):
                    if is_fused(self._device):
                        entered.append(state.move_to(choice.bits(), pruned.weight, own, ascent=ascent))
                    else:
                        options: dict[str, Any] = {"ascent": ascent, "select": choice.mask}
                        fisher = self._moments.fisher(pruned.weight)
                        entered.append(state.update(pruned.weight, own, fisher, self._scratch, **options))
            except ValueError as error:
                raise ValueError(f"projection of {pruned.name} at step {self.step_count}: {error}") from error
        self.projection_count += 1
        self.last_residual, self.last_entered = residual, self._added_up(torch.stack(entered).sum())

    def _choose(self, penalty: float) -> list[Choice]:
        """Decide how many entries of each weight the projection at this penalty keeps, and how its mask is chosen."""
        sharing = [i for i, w in enumerate(self.weights) if self._is_reached(w.weight)]
        demand = self.constraint.demand(self.step_count, sharing)
        # Asked for again in each pass: the moments of all weights, dequantized, may not fit in memory.
        corrections: Sequence[float | Tensor | None] = [None] * len(self.weights)
        if self.constraint.budget is not None:
            corrections = self._moments.bias_corrections()
        sources = [
            Source(
                partial(self._scores, i, penalty),
                partial(self._scored, i, penalty, by),
                w.structure,
                by,
                partial(self.kept.here, w.weight, changed=False),
            )
            for i, (w, by) in enumerate(zip(self.weights, corrections, strict=True))
        ]
        try:
            choices, keeps = choose(self.constraint, demand, sources, self.shards, self._device)
        except ValueError as error:
            raise ValueError(f"projection at step {self.step_count}: {error}") from error
        for state, keep in zip(self.states, keeps, strict=True):
            state.keep = keep
        return choices

    def _scores(self, number: int, penalty: float) -> Tensor:
        pruned = self.weights[number]
        own, fisher = self._own_penalty(pruned, penalty), self._moments.fisher(pruned.weight)
        return self.states[number].scores(pruned.weight, own, fisher, self._scratch)

    def _scored(self, number: int, penalty: float, correction: float | Tensor | None) -> list[Scored]:
        """What the same is computed from, of each part of a weight on an accelerator."""
        pruned, state = self.weights[number], self.states[number]
        weight, inverse = pruned.weight.detach().view(-1), negated_inverse(self._own_penalty(pruned, penalty))
        moment = self._moments.of(pruned.weight)
        found = []
        for start, end in chunks(weight.numel(), weight.device):
            block = BLOCK
            fisher: Tensor | MomentPart | None = None
            if isinstance(moment, SecondMoment):
                block, fisher = moment.block, moment.part(start, end)
            elif moment is not None:
                fisher = in_blocks(moment.reshape(-1)[start:end])
            x = in_blocks(weight[start:end], block)
            found.append(Scored(x, state.part(start, end, block), inverse, fisher, correction))
        return found

    def _own_penalty(self, pruned: PrunedWeight, penalty: float) -> float:
        # Without a gradient there is no pull, and so no dual.
        return penalty if self._is_reached(pruned.weight) else 0.0

    def _added_up(self, sums: Tensor) -> Tensor:
        """Over ranks, if weights lie in shards; what there is one rank for is left where it is."""
        return sums if self.shards.count == 1 else self.shards.add(sums.detach())

    def _freeze(self) -> None:
        self.frozen = True
        with torch.no_grad():
            for pruned, state in self._pairs():
                if self.prune_unreached or self._is_reached(pruned.weight):
                    self._apply_mask_(pruned.weight, state)

    @torch.no_grad()
    def mask_gradient_(self, parameter: nn.Parameter) -> None:
        """Once the mask is fixed, zero the gradient outside it, in place: it can move nothing.

        Before the gradients' norm is taken, of which it would be a part, and by which the rest is clipped.
        """
        state = self._state_of.get(id(parameter))
        if self.frozen and state is not None and parameter.grad is not None:
            self._apply_mask_(parameter.grad, state)

    def _apply_mask_(self, tensor: Tensor, state: ADMMState) -> None:
        for start, end in chunks(tensor.numel(), tensor.device):
            entries = in_blocks(tensor.detach().view(-1)[start:end])
            pull_weight_(entries, state.mask_out(start, end, self._scratch), None, None, is_mask=True)

    def _note_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """Find first gradients, and drop zeros before them, of which base optimizers would make steps and moments."""
        waiting = [w for w in weights if w.grad is not None and not self._is_reached(w)]
        if not waiting:
            return
        found = self._added_up(torch.stack([w.grad.any() for w in waiting if w.grad is not None]).long()).tolist()
        for weight, is_first in zip(waiting, found, strict=True):
            if is_first:
                self._reached.add(id(weight))
            else:
                weight.grad = None

    def _is_reached(self, weight: Tensor) -> bool:
        return id(weight) in self._reached

    def zero_grad(self) -> None:
        """Drop all gradients of the base optimizer's parameters."""
        self.base.zero_grad(set_to_none=True)

    def progress(self) -> dict[str, Any]:
        """How far it is, in JSON's types: with weights, moments and ``states``, all that it takes to go on."""
        return {
            "step_count": self.step_count,
            "frozen": self.frozen,
            "projection_count": self.projection_count,
            "keeps": [state.keep for state in self.states],
            "unreached": self.unreached,
        }

    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        """Be as far as another optimizer on weights of the same names was."""
        self.step_count = progress["step_count"]
        self.frozen = progress["frozen"]
        self.projection_count = progress["projection_count"]
        for state, keep in zip(self.states, progress["keeps"], strict=True):
            state.keep = keep
        self._reached = {id(w.weight) for w in self.weights if w.name not in progress["unreached"]}

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Kept entries by weight name, bool; of ``unreached`` weights too, to which they may never be applied."""
        return {w.name: s.mask for w, s in self._pairs()}

    @property
    def unreached(self) -> list[str]:
        """The weights that have had no gradient, in order."""
        return [w.name for w in self.weights if not self._is_reached(w.weight)]

    @property
    def state_nbytes(self) -> int:
        """Bytes of ADMM state, over all weights (the base optimizer's moments not counted)."""
        return sum(state.nbytes for state in self.states)

    @property
    def sparsity(self) -> float:
        """Fraction of entries that the masks leave out, over the weights that they are applied to once fixed."""
        held = [(w, s) for w, s in self._pairs() if self.prune_unreached or self._is_reached(w.weight)]
        return 1.0 - sum(s.keep for _, s in held) / sum(w.size for w, _ in held) if held else 0.0

    def residual(self) -> Tensor:
        """Relative primal residual ``||x - z|| / ||x||`` over all weights with a gradient: zero-dimensional fp32."""
        sums = torch.zeros(2, device=self.weights[0].weight.device)
        for pruned, state in self._pairs():
            if self._is_reached(pruned.weight):
                with self.kept.here(pruned.weight, changed=False) if self.form == "coupled" else nullcontext():
                    sums += state.residual_sums(pruned.weight.detach(), self._scratch)
        if self.shards.count > 1:
            sums = self._added_up(sums.double()).float()
        return (sums[0] / sums[1].clamp_min(torch.finfo(torch.float32).tiny)).sqrt()

    def _pairs(self) -> list[tuple[PrunedWeight, ADMMState]]:
        return list(zip(self.weights, self.states, strict=True))
