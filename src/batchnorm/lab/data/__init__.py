"""Real data out of installed packages, split by seed; and a toy control task."""

from batchnorm.lab.data.cart_pole import CartPole
from batchnorm.lab.data.examples import Examples, Split, batches
from batchnorm.lab.data.images import digits, mnist
from batchnorm.lab.data.tables import breast_cancer, diabetes, wine
from batchnorm.lab.data.text import CHARACTERS, Text, documentation

__all__ = [
    "CHARACTERS",
    "CartPole",
    "Examples",
    "Split",
    "Text",
    "batches",
    "breast_cancer",
    "diabetes",
    "digits",
    "documentation",
    "mnist",
    "wine",
]
