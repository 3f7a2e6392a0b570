"""``dmpo-lightning generate``: answers prompts with a model or a checkpoint, and shows how they come about."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dmpo_lightning.commands.arguments import CommandParser, pairs
from dmpo_lightning.tasks.json_lines import numbered_lines
from dmpo_lightning.terminal import error_line, escaped, is_terminal, printable, shortened, terminal_size

if TYPE_CHECKING:
    from dmpo_lightning.modules.generating import Generation, Prompt
    from dmpo_lightning.policy import Policy
    from dmpo_lightning.samplers import Change, Sampler

LENGTH = 128
"""Tokens of an answer where nothing says."""
PAUSE = 0.05
"""Seconds per step that is shown live, where small models are too fast to see."""
GREEN, YELLOW, DIM = "1;32", "1;33", "2"
"""Of a token that was just revealed, of one to which the model gives less than a half, and of a masked position."""
DESCRIPTION = """\
Answer prompts with a model, or with the policy that a run has trained.

  dmpo-lightning generate --model sudoku_tiny --completion_length 20 --prompt 1004002001004001 --show
  dmpo-lightning generate --ckpt_path runs/sudoku_tiny/latest/checkpoints/last.ckpt --prompt 1004002001004001

A checkpoint names its model, sampler and length, of which options given here take the place. A prompt is a user's turn
in the model's chat template. Without --prompt and --prompts_file all of standard input is one prompt. Options of the
sampler are written as --sampler.NAME VALUE: temperature (0 is greedy), denoising_steps, block_length, ...
"""
PARSER = CommandParser("generate", DESCRIPTION)
_add = PARSER.add_argument
_add("--model", help="hub id, folder (of a model or an adapter) or embedded name; with --ckpt_path its base's place")
_add("--ckpt_path", help="checkpoint file or folder of a run, read as data")
_add("--prompt", action="append", default=[], metavar="TEXT", help="can be given several times")
_add("--prompts_file", metavar="FILE", help="JSON lines, each with a `prompt`: a text or a conversation")
_add("--prefill", default="", metavar="TEXT", help="what the answer's turn starts with")
_add("--sampler", metavar="CLASS", help="in place of the run's, or else of ConfidenceSampler at temperature 0")
_add("--completions", type=int, default=1, help="answers to each prompt (default 1)")
_add("--completion_length", type=int, help=f"tokens of an answer (default: the run's, else at most {LENGTH})")
_add("--seed", type=int, default=0, help="of the draws (default 0)")
_add("--index", type=int, default=0, help="number of the first prompt, which keys its draws (default 0)")
_add("--rows_per_forward", type=int, default=8, help="answers that are sampled at a time (default 8)")
_add("--show", action="store_true", help="show the denoising on standard error, live on a terminal")
_add("--json", action="store_true", help="print a JSON object per answer, with steps and confidence of its tokens")
_add("--dtype", default="auto", help="of the weights (default: the model's)")
_add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
_add("--trust_remote_code", action="store_true", help="run code that comes with the model")
_add("--trust_checkpoint", action="store_true", help="unpickle a checkpoint folder, which can run any code")


def run(arguments: Sequence[str]) -> None:
    """Prints the answers.

    Raises:
        ValueError: no prompt, or what loading and sampling raise for what a user can mend.
    """
    options, rest = PARSER.parse_known_args(list(arguments))
    for option, _, _ in pairs(rest):
        if not option.startswith("--sampler."):
            PARSER.error(f"unrecognized arguments: {option}")
    rest = ([] if options.sampler is None else [f"--sampler={options.sampler}"]) + rest
    prompts = list(_prompts(options))
    if not prompts:
        raise ValueError("There is no prompt: pass --prompt TEXT, --prompts_file FILE, or write one to standard input.")
    policy, stored = _loaded(options)
    # Of an answer as long as leaves half of the model's room to the prompt, where nothing says.
    room = LENGTH if policy.max_length is None else max(1, min(LENGTH, policy.max_length // 2))
    try:
        sampler = make_sampler(rest, stored)
        length = int(options.completion_length or stored.get("completion_length") or room)
    # A checkpoint may say anything.
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(
            f"The checkpoint describes its run in a way that is not understood ({error_line(error)}); pass --sampler "
            "and --completion_length."
        ) from error
    several = len(prompts) * options.completions > 1
    for answer in _answered(policy, sampler, prompts, options, length):
        if options.json:
            print(json.dumps(asdict(answer)), flush=True)
        else:
            asked = answer.prompt if isinstance(answer.prompt, str) else str(answer.prompt[-1]["content"])
            number = f"{answer.index}.{answer.rollout}" if options.completions > 1 else f"{answer.index}"
            heading = f"--- {number} {shortened(asked, 60)}\n" if several else ""
            print(f"{heading}{printable(answer.text)}", flush=True)


def _answered(
    policy: "Policy", sampler: "Sampler", prompts: list["Prompt"], options: argparse.Namespace, length: int
) -> Iterator["Generation"]:
    """The answers, a few at a time, so that the first are there before the last are begun."""
    from dmpo_lightning.modules.generating import generate
    from dmpo_lightning.rollout import Sampling

    rows = 1 if options.show else options.rows_per_forward
    size = max(1, rows // options.completions)
    watcher = Denoising(policy, sys.stderr) if options.show else None
    sampling = Sampling(sampler, length, options.completions, seed=options.seed, rows_per_forward=rows)
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        index = range(options.index + start, options.index + start + len(part))
        yield from generate(policy, part, sampling, prefill=options.prefill, index=index, on_change=watcher)


def _prompts(options: argparse.Namespace) -> Iterator["Prompt"]:
    """The prompts in the order of the options, else all of standard input."""
    yield from options.prompt
    if options.prompts_file is not None:
        if not Path(options.prompts_file).is_file():
            raise ValueError(f"`--prompts_file` must be a file of JSON lines, got {options.prompts_file}.")
        for number, record in numbered_lines(options.prompts_file):
            if not isinstance(record, dict) or "prompt" not in record:
                raise ValueError(f"{options.prompts_file}, line {number}: no object with `prompt`.")
            yield record["prompt"]
    # A terminal would wait for somebody who does not know that he is asked.
    elif not options.prompt and not sys.stdin.isatty() and (text := sys.stdin.read().rstrip("\n")):
        yield text


def _loaded(options: argparse.Namespace) -> tuple["Policy", Mapping[str, Any]]:
    """The policy on its device, and what a checkpoint says of the arguments of its run."""
    from transformers.utils import logging as transformers_logging

    # Its bars would stand between the answers.
    transformers_logging.disable_progress_bar()
    import torch

    from dmpo_lightning.checkpoints.export import load_trained, named_backbone
    from dmpo_lightning.checkpoints.reading import read_weights
    from dmpo_lightning.models.backbone import Backbone
    from dmpo_lightning.modules.checkpoint import held_arguments
    from dmpo_lightning.policy import Policy

    saved: dict[str, Any] = {}
    if options.ckpt_path is not None:
        # Read as data, as `export` reads it.
        saved = read_weights(options.ckpt_path, trust_checkpoint=options.trust_checkpoint)
        backbone = named_backbone(saved["backbone"], options.model, trust_remote_code=options.trust_remote_code)
        # Without what is only of use in training, and a compilation that pays in long runs.
        dtype = backbone.dtype if options.dtype == "auto" else options.dtype
        backbone = replace(backbone, gradient_checkpointing=False, compile_blocks=False, dtype=dtype)
    elif options.model is not None:
        backbone = Backbone(options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    else:
        raise ValueError("There is no model: pass --model NAME_OR_FOLDER or --ckpt_path CHECKPOINT.")
    network = backbone.build(seed=int(saved.get("seed", 0)))
    if saved:
        load_trained(network, saved["state_dict"])
    policy = Policy(network, backbone.load_tokenizer(), mask_token_id=backbone.mask_token_id, with_reference=False)
    try:
        policy.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Torch has no error of its own for a name that it does not know, or a device that is not there.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` {options.device}: {str(error).splitlines()[0]}") from error
    return policy, held_arguments(saved)


def make_sampler(arguments: Sequence[str], stored: Mapping[str, Any]) -> "Sampler":
    """The sampler of a run, with the options ``--sampler.NAME VALUE`` in the place of its own.

    A class that ``--sampler`` names takes its place as a whole. Where no run says anything, it is a
    `ConfidenceSampler` that takes the most likely tokens.

    Args:
        arguments: those options. What is wrong with them ends the process with status 2 and one line.
        stored: what a checkpoint says of the arguments of its run, see `held_arguments`.

    Raises:
        ValueError: the run's sampler was code of its own, which a checkpoint does not choose.
    """
    from dmpo_lightning.commands.fit import DMPOArgumentParser
    from dmpo_lightning.modules.checkpoint import CLASS, REBUILT
    from dmpo_lightning.samplers import Sampler

    kept = dict(stored.get("sampler") or {CLASS: "ConfidenceSampler", "temperature": 0.0})
    name, is_named = kept.pop(CLASS), any(each.partition("=")[0] == "--sampler" for each in arguments)
    if name not in REBUILT and not is_named:
        raise ValueError(
            f"The run of this checkpoint had a sampler of its own ({name}), which a checkpoint cannot choose; pass "
            "it by --sampler with the dotted path of its class, and its options as --sampler.NAME VALUE."
        )
    default = None if is_named else {"class_path": f"dmpo_lightning.samplers.{name}", "init_args": kept}
    parser = DMPOArgumentParser(prog="dmpo-lightning generate")
    parser.add_argument("--sampler", type=Sampler, default=default)
    return parser.instantiate(parser.parse_args(list(arguments))).sampler


@dataclass
class Denoising:
    """An observer that draws a completion anew at each of its steps.

    Args:
        policy: whose tokenizer reads the tokens. They are untrusted, and nothing in them reaches the terminal as it is.
        stream: to write to.
    """

    policy: "Policy"
    stream: TextIO
    _row: int | None = field(default=None, init=False)
    """The number of the completion that is drawn."""
    _step: int = field(default=0, init=False)

    def __call__(self, change: "Change") -> None:
        """Draws the first of the completions that have changed."""
        row, mask = int(change.rows[0]), self.policy.facts.mask_token_id
        self._row, self._step = row, self._step + 1 if row == self._row else 1
        columns = (change.completion_ids[0].tolist(), change.written[0].tolist(), change.confidence[0].tolist())
        # Not every stream can write the other character.
        blank = "░" if "utf" in (self.stream.encoding or "").lower() else "_"
        pieces: list[tuple[str, str | None]] = []
        changed = 0
        for token, is_new, sure in zip(*columns, strict=True):
            if token == mask:
                pieces.append((blank, DIM))
                continue
            # One by one, so that each has its own colour.
            colour = (YELLOW if sure < 0.5 else GREEN) if is_new else None
            pieces += [(each, colour) for each in escaped(str(self.policy.tokenizer.decode([token])))]
            changed = len(pieces) if is_new else changed
        revealed = sum(token != mask for token in columns[0])
        heading, text = (
            f"step {self._step}, {revealed} of {len(columns[0])} tokens",
            "".join(each for each, _ in pieces),
        )
        if not is_terminal(self.stream):
            self.stream.write(f"{heading}: {text}\n")
            return
        width, height = terminal_size(self.stream)
        # What has room around the change, where each character may take two cells.
        room = width // 2 * max(1, height - 2)
        first = max(0, min(changed - room // 2, len(pieces) - room))
        shown = "".join(f"\x1b[{code}m{each}\x1b[0m" if code else each for each, code in pieces[first : first + room])
        # It forbids colours (https://no-color.org).
        shown = text[first : first + room] if os.environ.get("NO_COLOR") else shown
        self.stream.write(f"\x1b[H\x1b[J{heading}\n{shown}\n")
        self.stream.flush()
        time.sleep(PAUSE)
