"""Export to files for other runtimes, checked against the model. Adding a file here adds a target."""

from importlib import import_module
from pkgutil import iter_modules

from tenfold.exporting.base import EXPORTERS, ExportConfig, Exporter
from tenfold.exporting.export import export
from tenfold.exporting.int8_linear import int8_linear
from tenfold.exporting.int8_onnx import quantize_onnx
from tenfold.exporting.low_bit_linear import low_bit_bytes, low_bit_linear, stored_bytes
from tenfold.exporting.open_file import open_exported

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "EXPORTERS",
    "ExportConfig",
    "Exporter",
    "export",
    "int8_linear",
    "low_bit_bytes",
    "low_bit_linear",
    "open_exported",
    "quantize_onnx",
    "stored_bytes",
]
