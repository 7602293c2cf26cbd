"""Eight fake CPU devices, strict ranks, and a persistent cache of compiled programs, for all tests."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "jaxdiff-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is what tests cost

import jax
import pytest

from tests.tiny import tiny_config

jax.config.update("jax_numpy_rank_promotion", "raise")


SLOW = ("test_distributed.py", "test_main.py", "test_resume.py", "test_adversarial.py", "test_ladder.py")


def pytest_collection_modifyitems(items):
    """The slowest files first, so that neither process is left with one of them at the end."""
    rank = {name: k for k, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.name, len(SLOW)))


@pytest.fixture(scope="session")
def tiny():
    """`tiny_config`, by name of the experiment."""
    return tiny_config


@pytest.fixture(scope="module")
def optimized():
    """Programs compiled as users have them: for tests that run them longer than they compile them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
