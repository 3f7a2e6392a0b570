"""`generate`: prompts of one's own, answered as a validation would answer them."""

import json
from html.parser import HTMLParser

import pytest
import torch
from dmpo_runs import PROMPTS, Recorder, loader, module, trainer
from lightning.pytorch.callbacks import Callback

from dmpo_lightning import ConfidenceSampler, MaskedSFT, RandomOrderSampler, WinoSampler
from dmpo_lightning.modules.generating import generate
from dmpo_lightning.rollout import Sampling
from helpers import NEVER_SAMPLED

TEXTS = [example["prompt"] for example in PROMPTS]
SAMPLED = ConfidenceSampler(temperature=1.5)


@pytest.fixture(scope="module")
def dmpo():
    return module(validation_samplers={"sampled": SAMPLED, "early": ConfidenceSampler(block_length=2, early_exit=True)})


def records(tmp_path, dmpo, **options):
    batches = trainer(tmp_path, **options).predict(dmpo, loader(4, shuffle=False))
    return [record for batch in batches for record in batch]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_answers_are_those_of_a_validation(tmp_path, dmpo, precision):
    dmpo.evaluator.completions = 2
    found = records(tmp_path, dmpo, precision=precision)
    dmpo.evaluator.completions = 1
    for name, sampler in dmpo.evaluator.samplers.items():
        expected = {(each["index"], each["rollout"]): each["completion"] for each in found if each["sampler"] == name}
        answers = dmpo.generate(TEXTS, sampler=sampler, completions=2)
        assert {(each.index, each.rollout): each.text for each in answers} == expected
        assert len({each.text for each in answers}) > 6


def test_an_answer_depends_neither_on_its_batch_nor_on_the_rows_of_a_forward(dmpo):
    together = dmpo.generate(TEXTS, sampler=SAMPLED, completions=2)
    one, three = (generate(dmpo.policy, TEXTS, Sampling(SAMPLED, 8, 2, rows_per_forward=rows)) for rows in (None, 3))
    assert [(each.text, each.steps) for each in one] == [(each.text, each.steps) for each in three]
    alone = dmpo.generate(TEXTS[4], sampler=SAMPLED, completions=2, index=[4])
    assert [each.text for each in alone] == [each.text for each in together[8:10]]
    assert [each.steps for each in alone] == [each.steps for each in together[8:10]]
    reverse = dmpo.generate(TEXTS[::-1], sampler=SAMPLED, index=range(len(TEXTS))[::-1])
    assert [each.text for each in reverse][::-1] == [each.text for each in together[::2]]


def test_facts_of_tokens_belong_together(dmpo):
    (answer,) = dmpo.generate(TEXTS[0], sampler=RandomOrderSampler(denoising_steps=4), seed=3)
    assert [answer.text] == dmpo.policy.decode(torch.tensor([answer.ids]))
    assert sorted(answer.steps) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(0 < sure <= 1 for sure in answer.confidence)
    assert not set(answer.ids) & set(NEVER_SAMPLED)
    assert answer != dmpo.generate(TEXTS[0], sampler=RandomOrderSampler(denoising_steps=4), seed=4)[0]


