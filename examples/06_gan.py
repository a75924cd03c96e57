"""Train a generator against a discriminator: two models, two optimizers, and digits that nobody wrote.

    python examples/06_gan.py
    torchrun --nproc-per-node 2 examples/06_gan.py --strategy ddp

The generator gets noise and the digit to draw. It is judged by its use: each held-out real image is read as the digit
of the generated image that is most like it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from digits import split_digits
from nucleate import Runtime
from options import parser_of

NUM_NOISE = 16


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="rounds through the data")
    args = parser.parse_args(argv)
    runtime = Runtime(accelerator=args.accelerator, strategy=args.strategy, precision=args.precision)
    runtime.launch()
    runtime.seed_everything(args.seed)
    training, held_out = split_digits()
    batches = runtime.setup_dataloaders(
        DataLoader(training, 64 // runtime.world_size, shuffle=True, drop_last=True),
    )

    with runtime.init_module():
        generator: nn.Module = nn.Sequential(network(NUM_NOISE + 10, 64), nn.Tanh())
        discriminator: nn.Module = network(64 + 10, 1)
    generates: Optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    discriminates: Optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    generator, generates = runtime.setup(generator, generates)
    discriminator, discriminates = runtime.setup(discriminator, discriminates)

    # The weights are the same on every process, the noise is not.
    random = torch.Generator().manual_seed(args.seed + runtime.global_rank)
    for epoch in range(1, args.epochs + 1):
        for images, digits in batches:
            labels = F.one_hot(digits, 10).float()
            drawn = generator(torch.cat((noise(labels, random), labels), dim=1))

            # The discriminator learns to tell real images from drawn ones.
            pairs = torch.cat((with_labels(images.flatten(1), labels), with_labels(drawn.detach(), labels)))
            is_real = torch.cat((torch.ones_like(labels[:, :1]), torch.zeros_like(labels[:, :1])))
            loss = F.binary_cross_entropy_with_logits(discriminator(pairs), is_real)
            discriminates.zero_grad()
            runtime.backward(loss)
            discriminates.step()

            # The generator learns to be taken for real. Its backward also fills the discriminator's gradients,
            # which the next zero_grad clears.
            verdict = discriminator(with_labels(drawn, labels))
            deceit = F.binary_cross_entropy_with_logits(verdict, torch.ones_like(verdict))
            generates.zero_grad()
            runtime.backward(deceit)
            generates.step()
        if epoch % 10 == 0:
            runtime.print(f"epoch {epoch}: discriminator {loss.item():.3f}, generator {deceit.item():.3f}")

    # All processes draw the same images: under fsdp none has the whole generator.
    random.manual_seed(args.seed)
    digits = runtime.to_device(torch.arange(1000) % 10)
    labels = F.one_hot(digits, 10).float()
    with torch.no_grad():
        drawn = generator(torch.cat((noise(labels, random), labels), dim=1))
    images, truth = runtime.to_device(held_out[:])
    nearest = torch.cdist(images.flatten(1), drawn.float()).argmin(dim=1)
    runtime.print(as_text(drawn[:10].cpu()))
    runtime.print(f"held-out accuracy of reading by generated images: {(digits[nearest] == truth).float().mean():.3f}")


def network(num_inputs: int, num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(num_inputs, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, num_outputs),
    )


def noise(like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(len(like), NUM_NOISE, generator=random).to(like.device)


def with_labels(images: Tensor, labels: Tensor) -> Tensor:
    return torch.cat((images, labels), dim=1)


def as_text(images: Tensor) -> str:
    """Return images `(count, 64)` side by side as lines of characters, bright ones for bright pixels."""
    shades = ((images.float().clamp(-1, 1) + 1) / 2 * 7).round().long().reshape(-1, 8, 8)
    rows = [["".join(" .:-=+*#"[shade] for shade in row) for row in image] for image in shades.tolist()]
    return "\n".join("  ".join(image[line] for image in rows) for line in range(8))


if __name__ == "__main__":
    main()
