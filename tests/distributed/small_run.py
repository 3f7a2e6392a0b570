"""A small run of the shipped configuration through the command line."""

from pathlib import Path

import yaml

ARGUMENTS = ["fit", "--config", "sudoku_tiny.yaml", "--config", "small.yaml", "--ckpt_path", "last"]


SAVES = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"save_last": True, "every_n_train_steps": 1},
}


def write_small(folder: Path, *, strategy: str, nodes: int = 1, devices: int = 1, reports: bool = False) -> None:
    """The second configuration of `ARGUMENTS`; with ``reports`` the callbacks are those of the first."""
    overlay = {
        "trainer": {
            "num_nodes": nodes,
            "devices": devices,
            "val_check_interval": 1,
            "enable_progress_bar": False,
            "strategy": {"class_path": strategy, "init_args": {"process_group_backend": "gloo"}},
        },
        "model": {"init_args": {"micro_batch_size": 16, "group_size": 4}},
        "data": {"init_args": {"sizes": {"train": 64, "validation": 8, "test": 8}, "prompts_per_buffer": 4}},
    }
    if not reports:
        overlay["trainer"] |= {"val_check_interval": 100, "callbacks": [SAVES]}
    (folder / "small.yaml").write_text(yaml.safe_dump(overlay))
