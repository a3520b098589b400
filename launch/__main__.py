"""The list of commands: `python -m launch`."""

import ast
from pathlib import Path


def main() -> None:
    """Print every verb with the first line of its module's docstring."""
    print("Commands (each answers --help):\n")
    for file in sorted(Path(__file__).parent.glob("*.py")):
        source = file.read_text()
        if '__name__ == "__main__"' not in source or file.name == "__main__.py":
            continue
        first = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
        print(f"  python -m launch.{file.stem:<18} {first}")
    print(f"  python -m {'conversion':<25} Convert checkpoints between PyTorch layouts and ours.")


if __name__ == "__main__":
    main()
