"""Which optimizers and schedulers a run takes, and what is said of the others."""

import pytest
from dmpo_runs import loader, module, trainer
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder
from torch.optim import LBFGS, SGD


class LineSearch(SGD):
    """Asks for the loss twice, which its signature does not tell."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


class OwnLBFGS(LBFGS):
    pass


def fit(tmp_path, *, callbacks=(), steps=-1, **options):
    trainer(tmp_path, max_steps=steps, callbacks=[*callbacks]).fit(module(**options), loader())


@pytest.mark.parametrize("optimizer", [LBFGS, OwnLBFGS, LineSearch])
def test_an_optimizer_that_computes_the_loss_several_times_per_step_is_refused(tmp_path, optimizer):
    with pytest.raises(ValueError, match=f"`optimizer` {optimizer.__name__} computes the loss several times per step"):
        fit(tmp_path, steps=2, optimizer=lambda parameters: optimizer(parameters, lr=1e-3))


@pytest.mark.parametrize("kind", [BackboneFinetuning, LearningRateFinder])
def test_a_callback_that_needs_what_a_policy_has_not_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="or leave it out"):
        fit(tmp_path, steps=1, callbacks=[kind()])
