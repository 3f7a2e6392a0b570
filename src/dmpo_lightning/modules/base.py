"""What `DMPO` and `MaskedSFT` share: the policy, the optimizer, and checkpoints of trainable weights only."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from dmpo_lightning.distributed.lock_step import LockStep
from dmpo_lightning.distributed.ranks import check_same_start
from dmpo_lightning.distributed.sharding import is_zero3, plain_name, shard_fsdp2, wrap_fsdp1
from dmpo_lightning.distributed.strategies import ZeROStrategy
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.models.blocks import compile_blocks
from dmpo_lightning.modules.averages import keep_frozen_weights, refuse_divided
from dmpo_lightning.modules.held_weights import (
    SCALE,
    SHAPES,
    adapter_scale,
    check_fit,
    forgive_frozen,
    is_reference,
    keep_only,
    trained_shapes,
)
from dmpo_lightning.modules.options import Options, SchedulerFactory, configured_options, take_over
from dmpo_lightning.policy import Policy

REFERENCE_PARTS = "reference_parts"
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def default_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW as published for DMPO: lr 1e-6, betas 0.9 and 0.99, weight decay 0.1."""
    return torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.99), weight_decay=0.1)


class PolicyModule(LightningModule):
    """A LightningModule around a `Policy`. Use `DMPO` or `MaskedSFT`.

    Args:
        model: a name, a `Backbone` or a module.
        with_reference: whether a reference policy is needed.
        optimizer: from parameters to an optimizer. None is AdamW as published.
        lr_scheduler: from an optimizer to a scheduler that advances once per optimizer step.
        seed: of all draws. None is 0.
        check_forwards: compares the ranks before each forward.
    """

    # Checkpoints hold trainable weights alone (`state_dict`), so Lightning must not ask for all of them.
    strict_loading = False

    def __init__(
        self,
        model: str | Backbone | nn.Module,
        *,
        with_reference: bool,
        optimizer: OptimizerFactory | None,
        lr_scheduler: SchedulerFactory | None,
        seed: int | None,
        check_forwards: bool = False,
    ) -> None:
        super().__init__()
        self.seed = seed or 0
        self.backbone = Backbone.of(model)
        self.policy = Policy(
            self.backbone.build(seed=self.seed),
            self.backbone.load_tokenizer(),
            mask_token_id=self.backbone.mask_token_id,
            with_reference=with_reference,
        )
        if self.backbone.compile_blocks:
            for network in self._networks():
                compile_blocks(network)
        if with_reference and self.backbone.adapter is None and self.policy.has_adapters:
            # A loaded adapter is where the run starts, so it is the reference.
            self.policy.refresh_reference()
        self.optimizer_factory, self.scheduler_factory = optimizer or default_optimizer, lr_scheduler
        self._lock_step = LockStep() if check_forwards else None
        self._is_sharded = self._made_room = False
        self._options: Options | None = None
        self._stored_options: Options | None = None
        self._trained_shapes = trained_shapes(self)
        self.register_load_state_dict_post_hook(forgive_frozen)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """None. Those of a policy are tables that follow from its configuration, not statistics of a run.

        Lightning's and torch's averages of weights take in what this returns: minus infinity would become NaN, and
        whole numbers would be rounded down.
        """
        return iter(())

    def _networks(self) -> list[nn.Module]:
        """The network that is trained and, if there is one, the reference's own copy."""
        return [network for network in (self.policy.model, self.policy.reference.model) if network is not None]

    def dump(self) -> Path | None:
        """Writes what helps to find out why a run fails, and returns where. Writes nothing by itself."""
        return None

    def configure_model(self) -> None:
        """Divides each block, and the rest, among the ranks under FSDP1 and FSDP2. The reference is divided alike.

        Raises:
            ValueError: a strategy that divides weights, with quantised ones.
        """
        strategy = self.trainer.strategy
        if divides_weights(strategy):
            refuse_divided(self.trainer)
        # Lightning calls this hook for each of fit, validate, test and predict, and weights can be divided only once.
        if self._is_sharded or not divides_weights(strategy):
            return
        if self.backbone.quantization is not None:
            raise ValueError(
                f"`quantization` needs whole layers on each rank, but {type(strategy).__name__} divides them; use DDP "
                "(`--config strategies/ddp.yaml`), or leave it out."
            )
        if isinstance(strategy, ModelParallelStrategy):
            mesh, half = strategy.device_mesh["data_parallel"], self.trainer.precision == "bf16-mixed"
            for network in self._networks():
                shard_fsdp2(network, mesh, half_precision=half)
        elif isinstance(strategy, FSDPStrategy):
            # FSDP1 flattens a unit into one tensor, which has one dtype.
            strategy.precision_plugin.convert_module(self.policy)
            self.policy.model = wrap_fsdp1(self.policy.model)
            if self.policy.reference.model is not None:
                self.policy.reference.model = wrap_fsdp1(self.policy.reference.model)
        self._is_sharded = True

    def setup(self, stage: str) -> None:
        """Where weights are divided, ranks run their forwards together."""
        strategy = self.trainer.strategy
        # Those may be of a checkpoint that was evaluated before.
        self._stored_options = None
        if self.trainer.world_size > 1 and (divides_weights(strategy) or self._lock_step is not None):
            # A sampler that stops early on one rank would leave the others waiting for its part of the weights.
            self.policy.anywhere = lambda flag: strategy.reduce_boolean_decision(flag, all=False)
        if isinstance(strategy, DeepSpeedStrategy):
            warnings.filterwarnings("ignore", message=".*`LightningModule.configure_gradient_clipping`.*")
            # Below stage 3 `state_dict` leaves frozen weights out. At stage 3 DeepSpeed writes parts of its own.
            strategy.exclude_frozen_parameters = strategy.zero_stage_3
            accumulated = self.trainer.accumulate_grad_batches
            if accumulated > 1 and not isinstance(strategy, ZeROStrategy):
                rank_zero_warn(
                    f"Gradients are divided by `accumulate_grad_batches` {accumulated} twice, by Lightning and by "
                    "DeepSpeed; use dmpo_lightning.distributed.strategies.ZeROStrategy, which does it once, instead of "
                    f"{type(strategy).__name__}."
                )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, ranks run equally many forwards, which ``check_forwards`` checks."""
        lock_step = self._lock_step
        if lock_step is None or self.policy.holds_all_weights:
            yield
            return
        self.policy.before_forward = lambda model: lock_step.before_forward(name, model)
        try:
            yield
            lock_step.end(name)
        finally:
            self.policy.before_forward = None

    def configure_optimizers(self) -> Any:
        """An optimizer over the trainable parameters. A scheduler advances once per optimizer step."""
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        scheduler = None if self.scheduler_factory is None else self.scheduler_factory(optimizer)
        # Taken now: Lightning puts the checkpoint's options back before training starts.
        self._options = configured_options(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        # Lightning's own default is an advance per epoch.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Before any forward.

        Raises:
            RuntimeError: some ranks continue from a checkpoint and others do not.
        """
        check_same_start("afresh" if self.trainer.ckpt_path is None else "from a checkpoint")

    def on_train_start(self) -> None:
        """This run's options of optimizer and scheduler win over the checkpoint's, which Lightning has put back.

        Raises:
            RuntimeError: ranks continue at different steps.
        """
        check_same_start(f"at optimizer step {self.trainer.global_step}")
        stored, self._stored_options = self._stored_options, None
        if stored is None or self._options is None:
            return
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        take_over(
            self.trainer.optimizers[0],
            schedulers[0] if schedulers else None,
            stored=stored,
            now=self._options,
            scheduler_factory=self.scheduler_factory,
            steps=self.trainer.global_step,
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The policy is about to move away from a reference that equals it."""
        self.policy.reference.announce_update()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lightning calls this behind the callbacks that average weights."""
        keep_frozen_weights(self.trainer, self)

    def on_train_epoch_end(self) -> None:
        """As behind each batch: averages may be renewed here as well."""
        keep_frozen_weights(self.trainer, self)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does it, and by norm under FSDP1 too, where Lightning cannot."""
        # Each rank holds a part of the gradients. FSDP1's own method takes the norm over all ranks; Lightning refuses.
        if isinstance(self.trainer.strategy, FSDPStrategy) and gradient_clip_val and gradient_clip_algorithm != "value":
            self.policy.model.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def held_names(self) -> set[str]:
        """Names of the parameters that checkpoints hold."""
        kept = {plain_name(name) for name, parameter in self.named_parameters() if parameter.requires_grad}
        if self._keeps_reference:
            kept |= {f"policy.{name}" for name in self.policy.reference.parameter_names(self.policy.model)}
        return kept

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Trainable weights, and the reference once it was refreshed. Frozen weights come from the model's source."""
        state = super().state_dict(*args, **kwargs)
        keep_only(state, self.held_names(), prefix=kwargs.get("prefix", ""))
        return state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the weights are those of this run, and puts a refreshed reference back.

        Most strategies read the weights after this hook, so room for the reference is made here. Where they have been
        read already, there must have been room from the start.

        Raises:
            UnfitCheckpoint: it is one of another model or adapter.
            ValueError: there was no room, because this run does not renew its reference.
        """
        check_fit(
            checkpoint,
            expected=self._trained_shapes,
            scale=adapter_scale(self.policy.model),
            backbone=self.backbone.to_plain(),
        )
        self._stored_options = checkpoint.get("options")
        reference, network = self.policy.reference, self.policy.model
        reference.announce_update()
        if not reference.exists:
            # Supervised fine-tuning has no use for one, and would go on saving it.
            state = checkpoint.get("state_dict", {})
            for name in filter(is_reference, list(state)):
                del state[name]
            return
        if not checkpoint.get("reference_is_refreshed"):
            return
        if self._trainer is None or not self._trainer.strategy.restore_checkpoint_after_setup:
            # Makes the room that the stored weights are then read into. What it copies now is overwritten.
            reference.refresh(network)
        elif not reference.has_room(network):
            raise ValueError(
                "The checkpoint holds a renewed reference, which needs `reference_refresh_interval` to be set as it "
                f"was under {type(self.trainer.strategy).__name__}."
            )
        reference.is_refreshed = True
        if REFERENCE_PARTS in checkpoint:
            reference.put_parts(network, checkpoint[REFERENCE_PARTS])
        # `refresh` has noted that the reference equals the policy, which the checkpoint's weights need not do.
        reference.announce_update()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the weights are weights of (for `export`), whether they hold a refreshed reference, and what
        optimizer and scheduler were configured with.
        """
        checkpoint["backbone"], checkpoint["seed"] = self.backbone.to_plain(), self.seed
        checkpoint["reference_is_refreshed"] = self.policy.reference.is_refreshed
        checkpoint["options"] = self._options
        checkpoint[SHAPES], checkpoint[SCALE] = self._trained_shapes, adapter_scale(self.policy.model)
        # Callbacks that average weights put theirs here. A copy that they made before a reference was renewed does not
        # know that it is held.
        for name, value in checkpoint.get("current_model_state", {}).items():
            checkpoint["state_dict"].setdefault(name, value)
        if self._keeps_reference and is_zero3(self.policy):
            # ZeRO-3 saves no frozen weights. Its checkpoints are one file per rank, which takes this rank's part.
            checkpoint[REFERENCE_PARTS] = self.policy.reference.parts(self.policy.model)

    @property
    def _keeps_reference(self) -> bool:
        """Whether checkpoints hold the reference. Strategies that read weights before `on_load_checkpoint` can speak
        hold it from the start of a run that may renew it.
        """
        return self.policy.reference.is_refreshed or self._made_room

    def make_room_for_reference(self) -> None:
        """Called at construction or in `configure_model`, for strategies that must see all weights early."""
        self.policy.reference.make_room(self.policy.model)
        self._made_room = True


def divides_weights(strategy: Any) -> bool:
    """Whether a forward needs the other ranks: FSDP1, FSDP2 and DeepSpeed's stage 3."""
    is_zero_3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return is_zero_3 or isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
