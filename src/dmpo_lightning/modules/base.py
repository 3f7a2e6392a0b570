"""What `DMPO` and `MaskedSFT` share: the policy, the optimizer, and checkpoints of trainable weights only."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from dmpo_lightning.distributed.lock_step import LockStep
from dmpo_lightning.distributed.ranks import check_same_start
from dmpo_lightning.distributed.sharding import is_zero3, own_part, plain_name, shard_fsdp2, wrap_fsdp1, write_part
from dmpo_lightning.distributed.strategies import ZeROStrategy
from dmpo_lightning.models import building
from dmpo_lightning.models.loading import Quantization, load_tokenizer
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.modules.options import Options, SchedulerFactory, configured_options, take_over
from dmpo_lightning.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE_PARTS = "reference_parts"
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def default_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW as published for DMPO: lr 1e-6, betas 0.9 and 0.99, weight decay 0.1."""
    return torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.99), weight_decay=0.1)


class PolicyModule(LightningModule):
    """A LightningModule around a `Policy`; not used by itself."""

    strict_loading = False

    def __init__(
        self,
        *,
        model: str | nn.Module,
        tokenizer: "str | PreTrainedTokenizerBase | None",
        revision: str | None,
        dtype: str,
        random_weights: bool,
        adapter: LoRA | None,
        quantization: Quantization | None,
        trust_remote_code: bool,
        gradient_checkpointing: bool,
        compile_blocks: bool,
        mask_token_id: int | None,
        with_reference: bool,
        optimizer: OptimizerFactory | None,
        lr_scheduler: SchedulerFactory | None,
        seed: int | None,
        check_forwards: bool = False,
    ) -> None:
        super().__init__()
        self._lock_step = LockStep() if check_forwards else None
        self.seed = seed or 0
        self._is_sharded = self._made_room = False
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("`tokenizer` is needed when `model` is a module; pass one, or the id or folder of one.")
        self.source: dict[str, Any] = {
            "model": model if isinstance(model, str) else None,
            "tokenizer": tokenizer if isinstance(tokenizer, str) else None,
            "revision": revision,
            "dtype": dtype,
            "random_weights": random_weights,
            "seed": self.seed,
            "adapter": None if adapter is None else vars(adapter),
            "quantization": quantization,
            "trust_remote_code": trust_remote_code,
        }
        network = building.build_network(
            model, adapter=adapter, gradient_checkpointing=gradient_checkpointing, **_loading(self.source)
        )
        network.train()  # transformers hands out models in eval mode, which would switch off dropout and checkpointing
        words = load_tokenizer(tokenizer if tokenizer is not None else str(model), revision=revision)
        self.policy = Policy(network, words, mask_token_id=mask_token_id, with_reference=with_reference)
        if compile_blocks:
            for each in filter(None, (self.policy.model, self.policy.reference_model)):
                building.compile_blocks(each)
        if with_reference and adapter is None and self.policy.has_adapters:
            self.policy.refresh_reference()  # a loaded adapter is where the run starts, so it is the reference
        self.optimizer_factory, self.scheduler_factory = optimizer or default_optimizer, lr_scheduler
        self._options: Options | None = None
        self._stored_options: Options | None = None

    def configure_model(self) -> None:
        """Divides each block, and the rest, among the ranks under FSDP1 and FSDP2; of the reference too.

        Raises:
            ValueError: a strategy that divides weights, with quantised ones.
        """
        strategy = self.trainer.strategy
        if self._is_sharded or not divides_weights(strategy):
            return
        if self.source["quantization"] is not None:
            raise ValueError(
                f"`quantization` needs whole layers on each rank, but {type(strategy).__name__} divides them; use DDP "
                "(`--config strategies/ddp.yaml`), or leave it out."
            )
        if isinstance(strategy, ModelParallelStrategy):
            mesh, half = strategy.device_mesh["data_parallel"], self.trainer.precision == "bf16-mixed"
            for model in filter(None, (self.policy.model, self.policy.reference_model)):
                shard_fsdp2(model, mesh, half_precision=half)
        elif isinstance(strategy, FSDPStrategy):
            strategy.precision_plugin.convert_module(self.policy)  # a unit has one dtype
            self.policy.model = wrap_fsdp1(self.policy.model)
            if self.policy.reference_model is not None:
                self.policy.reference_model = wrap_fsdp1(self.policy.reference_model)
        self._is_sharded = True

    def setup(self, stage: str) -> None:
        """Where weights are divided, ranks run their forwards together."""
        strategy = self.trainer.strategy
        self._stored_options = None  # those of a checkpoint that was evaluated before
        if self.trainer.world_size > 1 and (divides_weights(strategy) or self._lock_step is not None):
            self.policy.anywhere = lambda flag: strategy.reduce_boolean_decision(flag, all=False)
        if isinstance(strategy, DeepSpeedStrategy):
            warnings.filterwarnings("ignore", message=".*`LightningModule.configure_gradient_clipping`.*")
            strategy.exclude_frozen_parameters = strategy.zero_stage_3  # below, `state_dict` already leaves them out
            accumulated = self.trainer.accumulate_grad_batches
            if accumulated > 1 and not isinstance(strategy, ZeROStrategy):
                rank_zero_warn(
                    f"Gradients are divided by `accumulate_grad_batches` {accumulated} twice, by Lightning and by "
                    "DeepSpeed; use dmpo_lightning.distributed.strategies.ZeROStrategy, which does it once, instead of "
                    f"{type(strategy).__name__}."
                )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, ranks run equally many forwards; with ``check_forwards`` that is checked."""
        lock_step = self._lock_step
        if lock_step is None or self.policy.holds_all_weights:
            yield
            return
        self.policy.before_forward = lambda model: lock_step.before_forward(name, model)
        yield
        lock_step.end(name)
        self.policy.before_forward = None

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters; the scheduler, if any, advances once per optimizer step."""
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        scheduler = None if self.scheduler_factory is None else self.scheduler_factory(optimizer)
        self._options = configured_options(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Before any forward.

        Raises:
            RuntimeError: some ranks continue from a checkpoint and others do not.
        """
        check_same_start("afresh" if self.trainer.ckpt_path is None else "from a checkpoint")

    def on_train_start(self) -> None:
        """Lightning has put the checkpoint's options of optimizer and scheduler back; this run's win.

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
        self.policy.announce_update()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does it; by norm under FSDP1 too, where Lightning cannot."""
        if isinstance(self.trainer.strategy, FSDPStrategy) and gradient_clip_val and gradient_clip_algorithm != "value":
            self.policy.model.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Trainable weights only, frozen ones come from the model's source again; and the reference once refreshed."""
        kept = {plain_name(name) for name, parameter in self.named_parameters() if parameter.requires_grad}
        if self._keeps_reference:
            kept |= set(self.policy.reference_parameter_names("policy."))
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for a refreshed reference before the weights are read; where they were read already, it is there.

        Raises:
            ValueError: there is none, because this run does not renew its reference.
        """
        self._stored_options = checkpoint.get("options")
        self.policy.announce_update()
        if not checkpoint.get("reference_is_refreshed"):
            return
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            self.policy.refresh_reference()
        elif not self.policy.has_room_for_reference:
            raise ValueError(
                "The checkpoint holds a renewed reference, which needs `reference_refresh_interval` to be set as it "
                f"was under {type(self.trainer.strategy).__name__}."
            )
        self.policy.reference_is_refreshed = True
        if REFERENCE_PARTS in checkpoint:
            self._put_reference(checkpoint[REFERENCE_PARTS])
        self.policy.announce_update()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says whether the weights hold a refreshed reference, what they are weights of (for `export`), and what
        optimizer and scheduler were configured with.
        """
        checkpoint["reference_is_refreshed"] = self.policy.reference_is_refreshed
        checkpoint["policy_source"] = self.source
        checkpoint["options"] = self._options
        if self._keeps_reference and is_zero3(self.policy):
            checkpoint[REFERENCE_PARTS] = self._reference_parts()

    @property
    def _keeps_reference(self) -> bool:
        """Whether checkpoints hold the reference. Strategies that read weights before `on_load_checkpoint` can speak
        hold it from the start of a run that may renew it.
        """
        return self.policy.reference_is_refreshed or self._made_room

    def make_room_for_reference(self) -> None:
        """Called at construction or in `configure_model`, for strategies that must see all weights early."""
        self.policy.make_room_for_reference()
        self._made_room = True

    def _reference_parts(self) -> dict[str, Tensor]:
        """Of this rank, under ZeRO-3, which saves no frozen weights; its checkpoints are one file per rank."""
        weights = dict(self.policy.named_parameters())
        return {name: own_part(weights[name]).cpu().clone() for name in self.policy.reference_parameter_names()}

    @torch.no_grad()
    def _put_reference(self, parts: dict[str, Tensor]) -> None:
        weights = dict(self.policy.named_parameters())
        for name, part in parts.items():
            write_part(weights[name], part)


def divides_weights(strategy: Any) -> bool:
    """Whether a forward needs the other ranks: FSDP1, FSDP2 and DeepSpeed's stage 3."""
    is_zero_3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return is_zero_3 or isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def _loading(source: dict[str, Any]) -> dict[str, Any]:
    return {
        name: source[name]
        for name in ("revision", "dtype", "random_weights", "seed", "quantization", "trust_remote_code")
    }
