"""The processes that work together: what each has goes to all, and all fail if one does."""

from batchnorm.ranks.together import Ranks

__all__ = ["Ranks"]
