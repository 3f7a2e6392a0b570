"""What the algorithm needs of a model: logits at positions, completion log-probs, the reference policy, decoding."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dmpo_lightning.distributed.sharding import (
    check_gatherable,
    copy_weights,
    copy_within,
    gathered,
    is_zero3,
    plain_name,
)
from dmpo_lightning.models.head import log_probs_of
from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.models.loading import TokenFacts, token_facts
from dmpo_lightning.models.merging import MergedCopy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE_ADAPTER = "reference"


class Policy(nn.Module):
    """A masked diffusion language model with its tokenizer, seen by samplers and objectives.

    The reference policy is the same model with its adapters off when the model carries PEFT adapters (after
    `refresh_reference`, a frozen adapter named ``reference``), otherwise a frozen copy, made at construction.

    Args:
        model: with an attribute ``predicts_at_positions`` called like `LLaDAForMaskedDiffusion`; any other as a masked
            language model of transformers, whose full logits are aligned to positions.
        tokenizer: decodes completions; also the source of the token facts.
        mask_token_id: overrides the id named by the model's configuration or the tokenizer.
        with_reference: False saves the frozen copy where no reference is needed (supervised fine-tuning, prediction).

    Raises:
        ValueError: no mask token id can be found.
    """

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
        self.tokenizer = tokenizer
        self.facts: TokenFacts = token_facts(model, tokenizer, mask_token_id)
        config: Any = getattr(model, "config", None)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.has_adapters = hasattr(model, "peft_config")
        self.reference_is_refreshed = False
        self._equal_versions: tuple[int, ...] | None = None
        self.anywhere: Callable[[bool], bool] = bool
        """Whether something holds on any rank; in a single process, on this one. Samplers whose number of forwards
        depends on what they sample ask it before they stop: where forwards gather sharded weights, ranks must run
        equally many.
        """
        self.before_forward: Callable[[str], None] | None = None
        """Called before each forward with ``policy`` or ``reference``; for checks."""
        self.holds_all_weights = False
        """Inside `gathered`."""
        self._merged: MergedCopy | None = None
        self._samples_merged = False
        self.reference_model: nn.Module | None = None
        if with_reference and not self.has_adapters:
            self.reference_model = copy.deepcopy(model).requires_grad_(False).eval()
        ban = torch.zeros(self.facts.vocab_size, dtype=torch.float32)
        ban[list(self.facts.banned_token_ids)] = -torch.inf
        self.register_buffer("_ban", ban, persistent=False)

    def train(self, mode: bool = True) -> "Policy":
        """The reference stays in eval mode, always."""
        super().train(mode)
        if self.reference_model is not None:
            self.reference_model.eval()
        return self

    def logits(
        self,
        ids: Int[Tensor, "rows length"],
        attention_mask: Bool[Tensor, "rows length"] | Bool[Tensor, "rows length length"],
        positions: Int[Tensor, "*at"],
        *,
        reference: bool = False,
        cache: KeyValueCache | None = None,
        columns: range | None = None,
        position_ids: Int[Tensor, "rows length"] | None = None,
    ) -> Float[Tensor, "*at vocab"]:
        """Float32 logits at flat indices into ``rows x length``; never-occurring ids and the mask token are minus
        infinity.

        ``positions`` may have any shape; if it is ``[rows k]``, then each row's indices must lie in that row. With a
        ``cache`` only ``columns`` are computed (all of them at first); the others are attended to as they were when
        they were computed last. A native backbone also takes an ``attention_mask`` of queries and keys, with
        ``position_ids``.
        """
        with self._selected(reference) as model:
            if position_ids is not None:
                return self._predict(model, ids, attention_mask, positions, position_ids=position_ids).float()
            if cache is None or columns is None:
                return self._predict(model, ids, attention_mask, positions).float()
            start = max(columns.start - self.lookback, 0)
            part = ids[:, start : columns.stop]
            inside = positions // ids.shape[1] * part.shape[1] + positions % ids.shape[1] - start
            return self._predict(model, part, attention_mask, inside, cache=cache, start=start).float()

    @property
    def is_native(self) -> bool:
        """Whether the backbone is ours, so that `logits` takes a cache or masks of queries and keys."""
        return getattr(self.model, "is_native", False)

    @property
    def lookback(self) -> int:
        """Columns before its own that a logit is computed from: 1 for shifted models such as Dream."""
        return getattr(self.model, "lookback", 0)

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

        Computed at the masked positions only (or at ``at``, a subset of them); zero everywhere else. ``temperature``
        divides the logits; 1 is the model itself.
        """
        at = masks if at is None else at
        replicates, prompt_length = masks.shape[1], prompt_ids.shape[1]
        noisy = torch.where(masks, self.facts.mask_token_id, completion_ids[:, None])
        prompt = prompt_ids[:, None].expand(-1, replicates, -1)
        ids = torch.cat((prompt, noisy), dim=-1).flatten(0, 1)
        attention_mask = full_attention_mask(prompt_mask.repeat_interleave(replicates, 0), masks.shape[-1])
        flat = torch.nn.functional.pad(at.flatten(0, 1), (prompt_length, 0)).flatten().nonzero().squeeze(-1)
        targets = completion_ids[:, None].expand_as(masks)[at]
        with self._selected(reference) as model:
            log_probs = self._predict(model, ids, attention_mask, flat, targets=targets, temperature=temperature)
        return torch.zeros(masks.shape, dtype=torch.float32, device=masks.device).masked_scatter(at, log_probs.float())

    def _predict(
        self,
        model: Any,
        ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        *,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        **native: Any,
    ) -> Tensor:
        """Through the model's own prediction at positions, or from the full logits of any other masked language
        model. ``native`` goes to native backbones only.
        """
        if getattr(model, "predicts_at_positions", False):
            return model(
                ids,
                attention_mask,
                positions=positions,
                targets=targets,
                logit_bias=self._ban,
                temperature=temperature,
                **native,
            )
        logits = model(input_ids=ids, attention_mask=attention_mask.long()).logits.flatten(0, 1)[positions] + self._ban
        return logits if targets is None else log_probs_of(logits, targets, temperature)

    @torch.no_grad()
    def refresh_reference(self) -> None:
        """The reference becomes the policy as it is now."""
        if self.reference_model is not None:
            copy_weights(self.model, self.reference_model)
        elif self.has_adapters:
            self._copy_adapter()
        self.reference_is_refreshed = True
        self._equal_versions = self._versions()

    @property
    def reference_is_current(self) -> bool:
        """Whether the reference is known to equal the policy: no update was announced and no weight was written
        since, on any rank.
        """
        return not self.anywhere(self._equal_versions is None or self._equal_versions != self._versions())

    def announce_update(self) -> None:
        """From now on the policy may differ from a reference that equalled it."""
        self._equal_versions = None

    def _versions(self) -> tuple[int, ...]:
        """Torch's counters of in-place writes to the weights of policy and reference."""
        return tuple(parameter._version for parameter in self.parameters())

    def reference_parameter_names(self, prefix: str = "") -> list[str]:
        """Names of the parameters that belong to the reference alone: its frozen copy or its frozen adapter."""
        mark = f".{REFERENCE_ADAPTER}."
        names = [plain_name(name) for name, _ in self.named_parameters()]
        return [prefix + name for name in names if name.startswith("reference_model.") or mark in name]

    def decode(self, completion_ids: Int[Tensor, "rows length"], *, special_tokens: bool = False) -> list[str]:
        """Text of each completion up to its first end token.

        Special tokens are left out, or with ``special_tokens`` kept, the end token included, as the published answer
        checks read completions.
        """
        ends = (self.effective_length(completion_ids) + special_tokens).tolist()
        rows = [row[:end] for row, end in zip(completion_ids.tolist(), ends, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=not special_tokens)

    def effective_length(self, completion_ids: Int[Tensor, "rows length"]) -> Int[Tensor, " rows"]:
        """Tokens before the first end token; the whole length where there is none."""
        ends = torch.isin(completion_ids, torch.tensor(self.facts.end_token_ids, device=completion_ids.device))
        length = completion_ids.shape[-1]
        return torch.where(ends.any(-1), ends.int().argmax(-1), length)

    @contextmanager
    def _selected(self, reference: bool) -> Iterator[Any]:
        if self.before_forward is not None:
            self.before_forward("reference" if reference else "policy")
        if not reference:
            yield self._merged.model if self._samples_merged and self._merged is not None else self.model
        elif self.reference_model is not None:
            yield self.reference_model
        elif not self.has_adapters:
            raise ValueError("This policy was built without a reference; construct it with with_reference=True.")
        elif self.reference_is_refreshed:
            active = self.model.active_adapter
            self.model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
            try:
                yield self.model
            finally:
                self.model.set_adapter(active)
        else:
            with self.model.disable_adapter():
                yield self.model

    def check_mergeable(self) -> None:
        """Raises ValueError where `merged` cannot work."""
        if not self.has_adapters:
            raise ValueError("`sample_merged` needs adapters; set `adapter`, or leave it out.")
        MergedCopy.check(self.model)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the policy's logits come from a copy of the weights with the adapters merged in, as they are now.

        The model itself is never written to; the reference is as ever.
        """
        if self._merged is None:
            self._merged = MergedCopy(self.model)
        self._merged.renew(self.model)
        self._samples_merged = True
        try:
            yield
        finally:
            self._samples_merged = False

    def make_room_for_reference(self) -> None:
        """Adds the frozen adapter that `refresh_reference` writes to, which sharding strategies must see beforehand.

        Until it is written to, the reference is the model with its adapters off.
        """
        if not self.has_adapters or REFERENCE_ADAPTER in self.model.peft_config:
            return
        active = self.model.active_adapter
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn, which must not move the dropout of a run
            self.model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(self.model.peft_config[active]))
        self.model.set_adapter(active)
        for name, parameter in self.model.named_parameters():
            if f".{REFERENCE_ADAPTER}." in name:
                parameter.requires_grad_(False)

    @property
    def has_room_for_reference(self) -> bool:
        """Whether there is a copy, or an adapter, that `refresh_reference` would write to."""
        return self.reference_model is not None or REFERENCE_ADAPTER in getattr(self.model, "peft_config", {})

    def _copy_adapter(self) -> None:
        self.make_room_for_reference()
        active = f".{self.model.active_adapter}."
        names = [plain_name(name) for name, _ in self.model.named_parameters()]
        copies = [name for name in names if f".{REFERENCE_ADAPTER}." in name]
        copy_within(self.model, {name.replace(f".{REFERENCE_ADAPTER}.", active): name for name in copies})

    def check_gatherable(self) -> None:
        """Raises ValueError where `gathered` cannot work."""
        check_gatherable(self.model)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every rank holds all weights, of the reference too, and runs its forwards by itself; but together
        under ZeRO-3, which compares what its ranks have run.
        """
        with ExitStack() as stack:
            for model in filter(None, (self.model, self.reference_model)):
                stack.enter_context(gathered(model))
            together = self.anywhere
            if not is_zero3(self.model):
                self.anywhere, self.holds_all_weights = bool, True
            try:
                yield
            finally:
                self.anywhere, self.holds_all_weights = together, False


def full_attention_mask(prompt_mask: Bool[Tensor, "rows prompt"], length: int) -> Bool[Tensor, "rows total"]:
    """The prompt's padding mask, extended over a completion of ``length`` tokens that are all attended."""
    return torch.nn.functional.pad(prompt_mask.bool(), (0, length), value=True)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient: how completions are sampled and scored. Restores each submodule's own mode."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode
