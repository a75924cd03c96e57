"""The twenty lines of the README, run as they are there."""

import re
from pathlib import Path

import torch

# Samplers draw on the CPU.
torch.set_default_device("cpu")
page = (Path(__file__).parents[3] / "README.md").read_text()
blocks = re.findall(r"```python\n(.*?)```", page.split("## Twenty lines")[1], re.DOTALL)
exec(blocks[0])
