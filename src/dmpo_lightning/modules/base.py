"""What `DMPO` and `MaskedSFT` share: the policy, the optimizer, and checkpoints of trainable weights only."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from dmpo_lightning.models import building
from dmpo_lightning.models.loading import Quantization, load_tokenizer
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.modules.options import Options, SchedulerFactory, configured_options, take_over
from dmpo_lightning.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    ) -> None:
        super().__init__()
        self.seed = seed or 0
        self._is_sharded = False
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
        """Under FSDP2 (`ModelParallelStrategy`) each block is a unit and the rest another; of the reference too."""
        if self.device_mesh is None or self._is_sharded:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for model in filter(None, (self.policy.model, self.policy.reference_model)):
            for block in building.blocks_of(model):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        self._is_sharded = True

    def setup(self, stage: str) -> None:
        """Where weights are sharded, ranks run their forwards together."""
        self._stored_options = None  # those of a checkpoint that was evaluated before
        if self.trainer.world_size > 1 and _shares_forwards(self.trainer.strategy):
            decide = self.trainer.strategy.reduce_boolean_decision
            self.policy.anywhere = lambda flag: decide(flag, all=False)

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters; the scheduler, if any, advances once per optimizer step."""
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        scheduler = None if self.scheduler_factory is None else self.scheduler_factory(optimizer)
        self._options = configured_options(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Lightning has put the checkpoint's options of optimizer and scheduler back; this run's win."""
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

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Trainable weights only, frozen ones come from the model's source again; and the reference once refreshed."""
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if self.policy.reference_is_refreshed:
            kept |= set(self.policy.reference_parameter_names("policy."))
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for a refreshed reference before the weights are read, and remembers the stored options."""
        self._stored_options = checkpoint.get("options")
        self.policy.announce_update()
        if checkpoint.get("reference_is_refreshed"):
            self.policy.refresh_reference()
            self.policy.announce_update()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says whether the weights hold a refreshed reference, what they are weights of (for `export`), and what
        optimizer and scheduler were configured with.
        """
        checkpoint["reference_is_refreshed"] = self.policy.reference_is_refreshed
        checkpoint["policy_source"] = self.source
        checkpoint["options"] = self._options


def _shares_forwards(strategy: Any) -> bool:
    """Whether a forward needs the other ranks: FSDP1, FSDP2 and DeepSpeed's stage 3."""
    stage = getattr(strategy, "config", None) or {}
    is_zero_3 = isinstance(strategy, DeepSpeedStrategy) and stage.get("zero_optimization", {}).get("stage") == 3
    return is_zero_3 or isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def _loading(source: dict[str, Any]) -> dict[str, Any]:
    return {
        name: source[name]
        for name in ("revision", "dtype", "random_weights", "seed", "quantization", "trust_remote_code")
    }
