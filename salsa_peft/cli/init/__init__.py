"""`salsa init`: a commented recipe for the user's model and data, filled in by looking at the files."""
