"""The page on configuration: ``python -m darkroom_server.settings.document`` prints it."""

from darkroom_server.settings.option import ENV_PREFIX, Option, options_of
from darkroom_server.settings.tree import Settings

HEAD = f"""# Configuration

<!-- Made by `python -m darkroom_server.settings.document`; a test holds it current. -->

Each setting of `darkroom-server serve` can be given as a flag, as an environment variable
(`{ENV_PREFIX}…`) or in a TOML file, which `--config FILE` or `{ENV_PREFIX}CONFIG` names.
A flag wins over the environment, the environment over the file, the file over the default. Unknown
flags and keys are errors; an unknown `{ENV_PREFIX}…` variable is a warning. The token for the hub
comes from `HF_TOKEN` and from nowhere else.

A switch such as `--reflection` is turned off by `--no-reflection`, or by `false` elsewhere.

```toml
[models]
model = ["sd15=/models/stable-diffusion-v1-5"]

[network]
host = "0.0.0.0"
```
"""


def document() -> str:
    """The page, as Markdown."""
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
