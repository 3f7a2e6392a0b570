"""What a checkpoint holds of a module: how it was constructed, and of its weights all that can be trained.

That is a whole model, or an adapter and what else a run has ever trained, whatever is frozen at the moment. The base of
an adapter comes from its source. A refreshed reference is the only other thing that cannot be had again.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from dmpo_lightning import objectives, samplers
from dmpo_lightning.checkpoints.reading import UnfitCheckpointError, is_reference
from dmpo_lightning.distributed.sharding import plain_name
from dmpo_lightning.objectives import LogProbEstimator, Objective
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers import Sampler

ARGUMENTS, REFERENCE_PARTS, SHAPES, SCALE = "arguments", "reference_parts", "trained_shapes", "adapter_scale"
TRAINED = "trained_names"
CODE = ("optimizer", "lr_scheduler", "reward")
"""Arguments that are code of the user's own. A module that is loaded without them can do all but train."""
CLASS = "class"
REBUILT: dict[str, type] = {
    name: each
    for package in (objectives, samplers)
    for name, each in vars(package).items()
    if isinstance(each, type)
    and issubclass(each, (Objective, LogProbEstimator, Sampler))
    and not inspect.isabstract(each)
}
"""The classes that `rebuilt` constructs. A checkpoint names classes, and must not choose what code is run."""
Shapes = dict[str, list[int]]


def described(value: Any) -> Any:
    """A value in plain types, for loggers and for `rebuilt`.

    An object is the name of its class and the arguments of its constructor that it keeps under their names. A class of
    the user's own, and a function, have their dotted path.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): described(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    if inspect.isroutine(value) or isinstance(value, type):
        return {CLASS: f"{value.__module__}.{value.__qualname__}"}
    kind, kept = type(value), getattr(value, "__dict__", {})
    # By its bare name only what `rebuilt` constructs. A class of the user's own may be called the same.
    name = kind.__name__ if REBUILT.get(kind.__name__) is kind else f"{kind.__module__}.{kind.__qualname__}"
    own = {each: kept[each] for each in inspect.signature(kind.__init__).parameters if each in kept}
    return {CLASS: name} | {each: described(argument) for each, argument in own.items() if _is_short(argument)}


def _is_short(value: Any) -> bool:
    """Whether a value says how something is configured. Data, tensors and networks do not."""
    plain_types = (bool, int, float, str, Mapping, list, tuple)
    return value is None or isinstance(value, plain_types) or callable(value) or type(value).__name__ in REBUILT


def rebuilt(value: Any) -> Any:
    """What `described` was made of: plain values, and objects of the package's own `REBUILT` classes.

    Raises:
        LookupError: an object of another class, a function, or an option that a class no longer has.
    """
    if isinstance(value, list):
        return [rebuilt(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    parts = {name: rebuilt(each) for name, each in value.items() if name != CLASS}
    if CLASS not in value:
        return parts
    kind = REBUILT.get(value[CLASS])
    if kind is None:
        raise LookupError(f"{value[CLASS]}, code of your own")
    # Another version may have had an option that went since. Leaving it out would be another object.
    unknown = sorted(set(parts) - set(inspect.signature(kind).parameters))
    if unknown:
        raise LookupError(f"{value[CLASS]} with {', '.join(unknown)}, which this version does not have")
    return kind(**parts)


def held_arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the arguments of its module, in plain types."""
    return dict(checkpoint.get(ARGUMENTS) or {})