class Frames(HTMLParser):
    """The elements of a text."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_a_notebook_shows_an_answer_in_the_viewer_and_elsewhere_it_is_one_line(dmpo):
    (answer,) = dmpo.generate([[{"role": "user", "content": "</script>\"12\n'3"}]], sampler=SAMPLED)
    ((tag, attributes),) = Frames(answer._repr_html_()).found
    # Nothing but the script of the frame may run, and it reaches neither the notebook nor a network.
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts")
    document = attributes["srcdoc"]
    assert document.startswith("<!DOCTYPE html>")
    assert "default-src 'none'" in document
    (data,) = document.split('<script type="application/json" id="data">')[1:]
    (item,) = json.loads(data.partition("</script>")[0])["completions"]
    assert item["prompt"] == "user: </script>\"12\n'3"
    (pane,) = item["panes"]
    assert [step for _, step, _ in pane["tokens"]] == answer.steps
    assert len(pane["tokens"]) == len(answer.tokens) == len(answer.ids)
    assert "".join(answer.tokens).startswith(answer.text[:1])
    assert repr(answer).startswith("Generation(prompt='user: </script>\"12\\n'3', text='")
    assert "\n" not in repr(answer)


def test_what_an_early_exit_fills_in_has_neither_step_nor_confidence(dmpo):
    early = dmpo.evaluator.samplers["early"]
    answers = dmpo.generate(TEXTS * 10, sampler=early, index=range(60))
    filled = [[step is None for step in each.steps] for each in answers]
    assert any(map(any, filled))
    assert filled == [[sure is None for sure in each.confidence] for each in answers]


def test_a_conversation_and_a_prefill_are_prompts_too(dmpo):
    said = dmpo.generate([{"role": "user", "content": TEXTS[0]}], sampler=SAMPLED)
    assert [each.text for each in said] == [each.text for each in dmpo.generate(TEXTS[0], sampler=SAMPLED)]
    assert dmpo.generate(TEXTS[0], sampler=SAMPLED, prefill="<answer>")[0].confidence != said[0].confidence


class Ask(Callback):
    """Asks in the middle of training."""

    def __init__(self):
        self.answers = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.answers.append(pl_module.generate(TEXTS, sampler=SAMPLED))


def test_training_does_not_notice_that_somebody_asks(tmp_path):
    plain, ask, recorder = Recorder(), Ask(), Recorder()
    trainer(tmp_path, max_steps=4, callbacks=[plain]).fit(module(), loader())
    trained = module()
    trainer(tmp_path, max_steps=4, callbacks=[ask, recorder]).fit(trained, loader())
    assert recorder.losses == plain.losses
    assert trained.training
    assert ask.answers[0] != trained.generate(TEXTS, sampler=SAMPLED)


def test_masked_sft_answers_with_the_most_likely_tokens_and_a_length():
    tuned = MaskedSFT("sudoku_tiny")
    (answer,) = tuned.generate("1234341221434320", completion_length=20)
    assert answer.text == "<answer>1234341221434321</answer>"
    with pytest.raises(ValueError, match="MaskedSFT has none: pass generate"):
        tuned.generate("1")


def test_all_steps_are_shown(dmpo):
    seen = []
    answers = generate(
        dmpo.policy,
        TEXTS[:2],
        Sampling(dmpo.sampler, 8, rows_per_forward=1),
        on_change=lambda change: seen.append((change.rows.tolist(), change.written.sum().item())),
    )
    assert seen == [([0], 2)] * 4 + [([1], 2)] * 4
    assert [each.index for each in answers] == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "1", "index": [1, 2]}, "a number for each prompt, got 2 for 1"),
        ({"prompts": "1", "completion_length": 127}, "Prompt 1 of 1 has .* tokens, but the model takes 128, of which"),
        (
            {"prompts": "1", "completion_length": 500},
            "must leave room for a prompt in the 128 tokens .*, got 500; lower",
        ),
        ({"prompts": "1", "seed": 2**64}, r"`seed` must be from -2\*\*63 to 2\*\*64 - 1, got 18446744073709551616"),
        ({"prompts": "1", "completions": 0}, "`completions` must be at least 1"),
        ({"prompts": ["1", 2]}, "Prompt 2 of 2: a prompt must be a text"),
        ({"prompts": "1", "sampler": ConfidenceSampler(block_length=3)}, "multiple of `block_length`"),
    ],
)
def test_what_cannot_be_answered_is_said(dmpo, options, message):
    with pytest.raises(ValueError, match=message):
        dmpo.generate(**options)


def test_wino_is_watched_while_it_takes_back(dmpo):
    answers = dmpo.generate(TEXTS, sampler=WinoSampler(block_length=4, threshold=0.05, verification_threshold=0.9))
    assert all(sure is not None for each in answers for sure in each.confidence)
    assert torch.tensor([each.steps for each in answers]).min() >= 0
