"""Memory per GPU: what stays for the whole run, and what each phase adds."""

from dataclasses import dataclass

from dmpo_lightning.objectives import MaskedPass
from dmpo_lightning.planning.activations import INT64, Activations, Head
from dmpo_lightning.planning.parameters import Architecture, Parameters, adapted_linears, count_parameters
from dmpo_lightning.planning.precision import Precision
from dmpo_lightning.planning.settings import Settings
from dmpo_lightning.planning.strategy import Sharding
from dmpo_lightning.planning.workload import Workload
from dmpo_lightning.samplers import SamplingFootprint

GIB = 1024**3
RUNTIME = 1.0 * GIB
"""CUDA context, cuBLAS work space and fragmentation, on top of tensors. The tests, on processors, cannot check it."""

_STATES = {"AdamW": 2.0, "Adam": 2.0, "NAdam": 2.0, "RAdam": 2.0, "Adamax": 2.0, "RMSprop": 1.0, "Adagrad": 1.0}
"""Optimizer states per parameter, in the parameter's own type."""
_EIGHT_BIT = ("8bit", "8bits")


@dataclass(frozen=True)
class Phase:
    """Bytes that a phase of the run needs beside what stays.

    ``peak`` is its worst moment, which may be less than the sum of its ``parts``: not all of them exist at once.
    """

    parts: dict[str, float]
    peak: float


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU: what stays for the whole run, and what each phase adds."""

    resident: dict[str, float]
    phases: dict[str, Phase]

    @property
    def resident_total(self) -> float:
        """All that stays."""
        return sum(self.resident.values())

    @property
    def worst_phase(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=lambda name: self.phases[name].peak)

    @property
    def peak(self) -> float:
        """All tensors at the worst moment."""
        return self.resident_total + self.phases[self.worst_phase].peak


@dataclass(frozen=True)
class Contents:
    """Bytes that a checkpoint holds, over all ranks but for the rollouts, which are those of one."""

    weights: float
    optimizer: float
    reference: float
    rollouts: float


def checkpoint_contents(settings: Settings, architecture: Architecture, sharding: Sharding) -> Contents:
    """What `PolicyModule` saves: what is trained, the optimizer's states, a renewed reference and the buffer."""
    estimate = _Estimate(settings, architecture, sharding)
    return Contents(
        weights=estimate.gradient_bytes(),
        optimizer=estimate.optimizer_bytes(),
        reference=estimate.reference_bytes() if settings.reference_refreshed else 0.0,
        rollouts=estimate.rollout_bytes(),
    )


def estimate_memory(settings: Settings, architecture: Architecture, sharding: Sharding) -> Memory:
    """The memory of one rank, from `Activations`, `Head` and the sharding rules."""
    return _Estimate(settings, architecture, sharding).memory()


