"""Noise: where it comes from, and what it is."""

import math
import random

import pytest
import torch
from scipy import stats

from perexample import ConfigurationError
from perexample._private import system_generator
from perexample.privacy import Noise
from perexample.privacy.normal import PIECE, plus_normal

SOURCES = {
    "torch": lambda: Noise(),
    "os": lambda: Noise(source="os"),
    "given": lambda: Noise(torch.Generator().manual_seed(3)),
}
each = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)


@each
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, (1 << 20) + 1])
def test_shape_dtype_and_finiteness(make, size):
    noise = make().like(torch.zeros(size, dtype=torch.bfloat16), 2.0)
    assert noise.shape == (size,)
    assert noise.dtype == torch.float64
    assert torch.isfinite(noise).all()


@each
def test_shapes_of_more_axes(make):
    assert make().like(torch.zeros(2, 0, 3), 1.0).shape == (2, 0, 3)
    assert make().like(torch.zeros(2, 5, 3), 1.0).shape == (2, 5, 3)
    assert make().like(torch.zeros(()), 1.0).shape == ()
    assert isinstance(make().number(1.0), float)


@each
def test_distribution(make):
    """Fails by chance once in 1e6 runs for each source that has no seed."""
    z = make().like(torch.zeros(200_000), 3.0)
    assert stats.kstest(z.numpy(), stats.norm(scale=3.0).cdf).pvalue > 1e-6
    assert abs(z.std().item() / 3.0 - 1) < 5 / math.sqrt(2 * len(z))
    half = len(z) // 2
    assert abs(torch.corrcoef(torch.stack([z[:half], z[half:]]))[0, 1]) < 5 / math.sqrt(half)
    assert abs(torch.corrcoef(torch.stack([z[:-1], z[1:]]))[0, 1]) < 5 / math.sqrt(half)
    assert abs(torch.corrcoef(torch.stack([z[:half] ** 2, z[half:] ** 2]))[0, 1]) < 5 / math.sqrt(half)


@pytest.mark.parametrize("make", [SOURCES["torch"], SOURCES["os"]], ids=["torch", "os"])
def test_no_seed_repeats_it(make):
    def draw():
        torch.manual_seed(0)
        random.seed(0)
        return make().like(torch.zeros(4), 1.0)

    assert not torch.equal(draw(), draw())


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    for make in SOURCES.values():
        make().like(torch.zeros(5), 1.0)
        make().number(1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_successive_draws_differ():
    for make in SOURCES.values():
        noise = make()
        assert not torch.equal(noise.like(torch.zeros(4), 1.0), noise.like(torch.zeros(4), 1.0))


def test_the_least_and_the_largest_bits_give_finite_numbers(monkeypatch):
    monkeypatch.setattr("os.urandom", lambda size: b"\xff" * size)
    z = Noise(source="os").like(torch.zeros(2), 1.0)
    assert torch.equal(z.abs(), torch.zeros(2, dtype=torch.float64))
    monkeypatch.setattr("os.urandom", lambda size: b"\x00" * size)
    z = Noise(source="os").like(torch.zeros(2), 1.0)
    assert torch.isfinite(z).all()
    assert abs(z).max() == pytest.approx(math.sqrt(2 * 64 * math.log(2)))


def test_every_bit_is_used_from_the_system(monkeypatch):
    asked = []
    monkeypatch.setattr("os.urandom", lambda size: asked.append(size) or bytes(size))
    Noise(source="os").like(torch.zeros(10), 1.0)
    assert sum(asked) == 80


def test_a_seed_of_torch_on_cpu_has_32_bits_and_ours_has_more():
    """Why `system_generator` sets the whole state: seeds that differ by 2^32 give the same numbers."""
    one, other = (torch.randn(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32))
    assert torch.equal(one, other)
    words = system_generator().get_state()[24 : 24 + 8 * 624].view(624, 8)
    assert (words[:, 4:] == 0).all()
    assert words[:, :4].unique().numel() > 250
    a, b = system_generator(), system_generator()
    assert (a.get_state() != b.get_state()).float().mean() > 0.4
    a.set_state(b.get_state())
    assert torch.equal(torch.rand(2000, generator=a), torch.rand(2000, generator=b))


def test_the_layout_of_a_generators_state_is_the_known_one():
    """The 32-bit words of the Mersenne twister, by its own recurrence of initial values (Matsumoto, Nishimura 2002)."""
    state = torch.Generator().manual_seed(1234).get_state()
    assert state.numel() == 5056
    words = state[24 : 24 + 8 * 624].contiguous().view(torch.int64).tolist()
    expected = [1234]
    for i in range(1, 624):
        expected.append((1812433253 * (expected[-1] ^ (expected[-1] >> 30)) + i) & 0xFFFFFFFF)
    assert words == expected


def test_state_of_a_given_generator():
    noise = SOURCES["given"]()
    noise.number(1.0)
    other = Noise(torch.Generator().manual_seed(9))
    other.set_state(noise.state())
    assert torch.equal(noise.like(torch.zeros(5), 1.0), other.like(torch.zeros(5), 1.0))
    assert Noise().state() is None
    Noise().set_state(noise.state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": 3}, r"generator must be a torch\.Generator or None, not 3"),
        ({"source": "secure"}, "source of noise must be 'torch' or 'os', not 'secure'"),
        ({"generator": torch.Generator(), "source": "os"}, "takes no generator"),
    ],
)
def test_arguments_without_meaning(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Noise(**arguments)


@each
def test_few_numbers_differ(make):
    noise = make().like(torch.zeros(3, 5), 1.0)
    assert noise.unique().numel() == noise.numel()


@pytest.mark.parametrize("size", [1, 2, 5, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 3])
def test_numbers_are_those_of_box_and_muller(size):
    drawn, generator = [], torch.Generator().manual_seed(1)

    def source(out):
        drawn.append(out.random_(generator=generator).clone())

    found = plus_normal(torch.ones(size), 3.0, source)
    assert all(bits.min() >= 0 for bits in drawn)
    for piece, bits in zip(found.split(PIECE), drawn, strict=True):
        first, second = (bits.double() / 2**63).split(len(bits) // 2)
        radius, angle = 3.0 * (-2 * first.log()).sqrt(), 2 * math.pi * second
        wanted = 1 + torch.cat([radius * angle.cos(), radius * angle.sin()])[: len(piece)]
        torch.testing.assert_close(piece, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (3, 5), (0,), (3, PIECE)])
def test_a_tensor_with_noise(shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    transposed = tensor.T if tensor.dim() == 2 else tensor
    one, other = SOURCES["given"](), SOURCES["given"]()
    found = one.plus(transposed, 0.5)
    assert found.dtype == torch.float64
    assert torch.equal(found, other.like(transposed, 0.5) + transposed.double())
    assert torch.equal(SOURCES["os"]().plus(transposed, 0.0), transposed.double())
