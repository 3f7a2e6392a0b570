"""The shipped configurations: where they lie, and bare names for them. Imports nothing heavy."""

import difflib
from pathlib import Path


def config_directory() -> Path:
    """The repository's ``configs`` in an editable install, else the copy inside the package."""
    repository = Path(__file__).parents[3] / "configs"
    return (
        repository
        if repository.is_dir() and (repository.parent / "pyproject.toml").is_file()
        else Path(__file__).parents[1] / "shipped_configs"
    )


def shipped_configs() -> list[str]:
    """Names of the shipped configurations, as ``--config`` takes them."""
    root = config_directory()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))


def resolve_config(name: str) -> str:
    """Returns a file, or the text of a configuration, as it is, and for the name of a shipped one its path.

    The name may be with or without ``.yaml``.

    Raises:
        ValueError: neither a file nor a shipped name. The message lists what exists.
    """
    if "\n" in name or "{" in name or Path(name).is_file():
        return name
    if (at_home := Path(name).expanduser()).is_file():
        return str(at_home)
    for candidate in (name, f"{name}.yaml"):
        if (path := config_directory() / candidate).is_file():
            return str(path)
    names = shipped_configs()
    close = difflib.get_close_matches(name.removesuffix(".yaml"), [n.removesuffix(".yaml") for n in names], n=1)
    hint = f" Did you mean {close[0]}.yaml?" if close else ""
    raise ValueError(f"No configuration {name!r}: it is neither a file nor shipped.{hint} Shipped: {', '.join(names)}.")
