"""What checkpoints hold of a module's weights: all that is trained, and nothing else but a renewed reference."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from dmpo_lightning.checkpoints.reading import UnfitCheckpointError, is_reference
from dmpo_lightning.distributed.sharding import plain_name
from dmpo_lightning.policy import Policy

REFERENCE_PARTS, SHAPES, SCALE = "reference_parts", "trained_shapes", "adapter_scale"
Shapes = dict[str, list[int]]


def trained_shapes(module: nn.Module) -> Shapes:
    """The whole shape of each trained parameter. Called before a strategy divides or flattens them."""
    return {plain_name(name): list(weight.shape) for name, weight in module.named_parameters() if weight.requires_grad}


def adapter_scale(network: Any) -> float | None:
    """What the trained adapter's product is multiplied by. The shapes of its weights do not tell."""
    if not hasattr(network, "peft_config"):
        return None
    config = network.peft_config[network.active_adapter]
    return config.lora_alpha / config.r


def keep_only(state: dict[str, Tensor], kept: Iterable[str], *, prefix: str = "") -> None:
    """Takes all other names below ``prefix`` out of a state, in place: a parent goes on with the same dictionary."""
    names = {f"{prefix}{name}" for name in kept}
    for name in [name for name in state if name.startswith(prefix) and name not in names]:
        del state[name]


def forgive_frozen(module: Any, incompatible: Any) -> None:
    """A hook of torch's ``load_state_dict``: weights that no checkpoint holds are not missing from it.

    Lightning's callbacks that average weights load states strictly, into a copy of the module inside another.
    """
    kept = module.held_names()
    # The copy is called `module` there, and torch does not tell the hook.
    missing = [name for name in incompatible.missing_keys if name[max(name.find("policy."), 0) :] in kept]
    incompatible.missing_keys[:] = missing


def hold_weights(checkpoint: dict[str, Any], *, shapes: Shapes, scale: float | None) -> None:
    """Adds what the weights are, for `check_fit`, and what averages of weights lack."""
    checkpoint[SHAPES], checkpoint[SCALE] = shapes, scale
    # Callbacks that average weights put theirs in the place of the module's own. A copy that they made before a
    # reference was renewed does not know that it is held.
    for name, value in checkpoint.get("current_model_state", {}).items():
        checkpoint["state_dict"].setdefault(name, value)


def restore_reference(policy: Policy, checkpoint: dict[str, Any], *, strategy: Any) -> None:
    """Puts a renewed reference back, or makes the room that the strategy then reads it into.

    Raises:
        ValueError: a strategy that has read the weights by now, and there was no room for it.
    """
    reference, network = policy.reference, policy.model
    reference.announce_update()
    if not reference.exists:
        # Supervised fine-tuning has no use for one, and would go on saving it.
        state = checkpoint.get("state_dict", {})
        for name in filter(is_reference, list(state)):
            del state[name]
        return
    if not checkpoint.get("reference_is_refreshed"):
        return
    if strategy is None or not strategy.restore_checkpoint_after_setup:
        # The stored weights are then read into it.
        reference.make_room(network)
    elif not reference.has_room(network):
        raise ValueError(
            "The checkpoint holds a renewed reference, which needs `reference_refresh_interval` to be set as it "
            f"was under {type(strategy).__name__}."
        )
    reference.is_refreshed = True
    if REFERENCE_PARTS in checkpoint:
        reference.put_parts(network, checkpoint[REFERENCE_PARTS])


def check_fit(checkpoint: Mapping[str, Any], *, expected: Shapes, scale: float | None, backbone: Any) -> None:
    """Compares what a checkpoint holds with what this run trains, by name and shape.

    A strategy that has read the weights by now has taken them out of the checkpoint, which then still lists them.

    Raises:
        UnfitCheckpointError: they differ, or adapters are scaled in another way.
    """
    state = checkpoint.get("state_dict") or {}
    stored: Shapes | None = {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    stored = stored or checkpoint.get(SHAPES)
    was = checkpoint.get("backbone") or {}
    remedy = (
        f"Set model and adapter as in the run that wrote it: model {was.get('model')!r}, adapter {was.get('adapter')} "
        f"(now {backbone['model']!r}, {backbone['adapter']})."
    )
    if stored is None:
        return
    stored = {name: shape for name, shape in stored.items() if not is_reference(name)}
    odd = sorted(name for name in stored | expected if stored.get(name) != expected.get(name))
    if odd:
        raise UnfitCheckpointError(
            f"The checkpoint's weights are not those of this run: expected {_kind(expected)}, got {_kind(stored)}; "
            f"{len(odd)} differ, such as {odd[0]!r} (expected {expected.get(odd[0])}, got {stored.get(odd[0])}). "
            f"{remedy}"
        )
    if SCALE in checkpoint and checkpoint[SCALE] != scale:
        raise UnfitCheckpointError(
            f"The checkpoint's adapter is scaled by alpha / r = {checkpoint[SCALE]}, this run's by {scale}. {remedy}"
        )


def _kind(shapes: Shapes) -> str:
    adapter = any(".lora_" in name for name in shapes)
    return f"{len(shapes)} tensors of {'an adapter' if adapter else 'a whole model'}"
