"""Memory per GPU: what stays for the whole run, and what each phase adds."""

from dataclasses import dataclass

from dmpo_lightning.planning.activations import INT64, Activations, Head
from dmpo_lightning.planning.parameters import Architecture, Parameters, adapted_linears, count_parameters
from dmpo_lightning.planning.precision import Precision
from dmpo_lightning.planning.settings import Settings, Workload
from dmpo_lightning.planning.sharding import Sharding

GIB = 1024**3
RUNTIME = 1.0 * GIB
"""CUDA context, cuBLAS work space and fragmentation, on top of tensors; not part of what the tests check."""

_STATES = {"AdamW": 2.0, "Adam": 2.0, "NAdam": 2.0, "RAdam": 2.0, "Adamax": 2.0, "RMSprop": 1.0, "Adagrad": 1.0}
"""Optimizer states per parameter, in the parameter's own type."""
_EIGHT_BIT = ("8bit", "8bits")


@dataclass(frozen=True)
class Phase:
    """A phase of the run: its parts, and how much it needs at its worst moment beside what stays."""

    parts: dict[str, float]
    peak: float


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU."""

    resident: dict[str, float]
    phases: dict[str, Phase]

    @property
    def resident_total(self) -> float:
        """What stays."""
        return sum(self.resident.values())

    @property
    def worst_phase(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=lambda name: self.phases[name].peak)

    @property
    def peak(self) -> float:
        """Tensors at the worst moment."""
        return self.resident_total + self.phases[self.worst_phase].peak


def estimate_memory(settings: Settings, architecture: Architecture, sharding: Sharding) -> Memory:
    """Adds up `Activations`, `Head` and the sharding rules for one rank."""
    return _Estimate(settings, architecture, sharding).memory()


class _Estimate:
    """The arithmetic of `estimate_memory`, with what its terms share."""

    def __init__(self, settings: Settings, architecture: Architecture, sharding: Sharding) -> None:
        self.settings, self.architecture, self.sharding = settings, architecture, sharding
        self.work: Workload = settings.workload
        self.parameters: Parameters = count_parameters(architecture, settings.adapter)
        self.precision = Precision.of(
            dtype=settings.dtype, trainer=settings.precision, quantization=settings.quantization
        )
        self.activations = Activations(architecture, self.precision, settings.adapter, settings.on_cpu)
        is_learned = settings.adapter is None
        self.head = Head(architecture.vocab_size, architecture.width, self.precision, is_learned)

    def memory(self) -> Memory:
        phases = {"training": self.training(), "optimizer step": self.optimizer_step()}
        if self.work.sampler_steps:
            phases["sampling"] = self.sampling()
        if self.work.scoring_replicates:
            phases["scoring"] = self.scoring()
        return Memory(self.resident(), phases)

    # What stays -------------------------------------------------------------------------------------------------------

    def resident(self) -> dict[str, float]:
        buckets = 2 if self.sharding.bucketed else 1
        return {
            "weights": (self.base_bytes() + self.adapter_bytes()) / self.sharding.weights,
            "reference": self.reference_bytes() / self.sharding.weights,
            "gradients": self.gradient_bytes() / self.sharding.gradients * buckets,
            "optimizer": 0.0 if self.sharding.offloads_optimizer else self.optimizer_bytes() / self.sharding.optimizer,
            "rollouts": self.rollout_bytes(),
        } | ({"merged weights": self.merged_bytes()} if self.settings.sample_merged else {})

    def base_bytes(self) -> float:
        linear = self.architecture.block_linear_parameters
        return linear * self.precision.block_linear + (self.architecture.total - linear) * self.precision.weight

    def adapter_bytes(self) -> float:
        return self.parameters.trainable_count * self.precision.adapter if self.settings.adapter else 0.0

    def merged_bytes(self) -> float:
        """Of the adapted layers once more."""
        if self.settings.adapter is None:
            return 0.0
        layers = adapted_linears(self.architecture, self.settings.adapter)
        return self.precision.weight * sum(layer.in_features * layer.out_features for layer in layers)

    def reference_bytes(self) -> float:
        """A frozen copy under full fine-tuning; with adapters only a refreshed reference takes room."""
        if self.settings.reference_copy:
            return self.base_bytes()
        return self.adapter_bytes() if self.settings.reference_refreshed else 0.0

    def trained_width(self) -> float:
        return self.precision.adapter if self.settings.adapter else self.precision.weight

    def gradient_bytes(self) -> float:
        return self.parameters.trainable_count * self.trained_width()

    def optimizer_bytes(self) -> float:
        count, name = self.parameters.trainable_count, self.settings.optimizer.rpartition(".")[2]
        if name.lower().endswith(_EIGHT_BIT):
            return 2.0 * count
        if self.sharding.master_weights and self.trained_width() < 4:
            return (_states(name, self.settings.momentum) + 1) * 4.0 * count
        return _states(name, self.settings.momentum) * self.trained_width() * count

    def rollout_bytes(self) -> float:
        """Token ids, the reveal step and the log-prob of each completion token; the prompt's ids and mask."""
        if not self.work.sampler_steps:
            return 0.0
        completion = self.work.completion_length * (2 * INT64 + 4)
        return self.work.buffer_rollouts * completion + self.work.prompts_per_buffer * self.work.prompt_length * 9

    # What each phase adds ---------------------------------------------------------------------------------------------

    def training(self) -> Phase:
        work = self.work
        tokens = work.micro_batch_size * work.replicates * work.length
        positions = work.masked_positions(work.micro_batch_size, work.replicates)
        kept, block = self.kept(tokens, positions)
        forward, backward = self.head.forward(positions), self.head.backward(positions)
        freed = self.gradient_bytes() / self.sharding.gradients if work.accumulation == 1 else 0.0
        held = self.weight_copies() | self.gathered(backward=True)
        parts = {"activations": kept, "head": backward, "block in backward": block} | held
        return Phase(parts, kept + sum(held.values()) + max(forward, max(backward, block) - freed))

    def kept(self, tokens: float, positions: float) -> tuple[float, float]:
        """Bytes kept until the backward pass, and bytes that a block's backward pass adds."""
        one_block, passing = self.activations.saved_per_token(), self.activations.backward_per_token()
        head = positions * self.architecture.width * self.precision.compute
        tail = tokens * self.activations.tail_per_token() + head
        if self.settings.gradient_checkpointing:
            return tokens * self.activations.inputs_per_token() + tail, tokens * (one_block + passing)
        return tokens * one_block * self.architecture.blocks + tail, tokens * passing

    def weight_copies(self) -> dict[str, float]:
        """Autocast keeps a half-precision copy of each wide weight until the backward pass has used it."""
        if not self.precision.autocast or self.precision.weight <= 2 or self.sharding.gathers:
            return {}
        linear = 0 if self.settings.quantization else self.architecture.block_linear_parameters
        return {"weights in half precision": 2.0 * (linear + self.architecture.head_parameters)}

    def gathered(self, *, backward: bool) -> dict[str, float]:
        """Weights that exist for a while: one layer out of its 4 bits; under sharding two blocks and all beside them.

        In the backward pass the whole gradients of a block, before they are divided. Without one, all weights and the
        whole reference where they are gathered for generation.
        """
        shape = self.architecture
        largest = max((linear.in_features * linear.out_features for linear in shape.block_linears), default=0)
        found = {"layer out of 4 bits": 2.0 * largest} if self.settings.quantization else {}
        if self.sharding.gathers:
            outside = shape.total - shape.block_parameters * shape.blocks
            blocks = 3 if backward and self.settings.adapter is None else 2
            width = 2.0 if self.precision.autocast else self.precision.weight
            if self.settings.gather_for_generation and not backward:
                found["gathered weights"] = width * shape.total * (2 if self.settings.reference_copy else 1)
            else:
                found["gathered weights"] = width * (outside + blocks * shape.block_parameters)
        return found

    def sampling(self) -> Phase:
        rows = self.work.sampling_rows
        drawing = self.head.sampling(rows * self.work.sampled_places, self.work.temperature)
        return self._without_gradient(rows * self.work.length, drawing)

    def scoring(self) -> Phase:
        rows = self.work.scoring_rows * self.work.scoring_replicates
        return self._without_gradient(rows * self.work.length, self.head.scoring(self.work.scoring_positions))

    def _without_gradient(self, tokens: float, logits: float) -> Phase:
        passing, held = tokens * self.activations.passing_per_token(), self.gathered(backward=False)
        hidden = tokens * self.precision.stream * self.architecture.width
        return Phase(
            {"activations": passing, "logits": logits} | held, sum(held.values()) + max(passing, logits + hidden)
        )

    def optimizer_step(self) -> Phase:
        """On a GPU torch updates all parameters at once, with one more copy of them; on the CPU one after another."""
        if self.sharding.offloads_optimizer:
            return Phase({}, 0.0)
        largest = self.architecture.largest_parameter if self.settings.adapter is None else 0
        at_once = self.parameters.trainable_count / self.sharding.optimizer
        temporary = (2 * largest if self.settings.on_cpu else at_once) * self.trained_width()
        return Phase({"temporary": temporary}, temporary)


def _states(optimizer: str, momentum: float) -> float:
    if optimizer == "SGD":
        return 1.0 if momentum else 0.0
    return _STATES.get(optimizer, 2.0)
