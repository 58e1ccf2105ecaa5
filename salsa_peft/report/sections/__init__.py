"""Sections of the report that have a module of their own."""
