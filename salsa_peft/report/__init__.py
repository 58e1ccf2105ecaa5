"""A finished run as a page, as figures, and on the Hub."""
