"""``dmpo-lightning completion``: a script by which bash or zsh completes commands, options and names."""

import argparse
import inspect
from collections.abc import Sequence
from importlib import import_module
from pkgutil import resolve_name

from dmpo_lightning.commands.arguments import COMMANDS, LIGHT, shipped_configs
from dmpo_lightning.models.loading import EMBEDDED_MODELS

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
FUNCTION = """\
_dmpo_lightning() {
  local current="${COMP_WORDS[COMP_CWORD]}" option="${COMP_WORDS[COMP_CWORD-1]}" words=""
  # Bash takes an equals sign for a word.
  if [ "$current" = "=" ]; then current=""
  elif [ "$option" = "=" ]; then option="${COMP_WORDS[COMP_CWORD-2]}"; fi
  if [ "$COMP_CWORD" -eq 1 ]; then option="dmpo-lightning"; fi
  case "$option" in
%(values)s
    *) case "${COMP_WORDS[1]}" in
%(options)s
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  case "$current" in
    -*) ;;
    *) [ "$COMP_CWORD" -eq 1 ] || COMPREPLY+=($(compgen -f -- "$current")) ;;
  esac
}
complete -o bashdefault -o default -F _dmpo_lightning dmpo-lightning
"""
ZSH = """\
#compdef dmpo-lightning
(( $+functions[compdef] )) || { autoload -U +X compinit && compinit -u; }
autoload -U +X bashcompinit && bashcompinit
"""


def run(arguments: Sequence[str]) -> None:
    """Prints the script."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("dmpo-lightning completion", description=DESCRIPTION, formatter_class=formatter)
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
    options = {name: _options(name) for name in LIGHT if name != "completion"} | {"fit|validate|test|predict": runs}
    # Of plan all options of a run are options too.
    options["plan"] += runs
    options["generate"] += ["--sampler", *_arguments("sampler", "dmpo_lightning.ConfidenceSampler")]
    values = {
        "dmpo-lightning": " ".join([*COMMANDS, "--help", "--version"]),
        "--config": " ".join(shipped_configs()),
        "--model|--model.model": " ".join(EMBEDDED_MODELS),
        "--ckpt_path": "last",
        "--check": "published verified",
        "--task": "gsm8k math500 countdown sudoku",
        "completion": "bash zsh",
    }
    parts = {"values": values, "options": {name: " ".join(each) for name, each in options.items()}}
    cases = {name: "\n".join(f'    {key}) words="{each}" ;;' for key, each in parts[name].items()) for name in parts}
    return (ZSH if shell == "zsh" else "") + FUNCTION % cases


def _options(command: str) -> list[str]:
    """The options of a light command, as its parser states them."""
    parser = import_module(f"dmpo_lightning.commands.{command}").make_parser()
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


def _arguments(prefix: str, path: str) -> list[str]:
    """Options of the arguments of a class. Data differ from task to task, and have none here."""
    return [f"--{prefix}.{each}" for each in inspect.signature(resolve_name(path)).parameters]