def loaded_arguments(module_class: Any, checkpoint: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments to construct a module with: those given, and those that its checkpoint holds.

    Raises:
        ValueError: one is in neither, named.
    """
    stored, found = held_arguments(checkpoint), dict(given)
    lacking: dict[str, str] = {}
    for name, each in inspect.signature(module_class.__init__).parameters.items():
        # The one that is positional is the model, which has a source of its own.
        if each.kind is not each.KEYWORD_ONLY or name in given or name in CODE:
            continue
        if name in stored:
            try:
                found[name] = rebuilt(stored[name])
            except LookupError as error:
                lacking[name] = error.args[0]
            # Of a value that no module wrote.
            except (AttributeError, TypeError, ValueError) as error:
                lacking[name] = f"it cannot be built again ({error})"
        elif each.default is each.empty:
            lacking[name] = "which it does not hold"
    if lacking:
        # Each class notes all of its own arguments, so that those of another one lack.
        own, was = module_class.__name__, "; ".join(f"`{name}` was: {why}" for name, why in lacking.items())
        raise ValueError(
            f"The checkpoint cannot say what {was}. Pass it: {own}.load_from_checkpoint(path, "
            f"{', '.join(f'{name}=...' for name in lacking)}). A run of another class than {own} is exported first, "
            "and the folder is `model`."
        )
    return found


def own_shapes(module: nn.Module) -> Shapes:
    """The whole shape of each parameter but the reference's. Called before a strategy divides or flattens them."""
    shapes = {plain_name(name): list(weight.shape) for name, weight in module.named_parameters()}
    return {name: shape for name, shape in shapes.items() if not is_reference(name)}


def trainable(module: nn.Module) -> set[str]:
    """The names of the parameters that are trained at this moment."""
    return {plain_name(name) for name, weight in module.named_parameters() if weight.requires_grad}


def trainable_by_design(policy: Policy) -> set[str]:
    """The names, within a policy, of all that is its to train, whatever is frozen: a whole model, or an adapter."""
    own = "." if not policy.has_adapters else f".{policy.model.active_adapter}."
    return {f"model.{name}" for name, _ in policy.model.named_parameters() if own in f"model.{name}."}


def adapter_scale(network: Any) -> float | None:
    """What the trained adapter's product is multiplied by. The shapes of its weights do not tell."""
    if not hasattr(network, "peft_config"):
        return None
    config = network.peft_config[network.active_adapter]
    return config.lora_alpha / config.r


def restore_reference(policy: Policy, checkpoint: dict[str, Any], *, strategy: Any) -> None:
    """Puts a refreshed reference back, or makes the room that the strategy then reads it into.

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
            "The checkpoint holds a refreshed reference, which needs `reference_refresh_interval` to be set as it "
            f"was under {type(strategy).__name__}."
        )
    reference.is_refreshed = True
    if REFERENCE_PARTS in checkpoint:
        reference.put_parts(network, checkpoint[REFERENCE_PARTS])


def check_fit(
    checkpoint: Mapping[str, Any], *, shapes: Shapes, needed: Collection[str], scale: float | None, backbone: Any
) -> set[str]:
    """Compares what a checkpoint holds with what this run can train, by name and shape, and returns the names.

    A strategy that has read the weights by now has taken them out of the checkpoint, which then still lists them.

    Args:
        checkpoint: as it is read.
        shapes: of all weights but the reference's.
        needed: the names of those that it must hold.
        scale: of this run's adapter.
        backbone: of this run, in plain types.

    Raises:
        UnfitCheckpointError: they differ, or adapters are scaled in another way.
    """
    state, stored = checkpoint.get("state_dict"), checkpoint.get(SHAPES)
    if state is not None:
        stored = {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    was = checkpoint.get("backbone") or {}
    remedy = (
        f"Set model and adapter as in the run that wrote it: model {was.get('model')!r}, adapter {was.get('adapter')} "
        f"(now {backbone['model']!r}, {backbone['adapter']})."
    )
    if stored is None:
        return set()
    # A reference is no part of what is trained, and a run may begin or cease to keep one.
    stored = {name: shape for name, shape in stored.items() if not is_reference(name)}
    odd = sorted(name for name in {*stored, *needed} if stored.get(name) != shapes.get(name))
    if odd:
        raise UnfitCheckpointError(
            f"The checkpoint's weights are not those of this run: expected {_kind(needed)}, got {_kind(stored)}; "
            f"{len(odd)} differ, such as {odd[0]!r} (expected {shapes.get(odd[0])}, got {stored.get(odd[0])}). "
            f"{remedy}"
        )
    if SCALE in checkpoint and checkpoint[SCALE] != scale:
        raise UnfitCheckpointError(
            f"The checkpoint's adapter is scaled by alpha / r = {checkpoint[SCALE]}, this run's by {scale}. {remedy}"
        )
    return set(stored)


def _kind(names: Collection[str]) -> str:
    adapter = any(".lora_" in name for name in names)
    return f"{len(names)} tensors of {'an adapter' if adapter else 'a whole model'}"
