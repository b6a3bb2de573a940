"""Many domains on one core: kernels multiplied out are the oracle, and old domains keep every bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import CheckpointError, UnknownNameError, WeightError
from tenfold.networks import MultiDomainNet, load_domains, save_domains, stored_domains
from tenfold.networks.multi_domain import DomainConvStack


def net_of(*names: str) -> MultiDomainNet:
    torch.manual_seed(0)
    net = MultiDomainNet(6, 4, (4, 5, 9, 3))
    for name in names:
        net.add_domain(name, inputs=1, classes=3)
    return net


def train(net: MultiDomainNet, x: Tensor, *, steps: int = 3) -> None:
    chosen = [p for p in net.train().parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()
    net.eval()


def pictures() -> Tensor:
    return torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def test_kernels_are_the_tucker_tensor_multiplied_out() -> None:
    torch.manual_seed(0)
    stack = DomainConvStack(5, 3, 4, (3, 2, 4, 2), dtype=torch.float64)
    stack.add("a")
    for factor in stack.factors["a"]:  # type: ignore[attr-defined]
        nn.init.normal_(factor)
    wanted = torch.einsum("abcd,oa,ib,kc,ld->loik", stack.core, *stack.factors["a"])  # type: ignore[misc]
    torch.testing.assert_close(stack.weights("a").flatten(3), wanted)


def test_a_domain_at_full_rank_begins_with_the_core_itself() -> None:
    stack = DomainConvStack(5, 3, 4)
    stack.add("a")
    core = stack.core.detach().permute(3, 0, 1, 2).unflatten(3, (3, 3))
    assert torch.equal(stack.weights("a").detach(), core)


def test_a_new_domain_changes_no_bit_of_the_others() -> None:
    net, x = net_of("digits"), pictures()
    net.train_domain("digits", core=True)
    train(net, x)
    before, state = net(x), {key: value.clone() for key, value in net.state_dict().items()}
    net.add_domain("letters", inputs=1, classes=3, like="digits")
    net.train_domain("letters")
    train(net, x.flip(0))
    learned = net(x)
    net.use("digits")
    assert torch.equal(net(x), before)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    assert not torch.equal(learned, before)
    net.use("letters")
    assert torch.equal(net(x), learned)


def test_a_domain_adds_what_it_says() -> None:
    net = net_of("digits")
    before = sum(p.numel() for p in net.parameters())
    net.add_domain("letters", inputs=3, classes=7)
    assert sum(p.numel() for p in net.parameters()) - before == net.added("letters")
    factors = 6 * 4 + 6 * 5 + 9 * 9 + 4 * 3
    assert net.added("letters") == factors + 3 * 6 * 9 + 5 * 12 + 6 * 7 + 7


def test_a_folder_has_one_core_and_small_domains(tmp_path: Path) -> None:
    net, x = net_of("digits", "letters"), pictures()
    train(net, x)
    net.use("digits")
    save_domains(net, tmp_path)
    assert stored_domains(tmp_path) == ("digits", "letters")
    core = (tmp_path / "core.safetensors").read_bytes()
    held = (tmp_path / "digits.domain.safetensors").read_bytes()
    net.add_domain("marks", inputs=1, classes=2)
    net.eval()
    save_domains(net, tmp_path)
    assert (tmp_path / "core.safetensors").read_bytes() == core
    assert (tmp_path / "digits.domain.safetensors").read_bytes() == held
    for name in ("digits", "letters", "marks"):
        net.use(name)
        alone = load_domains(tmp_path, name)
        assert list(alone.domains) == [name]
        assert torch.equal(alone(x), net(x))
        every = load_domains(tmp_path)
        every.use(name)
        assert torch.equal(every(x), net(x))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    net = net_of("digits")
    with pytest.raises(WeightError, match=r"\(batch, 1, ...\)"):
        net(torch.randn(2, 3, 8, 8))
    with pytest.raises(WeightError, match="'digits' is there already"):
        net.add_domain("digits", inputs=1, classes=2)
    with pytest.raises(UnknownNameError, match="Did you mean digits"):
        net.use("digit")
    with pytest.raises(WeightError, match="there is no domain yet"):
        MultiDomainNet(4, 2)(pictures())
    with pytest.raises(WeightError, match="layers=3"):
        MultiDomainNet(4, 3)
    with pytest.raises(WeightError, match="ranks="):
        MultiDomainNet(4, 2, (5, 4, 9, 2))
    with pytest.raises(CheckpointError, match="no folder of domains"):
        load_domains(tmp_path)
    save_domains(net, tmp_path)
    with pytest.raises(UnknownNameError, match="unknown domain 'letters'"):
        load_domains(tmp_path, "letters")
    with torch.no_grad():
        net.stack.core.add_(1)
    with pytest.raises(CheckpointError, match="core of another network"):
        save_domains(net, tmp_path)
    (tmp_path / "core.safetensors").unlink()
    save_domains(net, tmp_path / "other")
    (tmp_path / "other" / "core.safetensors").rename(tmp_path / "core.safetensors")
    (tmp_path / "other" / "digits.domain.safetensors").unlink()
    with pytest.raises(CheckpointError, match="belongs to another core"):
        load_domains(tmp_path)
