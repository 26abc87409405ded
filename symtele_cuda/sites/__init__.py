"""Sites: places of a model where a group acts and the outputs stay what they are on *every* input.

`find_sites` looks for them; `LinearPair`, `QueryKey`, `Scales` and `Stream` declare them by names of modules. A `Site`
is what both come to: a group, and the dimensions of parameters that it acts along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import TeleportError
from ..report import frozen_text
from ..transaction import Transaction
from .action import Axis, Parameters, Site, check_disjoint
from .attention import Refused, pairs_of_attention
from .declared import Declaration, LinearPair, QueryKey, Scales, Stream
from .graph import pairs_in
from .names import ModelNames
from .streams import known_streams, obstacle, post_norms

__all__ = [
    "Axis",
    "LinearPair",
    "Parameters",
    "QueryKey",
    "Refused",
    "Scales",
    "Site",
    "Sites",
    "Stream",
    "find_sites",
    "resolve",
]

TIED = "it would change {!r}, which other modules share"


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """The sites of a model, and the places that might be some and are none; `str` of it is a table of both."""

    found: tuple[Site, ...]
    refused: tuple[Refused, ...] = ()

    def __getitem__(self, index: int) -> Site:  # type: ignore[override]  # a slice makes no table
        return self.found[index]

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        rows = [("site", "group", "exact on", "parameters")]
        rows += [(site.kind, site.described, "every input", _listed(site.names)) for site in self.found]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines += [f"no site: {one.where}: {one.reason}" for one in self.refused]
        return "\n".join(line.rstrip() for line in lines)


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def find_sites(model: nn.Module) -> Sites:
    """The sites of any model that its structure tells, and why others are none.

    Found are: pairs of layers that torch.fx can follow, with a positively homogeneous activation between them or none;
    value and output, query and key of attention (torch's, that of transformers' GPT-2, Llama, ViT and BERT, of nanoGPT,
    of timm); LoRA's factors; the residual streams of pre-norm Transformers whose norms have no gains, see `fold_norms`
    and `convert_layernorm`. What else there is is for you to declare.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return Transaction().run(lambda: _find(model))


def _find(model: nn.Module) -> Sites:
    names = ModelNames(model)
    found, refused = list[Site](), list[Refused]()
    taken = set[tuple[str, int, int]]()
    for declared in (*pairs_of_attention(model), *pairs_in(model)):
        if isinstance(declared, Refused):
            refused.append(declared)
            continue
        try:
            sites = list(declared.sites_in(names))
        except ValueError as error:
            refused.append(Refused(str(declared), str(error)))
            continue
        for site in sites:
            entries = {(axis.name, axis.dim, axis.start) for axis in site.axes}
            if entries & taken:
                continue  # found before, in another way
            taken |= entries
            reason = next(_reasons(names, site, site.names), None)
            if reason is None:
                found.append(site)
            else:
                refused.append(Refused(str(declared), reason))
    for stream in known_streams(names):
        (site,) = stream.sites_in(names)
        norms = (obstacle(names.modules[norm], norm) for norm, _ in stream.norms_in(names))
        reason = next((text for text in norms if text is not None), None) or next(_reasons(names, site, ()), None)
        if reason is None:
            found.append(site)
        else:
            refused.append(Refused("stream", reason))
    refused += post_norms(model)
    return Sites(tuple(found), tuple(refused))


def _reasons(names: ModelNames, site: Site, untied: Sequence[str]) -> Iterator[str]:
    """Why a site cannot act. untied: those of its parameters that no other module may share."""
    for name in site.names:
        if not names.parameters[name].requires_grad:
            yield frozen_text(name)
        if name in untied and name in names.tied:
            yield TIED.format(name)


def resolve(model: nn.Module, sites: Iterable[Site | Declaration] | str) -> list[Site]:
    """The sites that `sites` come to in a model, checked: "auto" is `find_sites`.

    Raises:
        TypeError: one is no site and declares none, or has a parameter that is a shard of FSDP or another subclass.
        ValueError: they name what the model does not have, or parameters that do not train; they overlap.
        TeleportError: there is none.
    """
    if sites == "auto":
        sites = find_sites(model)
    if isinstance(sites, str) or not isinstance(sites, Iterable):
        raise TypeError(f"sites must be a sequence of sites, got {type(sites).__name__}")
    names, listed = ModelNames(model), list[Site]()
    for site in sites:
        if isinstance(site, Site):
            listed.append(site)
        elif callable(getattr(site, "sites_in", None)) and not isinstance(site, type):
            listed += site.sites_in(names)
        else:
            raise TypeError(f"sites must be Sites, or declare them by sites_in(names), got {type(site).__name__}")
    if not listed:
        raise TeleportError("sites: expected at least one place where a group acts, got none")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for site in listed:
        if missing := [name for name in site.names if name not in trainable]:
            raise ValueError(f"sites must name trainable parameters of the model, got {missing} in {site.kind}")
        site.check(trainable)
        for name in site.names:
            if type(trainable[name]) is not nn.Parameter:
                kind = type(trainable[name]).__name__
                raise TypeError(f"sites must be of plain parameters, not of shards or subclasses, got {kind} {name!r}")
    check_disjoint(listed)
    return listed
