"""``dmpo-lightning completion``: a script by which bash or zsh completes commands, options and names."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files

from dmpo_lightning.commands.arguments import COMMANDS, LIGHT, CommandParser, shipped_configs
from dmpo_lightning.commands.signatures import options_of

DESCRIPTION = """\
Print a script that completes commands, options and names in bash or zsh. It is fixed text, so that no key press waits
for Python; print it again after an upgrade.

  source <(dmpo-lightning completion bash)     in ~/.bashrc, or once: dmpo-lightning completion bash > FILE
  source <(dmpo-lightning completion zsh)      in ~/.zshrc
"""
RUN_OPTIONS = (
    *("--config", "--ckpt_path", "--seed_everything", "--print_config", "--trust_checkpoint", "--model", "--data"),
    *("--help", "--debug"),
)
CHOICES = """\
  local names="" files=1
  case "$option" in
%(values)s
    *) case "$command" in
%(options)s
    esac ;;
  esac
  case "$option" in dmpo-lightning|completion|--check|--task|--cat) files="" ;; esac
  case "$current" in -*) files="" ;; esac
"""
"""Sets the names that may stand at a place, and whether a file may, in both shells."""
BASH = """\
_dmpo_lightning() {
  local current="${2-${COMP_WORDS[COMP_CWORD]}}" option="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}" each
  # Bash takes an equals sign for a word.
  if [ "$current" = "=" ]; then current=""
  elif [ "$option" = "=" ]; then option="${COMP_WORDS[COMP_CWORD-2]}"; fi
  if [ "$COMP_CWORD" -eq 1 ]; then option="dmpo-lightning"; fi
%(choices)s  COMPREPLY=($(compgen -W "$names" -- "$current"))
  if [ -n "$files" ]; then
    # So that readline quotes blanks, and ends folders with a slash.
    compopt -o filenames 2>/dev/null
    while IFS= read -r each; do COMPREPLY+=("$each"); done < <(compgen -f -- "$current")
  fi
}
complete -F _dmpo_lightning dmpo-lightning
"""
ZSH = """\
#compdef dmpo-lightning
(( $+functions[compdef] )) || { autoload -U +X compinit && compinit -u; }
_dmpo_lightning() {
  local current="$PREFIX" option="${words[CURRENT-1]}" command="${words[2]}"
  if [[ "$current" = -*=* ]]; then
    option="${current%%%%=*}"
    compset -P 1 '*='
    current="$PREFIX"
  fi
  if (( CURRENT == 2 )); then option="dmpo-lightning"; fi
%(choices)s  compadd -- ${=names}
  [[ -z "$files" ]] || _files
}
compdef _dmpo_lightning dmpo-lightning
"""


def run(arguments: Sequence[str]) -> None:
    """Prints the script."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandParser("dmpo-lightning completion", description=DESCRIPTION, formatter_class=formatter)
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(script(parser.parse_args(arguments).shell), end="")


def script(shell: str) -> str:
    """The completion script of a shell, see `DESCRIPTION`."""
    runs = [
        *RUN_OPTIONS,
        *_arguments("trainer", "lightning.pytorch.Trainer"),
        *_arguments("model", "dmpo_lightning.DMPO"),
    ]
    runs += _arguments("model.model", "dmpo_lightning.Backbone")
    options = {name: _options(name) for name in LIGHT if name not in ("completion", "options", "configs")} | {
        "fit|validate|test|predict": runs
    }
    # Of plan all options of a run are options too.
    options["plan"] += runs
    options["generate"] += ["--sampler", *_arguments("sampler", "dmpo_lightning.ConfidenceSampler")]
    values = {
        "dmpo-lightning": " ".join([*COMMANDS, "--help", "--version"]),
        "--config": " ".join(shipped_configs()),
        "--model|--model.model": " ".join(sorted(each.name for each in (files("dmpo_lightning") / "assets").iterdir())),
        "--ckpt_path": "last",
        "--check": "published verified",
        "--task": "gsm8k math500 countdown sudoku",
        "completion": "bash zsh",
        "--cat": " ".join(shipped_configs()),
    }
    parts = {"values": values, "options": {name: " ".join(each) for name, each in options.items()}}
    cases = {name: "\n".join(f'    {key}) names="{each}" ;;' for key, each in parts[name].items()) for name in parts}
    return (ZSH if shell == "zsh" else BASH) % {"choices": CHOICES % cases}


def _options(command: str) -> list[str]:
    """The options of a light command, as its parser states them."""
    parser = import_module(f"dmpo_lightning.commands.{command}").make_parser()
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


def _arguments(prefix: str, path: str) -> list[str]:
    """Options of the arguments of a class. Data differ from task to task, and have none here."""
    return [f"--{prefix}.{each}" for each in options_of(path) or ()]
