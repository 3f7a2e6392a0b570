"""What all native models share: the checks of a configuration, and the one forward from ids to logits."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from dmpo_lightning.models.head import target_log_probs
from dmpo_lightning.models.kv_cache import Columns
from dmpo_lightning.models.layers import (
    additive,
    block_causal_mask,
    key_padding_mask,
    padded_position_ids,
    queried,
    rotary_tables,
    take,
)
from dmpo_lightning.models.mixture import Experts, Router

_OURS = re.compile(r"_?(attn|experts)_implementation|output_attentions|gradient_checkpointing")
"""Keys of how a model is computed, not of what it is. That is decided here, whatever a file says."""
_PLAIN: Mapping[str, Collection[object]] = {
    "partial_rotary_factor": (None, 1.0),
    "use_sliding_window": (None, False),
    "use_mrope": (None, False),
    "is_causal": (None, False),
    # LLaDA-MoE calls itself a LLaDA too, and its other keys would be read as those of a dense model of other sizes.
    "num_experts": (None, 0),
    "quantization_config": (None,),
}
"""Keys by which relatives of these models differ from them, and the values by which they do not."""


class NativeConfig(PreTrainedConfig):
    """What the configurations of the native models check, so that no model is built as another one than it is.

    Raises:
        ValueError: numbers of heads that do not divide the width, or each other, or into even head sizes. A switch that
            no published model sets so. Rotary positions that are scaled (YaRN and the like) or rotate another part of a
            head than the family's.
    """

    fixed: ClassVar[Mapping[str, object]] = {}
    """Switches of the published configurations that are built in one setting alone, which all published models have."""
    stated: ClassVar[Collection[str]] = ("num_attention_heads", "rope_theta", "rms_norm_eps")
    """What a config.json has to state: no tensor's shape tells it, and all that is published states it."""

    rope_theta: float = 10000.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        own = {name: getattr(self, name) for name in self.fixed if name in self.__dataclass_fields__}
        self._check_switches(own | kwargs)
        self.rope_theta = self._rotary_base(kwargs)
        self._check_numbers()
        super().__post_init__(**{name: value for name, value in kwargs.items() if not _OURS.fullmatch(name)})
        self._check_heads()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration that a config.json holds.

        What it leaves out is as in the published models. Where a model has it otherwise, its tensors have other shapes.

        Raises:
            ValueError: it leaves out what tensors do not show. A model with other values would be wrong silently.
        """
        # First, because relatives that call themselves by this name leave out more than that.
        cls._check_switches(config_dict)
        places = [config_dict, *(config_dict.get(name) or {} for name in ("rope_scaling", "rope_parameters"))]
        for name in cls.stated:
            names = name, cls.attribute_map.get(name, name)
            if all(place.get(each) is None for place in places for each in names):
                raise ValueError(
                    f"The config.json of {cls._family()} must state {names[1]}, which its tensors do not show."
                )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _family(cls) -> str:
        return cls.__name__.removesuffix("Config")

    @property
    def head_size(self) -> int:
        """The size of a head, which a configuration states as ``head_dim`` or divides its width into."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """How many dimensions of each head are rotated by their positions, from the first on."""
        return int(self.head_size * (getattr(self, "partial_rotary_factor", None) or 1.0))

    def _check_numbers(self) -> None:
        others = {field.name for field in fields(PreTrainedConfig)}
        kinds: dict[str, Any] = {each.name: each.type for each in fields(self) if each.name not in others}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if kind in (int, float) and not (isinstance(value, (int, kind)) and 0 < value < math.inf):
                raise ValueError(f"`{name}` of {self._family()} must be a positive {kind.__name__}, got {value!r}.")

    def _check_heads(self) -> None:
        heads, key_heads, width = self.num_attention_heads, self.num_key_value_heads, self.hidden_size
        divided = getattr(self, "head_dim", None) is not None or width % heads == 0
        # Even head sizes, because rotary positions pair a head's dimensions.
        if not divided or heads % key_heads or self.head_size % 2:
            names = ("num_attention_heads", "num_key_value_heads", "hidden_size")
            query, key, size = (self.attribute_map.get(name, name) for name in names)
            raise ValueError(
                f"`{query}` must be a multiple of `{key}` and divide `{size}` into even head sizes (a stated "
                f"`head_dim` must be even), got {heads}, {key_heads}, {width} and heads of {self.head_size}."
            )

    @classmethod
    def _check_switches(cls, stated: Mapping[str, Any]) -> None:
        # Null switches nothing on.
        fixed = {name: (value, None) if value is False else (value,) for name, value in cls.fixed.items()}
        # A family that has such a key as its own reads it.
        plain = {name: values for name, values in _PLAIN.items() if name not in cls.__dataclass_fields__}
        for name, values in {**plain, **fixed}.items():
            if name in stated and stated[name] not in values:
                raise ValueError(
                    f"{cls._family()} with {name}={stated[name]!r} is not supported; published checkpoints have "
                    f"{next(iter(values))!r}."
                )
        if other := set(stated.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError(f"{cls._family()} with layers of the types {sorted(other)} is not supported.")

    def _rotary_base(self, stated: Mapping[str, Any]) -> float:
        """The base of rotary positions, which transformers 5 writes among the ``rope_parameters``."""
        base, part = self.rope_theta, getattr(self, "partial_rotary_factor", None) or 1.0
        for name in ("rope_scaling", "rope_parameters"):
            rope = stated.get(name) or {}
            plain = isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) == "default"
            if not plain or rope.get("factor", 1.0) != 1.0 or rope.get("partial_rotary_factor", part) != part:
                raise ValueError(f"{self._family()} with scaled rotary positions is not supported, got {rope}.")
            base = rope.get("rope_theta", base)
        return base


class NativeModel(PreTrainedModel):
    """A transformer with its head, called in one way whatever a family's parts are named. Logit i predicts token i.

    A family holds its parts in ``model`` and its head under their published names, and says in `layers_and_norm` and by
    transformers' accessors of embeddings which they are.
    """

    base_model_prefix = "model"
    predicts_at_positions = True
    """Whether the forward takes ``positions`` and ``targets``, which `Policy` asks."""
    is_native = True
    """Whether the forward takes ``columns`` as well, which `Policy` asks."""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    main_input_name = "input_ids"

    def layers_and_norm(self) -> tuple[Any, Any]:
        """The transformer layers in their order, and the norm behind the last of them."""
        raise NotImplementedError

    @property
    def block_size(self) -> int | None:
        """The positions of a completion block of a block-causal model, None where every token sees all others.

        The rule holds for whatever a block-causal model is called with. An ``attention_mask`` of queries and keys takes
        further keys away, as `Policy.completion_log_probs` does. A ``cache`` must be one that grows, and be filled from
        left to right.
        """
        return None

    @property
    def lookback(self) -> int:
        """How many columns before its own the hidden state stands from which a logit is computed: 1 where shifted.

        A forward with a cache that computes some columns has to begin this many columns earlier.
        """
        return 0

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router | Experts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=self.config.initializer_range)

    def state_positions(self, input_ids: Tensor, positions: Tensor | None) -> Tensor | None:
        """The flat indices of the hidden states that predict the tokens at ``positions``. None is all in order."""
        if self.lookback == 0:
            return positions
        length = input_ids.shape[1]
        columns = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        # All positions are listed as well, because their states are shifted: the first counts twice, the last never.
        wanted = columns if positions is None else positions
        # The first column has no left neighbour in its row and, as in Dream's published code, predicts itself.
        return wanted - (wanted % length > 0).long()

    def mask(self, position_ids: Tensor, attended: Tensor | None, first_query: int = 0) -> Tensor | None:
        """Who sees whom, queries being the columns from ``first_query`` on, with padding taken away."""
        if self.block_size is None:
            return key_padding_mask(attended)
        # Without padding positions are columns, and all that there is comes before the end of the only block asked for.
        if attended is None and first_query // self.block_size == (position_ids.shape[1] - 1) // self.block_size:
            return None
        return block_causal_mask(position_ids, attended, self.block_size, first_query=first_query)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        at: Tensor | None = None,
        columns: Columns | None = None,
    ) -> Tensor:
        """Final hidden states, normalised but not shifted: ``[rows length width]``, or those at flat indices ``at``."""
        columns = columns or Columns()
        cache, start, position_ids = columns.cache, columns.start, columns.position_ids
        facts = self.config.rotary_size, self.config.rope_theta
        if cache is not None:
            rotary = cache.rotary(start, input_ids.shape[1], *facts)
            position_ids, attention_mask = cache.seen(start + input_ids.shape[1])
        else:
            if position_ids is None:
                position_ids = padded_position_ids(input_ids, attention_mask)
            rotary = rotary_tables(position_ids, *facts)
        states = self.get_input_embeddings()(input_ids)
        mask = additive(self.mask(position_ids, attention_mask, start), states)
        # The last layer computes the states of the queries alone where it can, for nothing follows that would attend to
        # the others.
        queries, (layers, norm) = queried(at, len(input_ids)), self.layers_and_norm()
        for number, layer in enumerate(layers):
            store = None if cache is None else cache.store(number, start)
            states = layer(states, rotary, mask, store, queries if number == len(layers) - 1 else None)
        states = norm(states)
        return take(states, at) if queries is None else states

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        logit_bias: Tensor | None = None,
        temperature: float = 1.0,
        columns: Columns | None = None,
    ) -> MaskedLMOutput | Tensor:
        """Logits at all positions, or logits or log-probs at those asked for.

        Args:
            input_ids: ``[rows length]``.
            attention_mask: ``[rows length]``, 1 or True where attended. Left padding is masked and takes no position.
            positions: flat indices into ``rows x length``, of any shape. The head is computed there only. In the shape
                ``[rows k]`` each row's indices must lie in that row, and the last layer is computed there only too.
            targets: token ids shaped like ``positions``. Their float32 log-probs are returned instead of logits.
            logit_bias: ``[vocab]``, added to the logits. Minus infinity bans a token.
            temperature: divides the logits before log-probs are taken. Logits that are returned are not divided.
            columns: where the columns stand. With a cache ``input_ids`` are those of a part of its columns, and its own
                mask takes the place of ``attention_mask``. With ``position_ids`` ``attention_mask`` may also be ``[rows
                length length]``, queries by keys.

        Returns:
            `MaskedLMOutput` without ``positions``, and a tensor of logits or log-probs with it.
        """
        at = self.state_positions(input_ids, positions)
        hidden = self.hidden_states(input_ids, attention_mask, at, columns)
        head = self.get_output_embeddings()
        if positions is not None and targets is not None:
            return target_log_probs(head, hidden, targets, logit_bias=logit_bias, temperature=temperature)
        logits = head(hidden) if logit_bias is None else head(hidden) + logit_bias
        return MaskedLMOutput(logits=logits) if positions is None else logits
