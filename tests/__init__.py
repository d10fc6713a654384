"""The tests of gptjax, a file of them for each of its ideas."""

import pytest

pytest.register_assert_rewrite("tests.helpers")
