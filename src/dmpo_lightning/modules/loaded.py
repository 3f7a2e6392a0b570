"""A module from its checkpoint alone, without a Trainer."""

from pathlib import Path
from typing import Any

from dmpo_lightning.checkpoints.reading import read_weights
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.modules.described import loaded_arguments


def load_module(module_class: Any, checkpoint: str | Path, given: dict[str, Any]) -> Any:
    """Constructs the module that wrote a checkpoint, and reads its weights.

    ``given`` are arguments of the constructor that take the place of what the checkpoint holds. A name for ``model`` is
    where its base is now.
    """
    saved = read_weights(checkpoint)
    model = given.pop("model", None)
    if model is None or isinstance(model, str):
        try:
            model = Backbone.from_plain(saved["backbone"], model=model)
        except ValueError as error:
            raise ValueError(
                "The checkpoint's run was given its model as a module; say where its base is with `model=`, as a name, "
                "a Backbone or a module."
            ) from error
    seed = given.pop("seed", saved["seed"])
    module = module_class(model, seed=seed, **loaded_arguments(module_class, saved, given))
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"])
    return module
