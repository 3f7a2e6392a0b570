"""Times the samplers against the plain published decoding on the same random weights.

    python -m benchmarks.samplers --size M --schedule static threshold --cache dual

Plain and ours alternate, after one untimed run of each whose tokens are compared; the ratio is that of the medians.
Prompts are random, differ between rows and are not padded, so neither side saves by that.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer as WordTokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.options import at_least_three, function_named
from benchmarks.plain import transfer_rows
from dmpo_lightning.functional import row_keys
from dmpo_lightning.models.llada import LLaDAConfig, LLaDAForMaskedDiffusion
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import ConfidenceSampler, Sampler
from dmpo_lightning.samplers.transfer import above_threshold

SCHEDULES: dict[str, dict[str, float]] = {"static": {}, "threshold": {"threshold": 0.9}, "factor": {"factor": 1.0}}
CACHES = ("none", "prefix", "dual")
LOGIT_SCALE = 12.0
"""Standard deviation of a random model's logits. At 12, threshold 0.9 reveals about two tokens per step at size M (67
steps for 128), often one and sometimes many; at 4 it hardly ever finds two (127 steps).
"""


@dataclass(frozen=True)
class Size:
    """A model and what it decodes; its other measures are four layers of width 256 and an MLP of 768."""

    vocab_size: int
    prompt_length: int
    completion_length: int
    rows: int
    denoising_steps: int | None
    """Of the static schedule; None takes one token per step."""
    block_length: int = 16


SIZES = {
    "A": Size(vocab_size=126464, prompt_length=196, completion_length=32, rows=1, denoising_steps=None),
    "M": Size(vocab_size=2048, prompt_length=100, completion_length=128, rows=2, denoising_steps=64),
}


@dataclass(frozen=True)
class Case:
    """What is decoded, and how."""

    size: str
    temperature: float
    schedule: str
    cache: str


@dataclass(frozen=True)
class Timing:
    """Median seconds of both sides, and how many tokens (or positions) of theirs differ; None above temperature 0."""

    plain_seconds: float
    our_seconds: float
    mismatches: int | None

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.plain_seconds / self.our_seconds


def random_policy(size: Size) -> Policy:
    """LLaDA with large random weights. The mask token is the last id, and the only one that is banned."""
    config = LLaDAConfig(
        d_model=256,
        n_layers=4,
        n_heads=4,
        mlp_hidden_size=768,
        vocab_size=size.vocab_size,
        initializer_range=0.1,
        mask_token_id=size.vocab_size - 1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return random_policy_of(lambda: LLaDAForMaskedDiffusion(config))


def random_policy_of(build: Callable[[], PreTrainedModel]) -> Policy:
    """A model with a random head that spreads confidences out, and a tokenizer that fills its vocabulary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        head = model.get_output_embeddings()
        torch.nn.init.normal_(head.weight, std=LOGIT_SCALE / head.in_features**0.5)
    mask = model.config.mask_token_id
    vocabulary = {f"w{number}": number for number in range(mask)} | {"[MASK]": mask}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=WordTokenizer(WordLevel(vocabulary, unk_token="w0")), mask_token="[MASK]", pad_token="w0"
    )
    return Policy(model, tokenizer, with_reference=False)


def random_prompts(size: Size) -> tuple[Tensor, Tensor]:
    """Ids without the mask token, and a mask that pads nothing."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocab_size - 1, (size.rows, size.prompt_length), generator=generator)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def theirs(
    plain: Callable[..., Any], policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, case: Case, size: Size
) -> Tensor:
    """Completions of the plain side, called as `benchmarks.plain.generate` is."""
    ban = torch.zeros(size.vocab_size)
    ban[list(policy.facts.banned_token_ids)] = -torch.inf
    return plain(
        policy.model,
        prompt_ids,
        prompt_mask,
        completion_length=size.completion_length,
        mask_token_id=policy.facts.mask_token_id,
        ban=ban,
        generator=torch.Generator().manual_seed(0),
        **decoding_options(case, size),
    ).completion_ids


def ours(policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, case: Case, size: Size) -> Tensor:
    """Completions of the package's sampler."""
    sampler = ConfidenceSampler(**decoding_options(case, size))
    return sampled(policy, sampler, prompt_ids, prompt_mask, size.completion_length)


