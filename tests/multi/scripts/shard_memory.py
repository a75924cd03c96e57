"""On 2 ranks, setting up an FSDP model takes this rank's half and less than one whole parameter more."""

import threading
import time

from torch import nn

from nucleate import Runtime

MIB = 2**20
PARAMETER = 16 * MIB
NUM_LAYERS = 10


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def build(num_layers: int) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(num_layers)))
    for layer in model:
        nn.init.normal_(layer.weight)  # once more, as many libraries do
    return model


runtime = Runtime(accelerator="cpu", strategy="fsdp")
with runtime.init_module():
    warm = build(2)
runtime.setup(warm)

base = peak = anonymous_bytes()
done = threading.Event()


def watch() -> None:
    global peak
    while not done.is_set():
        peak = max(peak, anonymous_bytes())
        time.sleep(0.0005)


watcher = threading.Thread(target=watch)
watcher.start()
with runtime.init_module():
    model = build(NUM_LAYERS)
runtime.setup(model)
done.set()
watcher.join()
half = NUM_LAYERS * PARAMETER // 2
assert sum(p.to_local().untyped_storage().nbytes() for p in model.parameters()) == half
assert peak - base < half + 12 * MIB < half + PARAMETER, f"{(peak - base) / MIB:.0f} MiB for {half / MIB:.0f}"
print(f"rank {runtime.global_rank}: {(peak - base) / MIB:.0f} MiB of {half / MIB:.0f}")
