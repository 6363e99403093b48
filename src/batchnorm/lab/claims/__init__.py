"""The claims, one file each."""

from batchnorm.lab.claim import AnyClaim
from batchnorm.lab.claims.c01_converges_faster import ConvergesFaster

__all__ = ["CLAIMS", "find_claim"]

CLAIMS: tuple[type[AnyClaim], ...] = (ConvergesFaster,)


def find_claim(name: str) -> type[AnyClaim]:
    """The claim of that name or number.

    Raises:
        LookupError: There is none.
    """
    for claim in CLAIMS:
        if name in (claim.name, str(claim.number)):
            return claim
    raise LookupError(f"no claim {name!r}; `batchnorm lab` lists them")
