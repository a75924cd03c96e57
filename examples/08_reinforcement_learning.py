"""Reinforcement learning (PPO): an agent learns to balance a pole on a cart.

    python examples/08_reinforcement_learning.py
    torchrun --nproc-per-node 2 examples/08_reinforcement_learning.py --strategy ddp

The environment is `cart_pole.py`: many carts at once, in tensors. Each process plays its share of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.optim import Optimizer

from cart_pole import MAX_STEPS, CartPoles
from nucleate import Runtime
from options import parser_of

DISCOUNT, TRACE, CLIP = 0.99, 0.95, 0.2


class Agent(nn.Module):
    """The logits of the two actions, and the value of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(states), self.critic(states).squeeze(-1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--iterations", type=int, default=30, help="how often the agent plays, and then learns")
    parser.add_argument("--carts", type=int, default=32, help="environments, over all processes")
    parser.add_argument("--steps", type=int, default=64, help="steps that each environment plays in an iteration")
    args = parser.parse_args(argv)
    runtime = Runtime(accelerator=args.accelerator, strategy=args.strategy, precision=args.precision)
    runtime.launch()
    runtime.seed_everything(args.seed)
    if args.carts % runtime.world_size:
        raise SystemExit(f"--carts {args.carts} must be a multiple of the {runtime.world_size} processes.")

    with runtime.init_module():
        agent: nn.Module = Agent()
    optimizer: Optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3, eps=1e-5)
    agent, optimizer = runtime.setup(agent, optimizer)

    # The agent is the same on every process, its games are not.
    random = torch.Generator().manual_seed(args.seed + runtime.global_rank)
    carts = CartPoles(args.carts // runtime.world_size, random)
    runtime.print(f"return before training: {judge(runtime, agent):.1f} of {MAX_STEPS}")
    for iteration in range(1, args.iterations + 1):
        experience = play(runtime, agent, carts, args.steps, random)
        learn(runtime, agent, optimizer, experience, random)
        if iteration % 10 == 0:
            runtime.print(f"iteration {iteration}: return {judge(runtime, agent):.1f}")
    runtime.print(f"return after training: {judge(runtime, agent):.1f} of {MAX_STEPS}")


@torch.no_grad()
def play(runtime: Runtime, agent: nn.Module, carts: CartPoles, num_steps: int, random: torch.Generator) -> list[Tensor]:
    """Return states, actions, their log-probabilities, advantages and returns of `num_steps` of each cart."""
    steps = []
    for _ in range(num_steps):
        states = carts.states
        logits, values = (out.float().cpu() for out in agent(runtime.to_device(states)))
        actions = torch.multinomial(logits.softmax(dim=-1), 1, generator=random).squeeze(-1)
        rewards, ended = carts.step(actions)
        steps.append((states, actions, Categorical(logits=logits).log_prob(actions), values, rewards, ended))
    states, actions, log_probs, values, rewards, ended = map(torch.stack, zip(*steps, strict=True))
    next_value = agent(runtime.to_device(carts.states))[1].float().cpu()

    # Generalized advantage estimation, backwards in time.
    advantages = torch.zeros_like(values)
    advantage = torch.zeros_like(next_value)
    for step in reversed(range(num_steps)):
        goes_on = (~ended[step]).float()
        surprise = rewards[step] + DISCOUNT * goes_on * next_value - values[step]
        advantage = surprise + DISCOUNT * TRACE * goes_on * advantage
        advantages[step], next_value = advantage, values[step]
    return [part.flatten(0, 1) for part in (states, actions, log_probs, advantages, advantages + values)]


def learn(
    runtime: Runtime, agent: nn.Module, optimizer: Optimizer, experience: list[Tensor], random: torch.Generator
) -> None:
    """Take four rounds of PPO's steps on what was played."""
    for _ in range(4):
        for chosen in torch.randperm(len(experience[0]), generator=random).chunk(4):
            states, actions, old_log_probs, advantages, returns = runtime.to_device(
                [part[chosen] for part in experience]
            )
            logits, values = agent(states)
            policy = Categorical(logits=logits.float())
            ratio = (policy.log_prob(actions) - old_log_probs).exp()
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            gain = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
            loss = F.mse_loss(values.float(), returns) * 0.5 - gain - 0.01 * policy.entropy().mean()
            optimizer.zero_grad()
            runtime.backward(loss)
            runtime.clip_gradients(agent, optimizer, max_norm=0.5)
            optimizer.step()


@torch.no_grad()
def judge(runtime: Runtime, agent: nn.Module) -> float:
    """Return the mean return of 32 episodes that are the same each time, with the more likely action at each step."""
    carts = CartPoles(32, torch.Generator().manual_seed(0))
    returns, alive = torch.zeros(32), torch.ones(32, dtype=torch.bool)
    # All processes play the whole game in step: under fsdp, every process takes part in each call of the agent.
    while alive.any():
        rewards, ended = carts.step(agent(runtime.to_device(carts.states))[0].argmax(dim=-1).cpu())
        returns += rewards * alive
        alive &= ~ended
    return float(returns.mean())


if __name__ == "__main__":
    main()
