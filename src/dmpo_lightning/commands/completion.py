"""``dmpo-lightning completion``: a script by which bash or zsh completes commands, options, values and names."""

from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files

from dmpo_lightning.commands.arguments import COMMANDS, LIGHT, CommandParser, shipped_configs
from dmpo_lightning.commands.signatures import ROOTS, TRAINER, options_of, places

DESCRIPTION = """\
Print a script that completes commands, options, values and names in bash or zsh. It is fixed text, so that no key press
waits for Python; print it again after an upgrade.

  source <(dmpo-lightning completion bash)     in ~/.bashrc, or once: dmpo-lightning completion bash > FILE
  source <(dmpo-lightning completion zsh)      in ~/.zshrc
"""
RUN_OPTIONS = (*ROOTS, "config", "ckpt_path", "print_config", "trust_checkpoint", "help", "debug")
FILES = "FILES"
CHOICES = """\
  local names="" files=""
  option="${option%%+}"
  case "$option" in
%(values)s
    *) files=1; case "$command" in
%(options)s
    esac ;;
  esac
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
PARSER = CommandParser("completion", DESCRIPTION)
PARSER.add_argument("shell", choices=("bash", "zsh"))


def run(arguments: Sequence[str]) -> None:
    """Prints the script."""
    print(script(PARSER.parse_args(arguments).shell), end="")


def script(shell: str) -> str:
    """The completion script of a shell, see `DESCRIPTION`."""
    own = {name: import_module(f"dmpo_lightning.commands.{name}").PARSER.names for name in LIGHT}
    runs: dict[str, Sequence[str]] = {name: ROOTS[name].names if name in ROOTS else () for name in RUN_OPTIONS}
    for place, _, options in places(options_of(TRAINER) or {}):
        for name, option in options.items():
            # What any class at the place takes, since the line may not say yet which one it is.
            known = runs.get(f"{place}.{name}", ())
            runs[f"{place}.{name}"] = tuple(dict.fromkeys([*known, *option.names]))
    sampler = {name.removeprefix("model."): each for name, each in runs.items() if name.startswith("model.sampler")}
    own |= {"generate": own["generate"] | sampler, "plan": own["plan"] | runs, "fit|validate|test|predict": runs}
    values = {f"--{name}": each for group in own.values() for name, each in group.items() if each}
    models = sorted(each.name for each in (files("dmpo_lightning") / "assets").iterdir())
    values |= {
        "dmpo-lightning": (*COMMANDS, "--help", "--version"),
        "--cat": shipped_configs(),
        "completion": ("bash", "zsh"),
        "--task": ("gsm8k", "math500", "countdown", "sudoku"),
        # Where a file may stand too.
        "--config": (*shipped_configs(), FILES),
        "--model": (*models, *values["--model"], FILES),
        "--model.model": (*models, FILES),
        "--ckpt_path": ("last", FILES),
    }
    choices = CHOICES % {
        "values": "\n".join(f'    {key}) names="{" ".join(each)}" ;;' for key, each in values.items()),
        "options": "\n".join(f'    {key}) names="--{" --".join(each)}" ;;' for key, each in own.items()),
    }
    # A name that stands for files is said to the shell by itself.
    choices = choices.replace(f' {FILES}" ;;', '"; files=1 ;;')
    return (ZSH if shell == "zsh" else BASH) % {"choices": choices}
