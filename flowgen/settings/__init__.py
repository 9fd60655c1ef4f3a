"""Configs: validated frozen dataclasses that can be converted to JSON and set on the command line.

A config is a class decorated with `config`. Its annotations declare the allowed values, for example with the ranges in
`flowgen.settings.ranges`. Its docstring has an entry for each field. Its `__post_init__` may check relations between
fields. A field whose value is a config is a group. Error messages begin with the name of a field. A config that
contains a group prepends the group's name to them. A field may accept user-defined objects, which are written as
"package.module:object" in commands and JSON (see `flowgen.settings.named`). This package imports no other part of
flowgen.
"""

from flowgen.settings.annotations import type_name
from flowgen.settings.command import override, words_of
from flowgen.settings.help import Setting, help_of, leaf_names, settings
from flowgen.settings.named import import_module, import_object, name_of, resolve
from flowgen.settings.plain import (
    TYPE,
    FieldError,
    check,
    config,
    differences,
    from_plain,
    in_group,
    to_plain,
)

__all__ = [
    "TYPE",
    "FieldError",
    "Setting",
    "check",
    "config",
    "differences",
    "from_plain",
    "help_of",
    "import_module",
    "import_object",
    "in_group",
    "leaf_names",
    "name_of",
    "override",
    "resolve",
    "settings",
    "to_plain",
    "type_name",
    "words_of",
]
