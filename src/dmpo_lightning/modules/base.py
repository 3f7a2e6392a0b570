"""What `DMPO` and `MaskedSFT` share: the policy, the optimizer, and checkpoints of what can be trained."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    Checkpoint,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dmpo_lightning.checkpoints.export import named_backbone
from dmpo_lightning.checkpoints.reading import confine_paths, read_weights
from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.distributed.internals import (
    attached_trainer,
    averaged_module,
    callbacks_of,
    is_being_fitted,
    resume_whole_runs,
)
from dmpo_lightning.distributed.ranks import check_same_start
from dmpo_lightning.distributed.sharding import is_zero3, plain_name, shard_fsdp2, wrap_fsdp1
from dmpo_lightning.distributed.strategies import ZeROStrategy, divides_weights, write_whole_files
from dmpo_lightning.functional.randomness import check_seed
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.models.parts import compile_layers
from dmpo_lightning.modules.checkpoint import (
    ARGUMENTS,
    REFERENCE_PARTS,
    SCALE,
    SHAPES,
    TRAINED,
    Shapes,
    adapter_scale,
    check_fit,
    described,
    loaded_arguments,
    own_shapes,
    restore_reference,
    trainable,
    trainable_by_design,
)
from dmpo_lightning.modules.generating import Generation, Prompt, generate
from dmpo_lightning.modules.options import (
    Options,
    SchedulerFactory,
    check_schedule,
    configured_options,
    plain,
    take_over,
)
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import Sampling
from dmpo_lightning.samplers import ConfidenceSampler, Sampler

FIXED = (
    "What is trained cannot change in a run of several ranks, or of a strategy for them: gradients of thawed weights "
    "would stay each rank's own. Freeze in `setup` of a callback, for the whole run, or take one device."
)
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
REFUSED: dict[type[Callback], str] = {
    BackboneFinetuning: "trains a new head before its backbone, and a language model has no new head; write a "
    "BaseFinetuning that freezes parts of `pl_module.policy.model`",
    LearningRateFinder: "looks for the rate at which a loss falls fastest, which says little of a policy, whose loss "
    "is weighted anew with each buffer; compare short runs",
}
"""Lightning's callbacks that a policy cannot be trained with, and why."""


