"""The command line in this process, and small runs of the shipped Sudoku for it."""

import json

import yaml

from dmpo_lightning.__main__ import main

SAVE = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 2, "save_top_k": -1},
}
KEEPS_LAST = f"--trainer.callbacks=[{json.dumps(SAVE | {'init_args': {**SAVE['init_args'], 'save_last': True}})}]"
SMALL = {
    "trainer": {"enable_progress_bar": False, "val_check_interval": 100, "callbacks": [SAVE]},
    "model": {"init_args": {"micro_batch_size": 16}},
    "data": {"init_args": {"sizes": {"train": 64, "validation": 8, "test": 8}, "prompts_per_buffer": 4}},
}
"""What makes `sudoku_tiny.yaml` a matter of a second per step."""


def status(*arguments: str) -> int:
    """The exit status of a command, whichever way it ends."""
    try:
        return main(list(arguments))
    except SystemExit as stop:
        return stop.code


def refusal(capsys, *arguments: str) -> str:
    """The last line that a command says which is refused."""
    capsys.readouterr()
    assert status(*arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


def printed_config(capsys, *arguments: str) -> dict:
    """The configuration that would run."""
    capsys.readouterr()
    assert status("fit", *arguments, "--print_config") == 0
    printed = capsys.readouterr().out
    return yaml.safe_load(printed[printed.index("seed_everything:") :])  # deepspeed has its say before


def tiny(command: str, *options: str) -> int:
    """The status of a command on the shipped Sudoku with `SMALL`, in a `workplace`."""
    return status(command, "--config=sudoku_tiny.yaml", "--config=small.yaml", *options)
