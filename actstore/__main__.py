"""The installed `actstore` command, and `python -m actstore`."""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Start `cli`, after checking that `cli` and `pipelines` are the ones installed beside this package."""
    home = Path(__file__).resolve().parent.parent
    for name, inside in (("cli", "cli.py"), ("pipelines", "pipelines/__init__.py")):
        spec = importlib.util.find_spec(name)
        resolved = Path(spec.origin).resolve() if spec and spec.origin else None
        if resolved != home / inside:
            sys.exit(
                f"error: `{name}` resolves to {resolved}, not to {home / inside}: another distribution shadows it; "
                "install actstore in an environment of its own."
            )
    from cli import cli

    cli()


if __name__ == "__main__":
    main()
