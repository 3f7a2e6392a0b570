"""A small run of the shipped configuration through the command line."""

from pathlib import Path

import yaml

ARGUMENTS = ["fit", "--config", "sudoku_tiny.yaml", "--config", "small.yaml", "--ckpt_path", "last"]


def write_small(folder: Path, *, strategy: str, nodes: int = 1, devices: int = 1, **options) -> None:
    """The second configuration of `ARGUMENTS`; ``options`` are the strategy's."""
    overlay = {
        "trainer": {
            "num_nodes": nodes,
            "devices": devices,
            "val_check_interval": 1,
            "enable_progress_bar": False,
            "strategy": {"class_path": strategy, "init_args": {"process_group_backend": "gloo"} | options},
        },
        "model": {"init_args": {"micro_batch_size": 16}},
        "data": {"init_args": {"sizes": {"train": 64, "validation": 8, "test": 8}, "prompts_per_buffer": 4}},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(overlay))
