"""``python -m rae_xla.cloud.checked RECIPE TOOL ARGUMENT...``: looks whether what a recipe reads is there, runs a tool.

The tool replaces this process, which has not touched the chips.
"""

from __future__ import annotations

import os
import sys

from rae_xla.errors import StoppedError, UserError


def main() -> None:
    """Exits with 2 and one line if something is missing."""
    recipe_file, *command = sys.argv[1:]
    from rae_xla.recipe import check_inputs, load_recipe

    try:
        check_inputs(load_recipe(recipe_file, []))
    except (StoppedError, UserError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main()
