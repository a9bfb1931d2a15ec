"""Prints docs/configuration.md: ``python -m darkroom_server.settings.document``."""

from darkroom_server.settings.option import ENV_PREFIX, Option, options_of
from darkroom_server.settings.tree import Settings

HEAD = f"""# Configuration

<!-- Made by `python -m darkroom_server.settings.document`; a test checks that it is current. -->

Set each option of `darkroom-server serve` by a flag, by an environment variable (`{ENV_PREFIX}…`)
or in a TOML file, which `--config FILE` or `{ENV_PREFIX}CONFIG` names. A flag overrides the
environment, the environment overrides the file, and the file overrides the default. Unknown flags
and keys are errors; an unknown `{ENV_PREFIX}…` variable is a warning. The token for the hub comes
only from `HF_TOKEN`.

`darkroom-server serve --print-config` prints the settings in effect as such a file, with the source
of each and without secrets. `serve --check` checks them, the ports and the state folder, loads the
models, and exits with 0 if all is well, with 1 if not, and with 2 if a setting is invalid.

`--no-reflection` turns off a switch such as `--reflection`; in the environment and in the file,
`false` does.

```toml
[models]
model = ["sd15=/models/stable-diffusion-v1-5"]

[network]
host = "0.0.0.0"
```
"""


def document() -> str:
    """Return the page as Markdown."""
    lines = [HEAD]
    section = ""
    for option in options_of(Settings):
        if option.section != section:
            section = option.section
            lines.append(f"## {section}\n")
        lines.append(_entry(option))
    return "\n".join(lines)


def _entry(option: Option) -> str:
    setting = option.setting
    value = "" if option.is_switch else f" {setting.metavar or '|'.join(option.choices)}"
    default = setting.default or f"`{option.default_text}`"
    text = f"{setting.help} {setting.choose}".rstrip()
    return (
        f"### `{option.flag}{value}`\n\n{text}\n\n"
        f"Default: {default} · `{option.env}` · `{option.key}`\n"
    )


if __name__ == "__main__":
    print(document(), end="")
