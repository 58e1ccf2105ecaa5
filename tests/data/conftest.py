"""The tests of data leave nothing in the cache of datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """datasets leaves its Arrow files in the test's folder."""
    import datasets as hf_datasets

    monkeypatch.setattr(hf_datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hf_datasets.disable_progress_bars()
    yield
    hf_datasets.enable_progress_bars()
