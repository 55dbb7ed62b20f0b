"""Limits of settings files that somebody else wrote."""

import pytest
import yaml

from qwlit.core.yaml_files import YamlError, read_yaml


def test_a_long_text_behind_many_aliases_is_refused_before_it_is_built(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"a: [&a {'x' * 100_000}{', *a' * 15_000}]\n")
    with pytest.raises(YamlError, match="line 1: more than 20,000 values"):
        read_yaml(file, yaml.SafeLoader)
    file.write_text(f"a: [&a {'x' * 100_000}{', *a' * 15}]\n")
    assert len(read_yaml(file, yaml.SafeLoader)["a"]) == 16
