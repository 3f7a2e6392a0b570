"""A sampler from a name and options, as they are written on a command line. Imports nothing heavy by itself."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmpo_lightning.samplers import Sampler

PREFIX = "sampler."


def sampler_options(parsed: Mapping[str, Any], rest: Sequence[str]) -> dict[str, Any]:
    """The values of the options ``--sampler.NAME VALUE``, read as YAML.

    Args:
        parsed: options that a parser knows, of which those of the sampler are taken.
        rest: the arguments that it does not know, which must all be options of the sampler.

    Raises:
        ValueError: another option, or one without a value.
    """
    given = {name.removeprefix(PREFIX): value for name, value in parsed.items() if name.startswith(PREFIX)}
    arguments = list(rest)
    while arguments:
        option, equals, value = arguments.pop(0).partition("=")
        name = option.removeprefix(f"--{PREFIX}")
        if name == option:
            raise ValueError(f"There is no option {option}; dmpo-lightning generate --help lists all.")
        if not equals and not arguments:
            raise ValueError(f"{option} needs a value.")
        given[name] = value if equals else arguments.pop(0)
    return {name: _value(name, text) for name, text in given.items()}


def _value(name: str, text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--{PREFIX}{name} has a value that cannot be read: {text!r}.") from error


def make_sampler(name: str | None, given: dict[str, Any], *, stored: Any = None) -> "Sampler":
    """A sampler by its class and options.

    Args:
        name: of one of `dmpo_lightning.samplers`, or the dotted path of any. None is the one that is ``stored``, or a
            `ConfidenceSampler` that takes the most likely tokens.
        given: options, which take the place of those that are stored for the same class.
        stored: what a checkpoint says of the sampler of its run.

    Raises:
        ValueError: no such class or option, or a value that the class refuses.
    """
    from dmpo_lightning.modules.described import CLASS, REBUILT

    options: dict[str, Any] = {}
    if name is None and isinstance(stored, dict) and stored.get(CLASS) in REBUILT:
        name, options = stored[CLASS], {key: value for key, value in stored.items() if key != CLASS}
    elif name is None:
        options = {"temperature": 0.0}
    sampler_class = _sampler_class(name or "ConfidenceSampler")
    return _checked(sampler_class, options | given)


def _sampler_class(name: str) -> Any:
    from importlib import import_module

    from dmpo_lightning import samplers

    module, _, own = name.rpartition(".")
    try:
        found = getattr(import_module(module), own) if module else getattr(samplers, name, None)
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, samplers.Sampler)):
        raise ValueError(
            "`--sampler` must be ConfidenceSampler, RandomOrderSampler, WinoSampler or the dotted path of a Sampler, "
            f"got {name}."
        )
    return found


def _checked(sampler_class: Any, options: dict[str, Any]) -> "Sampler":
    """Constructs a sampler once its options have the types that its constructor states."""
    import difflib
    import inspect

    from jsonargparse import ArgumentParser

    names = list(inspect.signature(sampler_class).parameters)
    for option in options:
        if option not in names:
            close = difflib.get_close_matches(option, names, n=1)
            meant = f"Did you mean {close[0]}? " if close else ""
            raise ValueError(f"There is no option {option}. {meant}{sampler_class.__name__} has: {', '.join(names)}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(sampler_class, "sampler")
    try:
        values = parser.parse_object({"sampler": options}).sampler
    # Its errors are of several classes, all of what a user has written.
    except Exception as error:
        raise ValueError(f"`--sampler`: {' '.join(str(error).split())}") from error
    return sampler_class(**vars(values))
