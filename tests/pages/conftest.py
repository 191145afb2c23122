"""One Chromium for all tests of pages, and one tiny pretrained encoder and classifier."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.finetune.conftest import finetuned, finetuning, pretrained
from tests.pages.chromium import chromium

__all__ = ["finetuned", "finetuning", "pretrained"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory) -> Path:
    """The folder of all screenshots; it stays until pytest clears its older ones."""
    return tmp_path_factory.mktemp("screenshots")
