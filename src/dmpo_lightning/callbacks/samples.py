"""A few rollouts of a buffer, to be read by people: on the screen, and in the tables of loggers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dmpo_lightning.callbacks.completion_records import prompt_texts
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer, check_counts
from dmpo_lightning.terminal import escaped, number, printable, shortened

LOGGING = ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint")
"""What Lightning calls of a logger while a run goes on."""
CHARACTERS = 300
"""Of a prompt or completion on a screen."""


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


def samples_text(module: LightningModule, buffer: RolloutBuffer) -> str:
    """The best and the worst completion of a buffer's first prompt with rewards and weights, to be read on a screen."""
    samples = best_and_worst(module, buffer, prompts=1)
    lines = [f"Rollouts of buffer {buffer.number + 1}:", f"  prompt {shortened(samples[0].prompt, CHARACTERS)}"]
    for each in samples:
        facts = f"reward {number(each.reward)}, weight {number(each.weight)}"
        lines.append(f"  {facts}: {shortened(each.completion, CHARACTERS)}")
    return "\n".join(lines)


class LoggingExtras(RolloutObserver):
    """Gives TensorBoard, W&B and MLflow prompts with their best and worst completion, in ``completion/text``.

    They are of rank 0's rollouts. Loggers of scalars alone, such as that of CSV files, get the scalars they always
    get. The command line adds this callback by itself.

    It also lets a run go on whose logger fails, whatever is raised there: services and disks fail in as many ways as
    there are loggers, and a run is worth more than its log. A warning says so at the first failure, and how many there
    were at the end. A logger that cannot begin ends the run, and so does a checkpoint that cannot be written.

    Args:
        every_n_buffers: how often, beginning with the first buffer.
        prompts: of each such buffer.
    """

    def __init__(self, every_n_buffers: int = 10, prompts: int = 4) -> None:
        check_counts(every_n_buffers=every_n_buffers, prompts=prompts)
        self.every_n_buffers, self.prompts = every_n_buffers, prompts
        self._failures: Counter[str] = Counter()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._failures.clear()
        for logger in trainer.loggers:
            # Lightning asks the object for them, so that its own attribute comes before the method of its class.
            for name in LOGGING:
                if not isinstance(write := getattr(logger, name), partial):
                    vars(logger)[name] = partial(self._try, logger, write)

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        if buffer.number % self.every_n_buffers or not trainer.is_global_zero or not trainer.loggers:
            return
        samples = best_and_worst(module, buffer, self.prompts)
        for logger in trainer.loggers:
            self._try(logger, log_samples, logger, samples, trainer.global_step)

    def _try(self, logger: Any, write: Callable[..., Any], *values: Any, **options: Any) -> Any:
        try:
            return write(*values, **options)
        # See above.
        except Exception as error:
            name, cause = type(logger).__name__, error.__cause__ or error
            self._failures[name] += 1
            if self._failures[name] == 1:
                said = escaped(f"{type(cause).__name__}: {cause}")
                rank_zero_warn(
                    f"{name} cannot write ({said}). The run goes on; what is logged meanwhile is lost there."
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name, count in self._failures.items():
            rank_zero_warn(f"{name} could not write {count} times in this run.")


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
