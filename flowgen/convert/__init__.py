"""Import of published weights: strict, and without executing what is in the files."""

from flowgen.convert.mapping import MappingError, Requirement, Rule, fill
from flowgen.convert.published import parse_file_name, tarflow
from flowgen.convert.readers import read_state_dict

__all__ = [
    "MappingError",
    "Requirement",
    "Rule",
    "fill",
    "parse_file_name",
    "read_state_dict",
    "tarflow",
]
