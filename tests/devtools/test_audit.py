"""What `dev.py audit` says of pip-audit's lists."""

import pytest

from pixart_pack.devtools import audit

SOUND = {"name": "a", "version": "1", "vulns": []}
FAULTY = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}, {"id": "PYSEC-2"}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([SOUND, UNKNOWN], 0, "1 packages audited, 1 without data, 0 known faults."),
        ([UNKNOWN, UNKNOWN], 0, "Nothing was audited: the package index gave no data for any of 2 packages."),
        ([SOUND, FAULTY], 1, "b 2: PYSEC-1, mended in 3\nb 2: PYSEC-2, mended in no version yet\n2 packages audited"),
    ],
)
def test_the_report(packages, code, said, capsys):
    assert audit.report(packages) == code
    assert said in capsys.readouterr().out
