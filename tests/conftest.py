"""Shared by all tests."""

import os
import sys

# before anything imports torch: one thread per test process
os.environ.setdefault("OMP_NUM_THREADS", "1")
if sys.platform == "linux":
    # gloo looks the host's name up otherwise, and waits as long as a name server lets it
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

from pathlib import Path

import pytest
from hypothesis import settings

# examples have no time limit: on a busy machine the first one would break any
settings.register_profile("edgekd", deadline=None)
settings.load_profile("edgekd")


@pytest.fixture(scope="session", autouse=True)
def _own_image_cache(tmp_path_factory):
    """Tests neither read nor fill the user's cache of decoded images."""
    before = os.environ.get("EDGEKD_CACHE")
    os.environ["EDGEKD_CACHE"] = str(tmp_path_factory.mktemp("edgekd-cache"))
    yield
    if before is None:
        del os.environ["EDGEKD_CACHE"]
    else:
        os.environ["EDGEKD_CACHE"] = before


@pytest.fixture(scope="session")
def data_root():
    """$EDGEKD_DATA, the folder of real data sets."""
    value = os.environ.get("EDGEKD_DATA")
    if not value:
        pytest.skip("EDGEKD_DATA is not set")
    if not Path(value).is_dir():
        pytest.skip(f"EDGEKD_DATA is {value}, which is no folder")
    return Path(value)
