"""What a folder that holds an adapter says about its base."""

import json
from pathlib import Path


def base_of(folder: str) -> str:
    """What a folder's adapter names as its base.

    Raises:
        ValueError: it names none, or a folder that leads back to itself.
    """
    visited = [Path(folder).resolve()]
    named = base = _named_base(folder)
    # Adapters on adapters are followed to their end, so that no circle of them is loaded for ever.
    while (Path(base) / "adapter_config.json").is_file():
        if Path(base).resolve() in visited:
            raise ValueError(
                f"The adapter in {folder!r} is its own base: adapter_config.json names {base!r}. Set its "
                "`base_model_name_or_path` to the model that the adapter was trained on."
            )
        visited.append(Path(base).resolve())
        base = _named_base(base)
    return named


def _named_base(folder: str) -> str:
    file = Path(folder) / "adapter_config.json"
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Adapter file {str(file)!r} is damaged ({error}). Save the adapter again.") from error
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"Adapter file {str(file)!r} must name its base in `base_model_name_or_path`, got {base!r}; set it to the "
            "model that the adapter was trained on."
        )
    return base
