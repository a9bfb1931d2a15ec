"""Scripts that complete the commands and flags of ``darkroom`` in a shell."""

import argparse
from collections.abc import Mapping

from darkroom_client.cli._flags import flags_of

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_darkroom() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
    local command="" index words=""
    for ((index = 1; index < COMP_CWORD; index++)); do
        case ${{COMP_WORDS[index]}} in
            {commands}) command=${{COMP_WORDS[index]}}; break ;;
        esac
    done
    case $previous in
{values}
    esac
    case $command in
        "") words="{names} --help --version" ;;
{flags}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _darkroom darkroom
"""


def script(shell: str, commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """The script for ``shell``: evaluate it in the shell's start-up file."""
    if shell == "fish":
        return _fish(commands)
    text = _bash(commands)
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _bash(commands: Mapping[str, argparse.ArgumentParser]) -> str:
    flags, values = [], {}
    for name, parser in commands.items():
        known = flags_of(parser)
        flags.append(f'        {name}) words="{" ".join(known)}" ;;')
        values.update({flag: _choices(each) for flag, each in known.items() if _choices(each)})
    cases = [
        f'        {flag}) COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$current")); return ;;'
        for flag, words in sorted(values.items())
    ]
    return _BASH.format(
        commands="|".join(commands),
        names=" ".join(commands),
        flags="\n".join(flags),
        values="\n".join(cases),
    )


def _fish(commands: Mapping[str, argparse.ArgumentParser]) -> str:
    lines = []
    for name, parser in commands.items():
        about = (parser.description or "").replace("'", "\\'")
        lines.append(f"complete -c darkroom -n __fish_use_subcommand -f -a {name} -d '{about}'")
        for flag, action in flags_of(parser).items():
            line = f"complete -c darkroom -n '__fish_seen_subcommand_from {name}' -l {flag[2:]}"
            if words := _choices(action):
                line += f" -x -a '{' '.join(words)}'"
            elif action.nargs != 0:
                line += " -r"
            lines.append(line)
    return "\n".join(lines) + "\n"


def _choices(action: argparse.Action) -> list[str]:
    return [str(choice) for choice in action.choices or ()]
