import pytest
from journal.cases import write_tasks


@pytest.fixture
def journal(tmp_path):
    return write_tasks(tmp_path / "journal")[0]
