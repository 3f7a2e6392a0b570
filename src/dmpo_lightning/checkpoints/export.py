"""From a checkpoint to a folder that others can load: a PEFT adapter, or a whole Hugging Face model."""

import copy
import logging
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from dmpo_lightning.checkpoints.reading import is_reference, read_weights
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.models.loading import EMBEDDED_MODELS
from dmpo_lightning.models.verification import weights_in

PREFIX = "policy.model."
ADAPTER = re.compile(r"(?<=lora_magnitude_vector)\.default\.weight|(\.modules_to_save)?\.default(?=\.|$)")
"""What PEFT writes into the names of an adapter's weights in memory, and not in its files."""

logger = logging.getLogger(__name__)


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    merge: bool = False,
    model: str | None = None,
    trust_remote_code: bool = False,
    trust_checkpoint: bool = False,
) -> int:
    """Writes the trained policy of a checkpoint to ``output``, with its tokenizer, and returns the number of trained
    tensors.

    An adapter is written as PEFT has it (``adapter_model.safetensors``), or merged into its base with ``merge``. A
    fully fine-tuned model is written whole. Either folder can be given as ``model`` to any command. Of transformers it
    is ``AutoModelForMaskedLM.from_pretrained`` that loads a whole one, if it is native after
    ``import dmpo_lightning.models``.

    Args:
        checkpoint: a file or folder written by the Trainer, see `read_weights`.
        output: a folder, created if need be.
        merge: add the adapter to the base's weights and write the whole model.
        model: where the base is to be found now, if not where the run had it. The checkpoint may name any hub id or
            folder, which is then loaded as data.
        trust_remote_code: run code that comes with the base. What the checkpoint says of this is not believed.
        trust_checkpoint: read a folder, which can run any code.

    Raises:
        ValueError: no such file, not a checkpoint of this package, tensors that do not match the model, an adapter on
            random weights without ``merge``, or an output folder that holds other weights.
    """
    saved = read_weights(checkpoint, trust_checkpoint=trust_checkpoint)
    backbone = named_backbone(saved["backbone"], model, trust_remote_code=trust_remote_code)
    if backbone.adapter is not None and backbone.random_weights and not merge:
        raise ValueError("An adapter on random weights has no base to be found again; write the model with --merge.")
    # Trained in 4 bits or checkpointed, an exported model is neither.
    network = replace(backbone, quantization=None, gradient_checkpointing=False).build(seed=int(saved.get("seed", 0)))
    adapted: Any = network if hasattr(network, "peft_config") else None
    if merge and adapted is None:
        raise ValueError("There is no adapter to merge: the run trained the whole model; leave out --merge.")
    # Refused before anything is written.
    refuse_other_weights(output, adapter=adapted is not None and not merge)
    count = load_trained(network, saved["state_dict"])
    if adapted is not None and not merge:
        refuse_trained_base(saved["state_dict"])
    whole = adapted.merge_and_unload() if merge else network
    save_policy(whole, backbone.load_tokenizer(), whole.state_dict(), output)
    return count


def named_backbone(plain: dict[str, Any], model: str | None, *, trust_remote_code: bool) -> Backbone:
    """What a checkpoint says of its model, which is believed as far as nothing of it runs.

    ``model`` is where the base is now, if not where the run had it.

    Raises:
        ValueError: it does not say so in a way that is understood.
    """
    try:
        for name in ("model", "tokenizer"):
            if not isinstance(plain[name], str | None):
                raise TypeError(f"{name} {plain[name]!r}")
        backbone = Backbone.from_plain(plain | {"trust_remote_code": trust_remote_code}, model=model)
    except (TypeError, KeyError) as error:
        raise ValueError(f"The checkpoint describes its model in a way that is not understood: {error}.") from error
    if plain.get("trust_remote_code") and not trust_remote_code:
        logger.warning(
            "The run trusted code that comes with %r. It is not executed now; add --trust_remote_code "
            "(`trust_remote_code=True` in Python) if you trust it.",
            backbone.model,
        )
    if model is None and backbone.model not in EMBEDDED_MODELS and not Path(str(backbone.model)).is_dir():
        logger.warning("The base is %r of the hub, as the checkpoint says.", backbone.model)
    return backbone


def save_policy(network: Any, tokenizer: Any, weights: dict[str, torch.Tensor], output: str | Path) -> None:
    """Writes a model in memory, divided among ranks or not, from its whole ``weights``. Called on one rank.

    Weights of its kind that were there before are gone afterwards, so that no file is left of which loaders might take
    a part for the new one. Until all is written they stay as they are, since ``weights`` may be read from them.
    """
    folder, adapter = Path(output), hasattr(network, "peft_config")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        if adapter:
            _write_adapter(network.peft_config["default"], weights, Path(partial))
        else:
            network.save_pretrained(partial, state_dict=weights)
        new = [path.replace(folder / path.name) for path in Path(partial).iterdir()]
    for path in weights_in(folder)[adapter]:
        if path not in new:
            path.unlink()
    tokenizer.save_pretrained(folder)


def _write_adapter(config: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes an adapter as PEFT names it. PEFT itself looks modules up by names that FSDP1 changes, and then writes an
    empty file.
    """
    from safetensors.torch import save_file

    adapter = {ADAPTER.sub("", name): value for name, value in weights.items() if ADAPTER.search(name)}
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # A copy, because the network in memory keeps its own. PEFT itself saves adapters with this flag.
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def refuse_other_weights(output: str | Path, *, adapter: bool) -> None:
    """Raises ValueError for a folder that would hold an adapter and a model, of which loaders take one or the other."""
    if others := weights_in(output)[not adapter]:
        raise ValueError(f"{str(output)!r} holds other weights ({others[0].name}); give an empty or a new folder.")


def refuse_trained_base(state: Collection[str]) -> None:
    """Raises ValueError where a run has also trained weights of an adapter's base, which its folder cannot hold."""
    beside = [name for name in state if name.startswith(PREFIX) and not is_reference(name) and not ADAPTER.search(name)]
    if beside:
        raise ValueError(
            f"The run also trained {len(beside)} weights of the base, such as {beside[0].removeprefix(PREFIX)}, which "
            "an adapter cannot hold; write the whole model with --merge."
        )


def load_trained(network: nn.Module, state: dict[str, torch.Tensor]) -> int:
    """Puts the trained weights of a checkpoint into a network that its backbone has built, and returns their number.

    Raises:
        ValueError: they are those of another model or adapter.
    """
    trained = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    # The adapter of a refreshed reference is in checkpoints, but it is not what was trained.
    trained = {name: value for name, value in trained.items() if not is_reference(name)}
    needed = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    # A run may have trained other weights too, beside an adapter.
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    odd = sorted(name for name in {*trained, *needed} if shapes.get(name) != getattr(trained.get(name), "shape", None))
    if odd:
        raise ValueError(
            f"The checkpoint holds {len(trained)} trained tensors, the model has {len(needed)}; they differ in "
            f"{odd[0]!r} and {len(odd) - 1} more. Is `model` the base that was trained?"
        )
    # Frozen weights are in no checkpoint. They came with the base.
    network.load_state_dict(trained, strict=False)
    return len(trained)
