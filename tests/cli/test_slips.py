"""What a new user types wrong: one line that says what was meant, and status 2, before torch is loaded."""

import inspect
import shlex
import subprocess
import sys

import pytest
from cli_runs import status

import dmpo_lightning
from dmpo_lightning.commands.arguments import config_directory, resolve_arguments
from dmpo_lightning.commands.mistakes import check
from dmpo_lightning.commands.signatures import options_of

OWN = "def right(example, completion):\n    return 1.0\n"
FILES = {
    "own_rewards.py": OWN,
    "key.yaml": "model: {init_args: {group_sizes: 4}}\n",
    "value.yaml": "model: {init_args: {objective: {init_args: {negative_term: likelyhood}}}}\n",
    "nothing.yaml": "model: {init_args: {group_size: }}\n",
    "class.yaml": "trainer: {callbacks: [{class_path: dmpo_lightning.SavePretraind}]}\n",
}
SLIPS = [
    # Names of options.
    ("--group_size 3", "Did you mean --model.group_size?"),
    ("--group_siz 3", "Did you mean --model.group_size?"),
    ("--max_steps 3", "Did you mean --trainer.max_steps?"),
    ("--model.group_sizes 4", "Did you mean group_size?"),
    ("--model.grop_size=4", "no option model.grop_size. Did you mean group_size?"),
    ("--model.max_steps 4", "Did you mean --trainer.max_steps?"),
    ("--trainer.group_size 4", "Did you mean --model.group_size?"),
    ("--trainer.max_step 4", "Did you mean max_steps?"),
    ("--model.reward_temperature 0.1", "Did you mean --model.objective.reward_temperature?"),
    ("--model.objective.baselin none", "Did you mean baseline?"),
    ("--data.blankz '[3, 5]'", "Did you mean blanks?"),
    ("--model.optimizer.learning_rate 1e-3", "torch.optim.AdamW has: params, lr,"),
    ("-trainer.max_steps 4", "Did you mean --trainer.max_steps?"),
    ("--config key.yaml", "no option model.group_sizes. Did you mean group_size?"),
    # Values.
    ("--model.group_size abc", "`model.group_size` must be a whole number, got abc."),
    ("--model.group_size 4.5", "`model.group_size` must be a whole number, got 4.5."),
    ("--model.group_size null", "`model.group_size` must be a whole number, got null."),
    ("--trainer.max_steps null", "`trainer.max_steps` must be a whole number, got null."),
    ("--config nothing.yaml", "`model.group_size` must be a whole number, got null."),
    ("--trainer.max_steps 1e3", "`trainer.max_steps` must be a whole number, got 1e3."),
    ("--trainer.precision bf17", "Did you mean bf16?"),
    ("--trainer.gradient_clip_val high", "must be a whole number or a number or null, got high."),
    ("--model.sample_merged maybe", "must be true or false, got maybe."),
    ("--model.sampler.temperature hot", "`model.sampler.temperature` must be a number, got hot."),
    ("--model.objective.baseline negatve", "got negatve. Did you mean negative?"),
    ("--model.objective.baseline Negative", "Did you mean negative?"),
    ("--config value.yaml", "must be likelihood, log_likelihood, got likelyhood. Did you mean likelihood?"),
    ("--data.rewards verifed", "must be published, verified, got verifed. Did you mean verified?"),
    ("--model.validation_samplers greedy", "must be {name: Sampler} or null, got greedy."),
    ("--seed_everything abc", "`seed_everything` must be a whole number or null, got abc."),
    ("--seed_everything -1", "must be at least 0 and less than 2**32, got -1."),
    # Lists, and options without a value.
    ("--data.blanks 3 5", "must be [a whole number, a whole number], got 3."),
    ("--trainer.max_steps 3 5", "A list is one value, such as --data.blanks='[3, 5]', and"),
    ("--data.blanks=[3", "`data.blanks` must be [a whole number, a whole number], got [3."),
    ("--trainer.max_steps", "`trainer.max_steps` must be a whole number, got nothing."),
    ("--ckpt_path", "`--ckpt_path` must have a value behind it"),
    ("--config", "`--config` must have a value behind it"),
    ("gsm8k.yaml", "a configuration has --config before it."),
    # Classes.
    ("--trainer.callbacks+=dmpo_lightning.Preemtion", "Did you mean dmpo_lightning.Preemption?"),
    ("--config class.yaml", "Did you mean dmpo_lightning.SavePretrained?"),
    ("--trainer.callbacks+=lightning.pytorch.callbacks.ModelChekpoint", "callbacks.ModelCheckpoint?"),
    ("--model.objective=WDC", "Did you mean WDCE?"),
    ("--trainer.callbacks+=EarlyStoping", "Did you mean EarlyStopping?"),
    ("--model.objective=dmpo_lightning.ConfidenceSampler", "must be Objective, got dmpo_lightning.ConfidenceSampler."),
    ("--model.model.adapter=dmpo_lightning.LORA", "Did you mean dmpo_lightning.LoRA?"),
    ("--model.optimizer=torch.optim.Adamm", "Did you mean torch.optim.Adam?"),
    ("--data=sudoku", "Did you mean SudokuDataModule?"),
    ("--data=dmpo_lightning.Sudoku", "must be a LightningDataModule, got dmpo_lightning.Sudoku. There are: "),
    ("--model.reward=own_reward.right", "own_reward is neither installed nor a file own_reward.py in this folder."),
    ("--model.reward=own_rewards.rihgt", "Did you mean own_rewards.right?"),
    # Files.
    ("--model.model ./no_model", "`model.model.model` must be a file or a folder that exists, got ./no_model."),
    ("--data.path no.jsonl", "`data.path` must be a file or a folder that exists, got no.jsonl."),
    ("--ckpt_path no.ckpt", "got no.ckpt, which does not exist."),
    ("--config sudoku_tinny", "Did you mean sudoku_tiny.yaml?"),
]
OTHERS = [
    ("fti --config sudoku_tiny.yaml", "There is no command 'fti'. Did you mean fit?"),
    ("--config sudoku_tiny.yaml fit", "The command comes first."),
    ("fit", "pass --config NAME_OR_FILE, such as --config sudoku_tiny.yaml"),
    ("plan --config overlays/single_80gb.yaml", "such as --config sudoku_tiny.yaml, and overlays behind it"),
    ("fit --config overlays/sdar.yaml", "such as --config sudoku_tiny.yaml, and overlays behind it"),
    ("plan --config sudoku_tiny.yaml --group_size 3", "Did you mean --model.group_size?"),
    ("score --task gsm8k --check publishd --file x", "Did you mean published?"),
    ("score --task gsm8k --file x --jsn", "Unrecognized arguments: --jsn. Did you mean --json?"),
    ("plan --config sudoku_tiny.yaml --gpu_memory 24", "Did you mean gpu_memory_gb?"),
    ("plan --config sudoku_tiny.yaml --promt_length=24", "Did you mean prompt_length?"),
    ("generate --comletions 3", "Unrecognized arguments: --comletions. Did you mean --completions?"),
    ("generate --samplr WinoSampler", "Did you mean --sampler?"),
    ("export --ckpt_path x --output y --megre", "Did you mean --merge?"),
    ("report runs --outptu x", "Did you mean --output?"),
    ("configs --cta gsm8k", "Did you mean --cat?"),
    ("completion bsh", "Did you mean bash?"),
    ("report", "The following arguments are required: RUN."),
]


