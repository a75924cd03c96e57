"""What a plugin's own tests start from: a conformance suite per kind, tiny models, a peak-memory assertion.

A plugin's test class inherits the suite of its kind and says how the plugin is built; pytest collects the rest:

```python
class TestMyStrategy(StrategySuite):
    def make_strategy(self) -> Strategy:
        return MyStrategy()
```

The suites also run under torchrun, one pytest per rank, which is how a strategy that spans processes is tested.
Needs pytest: `pip install nucleate[testing]`.
"""

from nucleate.errors import MissingDependencyError

try:
    import pytest
except ImportError as error:
    raise MissingDependencyError(
        "nucleate.testing needs pytest, which is not installed. Install it with `pip install nucleate[testing]`."
    ) from error

# Before the suites are imported: their plain asserts then say what the values were, as in a test file.
pytest.register_assert_rewrite(
    "nucleate.testing.accelerator",
    "nucleate.testing.integration",
    "nucleate.testing.precision",
    "nucleate.testing.reader",
    "nucleate.testing.strategy",
    "nucleate.testing.writer",
)

from nucleate.testing.accelerator import AcceleratorSuite  # noqa: E402
from nucleate.testing.integration import IntegrationSuite  # noqa: E402
from nucleate.testing.memory import PeakMemory, assert_peak_memory_below, peak_memory  # noqa: E402
from nucleate.testing.models import MODELS, TinyConvNet, TinyModel, TinyOdd, TinyRecurrent, TinyTransformer  # noqa: E402
from nucleate.testing.precision import PrecisionSuite  # noqa: E402
from nucleate.testing.reader import ReaderSuite  # noqa: E402
from nucleate.testing.strategy import StrategySuite  # noqa: E402
from nucleate.testing.writer import WriterSuite  # noqa: E402

__all__ = [
    "MODELS",
    "AcceleratorSuite",
    "IntegrationSuite",
    "PeakMemory",
    "PrecisionSuite",
    "ReaderSuite",
    "StrategySuite",
    "TinyConvNet",
    "TinyModel",
    "TinyOdd",
    "TinyRecurrent",
    "TinyTransformer",
    "WriterSuite",
    "assert_peak_memory_below",
    "peak_memory",
]
