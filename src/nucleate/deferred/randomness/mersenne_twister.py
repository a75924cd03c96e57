"""The stream of torch's CPU generator, which can move forward by any distance without drawing the numbers in between.

The generator is MT19937 (Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8(1), 1998): its 19937 bits of state
are moved by a linear map T over GF(2), so T^n equals g(T), where g is x^n modulo the characteristic polynomial of T.
g(T) applied to a state is the exclusive or of those states, among the next 19937, whose coefficient in g is 1
(Haramoto, Matsumoto, Nishimura, Panneton, L'Ecuyer, "Efficient Jump Ahead for F2-Linear Random Number Generators",
INFORMS J. Computing 20(3), 2008). Two facts make it cheap here. The polynomial has 135 terms and a gap of 623 below
the first, so a remainder takes some 440 shifts. The sum uses a table of four coefficients at a time, with gathers by
torch. It takes 0.7 ms, the time of half a million draws.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nucleate.deferred.torch_modes import plain_modes

# Matsumoto and Nishimura 1998, table II.
_N, _M, _W, _R = 624, 397, 32, 31
_A = 0x9908B0DF
_DEGREE = _N * _W - _R

# A CPU generator's state (aten/src/ATen/CPUGeneratorImpl.cpp, torch 2.13): the seed (8 bytes), two ints (the first is
# the number of words left in the block, plus one), the index of the next word (8), then 624 words of 8 bytes, in which
# only the lower four count, then the cached gaussians.
_LEFT = slice(8, 12)
_NEXT = slice(16, 24)
_WORDS = slice(24, 24 + 8 * _N)

#: Shorter distances are drawn, because a jump takes about as long as this many 32-bit draws.
JUMP_COST = 400_000

# Coefficients of g that one row of the table stands for.
_WINDOW = 4
# Rows that are gathered at a time: so few that torch does not split the work over threads
# (`at::internal::GRAIN_SIZE`). Threads do not pay here and may be busy.
_NUM_ROWS = 96
# Pairs of numbers that `draw` draws at a time.
_PIECE = 1 << 14


class Stream:
    """A CPU generator and its offset: the number of 32-bit draws behind some origin.

    Args:
        state: The generator's state, as `torch.Generator.get_state` returns it.
        offset: The offset of that state.
    """

    def __init__(self, state: Tensor, offset: int) -> None:
        self.generator = torch.Generator()
        self.generator.set_state(state)
        self.offset = offset

    def seek(self, offset: int, workspace: Workspace) -> None:
        """Move forward to `offset`.

        Args:
            offset: The new offset, at least the present one.
            workspace: Memory for jumps.
        """
        distance = offset - self.offset
        if distance < 0:
            raise ValueError(f"a stream cannot go back from {self.offset} to {offset}")
        if distance > JUMP_COST and jumps_as_it_draws():
            # Jump by whole blocks. So equal distances use the same polynomial, wherever in a block they begin.
            rest = distance % _N
            self.generator.set_state(jump(self.generator.get_state(), distance - rest, workspace))
            distance = rest
        draw(self.generator, distance)
        self.offset = offset


class Workspace:
    """Memory of 2 MiB for jumps, allocated at the first jump. Two threads must not use it at the same time."""

    def __init__(self) -> None:
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return memory for the table, for the gathered rows and for their sum."""
        if self._tensors is None:
            self._tensors = (
                torch.zeros(1 << _WINDOW, _LENGTH, dtype=torch.int32),
                torch.empty(_NUM_ROWS, _N // 2, dtype=torch.int64),
                torch.empty(_NUM_ROWS, _N // 2, dtype=torch.int64),
            )
        return self._tensors


def draw(generator: torch.Generator, count: int) -> None:
    """Draw `count` 32-bit numbers and discard them."""
    if not count:
        return
    # A 64-bit integer takes two draws and little other work.
    pairs = torch.empty(min(count // 2, _PIECE), dtype=torch.int64)
    for start in range(0, count // 2, _PIECE):
        pairs[: count // 2 - start].random_(generator=generator)
    if count % 2:
        torch.empty(1, dtype=torch.uint8).random_(generator=generator)


def jump(state: Tensor, count: int, workspace: Workspace | None = None) -> Tensor:
    """Return the state after `count` 32-bit draws, without drawing them.

    Args:
        state: A CPU generator's state.
        count: The number of draws.
        workspace: Memory for the jump; by default, new memory.
    """
    state = state.clone()
    if count == 0:
        return state
    left = state[_LEFT].view(torch.int32)
    # The draws that are taken from a block of 624. A block that was just seeded counts as used up.
    blocks, drawn = divmod(_N + 1 - int(left) + count - 1, _N)
    if blocks:
        # The next draw computes the next block. From there on the map is linear: the lower bits of a seed's first word,
        # which do not belong to the 19937, are gone.
        left.fill_(1)
        generator = torch.Generator()
        generator.set_state(state)
        state[_WORDS].view(torch.int64).copy_(_untempered(_block(generator, blocks - 1, workspace or Workspace())))
    left.fill_(_N - drawn)
    state[_NEXT].view(torch.int64).fill_(drawn + 1)
    return state


@functools.cache
@plain_modes()
def jumps_as_it_draws() -> bool:
    """Return whether this build of torch has the generator that this module describes, tried once."""
    for seed, before, distance in ((0, 0, 30_000), (1, 1, 624 * 40 + 623), (2, 623, 700_001)):
        generator = torch.Generator().manual_seed(seed)
        torch.empty(3).normal_(generator=generator)  # This leaves a gaussian in the state.
        draw(generator, before)
        state = generator.get_state()
        draw(generator, distance)
        if not torch.equal(generator.get_state(), jump(state, distance)):
            return False
    return True


def _block(generator: torch.Generator, ahead: int, workspace: Workspace) -> Tensor:
    """Return the numbers (as int32) of the block that lies `ahead` blocks behind the generator's next one."""
    # `random_` of all 64 bits draws the upper half first (aten/src/ATen/core/DistributionsHelper.h).
    pairs = torch.empty((_LENGTH + _WINDOW + 1) // 2, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    numbers = pairs.view(torch.int32).view(-1, 2).flip(1).view(-1)
    if ahead < _DEGREE // _N:
        return numbers[ahead * _N : (ahead + 1) * _N]
    table, rows, total = workspace.tensors()
    for bit in range(_WINDOW):
        width = 1 << bit
        for row in range(width):
            torch.bitwise_xor(table[row], numbers[bit : bit + _LENGTH], out=table[width + row])
    # Every state begins at a multiple of four numbers, so two numbers are one integer.
    pairs = table.view(torch.int64).view(-1)
    states = pairs.as_strided((pairs.numel() - _N // 2, _N // 2), (1, 1))
    first, *rest = _table_rows(ahead)
    torch.index_select(states, 0, first, out=total)
    for places in rest:
        torch.index_select(states, 0, places, out=rows)
        total.bitwise_xor_(rows)
    height = _NUM_ROWS
    while height % 2 == 0:
        height //= 2
        total[:height].bitwise_xor_(total[height : 2 * height])
    for row in range(1, height):
        total[0].bitwise_xor_(total[row])
    return total[0].view(torch.int32)


# The numbers that are needed so that a state begins at each of the 19937 places (rounded up to whole windows).
_LENGTH = (_DEGREE // _WINDOW + 1) * _WINDOW + _N


@functools.lru_cache(maxsize=256)
@plain_modes()
def _table_rows(ahead: int) -> tuple[Tensor, ...]:
    """Return the places in the table of the states whose sum is the state `ahead` blocks later, in groups."""
    bits = _power_of_x(ahead).to_bytes(_DEGREE // 8 + 4, "little")
    windows = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
    windows = torch.stack([windows & 15, windows >> 4], 1).view(-1)[: _DEGREE // _WINDOW + 1].to(torch.int32)
    places = (windows * _LENGTH + _WINDOW * torch.arange(len(windows), dtype=torch.int32)) // 2
    # Row 0 of the table is zero.
    padded = torch.nn.functional.pad(places, (0, -len(places) % _NUM_ROWS))
    return padded.view(-1, _NUM_ROWS).unbind()


def _untempered(numbers: Tensor) -> Tensor:
    """Return the words of the state (as int64) from the numbers that the generator made from them."""
    y = numbers.to(torch.int64) & 0xFFFFFFFF
    y ^= y >> 18
    y ^= (y << 15) & 0xEFC60000
    word = y
    for _ in range(4):
        word = y ^ ((word << 7) & 0x9D2C5680)
    y = word
    for _ in range(2):
        word = y ^ (word >> 11)
    return word


# -- polynomials over GF(2): an integer whose bit i is the coefficient of x^i --------------------------------------


def _power_of_x(blocks: int) -> int:
    """Return x^(624 * blocks) modulo the characteristic polynomial."""
    # 31 * 624 is below the degree, so the upper five bits need no multiplication.
    low_bits = max(0, blocks.bit_length() - 5)
    power = 1 << _N * (blocks >> low_bits)
    for bit in reversed(range(low_bits)):
        power = _remainder(_square(power))
        if blocks >> bit & 1:
            power = _remainder(power << _N)
    return power


_SPREAD = [sum((nibble >> bit & 1) << 2 * bit for bit in range(4)) for nibble in range(16)]
_SPREAD_LOW = bytes(_SPREAD[byte & 15] for byte in range(256))
_SPREAD_HIGH = bytes(_SPREAD[byte >> 4] for byte in range(256))


def _square(polynomial: int) -> int:
    # Squaring puts a zero between any two coefficients.
    packed = polynomial.to_bytes(_DEGREE // 8 + 1, "little")
    spread = bytearray(2 * len(packed))
    spread[0::2] = packed.translate(_SPREAD_LOW)
    spread[1::2] = packed.translate(_SPREAD_HIGH)
    return int.from_bytes(spread, "little")


def _remainder(polynomial: int) -> int:
    """Return a polynomial of a degree below twice 19937 modulo the characteristic one.

    The quotient is the upper half times the inverse of the reversed characteristic polynomial r, as a power series of
    19937 terms. r = 1 + x^623 + ..., so r^32 = 1 + x^19936 + ...; hence 1 / r = r * r^2 * r^4 * r^8 * r^16
    (times r^32 for the last term), where r^(2^k) has the exponents of r, times 2^k.
    """
    quotient = polynomial >> _DEGREE
    if quotient == 0:
        return polynomial
    lower, factors = _characteristic()
    for shifts in factors:
        product, length = quotient, quotient.bit_length()
        for shift in shifts:
            if shift >= length:
                break
            product ^= quotient >> shift
        quotient = product
    for exponent in lower:
        polynomial ^= quotient << exponent
    return polynomial & ((1 << _DEGREE) - 1)


@functools.cache
def _characteristic() -> tuple[list[int], list[list[int]]]:
    """Return the exponents of the characteristic polynomial except the highest, and those of its reverse's powers."""
    # Matsumoto and Nishimura 1998, appendix A, with u = x^n + x^m and v = x^(n-1) + x^(m-1):
    # u v^31 + sum of a_i u v^(30-i) for i < 31 + a_31, where a_i are the bits of the matrix's last row.
    powers = [1]
    for _ in range(_R):
        powers.append(powers[-1] << (_N - 1) ^ powers[-1] << (_M - 1))

    def times_u(polynomial: int) -> int:
        return polynomial << _N ^ polynomial << _M

    total = times_u(powers[_R])
    for bit in range(_R):
        if _A >> bit & 1:
            total ^= times_u(powers[_R - 1 - bit])
    if _A >> _R & 1:
        total ^= 1
    lower = [exponent for exponent, bit in enumerate(f"{total:b}"[:0:-1]) if bit == "1"]
    gaps = [_DEGREE - exponent for exponent in reversed(lower)]
    factors = []
    scale = 1
    while gaps[0] * scale < _DEGREE:
        factors.append([gap * scale for gap in gaps if gap * scale < _DEGREE])
        scale *= 2
    return lower, factors