@pytest.mark.parametrize(
    ("typed", "said"), [*((f"fit --config sudoku_tiny.yaml {typed}", said) for typed, said in SLIPS), *OTHERS]
)
def test_a_slip_is_one_line(typed, said, capsys, workplace):
    for name, text in FILES.items():
        (workplace / name).write_text(text)
    assert status(*shlex.split(typed)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dmpo-lightning: ")
    assert said in line


def test_slips_are_seen_before_torch_is_loaded(workplace):
    typed = ["--group_size=3", "--model.objective.baseline=negatve", "--trainer.callbacks+=dmpo_lightning.Preemtion"]
    code = (
        "import sys; from dmpo_lightning.__main__ import main\n"
        f"for each in {typed}: assert main(['fit', '--config', 'sudoku_tiny.yaml', each]) == 2\n"
        "assert main(['plan', '--config', 'overlays/sdar.yaml']) == 2\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "option",
    ["--trainer.callbacks=null", "--trainer.logger null", "--model.lr_scheduler ~", "--seed_everything true"],
)
def test_what_the_parser_takes_is_no_slip(option):
    check("fit", resolve_arguments(["--config", "sudoku_tiny.yaml", *option.split()]))


def test_what_a_class_had_goes_with_it(workplace):
    """The pairs of sft.yaml are in a file that is not there; those of another task need none."""
    other = "--data.task=dmpo_lightning.LatinSquareDemonstrations"
    with pytest.raises(ValueError, match=r"`data\.task\.path` must be a file"):
        check("fit", resolve_arguments(["--config", "sft.yaml"]))
    check("fit", resolve_arguments(["--config", "sft.yaml", other]))


# Where options and configurations are found ---------------------------------------------------------------------------


def test_options_are_found_by_place_name_and_word(capsys):
    assert status("options") == 0
    overview = capsys.readouterr().out
    assert all(f"{place}: dmpo_lightning." in overview for place in ("model", "model.objective", "data", "data.task"))
    assert status("options", "model.objective") == 0
    shown = capsys.readouterr().out
    assert "--model.objective.negative_term: likelihood, log_likelihood; default 'likelihood'" in shown
    assert "dmpo_lightning.WDDO" in shown
    # What a docstring leaves to that of a base class.
    assert "above 0. A smaller one trusts the reward more." in shown
    assert status("options", "--data.blanks") == 0
    assert capsys.readouterr().out.splitlines()[-3:-1] == [
        "  --data.blanks: [a whole number, a whole number]; default (8, 12)",
        "      least and most blank cells of a generated puzzle.",
    ]
    assert status("options", "temperature") == 0
    found = capsys.readouterr().out
    assert "--model.objective.reward_temperature: a number; required" in found
    assert "--model.sampler.temperature: a number; default 1.0" in found
    assert status("options", "tempratur") == 2
    assert capsys.readouterr().err.endswith("Did you mean temperature?\n")


def test_signatures_are_those_that_python_sees():
    for name in ("DMPO", "MaskedSFT", "WDCE", "ConfidenceSampler", "Backbone", "LoRA", "Reward", "Preemption"):
        owner = getattr(dmpo_lightning, name)
        seen = {each for each in inspect.signature(owner).parameters if each != "self"}
        assert set(options_of(f"dmpo_lightning.{name}")) == seen, name
    options = options_of("dmpo_lightning.SudokuDataModule")
    # Its own, that of its base classes, and none that these say to each other.
    assert {"blanks", "sizes", "reward_weights", "prompts_per_buffer"} <= set(options)
    assert "task" not in options


def test_configurations_say_what_they_are_and_need(capsys):
    assert status("configs") == 0
    lines = capsys.readouterr().out.splitlines()
    said = lines[lines.index("  gsm8k.yaml") + 1]
    assert said == "      DMPO on GSM8K from LLaDA-8B-Instruct. Fits GPUs of 40 GB: about 27 GiB each."
    assert status("configs", "--cat", "gsm8k") == 0
    assert capsys.readouterr().out == (config_directory() / "gsm8k.yaml").read_text()
    assert status("configs", "--cat", "gsm9k") == 2
    assert "Did you mean gsm8k.yaml?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_help_of_a_run_begins_with_where_options_are(capsys):
    assert status("fit", "--help") == 0
    assert "dmpo-lightning options" in "".join(capsys.readouterr().out.splitlines()[:4])
