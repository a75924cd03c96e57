"""The class `Runtime`: its arguments, how they become parts, and how a runtime travels to another process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakSet

from nucleate.accelerators.base import Accelerator
from nucleate.callbacks import Callbacks
from nucleate.cluster import started_rank
from nucleate.cluster.communicator import Communicator
from nucleate.cluster.device_request import DeviceRequest
from nucleate.cluster.environment import Environment
from nucleate.composition import Components, choose_loggers
from nucleate.errors import ConfigurationError
from nucleate.integrations.active import Integrations
from nucleate.optimizer_setup import OptimizerSetup
from nucleate.plugin_choices import PluginChoices, PluginInput
from nucleate.precision.base import Precision
from nucleate.runtime.building import Building
from nucleate.runtime.checkpoints import Checkpoints
from nucleate.runtime.logs import Logs
from nucleate.runtime.ranks import Ranks
from nucleate.runtime.training import Training
from nucleate.seed import seed_everything
from nucleate.strategies.base import Strategy
from nucleate.wrappers.accumulation import Accumulation
from nucleate.wrappers.deliveries import Deliveries
from nucleate.wrappers.free_parameters import FreeParameters
from nucleate.wrappers.running import launched_first
from nucleate.wrappers.termination import Termination


class Runtime(Building, Training, Ranks, Logs, Checkpoints):
    """The builder, loader and launcher of models on one accelerator, precision and strategy.

    Args:
        accelerator: `"auto"` (torch's current accelerator, an installed plugin whose device is there, or the CPU),
            `"gpu"` (the same without the CPU), `"cpu"`, `"cuda"`, torch's name of any other kind of device, the name of
            an installed plugin, or an `Accelerator`. None is `"auto"`. Names may be in upper case.
        strategy: `"auto"` (DDP in several processes, else a single device), `"single_device"`, `"ddp"`, `"fsdp"`,
            the name of an installed plugin, or a `Strategy`. None is `"auto"`. Names may be in upper case.
        devices: The number of processes on each node. `"auto"` and None accept the number that a launcher such as
            torchrun started, and mean one process without a launcher. -1 means one process on each device; processes
            share the CPU, so there -1 means one. `[0, 2]` and `"0,2"` name the device of each process. If several are
            asked for and no launcher has started them, `launch` starts them.
        num_nodes: The number of nodes that the run must have. Several nodes need torchrun.
        precision: None, the default, casts nothing: parameters, buffers, inputs and outputs keep the dtypes that the
            constructor and the user chose. `"32-true"`, `"64-true"`, `"bf16-true"`, `"16-true"`, `"bf16-mixed"`,
            `"16-mixed"`, the name of an installed plugin, or a `Precision` casts as its page says.
        plugins: One plugin or several: a `Precision`, an `Environment` that takes the place of the launcher's
            variables, readers and writers of checkpoints, and integrations or their names, which know how another
            library makes its models. Without an integration in the list, every installed one is active whose library
            is imported when a model is constructed. A list with integrations names all that are active, beside those
            of nucleate itself.
        callbacks: One callback or several: any objects, whose methods `call` calls, or names of installed callbacks.
        loggers: Where `log` and `log_dict` write, on rank 0: a logger or a list of them. A logger is `"csv"`,
            `"tensorboard"`, `"wandb"`, `"mlflow"`, the name of an installed plugin, a `nucleate.loggers.Logger`, or any
            object with a method `log_metrics(metrics, step)`, such as a logger of Lightning Fabric.
        verify: Whether `setup` makes parameters and buffers a second time, sequentially and whole, and compares them
            bit for bit with the tensors that it installed on this rank. `setup` then also compares every element that
            several ranks hold. True takes a sample of all kinds of recipes, of at most 2**24 elements. `"all"` takes
            everything. `docs/concepts/exactness.md` describes the costs.
        max_restarts: How often all processes start again after a failure, if this runtime starts them because of
            `devices`. Under a launcher it has no effect: the launcher counts its own restarts. The script or function
            begins anew, and loads its last checkpoint.
        on_sigterm: The reaction to SIGTERM, which schedulers send before they end a job. `"save"` repeats the last
            `save` after the present optimizer step, on all ranks, and ends them with the exit code 143. A function is
            called there instead, with the runtime as its argument. None leaves the signal alone. See
            `docs/how-to/restarts.md`.

    Raises:
        PluginNotFoundError: No plugin of that kind has that name.
        ConfigurationError: The plugins do not fit each other, the machine or the launched processes.

    Example:
        >>> import torch
        >>> from nucleate import Runtime
        >>> runtime = Runtime(accelerator="cpu")
        >>> with runtime.init_module(empty_init=True):
        ...     model = torch.nn.Linear(4, 2)
        >>> model = runtime.setup(model)
        >>> model(torch.ones(1, 4)).shape
        torch.Size([1, 2])
    """

    _renewed: frozenset[str] = frozenset()

    def __init__(  # noqa: PLR0913 - the arguments that Lightning Fabric has too
        self,
        *,
        accelerator: str | Accelerator | None = "auto",
        strategy: str | Strategy | None = "auto",
        devices: int | str | Sequence[int] | None = "auto",
        num_nodes: int = 1,
        precision: str | int | Precision | None = None,
        plugins: PluginInput | Iterable[PluginInput] | None = None,
        callbacks: object = None,
        loggers: Any = None,
        verify: bool | str = False,
        max_restarts: int = 0,
        on_sigterm: str | Callable[[Any], Any] | None = None,
    ) -> None:
        # All arguments, for `_renew`.
        self._settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        kept = set(vars(self)) - self._renewed
        if not isinstance(verify, bool) and verify != "all":
            raise ConfigurationError(f"verify={verify!r} must be False, True (a sample) or 'all'.")
        self._verify = verify
        self._plugins = choices = PluginChoices.of(plugins, precision)
        self._callbacks = Callbacks.of(callbacks)
        self._deliveries = Deliveries()
        self._termination = Termination(on_sigterm, self._deliveries)
        request = DeviceRequest.parse(devices, num_nodes, max_restarts)
        environment = choices.environment or Environment.detect()
        self._parts = parts = Components.choose(accelerator, choices.precision, strategy, environment, request)
        environment = parts.environment
        started_rank.join()
        self._accelerator, self._precision, self._strategy = parts.accelerator, parts.precision, parts.strategy
        self._environment, self._device = environment, parts.device
        self._communicator = Communicator(environment, parts.device)
        self._free = FreeParameters(self._communicator)
        self._integrations = Integrations(choices.integrations, parts.shown)
        self._loggers = choose_loggers(loggers, self.is_global_zero)
        self._launched = False
        self._models = WeakSet()
        self._accumulation = Accumulation(self._deliveries, self._models)
        self._optimizer_setup = OptimizerSetup(
            parts,
            self._communicator,
            self._models,
            self._accumulation,
            self._free,
            self._callbacks,
            self._termination,
        )
        # `_renew` makes these again.
        self._renewed = frozenset(vars(self)) - kept

    def __repr__(self) -> str:
        return f"Runtime({self._parts})"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing, unless a subclass of `Runtime` has a method `run` of its own.

        A call of that method first does what `launch` does: it is `runtime.launch(method, *args, **kwargs)`.

        Args:
            args: The arguments that the subclass chooses.
            kwargs: The keyword arguments that the subclass chooses.
        """

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed Python, NumPy (if it is installed) and torch; see `nucleate.seed.seed_everything`."""
        return seed_everything(seed, workers, verbose)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if callable(run := vars(cls).get("run")):
            cls.run = launched_first(run)  # type: ignore[method-assign]

    def _renew(self) -> None:
        Runtime.__init__(self, **self._settings)

    def __getstate__(self) -> dict[str, Any]:
        # Only the arguments, and the attributes of a subclass. `_renew` makes the others.
        return {name: value for name, value in vars(self).items() if name not in self._renewed}
