"""Write every dashboard to ``deploy/grafana/dashboards``."""

from tools.dashboards.files import FOLDER, files


def main() -> None:
    """Write them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"deploy/grafana/dashboards/{name}")


if __name__ == "__main__":
    main()
