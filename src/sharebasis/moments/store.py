"""artifacts/moments: packed triangles in float64, and an index of who reads what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sharebasis.errors import CalibrationError
from sharebasis.io.artefact import TensorArtefact, TensorIndex
from sharebasis.io.atomic import require_disk
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.moments import Moment, MomentAccumulator
from sharebasis.model.sites import Site

Accumulators = Mapping[str, MomentAccumulator]
"""By site name."""


@dataclass(frozen=True)
class MomentIndex(TensorIndex):
    """What artifacts/moments holds."""

    sites: tuple[Site, ...]
    n_tokens: Mapping[str, int]
    """Tokens that count, by site name."""
    files: Mapping[str, str]
    """Tensor name -> file name."""
    n_trimmed: Mapping[str, int] = field(default_factory=dict)
    """Tokens that were left out, by site name, where there were any."""


MOMENTS = TensorArtefact("moments.json", MomentIndex, "moments")


def write_moments(target: Path, sites: Sequence[Site], accumulators: Accumulators) -> None:
    """Write artifacts/moments: packed triangles in float64, and an index.

    Raises:
        CalibrationError: an input was not finite, or there was none.
        StoreError: the disk is full.
    """
    tokens, trimmed = tokens_of(accumulators), trimmed_of(accumulators)
    with MOMENTS.writing(target) as moments:
        require_disk(moments.directory, sum(4 * site.d * (site.d + 1) for site in sites))
        for name, tensor in packed(accumulators):
            moments.add(name, tensor)
        moments.finish(lambda files: MomentIndex(tuple(sites), tokens, files, trimmed))


def packed(accumulators: Accumulators) -> Iterator[tuple[str, Tensor]]:
    """The moment of every site as tensors for a file, one at a time."""
    for name, accumulator in accumulators.items():
        moment = accumulator.moment()
        rows, columns = torch.triu_indices(*moment.total.shape)
        yield f"{name}.total", moment.total[rows, columns].cpu()
        yield f"{name}.sum", moment.sum.cpu()


def tokens_of(accumulators: Accumulators) -> dict[str, int]:
    """Tokens that count, by site name."""
    return {name: sums.n_tokens for name, sums in accumulators.items()}


def trimmed_of(accumulators: Accumulators) -> dict[str, int]:
    """Tokens that were left out, by site name, where there were any."""
    return {name: sums.n_trimmed for name, sums in accumulators.items() if sums.n_trimmed}


def read_moment(reader: TensorReader, site: str, n_tokens: int) -> Moment:
    """Read one site's moment back."""
    upper, total_sum = reader.read(f"{site}.total"), reader.read(f"{site}.sum")
    d = len(total_sum)
    rows, columns = torch.triu_indices(d, d)
    total = torch.zeros(d, d, dtype=torch.float64)
    total[rows, columns] = upper
    total[columns, rows] = upper
    return Moment(total, total_sum, n_tokens, site)


def gradient_site(sublayer: str) -> str:
    """Name of the moment of the gradients of what a sublayer puts out."""
    return f"{sublayer}.gradient"


class MomentStore:
    """The moments of artifacts/moments, by the sublayers that read them.

    Raises:
        StoreError: there is no such artefact.
    """

    def __init__(self, directory: Path) -> None:
        index, self._reader = MOMENTS.open(directory)
        self._n_tokens, self._n_trimmed = index.n_tokens, index.n_trimmed
        self._site = {reader: site.name for site in index.sites for reader in site.readers}

    def site(self, sublayer: str) -> str:
        """Name of the site that a sublayer reads.

        Raises:
            CalibrationError: calibration did not track the sublayer.
        """
        if sublayer not in self._site:
            raise CalibrationError(f"There is no moment for {sublayer}; run calibrate again.")
        return self._site[sublayer]

    @property
    def n_tokens(self) -> int:
        """Tokens of the calibration text: what the busiest input has seen."""
        return max(map(self.n_seen, self._n_tokens))

    def n_seen(self, site: str) -> int:
        """Tokens of a site, those that were left out included."""
        return self._n_tokens[site] + self._n_trimmed.get(site, 0)

    def gradient(self, sublayer: str) -> Moment:
        """Of the gradients of what a sublayer puts out.

        Raises:
            CalibrationError: calibration did not track gradients.
        """
        if gradient_site(sublayer) not in self._n_tokens:
            raise CalibrationError(
                f"There is no gradient moment for {sublayer}. Set calibrate.gradients=model (or "
                "text), or fit.two_sided=false."
            )
        return self.read(gradient_site(sublayer))

    def read(self, site: str) -> Moment:
        return read_moment(self._reader, site, self._n_tokens[site])
