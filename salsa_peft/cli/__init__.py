"""The command `salsa` and its subcommands."""
