"""Masked-diffusion supervised fine-tuning."""

from typing import Any

import torch
from torch import Tensor, nn

from dmpo_lightning.checkpoints.reading import UnfitCheckpointError
from dmpo_lightning.data.demonstrations import DemonstrationBatch
from dmpo_lightning.distributed.internals import is_being_fitted
from dmpo_lightning.functional import Purpose, check_replicates, denoising_cross_entropy, fold_in, row_keys
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.modules.base import OptimizerFactory, PolicyModule
from dmpo_lightning.modules.continuation import KEY
from dmpo_lightning.modules.options import SchedulerFactory
from dmpo_lightning.objectives.estimators import masked_log_probs
from dmpo_lightning.rollout import RolloutRows


class MaskedSFT(PolicyModule):
    """Minimises the denoising cross-entropy of given completions.

    This is LLaDA's objective for supervised fine-tuning, with an exact number of masked tokens in each masking.

    A restart continues with weights, optimizer and scheduler. It is exact between epochs only, because torch's
    DataLoader does not remember its position in one.

    Args:
        model: a hub id, a folder, the name of an embedded model, or a `Backbone`, which says how it is loaded and what
            of it is trained.
        replicates: random maskings per completion and step. It must be even when ``antithetic`` is true.
        antithetic: draw the maskings in pairs.
        optimizer: from parameters to an optimizer.
        lr_scheduler: from an optimizer to a scheduler that advances once per optimizer step. Lightning's own
            `ReduceLROnPlateau` of ``lightning.pytorch.cli`` looks at its ``monitor`` after each validation.
        seed: of masks and fresh weights. None is 0, or the command line's ``seed_everything``.

    Raises:
        ValueError: replicates below 1, or odd with antithetic pairs. There is nothing to load from ``model``.

    Example:
        >>> from dmpo_lightning import Backbone, LoRA, MaskedSFT
        >>> module = MaskedSFT(Backbone("sudoku_tiny", adapter=LoRA(r=8)), replicates=4)
    """

    def __init__(
        self,
        model: str | Backbone | nn.Module,
        *,
        replicates: int = 2,
        antithetic: bool = True,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        seed: int | None = None,
    ) -> None:
        given = dict(locals())
        check_replicates(replicates, antithetic=antithetic)
        super().__init__(model, with_reference=False, optimizer=optimizer, lr_scheduler=lr_scheduler, seed=seed)
        self.replicates, self.antithetic = replicates, antithetic
        self.note_arguments(given)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The weights of any run of the same model, to be evaluated. A run continues from its own kind only.

        Raises:
            UnfitCheckpointError: to be trained on, and written by DMPO.
        """
        if KEY in checkpoint and is_being_fitted(self):
            raise UnfitCheckpointError(
                "`ckpt_path` was written by DMPO, so there is no run of MaskedSFT to continue; `export` it "
                "and pass the folder as `model`."
            )
        super().on_load_checkpoint(checkpoint)

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        # This number counts over all epochs, so that each epoch meets fresh masks.
        loss = self.loss(batch, number=self.trainer.fit_loop.total_batch_idx)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        # The same masks at every validation, so that the losses of two validations share their noise.
        self.log("val/loss", self.loss(batch, number=-1), prog_bar=True, batch_size=len(batch), sync_dist=True)

    def loss(self, batch: DemonstrationBatch, *, number: int) -> Tensor:
        length, limit = batch.prompt_ids.shape[1] + batch.completion_ids.shape[1], self.policy.max_length
        if limit is not None and length > limit:
            raise ValueError(
                f"The model takes {limit} tokens, but a pair in rows {batch.index.tolist()} needs {length} (prompt and "
                "`completion_length`); shorten or remove it."
            )
        keys = row_keys(self.seed, batch.index, group_size=1, buffer=number).squeeze(1)
        ids = batch.completion_ids
        rows = RolloutRows(batch.prompt_ids, batch.prompt_mask, ids, keys, torch.zeros_like(ids), temperature=1.0)
        log_prob, masks, blocks = masked_log_probs(
            self.policy, rows, fold_in(keys, Purpose.LOSS), replicates=self.replicates, antithetic=self.antithetic
        )
        return torch.mean(denoising_cross_entropy(log_prob, masks, blocks=blocks))
