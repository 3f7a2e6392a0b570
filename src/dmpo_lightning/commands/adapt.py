"""``dmpo-lightning adapt``: makes a masked diffusion model of a causal one (Llama, Qwen2, Qwen3) to be trained."""

from collections.abc import Sequence

from dmpo_lightning.commands.arguments import CommandParser

PARSER = CommandParser("adapt", __doc__)
_add = PARSER.add_argument
_add("--model", required=True, help="hub id, folder or GGUF file of the causal model")
_add("--output", required=True, help="folder to write")
_add("--block_size", type=int, help="positions of a completion block; bidirectional without it")
_add("--no_shift", dest="shift", action="store_false", help="a position predicts its own token, not the next one")
_add("--mask_token", help="a token that no text uses, or a new one; by default the tokenizer's own, or <|mask|>")
_add("--dtype", default="auto", help="of the weights, such as bfloat16; auto is that of the checkpoint")
_add("--revision", help="branch, tag or commit on the hub")


def run(arguments: Sequence[str]) -> None:
    """Runs the command. Raises ValueError for what a user can mend."""
    options = vars(PARSER.parse_args(arguments))
    # They bring torch, for which --help and a slip need not wait.
    from transformers.utils.logging import disable_progress_bar

    from dmpo_lightning.checkpoints.export import refuse_other_weights, save_policy
    from dmpo_lightning.models.adapting import adapt

    disable_progress_bar()
    output, source = options.pop("output"), options.pop("model")
    refuse_other_weights(output, adapter=False)
    adapted = adapt(source, **options)
    model, tokenizer = adapted.model, adapted.tokenizer
    save_policy(model, tokenizer, model.state_dict(), output)
    sees = "bidirectional" if model.block_size is None else f"block-causal in blocks of {model.block_size}"
    print(
        f"{output}: {source} ({adapted.model_type}, {model.num_parameters() / 1e6:.0f} M parameters), {sees}, "
        f"{'shifted' if model.lookback else 'not shifted'}, mask token {tokenizer.mask_token} "
        f"({tokenizer.mask_token_id}). It has to be trained: "
        f"dmpo-lightning fit --config adapt.yaml --model.model {output}"
    )
