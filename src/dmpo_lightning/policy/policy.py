"""What the algorithm needs of a model: logits at positions, log-probs of completions, decoding."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dmpo_lightning.distributed.sharding import check_gatherable, gathered, is_zero3
from dmpo_lightning.models.kv_cache import Columns, KeyValueCache
from dmpo_lightning.models.loading import TokenFacts, token_facts
from dmpo_lightning.models.lora import MergedCopy
from dmpo_lightning.models.masked_lm import as_predictor, check_masked_lm
from dmpo_lightning.policy.reference import ReferencePolicy
from dmpo_lightning.policy.rows import clean_and_noisy, completion_blocks, rows_of_replicates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, there is eval mode and no gradient, as completions are sampled and scored. Each submodule's own mode is
    restored behind it.
    """
    # `train()` afterwards would put every submodule into training mode, those that were in eval mode before as well.
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


class Policy(nn.Module):
    """A masked diffusion language model with its tokenizer and its reference, as samplers and objectives see it.

    Args:
        model: a network with an attribute ``predicts_at_positions``, which is called like `LLaDAForMaskedDiffusion`.
            Any other is called like a masked language model of transformers, whose logits stand at their positions.
        tokenizer: decodes completions, and says which tokens there are.
        mask_token_id: overrides the id that the model's configuration or the tokenizer names.
        with_reference: False makes no frozen copy, where no reference is needed (supervised fine-tuning, prediction).

    Raises:
        ValueError: no mask token id can be had, or the model is causal or cannot be called.

    Example:
        >>> import torch
        >>> from dmpo_lightning import Policy, load_model, load_tokenizer
        >>> policy = Policy(load_model("sudoku_tiny"), load_tokenizer("sudoku_tiny"))
        >>> completions = torch.tensor([policy.tokenizer.convert_tokens_to_ids(list("1234"))])
        >>> policy.decode(completions)
        ['1234']
    """

    _ban: Tensor

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        mask_token_id: int | None = None,
        with_reference: bool = True,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.reference = ReferencePolicy(model, exists=with_reference)
        self.tokenizer = tokenizer
        self.facts: TokenFacts = token_facts(model, tokenizer, mask_token_id)
        with evaluating(model):
            check_masked_lm(model, mask_token_id=self.facts.mask_token_id, vocab_size=self.facts.vocab_size)
        self.max_length: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self.anywhere: Callable[[bool], bool] = bool
        """Whether something holds on any rank, or in a single process on this one. Samplers whose number of forwards
        depends on what they sample ask it before they stop: where forwards gather sharded weights, ranks must run
        equally many.
        """
        self.on_denoising_step: Callable[[int, int], None] | None = None
        """Called with how many denoising steps of the present completions are done, and how many there are at most. It
        is for watching, and meant to return at once.
        """
        self._expected_steps = (0, 0)
        self._merged: MergedCopy | None = None
        self._samples_merged = False
        ban = torch.zeros(self.facts.vocab_size, dtype=torch.float32)
        ban[list(self.facts.banned_token_ids)] = -torch.inf
        # Not persistent: it follows from tokenizer and model, and checkpoints hold trainable weights alone.
        self.register_buffer("_ban", ban, persistent=False)

    def to_device_of_units(self, device: torch.device) -> None:
        """Moves what is outside of the networks, where a strategy moves those by itself."""
        self._ban = self._ban.to(device)

    def room_for_prompts(self, completion_length: int) -> int | None:
        """Prompt tokens that the model takes beside a completion, None where it names no limit.

        Raises:
            ValueError: there is no room for any.
        """
        if self.max_length is not None and completion_length >= self.max_length:
            raise ValueError(
                f"`completion_length` must leave room for a prompt in the {self.max_length} tokens of the model, "
                f"got {completion_length}; lower it."
            )
        return None if self.max_length is None else self.max_length - completion_length

    @property
    def has_adapters(self) -> bool:
        """Whether the network carries PEFT adapters, which are what is trained then."""
        return self.reference.is_adapter

    def refresh_reference(self) -> None:
        """The reference becomes the policy as it is now."""
        self.reference.refresh(self.model)

    def reference_equals_policy(self) -> bool:
        """Whether the reference is known to equal the policy on every rank. Ranks call it together."""
        return not self.anywhere(not self.reference.equals(self.model))

    def logits(
        self,
        ids: Int[Tensor, "rows length"],
        attention_mask: Bool[Tensor, "rows length"] | Bool[Tensor, "rows length length"] | None,
        positions: Int[Tensor, "*at"],
        *,
        reference: bool = False,
        cache: KeyValueCache | None = None,
        columns: range | None = None,
        position_ids: Int[Tensor, "rows length"] | None = None,
    ) -> Float[Tensor, "*at vocab"]:
        """Float32 logits at flat indices into ``rows x length``.

        The mask token, and ids that the tokenizer never produces, have minus infinity. ``positions`` may have any
        shape. If it is ``[rows k]``, then each row's indices must lie in that row. With a ``cache`` only ``columns``
        are computed, all of them at first. The others are attended to as they were when they were computed last. No
        ``attention_mask`` says that nothing is padded. A native backbone also takes one of queries and keys, with
        ``position_ids``.
        """
        native: dict[str, Any] = {} if position_ids is None else {"columns": Columns(position_ids)}
        if cache is not None and columns is not None:
            # A shifted model reads a logit from the column before, which has to be computed as well. The mask is not
            # cut to these columns, because the cache knows that of all columns.
            start, length = max(columns.start - self.lookback, 0), ids.shape[1]
            ids = ids[:, start : columns.stop]
            # Flat indices counted rows of all columns, and count rows of the computed ones from here on.
            positions = positions // length * ids.shape[1] + positions % length - start
            native = {"columns": Columns(cache=cache, start=start)}
        with self.predictor(reference) as predict:
            return predict(ids, attention_mask, positions=positions, logit_bias=self._ban, **native).float()

    @property
    def is_native(self) -> bool:
        """Whether the backbone is ours, so that `logits` takes a cache or masks of queries and keys."""
        return getattr(self.model, "is_native", False)

    @property
    def lookback(self) -> int:
        """Columns before its own that a logit is computed from: 1 for shifted models such as Dream."""
        return getattr(self.model, "lookback", 0)

    @property
    def block_size(self) -> int | None:
        """The number of positions of a block of a block-causal backbone, None for a bidirectional one."""
        return self.model.block_size if self.is_native else None

    def completion_log_probs(
        self,
        prompt_ids: Int[Tensor, "rows prompt"],
        prompt_mask: Bool[Tensor, "rows prompt"],
        completion_ids: Int[Tensor, "rows length"],
        masks: Bool[Tensor, "rows replicate length"],
        *,
        at: Bool[Tensor, "rows replicate length"] | None = None,
        reference: bool = False,
        temperature: float = 1.0,
    ) -> Float[Tensor, "rows replicate length"]:
        """Float32 log-probs of the completion's own tokens, given the prompt and what each replicate leaves unmasked.

        They are computed at the masked positions only, or at ``at``, a subset of them, and are zero everywhere else.
        ``temperature`` divides the logits. At 1 they are the model's own.
        """
        at = masks if at is None else at
        noisy = torch.where(masks, self.facts.mask_token_id, completion_ids[:, None])
        # `nonzero` in the indices, indexing by `at` and `masked_scatter` below all go through `at` row by row, so that
        # indices, targets and log-probs belong together.
        if self.block_size is None:
            rows = rows_of_replicates(prompt_ids, prompt_mask, noisy, at)
        else:
            rows = clean_and_noisy(
                prompt_ids, prompt_mask, completion_ids, noisy, at, self.block_size, shifted=self.lookback > 0
            )
        native: dict[str, Any] = {} if rows.position_ids is None else {"columns": Columns(rows.position_ids)}
        targets = completion_ids[:, None].expand_as(masks)[at]
        # The bias is the sampler's own: the density that scores must be the one that drew
        # (docs/decisions/003-banned-tokens.md).
        with self.predictor(reference) as predict:
            log_probs = predict(
                rows.ids,
                rows.attention_mask,
                positions=rows.flat,
                targets=targets,
                logit_bias=self._ban,
                temperature=temperature,
                **native,
            )
        return torch.zeros(masks.shape, dtype=torch.float32, device=masks.device).masked_scatter(at, log_probs.float())

    def completion_blocks(
        self, prompt_mask: Bool[Tensor, "rows prompt"], completion_ids: Int[Tensor, "rows length"]
    ) -> Int[Tensor, "rows length"] | None:
        """The block of each token of block-causal completions, see `completion_blocks`. None for models without."""
        if self.block_size is None:
            return None
        return completion_blocks(prompt_mask, self._are_ends(completion_ids), self.block_size)

    def replayed_steps(self, reveal_step: Int[Tensor, "*rows length"]) -> Int[Tensor, "*rows length"]:
        """The recorded steps, renumbered so that those that one forward can replay together have one number.

        Blocks of a block-causal model are scored beside each other, so their steps count from 0 in each. Samplers
        number the steps of block k from k times the block size on.
        """
        if self.block_size is None:
            return reveal_step
        return torch.where(reveal_step < 0, reveal_step, reveal_step % self.block_size)

    @property
    def predicting(self) -> Any:
        """The network that the policy predicts by: its own, or inside `merged` the copy."""
        return self._merged.model if self._samples_merged and self._merged is not None else self.model

    @contextmanager
    def predictor(self, reference: bool) -> Iterator[Any]:
        """Inside, what to call for the predictions of the policy or of its reference."""
        if reference:
            with self.reference.of(self.model) as model:
                yield as_predictor(model)
        else:
            yield as_predictor(self.predicting)

    def expect_steps(self, done: int, total: int) -> None:
        """Says that ``done`` of ``total`` denoising steps are behind, before completions are sampled, and after."""
        self._expected_steps = (done, total)
        if self.on_denoising_step is not None:
            self.on_denoising_step(done, total)

    def note_step(self, step: int) -> None:
        """Tells who watches that a denoising step, which counts from 0, has revealed its tokens."""
        # Asked in every step of every sampler: unwatched it costs one comparison, and it never waits for the device.
        if self.on_denoising_step is not None:
            before, total = self._expected_steps
            self.on_denoising_step(min(before + step + 1, total), total)

    def decode(self, completion_ids: Int[Tensor, "rows length"], *, special_tokens: bool = False) -> list[str]:
        """Text of each completion up to its first end token.

        Special tokens are left out, or with ``special_tokens`` kept, the end token included, as the published answer
        checks read completions.
        """
        # True counts as 1 and takes the end token along. Where there is none, a slice ends with its row.
        ends = (self.effective_length(completion_ids) + special_tokens).tolist()
        rows = [row[:end] for row, end in zip(completion_ids.tolist(), ends, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=not special_tokens)

    def effective_length(self, completion_ids: Int[Tensor, "rows length"]) -> Int[Tensor, " rows"]:
        """How many tokens come before the first end token. Where there is none, all of them."""
        ends = self._are_ends(completion_ids)
        length = completion_ids.shape[-1]
        # `argmax` takes no booleans. Of equal values it returns the first.
        return torch.where(ends.any(-1), ends.int().argmax(-1), length)

    def _are_ends(self, ids: Int[Tensor, "rows length"]) -> Bool[Tensor, "rows length"]:
        return torch.isin(ids, torch.tensor(self.facts.end_token_ids, device=ids.device))

    def check_mergeable(self) -> None:
        """Raises ValueError where `merged` cannot work."""
        if not self.has_adapters:
            raise ValueError("`sample_merged` needs adapters; set `adapter`, or leave it out.")
        MergedCopy.check(self.model)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the policy predicts from a copy of its weights into which the adapters are merged as they are now.

        The model itself is never written to, and the reference stays what it is.
        """
        if self._merged is None:
            # Kept between buffers. Only its adapted layers are refreshed, which are all that it holds for itself.
            self._merged = MergedCopy(self.model)
        self._merged.refresh(self.model)
        self._samples_merged = True
        try:
            yield
        finally:
            self._samples_merged = False

    @property
    def networks(self) -> list[nn.Module]:
        """The network that is trained and, if there is one, the reference's own copy."""
        return [network for network in (self.model, self.reference.model) if network is not None]

    def check_gatherable(self) -> None:
        """Raises ValueError where `gathered` cannot work."""
        check_gatherable(self.model)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every rank holds all weights, of the reference too, and runs its forwards by itself.

        Under ZeRO-3 the ranks still run them together, because it compares what its ranks have run.
        """
        with ExitStack() as stack:
            for model in self.networks:
                stack.enter_context(gathered(model))
            together = self.anywhere
            # Samplers need not ask the other ranks any more before they stop, see docs/decisions/016-equal-forwards.md.
            if not is_zero3(self.model):
                self.anywhere = bool
            try:
                yield
            finally:
                self.anywhere = together
