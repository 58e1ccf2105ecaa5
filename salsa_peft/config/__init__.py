"""The recipe's schema, how it is read, and what is checked in it. Imports no torch."""
