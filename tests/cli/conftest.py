"""The tests of the commands run in a folder of their own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere: None) -> None:
    """Keep the tests out of the checkout and of the person's own cache."""
