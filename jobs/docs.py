"""`make docs`: rewrite the pages that are made from the code."""

from pathlib import Path

from pipeline import config


def main() -> None:
    """Write docs/configuration.md."""
    Path("docs/configuration.md").write_text(config.reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
