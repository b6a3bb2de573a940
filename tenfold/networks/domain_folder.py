"""A folder with one file for the core of a multi-domain network, and a small one for each domain."""

from __future__ import annotations

import json
from pathlib import Path

from tenfold.errors import CheckpointError, UnknownNameError
from tenfold.files import atomic_write
from tenfold.networks.multi_domain import MultiDomainNet
from tenfold.registry import did_you_mean
from tenfold.tensors.digests import digest
from tenfold.tensors.tensor_file import check_digest, read_tensors, write_tensors

CORE = "core.safetensors"
SUFFIX = ".domain.safetensors"


def save_domains(net: MultiDomainNet, folder: Path | str) -> None:
    """Write the core, unless it is there already, and a file for every domain of the network.

    Use it again after a domain was added: the core and the other domains' files stay as they are where nothing about
    them has changed.

    Raises:
        CheckpointError: the folder holds another core, to which the domains there belong.
        FileError: a file cannot be written.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    core = {"core": net.stack.core.detach().cpu()}
    shape = json.dumps({"channels": net.channels, "layers": net.layers, "ranks": list(net.stack.ranks)})
    own = digest(core, shape)
    if (path / CORE).is_file():
        if read_tensors(path / CORE)[1].get("digest") != own:
            msg = f"{path} has the core of another network, to which its domains belong: choose another folder"
            raise CheckpointError(msg)
    else:
        with atomic_write(path / CORE) as partial:
            write_tensors(partial, core, {"shape": shape}, ("shape",))
    for name, domain in net.domains.items():
        facts = json.dumps({"inputs": domain.inputs, "classes": domain.classes})
        with atomic_write(path / f"{name}{SUFFIX}") as partial:
            write_tensors(partial, net.domain_state(name), {"core": own, "facts": facts}, ("core", "facts"))


def stored_domains(folder: Path | str) -> tuple[str, ...]:
    """Return the names of the domains in a folder, in order.

    Use it to see what ``load_domains`` can load.
    """
    return tuple(sorted(file.name.removesuffix(SUFFIX) for file in Path(folder).glob(f"*{SUFFIX}")))


def load_domains(folder: Path | str, domain: str | None = None) -> MultiDomainNet:
    """Return the network of a folder in evaluation mode, with one domain or with all.

    Args:
        folder: that ``save_domains`` wrote.
        domain: the only one to load, which is then in use; all when left out, the first in use.

    Raises:
        CheckpointError: files that are missing or damaged, or a domain of another core.
        UnknownNameError: no such domain.

    Example:
        >>> import tempfile
        >>> import torch
        >>> net = MultiDomainNet(8, 2)
        >>> net.add_domain("digits", inputs=1, classes=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_domains(net, folder)
        ...     again = load_domains(folder, "digits")
        >>> x = torch.randn(1, 1, 16, 16)
        >>> torch.equal(again(x), net.eval()(x))
        True
    """
    path, names = Path(folder), stored_domains(folder)
    if not (path / CORE).is_file() or not names:
        msg = f"{path} is no folder of domains: it has no {CORE} with domains beside it; save_domains writes them"
        raise CheckpointError(msg)
    if domain is not None and domain not in names:
        msg = f"unknown domain {domain!r} in {path}. {did_you_mean(domain, names)}"
        raise UnknownNameError(msg)
    tensors, header = read_tensors(path / CORE)
    check_digest(path / CORE, tensors, header, ("shape",))
    shape = json.loads(header["shape"])
    net = MultiDomainNet(shape["channels"], shape["layers"], tuple(shape["ranks"]))
    net.to(tensors["core"].dtype)
    net.stack.core.data.copy_(tensors["core"])
    for name in names if domain is None else (domain,):
        file = path / f"{name}{SUFFIX}"
        own, facts = read_tensors(file)
        check_digest(file, own, facts, ("core", "facts"))
        if facts["core"] != header["digest"]:
            msg = f"{file} belongs to another core than {path / CORE}"
            raise CheckpointError(msg)
        net.add_domain(name, **json.loads(facts["facts"]))
        net.load_state_dict(own, strict=False)
    net.use(domain or names[0])
    return net.eval()
