"""A few rollouts of a buffer, to be read by people: on the screen, and in the tables of loggers."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from dmpo_lightning.callbacks.completion_records import prompt_texts
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer, check_counts
from dmpo_lightning.terminal import printable, shortened

Sample = dict[str, Any]
"""A rollout in words: ``prompt`` and ``completion``, which may hold anything, ``reward`` and ``weight``.

The weight has a mean of 1 in each group or buffer, and is 1 where the objective has none.
"""


def best_and_worst(module: LightningModule, buffer: RolloutBuffer, prompts: int) -> list[Sample]:
    """Of the first prompts the completion of the highest reward, and that of the lowest where there is another."""
    assert isinstance(module, PolicyModule)
    rollouts, weight = buffer.rollouts[:prompts], buffer.targets.get("weight")
    texts, shown = prompt_texts(module.policy.tokenizer, rollouts.prompts), []
    for row, rewards in enumerate(rollouts.reward.tolist()):
        ordered = sorted(range(len(rewards)), key=lambda rollout: rewards[rollout])
        for rollout in dict.fromkeys((ordered[-1], ordered[0])):
            said = {"prompt": texts[row], "completion": rollouts.completions[row][rollout], "reward": rewards[rollout]}
            shown.append(said | {"weight": 1.0 if weight is None else float(weight[row, rollout])})
    return shown


def samples_text(module: LightningModule, buffer: RolloutBuffer) -> str:
    """The best and the worst completion of a buffer's first prompt with rewards and weights, to be read on a screen."""
    samples = best_and_worst(module, buffer, prompts=1)
    lines = [f"Rollouts of buffer {buffer.number + 1}:", f"  prompt {shortened(samples[0]['prompt'], 300)}"]
    lines += [
        f"  reward {each['reward']:.3f}, weight {each['weight']:.3f}: {shortened(each['completion'], 300)}"
        for each in samples
    ]
    return "\n".join(lines)


class LoggingExtras(RolloutObserver):
    """Gives TensorBoard, W&B and MLflow prompts with their best and worst completion, in ``completion/text``.

    They are of rank 0's rollouts. Loggers of scalars alone, such as that of CSV files, get the scalars they always
    get. The command line adds this callback by itself.

    Args:
        every_n_buffers: how often, beginning with the first buffer.
        prompts: of each such buffer.
    """

    def __init__(self, every_n_buffers: int = 10, prompts: int = 4) -> None:
        check_counts(every_n_buffers=every_n_buffers, prompts=prompts)
        self.every_n_buffers, self.prompts = every_n_buffers, prompts

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        if buffer.number % self.every_n_buffers or not trainer.is_global_zero or not trainer.loggers:
            return
        samples = best_and_worst(module, buffer, self.prompts)
        for logger in trainer.loggers:
            log_samples(logger, samples, trainer.global_step)


def log_samples(logger: Any, samples: Sequence[Sample], step: int) -> None:
    """Gives a logger rollouts in words, in the way that it takes them."""
    name, columns = "completion/text", list(samples[0])
    # By name, because none of their packages need be installed.
    kinds = {each.__name__ for each in type(logger).__mro__}
    if "TensorBoardLogger" in kinds:
        logger.experiment.add_text(name, _markdown(samples), step)
    elif "WandbLogger" in kinds:
        logger.log_table(name, columns=columns, data=[list(each.values()) for each in samples], step=step)
    elif "MLFlowLogger" in kinds:
        table = {column: [each[column] for each in samples] for column in columns}
        # A file for each step: MLflow adds to a table by reading all of it.
        logger.experiment.log_table(logger.run_id, table, f"{name}/step_{step:08}.json")


def _markdown(samples: Sequence[Sample]) -> str:
    """TensorBoard reads Markdown, in which completions could be anything: lines of code are shown as they are."""
    parts = []
    for each in samples:
        parts.append(f"reward {each['reward']:.4g}, weight {each['weight']:.4g}")
        for text in (each["prompt"], each["completion"]):
            parts.append("\n".join(f"    {line}" for line in printable(text).split("\n")))
    return "\n\n".join(parts)
