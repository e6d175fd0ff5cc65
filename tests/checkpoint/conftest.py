"""The fixture of an uninterrupted run, shared with the tests of the training loop."""

from tests.train.conftest import whole

__all__ = ["whole"]
