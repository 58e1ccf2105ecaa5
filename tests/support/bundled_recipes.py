"""The bundled recipes that can be read here: those whose functions import a package that is missing are left out."""

from __future__ import annotations

import importlib.util

from salsa_peft.config.load import bundled_names

NEEDED = {"stories": "textblob", "sentiment": "textblob", "studies/stories": "textblob", "rewarded_soups": "textblob"}
"""Recipe → the package that its functions import; pip installs it with the extra `test`."""
RECIPES = [name for name in bundled_names("recipes") if name not in NEEDED or importlib.util.find_spec(NEEDED[name])]
