"""Errors are tenfold's and a builtin's at once; a missing extra is named."""

from __future__ import annotations

import inspect
import warnings

import pytest

from tenfold import errors


@pytest.mark.parametrize(
    "error", [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, errors.TenfoldError)]
)
def test_every_error_is_tenfolds_and_a_builtins_and_says_what_it_means(error):
    if error is not errors.TenfoldError:
        builtin = [
            b for b in error.__mro__ if b.__module__ == "builtins" and b not in (Exception, BaseException, object)
        ]
        assert builtin, f"{error.__name__} is no builtin error"
    assert error.__doc__
    assert error.__doc__.strip().endswith(".")


@pytest.mark.parametrize("warning", [errors.CalibrationWarning])
def test_warnings_can_be_filtered_together(warning):
    assert issubclass(warning, errors.TenfoldWarning)
    assert issubclass(warning, UserWarning)


def test_a_warning_points_at_the_line_of_the_caller_through_decorators():
    from torch import nn, zeros

    import tenfold

    net = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.Linear(32, 32))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", errors.TenfoldWarning)
        line = inspect.currentframe().f_lineno + 1
        tenfold.compress(net, zeros(2, 32), "macs=0.5", runtime=tenfold.Runtime(measure=False))
        tenfold.calibrate(net, [zeros(2, 32)])
    lines = {warning.lineno for warning in said if warning.filename == __file__}
    assert lines == {line, line + 1}
    assert {warning.filename for warning in said} == {__file__}


def test_require_returns_the_module_or_names_the_extra():
    assert errors.require("json", "hf").dumps([1]) == "[1]"
    with pytest.raises(
        errors.MissingExtraError, match=r"no_such_module is not installed.*'tenfold\[vision\]'"
    ) as caught:
        errors.require("no_such_module", "vision")
    assert isinstance(caught.value, ImportError)
