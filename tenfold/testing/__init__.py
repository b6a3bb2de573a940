"""The laws that every format, algorithm and rank rule obeys, as functions: run them on entries of your own.

    from tenfold.testing import check_format
    import my_package.my_format          # registers "my_format"
    check_format("my_format")

Nothing here needs pytest: a broken law raises ``LawBroken``, an AssertionError that names the law and the place.
"""

from tenfold.testing.algorithm_laws import ALGORITHM_LAWS, check_algorithm_laws
from tenfold.testing.checks import check_algorithm, check_all, check_format, check_rule
from tenfold.testing.format_laws import FORMAT_LAWS, check_format_laws
from tenfold.testing.geometries import GEOMETRIES, Geometry, served
from tenfold.testing.laws import LAWS, LawBroken
from tenfold.testing.model_laws import MODEL_LAWS, check_model_laws
from tenfold.testing.rule_laws import RULE_LAWS
from tenfold.testing.trials import Trial

__all__ = [
    "ALGORITHM_LAWS",
    "FORMAT_LAWS",
    "GEOMETRIES",
    "LAWS",
    "MODEL_LAWS",
    "RULE_LAWS",
    "Geometry",
    "LawBroken",
    "Trial",
    "check_algorithm",
    "check_algorithm_laws",
    "check_all",
    "check_format",
    "check_format_laws",
    "check_model_laws",
    "check_rule",
    "served",
]
