"""What cached decoding means, without a cache: whole sequences through the model's own forward, in which the keys and
values of stale columns are replaced by those of the block's first forward. Greedy, one row at a time, in plain lists.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def projections(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(("k_proj", "v_proj"))}


@contextmanager
def stale(model: nn.Module, saved: dict[str, Tensor], columns: list[int]) -> Iterator[None]:
    """Within, keys and values of ``columns`` come from ``saved``."""

    def replacing(name):
        def hook(module, inputs, output):
            output = output.clone()
            output[:, columns] = saved[name][:, columns]
            return output

        return hook

    handles = [module.register_forward_hook(replacing(name)) for name, module in projections(model).items()]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def recorded(model: nn.Module, saved: dict[str, Tensor]) -> Iterator[None]:
    """Within, ``saved`` receives all keys and values."""

    def recording(name):
        return lambda module, inputs, output: saved.__setitem__(name, output)

    handles = [module.register_forward_hook(recording(name)) for name, module in projections(model).items()]
    yield
    for handle in handles:
        handle.remove()


def number_revealed(confidences: list[float], step_of_block: int, *, counts, threshold, factor) -> int:
    """Of descending confidences; the published rules, candidate by candidate."""
    if threshold is not None:
        return max(1, sum(confidence >= threshold for confidence in confidences))
    if factor is None:
        return counts[step_of_block]
    for index, confidence in enumerate(confidences):
        if index > 0 and confidence < 1 - factor / (index + 2):
            return index + 1 if index == len(confidences) - 1 else index
    return len(confidences)


@torch.no_grad()
def decode_by_definition(
    model: nn.Module, prompt: list[int], *, length, block_length, mask_token_id, banned, cache, **rule
) -> tuple[list[int], list[int]]:
    """Completion and reveal steps of one prompt without padding."""
    ids, revealed, step = prompt + [mask_token_id] * length, [-1] * length, 0
    for start in range(len(prompt), len(ids), block_length):
        end = start + block_length
        fresh = {"none": range(len(ids)), "prefix": range(start, len(ids)), "dual": range(start, end)}[cache]
        saved: dict[str, Tensor] = {}
        step_of_block = 0
        while mask_token_id in ids[start:end]:
            old = [column for column in range(len(ids)) if column not in fresh]
            with stale(model, saved, old) if step_of_block else recorded(model, saved):
                logits = model(torch.tensor([ids])).logits[0].double()
            logits[:, banned] = -torch.inf
            best, tokens = logits.softmax(-1).max(-1)
            places = [place for place in range(start, end) if ids[place] == mask_token_id]
            places.sort(key=lambda place, best=best: -float(best[place]))
            number = number_revealed([float(best[place]) for place in places], step_of_block, **rule)
            for place in places[:number]:
                ids[place], revealed[place - len(prompt)] = int(tokens[place]), step
            step, step_of_block = step + 1, step_of_block + 1
    return ids[len(prompt) :], revealed
