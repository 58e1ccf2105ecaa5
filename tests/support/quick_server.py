"""A fixture for tests whose recipes have fake stages."""

from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from salsa_peft.recipe import processes


@pytest.fixture(autouse=True, scope="module")
def quick_server() -> Iterator[None]:
    """A fork server without the heavy imports, gone afterwards."""
    forkserver._forkserver._stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "PRELOAD", ["pytest", "fake_stages"])
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        yield
    forkserver._forkserver._stop()
