"""``dmpo-lightning export``: writes the trained policy of a checkpoint as a Hugging Face folder."""

from collections.abc import Sequence

from dmpo_lightning.commands.arguments import CommandParser

PARSER = CommandParser("export", __doc__)
_add = PARSER.add_argument
_add("--ckpt_path", required=True, help="checkpoint file or folder of a run")
_add("--output", required=True, help="folder to write")
_add("--merge", action="store_true", help="merge the adapter into its base and write the whole model")
_add("--model", help="where the base is now, if not where the run had it")
_add("--trust_remote_code", action="store_true", help="run code of the base, which the checkpoint cannot ask for")
_add("--trust_checkpoint", action="store_true", help="unpickle a checkpoint folder, which can run any code")


def run(arguments: Sequence[str]) -> None:
    """Runs the command. Raises ValueError for what a user can mend."""
    options = vars(PARSER.parse_args(arguments))
    # It brings torch, for which --help and a slip need not wait.
    from transformers.utils.logging import disable_progress_bar

    from dmpo_lightning.checkpoints.export import export_checkpoint

    disable_progress_bar()
    output, checkpoint = options.pop("output"), options.pop("ckpt_path")
    count = export_checkpoint(checkpoint, output, **options)
    print(f"{output}: {count} trained tensors" + (", merged into the base" if options["merge"] else ""))
