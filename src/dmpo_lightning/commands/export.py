"""``dmpo-lightning export``: writes the trained policy of a checkpoint as a Hugging Face folder."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dmpo_lightning.checkpoints.export import export_checkpoint

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def run(arguments: Sequence[str]) -> None:
    """``dmpo-lightning export``."""
    options = make_parser().parse_args(list(arguments))
    count = export_checkpoint(
        options.ckpt_path,
        options.output,
        merge=options.merge,
        model=options.model,
        trust_remote_code=options.trust_remote_code,
        trust_checkpoint=options.trust_checkpoint,
    )
    print(f"{options.output}: {count} trained tensors" + (", merged into the base" if options.merge else ""))


def make_parser() -> "ArgumentParser":
    """The options of the command."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="dmpo-lightning export",
        description="Write a trained policy as a Hugging Face folder.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", type=str, required=True, help="checkpoint file or folder of a run")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    parser.add_argument(
        "--merge", action="store_true", help="merge the adapter into its base and write the whole model"
    )
    parser.add_argument("--model", type=str, default=None, help="where the base is now, if not where the run had it")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run code that comes with the base, which the checkpoint cannot ask for",
    )
    parser.add_argument(
        "--trust_checkpoint", action="store_true", help="unpickle a folder of DeepSpeed, which can run any code"
    )
    return parser
