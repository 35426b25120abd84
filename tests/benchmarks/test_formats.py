"""The table of formats: every row is read as near to its package as it says, or refused by name."""

import importlib
import logging

import pytest

from pixart_pack.benchmarks import formats

# A weight as numbers on both sides: float32 products in another order.
NOISE = 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("module", formats.MODULES)
def test_every_format(module, tmp_path):
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    for number, row in enumerate(importlib.import_module(f"{formats.__name__}.{module}").ROWS):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = row.make(folder)
        if row.refused:
            with pytest.raises(ValueError, match=path.name) as refused:
                row.measure(path)
            assert "complete" not in str(refused.value)
            continue
        found = row.measure(path)
        assert found.error <= NOISE and found.cosine >= row.least_cosine, (row, found)


def test_the_table_stands_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{formats.BEGIN}\nold\n{formats.END}\nafter\n", encoding="utf-8")
    formats.write_table([["T5", "x", "y", "read", "0e+00", "1.0"]], page)
    text = page.read_text(encoding="utf-8")
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n") and "| T5 | x |" in text