class _Estimate:
    """The arithmetic of `estimate_memory`, with what its terms share."""

    def __init__(self, settings: Settings, architecture: Architecture, sharding: Sharding) -> None:
        self.settings, self.architecture, self.sharding = settings, architecture, sharding
        self.work: Workload = settings.workload.of_blocks(architecture.block_size)
        self.parameters: Parameters = count_parameters(architecture, settings.adapter)
        self.precision = Precision.of(
            dtype=settings.dtype, trainer=settings.precision, quantization=settings.quantization
        )
        self.activations = Activations(architecture, self.precision, settings.adapter, settings.on_cpu)
        is_learned = settings.adapter is None
        self.head = Head(architecture.vocab_size, architecture.width, self.precision, is_learned)

    def memory(self) -> Memory:
        phases = {"training": self.training(), "optimizer step": self.optimizer_step()}
        if self.work.sampling is not None:
            phases["sampling"] = self.sampling(self.work.sampling)
        if self.work.scoring_passes:
            phases["scoring"] = self.scoring()
        return Memory(self.resident(), phases)

    # What stays -------------------------------------------------------------------------------------------------------

    def resident(self) -> dict[str, float]:
        # DDP reduces gradients through buckets, which hold a second copy of all of them.
        buckets = 2 if self.sharding.bucketed else 1
        return {
            "weights": (self.base_bytes() + self.adapter_bytes()) / self.sharding.weights,
            "reference": self.reference_bytes() / self.sharding.weights,
            "gradients": self.gradient_bytes() / self.sharding.gradients * buckets,
            "optimizer": 0.0 if self.sharding.offloads_optimizer else self.optimizer_bytes() / self.sharding.optimizer,
            "rollouts": self.rollout_bytes(),
        } | ({"merged weights": self.merged_bytes()} if self.settings.sample_merged else {})

    def base_bytes(self) -> float:
        # Quantisation reaches the blocks' linear layers alone, and neither embeddings, norms and biases nor the head.
        linear = self.architecture.block_linear_parameters
        return linear * self.precision.block_linear + (self.architecture.total - linear) * self.precision.weight

    def adapter_bytes(self) -> float:
        return self.parameters.trainable_count * self.precision.adapter if self.settings.adapter else 0.0

    def merged_bytes(self) -> float:
        """A merged copy has weights of its own for the adapted layers."""
        if self.settings.adapter is None:
            return 0.0
        layers = adapted_linears(self.architecture, self.settings.adapter)
        return self.precision.weight * sum(layer.in_features * layer.out_features for layer in layers)

    def reference_bytes(self) -> float:
        """Full fine-tuning has a frozen copy. With adapters only a refreshed reference takes room."""
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
            # Two states of one byte each.
            return 2.0 * count
        # DeepSpeed steps a float32 copy of half-precision weights, so its states are float32 too.
        if self.sharding.master_weights and self.trained_width() < 4:
            return (_states(name, self.settings.momentum) + 1) * 4.0 * count
        return _states(name, self.settings.momentum) * self.trained_width() * count

    def rollout_bytes(self) -> float:
        """Holds id, reveal step and log-prob of each completion token, and id and mask of each prompt token."""
        if self.work.sampling is None:
            return 0.0
        completion, prompt = self.work.completion_length * (2 * INT64 + 4), self.work.prompt_length * (INT64 + 1)
        return self.work.schedule.buffer_rollouts * completion + self.work.schedule.prompts_per_buffer * prompt

    # What each phase adds ---------------------------------------------------------------------------------------------

    def training(self) -> Phase:
        work = self.work
        columns = work.columns(work.objective.training.maskings)
        tokens, positions = work.schedule.micro_batch_size * columns, work.training_positions
        kept, block = self.kept(tokens, positions)
        if work.block_size is not None:
            # The mask of queries and keys, once for all blocks.
            kept += tokens * columns * self.precision.attention
        forward, backward = self.head.forward(positions), self.head.backward(positions)
        # Without accumulation the optimizer has cleared the gradients, which `resident` counts, and the backward pass
        # makes them again when the logits are gone.
        freed = self.gradient_bytes() / self.sharding.gradients if work.schedule.accumulation == 1 else 0.0
        held = self.weight_copies() | self.gathered(backward=True)
        block += self.tied_gradient_bytes()
        parts = {"activations": kept, "head": backward, "block in backward": block} | held
        return Phase(parts, kept + sum(held.values()) + max(forward, max(backward, block) - freed))

    def tied_gradient_bytes(self) -> float:
        """The head's gradient waits for that of the embedding, if they are one weight, before both are added up."""
        learned = self.settings.adapter is None and self.architecture.head_is_embedding
        return self.architecture.head_parameters * self.trained_width() if learned else 0.0

    def kept(self, tokens: float, positions: float) -> tuple[float, float]:
        """Bytes that are kept until the backward pass, and bytes that the backward pass of a block adds."""
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
        """Weights that exist for a while.

        A layer stored in 4 bits is unpacked. Under sharding two blocks and all beside the blocks are whole at once, and
        in the backward pass the gradients of a block, before they are divided. Where weights are gathered for
        generation, all of them and the whole reference are there without a backward pass.
        """
        shape = self.architecture
        largest = max((linear.in_features * linear.out_features for linear in shape.block_linears), default=0)
        parts = {"layer out of 4 bits": 2.0 * largest} if self.settings.quantization else {}
        if self.sharding.gathers:
            # Embeddings, final norm and head are one unit (`shard_fsdp2`), which is there as long as a forward lasts.
            outside = shape.total - shape.block_parameters * shape.blocks
            blocks = 3 if backward and self.settings.adapter is None else 2
            width = 2.0 if self.precision.autocast else self.precision.weight
            if self.settings.gather_for_generation and not backward:
                whole = width * shape.total * (2 if self.settings.reference_copy else 1)
                parts["gathered weights"] = whole + self.adapter_bytes()
            else:
                parts["gathered weights"] = width * (outside + blocks * shape.block_parameters)
        return parts

    def sampling(self, asked: SamplingFootprint) -> Phase:
        """Columns that see columns of their own need a mask of queries and keys."""
        rows, columns = self.work.sampling_rows, self.work.sampling_columns
        tokens, places = rows * columns, rows * asked.places
        cache = {"key/value cache": self.cache_bytes(rows)} if asked.keeps_cache else {}
        return self._without_gradient(
            tokens,
            self.head.sampling(places, asked),
            in_blocks=self.mask_bytes(rows, columns) if asked.extra_columns else 0.0,
            kept=cache,
        )

    def cache_bytes(self, rows: int) -> float:
        """Rotated keys and values of every block for all columns of the rows, in buffers of their own."""
        numbers = 2 * self.architecture.blocks * self.activations.key_width
        return numbers * rows * self.work.cached_columns * self.precision.attention

    def scoring(self) -> Phase:
        """The largest of the passes without gradient."""
        return max((self._scoring(each) for each in self.work.scoring_passes), key=lambda phase: phase.peak)

    def _scoring(self, each: MaskedPass) -> Phase:
        rollouts, columns = self.work.scored_rollouts, self.work.columns(each.maskings)
        return self._without_gradient(
            rollouts * columns,
            self.head.scoring(rollouts * self.work.positions(each)),
            in_blocks=self.mask_bytes(rollouts, columns) if self.work.block_size else 0.0,
        )

    def mask_bytes(self, rows: float, columns: int) -> float:
        """A mask of queries and keys in the type of attention, and the two booleans that it is made of."""
        return rows * columns**2 * (self.precision.attention + 2)

    def _without_gradient(
        self, tokens: float, logits: float, *, in_blocks: float = 0.0, kept: dict[str, float] | None = None
    ) -> Phase:
        """A forward whose worst moment is in a block, or at its logits, beside which the final hidden states exist.

        ``in_blocks`` is there while the blocks run, and ``kept`` all the time.
        """
        passing, held = tokens * self.activations.passing_per_token(), self.gathered(backward=False) | (kept or {})
        hidden = tokens * self.precision.stream * self.architecture.width
        worst = max(passing + in_blocks, logits + hidden)
        return Phase({"activations": passing, "logits": logits} | held, sum(held.values()) + worst)

    def optimizer_step(self) -> Phase:
        """On a GPU torch updates all parameters at once, which takes one more copy of them.

        On a processor it updates one after another.
        """
        if self.sharding.offloads_optimizer:
            return Phase({}, 0.0)
        largest = self.architecture.largest_parameter if self.settings.adapter is None else 0
        at_once = self.parameters.trainable_count / self.sharding.optimizer
        temporary = (2 * largest if self.settings.on_cpu else at_once) * self.trained_width()
        return Phase({"temporary": temporary}, temporary)


def _states(optimizer: str, momentum: float) -> float:
    if optimizer == "SGD":
        return 1.0 if momentum else 0.0
    # An unknown optimizer counts as one of Adam's kind, the largest of those known.
    return _STATES.get(optimizer, 2.0)
