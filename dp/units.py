"""Who is protected: the neighboring relation.

The privacy unit itself (article, patient, author) is a plain name; the relation says which
two datasets a guarantee compares.
"""

from __future__ import annotations

import enum


class NeighboringRelation(enum.StrEnum):
    """Which two datasets count as neighbors.

    A sensitivity, and so the noise multiplier of an event, is always meant under the
    relation of the budget that the event is charged to.

    >>> NeighboringRelation("add_remove") is NeighboringRelation.ADD_REMOVE
    True
    """

    ADD_REMOVE = "add_remove"
    """One has one privacy unit more than the other. The size of the dataset is private."""

    REPLACE_ONE = "replace_one"
    """They have the same size and differ in one privacy unit."""
