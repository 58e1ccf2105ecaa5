"""`python -m salsa_peft.recipe` is `salsa run`."""

import sys

from salsa_peft.recipe.run import main

if __name__ == "__main__":
    sys.exit(main())
