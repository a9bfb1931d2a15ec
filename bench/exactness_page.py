"""``docs/reproducibility.md``, the measured part."""

from typing import Any

from bench.results import Results
from bench.sections import table


def page(results: Results) -> str:
    """The section."""
    packages = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    note = f"\n\n{results.note}" if results.note else ""
    parts = [
        "## Measured\n\n"
        f"{results.date}, {results.machine.text}; {packages}. {results.settings['images']} images "
        f"of {results.settings['steps']} steps, each drawn alone, then in passes shared with other "
        "images from the first step to the last. PSNR in dB against the image drawn alone; the "
        "largest difference is of one colour value, 0 to 255. Made by "
        f"`python -m bench.exactness`.{note}"
    ]
    parts += [_dtype(figures) for figures in results.figures["dtypes"]]
    return "\n\n".join(parts)


def _dtype(figures: dict[str, Any]) -> str:
    rows = [[str(each["images"]), *_cells(each)] for each in figures["widths"]]
    rows.append(["alone once more", *_cells(figures["again"])])
    rows.append([f"`exact`, among {figures['others']} others", *_cells(figures["exact"])])
    heads = ["images in each pass", "identical", "PSNR, median", "lowest", "largest difference"]
    return f"### {figures['dtype']}\n\n{table(heads, rows)}"


def _cells(figure: dict[str, Any]) -> list[str]:
    ratios = ["∞" if figure[k] is None else f"{figure[k]:.1f}" for k in ("median", "lowest")]
    return [f"{figure['identical']:.0%}", *ratios, str(figure["largest_difference"])]
