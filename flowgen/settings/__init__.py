"""Configs: validated frozen dataclasses that can be converted to JSON, set on the command line, and listed as help.

A config is a class decorated with `config`. Its annotations declare the allowed values, for example with the ranges in
`flowgen.settings.ranges`. Its docstring has an entry for each field, and `__post_init__` checks relations between
fields. An error message in a config names only the field; the enclosing config adds the name of the group. A field may
accept user-defined objects. In text, they are written as "package.module:object" (see `flowgen.settings.named`). This
package imports no other part of flowgen.
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
