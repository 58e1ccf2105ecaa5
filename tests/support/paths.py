"""Folders that tests use."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
TEMPLATES = ROOT / "recipes" / "chat_templates"
SHARED = ROOT.parent / "shared"
"""Real data beside a developer's checkout; a test that uses it skips where it is missing."""
