"""What modules were constructed with, in plain types: for loggers, and for loading a module from its checkpoint."""

import inspect
from collections.abc import Mapping
from typing import Any

from dmpo_lightning.modules.options import plain
from dmpo_lightning.objectives import WDCE, WDDO, ElboEstimator, TrajectoryEstimator
from dmpo_lightning.samplers import ConfidenceSampler, RandomOrderSampler, WinoSampler

REBUILT = {
    each.__name__: each
    for each in (
        *(WDCE, WDDO, ElboEstimator, TrajectoryEstimator),
        *(ConfidenceSampler, RandomOrderSampler, WinoSampler),
    )
}
"""The classes that `rebuilt` constructs. A checkpoint names classes, and must not choose what code is run."""
CLASS = "class"
Described = dict[str, Any]


def described(value: Any) -> Any:
    """A value in plain types: an object as its class's name and the arguments of its constructor that it keeps, a
    function as its name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): described(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    if inspect.isroutine(value) or isinstance(value, type):
        return value.__qualname__
    return {CLASS: type(value).__name__} | {
        name: described(kept) for name, kept in constructor_arguments(value).items() if _is_short(kept)
    }


def constructor_arguments(value: Any) -> dict[str, Any]:
    """The arguments that an object was constructed with, as far as it keeps them under their names."""
    parameters = inspect.signature(type(value).__init__).parameters
    kept = vars(value) if hasattr(value, "__dict__") else {}
    return {name: kept[name] for name in parameters if name in kept}


def _is_short(value: Any) -> bool:
    """Whether a value says how something is configured. Data, tensors and networks do not."""
    plain_types = (bool, int, float, str, Mapping, list, tuple)
    return value is None or isinstance(value, plain_types) or callable(value) or type(value).__name__ in REBUILT


def rebuilt(value: Any) -> Any:
    """What `described` was made of: plain values, and objects of the package's own `REBUILT` classes.

    Raises:
        LookupError: an object of another class, or a function, of which there is only a name.
    """
    if isinstance(value, Mapping) and CLASS in value:
        if value[CLASS] not in REBUILT:
            raise LookupError(value[CLASS])
        return REBUILT[value[CLASS]](**{name: rebuilt(each) for name, each in value.items() if name != CLASS})
    if isinstance(value, Mapping):
        return {name: rebuilt(each) for name, each in value.items()}
    return value


def rebuildable(value: Any) -> bool:
    """Whether `rebuilt` makes an equal object of what `described` says of this one."""
    if isinstance(value, Mapping):
        return all(map(rebuildable, value.values()))
    if type(value).__name__ in REBUILT and type(value) is REBUILT[type(value).__name__]:
        kept = constructor_arguments(value)
        return set(kept) == set(inspect.signature(type(value)).parameters) and all(map(rebuildable, kept.values()))
    return value is None or isinstance(value, bool | int | float | str | list | tuple)


class Arguments:
    """The arguments of a module's constructor: what loggers are told, and what its checkpoints hold of them."""

    KEY = "arguments"
    UNNEEDED = ("optimizer", "lr_scheduler", "reward")
    """Code of the user's own. A module that is loaded without it can do all but train."""

    def __init__(self, given: Mapping[str, Any], *, backbone: Described) -> None:
        own = {name: value for name, value in given.items() if name not in ("self", "__class__", "model", "seed")}
        self.held = {name: described(value) for name, value in own.items() if rebuildable(value)}
        self.lacking = [name for name in own if name not in self.held and name not in self.UNNEEDED]
        self.for_loggers = {"backbone": backbone} | {name: described(value) for name, value in own.items()}

    def save(self, checkpoint: dict[str, Any], *, hparams_key: str) -> None:
        """Adds what `loaded_arguments` reads, in the place of what loggers are told, with which Lightning would call
        the constructor.
        """
        checkpoint[self.KEY] = {"held": plain(self.held), "lacking": self.lacking}
        # A subclass may have saved hyper-parameters of its own.
        shown = ("seed", "optimizer_options", *self.for_loggers)
        rest = {name: value for name, value in checkpoint.pop(hparams_key, {}).items() if name not in shown}
        if rest:
            checkpoint[hparams_key] = rest
        else:
            checkpoint.pop("hparams_name", None)


def loaded_arguments(module_class: type, checkpoint: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments to construct a module with: those given, and those that its checkpoint holds.

    Raises:
        ValueError: one is in neither, named.
    """
    stored = checkpoint.get(Arguments.KEY) or {"held": {}, "lacking": []}
    parameters = inspect.signature(module_class.__init__).parameters  # type: ignore[misc]
    found: dict[str, Any] = dict(given)
    lacking = [name for name in stored["lacking"] if name not in given]
    for name, value in stored["held"].items():
        if name in parameters and name not in given:
            try:
                found[name] = rebuilt(value)
            except LookupError:
                lacking.append(name)
    needed = [
        name for name, each in parameters.items() if each.default is each.empty and each.kind is each.KEYWORD_ONLY
    ]
    lacking += [name for name in needed if name not in found and name not in lacking]
    if lacking:
        raise ValueError(
            f"The checkpoint cannot say what {', '.join(f'`{name}`' for name in lacking)} was: code of your own, or "
            f"written before checkpoints held it. Pass it: {module_class.__name__}.load_from_checkpoint(path, "
            f"{', '.join(f'{name}=...' for name in lacking)})."
        )
    return found
