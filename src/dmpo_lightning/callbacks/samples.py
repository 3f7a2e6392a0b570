"""A few rollouts of a buffer, to be read by people: on the screen, and in the tables of loggers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dmpo_lightning.callbacks.completion_records import prompt_texts
from dmpo_lightning.callbacks.progress import announce
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer, check_counts
from dmpo_lightning.terminal import escaped, number, printable

LONGEST_TEXT = 4000
"""Characters of a prompt or completion that a logger gets."""


@dataclass(frozen=True)
class Sample:
    """One rollout in words. Texts are those of a model and of data, and may hold anything."""

    prompt: str
    completion: str
    reward: float
    weight: float
    """Towards the target, with a mean of 1 in each group or buffer. It is 1 where the objective has no weights."""


def best_and_worst(module: LightningModule, buffer: RolloutBuffer, prompts: int) -> list[Sample]:
    """Of the first prompts the completion of the highest reward, and that of the lowest where there is another."""
    assert isinstance(module, PolicyModule)
    rollouts, weight = buffer.rollouts[:prompts], buffer.targets.get("weight")
    texts, shown = prompt_texts(module.policy.tokenizer, rollouts.prompts), []
    for row, rewards in enumerate(rollouts.reward.tolist()):
        ordered = sorted(range(len(rewards)), key=lambda rollout: rewards[rollout])
        for rollout in dict.fromkeys((ordered[-1], ordered[0])):
            own = 1.0 if weight is None else float(weight[row, rollout])
            shown.append(Sample(texts[row], rollouts.completions[row][rollout], rewards[rollout], own))
    return shown


class RolloutsOnScreen(RolloutObserver):
    """Prints the best and the worst completion of a few prompts, with their rewards and weights, on rank 0.

    Args:
        every_n_buffers: how often, beginning with the first buffer.
        prompts: of each such buffer.
        characters: of a longer prompt or completion the beginning and the end are shown.
    """

    def __init__(self, every_n_buffers: int = 20, prompts: int = 1, characters: int = 300) -> None:
        check_counts(every_n_buffers=every_n_buffers, prompts=prompts, characters=characters)
        self.every_n_buffers, self.prompts, self.characters = every_n_buffers, prompts, characters

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        if buffer.number % self.every_n_buffers or not trainer.is_global_zero:
            return
        lines, prompt = [f"Rollouts of buffer {buffer.number + 1}:"], None
        for sample in best_and_worst(module, buffer, self.prompts):
            if sample.prompt != prompt:
                prompt = sample.prompt
                lines.append(f"  prompt {shortened(prompt, self.characters)}")
            facts = f"reward {number(sample.reward)}, weight {number(sample.weight)}"
            lines.append(f"  {facts}: {shortened(sample.completion, self.characters)}")
        announce(trainer, "\n".join(lines))


class LoggingExtras(RolloutObserver):
    """Gives TensorBoard, W&B and MLflow prompts with their best and worst completion, in ``completion/text``.

    They are of rank 0's rollouts. Loggers of scalars alone, such as that of CSV files, get the scalars they always
    get. The command line adds this callback by itself. A logger that fails here gets nothing more of it: a warning says
    so, and the run goes on.

    Args:
        every_n_buffers: how often, beginning with the first buffer.
        prompts: of each such buffer.
    """

    def __init__(self, every_n_buffers: int = 10, prompts: int = 4) -> None:
        check_counts(every_n_buffers=every_n_buffers, prompts=prompts)
        self.every_n_buffers, self.prompts = every_n_buffers, prompts
        self._failed: set[int] = set()

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        if buffer.number % self.every_n_buffers or not trainer.is_global_zero or not trainer.loggers:
            return
        samples = [
            replace(each, prompt=each.prompt[-LONGEST_TEXT:], completion=each.completion[-LONGEST_TEXT:])
            for each in best_and_worst(module, buffer, self.prompts)
        ]
        for logger in trainer.loggers:
            if id(logger) in self._failed:
                continue
            try:
                log_samples(logger, samples, trainer.global_step)
            # Services and disks fail in as many ways as there are loggers, and training need not end for a text.
            except Exception as error:
                self._failed.add(id(logger))
                rank_zero_warn(
                    f"{type(logger).__name__} gets no more completions, because some failed: {type(error).__name__}: "
                    f"{error}"
                )


def log_samples(logger: Any, samples: Sequence[Sample], step: int) -> None:
    """Gives a logger rollouts in words, in the way that it takes them."""
    rows, name = [asdict(each) for each in samples], "completion/text"
    # By name, because none of their packages need be installed.
    kinds = {each.__name__ for each in type(logger).__mro__}
    if "TensorBoardLogger" in kinds:
        logger.experiment.add_text(name, _markdown(samples), step)
    elif "WandbLogger" in kinds:
        logger.log_table(name, columns=list(rows[0]), data=[list(row.values()) for row in rows], step=step)
    elif "MLFlowLogger" in kinds:
        table = {column: [row[column] for row in rows] for column in rows[0]}
        # A file for each step: MLflow adds to a table by reading all of it.
        logger.experiment.log_table(logger.run_id, table, f"{name}/step_{step:08}.json")


def _markdown(samples: Sequence[Sample]) -> str:
    """TensorBoard reads Markdown, in which completions could be anything: lines of code are shown as they are."""
    parts = []
    for each in samples:
        parts.append(f"reward {each.reward:.4g}, weight {each.weight:.4g}")
        for text in (each.prompt, each.completion):
            parts.append("\n".join(f"    {line}" for line in printable(text).split("\n")))
    return "\n\n".join(parts)


def shortened(text: str, characters: int) -> str:
    """The text on one line, of a long one a third from its beginning and the rest from its end, where answers are."""
    # Cut before it is escaped: a hostile text may have a million characters, each of which becomes ten.
    if len(text) > characters:
        head = characters // 3
        text = f"{text[:head]} ... {text[len(text) - (characters - head) :]}"
    return escaped(text)