def sampled(policy: Policy, sampler: Sampler, prompt_ids: Tensor, prompt_mask: Tensor, length: int) -> Tensor:
    """One completion of each prompt, always the same."""
    keys = row_keys(0, torch.arange(len(prompt_ids)), group_size=1, buffer=0).squeeze(1)
    with evaluating(policy):
        return sampler.sample(policy, prompt_ids, prompt_mask, completion_length=length, keys=keys).completion_ids


def decoding_options(case: Case, size: Size) -> dict[str, Any]:
    """The arguments that both sides share."""
    return {
        "block_length": size.block_length,
        "denoising_steps": size.denoising_steps if case.schedule == "static" else None,
        "temperature": case.temperature,
        "cache": case.cache,
        **SCHEDULES[case.schedule],
    }


def interleaved(plain: Callable[[], Tensor], our: Callable[[], Tensor], *, repeats: int, compare: bool) -> Timing:
    """One untimed run of each, then ``repeats`` timed ones by turns."""
    plain_result, our_result = plain(), our()
    seconds: dict[Callable[[], Tensor], list[float]] = {plain: [], our: []}
    for _ in range(repeats):
        for side, durations in seconds.items():
            start = time.perf_counter()
            side()
            durations.append(time.perf_counter() - start)
    mismatches = int((plain_result != our_result).sum()) if compare else None
    return Timing(median(seconds[plain]), median(seconds[our]), mismatches)


def time_decoding(case: Case, size: Size, policy: Policy, plain: Callable[..., Any], repeats: int) -> Timing:
    """Whole completions; ``mismatches`` counts tokens."""
    prompts = random_prompts(size)
    return interleaved(
        lambda: theirs(plain, policy, *prompts, case, size),
        lambda: ours(policy, *prompts, case, size),
        repeats=repeats,
        compare=case.temperature == 0,
    )


def time_transfer(repeats: int, *, calls: int = 100) -> Timing:
    """The choice of positions alone, in 16 rows of 32 candidates at threshold 0.9; ``calls`` of them at a time."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(16, 32, generator=generator)
    candidates = torch.rand(16, 32, generator=generator) < 0.75

    def repeated(choose: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: [choose() for _ in range(calls)][-1]

    timing = interleaved(
        repeated(lambda: transfer_rows(confidence, candidates, threshold=0.9)),
        repeated(lambda: above_threshold(confidence, candidates, 0.9)),
        repeats=repeats,
        compare=True,
    )
    return Timing(timing.plain_seconds / calls, timing.our_seconds / calls, timing.mismatches)


def measured(arguments: argparse.Namespace) -> Iterator[tuple[Case, Timing]]:
    """Each case that was asked for, as it is done."""
    for name in arguments.size:
        if name == "transfer":
            yield Case(name, 0.0, "threshold", "none"), time_transfer(arguments.repeats)
            continue
        size, plain = SIZES[name], arguments.plain
        policy = random_policy(size)
        for options in itertools.product(arguments.temperature, arguments.schedule, arguments.cache):
            case = Case(name, *options)
            yield case, time_decoding(case, size, policy, plain, arguments.repeats)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    names = (*SIZES, "transfer")
    parser = argparse.ArgumentParser(prog="benchmarks.samplers", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", nargs="+", choices=names, default=names)
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 0.2])
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--cache", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--plain", type=function_named, default="benchmarks.plain:generate", metavar="MODULE:FUNCTION")
    parser.add_argument("--repeats", type=at_least_three, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON per case")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if not options.json:
        print("size      T    schedule   cache   plain [s]   ours [s]   ratio  mismatches")
    for case, timing in measured(options):
        if options.json:
            line = json.dumps({**asdict(case), "ratio": round(timing.ratio, 3), "mismatches": timing.mismatches})
        else:
            mismatches = "-" if timing.mismatches is None else timing.mismatches
            line = (
                f"{case.size:8} {case.temperature:4} {case.schedule:10} {case.cache:7} {timing.plain_seconds:9.4g} "
                f"{timing.our_seconds:10.4g} {timing.ratio:7.2f} {mismatches:>11}"
            )
        print(line, flush=True)


if __name__ == "__main__":
    main()
