"""A few rollouts of a buffer, to be read by people: on the screen, and in the tables of loggers."""

from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer

from dmpo_lightning.callbacks.completion_records import prompt_texts
from dmpo_lightning.callbacks.progress import announce
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer, check_counts
from dmpo_lightning.terminal import escaped, number


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
    texts = prompt_texts(module.policy.tokenizer, buffer.rollouts.prompts)
    weight = buffer.targets.get("weight")
    shown = []
    for row, rewards in enumerate(buffer.rollouts.reward[:prompts].tolist()):
        ordered = sorted(range(len(rewards)), key=lambda rollout: rewards[rollout])
        for rollout in dict.fromkeys((ordered[-1], ordered[0])):
            own = 1.0 if weight is None else float(weight[row, rollout])
            shown.append(Sample(texts[row], buffer.rollouts.completions[row][rollout], rewards[rollout], own))
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


def shortened(text: str, characters: int) -> str:
    """The text on one line, of a long one a third from its beginning and the rest from its end, where answers are."""
    # Cut before it is escaped: a hostile text may have a million characters, each of which becomes ten.
    if len(text) > characters:
        head = characters // 3
        text = f"{text[:head]} ... {text[len(text) - (characters - head) :]}"
    return escaped(text)
