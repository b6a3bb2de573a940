from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, and no TENFOLD_DATA: nothing of the real machine is read or written."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.delenv("TENFOLD_DATA", raising=False)
    return folder


@pytest.fixture
def write_shard() -> Callable[..., Path]:
    """A function that writes pictures and labels as one Parquet file, in the layout of the Hub."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    import io

    def write(path: Path, images: np.ndarray, labels: list[int], column: str = "img", struct: bool = True) -> Path:
        def png(picture: np.ndarray) -> bytes:
            out = io.BytesIO()
            image.fromarray(picture).save(out, "PNG")
            return out.getvalue()

        encoded = [png(picture) for picture in images]
        rows = [{"bytes": e, "path": None} for e in encoded] if struct else encoded
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table({column: pa.array(rows, kind), "label": pa.array(labels, pa.int64())}), path)
        return path

    return write
