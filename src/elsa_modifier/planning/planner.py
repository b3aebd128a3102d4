"""The plan of a run: a model's configuration and a modifier's fields to bytes, operations and hours."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from elsa_modifier.modifier import ELSAModifier
from elsa_modifier.planning.activations import MicroBatchPeak, fake_model, trace_micro_batch
from elsa_modifier.planning.memory import MemoryPlan, ModelShape, held_bytes, offloaded_bytes, projection_temporaries
from elsa_modifier.planning.settings import RunSettings
from elsa_modifier.training.layers import decoder_layers
from elsa_modifier.training.run import usable_sequence_length

__all__ = ["Plan", "Planner"]

# Some hundred times the largest weights there are.
_LARGEST_PARAMETER = 2**40


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes.

    :param memory: on each GPU
    :param offloaded: bytes of main memory, of what is brought to the GPU in each step and back
    :param parameters: entries of all parameters, tied ones once
    :param pruned: entries of the pruned weights
    :param capacity: bytes of each GPU
    :param tflops: what each GPU is assumed to sustain, 10^12 operations a second
    """

    settings: RunSettings
    memory: MemoryPlan
    offloaded: int
    parameters: int
    pruned: int
    gpus: int
    capacity: int
    tflops: float

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.memory.total <= self.capacity

    @property
    def tokens(self) -> int:
        """Tokens of the whole run: ``batch_size`` counts over all GPUs."""
        s = self.settings
        return s.steps * s.batch_size * s.gradient_accumulation_steps * s.sequence_length

    @property
    def sequences(self) -> int:
        """Of a micro-batch, on the GPU that has most of them."""
        return -(-self.settings.batch_size // self.gpus)

    @property
    def flops(self) -> int:
        """Of forward and backward, 6 a parameter and token; 2 more if layers run forward twice, 2 for a teacher."""
        s = self.settings
        return (6 + 2 * s.activation_checkpointing + 2 * s.objective.has_teacher) * self.parameters * self.tokens

    @property
    def hours(self) -> float:
        """Time of the run at the assumed throughput."""
        return self.flops / (self.gpus * self.tflops * 1e12) / 3600


class Planner:
    """Plans runs of one model on given GPUs.

    Several GPUs share weights, gradients, moments and ADMM state evenly (FSDP2, every layer sharded); each computes
    with whole layers, in the dtype of the matrix products, on its part of the batch.

    :param capacity: bytes of each GPU
    :param tflops: what each GPU sustains, 10^12 operations a second
    :param device: kind of device; buffers of a CPU are smaller
    :raises ValueError: if transformers makes no causal language model of the configuration, or one with a parameter
        that is empty or larger than any
    """

    def __init__(
        self, config: PreTrainedConfig, *, gpus: int, capacity: int, tflops: float, device: str = "cuda"
    ) -> None:
        self._config = config
        self._gpus = gpus
        self._capacity = capacity
        self._tflops = tflops
        self._device = torch.device(device)
        self._model = fake_model(config)
        _check_parameters(self._model)
        self._traces: dict[tuple[RunSettings, torch.dtype], MicroBatchPeak] = {}

    def plan(self, modifier: ELSAModifier) -> Plan:
        """The plan of a modifier's run.

        :raises ValueError: if the modifier cannot prune this model
        :raises RuntimeError: if the model's code cannot be run without data
        """
        settings = RunSettings.of(
            modifier, sequence_length=usable_sequence_length(modifier.sequence_length, self._model)
        )
        if settings.offload_state and self._gpus > 1:
            raise ValueError("offload_state is for one GPU; several share moments and ADMM state between them")
        shape = self._shape(modifier)
        return Plan(
            settings=settings,
            memory=self._memory(shape, settings),
            offloaded=offloaded_bytes(shape, settings),
            parameters=shape.total,
            pruned=sum(shape.pruned),
            gpus=self._gpus,
            capacity=self._capacity,
            tflops=self._tflops,
        )

    def _shape(self, modifier: ELSAModifier) -> ModelShape:
        layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(self._model)]
        parameters = list(self._model.parameters())
        return ModelShape(
            parameters=tuple(tuple(p.shape) for p in parameters),
            pruned=tuple(target.weight.numel() for target in modifier._find_targets(self._model)),
            largest_layer=max(layers, default=0),
            outside_layers=sum(p.numel() for p in parameters) - sum(layers),
        )

    def _memory(self, shape: ModelShape, settings: RunSettings) -> MemoryPlan:
        whole = held_bytes(shape, settings, self._device)
        share = MemoryPlan(
            weights=whole.weights // self._gpus,
            gradients=whole.gradients // self._gpus,
            optimizer=whole.optimizer // self._gpus,
            teacher=whole.teacher // self._gpus,
            admm_state=whole.admm_state // self._gpus,
            activations=0,
            gathered=0 if self._gpus == 1 else _gathered(shape, settings),
        )
        # Only the layers that are put together are computed with, in the dtype of the products.
        dtype = settings.weights if self._gpus == 1 else settings.compute
        own = replace(settings, batch_size=-(-settings.batch_size // self._gpus))
        micro_batch = self._trace(own, dtype).bytes(settings.weights.itemsize / self._gpus)
        projection = projection_temporaries(shape, settings) // self._gpus
        if not settings.gradient_release:
            projection += share.gradients
        return replace(share, activations=max(micro_batch, projection) - share.gradients)

    def _trace(self, settings: RunSettings, dtype: torch.dtype) -> MicroBatchPeak:
        # What forward and backward do not depend on is set to one value, so that it is not traced again.
        key = replace(
            settings,
            steps=1,
            gradient_accumulation_steps=1 + settings.accumulates,
            optimizer="adam",
            offload_state=False,
            form="decoupled",
            dual=False,
            state_dtype="fp32",
            weight_dtype="fp32",
        )
        if (key, dtype) not in self._traces:
            self._traces[key, dtype] = trace_micro_batch(self._config, key, dtype)
        return self._traces[key, dtype]


def _check_parameters(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not 0 < parameter.numel() <= _LARGEST_PARAMETER:
            raise ValueError(
                f"{name} would be {tuple(parameter.shape)}; allowed are 1 to {_LARGEST_PARAMETER:,} entries: see the "
                "sizes in config.json"
            )


def _gathered(shape: ModelShape, settings: RunSettings) -> int:
    """Bytes of whole layers: the one that computes, its gradients, the one fetched next; and all outside of layers.

    The gradients of a layer are there once more as they are added up over ranks, in fp32.
    """
    computed = (3 * shape.largest_layer + shape.outside_layers) * settings.compute.itemsize
    return computed + shape.largest_layer * torch.float32.itemsize
