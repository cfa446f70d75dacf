"""Low-bit AdamW: its number formats, its chance, and the kernel against the reference."""

import pytest
import torch

from mvsplit.kernels import low_adamw as low

SETTINGS = low.LowSettings(1e-2, 0.9, 0.999, 1e-8, 0.1, 3)


POWER = 2 ** (1 / low.STEPS) - 1  # from one to the next


def draw(n, seed, scale=1.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale


def some_state(n, seed=1):
    state = low.LowState.zeros(torch.zeros(n))
    state.codes.copy_(torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)))
    state.scales.copy_(draw(n // low.BLOCK, seed).abs() * 1e-3)
    chance = low.random_words(n, seed, torch.device("cpu")) & 0xFFFF
    found = low.encode_powers(draw(n, seed + 1).square() * 1e-4, chance)
    for target, values in zip(state[2:], found, strict=True):
        target.copy_(values)
    return state


def test_every_code_comes_back():
    codes = torch.arange(256, dtype=torch.uint8)
    values = low.decode(codes)
    for chance in (0, 127, 255):
        again = low.encode(values, torch.full((256,), chance))
        assert torch.equal(low.decode(again), values)


def test_codes_are_e4m3_without_its_nan():
    """float8_e4m3fn has the same values, but for its largest code, which is NaN there."""
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(torch.float8_e4m3fn).float()
    ours = low.decode(codes)
    assert torch.equal(ours[theirs.isfinite()], theirs[theirs.isfinite()])
    assert ours.max() == low.LARGEST


@pytest.mark.parametrize("value", [0.3, -1.7, 100.0, 0.011, -0.0041, 0.0])
def test_codes_are_right_on_average(value):
    n = 65536
    chance = low.random_words(n, 1, torch.device("cpu")) & 0xFF
    found = low.decode(low.encode(torch.full((n,), value), chance)).double()
    quantum = max(abs(value) / 8, 2.0**-9)
    assert abs(found.mean() - value) < 4 * quantum / n**0.5
    assert found.unique().numel() <= 2


@pytest.mark.parametrize("value", [0.3, 1.7e-9, 4.0e20, 1e-37])
def test_powers_are_right_on_average(value):
    n = 65536
    chance = low.random_words(n, 1, torch.device("cpu")) & 0xFFFF
    found = low.decode_powers(*low.encode_powers(torch.full((n,), value), chance)).double()
    assert abs(found.mean() / value - 1) < 4 * POWER / n**0.5
    assert found.unique().numel() == 2


def test_a_power_stays_where_it_is():
    """The grid is the same whatever the block's largest is: nothing is rounded that does not
    change."""
    chance = low.random_words(low.BLOCK, 3, torch.device("cpu")) & 0xFFFF
    x = draw(low.BLOCK, 8).square()
    first = low.decode_powers(*low.encode_powers(x, chance))
    first[7] *= 8  # another base
    again = low.decode_powers(*low.encode_powers(first, chance.flip(0)))
    torch.testing.assert_close(again, first, rtol=1e-5, atol=0)


def test_powers_reach_from_zero_over_21_octaves():
    chance = torch.full((low.BLOCK,), 0x8000)
    x = torch.zeros(low.BLOCK)
    assert torch.equal(low.decode_powers(*low.encode_powers(x, chance)), x)
    x[:4] = torch.tensor([1.0, 2.0**-20, 2.0**-30, 1e-45])
    found = low.decode_powers(*low.encode_powers(x, chance))
    torch.testing.assert_close(found[:2], x[:2], rtol=POWER * 1.01, atol=0)
    assert 2.0**-22 < found[2] == found[3] < 2.0**-21  # more than they were: smaller steps
    assert (found[4:] == 0).all()


@pytest.mark.parametrize("value", [1.001, -3.2e-5, 7.0e20])
def test_bf16_is_right_on_average(value):
    n = 65536
    chance = low.random_words(n, 2, torch.device("cpu")) & 0xFFFF
    x = torch.full((n,), value)
    found = low.round_to_bf16(x, chance).double()
    assert abs(found.mean() / x[0].double() - 1) < 4 * 2.0**-8 / n**0.5
    assert found.unique().numel() == 2


def test_infinity_and_nan_stay():
    x = torch.tensor([float("inf"), float("-inf"), float("nan")])
    found = low.round_to_bf16(x, torch.full((3,), 0xFFFF)).float()
    assert torch.equal(found[:2], x[:2])
    assert found[2].isnan()


def test_words_are_uniform_and_differ_between_updates():
    first, second = (low.random_words(65536, u, torch.device("cpu")) for u in (1, 2))
    for words in (first, second):
        for shift in (0, 8, 16, 24):
            counts = ((words >> shift) & 0xFF).bincount(minlength=256).double()
            chi2 = ((counts - 256) ** 2 / 256).sum()
            assert 150 < chi2 < 380  # 255 ± 5.5 standard deviations
    agreement = (first & 0xFF == second & 0xFF).double().mean()
    assert abs(agreement - 1 / 256) < 1.5e-3


def test_an_update_is_adamw_on_average():
    """Many copies of one parameter: the mean follows AdamW in fp64, also far below bf16's step."""
    copies, steps = 128 * 256, 30
    values = torch.ones(copies).bfloat16()
    state = low.LowState.zeros(values)
    exact = torch.ones(1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.AdamW([exact], lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(1, steps + 1):
        grad = 0.01 + 0.003 * torch.sin(torch.tensor(float(step)))
        exact.grad = grad.double().view(1)
        adam.step()
        settings = low.LowSettings(2e-4, 0.9, 0.999, 1e-8, 0.1, step)
        low.low_adamw_(values, grad.expand(copies), state, settings)
    moved = float(1 - exact.detach())
    assert moved > 1.2 * 2.0**-8  # more than one step of bf16, made of thirty small ones
    assert abs(values.double().mean() - exact.item()) < 0.02 * moved


def test_the_same_update_twice_is_the_same():
    n = 4 * low.BLOCK
    found = []
    for _ in range(2):
        values, state = draw(n, 3).bfloat16(), some_state(n)
        low.low_adamw_(values, draw(n, 4), state, SETTINGS)
        found.append((values, *state))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_finite_shows_in_weights_and_both_moments(bad, fused, device):
    update = low.reference_low_adamw_
    if fused:
        pytest.importorskip("triton")
        from mvsplit.kernels.fused.low_adamw import low_adamw_ as update
    n, at = 3 * low.BLOCK, low.BLOCK + 5
    values, grads = draw(n, 3).bfloat16().to(device), draw(n, 4).bfloat16().to(device)
    state = low.LowState(*(t.to(device) for t in some_state(n)))
    grads[at] = bad
    update(values, grads, state, SETTINGS)
    for found in (values, state.second(), state.first()):
        assert not found[at].isfinite()
        assert found[: low.BLOCK].isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 3e-38, 1e-40])
@pytest.mark.parametrize("fused", [False, True])
def test_every_code_is_read_and_written(scale, fused, device):
    """Without a gradient a moment only decays: its codes stay, those that are subnormal too. Where
    1/scale is not a number, all of them become zero."""
    update = low.reference_low_adamw_
    if fused:
        pytest.importorskip("triton")
        from mvsplit.kernels.fused.low_adamw import low_adamw_ as update
    every = torch.arange(256).to(torch.uint8)
    values = torch.zeros(256).bfloat16().to(device)
    state = low.LowState.zeros(values)
    state.codes.copy_(every)
    state.scales.fill_(scale)
    update(values, values.clone(), state, SETTINGS)
    codes = low.decode(state.codes.cpu())
    assert torch.equal(codes, low.decode(every) if scale > low.LEAST else torch.zeros(256))
    torch.testing.assert_close(state.scales.cpu(), torch.full((2,), 0.9 * scale), rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [0.3, 1.7e-9, 4.0e20, 1e-37])
def test_the_kernel_writes_powers_that_are_right_on_average(value, device):
    """Its logarithm is a polynomial, which must not lean to one side."""
    pytest.importorskip("triton")
    from mvsplit.kernels.fused.low_adamw import low_adamw_ as fused

    n = 65536
    values = torch.zeros(n).bfloat16().to(device)
    state = low.LowState.zeros(values)
    grads = torch.full((n,), (value * 1000) ** 0.5).bfloat16().to(device)
    fused(values, grads, state, SETTINGS)
    wanted = (1 - SETTINGS.beta2) * grads[0].double().square().item()
    found = state.second().double()
    assert abs(found.mean().item() / wanted - 1) < 4 * POWER / n**0.5
    assert found.unique().numel() == 2


@pytest.mark.parametrize("blocks", [1, 17, 40])
def test_kernel_equals_reference(blocks, device, poisoned_memory):
    """Bit for bit, but where a fused multiply-add tips a value over to its neighbour."""
    pytest.importorskip("triton")
    from mvsplit.kernels.fused.low_adamw import low_adamw_ as fused

    n = blocks * low.BLOCK
    wanted_values, wanted_state, grads = draw(n, 3).bfloat16(), some_state(n), draw(n, 4, 0.1)
    values = wanted_values.clone().to(device)
    state = low.LowState(*(t.clone().to(device) for t in wanted_state))
    low.reference_low_adamw_(wanted_values, grads.bfloat16(), wanted_state, SETTINGS)
    fused(values, grads.bfloat16().to(device), state, SETTINGS)
    torch.testing.assert_close(state.scales.cpu(), wanted_state.scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(values.cpu(), wanted_values, rtol=2.0**-7, atol=0)
    seconds = [low.decode_powers(s.powers.cpu(), s.bases.cpu()) for s in (state, wanted_state)]
    torch.testing.assert_close(*seconds, rtol=POWER * 1.01, atol=0)
    ours, theirs = (low.decode(codes) for codes in (state.codes.cpu(), wanted_state.codes))
    torch.testing.assert_close(ours, theirs, rtol=1 / 8, atol=2.0**-9)
    same = [
        (values.cpu() == wanted_values),
        (state.powers.cpu() == wanted_state.powers),
        (state.codes.cpu() == wanted_state.codes),
    ]
    assert min(float(s.double().mean()) for s in same) > 0.99
