"""litgpt pretrains a tiny model, as a user of Lightning Fabric writes it: nothing here knows nucleate.

`python -m nucleate.compat.fabric litgpt_job.py FOLDER --devices 2` runs it.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from tokenizers import Tokenizer as Trained
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader

LINES = [f"{first} and {second} are {first + second}." for first in range(12) for second in range(12)]
CONFIG = {
    "name": "tiny",
    "block_size": 64,
    "padded_vocab_size": 512,
    "vocab_size": 512,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 64,
}


class Sums(DataModule):
    """Windows of the tokenized lines."""

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.tokenizer, self.batch_size, self.length = tokenizer, batch_size, max_seq_length + 1

    def setup(self, stage=""):
        tokens = self.tokenizer.encode("\n".join(LINES)).long()
        self.windows = list(tokens.unfold(0, self.length, 8))

    def train_dataloader(self):
        return DataLoader(self.windows, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.windows[:8], batch_size=self.batch_size)


def make_files(folder: Path) -> None:
    """Write a tokenizer, and questions and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Trained(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    pairs = [{"instruction": line.split(" are ")[0], "input": "", "output": line.split(" are ")[1]} for line in LINES]
    (folder / "pairs.json").write_text(json.dumps(pairs))


def pretrain(folder: Path, devices: int, resume: bool) -> None:
    from litgpt.pretrain import setup

    if not resume:
        make_files(folder / "tokenizer")
    setup(
        "tiny",
        model_config=Config(**CONFIG),
        out_dir=folder / "pretrained",
        precision="32-true",
        data=Sums(),
        train=TrainArgs(
            max_tokens=6000 if resume else 4000,
            save_interval=5,
            log_interval=1,
            global_batch_size=8,
            micro_batch_size=2,
            lr_warmup_steps=1,
            max_seq_length=32,
            max_norm=1.0,
            min_lr=1e-4,
        ),
        eval=EvalArgs(interval=5, max_iters=2),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        devices=devices,
        tokenizer_dir=folder / "tokenizer",
        logger_name="csv",
        resume=resume,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    # litgpt reads its own options from the command line when it saves them.
    sys.argv[1:] = ["tiny"]
    pretrain(chosen.folder, chosen.devices, chosen.resume)


if __name__ == "__main__":
    main()
