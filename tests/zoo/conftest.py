"""Zoo tests need packages that the core may not need; where they are missing, each test says so."""

import importlib.util

import pytest

PACKAGES = ("timm", "torchvision")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def pytest_collection_modifyitems(items):
    for item in items:
        if "zoo" in item.path.parts:
            item.add_marker(pytest.mark.zoo)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=f"{' and '.join(MISSING)} not installed here: make test-zoo runs it"))
