"""The options of a recipe's sections, one file for each kind."""