def default_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW as published for DMPO: lr 1e-6, betas 0.9 and 0.99, weight decay 0.1."""
    return torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.99), weight_decay=0.1)


class PolicyModule(LightningModule):
    """A LightningModule around a `Policy`. Use `DMPO` or `MaskedSFT`.

    Args:
        model: a name, a `Backbone` or a module.
        with_reference: whether a reference policy is needed.
        optimizer: from parameters to an optimizer. None is AdamW as published.
        lr_scheduler: from an optimizer to a scheduler that advances once per optimizer step. Lightning's own
            `ReduceLROnPlateau` of ``lightning.pytorch.cli`` looks at its ``monitor`` after each validation.
        seed: of all draws. None is 0.
    """

    checkpoint_keys: tuple[str, ...] = ()
    """What a module writes itself and cannot continue without."""
    # What `DMPO` samples with. A module for supervised fine-tuning has none of it.
    sampler: Sampler | None = None
    completion_length: int | None = None
    rows_per_forward: int | None = None
    gather_for_generation = False
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
    ) -> None:
        super().__init__()
        self.seed = check_seed(seed or 0)
        self.backbone = Backbone.of(model)
        self.policy = Policy(
            self.backbone.build(seed=self.seed),
            self.backbone.load_tokenizer(),
            mask_token_id=self.backbone.mask_token_id,
            with_reference=with_reference,
        )
        if self.backbone.compile_blocks:
            for network in self.policy.networks:
                compile_layers(network)
        if with_reference and self.backbone.adapter is None and self.policy.has_adapters:
            self.policy.refresh_reference()  # a loaded adapter is where the run starts
        self.optimizer_factory, self.scheduler_factory = optimizer or default_optimizer, lr_scheduler
        self._holds_reference_early = False
        self._options: Options | None = None
        self._stored_options: Options | None = None
        self._shapes: Shapes | None = None
        """Of the whole weights, from when a strategy divides them."""
        self._held = {f"policy.{name}" for name in trainable_by_design(self.policy)} | trainable(self)
        self._optimized: set[str] = set()
        self._start: set[str] = set()
        """What is trained: where the optimizer is made, and where training starts."""
        self._stored_trained: dict[str, list[str]] | None = None
        self.register_load_state_dict_post_hook(_forgive_frozen)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """None. A policy's are tables, not statistics of a run.

        Averages of weights take in what this returns: minus infinity would become NaN.
        """
        return iter(())

    def note_arguments(self, given: Mapping[str, Any]) -> None:
        """Tells loggers and checkpoints what the module was constructed with."""
        own = {name: value for name, value in given.items() if name not in ("self", "__class__", "model", "seed")}
        self.save_hyperparameters({"seed": self.seed, "backbone": self.backbone.to_plain(), **described(own)})

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        *,
        trust_remote_code: bool = False,
        trust_checkpoint: bool = False,
        **arguments: Any,
    ) -> Any:
        """The module that wrote a checkpoint.

        Args:
            checkpoint_path: a file or folder, read as data, see `read_weights`.
            map_location: the device to put the module on. None is the CPU.
            trust_remote_code: run code that comes with the base. What the checkpoint says of this is not believed.
            trust_checkpoint: read a folder, which can run any code.
            arguments: of the constructor, in place of those that the checkpoint holds. It holds plain values, and
                objectives and samplers of this package. ``optimizer``, ``lr_scheduler`` and ``reward`` are code, and
                only needed to train. ``model`` is where the base is now.

        Raises:
            ValueError: an argument that the checkpoint cannot say, or no checkpoint of this package; also
                `UnfitCheckpointError`, for weights of another model or adapter.
        """
        saved = read_weights(checkpoint_path, trust_checkpoint=trust_checkpoint)
        model = arguments.pop("model", None)
        if model is None or isinstance(model, str):
            model = named_backbone(saved["backbone"], model, trust_remote_code=trust_remote_code)
        module = cls(model, **loaded_arguments(cls, saved, {"seed": saved.get("seed", 0)} | arguments))
        module.on_load_checkpoint(saved)
        # Names and shapes have been compared.
        module.load_state_dict(saved["state_dict"], strict=False)
        return module.to(map_location or "cpu")

    def gathered(self) -> AbstractContextManager[None]:
        """With ``gather_for_generation``, every rank holds all weights inside."""
        return self.policy.gathered() if self.gather_for_generation else nullcontext()

    def check_prompts(self, loader: PromptLoader, completion_length: int) -> None:
        """Raises ValueError for prompts that leave no room for a completion, or hold ids of another vocabulary."""
        limit = self.policy.room_for_prompts(completion_length)
        if limit is not None:
            loader.check_prompt_length(limit)
        highest, known = max(max(ids) for ids in loader.token_ids), self.policy.facts.vocab_size
        if highest >= known:
            raise ValueError(
                f"The loader's prompts have token ids up to {highest}, and the model knows {known} tokens; give the "
                "loader the model's own tokenizer."
            )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        sampler: Sampler | None = None,
        completion_length: int | None = None,
        completions: int = 1,
        prefill: str = "",
        seed: int | None = None,
        index: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Answers prompts, within a Trainer or without one, as `generate` describes it.

        What is not given is the module's own: the sampler of its rollouts, the length of its completions, its seed.
        `MaskedSFT` takes the most likely tokens one by one, and has to be told a length. With several ranks all call
        this together, each for prompts of its own, if the strategy divides weights equally many.

        Example:
            ```python
            module = DMPO.load_from_checkpoint("runs/sudoku_tiny/latest/checkpoints/last.ckpt")
            print(module.generate("1030041003004001")[0].text)
            ```
        """
        length = self.completion_length if completion_length is None else completion_length
        if length is None:
            raise ValueError(
                f"`completion_length` must be given, because {type(self).__name__} has none: pass generate(prompts, "
                "completion_length=...)."
            )
        sampling = Sampling(
            sampler or self.sampler or ConfidenceSampler(temperature=0.0),
            length,
            completions,
            seed=self.seed if seed is None else seed,
            rows_per_forward=self.rows_per_forward,
        )
        # As Lightning does it around a validation step.
        trainer = attached_trainer(self)
        precision = nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
        with self.gathered(), precision:
            return generate(self.policy, prompts, sampling, prefill=prefill, index=index)

    def configure_callbacks(self) -> list[Callback]:
        """None of its own.

        Raises:
            ValueError: there is one of `REFUSED`.
        """
        for kind, why in REFUSED.items():
            if callbacks_of(self.trainer, kind):
                raise ValueError(f"{kind.__name__} {why}, or leave it out.")
        return []

    def configure_model(self) -> None:
        """Divides the transformer layers, and the rest, among the ranks under FSDP1 and FSDP2; the reference alike.

        Raises:
            ValueError: quantised weights, or weights that a callback averages.
        """
        # Lightning calls this hook for each of fit, validate, test and predict, and weights can be divided only once.
        trainer = attached_trainer(self)
        if self._shapes is not None or trainer is None or not divides_weights(trainer.strategy):
            return
        strategy, policy, self._shapes = trainer.strategy, self.policy, own_shapes(self)
        if self.backbone.quantization is not None:
            raise ValueError(
                f"`quantization` needs whole layers on each rank, but {type(strategy).__name__} divides them; use DDP "
                "(`--config strategies/ddp.yaml`), or leave it out."
            )
        for callback in self._averaging:
            raise ValueError(
                f"{type(callback).__name__} averages whole weights, but {type(strategy).__name__} divides them among "
                "ranks; use DDP, or leave the callback out."
            )
        if isinstance(strategy, ModelParallelStrategy):
            mesh, half = strategy.device_mesh["data_parallel"], trainer.precision == "bf16-mixed"
            for network in policy.networks:
                shard_fsdp2(network, mesh, half_precision=half)
        elif isinstance(strategy, FSDPStrategy):
            # FSDP1 flattens a unit into one tensor, which has one dtype.
            strategy.precision_plugin.convert_module(policy)
            # Under FSDP1 Lightning moves no module to its device: the units move themselves, and what is outside of
            # them, such as the banned tokens, stays behind.
            policy.to_device_of_units(strategy.root_device)
            policy.model = wrap_fsdp1(policy.model)
            if policy.reference.model is not None:
                policy.reference.model = wrap_fsdp1(policy.reference.model)

    def setup(self, stage: str) -> None:
        """Where weights are divided, ranks run their forwards together. Checkpoint files are complete or absent."""
        strategy = self.trainer.strategy
        write_whole_files(strategy)
        if stage == "fit":
            resume_whole_runs(self.trainer)
        # Those may be of a checkpoint that was evaluated before.
        self._stored_options = self._stored_trained = None
        if not isinstance(strategy, SingleDeviceStrategy) and callbacks_of(self.trainer, BaseFinetuning):
            raise ValueError(FIXED)
        if self.trainer.world_size > 1 and divides_weights(strategy):
            # A sampler that stops early on one rank would leave the others waiting for its part of the weights.
            self.policy.anywhere = lambda flag: strategy.reduce_boolean_decision(flag, all=False)
        if isinstance(strategy, DeepSpeedStrategy):
            warnings.filterwarnings("ignore", message=".*`LightningModule.configure_gradient_clipping`.*")
            # Below stage 3 `state_dict` leaves frozen weights out. At stage 3 DeepSpeed writes parts of its own.
            strategy.exclude_frozen_parameters = strategy.zero_stage_3
            if strategy.zero_stage_3 and (frozen := self._held - trainable(self)):
                raise ValueError(
                    f"ZeRO-3 saves no frozen weights, and {len(frozen)} of the run's own are frozen, such as "
                    f"{min(frozen)}; use FSDP2 or stage 2, or freeze nothing."
                )
            accumulated = self.trainer.accumulate_grad_batches
            if accumulated > 1 and not isinstance(strategy, ZeROStrategy):
                rank_zero_warn(
                    f"Gradients are divided by `accumulate_grad_batches` {accumulated} twice, by Lightning and by "
                    "DeepSpeed; use dmpo_lightning.distributed.strategies.ZeROStrategy, which does it once, instead of "
                    f"{type(strategy).__name__}."
                )

    def configure_optimizers(self) -> Any:
        """An optimizer over the trainable parameters. A scheduler advances once per optimizer step.

        Raises:
            ValueError: the checkpoint's optimizer has other parameters, or a scheduler has no value to look at.
        """
        self._optimized = trainable(self)
        if self._stored_trained and (odd := self._optimized ^ set(self._stored_trained["optimized"])):
            raise ValueError(
                f"The checkpoint's optimizer has other weights than this run's: {len(odd)} differ, such as {min(odd)}. "
                "Freeze what it has behind the start, such as in `on_fit_start` of a callback, or as its run did."
            )
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        scheduler = None if self.scheduler_factory is None else self.scheduler_factory(optimizer)
        is_plateau, validates = isinstance(scheduler, ReduceLROnPlateau), self.trainer.enable_validation
        if is_plateau and not (validates and hasattr(scheduler, "monitor")):
            raise ValueError(
                "`lr_scheduler` ReduceLROnPlateau looks at a value after each validation: take that of "
                "lightning.pytorch.cli with `monitor`, such as val/sampled/accuracy, in a run that validates."
            )
        # Taken now: Lightning puts the checkpoint's options back before training starts.
        self._options = configured_options(optimizer, scheduler)
        self.save_hyperparameters(
            {"optimizer_options": {"class": type(optimizer).__name__, **described(self._options)}}
        )
        if scheduler is None:
            return optimizer
        # Lightning's own default is an advance per epoch. Behind a validation it would come after the checkpoint.
        own = {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": own}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """As Lightning does it. `ReduceLROnPlateau` advances in `on_validation_epoch_end`."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def on_validation_epoch_end(self) -> None:
        """Lets a `ReduceLROnPlateau` look at its ``monitor``, before the checkpoint behind a validation is written.

        Raises:
            ValueError: nothing of that name is logged.
        """
        scheduler, logged = self.lr_schedulers(), self.trainer.callback_metrics
        if not isinstance(scheduler, ReduceLROnPlateau) or self.trainer.sanity_checking:
            return
        monitor: Any = vars(scheduler)["monitor"]
        if monitor not in logged:
            raise ValueError(
                f"`lr_scheduler` ReduceLROnPlateau looks at {monitor!r}, which is not logged; `monitor` is one of: "
                f"{', '.join(sorted(logged))}."
            )
        # What is logged of training is each rank's own, and all must lower the rate together.
        scheduler.step(float(self.trainer.strategy.reduce(logged[monitor])))

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
            ValueError: the scheduler ends before the run.
        """
        check_same_start(f"at optimizer step {self.trainer.global_step}")
        for each in callbacks_of(self.trainer, Checkpoint) if self.trainer.ckpt_path is not None else ():
            # A rank that does not see the same files would save under other names, and the others wait for it.
            each.load_state_dict(self.trainer.strategy.broadcast(each.state_dict()))
        if self.scheduler_factory and self._options and not callbacks_of(self.trainer, GradientAccumulationScheduler):
            check_schedule(self.scheduler_factory, self._options, steps=self.trainer.estimated_stepping_batches)
        self._go_on_training()
        stored, self._stored_options = self._stored_options, None
        if stored is None or self._options is None:
            return
        take_over(
            self.trainer.optimizers[0],
            self.lr_schedulers(),  # type: ignore[arg-type]
            stored=stored,
            now=self._options,
            scheduler_factory=self.scheduler_factory,
            steps=self.trainer.global_step,
        )

    def _go_on_training(self) -> None:
        """A run that continues goes on with what callbacks had frozen and thawed on its way. Where this one begins with
        other weights, that is its own choice, and stays.
        """
        self._start, stored, self._stored_trained = trainable(self), self._stored_trained, None
        if stored and set(stored["start"]) == self._start:
            for name, weight in self.named_parameters():
                weight.requires_grad_(plain_name(name) in stored["now"])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The policy is about to move away from a reference that equals it. What is trained is asked anew.

        Raises:
            ValueError: it is no longer what a strategy has prepared ranks for.
        """
        self.policy.reference.announce_update()
        now = trainable(self)
        if now != self._optimized and not isinstance(self.trainer.strategy, SingleDeviceStrategy):
            raise ValueError(FIXED)
        self._held |= now

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lightning calls this and `on_train_epoch_end` behind the callbacks that average weights."""
        self._keep_frozen_weights()

    def on_train_epoch_end(self) -> None:
        self._keep_frozen_weights()

    @property
    def _averaging(self) -> list[Any]:
        """Lightning's callbacks that average weights."""
        return [*callbacks_of(self.trainer, WeightAveraging), *callbacks_of(self.trainer, StochasticWeightAveraging)]

    @torch.no_grad()
    def _keep_frozen_weights(self) -> None:
        """Weights that are not trained are not averaged: base and reference stay what they are.

        The moving average of a weight that does not change drifts away from it by rounding, and that of a refreshed
        reference is none of its states.
        """
        for callback in self._averaging:
            copy = averaged_module(callback)
            for own, averaged in zip(self.parameters(), copy.parameters() if copy else (), strict=bool(copy)):
                if not own.requires_grad:
                    averaged.copy_(own)

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
        """Names of the parameters that checkpoints hold, whatever is frozen at the moment."""
        kept = self._held | trainable(self)
        if self._keeps_reference:
            kept |= {f"policy.{name}" for name in self.policy.reference.parameter_names(self.policy.model)}
        return kept

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What can be trained, and the reference once it was refreshed. An adapter's base comes from its source."""
        state = super().state_dict(*args, **kwargs)
        held, prefix = self.held_names(), kwargs.get("prefix", "")
        # In place: a parent goes on with the same dictionary.
        for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in held]:
            del state[name]
        return state

    def check_fit(self, checkpoint: Mapping[str, Any]) -> None:
        """Compares what a checkpoint holds with what this run can train. See `checkpoint.check_fit`."""
        self._held |= check_fit(
            checkpoint,
            shapes=self._shapes or own_shapes(self),
            needed=self._held,
            scale=adapter_scale(self.policy.model),
            backbone=self.backbone.to_plain(),
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the weights are those of this run, and puts a refreshed reference back.

        Most strategies read the weights after this hook, so room for the reference is made here. Where they have been
        read already, there must have been room from the start.

        Raises:
            UnfitCheckpointError: it is one of another model or adapter.
            ValueError: there was no room, because this run does not refresh its reference.
        """
        self.check_fit(checkpoint)
        options = checkpoint.get("options")
        self._stored_options = options and {name: options[name] for name in ("optimizer", "lr_scheduler")}
        self._stored_trained = checkpoint.get(TRAINED)
        trainer = attached_trainer(self)
        if trainer is not None and trainer.ckpt_path is not None:
            emptied = confine_paths(checkpoint, callbacks_of(trainer, Checkpoint), trainer.ckpt_path)
            if emptied and is_being_fitted(self):
                rank_zero_info(f"{', '.join(emptied)}: begins anew, as the checkpoint lies in no folder of this run's.")
        restore_reference(self.policy, checkpoint, strategy=trainer and trainer.strategy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the weights are weights of (for `export`), whether they hold a refreshed reference, and what
        module, optimizer and scheduler were constructed with.
        """
        checkpoint["backbone"], checkpoint["seed"] = self.backbone.to_plain(), self.seed
        checkpoint["reference_is_refreshed"] = self.policy.reference.is_refreshed
        checkpoint["options"] = self._options
        held, shapes = self.held_names(), self._shapes or own_shapes(self)
        checkpoint[SHAPES] = {name: shape for name, shape in shapes.items() if name in held}
        checkpoint[SCALE] = adapter_scale(self.policy.model)
        trained = {"optimized": self._optimized, "start": self._start, "now": trainable(self)}
        checkpoint[TRAINED] = {name: sorted(names) for name, names in trained.items()}
        # In the place of Lightning's own, from which its command line would take options.
        checkpoint[ARGUMENTS] = plain(checkpoint.pop(self.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        checkpoint.pop("hparams_name", None)
        # Callbacks that average weights put theirs in the place of the module's own. A copy that they made before a
        # reference was refreshed does not know that it is held.
        for name, value in checkpoint.get("current_model_state", {}).items():
            checkpoint["state_dict"].setdefault(name, value)
        if self._keeps_reference and is_zero3(self.policy):
            # ZeRO-3 saves no frozen weights. Its checkpoints are one file per rank, which takes this rank's part.
            checkpoint[REFERENCE_PARTS] = self.policy.reference.parts(self.policy.model)

    @property
    def _keeps_reference(self) -> bool:
        """Whether checkpoints hold the reference. Strategies that read weights before `on_load_checkpoint` can speak
        hold it from the start of a run that may refresh it.
        """
        return self.policy.reference.is_refreshed or self._holds_reference_early


def _forgive_frozen(module: Any, incompatible: Any) -> None:
    """A hook of torch's ``load_state_dict``: weights that no checkpoint holds are not missing from it.

    Lightning's callbacks that average weights load states strictly, into a copy of the module inside another.
    """
    kept = module.held_names()
    # The copy is called `module` there, and torch does not tell the hook.
    missing = [name for name in incompatible.missing_keys if name[max(name.find("policy."), 0) :] in kept]
    incompatible.missing_keys[:] = missing
