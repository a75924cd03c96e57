"""Programs of litgpt with a tiny model, as a user writes them for Lightning Fabric: nothing here knows nucleate.

`python -m nucleate.compat.fabric litgpt_job.py pretrain FOLDER --devices 2` runs one.
"""

import argparse
import json
from pathlib import Path

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import JSON, DataModule
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


def train_args(**changes) -> TrainArgs:
    return TrainArgs(
        **{
            "save_interval": None,
            "log_interval": 1,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "lr_warmup_steps": 1,
            "max_seq_length": 32,
            **changes,
        }
    )


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
        train=train_args(max_tokens=6000 if resume else 4000, save_interval=5, max_norm=1.0, min_lr=1e-4),
        eval=EvalArgs(interval=5, max_iters=2),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        devices=devices,
        tokenizer_dir=folder / "tokenizer",
        logger_name="csv",
        resume=resume,
    )


def finetune(folder: Path, devices: int, way: str) -> None:
    if way == "full":
        from litgpt.finetune.full import setup
    elif way == "lora":
        from litgpt.finetune.lora import setup
    else:
        from litgpt.finetune.lora_legacy import setup
    setup(
        checkpoint_dir=folder / "base",
        out_dir=folder / way,
        precision="32-true",
        devices=devices,
        data=JSON(folder / "tokenizer" / "pairs.json", val_split_fraction=0.1, num_workers=0),
        train=train_args(epochs=2, max_steps=6),
        eval=EvalArgs(interval=100, max_iters=2, max_new_tokens=4),
        logger_name="csv",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=["pretrain", "resume", "convert", "full", "lora", "lora_legacy", "generate"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.job in ("pretrain", "resume"):
        pretrain(chosen.folder, chosen.devices, chosen.job == "resume")
    elif chosen.job == "convert":
        from litgpt.scripts.convert_pretrained_checkpoint import convert_pretrained_checkpoint

        convert_pretrained_checkpoint(chosen.folder / "pretrained" / "final", chosen.folder / "base")
    elif chosen.job == "generate":
        from litgpt.generate.base import main as generate

        generate(chosen.folder / "base", "3 and 4", max_new_tokens=8, precision="32-true")
    else:
        finetune(chosen.folder, chosen.devices, chosen.job)


if __name__ == "__main__":
    main()
