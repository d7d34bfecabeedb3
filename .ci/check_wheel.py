"""Check an installed `modeling_looped` against its sources: run by `make wheel-test`, outside the checkout.

    python -I check_wheel.py CHECKOUT

A file that `setup.py` forgets is missing only once the package is installed: tests in the checkout never see it.
"""

import importlib
import pkgutil
import sys
from pathlib import Path

import modeling_looped


def main(checkout: Path) -> None:
    """Raise if the installed package is the checkout's, lacks one of its files, or has an unimportable module."""
    installed = Path(modeling_looped.__file__).parent
    if installed.is_relative_to(checkout / "modeling_looped"):
        raise RuntimeError(f"imported the checkout ({installed}), not the installed wheel")

    sources = checkout / "modeling_looped"
    files = [path.relative_to(sources) for path in sources.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    missing = [str(path) for path in files if not (installed / path).is_file()]
    if missing:
        raise RuntimeError(f"not in the wheel (see setup.py): {', '.join(sorted(missing))}")

    modules = [module.name for module in pkgutil.walk_packages(modeling_looped.__path__, prefix="modeling_looped.")]
    for module in modules:
        if not module.endswith(".__main__"):  # importing a program's entry point would run it
            importlib.import_module(module)
    print(f"wheel: {len(files)} files, {len(modules)} modules, imported from {installed}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
