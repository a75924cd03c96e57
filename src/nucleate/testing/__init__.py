"""Test tools for plugins: a suite for each kind of plugin, tiny models, and an assertion on peak memory.

A plugin's test class inherits the suite of its kind and builds the plugin; pytest collects the suite's tests:

```python
class TestMyStrategy(StrategySuite):
    def make_strategy(self) -> Strategy:
        return MyStrategy()
```

The suites also run under torchrun, one pytest per rank. This is the way to test a strategy that spans processes.
The package needs pytest: `pip install nucleate[testing]`.
"""

from nucleate.errors import MissingDependencyError

try:
    import pytest
except ImportError as error:
    raise MissingDependencyError(
        "nucleate.testing needs pytest, which is not installed. Install it with `pip install nucleate[testing]`."
    ) from error

# Before the suites are imported: their plain asserts then show the values, as in a test file.
pytest.register_assert_rewrite(
    "nucleate.testing.accelerator",
    "nucleate.testing.beside_eager",
    "nucleate.testing.dimension",
    "nucleate.testing.integration",
    "nucleate.testing.precision",
    "nucleate.testing.reader",
    "nucleate.testing.strategy",
    "nucleate.testing.writer",
)

from nucleate.testing.accelerator import AcceleratorSuite  # noqa: E402
from nucleate.testing.dimension import DimensionSuite  # noqa: E402
from nucleate.testing.integration import IntegrationSuite  # noqa: E402
from nucleate.testing.memory import PeakMemory, assert_peak_memory_below, peak_memory  # noqa: E402
from nucleate.testing.models import (  # noqa: E402
    MODELS,
    TinyConvNet,
    TinyGPT,
    TinyModel,
    TinyOdd,
    TinyRecurrent,
    TinyTransformer,
)
from nucleate.testing.precision import PrecisionSuite  # noqa: E402
from nucleate.testing.reader import ReaderSuite  # noqa: E402
from nucleate.testing.strategy import StrategySuite  # noqa: E402
from nucleate.testing.writer import WriterSuite  # noqa: E402

__all__ = [
    "MODELS",
    "AcceleratorSuite",
    "DimensionSuite",
    "IntegrationSuite",
    "PeakMemory",
    "PrecisionSuite",
    "ReaderSuite",
    "StrategySuite",
    "TinyConvNet",
    "TinyGPT",
    "TinyModel",
    "TinyOdd",
    "TinyRecurrent",
    "TinyTransformer",
    "WriterSuite",
    "assert_peak_memory_below",
    "peak_memory",
]
