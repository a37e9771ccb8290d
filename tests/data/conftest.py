import sys

import pytest


@pytest.fixture
def no_tensorflow(monkeypatch):
    """TensorFlow cannot be found, installed or not."""

    class Hides:
        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, name, path=None, target=None):
            hidden = name.partition(".")[0] == "tensorflow"
            return None if hidden else self.finder.find_spec(name, path, target)

    assert "tensorflow" not in sys.modules
    monkeypatch.setattr(sys, "meta_path", [Hides(finder) for finder in sys.meta_path])
    yield
    assert "tensorflow" not in sys.modules
