"""On 2 ranks: transformers' `Trainer` and Accelerate wrap deferred models in DDP. Argument: a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nucleate.deferred import deferred
from nucleate.errors import DeferredUseError
from nucleate.materialize import materialize
from tests.integrations.trained import assert_same, by_accelerate, by_trainer, llama


def main() -> None:
    for train in (by_accelerate, by_trainer):
        expected = train(llama(), Path(sys.argv[1]))
        with deferred():
            model = llama()
        with pytest.raises(DeferredUseError, match=r"DistributedDataParallel cannot work .*materialize\(model\)"):
            train(model, Path(sys.argv[1]))
        assert_same(train(materialize(model), Path(sys.argv[1])), expected)
        print(f"{train.__name__}: kept", flush=True)


if __name__ == "__main__":
    main()
