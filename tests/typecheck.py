"""Shape annotations checked at run time, for every function of the package that has one (see pyproject's addopts).

Functions without array annotations are left alone: what they say of wrong arguments is theirs, and tested.
"""

import re

from beartype import BeartypeConf, beartype

ARRAY = re.compile(r"(Float|Float32|Int|UInt8|Bool|Num|Shaped)\[")
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def shapes(function):
    """Check calls of a function whose annotations name array shapes."""
    annotations = getattr(function, "__annotations__", {}).values()
    return _checked(function) if any(ARRAY.search(str(a)) for a in annotations) else function
