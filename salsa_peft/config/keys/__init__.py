"""The recipe's keys: unknown ones, their lines in a file, and their description for `salsa docs`."""
