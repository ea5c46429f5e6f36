"""Head scores by many methods behind one signature: `CRITERIA` is the table, `measuring.measure` runs one of them.

Importing this package is cheap: the methods themselves, and torch, are loaded when one is measured.
"""

from sspcompile.criteria.table import CRITERIA, Criterion, Passes, criterion, key_of, of_key

__all__ = ["CRITERIA", "Criterion", "Passes", "criterion", "key_of", "of_key"]
