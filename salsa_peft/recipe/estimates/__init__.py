"""Estimates of the disk space and of the hours that a run needs. Imports no torch."""
