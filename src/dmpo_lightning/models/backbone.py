"""A network with everything that is decided about it before training: where it comes from and how it is prepared."""

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from dmpo_lightning.models.loading import Quantization, load_model, load_tokenizer
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.models.parts import enable_checkpointing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Backbone:
    """What `DMPO` and `MaskedSFT` train, for those who want more than a name.

    Args:
        model: a hub id, a folder, the name of an embedded model, or a module like `LLaDAForMaskedDiffusion`.
        tokenizer: a tokenizer, or the id or folder of one. None takes that of ``model``, which must then be a name.
        revision: branch, tag or commit on the hub.
        dtype: of the weights, such as bfloat16. ``auto`` takes that of the checkpoint.
        random_weights: starts from fresh weights of the same architecture, drawn from the module's seed.
        adapter: trains a `LoRA` and freezes the model's own weights. None trains all weights, or the adapter that
            ``model`` already carries.
        quantization: ``nf4`` loads the frozen weights in 4 bits, which needs an adapter.
        gradient_checkpointing: computes transformer blocks again in the backward pass, and keeps no activations.
        compile_blocks: runs the transformer blocks through torch.compile. The first forwards then take minutes.
        trust_remote_code: runs code that comes with the checkpoint, which native models never need.
        mask_token_id: overrides what the model's configuration or the tokenizer names.

    Raises:
        ValueError: a module without a tokenizer.

    Example:
        >>> from dmpo_lightning import Backbone, LoRA
        >>> network = Backbone("sudoku_tiny", adapter=LoRA(r=8)).build()
        >>> sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
        40960
    """

    model: str | nn.Module
    _: KW_ONLY
    tokenizer: "str | PreTrainedTokenizerBase | None" = None
    revision: str | None = None
    dtype: str = "auto"
    random_weights: bool = False
    adapter: LoRA | None = None
    quantization: Quantization | None = None
    gradient_checkpointing: bool = False
    compile_blocks: bool = False
    trust_remote_code: bool = False
    mask_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is None and not isinstance(self.model, str):
            raise ValueError(
                "`tokenizer` is needed when `model` is a module: pass Backbone(model, tokenizer=...) with a tokenizer, "
                "or the id or folder of one."
            )

    @classmethod
    def of(cls, model: "str | Backbone | nn.Module") -> "Backbone":
        """A backbone as it is, or a name or a module with the default of everything else."""
        return model if isinstance(model, Backbone) else cls(model)

    def build(self, *, seed: int = 0) -> nn.Module:
        """The network, loaded, quantised, checkpointed and adapted, in training mode. ``seed`` draws fresh weights.

        Raises:
            ValueError: quantisation without an adapter, an adapter for a model that carries one, or what `load_model`
                raises.
        """
        network, source = self.model, None
        if isinstance(network, str):
            source = network
            network = load_model(
                source,
                dtype=self.dtype,
                revision=self.revision,
                random_weights=self.random_weights,
                seed=seed,
                quantization=self.quantization,
                trust_remote_code=self.trust_remote_code,
            )
        carries_adapter = hasattr(network, "peft_config")
        if self.adapter is not None and carries_adapter:
            raise ValueError(f"{self.model!r} already carries an adapter, which will be trained; leave `adapter` out.")
        if self.quantization is not None and self.adapter is None and not carries_adapter:
            raise ValueError("`quantization` freezes the model, which leaves nothing to train; set `adapter` as well.")
        if self.gradient_checkpointing:
            enable_checkpointing(network)
        if self.adapter is not None:
            network = self.adapter.apply(network, source, seed=seed, revision=self.revision)
        # Transformers hands out models in eval mode, which would switch off dropout and checkpointing.
        return network.train()

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, with its family's chat template where it has none of its own."""
        assert self.tokenizer is not None or isinstance(self.model, str)
        return load_tokenizer(self.tokenizer or self.model, revision=self.revision)  # type: ignore[arg-type]

    def to_plain(self) -> dict[str, Any]:
        """In Python's own types, as checkpoints hold it. A module or tokenizer that was passed as an object is None."""
        return vars(self) | {
            "model": self.model if isinstance(self.model, str) else None,
            "tokenizer": self.tokenizer if isinstance(self.tokenizer, str) else None,
            # A class of ours would be refused by `weights_only`, with which checkpoints are read.
            "adapter": None if self.adapter is None else dict(vars(self.adapter)),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any], *, model: str | None = None) -> "Backbone":
        """The backbone that `to_plain` described, with ``model`` in place of its own source if that is given.

        Raises:
            ValueError: the source was a module, and ``model`` does not say where to find its weights.
        """
        # Weights may have moved to another machine since.
        source = model or plain["model"]
        if source is None:
            raise ValueError("The run was given its model as a module; say where its base is now (`model=`, --model).")
        adapter = None if plain["adapter"] is None else LoRA(**plain["adapter"])
        return replace(cls(source), **(plain | {"model": source, "adapter": adapter}))
